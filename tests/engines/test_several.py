"""Several answers to a prompt from one prefill: each is what it is alone, and the prompt is held once.

In float64, where sums in another order do not move a choice.
"""

from __future__ import annotations

import random
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import SIZES, document, loaded, pack_of
from decode_steps import METHODS as PRUNING
from decode_steps import EagerRecorder, exact_model

from pipeline.engines.local import LocalEngine
from pipeline.engines.memory import FIRST_AT_ONCE
from pipeline.generation import decode_loop
from pipeline.generation import graphs as graphs_module
from pipeline.generation.decode import NOT_FINITE_MESSAGE, decode
from pipeline.generation.decode_batch import DecodeBatch
from pipeline.generation.generated import StopRules
from pipeline.generation.sampling import Sampling
from pipeline.kernels.attention import SdpaAttention
from pipeline.model.prefill import prefill
from pipeline.model.store import KvStore, slots_needed
from pipeline.pruning.registry import make_method
from pipeline.pruning.shape import ModelShape
from pipeline.records import Spans

N, NEW_TOKENS = 3, 9
METHODS = {name: (name, settings) for name, settings in PRUNING.items()}
METHODS["late"] = ("marsinfer", {"eta": 0.7, "start_layer": 3, "window": 2})
RULES = StopRules(max_new_tokens=NEW_TOKENS, token_ids=frozenset(range(0, 256, 11)))
DRAWN = Sampling(temperature=1.0, seed=6)
LENGTHS = (60, 31, 97, 44, 75)


@pytest.fixture(scope="module")
def model():
    return loaded(exact_model())


def rows():
    return [document(length, seed=row, row=row) for row, length in enumerate(LENGTHS)]


def asked():
    """Rows of two documents, with several questions about each."""
    made = []
    for row, behind in enumerate((9, 4, 21, 7)):
        known = document((70, 40)[row > 1], seed=row > 1)
        question = np.random.default_rng(row).integers(0, SIZES["vocab_size"], behind)
        ids, end = np.concatenate([known.input_ids, question]), known.prompt_tokens
        spans = Spans(document=(0, end), question=(end, len(ids)))
        source = replace(known.source, row=row, id=str(row))
        made.append(replace(known, source=source, input_ids=ids, spans=spans, ready_at=time.perf_counter()))
    return made


def engine_for(model, method="dense", *, sampling=DRAWN, rules=RULES, n=N, room=None, **options):
    """`room` is for how many rows like the largest the store is, so that others wait."""
    engine = LocalEngine(model, make_method(*METHODS[method]), rules=rules, sampling=sampling, n=n, **options)
    if room is not None:
        slots = max(engine.packer.slots(each.prompt_tokens, engine.packer.room(each)) for each in rows())
        engine.packer = replace(engine.packer, store_bytes=int(room * slots) * engine.packer.slot_bytes)
    return engine


def alone(model, row, method="dense", *, sampling=DRAWN, answer=0, kv_dtype=None):
    """One answer, as a single row with its draws has it: tokens as text, and why it ended."""
    prefilled = prefill(
        model.decoder, SdpaAttention(), make_method(*METHODS[method]), pack_of(row), NEW_TOKENS
    )
    (made,) = decode(
        model.decoder,
        SdpaAttention(),
        prefilled,
        RULES,
        draws=[sampling.draws(row.source.row, NEW_TOKENS, answer)],
        prompts=[row.input_ids],
        kv_dtype=kv_dtype,
    )
    return model.tokenizer.decode(made.tokens), made.finish_reason


def told(answer):
    assert answer.status == "ok", answer.error_message
    return [(each.answer, each.finish_reason) for each in answer.answers]


def expected_of(model, given, method="dense", n=N, **options):
    return [[alone(model, row, method, answer=answer, **options) for answer in range(n)] for row in given]


@pytest.mark.parametrize(
    ("options", "sampling"),
    [
        ({}, DRAWN),
        ({"in_flight": 4, "pack_tokens": 100, "room": 2}, DRAWN),
        ({"in_flight": 1}, DRAWN),  # raised to the answers of one row
        ({"pack_tokens": 1}, DRAWN),
        ({"room": 0.5}, DRAWN),  # the largest run alone, an answer behind the other
        ({"room": 0}, replace(DRAWN, repetition_penalty=1.4)),
        ({"in_flight": 7, "lookup": 3}, replace(DRAWN, temperature=0.3, top_k=20)),
        ({"in_flight": 7, "lookup": 2}, replace(DRAWN, top_p=0.9, min_p=0.01, repetition_penalty=1.4)),
    ],
)
@pytest.mark.parametrize("late", [0, 1])
def test_each_answer_is_what_it_is_alone(model, options, sampling, late, monkeypatch):
    monkeypatch.setattr(graphs_module, "recorder_for", lambda *_: EagerRecorder())
    monkeypatch.setitem(decode_loop.LATE, "cpu", late)
    given = rows()
    expected = expected_of(model, given, sampling=sampling)
    assert len({answer for answers in expected for answer in answers}) > 2 * len(given)
    assert {reason for answers in expected for _, reason in answers} == {"stop", "length"}
    engine, draws = engine_for(model, sampling=sampling, **options), random.Random(late)
    waiting, found = list(given), {}
    while waiting or engine.is_busy:
        if waiting and (not engine.is_busy or draws.random() < 0.4):
            engine.add([waiting.pop()])
        for _, answer, _ in engine.advance():
            assert answer.row not in found
            found[answer.row] = told(answer)
    assert [found[row.source.row] for row in given] == expected
    if engine._table is not None:
        assert engine._table.free == engine._table._store.size


