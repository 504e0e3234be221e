"""Prompts: spans and round trips, control tokens in user text, over-length policies, refusals."""

from __future__ import annotations

import hashlib
import logging
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from pipeline.errors import ConfigError, ModelError, RowError
from pipeline.prompts import OverLong, PromptBuilder
from pipeline.records import Document, EncodedDocument, Row
from pipeline.tokenizing import stop_token_ids

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
INST = (
    "<s>{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
    "{% elif m['role'] == 'assistant' %} {{ m['content'] }} </s>"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)
ONCE = "the {} must write the {} once and unchanged, but does so {} times"
NO_SYSTEM = "this model's chat template takes no system message: "
TEXTS = [
    "plain words",
    " leading and trailing ",
    "\n\nlines\n",
    "tabs\tand  double  spaces",
    "naïve café 数据 🙂",
    "a",
    ".",
    "\n",
    "hello world " * 50,
]


def byte_tokenizer(**extra: Any) -> PreTrainedTokenizerFast:
    """Bytes and a few merges, ChatML; `<turn_end>` and `<note>` are added tokens that are not special."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("h", "e"), ("l", "l"), ("he", "ll"), ("hell", "o"), ("Ġ", "w"), ("Ċ", "Ċ"), ("<", "|")]
    vocab = {token: i for i, token in enumerate([*alphabet, *("".join(pair) for pair in merges)])}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<|im_start|>", "<|im_end|>", "<|endoftext|>"])
    backend.add_tokens([AddedToken(text, normalized=False) for text in ("<turn_end>", "<note>", "    ")])
    settings = {"eos_token": "<|endoftext|>", "chat_template": CHATML, "model_max_length": 16} | extra
    return PreTrainedTokenizerFast(tokenizer_object=backend, **settings)


def space_tokenizer(
    prepend: str = "first", byte_fallback: bool = True, **extra: Any
) -> PreTrainedTokenizerFast:
    """Like Llama 2's: a space before each text, bytes for unknown characters, `<s>` in front."""
    letters = [chr(code) for code in range(33, 127)]
    words = ["▁h", "▁he", "▁c", "▁d"]
    tokens = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "▁",
        *letters,
        *words,
        "▁▁",
    ]
    vocab = {token: i for i, token in enumerate(tokens)}
    merges = [("▁", "h"), ("▁h", "e"), ("▁", "c"), ("▁", "d"), ("▁", "▁")]
    backend = Tokenizer(
        models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=byte_fallback, fuse_unk=True)
    )
    if prepend == "normalizer":
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prepend, split=False)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(steps)
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", vocab["<s>"])]
    )
    settings = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "chat_template": INST} | extra
    return PreTrainedTokenizerFast(tokenizer_object=backend, **settings)


def document(text: str, question: str | None = None) -> Document:
    return Document(source=Row(row=0, id="r", place="in.jsonl line 1"), text=text, question=question)


def builder(tokenizer: PreTrainedTokenizerFast | None = None, **settings: Any) -> PromptBuilder:
    return PromptBuilder(tokenizer or byte_tokenizer(), **{"context": 4096, "max_new_tokens": 96} | settings)


def decode(tokenizer: PreTrainedTokenizerFast, ids: np.ndarray) -> str:
    return tokenizer.decode(ids.tolist(), skip_special_tokens=False, clean_up_tokenization_spaces=False)


def span_text(tokenizer: PreTrainedTokenizerFast, encoded: EncodedDocument, span: tuple[int, int]) -> str:
    """The text between two prefixes of the prompt, since decoders strip a space at the start."""
    start, end = (decode(tokenizer, encoded.input_ids[:cut]) for cut in span)
    assert end.startswith(start)
    return end[len(start) :]


