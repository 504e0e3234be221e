"""Decode steps on static tensors, as a graph replays them, against a plain loop over host numbers."""

from __future__ import annotations

from itertools import count

import pytest
import torch
from conftest import document, pack_of, tiny_model

import pipeline.model.decode as decode_module
from pipeline.errors import RowError
from pipeline.kernels.attention import DecodeSlots, SdpaAttention
from pipeline.model.adapters import DecoderAdapter
from pipeline.model.cache import NextSlots, RaggedCache
from pipeline.model.decode import DecodeBatch, StopRules, decode
from pipeline.model.graphs import FEWEST_STEPS, WARM_UP_STEPS, DecodeStats, recorder_for
from pipeline.model.prefill import prefill
from pipeline.model.sampling import Sampler, Sampling
from pipeline.pruning.registry import make_method

NEW_TOKENS = 40
METHODS = {
    "dense": {},
    "sliminfer": {"layers": (1, 2, 3), "budget": (0.6, 0.4, 0.3), "block": 16, "unit": 4},
    "fastkv": {"layer": 1, "share": 0.4, "kv_share": 0.3},
}
LENGTHS = (61, 130, 40, 97, 55, 72, 48, 83)


class Again:
    """Repeats a step by running it, on the tensors it was given at first."""

    def __init__(self, step):
        self.step, self.closed = step, False

    def replay(self):
        assert not self.closed
        return self.step()

    def close(self):
        self.closed = True


class EagerRecorder:
    def __init__(self, error=None):
        self.error, self.recorded = error, []

    def warm_up(self, step):
        return step()

    def record(self, step):
        if self.error is not None:
            raise self.error
        self.recorded.append(Again(step))
        return self.recorded[-1]


@pytest.fixture
def recorder(monkeypatch):
    made = EagerRecorder()
    monkeypatch.setattr(decode_module, "recorder_for", lambda *_: made)
    return made


def prefilled_pack(adapter, method="dense", lengths=LENGTHS, new_tokens=NEW_TOKENS):
    documents = [document(length, seed=length, row=row) for row, length in enumerate(lengths)]
    return prefill(
        adapter, SdpaAttention(), make_method(method, METHODS[method]), pack_of(*documents), new_tokens
    )


def stop_rules(token_ids=(), new_tokens=NEW_TOKENS):
    return StopRules(max_new_tokens=new_tokens, token_ids=frozenset(token_ids))


def answers(adapter, prefilled, rules, *, sampling=None, check=lambda: None, graphs=True):
    """The tokens of each document, and how the steps were run."""
    documents, stats = range(len(prefilled.lengths)), DecodeStats()
    sampler = Sampler(sampling or Sampling(), documents)
    first = sampler.draw(prefilled.logits_BV, documents)
    generated = decode(
        adapter, SdpaAttention(), prefilled, first, sampler, rules, check, graphs=graphs, stats=stats
    )
    return [(answer.tokens, answer.finish_reason) for answer in generated], stats


@torch.inference_mode()
def naive_answers(adapter, prefilled, rules):
    """Greedy, by host numbers, each finished document leaving at once."""
    cache, attention = prefilled.cache, SdpaAttention()
    starts = [list(slots.starts) for slots in cache.slots]
    used = [list(slots.segments.lengths) for slots in cache.slots]
    tokens = [[token] for token in prefilled.logits_BV.argmax(-1).tolist()]
    while live := [b for b, answer in enumerate(tokens) if rules.reason(answer) is None]:
        hidden = adapter.embed(torch.tensor([tokens[b][-1] for b in live]))
        at = [prefilled.next_positions[b] + len(tokens[b]) - 1 for b in live]
        rope = adapter.rope(hidden, torch.tensor(at))
        for layer in range(adapter.shape.layers):
            keys, values = cache.keys[layer], cache.values[layer]
            q, k, v = adapter.qkv(layer, hidden, rope)
            for row, b in enumerate(live):
                place = starts[layer][b] + used[layer][b]
                keys[place], values[place] = k[row], v[row]
                used[layer][b] += 1
            slots = DecodeSlots.of(
                [starts[layer][b] for b in live], [used[layer][b] for b in live], len(keys), keys.device
            )
            adapter.add_attention_(layer, hidden, attention.decode(q, keys, values, slots))
            adapter.add_feed_forward_(layer, hidden)
        for b, token in zip(live, adapter.logits(hidden).argmax(-1).tolist(), strict=True):
            tokens[b].append(token)
    reasons = [rules.reason(answer) for answer in tokens]
    return [
        (answer[:-1] if reason == "stop" else answer, reason)
        for answer, reason in zip(tokens, reasons, strict=True)
    ]


