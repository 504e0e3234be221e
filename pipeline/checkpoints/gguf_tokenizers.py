"""Tokenizers of GGUF files.

Those of byte-level BPE are built here. A file names its pre-tokenizer (`tokenizer.ggml.pre`), for which
transformers takes GPT-2's if it does not know the name. Nor does it normalise texts, or prefer whole words to
merges, and control tokens that are spelled with other characters than bytes get new numbers. SentencePiece's
tokenizers are transformers', but for the space that these put in front of texts, whatever the file says.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)
from transformers import PreTrainedTokenizerFast

from pipeline.checkpoints.gguf_header import GgufError, GgufHeader

BYTE_LEVEL, SENTENCEPIECE = "gpt2", "llama"  # as files call them
NORMAL, CONTROL, USER_DEFINED = 1, 3, 4  # types of tokens; for the last two texts are searched before all
CONTROL_FORM = re.compile(r"<\|\w+\|>")
NAMED = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}

# what tokenizer.json of the models split texts by; names are those of llama.cpp's converter
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{digits}"
    r"| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA_3, _QWEN_2 = _WORDS.format(digits="{1,3}"), _WORDS.format(digits="")
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASES = (
    r"[^\r\n\p{{L}}\p{{N}}]?{upper}*{lower}+{ending}|[^\r\n\p{{L}}\p{{N}}]?{upper}+{lower}*{ending}"
    r"|\p{{N}}{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_TEKKEN = _CASES.format(upper=_UPPER, lower=_LOWER, ending="", digits="")
_GPT_4O = _CASES.format(upper=_UPPER, lower=_LOWER, ending=r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?", digits="{1,3}")
_LIKE_LLAMA_3 = ("llama3", "llama-v3", "llama-bpe", "falcon3", "pixtral")
_SPLITS = {
    **dict.fromkeys((*_LIKE_LLAMA_3, "dbrx", "smaug-bpe"), _LLAMA_3),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "megrez"), _QWEN_2),
    **dict.fromkeys(("gpt-4o", "llama4"), _GPT_4O),
    "tekken": _TEKKEN,
}
_SINGLE_DIGITS = ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b")
_AS_GPT_2 = ("gpt-2", "mpt", "olmo", "jais", "trillion", "exaone4")
PRE_TOKENIZERS = (*_SPLITS, *_SINGLE_DIGITS, *_AS_GPT_2)
# of which a word that is a token is that one, whatever merges make of it, and which begin texts with BOS
_WHOLE_WORDS = (*_LIKE_LLAMA_3, "tekken")
# files of these architectures, whatever they leave unsaid, have the tokenizer of Qwen 2
_QWEN = ("qwen2", "qwen3", "qwen3moe")


def gguf_tokenizer(header: GgufHeader, architecture: str) -> Any:
    """The tokenizer of a file, or of a model's first part. Raises GgufError for one that is not read."""
    settings, path = header.settings, header.path
    kind = settings.get("tokenizer.ggml.model")
    if kind is None:
        raise GgufError(f"{path.name} holds no tokenizer; convert the model again, with its tokenizer")
    if kind == BYTE_LEVEL:
        return _byte_level(header, architecture)
    if kind != SENTENCEPIECE:
        raise GgufError(f"{path.name} has a tokenizer of kind {kind!r}, which is not supported")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(str(path.parent), gguf_file=path.name)
    if architecture == "llama" and settings.get("tokenizer.ggml.add_space_prefix") is False:
        _without_prefix(tokenizer.backend_tokenizer)
    return tokenizer


def _without_prefix(backend: Tokenizer) -> None:
    """Have a SentencePiece tokenizer put no space in front of a text, and take none away."""
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )


def _byte_level(header: GgufHeader, architecture: str) -> Any:
    settings, name = header.settings, _pre_tokenizer(header, architecture)
    tokens = header.texts("tokenizer.ggml.tokens")
    merges = [_halves(merge) for merge in header.texts("tokenizer.ggml.merges")]
    whole_words = name in _WHOLE_WORDS
    vocabulary = {token: number for number, token in enumerate(tokens)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=whole_words))
    backend.pre_tokenizer = pre_tokenizers.Sequence(list(_steps(name)))
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    if name == "qwen2":
        backend.normalizer = normalizers.NFC()
    _add_whole(backend, tokens, _types(header, tokens))
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        chat_template=settings.get("tokenizer.chat_template"),
        add_bos_token=settings.get("tokenizer.ggml.add_bos_token", whole_words),
        add_eos_token=settings.get("tokenizer.ggml.add_eos_token", False),
        **{ours: _named(header, theirs, tokens) for ours, theirs in NAMED.items()},
    )


def _pre_tokenizer(header: GgufHeader, architecture: str) -> str:
    """Raises GgufError for one that is not known, with which texts would become other tokens."""
    file, name = header.path.name, header.settings.get("tokenizer.ggml.pre", "default")
    if name == "default" and architecture in _QWEN:
        return "qwen2"
    if name == "default":
        raise GgufError(
            f"{file} does not say by which rule its tokenizer splits texts (tokenizer.ggml.pre): get a newer"
            " conversion, or the model as a folder of safetensors"
        )
    if name not in PRE_TOKENIZERS:
        raise GgufError(
            f"{file} has a tokenizer that splits texts by the rule {name!r} (tokenizer.ggml.pre), which is"
            " not supported: get the model as a folder of safetensors"
        )
    return str(name)


def _steps(name: str) -> Iterator[pre_tokenizers.PreTokenizer]:
    if name in _SPLITS:
        yield pre_tokenizers.Split(Regex(_SPLITS[name]), behavior="isolated")
    if name in _SINGLE_DIGITS:
        yield pre_tokenizers.Digits(individual_digits=True)
    yield pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=name not in _SPLITS)


def _halves(merge: str) -> tuple[str, str]:
    first, _, second = merge.partition(" ")
    return first, second


def _types(header: GgufHeader, tokens: list[str]) -> list[int]:
    """Of each token. Raises GgufError where they are not told: control tokens would be read as text."""
    types = header.settings.get("tokenizer.ggml.token_type", [])
    if len(types) != len(tokens):
        raise GgufError(
            f"{header.path.name} has {len(tokens):,} tokens and {len(types):,} types of tokens"
            " (tokenizer.ggml.token_type), by which control tokens are told from text: get a newer conversion"
        )
    # some converters took control tokens for text; llama.cpp sets them right by their form too
    return [
        CONTROL if kind == NORMAL and CONTROL_FORM.fullmatch(token) else kind
        for token, kind in zip(tokens, types, strict=True)
    ]


def _add_whole(backend: Tokenizer, tokens: list[str], types: list[int]) -> None:
    """Have control tokens, and those that the user defined, found in texts as they are spelled."""
    for kind, add in ((CONTROL, backend.add_special_tokens), (USER_DEFINED, backend.add_tokens)):
        add([AddedToken(tokens[n], normalized=False) for n, each in enumerate(types) if each == kind])


def _named(header: GgufHeader, name: str, tokens: list[str]) -> str | None:
    """A token that the file names, such as its BOS. Raises GgufError for one that is not there."""
    number = header.settings.get(f"tokenizer.ggml.{name}_token_id")
    if number is None:
        return None
    if number >= len(tokens):
        raise GgufError(f"{header.path.name} is damaged: its {name} token is {number}, of {len(tokens):,}")
    return tokens[number]
