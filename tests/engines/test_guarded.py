"""What an engine tells a guard of its prefills, and what it counts of those that run again."""

from __future__ import annotations

import time
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import SIZES, document, loaded

from pipeline.calibration.emission import sparse_from_of
from pipeline.engines import prefilling
from pipeline.engines.local import LocalEngine
from pipeline.generation.generated import StopRules
from pipeline.generation.sampling import Sampling
from pipeline.kernels import sparse
from pipeline.kernels.attention import SdpaAttention
from pipeline.pruning.frugal import Frugal
from pipeline.pruning.gemfilter import GemFilter
from pipeline.pruning.marsinfer import MarsInfer
from pipeline.records import EncodedDocument, Row, Spans
from pipeline.setup.guard import ATTENTION, FLAT, SHARES, Guard, kind_of, spoken_for
from pipeline.setup.profile import Profile

SPARSE_FROM = 300
PLAIN = {"eta": 1.0, "start_layer": 2}  # nothing but its attention leaves anything out


@pytest.fixture
def model(monkeypatch):
    monkeypatch.setattr(sparse, "BLOCK", 32)
    attention = SdpaAttention()
    attention.sparse_from = SPARSE_FROM
    return loaded(attention=attention)


def guard_with(bound, method, model):
    """A guard that has seen a prompt of 600 tokens, of whose attention so much was computed."""
    score = SimpleNamespace(prompt_tokens=600, **dict.fromkeys(SHARES, 1.0) | {ATTENTION: bound})
    told = spoken_for([], [score], sparse_from=sparse_from_of(model, method))
    return Guard.of(Profile(about={"guard": told}, batch={}))


def engine_for(model, method, bound, **options):
    return LocalEngine(
        model,
        method,
        rules=StopRules(max_new_tokens=2),
        sampling=Sampling(),
        guard=guard_with(bound, method, model),
        **options,
    )


def sparse_in(model, *layers):
    """A method whose attention chooses blocks in these layers alone."""
    masses = tuple(0.3 if layer in layers else None for layer in range(model.shape.layers))
    return MarsInfer(**PLAIN, sparse_attention=masses)


def kinds(answers):
    return [None if answer.guard is None else kind_of(answer.guard) for answer in answers]


@pytest.mark.parametrize("layers", [(0, 1, 2), (1,)])
@pytest.mark.parametrize("options", [{}, {"pack_tokens": 1}])
def test_prompts_of_one_pack_are_compared_where_their_blocks_were_chosen(model, layers, options):
    prompts = [document(n, seed=n, row=row) for row, n in enumerate((200, 600, 250, 450))]
    method = sparse_in(model, *layers)
    usual = engine_for(model, method, 1.0, **options).answer(prompts)
    assert kinds(usual) == [None] * 4
    ratios = [answer.attention_ratio for answer in usual]
    assert ratios[0] == ratios[2] > max(ratios[1], ratios[3])
    flat = engine_for(model, method, 0.01, **options).answer(prompts)
    assert kinds(flat) == [None, FLAT, None, FLAT]
    assert [answer.method for answer in flat] == ["marsinfer", "dense", "marsinfer", "dense"]


def test_local_attention_chooses_nothing(model):
    method = MarsInfer(**PLAIN, sparse_attention=0.0)
    assert sparse_from_of(model, method) is None
    assert kinds(engine_for(model, method, 0.01).answer([document(600)])) == [None]


def test_a_method_with_whole_attention_has_none_to_compare(model):
    assert sparse_from_of(model, MarsInfer(**PLAIN)) is None
    assert sparse_from_of(model, sparse_in(model, 1)) == SPARSE_FROM


def rows_about(shared, *lengths):
    """Rows that begin with the same tokens, with so many behind them."""
    known = document(shared, seed=1).input_ids
    behind = [np.random.default_rng(n).integers(0, SIZES["vocab_size"], n) for n in lengths]
    return [
        EncodedDocument(
            source=Row(row=row, id=str(row), place=f"row {row}"),
            input_ids=np.concatenate([known, ids]),
            spans=Spans(document=(0, shared), question=(shared, shared + len(ids))),
            ready_at=time.perf_counter(),
        )
        for row, ids in enumerate(behind)
    ]