@pytest.mark.parametrize("question", [None, "Why?", " 何 "])
@pytest.mark.parametrize("text", TEXTS)
def test_chat_prompt_is_the_rendered_text(text: str, question: str | None) -> None:
    tokenizer = byte_tokenizer()
    encoded = builder(tokenizer, system="Be brief.").encode(document(text, question))
    user = text if question is None else f"{text}\n\n{question}"
    assert decode(tokenizer, encoded.input_ids) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        f"<|im_start|>user\n{user}<|im_end|>\n<|im_start|>assistant\n"
    )
    assert span_text(tokenizer, encoded, encoded.spans.document) == text
    assert span_text(tokenizer, encoded, encoded.spans.question) == (question or "")
    assert encoded.input_ids.dtype == np.int64
    assert encoded.truncated_tokens == 0


def test_template_tokens_equal_the_tokenizers_own() -> None:
    tokenizer = byte_tokenizer()
    encoded = builder(tokenizer).encode(document("hello world"))
    messages = [{"role": "user", "content": "hello world"}]
    own = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert encoded.input_ids.tolist() == own


@pytest.mark.parametrize(
    "template",
    [
        "Q: {{ question }}\nText: {{ document }}\nA:",
        "{{ document }}|{{ question }}",
        "{{ question }}{{ document }}",
        "<|im_start|>{{ system }}\n{{ question }}\n{{ document }}<|im_end|>",
    ],
)
@pytest.mark.parametrize("make", [byte_tokenizer, space_tokenizer])
def test_spans_in_the_templates_order(make: Any, template: str) -> None:
    tokenizer = make()
    system = "Sys" if "system" in template else None
    encoded = builder(tokenizer, template=template, system=system).encode(document("the text ", " why so?"))
    rendered = template.replace("{{ system }}", "Sys").replace("{{ question }}", " why so?")
    rendered = rendered.replace("{{ document }}", "the text ")
    start = 1 if make is space_tokenizer else 0
    if make is space_tokenizer:
        assert encoded.input_ids[0] == tokenizer.bos_token_id
        rendered = rendered.removeprefix(" ")  # the space that this tokenizer puts in front anyway
    assert decode(tokenizer, encoded.input_ids[start:]) == rendered
    (document_start, document_end), (question_start, question_end) = (
        encoded.spans.document,
        encoded.spans.question,
    )
    assert (document_start < question_start) == (template.index("document") < template.index("question"))
    assert tokenizer.decode(encoded.input_ids[document_start:document_end].tolist()) == "the text "
    assert tokenizer.decode(encoded.input_ids[question_start:question_end].tolist()).strip() == "why so?"


@pytest.mark.parametrize("text", TEXTS)
def test_space_tokenizer_gains_no_space(text: str) -> None:
    tokenizer = space_tokenizer()
    encoded = builder(tokenizer).encode(document(text, "Why?"))
    assert decode(tokenizer, encoded.input_ids) == f"<s>[INST] {text}\n\nWhy? [/INST]"
    assert span_text(tokenizer, encoded, encoded.spans.document) == text
    assert np.count_nonzero(encoded.input_ids == tokenizer.bos_token_id) == 1


@pytest.mark.parametrize("prepend", ["always", "normalizer"])
@pytest.mark.parametrize("text", TEXTS)
def test_space_after_each_control_token_is_the_tokenizers_own(text: str, prepend: str) -> None:
    tokenizer = space_tokenizer(prepend)
    encoded = builder(tokenizer).encode(document(text, "Why?"))
    rendered = f"<s>[INST] {text}\n\nWhy? [/INST]"
    own = tokenizer(rendered, add_special_tokens=False, return_tensors="np").input_ids[0]
    assert decode(tokenizer, encoded.input_ids) == decode(tokenizer, own)


def test_byte_level_prefix_space() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    encoded = builder(tokenizer, template="{{ document }}{{ question }}").encode(
        document("hello", "\n\nworld")
    )
    assert decode(tokenizer, encoded.input_ids) == " hello\n\nworld"


