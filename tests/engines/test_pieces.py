"""What each token adds to a text."""

from __future__ import annotations

import pytest

from pipeline.engines.keeping import MOST_OF_ONE, token_pieces


def of_bytes(ids):
    return bytes(ids).decode(errors="replace")


@pytest.mark.parametrize(
    "text",
    [
        "one fish",
        "Öl 鱼 🐟!",
        "\N{REPLACEMENT CHARACTER} is a character too",
        "\N{REPLACEMENT CHARACTER}" * 9,
        "",
    ],
)
def test_pieces_are_the_text(text):
    pieces = token_pieces(of_bytes, text.encode())
    assert "".join(pieces) == text
    assert len(pieces) == len(text.encode())


def test_a_character_is_the_last_of_its_tokens():
    assert token_pieces(of_bytes, "a鱼b".encode()) == ["a", "", "", "鱼", "b"]


def test_a_character_that_was_cut_costs_nothing_else():
    broken = "🐟".encode()[:2] + "fish 鱼".encode()[:-1]
    pieces = token_pieces(of_bytes, broken)
    assert "".join(pieces) == of_bytes(broken)
    assert pieces[2] == "\N{REPLACEMENT CHARACTER}f"


def test_broken_text_is_not_waited_for_without_end():
    pieces = token_pieces(of_bytes, [0xFF] * 40 + [ord("a")])
    assert "".join(pieces) == "\N{REPLACEMENT CHARACTER}" * 40 + "a"
    assert sum(map(bool, pieces)) >= 40 // MOST_OF_ONE


def test_a_space_that_decoding_drops_in_front_is_kept_between():
    words = ["one", "fish", "two", "fish"]
    pieces = token_pieces(lambda ids: " ".join(words[n] for n in ids), range(4))
    assert pieces == ["one", " fish", " two", " fish"]