@pytest.mark.parametrize("method", METHODS)
def test_of_a_pruned_prompt_too(model, method):
    answers = engine_for(model, method).answer(rows())
    assert [told(each) for each in answers] == expected_of(model, rows(), method)


@pytest.mark.parametrize("method", ["dense", "late"])
@pytest.mark.parametrize("options", [{}, {"in_flight": 4, "pack_tokens": 30}])
def test_of_rows_about_the_same_document(model, method, options):
    """Of which all layers are computed once for all of them, or the first three of four."""
    engine = engine_for(model, method, group="auto", **options)
    answers = engine.answer(asked())
    assert {each.group_rows for each in answers} == {2}
    assert [told(each) for each in answers] == expected_of(model, asked(), method)
    assert engine._table.free == engine._table._store.size
    assert engine._table._held == 0


def test_of_a_model_whose_rows_share_nothing(model, monkeypatch):
    monkeypatch.setattr(ModelShape, "shares_documents", False)
    engine, shared = engine_for(model, in_flight=7), []
    real = DecodeBatch.step
    monkeypatch.setattr(
        DecodeBatch, "step", lambda self, size: (shared.append(size.shares), real(self, size))
    )
    assert [told(each) for each in engine.answer(rows())] == expected_of(model, rows())
    assert set(shared) == {False}
    assert engine._table.free == engine._table._store.size


@pytest.mark.parametrize("room", [None, 0])
@pytest.mark.parametrize("group", ["off", "any"])
def test_in_e4m3_by_the_scales_of_the_prompt(model, room, group):
    """Those of a document and of what stands behind it differ from a prompt's, where rows share it."""
    fp8 = torch.float8_e4m3fn
    engine = engine_for(model, kv_dtype="fp8", group=group, room=room)
    given = rows() if group == "off" else asked()
    answers = [told(each) for each in engine.answer(given)]
    if group == "off" or room == 0:
        assert answers == expected_of(model, given, kv_dtype=fp8)
    else:
        single = engine_for(model, kv_dtype="fp8", group=group, n=1).answer(given)
        assert [each[0] for each in answers] == [(each.answer, each.finish_reason) for each in single]
    if engine._table is not None:
        assert len(engine._table._store._lines) == 2 * engine.packer.in_flight + 1


def test_an_answer_does_not_depend_on_how_many_there_are(model):
    few, many = (engine_for(model, n=n).answer(rows()) for n in (2, 5))
    single = engine_for(model, n=1).answer(rows())
    assert [told(each)[:2] for each in many] == [told(each) for each in few]
    assert [told(each)[0] for each in few] == [(each.answer, each.finish_reason) for each in single]
    assert {each.answers for each in single if each.answers is None} == {None}


def test_a_row_says_what_its_answers_came_to(model):
    answers = engine_for(model).answer(rows())
    for each in answers:
        first = each.answers[0]
        assert (each.answer, each.finish_reason) == (first.answer, first.finish_reason)
        assert each.new_tokens == sum(one.new_tokens for one in each.answers)
        assert each.prefill_ms > 0
        assert each.decode_ms > 0
    assert len({one.new_tokens for each in answers for one in each.answers}) > 2


def test_more_first_tokens_than_are_chosen_together(model):
    n = FIRST_AT_ONCE // 2 + 1
    rules = StopRules(max_new_tokens=1)
    answers = engine_for(model, n=n, rules=rules).answer(rows()[:3])
    few = engine_for(model, n=5, rules=rules).answer(rows()[:3])
    assert [told(each)[:5] for each in answers] == [told(each) for each in few]
    assert {len(each.answers) for each in answers} == {n}


