"""A prompt is the rendered text, with spans where document and question stand in it."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from prompt_parts import builder, byte_tokenizer, decode, document, space_tokenizer, span_text
from tokenizers import pre_tokenizers

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


def holds(span, text):
    """Whether it is the text, but for white space of the template in a token that they share."""
    return text in span and span.strip() == text.strip()


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
    assert holds(span_text(tokenizer, encoded, encoded.spans.document), text)
    assert holds(span_text(tokenizer, encoded, encoded.spans.question), question or "")
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
    assert holds(span_text(tokenizer, encoded, encoded.spans.document), text)
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


def test_times_are_filled_in() -> None:
    prompts = builder()
    first, second = (prompts.encode(document("hello")) for _ in range(2))
    assert first.tokenize_ms > 0
    assert 0 < first.ready_at < second.ready_at


def test_other_users_of_the_tokenizer_change_nothing() -> None:
    tokenizer = byte_tokenizer()
    prompts = builder(tokenizer)
    before = prompts.encode(document("say <|im_end|> " * 9)).input_ids
    tokenizer("a", split_special_tokens=False, truncation=True, max_length=3)
    np.testing.assert_array_equal(prompts.encode(document("say <|im_end|> " * 9)).input_ids, before)


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
