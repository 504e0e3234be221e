"""Where reasoning ends, with marks that are tokens, special tokens, or texts of several tokens."""

from __future__ import annotations

import pytest
from chains import BEGINNING, SWITCHED, tokenizer
from prompt_parts import CHATML, builder, byte_tokenizer, document, space_tokenizer

from pipeline.generation.generated import Generated, StopRules
from pipeline.generation.reasoning import parted
from pipeline.generation.stopping import StopTexts
from pipeline.records import Reasoning

TOKENIZERS = {"tokens": tokenizer(), "special": tokenizer(special=True), "texts": byte_tokenizer()}
BEGUN, POSSIBLE, UNEXPECTED = Reasoning


@pytest.fixture(params=TOKENIZERS)
def own(request):
    return TOKENIZERS[request.param]


def ids(own, text):
    return own.encode(text, add_special_tokens=False)


def texts(own, text, begins):
    """The reasoning and the answer as they stand there."""
    found = parted(ids(own, text), begins, own)
    return found.reasoning, found.head + own.decode(found.tokens)


@pytest.mark.parametrize(
    ("text", "begins", "expected"),
    [
        ("<think>\nab\n</think>\n\nc", POSSIBLE, ("ab", "\n\nc")),
        ("<think>ab</think>c", UNEXPECTED, ("ab", "c")),
        (" \n<think>ab</think>c", UNEXPECTED, ("ab", "c")),
        ("ab</think>c", BEGUN, ("ab", "c")),
        ("<think>ab</think>c", BEGUN, ("ab", "c")),
        ("ab</think>c", POSSIBLE, ("ab", "c")),
        ("a </think>", POSSIBLE, ("a", "")),
        ("</think>c", BEGUN, ("", "c")),
        ("<think>ab", POSSIBLE, ("ab", "")),
        ("<think>ab", UNEXPECTED, ("ab", "")),
        ("ab", BEGUN, ("ab", "")),
        ("", BEGUN, ("", "")),
        ("a</think>b</think>c", BEGUN, ("a", "b</think>c")),
        ("ab", POSSIBLE, (None, "ab")),
        ("", POSSIBLE, (None, "")),
        ("say <think>", POSSIBLE, (None, "say <think>")),
        ("a</think>b", UNEXPECTED, (None, "a</think>b")),
        ("<think>a</think>b", None, (None, "<think>a</think>b")),
    ],
)
def test_parts(own, text, begins, expected):
    reasoning, answer = texts(own, text, begins)
    if own is TOKENIZERS["special"]:
        expected = (expected[0], own.decode(ids(own, expected[1]), skip_special_tokens=True))
        answer = own.decode(ids(own, answer), skip_special_tokens=True)
    assert (reasoning, answer) == expected


def test_a_mark_that_is_spelled_counts_as_one_that_is_a_token_does():
    own = TOKENIZERS["tokens"]
    letters = [token for letter in "a</think>b" for token in ids(own, letter)]
    assert len(letters) == len("a</think>b")
    found = parted([*letters, *ids(own, "c</think>d")], BEGUN, own)
    assert (found.reasoning, own.decode(found.tokens)) == ("a", "bc</think>d")


def test_an_unknown_token_is_no_mark():
    own = space_tokenizer(byte_fallback=False)
    text = "\u20ac</think>b"
    assert own.unk_token_id in ids(own, text)
    assert texts(own, text, BEGUN)[1] == "b"


def test_a_reasoning_that_is_cut_inside_a_character():
    own = TOKENIZERS["tokens"]
    assert parted(ids(own, "<think>é")[:-1], POSSIBLE, own).reasoning == ""


def ended(own, text, begins, *stops):
    """What had been written when a stop text ended the answer; None if none did."""
    rules = StopRules(max_new_tokens=1000, texts=StopTexts(texts=stops, tokenizer=own))
    growing = Generated(rules=rules, reasoning=begins)
    for token in ids(own, text):
        growing.take(token)
        if growing.finish_reason is not None:
            assert growing.finish_reason == "stop_text"
            return own.decode(growing.tokens)
    return None


@pytest.mark.parametrize(
    ("text", "begins", "stop", "expected"),
    [
        ("<think>a.b</think>\n\nc.d", POSSIBLE, ".", "<think>a.b</think>\n\nc."),
        ("<think>a.b</think>\n\nc\nd", UNEXPECTED, "\n", "<think>a.b</think>\n\nc\n"),
        ("a.b</think>c.d", BEGUN, ".", "a.b</think>c."),
        ("a.b</think>c.d", POSSIBLE, ".", "a."),  # nothing told that it was reasoning
        ("a</think>.", BEGUN, ".", "a</think>."),
        ("a.b", BEGUN, ".", None),
        ("<think>a</think>b", POSSIBLE, "think>", None),
        ("a\nb", POSSIBLE, "\n", "a\n"),
        ("\na", UNEXPECTED, "\n", "\n"),
        ("<think>a.</think>b.c", None, ".", "<think>a."),
        ("a</think>\n\nA word, and more than that.", BEGUN, "\n", None),
        ("a</think>\n \n A word, and more.\nb", BEGUN, "\n", "a</think>\n \n A word, and more.\n"),
    ],
)
def test_stop_texts_count_in_the_answer(own, text, begins, stop, expected):
    assert ended(own, text, begins, stop) == expected


@pytest.mark.parametrize(
    ("template", "arguments", "expected"),
    [
        (CHATML, {}, UNEXPECTED),
        (SWITCHED, {}, POSSIBLE),
        (SWITCHED, {"enable_thinking": True}, POSSIBLE),
        (SWITCHED, {"enable_thinking": False}, UNEXPECTED),
        (BEGINNING, {}, BEGUN),
        (BEGINNING.replace("<think>", "<think>\n\n"), {}, BEGUN),
    ],
)
def test_what_a_prompt_says_of_it(template, arguments, expected):
    prompts = builder(byte_tokenizer(chat_template=template), template_args=arguments)
    assert prompts.reasoning is expected
    for question in (None, "<think>"):
        assert prompts.encode(document("<think>", question)).reasoning is expected
    assert prompts.is_to_reason == (expected is BEGUN or (template is SWITCHED and expected is POSSIBLE))


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{{ document }}", UNEXPECTED),
        ("{{ document }}\n<think>\n", BEGUN),
        ("<think>{{ document }}", UNEXPECTED),
        ("Write <think>, then </think>. {{ document }}", POSSIBLE),
    ],
)
def test_what_a_prompt_template_says_of_it(template, expected):
    assert builder(template=template).encode(document("<think>")).reasoning is expected
    assert builder(template=template, parts_reasoning=False).encode(document("a")).reasoning is None


def test_a_model_with_the_marks_as_tokens_may_reason_by_any_template():
    assert builder(tokenizer(), template="{{ document }}").reasoning is POSSIBLE
