"""A draft's look-ahead steps as decode steps: what they attend to is that of steps from Python."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from conftest import document, pack_of, tiny_model
from decode_steps import EagerRecorder

from pipeline.engines.memory import Packer
from pipeline.families.decoder import Decoder
from pipeline.generation import draft_steps, graphs
from pipeline.generation.draft_steps import SHARE, DraftSteps, WatchedStore
from pipeline.kernels.attention import AttentionBackend, SdpaAttention
from pipeline.model.prefill import prefill
from pipeline.model.reading_ahead import read_ahead
from pipeline.pruning.dense import Dense
from pipeline.pruning.speculative import Speculative

COUNT = 4
SLOTS = 4 * 400  # of four layers


class Draft(NamedTuple):
    decoder: Decoder
    attention: AttentionBackend


class Noted(Speculative):
    """Notes the scores that it chooses by."""

    def chosen(self, scores_ST, segments, protected_T):
        SCORES.append(scores_ST)
        return super().chosen(scores_ST, segments, protected_T)


SCORES: list[torch.Tensor] = []
METHOD = Noted(keep=0.3, chunk=8, look_ahead=COUNT, sink=3, window=4, most=16)


@pytest.fixture
def recorder(monkeypatch):
    made = EagerRecorder()
    monkeypatch.setattr(graphs, "recorder_for", lambda *_: made)
    return made


@pytest.fixture
def draft():
    return Draft(Decoder(tiny_model("qwen2", seed=7).model.double()), SdpaAttention())


@pytest.fixture
def steps(draft, recorder):
    return DraftSteps(draft, slots=SLOTS, look_ahead=COUNT)


def pack(*lengths):
    return pack_of(*(document(length, seed=length + row) for row, length in enumerate(lengths)))


def scores(draft, own, check=lambda: None):
    SCORES.clear()
    with torch.inference_mode():
        read_ahead(draft, METHOD, own, check)
    return SCORES.pop()


def test_pack_after_pack_the_scores_are_those_of_steps_from_python(draft, steps, recorder):
    """One graph serves all packs of as many prompts, wherever their keys and values lie."""
    for lengths in ((150,), (70, 9), (150, 9, 71), (30, 40, 1, 60), (171,), (12, 150)):
        own = pack(*lengths)
        assert torch.equal(scores(steps, own), scores(draft, own))
    assert len(recorder.recorded) == steps.stats.captures == 3  # of 1, 2 and 4 columns
    assert steps.stats.eager_steps == 3 * graphs.WARM_UP_STEPS
    assert steps.stats.replayed_steps == 6 * COUNT - steps.stats.eager_steps
    steps.close()
    assert all(made.closed for made in recorder.recorded)
    assert steps.nbytes == 0


def test_a_prefill_is_that_of_steps_from_python(draft, steps):
    decoder, own = tiny_model("qwen3"), pack(150, 71)
    made = [prefill(decoder, SdpaAttention(), METHOD, own, draft=each) for each in (draft, steps)]
    assert steps.stats.eager_steps
    assert made[0].reading.chosen_C.tolist() == made[1].reading.chosen_C.tolist()
    assert torch.equal(made[0].logits_BV, made[1].logits_BV)
    assert made[0].draft_flops == made[1].draft_flops


def test_after_a_pack_that_was_given_up_the_next_finds_nothing_of_it(draft, steps):
    calls = iter(range(100))

    def check():
        if next(calls) == 6:  # of which 4 are layers
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        scores(steps, pack(150, 20), check)
    assert steps.stats.eager_steps
    own = pack(120, 33)
    assert torch.equal(scores(steps, own), scores(draft, own))


@pytest.mark.parametrize("lengths", [(399,), (1,) * (draft_steps.MOST_PROMPTS + 1)])
def test_what_is_too_large_runs_from_python(draft, steps, lengths):
    own = pack(*lengths)
    assert torch.equal(scores(steps, own), scores(draft, own))
    assert steps.nbytes == 0
    assert steps.stats.eager_steps == 0


@pytest.mark.parametrize("kind", [WatchedStore, draft_steps.DecodeBatch])
def test_without_memory_steps_run_from_python(draft, steps, kind, monkeypatch):
    def none(*_, **__):
        raise torch.OutOfMemoryError("none is left")

    monkeypatch.setattr(kind, "__init__", none)
    own = pack(150)
    assert torch.equal(scores(steps, own), scores(draft, own))
    assert steps.stats.eager_steps == 0


def test_after_a_failed_capture_steps_run_from_python(draft, steps, recorder):
    recorder.error = RuntimeError("no graph")
    own = pack(150)
    assert torch.equal(scores(steps, own), scores(draft, own))
    taken = steps.stats.eager_steps
    assert (taken, steps.stats.failure) == (COUNT, "RuntimeError: no graph")
    assert torch.equal(scores(steps, own), scores(draft, own))
    assert (steps.stats.eager_steps, steps.nbytes) == (taken, 0)


def test_the_planner_counts_the_store_of_a_gpu(draft):
    shape, method = tiny_model("qwen3").shape, Speculative(look_ahead=COUNT)

    def packer(method, device="cuda", free=1 << 30, read_by=draft.decoder.shape):
        options = {"itemsize": 2, "new_tokens": 2, "pack_tokens": 1000, "free": free, "draft": read_by}
        return Packer.on(torch.device(device), method, shape, **options)

    slot_bytes = draft.decoder.shape.kv_bytes_per_token(2)
    own = packer(method)
    assert own.ahead_slots >= draft.decoder.shape.layers * 1000
    assert own.all_bytes == (1 << 30) - own.ahead_slots * slot_bytes
    assert packer(method, free=1 << 22).ahead_slots == int(SHARE * (1 << 22)) // slot_bytes
    others = (packer(method, "cpu"), packer(method, read_by=None), packer(Dense(), read_by=None))
    assert [each.ahead_slots for each in (*others, packer(Speculative(look_ahead=0)))] == [0] * 4
