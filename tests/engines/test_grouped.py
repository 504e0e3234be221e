"""Rows about the same document: answered together as each on its own, whatever goes wrong with some."""

from __future__ import annotations

import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import SIZES, document, loaded

from pipeline.engines import grouped, prefilling
from pipeline.engines.local import LocalEngine
from pipeline.generation.generated import StopRules
from pipeline.generation.sampling import Sampling
from pipeline.pruning.dense import Dense
from pipeline.pruning.operations import dense_flops
from pipeline.pruning.registry import make_method
from pipeline.records import EncodedDocument, Row, Spans

LAYERS = 10  # with few of them, dense would be the cheapest way for every method
SLIM = {"layers": "5", "budget": "0.1", "block": "8", "unit": "2"}
# of each row: which document, and the length of what stands behind it
ROWS = ((0, 9), (1, 7), (0, 4), (2, 12), (0, 21), (1, 1), (0, 3), (3, 5))
DOCUMENT_TOKENS = (200, 64, 90, 31)


@pytest.fixture
def model(monkeypatch):
    monkeypatch.setitem(SIZES, "num_hidden_layers", LAYERS)
    return loaded()


def rows(given=ROWS):
    made = []
    for row, (number, length) in enumerate(given):
        known = document(DOCUMENT_TOKENS[number], seed=number).input_ids
        behind = np.random.default_rng(row).integers(0, SIZES["vocab_size"], length)
        spans = Spans(document=(3, len(known)), question=(len(known), len(known) + length))
        made.append(
            EncodedDocument(
                source=Row(row=row, id=str(row), place=f"row {row}"),
                input_ids=np.concatenate([known, behind]),
                spans=spans,
                ready_at=time.perf_counter(),
            )
        )
    return made


def engine_for(model, method=None, group="auto", note=lambda text: None, **options):
    return LocalEngine(
        model,
        method or Dense(),
        rules=StopRules(max_new_tokens=4),
        sampling=Sampling(),
        group=group,
        note=note,
        **options,
    )


def answered(engine, given=None):
    """Answers in the order of the rows, however they came."""
    answers = engine.answer(given or rows())
    assert [answer.row for answer in answers] == list(range(len(answers)))
    return answers


def texts(answers):
    return [answer.answer for answer in answers]


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("dense", {}),
        ("sliminfer", SLIM),
        ("gemfilter", {"layer": "5", "keep": "8"}),
        ("uniprefill", {"first_layer": "1", "share": "0.1", "block": "4", "window": "5", "sink": "2"}),
    ],
)
def test_answers_are_those_of_each_row_on_its_own(model, name, settings):
    method = make_method(name, settings)
    expected = answered(engine_for(model, method, group="off"))
    notes = []
    answers = answered(engine_for(model, method, note=notes.append))
    assert [row.row for row in answers] == list(range(len(ROWS)))
    assert texts(answers) == texts(expected)
    assert [row.group_rows for row in answers] == [4, 2, 4, None, 4, 2, 4, None]
    assert [row.kept_tokens for row in answers] == [row.kept_tokens for row in expected]
    assert [row.kv_bytes for row in answers] == [row.kv_bytes for row in expected]
    assert {row.method for row in answers} == {name}
    assert len(notes) == 1
    assert notes[0].startswith("rows about the same document are answered together (--group auto); ")
    assert "computed once for all of them; it takes " in notes[0]


def test_dense_replaces_a_method_that_costs_more(model):
    method = make_method("marsinfer", {"start_layer": "1", "window": "6", "prefix": "4", "eta": "0.7"})
    apart = {group: answered(engine_for(model, group, group="off")) for group in (Dense(), method)}
    notes = []
    answers = answered(engine_for(model, method, group="any", note=notes.append))
    for row, dense, pruned in zip(answers, apart[Dense()], apart[method], strict=True):
        assert row.method == ("marsinfer" if row.group_rows is None else "dense")
        assert row.answer == (pruned if row.group_rows is None else dense).answer
    assert "answered with dense, because " in notes[0]
    assert "(--group off keeps marsinfer)" in notes[0]


def test_ttft_is_that_of_what_is_shared_and_of_the_rows_own_chunk(model, clock, monkeypatch):
    """Waiting for the chunks before is not in it."""
    for place, name, seconds in (
        (grouped, "prefill_prefixes", 4.0),
        (grouped, "prefill_behind", 1.0),
        (prefilling, "first_tokens", 0.25),
    ):
        real = getattr(place, name)

        def taking(*given, real=real, seconds=seconds):
            clock.now += seconds
            return real(*given)

        monkeypatch.setattr(place, name, taking)
    answers = answered(engine_for(model), rows(((0, 9), (0, 4), (0, 21))))
    assert {row.group_rows for row in answers} == {3}
    assert {(row.shared_ms, row.prefill_ms, row.ttft_ms) for row in answers} == {(4000, 5000, 5250)}