@pytest.mark.parametrize(("shared", "expected"), [(280, [None] * 2), (600, [FLAT] * 2)])
def test_rows_of_a_group_are_compared_by_what_they_share(model, shared, expected):
    """Prompts of 320 tokens have whole attention in the layers that are shared, as 280 tokens have there."""
    rows = rows_about(shared, 40, 41)
    method = MarsInfer(eta=1.0, start_layer=3, sparse_attention=0.3)
    together = engine_for(model, method, 1.0, group="auto").answer(rows)
    assert [answer.group_rows for answer in together] == [2, 2]
    assert kinds(together) == [None, None]
    again = engine_for(model, method, 0.01, group="auto").answer(rows)
    assert kinds(again) == expected


@dataclass(frozen=True, kw_only=True)
class Noted(Guard):
    """A guard that trusts everything, and notes what it is told of each prompt."""

    told: dict[int, int]  # by row

    def after(self, answer, sparse_tokens=0):
        self.told[answer.row] = sparse_tokens


@pytest.mark.parametrize(
    ("masses", "shared", "expected"),
    [
        ((0.3, None, None, None), 600, {0: 600, 1: 600, 2: 0, 3: 500}),
        ((None, None, 0.3, None), 600, {0: 640, 1: 641, 2: 0, 3: 500}),  # behind the shared layers
        ((0.3, None, None, None), 280, {0: 0, 1: 0, 2: 0, 3: 500}),
        ((None, None, 0.3, None), 280, {0: 320, 1: 321, 2: 0, 3: 500}),
        ((None, 0.0, None, None), 600, {0: 0, 1: 0, 2: 0, 3: 0}),
    ],
)
def test_a_guard_is_told_how_many_tokens_the_first_layer_chose_among(model, masses, shared, expected):
    told = {}
    method = MarsInfer(eta=1.0, start_layer=2, sparse_attention=masses)
    engine = LocalEngine(
        model,
        method,
        rules=StopRules(max_new_tokens=2),
        sampling=Sampling(),
        group="auto",
        guard=Noted(tasks=frozenset(), longest=None, most={}, told=told),
    )
    apart = [document(200, seed=8, row=2), document(500, seed=9, row=3)]
    answers = engine.answer([*rows_about(shared, 40, 41), *apart])
    assert [answer.group_rows for answer in answers] == [2, 2, None, None]
    assert told == expected


@pytest.mark.parametrize(
    "method",
    [
        GemFilter(layer=0, keep=0.9, sparse_attention=0.3),
        Frugal(layer=0, keep=0.9, sparse_attention=0.3),
        GemFilter(layer=1, keep=0.9, sparse_attention=(None, None, 0.3, None)),
    ],
)
def test_blocks_that_the_second_pass_alone_chooses_are_told(model, method):
    told = {}
    engine = LocalEngine(
        model,
        method,
        rules=StopRules(max_new_tokens=2),
        sampling=Sampling(),
        guard=Noted(tasks=frozenset(), longest=None, most={}, told=told),
    )
    engine.answer([document(200, row=0), document(600, seed=1, row=1)])
    assert told == {0: 0, 1: 600}


@pytest.fixture
def slow_prefill(clock, monkeypatch):
    """Prefills that take two seconds each; nothing else takes time."""
    prefill = prefilling.prefill

    def slow(*arguments, **further):
        clock.now += 2.0
        return prefill(*arguments, **further)

    monkeypatch.setattr(prefilling, "prefill", slow)


@pytest.mark.usefixtures("slow_prefill")
@pytest.mark.parametrize("options", [{}, {"pack_tokens": 1}])
def test_both_prefills_are_counted_and_the_second_apart(model, options):
    engine = engine_for(model, sparse_in(model, 1), 0.01, **options)
    answers = engine.answer([document(600, row=0), document(600, seed=1, row=1)])
    assert kinds(answers) == [FLAT, FLAT]
    packs = 2 if options else 1
    assert (engine.times.prefill_s, engine.times.again_s) == (4.0 * packs, 2.0 * packs)
    assert [answer.prefill_ms for answer in answers] == [2000.0] * 2


@pytest.mark.usefixtures("slow_prefill")
def test_a_document_that_runs_alone_counts_both_prefills(model, monkeypatch):
    monkeypatch.setattr("pipeline.engines.memory.Packer.runs_alone", lambda packer, document: True)
    engine = engine_for(model, sparse_in(model, 1), 0.01)
    assert kinds(engine.answer([document(600)])) == [FLAT]
    assert (engine.times.packs, engine.times.prefill_s, engine.times.again_s) == (2, 4.0, 2.0)