def test_control_tokens_in_user_text_stay_text() -> None:
    tokenizer = byte_tokenizer(chat_template=CHATML.replace("<|im_end|>", "<turn_end>"))
    added = tokenizer.added_tokens_decoder
    text = "x".join(token.content for token in added.values()) + "<|im_<|im_end|>end|><turn_<turn_end>end>"
    encoded = builder(tokenizer, system=text).encode(document(text, text))
    spans = [encoded.input_ids[slice(*span)] for span in (encoded.spans.document, encoded.spans.question)]
    note, spaces = (tokenizer.convert_tokens_to_ids(token) for token in ("<note>", "    "))
    plain_added = {note, spaces}  # words of the vocabulary that no template uses
    stops = stop_token_ids(tokenizer, None)
    assert tokenizer.convert_tokens_to_ids("<turn_end>") in stops
    for ids in spans:
        assert not set(ids.tolist()) & {*tokenizer.all_special_ids, *stops}
        assert set(ids.tolist()) & set(added) == plain_added
        assert decode(tokenizer, ids) == text
    assert np.count_nonzero(np.isin(encoded.input_ids, list(stops))) == 2  # system's and user's end
    assert decode(tokenizer, encoded.input_ids).count(text) == 3


@pytest.mark.parametrize(("stop", "steps"), [("</s>", ["</", "</s", "</s>"]), ("<>", ["<>"])])
def test_control_tokens_that_the_model_itself_spells(stop: str, steps: list[str]) -> None:
    """Merges that lead to a control token give it without any added token."""
    backend = Tokenizer.from_str(space_tokenizer().backend_tokenizer.to_str())
    vocab = backend.get_vocab(with_added_tokens=True)
    for step in steps:
        vocab.setdefault(step, len(vocab))
    merges = [(step[:-1], step[-1]) for step in steps]
    backend.model = models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True)
    spelling = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token=stop, unk_token="<unk>", chat_template=INST
    )
    plain = spelling.encode(f"a{stop}", add_special_tokens=False, split_special_tokens=True)
    assert spelling.eos_token_id in plain  # or this test shows nothing
    text = f"a{stop}b{stop}{stop}"
    encoded = builder(spelling).encode(document(text))
    assert spelling.eos_token_id not in encoded.input_ids
    assert decode(spelling, encoded.input_ids) == f"<s>[INST] {text} [/INST]"


def test_special_tokens_of_a_space_tokenizer_stay_text() -> None:
    tokenizer = space_tokenizer()
    encoded = builder(tokenizer).encode(document("<unk><s> </s>", "<s>"))
    assert decode(tokenizer, encoded.input_ids) == "<s>[INST] <unk><s> </s>\n\n<s> [/INST]"
    assert np.isin(encoded.input_ids, tokenizer.all_special_ids).nonzero()[0].tolist() == [0]


def test_added_tokens_that_the_template_writes_stay_text() -> None:
    tokenizer = byte_tokenizer()
    encoded = builder(tokenizer, template="<note>    {{ document }}").encode(
        document("x<note>    <turn_end>")
    )
    note, spaces, end = tokenizer.convert_tokens_to_ids(["<note>", "    ", "<turn_end>"])
    counts = [np.count_nonzero(encoded.input_ids == token) for token in (note, spaces, end)]
    assert counts == [1, 2, 1]  # white space is text, and so is a word that the template does not use


def test_special_tokens_of_one_character_may_stay() -> None:
    tokenizer = byte_tokenizer(pad_token="!")
    assert (
        decode(tokenizer, builder(tokenizer, template="{{ document }}").encode(document("a!")).input_ids)
        == "a!"
    )


def test_unknown_characters_may_stay() -> None:
    tokenizer = space_tokenizer(byte_fallback=False)
    encoded = builder(tokenizer).encode(document("aéb"))
    assert np.count_nonzero(encoded.input_ids == tokenizer.unk_token_id) == 1