def test_shared_time_and_work_are_told_apart(model):
    engine = engine_for(model)
    began = time.perf_counter()
    given = rows()
    answers = answered(engine, given)
    for row, document_row in zip(answers, given, strict=True):
        if row.group_rows is None:
            assert row.shared_ms is None
            assert row.flops_ratio == pytest.approx(1)
            continue
        assert 0 < row.shared_ms < row.prefill_ms <= row.ttft_ms
        assert row.queue_ms + row.ttft_ms + row.decode_ms < (time.perf_counter() - began) * 1e3
        assert row.queue_ms >= 0
        assert (row.kept_ratio, row.ffn_ratio, row.attention_ratio) == (1, 1, 1)
        assert row.flops_ratio < 1
        assert row.prompt_tokens == document_row.prompt_tokens
    of_first = [row for row in answers if row.group_rows == 4]
    shape = model.decoder.shape
    done = sum(row.flops_ratio * dense_flops(shape, row.prompt_tokens) for row in of_first)
    whole = sum(dense_flops(shape, row.prompt_tokens) for row in of_first)
    alone = dense_flops(shape, DOCUMENT_TOKENS[0]) - 2 * shape.hidden * shape.vocab
    assert done == pytest.approx(whole - 3 * alone)
    assert engine.times.shared_s > 0
    assert engine.times.prefill_s + engine.times.decode_s < engine.times.span_s


@pytest.mark.slow
@pytest.mark.parametrize(("name", "settings"), [("dense", {}), ("sliminfer", SLIM)])
@pytest.mark.parametrize("pack_tokens", [1, 30, 300, 600])
def test_groups_are_cut_into_chunks_of_the_packs_size(model, name, settings, pack_tokens):
    method = make_method(name, settings)
    expected = answered(engine_for(model, method, group="off"))
    engine = engine_for(model, method, pack_tokens=pack_tokens)
    answers = answered(engine)
    assert texts(answers) == texts(expected)
    assert [row.group_rows for row in answers] == [4, 2, 4, None, 4, 2, 4, None]
    if pack_tokens == 1:
        assert {row.pack_documents for row in answers} == {1}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "settings"), [("dense", {}), ("sliminfer", SLIM), ("gemfilter", {"layer": "5", "keep": "9"})]
)
def test_a_group_larger_than_memory_comes_in_chunks_within_the_plan(model, name, settings, monkeypatch):
    method = make_method(name, settings)
    expected = answered(engine_for(model, method, group="off"))
    engine = engine_for(model, method, group="any")
    (first, *_), _ = engine.packs.groups.split(rows())
    longest = [row for row in rows() if row.prompt_tokens == 221]
    one = next(
        size
        for size in range(10_000, 10**8, 10_000)
        if replace(engine.packs.groups, packer=replace(engine.packer, max_bytes=size)).fits(
            first.sharing, 200, longest
        )
    )
    # a row that reads its document in the store needs so little memory that only its tokens count
    few = {"max_bytes": one, "pack_tokens": 30} if name == "dense" else {"max_bytes": round(one * 1.4)}
    engine.packer = replace(engine.packer, **few)
    caches = watched_caches(monkeypatch)
    answers = answered(engine)
    assert texts(answers) == texts(expected)
    chunks = [row.pack_documents for row in answers if row.group_rows == 4]
    assert len(chunks) == 4
    assert max(chunks) < 4
    assert max(caches) < engine.packer.max_bytes
    engine.packer = replace(engine.packer, max_bytes=one - 10_000)
    first_row = answered(engine)[0]  # the next best way needs less
    assert (first_row.method, first_row.group_rows) == ("dense", None if name == "dense" else 4)


def watched_caches(monkeypatch):
    """Bytes of keys and values, the shared ones included, after each prefill behind them."""
    seen, real = [], grouped.prefill_behind

    def prefill_behind(decoder, attention, method, shared, *options):
        made = real(decoder, attention, method, shared, *options)
        shared_bytes = shared.cache.nbytes + shared.hidden_PD.nbytes
        seen.append(made.cache.nbytes + shared_bytes)
        return made

    monkeypatch.setattr(grouped, "prefill_behind", prefill_behind)
    return seen