def rules_with_different_stops(adapter, method):
    """Stop tokens at which several documents end, each at another step, and others go on."""
    tokens = [answer for answer, _ in naive_answers(adapter, prefilled_pack(adapter, method), stop_rules())]
    rules = stop_rules({tokens[0][14], tokens[1][20], tokens[2][25]})
    ends = [
        next((at for at, token in enumerate(answer) if token in rules.token_ids), NEW_TOKENS)
        for answer in tokens
    ]
    return rules, ends


@pytest.mark.parametrize("method", METHODS)
def test_static_steps_give_the_tokens_of_the_plain_loop(adapter, recorder, method):
    rules, ends = rules_with_different_stops(adapter, method)
    assert len(set(ends)) > 2  # not vacuous: documents end at different steps
    expected = naive_answers(adapter, prefilled_pack(adapter, method), rules)
    got, stats = answers(adapter, prefilled_pack(adapter, method), rules)
    assert got == expected
    assert stats.replayed_steps > 0
    assert all(made.closed for made in recorder.recorded)


@pytest.mark.parametrize("method", METHODS)
def test_without_a_recorder_the_tokens_are_the_same(adapter, method):
    rules, _ = rules_with_different_stops(adapter, method)
    expected = naive_answers(adapter, prefilled_pack(adapter, method), rules)
    got, stats = answers(adapter, prefilled_pack(adapter, method), rules)
    assert got == expected
    assert (stats.replayed_steps, stats.captures) == (0, 0)


class EndAt:
    """Stop rules by the number of tokens, of each document its own."""

    def __init__(self, ends):
        self.ends, self.max_new_tokens, self._of = ends, max(ends), {}

    def reason(self, tokens):
        document = self._of.setdefault(id(tokens), len(self._of))
        return "length" if len(tokens) >= self.ends[document] else None


def ends_and_batches(monkeypatch, ends):
    """Documents that end after so many tokens; the sizes of the batches that were made."""
    adapter, sizes, parked = tiny_model("llama"), [], []
    real_fill, real_park = DecodeBatch.fill, DecodeBatch.park

    def fill(self, tokens, positions):
        sizes.append(len(tokens))
        real_fill(self, tokens, positions)

    def park(self, rows):
        parked.extend(rows)
        real_park(self, rows)

    monkeypatch.setattr(DecodeBatch, "fill", fill)
    monkeypatch.setattr(DecodeBatch, "park", park)
    lengths = LENGTHS[: len(ends)]
    whole = naive_answers(adapter, prefilled_pack(adapter, lengths=lengths), stop_rules())
    got, stats = answers(adapter, prefilled_pack(adapter, lengths=lengths), EndAt(ends))
    assert [tokens for tokens, _ in got] == [
        tokens[:end] for (tokens, _), end in zip(whole, ends, strict=True)
    ]
    return sizes, parked, stats


def test_finished_documents_idle_until_a_smaller_batch_pays(recorder, monkeypatch):
    sizes, parked, stats = ends_and_batches(monkeypatch, [10, 12, 12, 14, 16, 18, 40, 40])
    assert sizes == [8, 2]  # six of eight had to end
    assert parked == [0, 1, 2, 3, 4]
    assert stats == DecodeStats(
        eager_steps=2 * WARM_UP_STEPS, replayed_steps=39 - 2 * WARM_UP_STEPS, captures=2
    )


def test_no_smaller_batch_is_made_for_the_last_few_steps(recorder, monkeypatch):
    late = 40 - FEWEST_STEPS
    sizes, parked, stats = ends_and_batches(monkeypatch, [late] * 7 + [40])
    assert sizes == [8]
    assert parked == list(range(7))
    assert stats.captures == 1


def test_documents_that_finish_before_the_capture_leave_at_once(recorder, monkeypatch):
    sizes, _, stats = ends_and_batches(monkeypatch, [1, 2, 40])
    assert sizes == [2, 1]
    assert stats.captures == 1


def test_few_steps_are_not_captured(recorder, monkeypatch):
    _, _, stats = ends_and_batches(monkeypatch, [WARM_UP_STEPS + FEWEST_STEPS] * 2)
    assert (stats.captures, stats.replayed_steps) == (0, 0)
    _, _, stats = ends_and_batches(monkeypatch, [WARM_UP_STEPS + FEWEST_STEPS + 1] * 2)
    assert (stats.captures, stats.replayed_steps) == (1, FEWEST_STEPS)


