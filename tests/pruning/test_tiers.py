"""Selections as bytes and back, and what they cost."""

from __future__ import annotations

import tracemalloc
import zlib

import numpy as np
import pytest

from pipeline.pruning.tiers import FFN, FP8, GONE, IN_FP8, IN_FULL, LIVE, SKIPPED, pack_layer, unpack_layers


def marks_of(seed, tokens, keeps_all=False):
    rng = np.random.default_rng(seed)
    marks = np.where(rng.random(tokens) < 0.6, FFN, 0) | np.where(rng.random(tokens) < 0.8, LIVE, 0)
    marks = np.where(marks & FFN, marks | np.where(rng.random(tokens) < 0.5, FP8, 0), marks)
    return (marks | (LIVE if keeps_all else 0)).astype(np.uint8)


@pytest.mark.parametrize("tokens", [1, 7, 8, 9, 1001])
def test_layers_come_back_through_tokens_that_leave_and_a_pass_that_begins_anew(tokens):
    alive, entries, expected = np.arange(tokens), [], []
    for step in range(6):
        marks = marks_of(step, len(alive))
        marks[-1] |= LIVE
        entries.append(pack_layer(marks, restarts=step == 2))
        states = np.full(tokens, GONE)
        states[alive] = [(IN_FP8 if m & FP8 else IN_FULL) if m & FFN else SKIPPED for m in marks]
        expected.append(states)
        alive = alive[(marks & LIVE) > 0]
    found = unpack_layers(entries, tokens)
    assert [(f.number, f.layer) for f in found] == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]
    for layer, states in zip(found, expected, strict=True):
        assert layer.states.tolist() == states.tolist()


@pytest.mark.parametrize("mark", [LIVE | FFN, LIVE | FFN | FP8, LIVE])
def test_a_layer_that_treats_all_tokens_alike_costs_next_to_nothing(mark):
    entry = pack_layer(np.full(100_000, mark, np.uint8))
    assert len(entry) < 50
    (layer,) = unpack_layers([entry], 100_000)
    assert len(set(layer.states.tolist())) == 1


def test_random_tiers_stay_below_a_fifth_of_a_byte():
    rng = np.random.default_rng(0)
    kept = rng.random(30_000) < 0.65
    high = kept & (rng.random(30_000) < 0.3)
    marks = (LIVE | np.where(kept, FFN, 0) | np.where(kept & ~high, FP8, 0)).astype(np.uint8)
    assert len(pack_layer(marks)) / len(marks) < 0.2


@pytest.mark.parametrize("entry", [b"", b"no zlib", pack_layer(marks_of(1, 900))])
def test_bytes_of_something_else_are_refused(entry):
    with pytest.raises(ValueError, match=r"selection|buffer|count"):
        unpack_layers([entry], 20)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (zlib.compress(bytes(30_000_000)), "a layer's selection is of another prompt"),
        (zlib.compress(b""), "no selection of a layer: it is cut"),
        (zlib.compress(bytes([1]) + bytes(range(100)))[:30], "no selection of a layer: it is cut"),
    ],
    ids=["bomb", "empty", "cut"],
)
def test_what_was_packed_otherwise_is_refused_before_it_is_unpacked_whole(entry, message):
    tracemalloc.start()
    with pytest.raises(ValueError, match=f"^{message}$"):
        unpack_layers([entry], 800)
    assert tracemalloc.get_traced_memory()[1] < 1_000_000
    tracemalloc.stop()
