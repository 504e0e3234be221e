"""Which documents warm up: all kernels that a run may need are loaded by one of them."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from conftest import document, loaded

from pipeline.engines import warm_up
from pipeline.engines.local import LocalEngine
from pipeline.generation.generated import StopRules
from pipeline.generation.sampling import Sampling
from pipeline.kernels import sparse
from pipeline.kernels.attention import SdpaAttention
from pipeline.model import precision
from pipeline.pruning.registry import make_method
from pipeline.pruning.shape import ModelShape

GPU = torch.device("cuda")
SHAPE = ModelShape(
    layers=28, hidden=1536, ffn=8960, heads=12, kv_heads=2, head_dim=128, vocab=151936, context=131072
)


def engine(linears="auto", method="dense", device=GPU):
    decoder = SimpleNamespace(shape=SHAPE, linears=linears)
    return SimpleNamespace(
        model=SimpleNamespace(decoder=decoder, device=device, attention=SdpaAttention()),
        method=make_method(method, {}),
    )


def test_the_first_length_of_which_something_is_so():
    assert warm_up._first(lambda n: n >= 700, 10_000) == 700
    assert warm_up._first(lambda n: False, 10_000) == 10_001


def test_dense_in_one_precision_needs_no_longer_documents():
    assert warm_up._longer(engine(), 100_000) == set()


def test_mixed_precision_warms_up_where_fp8_begins():
    (length,) = warm_up._longer(engine(linears="mixed"), 100_000)
    assert precision.worthwhile(length - precision.WINDOW, SHAPE, GPU)
    assert not precision.worthwhile(length - precision.WINDOW - 1, SHAPE, GPU)


@pytest.mark.parametrize(
    ("longest", "expected"),
    [
        (None, warm_up.LONG_WARM_UP_TOKENS),
        (20_000, 20_000),
        (50_000, warm_up.LONG_WARM_UP_TOKENS),
        (900, None),
    ],
)
def test_block_sparse_attention_warms_up_where_it_begins_and_beyond(longest, expected, monkeypatch):
    monkeypatch.setattr(sparse, "kernels_on", lambda kind: kind == "cuda")
    lengths = warm_up._longer(engine(method="mars"), 100_000, longest)
    width = SHAPE.heads * SHAPE.head_dim
    assert sparse.applies(min(lengths), width, GPU)
    assert not sparse.applies(min(lengths) - 1, width, GPU)
    assert max(lengths) == expected or (expected is None and len(lengths) == 1)


@pytest.mark.parametrize(("room", "device"), [(5_000, GPU), (100_000, torch.device("cpu"))])
def test_nothing_is_longer_than_the_context_and_a_cpu_has_one_kind_of_kernel(room, device):
    assert warm_up._longer(engine(linears="mixed", method="mars", device=device), room) == set()


def local_engine(**options):
    model = loaded(tokenizer=None)
    rules = StopRules(max_new_tokens=3)
    return LocalEngine(model, make_method("dense", {}), rules=rules, sampling=Sampling(), **options)


@pytest.mark.parametrize(
    ("rows", "pack_tokens", "expected"),
    [
        (7, 1, []),
        (8, 1, [[47]]),  # the longest
        (16, 1, [[55], [40]]),
        (60, 1, [[99], [70], [40]]),  # and the one in between
        (16, 200, []),  # four packs
        (0, 1, []),
    ],
)
def test_the_first_packs_are_prefilled_beforehand_where_they_are_many(
    monkeypatch, rows, pack_tokens, expected
):
    monkeypatch.setitem(warm_up.PACKS_FOR_ONE, "cpu", 8)
    prompts = [document(40 + n, seed=n, row=n) for n in range(rows)]
    engine = local_engine(pack_tokens=pack_tokens)
    packs = warm_up._first_packs(engine, prompts)
    assert [[document.prompt_tokens for document in pack] for pack in packs] == expected
    monkeypatch.setitem(warm_up.PACKS_FOR_ONE, "cpu", None)
    assert warm_up._first_packs(engine, prompts) == []


def test_rows_that_will_be_answered_together_or_alone_are_not_among_them(monkeypatch):
    monkeypatch.setitem(warm_up.PACKS_FOR_ONE, "cpu", 1)
    same = [document(60, seed=1, row=n) for n in range(4)]
    others = [document(50, seed=2, row=5), document(500, seed=3, row=6)]
    engine = local_engine(pack_tokens=60, group=True)
    tokens = [pack[0].prompt_tokens for pack in warm_up._first_packs(engine, [*same, *others])]
    assert tokens == [500, 50]
    engine.packer = engine.packer.within(engine.packer.planned_bytes([100]) * 4)
    assert engine.packer.runs_alone(document(500))
    assert [pack[0].prompt_tokens for pack in warm_up._first_packs(engine, others)] == [50]


@pytest.mark.parametrize("error", [None, torch.OutOfMemoryError("none left"), ValueError("bad luck")])
def test_packs_that_are_prefilled_beforehand_leave_no_trace(monkeypatch, error):
    """Neither in the times of the run nor in its answers, and what fails is told by its row."""
    monkeypatch.setitem(warm_up.PACKS_FOR_ONE, "cpu", 2)
    prompts = [document(40 + n, seed=n, row=n) for n in range(4)]
    seen, engine = [], local_engine(pack_tokens=1)
    real = type(engine.prefiller).run

    def run(self, jobs, *given, **more):
        seen.append([job.document.prompt_tokens for job in jobs])
        if error is not None:
            raise error
        return real(self, jobs, *given, **more)

    monkeypatch.setattr(type(engine.prefiller), "run", run)
    assert warm_up.warm_up(engine, 60, prompts=prompts)
    assert seen == [[43], [40]]
    assert (engine.times.packs, engine.times.prefill_s, engine.is_busy) == (0, 0, False)
    assert engine.times.warm_up_s > 0


def test_there_may_be_no_time_for_them(monkeypatch, clock):
    monkeypatch.setitem(warm_up.PACKS_FOR_ONE, "cpu", 1)
    engine = local_engine(pack_tokens=1)
    real = warm_up._rehearse

    def slow(*given):
        assert real(*given)
        clock.now += 61
        return True

    monkeypatch.setattr(warm_up, "_rehearse", slow)
    monkeypatch.setitem(warm_up.WARM_UP_TOKENS, "cpu", 64)
    notes = []
    assert not warm_up.warm_up(engine, 60, notes.append, [document(50)])
    assert notes[0].startswith("the warm-up was given up after 60 s")


def test_a_run_warms_up_with_the_prompts_of_its_first_window(call, fish, tmp_path, monkeypatch):
    seen, real = [], warm_up.warm_up

    def watched(engine, limit_s, note, prompts):
        seen.append([document.source.id for document in prompts])
        return real(engine, limit_s, note, prompts)

    monkeypatch.setattr(warm_up, "warm_up", watched)
    flags = ["--text-column", "body", "--id-column", "doc", "--question", "what?", "--max-new-tokens", 2]
    assert call(fish, tmp_path / "out.jsonl", "--method", "dense", *flags) == 0
    assert [sorted(ids) for ids in seen] == [["a", "b", "c"]]
