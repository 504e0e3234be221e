"""A document that rows share lies in the store once, and leaves with the last of them."""

from __future__ import annotations

import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import SIZES, document, loaded

from pipeline.engines.local import LocalEngine
from pipeline.engines.table import Table
from pipeline.generation.generated import StopRules
from pipeline.generation.sampling import Sampling
from pipeline.model.store import KvStore
from pipeline.pruning.dense import Dense
from pipeline.records import EncodedDocument, Row, Spans

NEW_TOKENS = 6
QUESTIONS = {0: (9, 4, 21, 5), 1: (7, 3), 2: (8,)}  # tokens, of each document's rows
DOCUMENT_TOKENS = (200, 90, 60)


@pytest.fixture
def model():
    return loaded()


def rows():
    made = []
    for number, questions in QUESTIONS.items():
        known = document(DOCUMENT_TOKENS[number], seed=number).input_ids
        for length in questions:
            row = len(made)
            behind = np.random.default_rng(row).integers(0, SIZES["vocab_size"], length)
            made.append(
                EncodedDocument(
                    source=Row(row=row, id=str(row), place=f"row {row}"),
                    input_ids=np.concatenate([known, behind]),
                    spans=Spans(document=(0, len(known)), question=(len(known), len(known) + length)),
                    ready_at=time.perf_counter(),
                )
            )
    return made


def engine_for(model, group="any", store_slots=None, **options):
    rules = StopRules(max_new_tokens=NEW_TOKENS)
    engine = LocalEngine(model, Dense(), rules=rules, sampling=Sampling(), group=group, **options)
    if store_slots is not None:
        engine.packer = replace(engine.packer, store_bytes=store_slots * engine.packer.slot_bytes)
    return engine


def texts(engine):
    return [(row.status, row.answer) for row in engine.answer(rows())]


def layers(tokens):
    return tokens * SIZES["num_hidden_layers"]


def taken(engine):
    return engine._table._store.size - engine._table.free


def test_the_store_holds_a_document_once_while_its_rows_are_decoded(model):
    alone = texts(engine_for(model, group="off"))
    engine, most = engine_for(model), 0
    engine.add(rows())
    answers = {}
    while engine.is_busy:
        answers |= {answer.row: (answer.status, answer.answer) for _, answer, _ in engine.advance()}
        most = max(most, taken(engine) if engine._table else 0)
    assert [answers[row] for row in sorted(answers)] == alone
    own = sum(length + NEW_TOKENS for lengths in QUESTIONS.values() for length in lengths)
    assert most == layers(sum(DOCUMENT_TOKENS) + own)
    assert (taken(engine), engine._table._documents) == (0, {})


def test_a_document_leaves_with_its_last_row(model):
    engine = engine_for(model, in_flight=2)  # so that its rows come one after the other
    engine.add(rows())
    seen = []
    while engine.is_busy:
        engine.advance()
        seen.append(taken(engine) if engine._table else 0)
    largest = layers(DOCUMENT_TOKENS[0])
    assert max(seen) >= largest
    at = max(n for n, slots in enumerate(seen) if slots >= largest)
    assert all(slots < largest for slots in seen[at + 1 :])
    assert seen[-1] == 0


@pytest.mark.parametrize("slots", [235, 260, 330, 500])
def test_rows_wait_where_the_store_is_small(model, slots):
    """Of 200 tokens of the first document, and 21 of a question, with room for an answer."""
    expected = texts(engine_for(model, group="off"))
    engine = engine_for(model, store_slots=layers(slots))
    assert texts(engine) == expected
    assert taken(engine) == 0


def test_a_document_that_does_not_fit_the_store_is_not_shared(model):
    engine = engine_for(model, store_slots=layers(226))
    answers = engine.answer(rows())
    assert [row.group_rows for row in answers] == [None] * 4 + [2, 2, None]
    assert {row.status for row in answers} == {"ok"}


def test_a_prefix_that_is_made_again_finds_room_or_waits(model, monkeypatch):
    """Another pack may come between two chunks of a group, after which its documents come again."""
    expected = texts(engine_for(model, group="off"))
    engine, admit = engine_for(model, pack_tokens=30, store_slots=layers(330)), LocalEngine._admit

    def without_prefix(self, jobs):
        self._let_go()
        return admit(self, jobs)

    monkeypatch.setattr(LocalEngine, "_admit", without_prefix)
    assert texts(engine) == expected
    assert taken(engine) == 0


def test_a_step_that_fails_costs_nothing_but_time(model, monkeypatch):
    expected = texts(engine_for(model, group="off"))
    engine, calls = engine_for(model), []
    attend = model.attention.decode

    def failing(q, k, v, slots, sinks):
        calls.append(slots.shared)
        if slots.shared is not None and len(calls) < 40:
            raise ValueError("bad luck")
        return attend(q, k, v, slots, sinks)

    monkeypatch.setattr(model.attention, "decode", failing)
    assert texts(engine) == expected
    assert any(shared is not None for shared in calls)


@pytest.mark.parametrize("in_flight", [1, 2])
@pytest.mark.parametrize("kv_dtype", ["auto", "fp8"])
def test_no_more_documents_are_held_than_rows_run(model, in_flight, kv_dtype):
    """And one, which is in the making: a store in e4m3 has as many lines of scales."""
    engine = engine_for(model, in_flight=in_flight, kv_dtype=kv_dtype)
    engine.add(rows())
    most, statuses = 0, []
    while engine.is_busy:
        statuses += [answer.status for _, answer, _ in engine.advance()]
        most = max(most, engine._table._held if engine._table else 0)
    assert 0 < most <= in_flight + 1
    assert statuses == ["ok"] * len(rows())
    assert taken(engine) == engine._table._held == 0


def test_keys_and_values_in_e4m3_take_a_quarter_of_float32_and_give_near_answers(model):
    exact, near = engine_for(model), engine_for(model, kv_dtype="fp8")
    answers = [texts(engine) for engine in (exact, near)]
    assert near.packer.slot_bytes * 4 == exact.packer.slot_bytes
    assert {status for status, _ in answers[1]} == {"ok"}
    first = [[text.split()[0] for _, text in each] for each in answers]
    assert first[0] == first[1]  # chosen by the prefill
    assert answers[0] != answers[1]  # a model of random weights, whose logits are near each other


def test_a_store_without_memory_costs_sharing_alone(model, monkeypatch):
    expected = texts(engine_for(model, group="off"))
    engine, hold, refused = engine_for(model), Table.hold, []

    def without_memory(self, cache):
        refused.append(len(cache.own_tokens()[0]))
        if len(refused) < 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return hold(self, cache)

    monkeypatch.setattr(Table, "hold", without_memory)
    assert texts(engine) == expected
    assert refused[:3] == [2, 1, 1]  # both documents of a pack, then each by itself
    assert taken(engine) == 0


def test_what_a_document_made_does_not_outlive_it(model, monkeypatch):
    wiped, release = [], KvStore.release

    def watched(self, extent, *, wipe=False):
        release(self, extent, wipe=wipe)
        part = slice(extent.start, extent.start + extent.size)
        wiped.append((extent.stored[0], not any(pool[part].any() for pool in self._pool)))

    monkeypatch.setattr(KvStore, "release", watched)
    texts(engine_for(model))
    assert [dict(wiped)[tokens] for tokens in DOCUMENT_TOKENS[:2]] == [True, True]