def test_no_count_passes_its_document_s_room(recorder, monkeypatch):
    """Also while finished documents idle; every step's places lie within their own documents."""
    seen = count()
    real = NextSlots._fit_

    def fit(self):
        real(self)
        next(seen)
        assert (self.used_GB <= self.room_GB).all()
        for group, slots in enumerate(self._distinct):
            starts, ends = slots.bounds_B1[:-1], slots.bounds_B1[1:]
            places = self.places_GB[group]
            assert ((places >= starts) & (places < ends)).all()

    monkeypatch.setattr(NextSlots, "_fit_", fit)
    ends_and_batches(monkeypatch, [12, 13, 14, 40])
    assert next(seen) > 39


def test_sampling_does_not_depend_on_idle_rows(recorder):
    adapter = tiny_model("qwen2")
    sampling = Sampling(temperature=1.5, top_p=0.9, seed=3)
    ends = [10, 40, 15, 40]

    def run(graphs):
        prefilled = prefilled_pack(adapter, lengths=LENGTHS[:4])
        return answers(adapter, prefilled, EndAt(ends), sampling=sampling, graphs=graphs)

    (with_idle, stats), (without, eager) = run(True), run(False)
    assert with_idle == without
    assert stats.replayed_steps > 0 == eager.replayed_steps


@pytest.mark.parametrize(
    ("error", "remembered"),
    [(torch.OutOfMemoryError("CUDA out of memory"), False), (RuntimeError("not permitted"), True)],
)
def test_a_failed_capture_is_recorded_and_decoding_goes_on(recorder, error, remembered):
    recorder.error = error
    adapter, attention = tiny_model("llama"), SdpaAttention()
    expected = naive_answers(adapter, prefilled_pack(adapter), stop_rules())
    prefilled, stats = prefilled_pack(adapter), DecodeStats()
    sampler = Sampler(Sampling(), range(8))
    first = sampler.draw(prefilled.logits_BV, range(8))
    got = decode(adapter, attention, prefilled, first, sampler, stop_rules(), stats=stats)
    assert [(answer.tokens, answer.finish_reason) for answer in got] == expected
    assert stats.failure == f"{type(error).__name__}: {error}"
    assert (stats.captures, stats.replayed_steps) == (0, 0)
    assert attention.capture_failure == (stats.failure if remembered else None)


def test_the_check_is_called_before_every_step_and_may_give_up(recorder):
    adapter, calls = tiny_model("llama"), count()
    answers(adapter, prefilled_pack(adapter), stop_rules(), check=lambda: next(calls))
    assert next(calls) == NEW_TOKENS - 1

    steps = count()

    def give_up():
        if next(steps) == 20:
            raise RowError("timeout", "too long")

    with pytest.raises(RowError, match="too long"):
        answers(adapter, prefilled_pack(adapter), stop_rules(), check=give_up)
    assert len(recorder.recorded) == 2
    assert all(made.closed for made in recorder.recorded)


def test_output_that_is_not_finite_fails_its_pack_but_not_that_of_an_idle_row(recorder, monkeypatch):
    adapter, real, steps = tiny_model("llama"), DecoderAdapter.logits, count()

    def logits(self, hidden):
        values = real(self, hidden)
        if next(steps) > 15:
            values[0] = float("nan")
        return values

    expected = naive_answers(adapter, prefilled_pack(adapter), stop_rules())
    prefilled = [prefilled_pack(adapter) for _ in range(2)]
    monkeypatch.setattr(DecoderAdapter, "logits", logits)
    got, _ = answers(adapter, prefilled[0], EndAt([10] + [40] * 7))
    assert [tokens for tokens, _ in got] == [expected[0][0][:10], *(tokens for tokens, _ in expected[1:])]
    with pytest.raises(RowError, match="not finite"):
        answers(adapter, prefilled[1], stop_rules())


def test_only_a_plain_cache_on_a_gpu_with_a_capturable_backend_is_recorded():
    class Offloading(RaggedCache):
        pass

    class Capturable(SdpaAttention):
        capturable = True

    assert recorder_for(torch.device("cpu"), Capturable(), RaggedCache(1)) is None
    assert recorder_for(torch.device("cuda", 0), SdpaAttention(), RaggedCache(1)) is None
    assert recorder_for(torch.device("cuda", 0), Capturable(), Offloading(1)) is None
    failed = Capturable()
    failed.capture_failure = "RuntimeError: not permitted"
    assert recorder_for(torch.device("cuda", 0), failed, RaggedCache(1)) is None


def test_a_cache_without_room_for_the_answers_is_an_error_of_the_caller():
    adapter = tiny_model("llama")
    with pytest.raises(AssertionError, match="no room"):
        answers(adapter, prefilled_pack(adapter, new_tokens=5), stop_rules())
