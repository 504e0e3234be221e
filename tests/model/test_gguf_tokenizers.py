"""Tokenizers of GGUF files: which tokens texts become, by what their headers say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import pytest
from transformers.convert_slow_tokenizer import bytes_to_unicode

from pipeline.checkpoints.files import locate
from pipeline.errors import ModelError
from pipeline.settings.model_settings import ModelSettings

BYTES = list(bytes_to_unicode().values())
MERGED = ("ĠĠ", "12", "?Ċ")
NORMAL, CONTROL, USER_DEFINED = 1, 3, 4
DEEPSEEK = {
    "<\uff5cbegin▁of▁sentence\uff5c>": CONTROL,
    "<\uff5cUser\uff5c>": CONTROL,
    "<think>": USER_DEFINED,
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.gguf"


def source(
    path: Path,
    *,
    architecture: str = "llama",
    kind: str = "gpt2",
    tokens: dict[str, int] | None = None,  # and their types
    typed: bool = True,
    **settings: Any,
) -> Any:
    """A file of a tokenizer alone, whose `settings` are those below `tokenizer.ggml`."""
    tokens = {**dict.fromkeys([*BYTES, *MERGED], NORMAL), **(tokens or {})} if kind == "gpt2" else tokens
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_tokenizer_model(kind)
    writer.add_token_list(list(tokens))
    if typed:
        writer.add_token_types(list(tokens.values()))
    writer.add_token_scores([-float(n) for n in range(len(tokens))])
    if kind == "gpt2":
        writer.add_token_merges([" ".join(merged) for merged in MERGED])
    for key, value in settings.items():
        add = {bool: writer.add_bool, int: writer.add_uint32, str: writer.add_string}[type(value)]
        add(f"tokenizer.ggml.{key}", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return locate(ModelSettings(model=str(path)))


def split(tokenizer: Any, text: str) -> list[str]:
    return tokenizer.convert_ids_to_tokens(tokenizer.encode(text, add_special_tokens=False))


@pytest.mark.parametrize(
    ("pre", "expected"),
    [
        ("smollm", "a ĠĠ 1 2 ? Ċ"),
        ("gpt-2", "a Ġ Ġ 12 ? Ċ"),
        ("llama-bpe", "a Ġ Ġ 12 ?Ċ"),
        ("qwen2", "a Ġ Ġ 1 2 ?Ċ"),
        ("gpt-4o", "a Ġ Ġ 12 ?Ċ"),
        ("tekken", "a Ġ Ġ 1 2 ?Ċ"),
    ],
)
def test_each_pre_tokenizer_splits_in_its_own_way(path, pre, expected):
    tokenizer = source(path, pre=pre).tokenizer()
    assert split(tokenizer, "a  12?\n") == expected.split()
    assert tokenizer.decode(tokenizer.encode("a  12?\n")) == "a  12?\n"


def test_control_tokens_that_no_bytes_spell_keep_their_numbers(path):
    tokenizer = source(path, pre="deepseek-r1-qwen", tokens=DEEPSEEK, bos_token_id=259).tokenizer()
    assert tokenizer.encode("<\uff5cUser\uff5c>a<think>", add_special_tokens=False) == [
        260,
        BYTES.index("a"),
        261,
    ]
    assert (tokenizer.bos_token_id, len(tokenizer)) == (259, 262)


def test_control_tokens_that_a_converter_took_for_text(path):
    tokens = {"<|im_end|>": NORMAL, "<|fim_pad|>": USER_DEFINED}
    tokenizer = source(path, pre="qwen2", tokens=tokens).tokenizer()
    assert tokenizer.encode("<|im_end|><|fim_pad|>") == [259, 260]
    assert [tokenizer.added_tokens_decoder[number].special for number in (259, 260)] == [True, False]


def test_words_of_llama_3_stand_above_its_merges_and_texts_begin_with_bos(path):
    settings = {"tokens": {"abc": NORMAL, "<s>": CONTROL}, "bos_token_id": 260}
    assert source(path, pre="llama-bpe", **settings).tokenizer().encode("abc") == [260, 259]
    assert len(source(path, pre="smollm", **settings).tokenizer().encode("abc")) == 3


def test_qwen_composes_characters(path):
    tokenizer = source(path, architecture="qwen2").tokenizer()  # old files do not say what they split by
    assert tokenizer.encode("e\u0301") == tokenizer.encode("é")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"pre": "deepseek-llm"},
            "has a tokenizer that splits texts by the rule 'deepseek-llm' (tokenizer.ggml.pre), which is not"
            " supported: get the model as a folder of safetensors",
        ),
        (
            {},
            "does not say by which rule its tokenizer splits texts (tokenizer.ggml.pre): get a newer"
            " conversion, or the model as a folder of safetensors",
        ),
        ({"pre": "qwen2", "eos_token_id": 999}, "is damaged: its eos token is 999, of 259"),
        (
            {"pre": "qwen2", "typed": False},
            "has 259 tokens and 0 types of tokens (tokenizer.ggml.token_type), by which control tokens are"
            " told from text: get a newer conversion",
        ),
        ({"kind": "rwkv", "tokens": {"a": 1}}, "has a tokenizer of kind 'rwkv', which is not supported"),
    ],
)
def test_what_cannot_be_split_as_the_model_learned_it_is_refused(path, settings, message):
    with pytest.raises(ModelError) as caught:
        source(path, **settings).tokenizer()
    assert str(caught.value) == f"model '{path}' cannot be loaded: {path.name} {message}"


@pytest.mark.parametrize("prefix", [True, False])
def test_a_sentencepiece_text_begins_with_a_space_if_the_file_says_so(path, prefix):
    names = {"<unk>": 2, "<s>": CONTROL, "</s>": CONTROL, "▁": NORMAL, "a": NORMAL}
    tokenizer = source(path, kind="llama", tokens=names, add_space_prefix=prefix).tokenizer()
    assert split(tokenizer, "a a") == ["▁"] * prefix + ["a", "▁", "a"]
    assert tokenizer.decode(tokenizer.encode("a a", add_special_tokens=False)) == "a a"


def test_all_ends_that_a_file_names_end_an_answer(path):
    found = source(path, pre="qwen2", eos_token_id=5, eot_token_id=7, eom_token_id=5).generation_config()
    assert found.eos_token_id == [5, 7]