def test_the_store_holds_a_prompt_once_while_its_answers_grow(model):
    rules = StopRules(max_new_tokens=NEW_TOKENS)
    engine = engine_for(model, rules=rules)
    most, layers = 0, model.decoder.shape.layers
    engine.add(rows())
    while engine.is_busy:
        engine.advance()
        most = max(most, engine._table._store.size - engine._table.free)
    own = N * NEW_TOKENS
    assert most == layers * (sum(LENGTHS) + own * len(LENGTHS))
    planned = [engine.packer.slots(length, NEW_TOKENS) for length in LENGTHS]
    assert planned == [layers * (length + own) for length in LENGTHS]
    copies = engine.packer.slots(LENGTHS[0], NEW_TOKENS, shares=False)
    assert copies == N * slots_needed([LENGTHS[0]] * layers, NEW_TOKENS, torch.device("cpu"))


def test_room_is_planned_for_all_answers(model):
    packer = engine_for(model, n=40, in_flight=16).packer
    assert packer.in_flight == 40
    one = engine_for(model, n=1, in_flight=16).packer
    assert one.in_flight == 16
    vocab = model.decoder.shape.vocab
    assert packer.planned_bytes([50, 60]) - one.planned_bytes([50, 60]) == 80 * vocab * 4
    many = packer.planned_bytes([50] * 20) - one.planned_bytes([50] * 20)
    assert many == FIRST_AT_ONCE * vocab * 4


def spoilt(model, monkeypatch, column, at):
    """NaN in the output of a column of the batch at a step."""
    real, steps = model.decoder.head, []

    def head(hidden):
        logits = real(hidden)
        steps.append(len(hidden))
        if len(steps) == at:
            logits[column] = float("nan")
        return logits

    monkeypatch.setattr(model.decoder, "head", head)


@pytest.mark.parametrize("late", [0, 1])
def test_a_row_fails_with_one_of_its_answers_and_no_other_row_does(model, late, monkeypatch):
    monkeypatch.setitem(decode_loop.LATE, "cpu", late)
    rules = StopRules(max_new_tokens=NEW_TOKENS)
    given = rows()[:3]
    expected = [told(each) for each in engine_for(model, rules=rules).answer(given)]
    engine = engine_for(model, rules=rules)
    engine.add(given)
    assert engine.advance() == []
    failing = engine._table.loop.rows[4].row.answer.row
    spoilt(model, monkeypatch, column=4, at=3)
    found = {}
    while engine.is_busy:
        found |= {answer.row: answer for _, answer, _ in engine.advance()}
    failed = found.pop(failing)
    assert (failed.status, failed.error_type, failed.answers) == ("error", "not_finite", None)
    assert NOT_FINITE_MESSAGE in failed.error_message
    assert {row: told(each) for row, each in found.items()} == {
        row.source.row: answers
        for row, answers in zip(given, expected, strict=True)
        if row.source.row != failing
    }
    assert engine._table.free == engine._table._store.size


def test_a_row_that_takes_too_long_ends_with_all_its_answers(model, monkeypatch):
    engine = engine_for(model, rules=StopRules(max_new_tokens=NEW_TOKENS), row_timeout=1e6)
    engine.add(rows()[:2])
    assert engine.advance() == []
    monkeypatch.setattr(engine.attempts, "row_timeout", 0.0)
    ended = engine.advance()
    assert [(answer.status, answer.error_type) for _, answer, _ in ended] == [("error", "timeout")] * 2
    assert engine._table.free == engine._table._store.size
    assert not engine.is_busy


def test_a_step_that_fails_costs_nothing_but_time(model, monkeypatch):
    notes, calls, attend = [], [], model.attention.decode
    engine = engine_for(model, note=notes.append)

    def failing(q, k, v, slots, sinks):
        calls.append(slots.shared)
        if len(calls) == 20:
            raise ValueError("bad luck")
        return attend(q, k, v, slots, sinks)

    monkeypatch.setattr(model.attention, "decode", failing)
    assert [told(each) for each in engine.answer(rows())] == expected_of(model, rows())
    assert notes == ["a decode step failed (row 2: ValueError: bad luck): its 5 rows run again, each alone"]


def test_prompts_and_answers_may_be_moved(model, monkeypatch):
    """Whenever a row joins, and those before it have left holes."""
    starts, real = set(), KvStore._take

    def take(self, *given, **named):
        self._compact()
        return real(self, *given, **named)

    monkeypatch.setattr(KvStore, "_take", take)
    engine, given = engine_for(model, in_flight=7), [*rows(), *asked()]
    given = [replace(each, source=replace(each.source, row=row)) for row, each in enumerate(given)]
    engine.add(given)
    found = {}
    while engine.is_busy:
        found |= {answer.row: told(answer) for _, answer, _ in engine.advance()}
        for each in engine._table.rows:
            starts.add((each.row.answer.row, each.row.answers.index(each), each.extent.start))
    assert len(starts) > len(given) * N
    assert [found[row] for row in range(len(given))] == expected_of(model, given)
