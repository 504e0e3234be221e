"""Documents that exceed the context are cut or refused, as the policy says; so are empty ones."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import pytest
from prompt_parts import builder, byte_tokenizer, decode, document, space_tokenizer

from pipeline.errors import ConfigError
from pipeline.records import Document, RowError, SamplingParams


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
    with pytest.raises(RowError) as caught:
        prompts.encode(document("a" * 1510))
    assert str(caught.value) == (
        "the prompt has 1,510 tokens, 10 more than the limit of 1,500"
        " (context 1,600 less 100 for the answer);"
        " --on-overlong split answers it in parts, truncate-middle cuts it, skip leaves the row out"
    )
    error = caught.value
    assert (error.kind, error.document_tokens, error.prompt_tokens) == ("over_long", 1510, 1510)
    assert error.excess_tokens == 10


def of_answer(text: str, new_tokens: int) -> Document:
    """A document whose row wants an answer of so many tokens."""
    made = document(text)
    params = SamplingParams(max_new_tokens=new_tokens)
    return replace(made, source=replace(made.source, params=params))


def test_a_row_leaves_room_for_the_answer_that_it_asks_for() -> None:
    cut = builder(template="{{ document }}", context=100, max_new_tokens=10, on_overlong="truncate-left")
    assert [cut.encode(of_answer("a" * 200, length)).prompt_tokens for length in (1, 10, 60)] == [99, 90, 40]
    assert cut.room(of_answer("a", 60).source) == 40
    refused = builder(template="{{ document }}", context=100, max_new_tokens=10)
    assert refused.encode(of_answer("a" * 95, 5)).prompt_tokens == 95
    with pytest.raises(RowError, match=r"1 more than the limit of 94 \(context 100 less 6 for the answer\)"):
        refused.encode(of_answer("a" * 95, 6))
    for policy in (cut, refused):
        with pytest.raises(
            RowError, match=r"^100 new tokens leave no room for a prompt: the context has 100"
        ):
            policy.encode(of_answer("a", 100))


@pytest.mark.parametrize("policy", ["error", "skip", "truncate-left", "truncate-right", "truncate-middle"])
def test_no_room_for_the_document(policy: Any) -> None:
    prompts = builder(
        template="{{ question }}{{ document }}", context=12, max_new_tokens=2, on_overlong=policy
    )
    with pytest.raises(RowError) as caught:
        prompts.encode(document("abc", "0123456789"))
    assert str(caught.value) == (
        "instruction and question alone have 10 tokens, no room for the document under the limit of 10"
        " (context 12 less 2 for the answer); shorten them or lower --max-new-tokens"
    )
    error = caught.value
    assert (error.kind, error.document_tokens, error.prompt_tokens, error.excess_tokens) == (
        "over_long",
        3,
        13,
        3,
    )


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
