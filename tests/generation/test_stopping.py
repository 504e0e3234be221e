"""Where answers end: at texts across tokens and at special tokens, and never inside a character."""

from __future__ import annotations

import pytest
from prompt_parts import byte_tokenizer, space_tokenizer

from pipeline.generation.characters import BYTES, pending, whole_characters
from pipeline.generation.generated import StopRules
from pipeline.generation.stopping import StopTexts

BYTE_LEVEL = byte_tokenizer()
END, START = "<|im_end|>", "<|im_start|>"


def ids(tokenizer, *pieces):
    """Tokens of pieces of text, and of bytes and special tokens by their names."""
    found = []
    for piece in pieces:
        if isinstance(piece, bytes):
            names = [f"<0x{byte:02X}>" if tokenizer is not BYTE_LEVEL else NAMES[byte] for byte in piece]
            found += tokenizer.convert_tokens_to_ids(names)
        elif piece in tokenizer.all_special_tokens:
            found.append(tokenizer.convert_tokens_to_ids(piece))
        else:
            found += tokenizer.encode(piece, add_special_tokens=False)
    return found


NAMES = {byte: name for name, byte in BYTES.items()}


def ended(tokenizer, tokens, *texts):
    """After how many tokens an answer ends, and what it says."""
    stops = StopTexts(texts=texts, tokenizer=tokenizer)
    rules = StopRules(max_new_tokens=len(tokens) + 1, texts=stops)
    for count in range(1, len(tokens) + 1):
        if rules.reason(tokens[:count]) == "stop_text":
            return count, stops.cut(tokens[:count])
    assert stops.cut(tokens) is None
    return None


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        (("END",), (6, "one")),  # three tokens
        (("Dt",), (7, "oneEN")),
        (("two", "eE"), (4, "on")),
        (("é",), (11, "oneENDtwo")),  # a character of two tokens
        (("neENDtw",), (8, "o")),
        (("enD",), None),
    ],
)
def test_a_text_may_lie_across_tokens(texts, expected):
    assert ended(BYTE_LEVEL, ids(BYTE_LEVEL, *"oneENDtwo", "é".encode()), *texts) == expected


@pytest.mark.parametrize("tokenizer", [BYTE_LEVEL, space_tokenizer()], ids=["byte level", "byte fallback"])
def test_a_text_is_found_in_a_row_of_bytes(tokenizer):
    tokens = ids(tokenizer, "\u65e5\u672c\u8a9e".encode(), "y")
    assert ended(tokenizer, tokens, "\u8a9e") == (9, "\u65e5\u672c")


def test_special_tokens_within_a_text_are_not_seen():
    tokens = ids(BYTE_LEVEL, "a", "E", *[START] * 40, "N", "D")
    assert ended(BYTE_LEVEL, tokens, "END") == (len(tokens), "a")


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        ((END,), (3, "ab")),
        ((f"b{END}",), (3, "a")),
        ((f"{END}cd",), (5, "ab")),
        ((f"ab{END}c", "d"), (4, "")),
        ((f"{START}",), (6, "abcd")),
        ((f"{END}{START}", f"d{START}e"), (7, "abc")),
        ((f"a{END}",), None),
    ],
)
def test_special_tokens_may_be_part_of_a_text(texts, expected):
    assert ended(BYTE_LEVEL, ids(BYTE_LEVEL, "a", "b", END, "c", "d", START, "e"), *texts) == expected


def test_a_special_token_that_is_spelled_ends_an_answer_too():
    tokens = ids(BYTE_LEVEL, "a", *END, "b")
    assert ended(BYTE_LEVEL, tokens, END) == (1 + len(END), "a")


def test_a_special_token_of_another_tokenizer():
    tokenizer = space_tokenizer()
    tokens = ids(tokenizer, "he c", "</s>", "d")
    assert ended(tokenizer, tokens, "</s>") == (tokens.index(tokenizer.eos_token_id) + 1, "he c")


EURO = "€".encode()
SMILE = "😀".encode()


@pytest.mark.parametrize("tokenizer", [BYTE_LEVEL, space_tokenizer()], ids=["byte level", "byte fallback"])
@pytest.mark.parametrize(
    ("pieces", "expected"),
    [
        (("x", EURO), "x€"),
        (("x", EURO[:1]), "x"),
        (("x", EURO[:2]), "x"),
        (("x", SMILE[:3]), "x"),
        (("x", SMILE, SMILE[:3]), "x😀"),
        (("x", "한".encode()[:1]), "x"),
        ((SMILE[:3],), ""),
        (("x", "\ufffd".encode()), "x\ufffd"),  # which the model wrote
        (("x", "\ufffd".encode(), EURO[:2]), "x\ufffd"),
        (("x", EURO[1:2]), "x\ufffd"),  # bytes that nothing could complete
    ],
)
def test_no_answer_ends_inside_a_character(tokenizer, pieces, expected):
    assert whole_characters(ids(tokenizer, *pieces), tokenizer) == expected


def test_a_special_token_behind_a_character_that_is_cut():
    assert whole_characters(ids(BYTE_LEVEL, "x", EURO[:2], START), BYTE_LEVEL) == "x"


def test_names_of_bytes_are_those_of_the_tokenizer():
    assert sorted(BYTES.values()) == list(range(256))
    assert set(BYTES) <= set(BYTE_LEVEL.get_vocab())
    assert [pending("a€".encode()[:n]) for n in range(1, 5)] == [0, 1, 2, 0]