def test_other_users_of_the_tokenizer_change_nothing() -> None:
    tokenizer = byte_tokenizer()
    prompts = builder(tokenizer)
    before = prompts.encode(document("say <|im_end|> " * 9)).input_ids
    tokenizer("a", split_special_tokens=False, truncation=True, max_length=3)
    np.testing.assert_array_equal(prompts.encode(document("say <|im_end|> " * 9)).input_ids, before)


@pytest.mark.parametrize(
    ("policy", "kept"),
    [
        ("truncate-left", "defghij"),
        ("truncate-right", "abcdefg"),
        ("truncate-middle", "abcdhij"),
    ],
)
def test_truncation_keeps(policy: Any, kept: str) -> None:
    tokenizer = byte_tokenizer()
    prompts = builder(
        tokenizer,
        template="<{{ document }}>{{ question }}?",
        context=15,
        max_new_tokens=3,
        on_overlong=policy,
    )
    encoded = prompts.encode(document("abcdefghij", "xy"))
    assert encoded.input_ids.tolist() == tokenizer.encode(f"<{kept}>xy?", add_special_tokens=False)
    assert (encoded.prompt_tokens, encoded.document_tokens, encoded.truncated_tokens) == (12, 7, 3)
    assert (encoded.spans.document, encoded.spans.question) == ((1, 8), (9, 11))


@pytest.mark.parametrize("policy", ["truncate-left", "truncate-right", "truncate-middle"])
@pytest.mark.parametrize(("context", "kept"), [(7, 1), (8, 2), (15, 9), (16, 10)])
def test_truncation_at_its_limits(policy: Any, context: int, kept: int) -> None:
    prompts = builder(
        template="<{{ document }}>{{ question }}?", context=context, max_new_tokens=1, on_overlong=policy
    )
    encoded = prompts.encode(document("abcdefghij", "xy"))
    assert (encoded.document_tokens, encoded.truncated_tokens) == (kept, 10 - kept)
    expected = {"truncate-left": "j", "truncate-right": "a", "truncate-middle": "a"}[policy]
    assert kept > 1 or decode(prompts.tokenizer, encoded.input_ids) == f"<{expected}>xy?"


@pytest.mark.parametrize("policy", ["error", "skip"])
def test_over_long_says_how_much(policy: Any) -> None:
    prompts = builder(template="{{ document }}", context=1600, max_new_tokens=100, on_overlong=policy)
    assert prompts.encode(document("a" * 1500)).prompt_tokens == prompts.limit == 1500
    with pytest.raises(OverLong) as caught:
        prompts.encode(document("a" * 1510))
    assert str(caught.value) == (
        "the prompt has 1,510 tokens, 10 more than the limit of 1,500"
        " (context 1,600 less 100 for the answer);"
        " --on-overlong truncate-middle cuts the document, --on-overlong skip leaves the row out"
    )
    assert (caught.value.kind, caught.value.document_tokens, caught.value.prompt_tokens) == (
        "over_long",
        1510,
        1510,
    )


@pytest.mark.parametrize("policy", ["error", "skip", "truncate-left", "truncate-right", "truncate-middle"])
def test_no_room_for_the_document(policy: Any) -> None:
    prompts = builder(
        template="{{ question }}{{ document }}", context=12, max_new_tokens=2, on_overlong=policy
    )
    with pytest.raises(OverLong) as caught:
        prompts.encode(document("abc", "0123456789"))
    assert str(caught.value) == (
        "instruction and question alone have 10 tokens, no room for the document under the limit of 10"
        " (context 12 less 2 for the answer); shorten them or lower --max-new-tokens"
    )
    assert (caught.value.document_tokens, caught.value.prompt_tokens) == (3, 13)


def test_no_room_for_any_prompt() -> None:
    with pytest.raises(ConfigError, match=r"^96 new tokens leave no room in the context of 96 tokens$"):
        builder(context=96)


