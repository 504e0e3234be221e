"""Tokenizers of two kinds and a few words for the tests of prompts."""

from __future__ import annotations

from typing import Any

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from pipeline.prompts.builder import PromptBuilder
from pipeline.records import Document, EncodedDocument, Row

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
INST = (
    "<s>{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
    "{% elif m['role'] == 'assistant' %} {{ m['content'] }} </s>"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)


PARTS = CHATML.replace("{{ m['content'] }}", "{% for c in m.content %}{{ c.text }}{% endfor %}")


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
    return Document(source=Row(row=0, id="r", place="in.jsonl line 1", question=question), text=text)


def builder(tokenizer: PreTrainedTokenizerFast | None = None, **settings: Any) -> PromptBuilder:
    return PromptBuilder(tokenizer or byte_tokenizer(), **{"context": 4096, "max_new_tokens": 96} | settings)


def decode(tokenizer: PreTrainedTokenizerFast, ids: np.ndarray) -> str:
    return tokenizer.decode(ids.tolist(), skip_special_tokens=False, clean_up_tokenization_spaces=False)


def span_text(tokenizer: PreTrainedTokenizerFast, encoded: EncodedDocument, span: tuple[int, int]) -> str:
    """The text between two prefixes of the prompt, since decoders strip a space at the start."""
    start, end = (decode(tokenizer, encoded.input_ids[:cut]) for cut in span)
    assert end.startswith(start)
    return end[len(start) :]
