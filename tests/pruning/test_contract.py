"""The laws of the contract, for every registered method and for the example of a custom one."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from conftest import document, pack_of, tiny_model

from pipeline.doctor.selftest import full, small
from pipeline.kernels.attention import SdpaAttention
from pipeline.model.prefill import prefill
from pipeline.pruning.capabilities import (
    ChoosesPrecision,
    FixesShares,
    ForeseesWork,
    HoldsUnrotatedKeys,
    MapsExits,
    ReadsAhead,
    RescoresBlocks,
    SharesDocuments,
    SkipsInSteps,
    expected_passes,
)
from pipeline.pruning.dense import Dense
from pipeline.pruning.operations import attended_pairs, passes_flops
from pipeline.pruning.registry import method_class, method_names
from pipeline.pruning.unrotated import UnrotatedMethod

CUSTOM = f"{Path(__file__).parents[2] / 'examples' / 'custom_method.py'}:KeyNorm"
NAMES = [*method_names(), CUSTOM]
SPARSE_FROM = 256  # tokens, where attention is block-sparse


class Case(NamedTuple):
    name: str  # of a method
    mass: float | None  # for block-sparse attention


WHOLE = [Case(name, None) for name in NAMES]
# who hold keys themselves, and select no tokens
UNROTATED = {name for name in method_names() if issubclass(method_class(name), UnrotatedMethod)}
SELECTING = [case for case in WHOLE if case.name not in UNROTATED]
SPARSE = [Case(case.name, 0.4) for case in SELECTING]


class Watching:
    """Passes everything on to a method, and keeps what was shown and chosen."""

    def __init__(self, method):
        self.method, self.seen = method, []

    def __getattr__(self, name):
        return getattr(self.method, name)

    def select(self, layer, view, state):
        before = [t.clone() for t in (view.queries, view.keys, view.values, view.hidden, view.positions)]
        selection = self.method.select(layer, view, state)
        after = (view.queries, view.keys, view.values, view.hidden, view.positions)
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True)), "select wrote to its view"
        self.seen.append((view, selection))
        return selection


def told(case):
    return f"{case.name.rpartition(':')[2]}-{case.mass}"


selecting = pytest.mark.parametrize("case", [*SELECTING, *SPARSE], ids=told)


@pytest.fixture(params=[*WHOLE, *SPARSE], ids=told)
def case(request):
    return request.param


@pytest.fixture
def method(case):
    return small(case.name) if case.mass is None else replace(small(case.name), sparse_attention=case.mass)


@pytest.fixture
def sdpa(case):
    attention = SdpaAttention()
    attention.sparse_from = None if case.mass is None else SPARSE_FROM
    return attention


@pytest.fixture
def documents(case):
    lengths = (120, 9, 64) if case.mass is None else (900, 9, SPARSE_FROM)
    return [document(length, seed=seed) for seed, length in enumerate(lengths)]


@pytest.fixture
def model():
    return tiny_model("qwen3")


@selecting
def test_attention_is_block_sparse_where_that_is_asked_for(case, method, model, sdpa, documents):
    passes, *others = prefill(model, sdpa, method, pack_of(*documents)).by_document()
    whole = 900 * 901 // 2
    pairs = [passes[0][0].pairs, *(attended_pairs(layers[0][0]) for layers in others)]
    if isinstance(method, ReadsAhead):  # of what is left of the documents
        assert (pairs[0] is None) == (case.mass is None)
        return
    assert pairs == [None, 45, 2080] if case.mass is None else pairs[0] < whole and pairs[1] == 45


ALL = {"dense", "fastkv", "gemfilter", "mars", "marsinfer", "sliminfer", "uniprefill"}
ABLE = {
    SharesDocuments: ALL,
    ForeseesWork: ALL | UNROTATED | {"ffn-skip", "frugal"},
    RescoresBlocks: {"sliminfer"},
    FixesShares: (ALL - {"mars"}) | {"key-norm", "speculative", "frugal"},
    ReadsAhead: {"speculative"},
    ChoosesPrecision: {"marsinfer"},
    MapsExits: {"mars"},
    SkipsInSteps: {"ffn-skip"},
    HoldsUnrotatedKeys: UNROTATED,
}


@pytest.mark.parametrize("capability", ABLE, ids=lambda capability: capability.__name__)
def test_who_has_a_capability(capability):
    methods = [small(name) for name in NAMES]
    assert {method.name for method in methods if isinstance(method, capability)} == ABLE[capability]


@selecting
def test_indices_are_ascending_unique_and_inside(method, model, sdpa, documents):
    watching = Watching(method)
    prefill(model, sdpa, watching, pack_of(*documents))
    unasked = 0 if method.needs_last_layer(model.shape) else 1
    assert len(watching.seen) >= model.shape.layers - unasked
    assert (watching.seen[-1][0].layer == model.shape.layers - 1) == (not unasked)
    for view, selection in watching.seen:
        for indices in (selection.live, selection.ffn, selection.cache, selection.restart):
            if indices is not None:
                assert indices.dtype == torch.int64
                assert (indices.diff() > 0).all()  # within each head, where heads differ
                assert ((indices >= 0) & (indices < view.segments.total)).all()


@selecting
def test_protected_tokens_survive(method, model, sdpa, documents):
    watching = Watching(method)
    prefill(model, sdpa, watching, pack_of(*documents))
    for view, selection in watching.seen:
        protected = set(method.protected_mask(view).nonzero().flatten().tolist())
        assert protected  # at least the last tokens
        for indices in (selection.live, selection.ffn, selection.restart):
            assert indices is None or protected <= set(indices.tolist())


def test_a_pack_gives_its_documents_alone(method, model, sdpa, documents):
    together = prefill(model, sdpa, method, pack_of(*documents))
    for b, doc in enumerate(documents):
        alone = prefill(model, sdpa, method, pack_of(doc))
        assert (together.logits_BV[b] - alone.logits_BV[0]).abs().max() <= 1e-4
        assert [row[b] for row in together.work.ffn()] == [row[0] for row in alone.work.ffn()]


def test_a_run_leaves_no_trace_in_the_next(method, model, sdpa, documents):
    a, b = pack_of(documents[0]), pack_of(documents[2])
    first = prefill(model, sdpa, method, a).logits_BV
    prefill(model, sdpa, method, b)
    assert torch.equal(prefill(model, sdpa, method, a).logits_BV, first)


def test_full_settings_keep_all_and_equal_dense(method, model, sdpa, documents):
    pack = pack_of(*documents)
    dense, pruned = prefill(model, sdpa, Dense(), pack), prefill(model, sdpa, full(method), pack)
    assert pruned.work.ffn() == dense.work.ffn()
    assert (pruned.logits_BV - dense.logits_BV).abs().max() <= 1e-4


def test_planned_bytes_bound_the_real_ones(method, model, sdpa, documents):
    lengths = [doc.prompt_tokens for doc in documents]
    planned = method.plan(model.shape, lengths).kv_bytes(itemsize=4, new_tokens=5)
    cache = prefill(model, sdpa, method, pack_of(*documents), new_tokens=5).cache
    assert 0 < cache.nbytes <= planned


@selecting
def test_layers_that_are_shared_do_nothing_that_hangs_on_a_question(method, model, sdpa, documents):
    shared = method.shared_layers(model.shape) if isinstance(method, SharesDocuments) else 0
    assert 0 <= shared <= model.shape.layers
    watching = Watching(method)
    prefill(model, sdpa, watching, pack_of(*documents))
    for view, selection in watching.seen[:shared]:
        assert (selection.live, selection.ffn, selection.ffn_fp8, selection.restart) == (None,) * 4
        assert selection.cache is None or not len(selection.cache)
        assert view.scored_pairs == ()


@pytest.mark.parametrize("case", WHOLE, ids=lambda case: case.name.rpartition(":")[2])
def test_what_is_expected_is_what_is_done_where_attention_does_not_decide(method, model, sdpa):
    by_share = {"share": 0.5} if {"share"} <= {field.name for field in fields(method)} else {}
    method = replace(method, **by_share)
    doc = document(120)
    expected = expected_passes(method, model.shape, doc.prompt_tokens)
    if expected is None:  # a method of one's own need not say, and what a draft costs depends on the draft
        assert method.name in ("key-norm", "speculative")
        return
    (done,) = prefill(model, sdpa, method, pack_of(doc)).by_document()
    assert list(map(len, expected)) == list(map(len, done))
    near = passes_flops(model.shape, expected) / passes_flops(model.shape, done)
    assert near == pytest.approx(1, abs=0.15)  # rounding to blocks, protected tokens, scoring