@pytest.mark.parametrize(("text", "kind"), [("", "empty_document"), ("a\ud800b", "bad_text")])
@pytest.mark.parametrize("make", [byte_tokenizer, space_tokenizer])
def test_bad_documents(make: Any, text: str, kind: str) -> None:
    with pytest.raises(RowError) as caught:
        builder(make()).encode(document(text, "Why?"))
    assert caught.value.kind == kind


def test_long_documents_are_not_warned_about(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = byte_tokenizer()  # its own maximum is 16 tokens
    tokenizer.backend_tokenizer.enable_truncation(8)
    tokenizer.backend_tokenizer.enable_padding(length=64)
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    try:
        encoded = builder(tokenizer).encode(document("a b " * 100))
    finally:
        logger.removeHandler(caplog.handler)
    assert encoded.document_tokens == 400
    assert not caplog.records


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (
            "a\n{{ document",
            "prompt template line 2: unexpected end of template, expected 'end of print statement'.",
        ),
        (
            "\n\n{{ document }}{{ text }}",
            "prompt template line 3: 'text' is undefined; use document, question or system",
        ),
        ("{{ question }}", ONCE.format("prompt template", "document", 0)),
        ("{{ document }}{{ document }}", ONCE.format("prompt template", "document", 2)),
        ("{{ document }}{{ question }}{{ question }}", ONCE.format("prompt template", "question", 2)),
        ("{% filter upper %}{{ document }}{% endfilter %}", ONCE.format("prompt template", "document", 0)),
        ("{% if question %}{{ document }}{% endif %}", ONCE.format("prompt template", "document", 0)),
        (
            "\n{{ document[:100] }}",
            "prompt template line 2: write {{ document }} alone, without filter or expression",
        ),
        ("{{ document }}{% for i in range(10 ** 9) %}{% endfor %}", "prompt template: Range too big."),
        (
            "{{ document }}{{ ''.__class__.__mro__ }}",
            "prompt template: access to attribute '__class__' of 'str' object is unsafe.",
        ),
        ("{{ document }}{{ 1 // 0 }}", "prompt template: integer division or modulo by zero"),
    ],
)
def test_template_errors(template: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        builder(template=template)
    assert str(caught.value).startswith(message)


def test_system_needs_a_place_in_the_template() -> None:
    with pytest.raises(ConfigError, match=r"must write the system once"):
        builder(template="{{ document }}", system="Be brief.")


def test_system_that_cannot_be_tokenized() -> None:
    with pytest.raises(
        ConfigError, match=r"^system message or prompt template: the text is not valid Unicode"
    ):
        builder(system="\udcff")


def test_question_needs_a_place_in_the_template() -> None:
    prompts = builder(template="Summarise: {{ document }}")
    assert not prompts.uses_question
    assert prompts.encode(document("abc")).spans.question == (14, 14)
    with pytest.raises(ConfigError) as caught:
        prompts.encode(document("abc", "Why?"))
    assert str(caught.value) == (
        "in.jsonl line 1 has a question, but the prompt template has no place for it:"
        " write {{ question }} there"
    )


def test_question_is_optional_in_a_template() -> None:
    tokenizer = byte_tokenizer()
    prompts = builder(
        tokenizer, template="{{ document }}\n{% if question %}\nQ: {{ question }}\n{% endif %}\nA:\n"
    )
    assert prompts.uses_question
    assert decode(tokenizer, prompts.encode(document("abc")).input_ids) == "abc\nA:"
    encoded = prompts.encode(document("abc", "Why?"))
    assert decode(tokenizer, encoded.input_ids) == "abc\nQ: Why?\nA:"


@pytest.mark.parametrize(
    ("template", "settings", "kind", "message"),
    [
        (None, {}, ModelError, "the model has no chat template; give --prompt-template FILE"),
        (INST, {"system": "S"}, ConfigError, NO_SYSTEM + "Only user and assistant roles are supported!"),
        ("{{ messages[-1]['content'] }}", {"system": "S"}, ConfigError, NO_SYSTEM + "it leaves it out"),
        (
            "{% for m in messages %}{{ m['content'] * 2 }}{% endfor %}",
            {},
            ModelError,
            ONCE.format("model's chat template", "document", 2),
        ),
        (
            "{{ raise_exception('no') }}",
            {"system": "S"},
            ModelError,
            "the model's chat template fails: no; give --prompt-template FILE",
        ),
        ("{{ messages[0]['content'] + 1 }}", {}, ModelError, "the model's chat template fails: "),
    ],
)
def test_chat_template_errors(template: str | None, settings: Any, kind: type, message: str) -> None:
    with pytest.raises(kind) as caught:
        builder(byte_tokenizer(chat_template=template), **settings)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    ("template", "start"),
    [
        ("{{ document }}", "<s>▁hi"),
        ("<s>{{ document }}", "<s>hi"),
        ("he {{ document }}", "<s>▁he▁hi"),
    ],
)
def test_bos_of_a_template_file(template: str, start: str) -> None:
    tokenizer = space_tokenizer()
    encoded = builder(tokenizer, template=template).encode(document("hi"))
    assert "".join(tokenizer.convert_ids_to_tokens(encoded.input_ids.tolist())) == start