def failing(monkeypatch, name, error, wrong):
    """A prefill of one of the two parts that fails with `error` where `wrong` says so of its lengths."""
    real = getattr(grouped, name)

    def prefill(decoder, attention, method, *rest):
        lengths = (
            [len(part) for part in rest[0]]
            if name == "prefill_prefixes"
            else [row.prompt_tokens for row in rest[1]]
        )
        if wrong(lengths):
            raise error
        return real(decoder, attention, method, *rest)

    monkeypatch.setattr(grouped, name, prefill)


def test_a_row_that_fails_costs_its_group_nothing(model, monkeypatch):
    expected = answered(engine_for(model))
    failing(monkeypatch, "prefill_behind", ValueError("bad luck"), lambda lengths: 204 in lengths)
    answers = answered(engine_for(model))
    assert [row.status for row in answers] == ["ok", "ok", "error", *["ok"] * 5]
    assert answers[2].error_type == "internal"
    assert answers[2].error_message == "row 2: ValueError: bad luck"
    assert (answers[2].group_rows, answers[2].method) == (None, "dense")
    others = [row.row for row in answers if row.status == "ok"]
    assert [texts(answers)[row] for row in others] == [texts(expected)[row] for row in others]


@pytest.mark.slow
def test_rows_without_memory_beside_their_document_are_answered_on_their_own(model, monkeypatch):
    expected = answered(engine_for(model))
    error = torch.OutOfMemoryError("CUDA out of memory")
    failing(monkeypatch, "prefill_behind", error, lambda lengths: len(lengths) > 2 or 221 in lengths)
    answers = answered(engine_for(model))
    assert texts(answers) == texts(expected)
    assert [row.group_rows for row in answers] == [4, 2, 4, None, None, 2, 4, None]
    assert max(row.pack_documents for row in answers if row.group_rows) == 2


def test_documents_without_memory_together_are_halved_and_one_is_not_shared(model, monkeypatch):
    expected = answered(engine_for(model))
    error = torch.OutOfMemoryError("CUDA out of memory")
    failing(monkeypatch, "prefill_prefixes", error, lambda lengths: 200 in lengths)
    answers = answered(engine_for(model))
    assert texts(answers) == texts(expected)
    assert [row.group_rows for row in answers] == [None, 2, None, None, None, 2, None, None]


def test_a_row_that_takes_too_long_costs_its_group_nothing(model, monkeypatch, clock):
    expected = answered(engine_for(model))
    real = grouped.prefill_behind

    def slow(decoder, attention, method, shared, given, numbers, new_tokens, check):
        def slow_check():
            clock.now += 0.2 if any(row.prompt_tokens == 209 for row in given) else 0
            check()

        return real(decoder, attention, method, shared, given, numbers, new_tokens, slow_check)

    monkeypatch.setattr(grouped, "prefill_behind", slow)
    answers = answered(engine_for(model, row_timeout=0.3))
    assert [row.status for row in answers] == ["error"] + ["ok"] * 7
    assert answers[0].error_message == "row 0: not answered within --row-timeout 0.3 s"
    assert texts(answers)[1:] == texts(expected)[1:]


@pytest.mark.slow
def test_time_that_is_shared_counts_for_each_row(model, monkeypatch, clock):
    real = grouped.prefill_prefixes

    def slow(*arguments):
        made = real(*arguments)
        clock.now += 0.4  # after the last check of the document's own prefill
        return made

    monkeypatch.setattr(grouped, "prefill_prefixes", slow)
    answers = answered(engine_for(model, row_timeout=0.3))
    assert [row.error_type for row in answers] == ["timeout"] * 3 + [None] + ["timeout"] * 3 + [None]


def test_a_group_can_be_rehearsed(model):
    checks = []
    grouped.rehearse_group(model, np.arange(64), lambda: checks.append(1))
    assert len(checks) == 2 * model.decoder.shape.layers


def test_documents_that_may_be_offloaded_are_not_shared(model):
    answers = answered(engine_for(model, make_method("sliminfer", SLIM), kv_memory=10**9))
    assert {row.group_rows for row in answers} == {None}


def test_rows_that_are_answered_are_left_out_when_their_groups_are_put_together_anew(model):
    packs = engine_for(model).packs
    groups, _ = packs.groups.split(rows())
    (pack,) = packs.groups.packs(groups)
    assert len(pack.groups) > 1
    jobs = [waiting.row for chunk in packs.chunks(pack) for waiting in chunk.rows]
    for answered_rows in range(len(jobs)):
        left = jobs[answered_rows:]
        found = [waiting.row.document for chunk in packs.regrouped(pack, left) for waiting in chunk.rows]
        assert {id(row) for row in found} == {id(job.document) for job in left}
        assert len(found) == len(left)