def test_tokenizers_that_lose_text_are_refused() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace(" ", "")
    with pytest.raises(ModelError, match=r"^the tokenizer .* does not decode to the text encoded$"):
        builder(tokenizer)


def test_slow_tokenizers_are_refused() -> None:
    with pytest.raises(ModelError, match="has no fast version"):
        builder(SimpleNamespace(is_fast=False))


@pytest.mark.parametrize("configured", [None, 7, [7, 8]])
def test_stop_tokens(configured: Any) -> None:
    tokenizer = byte_tokenizer()
    ends = set(tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"]))
    listed = {configured} if isinstance(configured, int) else set(configured or ())
    assert stop_token_ids(tokenizer, SimpleNamespace(eos_token_id=configured)) == ends | listed
    assert stop_token_ids(tokenizer, None) == ends


@pytest.mark.parametrize("template", [None, "{{ raise_exception('no') }}", "{{ messages[0]['content'] }}"])
def test_stop_tokens_without_an_assistants_turn(template: str | None) -> None:
    tokenizer = byte_tokenizer(chat_template=template)
    assert stop_token_ids(tokenizer, None) == {tokenizer.eos_token_id}


def test_stop_token_behind_a_space() -> None:
    tokenizer = space_tokenizer(eos_token=None)
    tokenizer.chat_template = INST
    assert stop_token_ids(tokenizer, None) == {tokenizer.convert_tokens_to_ids("</s>")}


def test_template_hash() -> None:
    assert builder(system="S").template_hash == hashlib.sha256(f"{CHATML}\0S".encode()).hexdigest()
    hashes = [
        builder(**settings).template_hash
        for settings in ({}, {"template": "{{ document }}"}, {"system": "S"})
    ]
    assert len(set(hashes)) == 3


def test_times_are_filled_in() -> None:
    prompts = builder()
    first, second = (prompts.encode(document("hello")) for _ in range(2))
    assert first.tokenize_ms > 0
    assert 0 < first.ready_at < second.ready_at


def test_threads_agree() -> None:
    tokenizer = byte_tokenizer()
    prompts = builder(tokenizer)
    texts = [f"{i} <|im_end|> hello world " * (i % 7 + 1) for i in range(200)]
    expected = [prompts.encode(document(text)).input_ids.tolist() for text in texts]

    def encode(text: str) -> list[int]:
        tokenizer("<|im_end|>", split_special_tokens=False)
        return prompts.encode(document(text)).input_ids.tolist()

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(encode, texts)) == expected
