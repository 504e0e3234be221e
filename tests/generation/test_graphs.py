"""Decode steps on static tensors, as graphs replay them, against a plain loop over host numbers."""

from __future__ import annotations

from itertools import count

import pytest
import torch
from conftest import document, pack_of, tiny_model
from decode_steps import METHODS, EagerRecorder, EndAt

import pipeline.model.graphs as graphs_module
from pipeline.generation.decode import decode
from pipeline.generation.decode_batch import DecodeBatch
from pipeline.generation.generated import StopRules
from pipeline.generation.sampling import NOT_FINITE, Sampling
from pipeline.kernels.attention import SdpaAttention
from pipeline.kernels.decode_slots import DecodeSlots
from pipeline.model.cache import RaggedCache
from pipeline.model.graphs import (
    FEWEST_STEPS,
    SIZES,
    WARM_UP_STEPS,
    DecodeStats,
    StepRunner,
    StepSize,
    padded,
    recorder_for,
)
from pipeline.model.offload import OffloadedCache
from pipeline.model.prefill import prefill
from pipeline.model.store import KvStore
from pipeline.pruning.registry import make_method
from pipeline.records import RowError

pytestmark = pytest.mark.slow

NEW_TOKENS = 40
LENGTHS = (61, 130, 40, 97, 55, 72, 48, 83)


@pytest.fixture
def recorder(monkeypatch):
    made = EagerRecorder()
    monkeypatch.setattr(graphs_module, "recorder_for", lambda *_: made)
    return made


@pytest.fixture(params=[0, 1])
def late(request):
    """How many steps are queued before tokens are looked at."""
    return request.param


def prefilled_pack(decoder, method="dense", lengths=LENGTHS, new_tokens=NEW_TOKENS):
    documents = [document(length, seed=length, row=row) for row, length in enumerate(lengths)]
    return prefill(
        decoder, SdpaAttention(), make_method(method, METHODS[method]), pack_of(*documents), new_tokens
    )


def stop_rules(token_ids=(), new_tokens=NEW_TOKENS):
    return StopRules(max_new_tokens=new_tokens, token_ids=frozenset(token_ids))


def answers(decoder, prefilled, rules, **options):
    """The tokens of each document, and how the steps were run."""
    stats = DecodeStats()
    generated = decode(decoder, SdpaAttention(), prefilled, rules, stats=stats, **options)
    return [(answer.tokens, answer.finish_reason) for answer in generated], stats


@torch.inference_mode()
def naive_answers(decoder, prefilled, rules):
    """Greedy, by host numbers, each finished document leaving at once."""
    cache, attention = prefilled.cache, SdpaAttention()
    starts = [list(slots.starts) for slots in cache.slots]
    used = [list(slots.segments.lengths) for slots in cache.slots]
    tokens = [[token] for token in prefilled.logits_BV.argmax(-1).tolist()]
    while live := [b for b, answer in enumerate(tokens) if rules.reason(answer) is None]:
        hidden = decoder.embed(torch.tensor([tokens[b][-1] for b in live]))
        at = [prefilled.next_positions[b] + len(tokens[b]) - 1 for b in live]
        rope = decoder.rope(hidden, torch.tensor(at))
        for layer in range(decoder.shape.layers):
            keys, values = cache.keys[layer], cache.values[layer]
            q, k, v = decoder.qkv(layer, hidden, rope)
            for row, b in enumerate(live):
                place = starts[layer][b] + used[layer][b]
                keys[place], values[place] = k[row], v[row]
                used[layer][b] += 1
            slots = DecodeSlots.of(
                [starts[layer][b] for b in live], [used[layer][b] for b in live], len(keys), keys.device
            )
            decoder.add_attention_(layer, hidden, attention.decode(q, keys, values, slots))
            decoder.add_feed_forward_(layer, hidden)
        for b, token in zip(live, decoder.logits(hidden).argmax(-1).tolist(), strict=True):
            tokens[b].append(token)
    reasons = [rules.reason(answer) for answer in tokens]
    return [
        (answer[:-1] if reason == "stop" else answer, reason)
        for answer, reason in zip(tokens, reasons, strict=True)
    ]


def rules_with_different_stops(decoder, method):
    """Stop tokens at which several documents end, each at another step, and others go on."""
    tokens = [answer for answer, _ in naive_answers(decoder, prefilled_pack(decoder, method), stop_rules())]
    rules = stop_rules({tokens[0][14], tokens[1][20], tokens[2][25]})
    ends = [
        next((at for at, token in enumerate(answer) if token in rules.token_ids), NEW_TOKENS)
        for answer in tokens
    ]
    return rules, ends


@pytest.mark.parametrize("method", METHODS)
def test_static_steps_give_the_tokens_of_the_plain_loop(decoder, recorder, method, late):
    rules, ends = rules_with_different_stops(decoder, method)
    assert len(set(ends)) > 2  # not vacuous: documents end at different steps
    expected = naive_answers(decoder, prefilled_pack(decoder, method), rules)
    got, stats = answers(decoder, prefilled_pack(decoder, method), rules, late=late)
    assert got == expected
    assert stats.replayed_steps > 0
    assert all(made.closed for made in recorder.recorded)


@pytest.mark.parametrize("method", METHODS)
def test_without_a_recorder_the_tokens_are_the_same(decoder, method, late):
    rules, _ = rules_with_different_stops(decoder, method)
    expected = naive_answers(decoder, prefilled_pack(decoder, method), rules)
    got, stats = answers(decoder, prefilled_pack(decoder, method), rules, late=late)
    assert got == expected
    assert (stats.replayed_steps, stats.captures) == (0, 0)


@pytest.mark.parametrize("method", METHODS)
def test_one_document_is_decoded_where_it_was_prefilled(decoder, recorder, method, late, monkeypatch):
    def never(*_):
        raise AssertionError("copied to a store")

    monkeypatch.setattr(KvStore, "adopt", never)
    prefilled = prefilled_pack(decoder, method, lengths=LENGTHS[:1])
    expected = naive_answers(decoder, prefilled, stop_rules())
    assert answers(decoder, prefilled, stop_rules(), late=late)[0] == expected
    assert recorder.recorded


def ends_and_columns(monkeypatch, ends, late=0):
    """Documents that end after so many tokens; of each step how many rows there were, and columns."""
    decoder, rows, columns = tiny_model("llama"), [], []
    real = DecodeBatch.step

    def step(self, size):
        rows.append(self.rows)
        columns.append(size.columns)
        assert_places_of_its_own(self, size.columns)
        real(self, size)

    lengths = LENGTHS[: len(ends)]
    whole = naive_answers(decoder, prefilled_pack(decoder, lengths=lengths), stop_rules())
    with monkeypatch.context() as patched:
        patched.setattr(DecodeBatch, "step", step)
        got, stats = answers(decoder, prefilled_pack(decoder, lengths=lengths), EndAt(ends), late=late)
    assert [tokens for tokens, _ in got] == [
        tokens[:end] for (tokens, _), end in zip(whole, ends, strict=True)
    ]
    return rows, columns, stats


def assert_places_of_its_own(batch, columns):
    """Every row's next token goes to a slot of its own, that of a column that pads to the one of nobody."""
    for layer, places in enumerate(batch._queries(columns, None).places_LQ.tolist()):
        for column, place in enumerate(places):
            if column >= batch.rows:
                assert place == 0
                continue
            start, used = (int(counts[layer, column]) for counts in (batch._starts_LC, batch._used_LC))
            assert place == start + used - 1
            (extent,) = [
                extent
                for extent in batch._kv._rows.values()
                if extent.start <= place < extent.start + extent.size
            ]
            assert start == extent.starts[layer]
            following = [*extent.starts[1:], extent.start + extent.size]
            assert start + extent.stored[layer] <= place < following[layer]


def test_rows_that_have_ended_leave_and_batches_are_padded(recorder, monkeypatch, late):
    ends = [10, 12, 12, 14, 16, 18, 40, 40]
    rows, columns, stats = ends_and_columns(monkeypatch, ends, late)
    # that an answer has all its tokens is known without looking
    steps = [min(end - 1 + late, 39) for end in ends]
    assert rows == [sum(n >= step for n in steps) for step in range(1, 40)]
    assert columns == [padded(n) for n in rows]
    assert set(columns) == {8, 4, 2}
    assert stats == DecodeStats(
        eager_steps=3 * WARM_UP_STEPS, replayed_steps=39 - 3 * WARM_UP_STEPS, captures=3
    )
    assert all(made.closed for made in recorder.recorded)


def test_a_size_that_comes_again_is_not_captured_again():
    """Whatever sizes come in between."""
    made, ran = EagerRecorder(), []
    runner = StepRunner(ran.append, made, SdpaAttention(), stats := DecodeStats())
    for columns in (4, 4, 4, 2, 4, 2, 2, 4):
        runner.run(StepSize(columns, columns), 100)
    assert [size.columns for size in ran] == [4, 4, 4, 2, 4, 2, 2, 4]
    assert stats == DecodeStats(eager_steps=4, replayed_steps=4, captures=2)
    runner.close()
    assert [again.closed for again in made.recorded] == [True, True]


def test_no_size_is_captured_for_the_last_few_steps(recorder, monkeypatch):
    ends = [40 - FEWEST_STEPS] * 7 + [40]
    _, columns, stats = ends_and_columns(monkeypatch, ends)
    assert columns == [8] * (39 - FEWEST_STEPS) + [1] * FEWEST_STEPS
    assert stats.captures == 1


def test_a_document_that_ends_with_its_first_token_takes_no_step(recorder, monkeypatch, late):
    rows, columns, stats = ends_and_columns(monkeypatch, [1, 2, 40], late)
    assert rows == columns == [2] * (1 + late) + [1] * (38 - late)
    assert stats.captures == 1


def test_few_steps_are_not_captured(recorder, monkeypatch, late):
    _, _, stats = ends_and_columns(monkeypatch, [WARM_UP_STEPS + FEWEST_STEPS] * 2, late)
    assert (stats.captures, stats.replayed_steps) == (0, 0)
    _, _, stats = ends_and_columns(monkeypatch, [WARM_UP_STEPS + FEWEST_STEPS + 1] * 2, late)
    assert (stats.captures, stats.replayed_steps) == (1, FEWEST_STEPS)


def test_every_step_writes_where_its_rows_have_room(recorder, monkeypatch, late):
    """Also those of rows that have ended, which is not known yet."""
    rows, _, _ = ends_and_columns(monkeypatch, [12, 13, 14, 39, 40], late)
    assert len(rows) == 39
    assert rows[-1] == 1 + late  # the row that ends one token before the last


@pytest.mark.parametrize("top_p", [0.9, 1.0])
def test_sampling_does_not_depend_on_how_batches_are_padded(recorder, late, top_p):
    decoder = tiny_model("qwen2")
    sampling = Sampling(temperature=1.5, top_p=top_p, seed=3)
    ends = [10, 40, 15, 40]

    def run(**options):
        prefilled = prefilled_pack(decoder, lengths=LENGTHS[:4])
        return answers(decoder, prefilled, EndAt(ends), sampling=sampling, **options)

    (replayed, stats), (plain, eager) = run(late=late), run(late=0, graphs=False)
    assert replayed == plain
    assert stats.replayed_steps > 0 == eager.replayed_steps


@pytest.mark.parametrize(
    ("error", "remembered"),
    [(torch.OutOfMemoryError("CUDA out of memory"), False), (RuntimeError("not permitted"), True)],
)
def test_a_failed_capture_is_recorded_and_decoding_goes_on(recorder, error, remembered, late):
    recorder.error = error
    decoder, attention = tiny_model("llama"), SdpaAttention()
    expected = naive_answers(decoder, prefilled_pack(decoder), stop_rules())
    prefilled, stats = prefilled_pack(decoder), DecodeStats()
    got = decode(decoder, attention, prefilled, stop_rules(), stats=stats, late=late)
    assert [(answer.tokens, answer.finish_reason) for answer in got] == expected
    assert stats.failure == f"{type(error).__name__}: {error}"
    assert (stats.captures, stats.replayed_steps) == (0, 0)
    assert attention.capture_failure == (stats.failure if remembered else None)


def test_the_check_is_called_before_every_step_and_may_give_up(recorder, late):
    decoder, calls = tiny_model("llama"), count()
    answers(decoder, prefilled_pack(decoder), stop_rules(), check=lambda: next(calls), late=late)
    assert next(calls) == NEW_TOKENS - 1 + late  # and before what is looked at when no step is left

    steps = count()

    def give_up():
        if next(steps) == 20:
            raise RowError("timeout", "too long")

    with pytest.raises(RowError, match="too long"):
        answers(decoder, prefilled_pack(decoder), stop_rules(), check=give_up, late=late)
    assert len(recorder.recorded) == 2
    assert all(made.closed for made in recorder.recorded)


def test_output_that_is_not_finite_fails_its_pack_but_not_that_of_nobody(recorder, monkeypatch, late):
    """What pads the batch, and the step that a row takes after its end, may make anything."""
    decoder, real, steps = tiny_model("llama"), DecodeBatch._chosen, count(1)
    ends, at = [10] + [40] * 4, 10  # the first row has its tenth token by the ninth step

    def choose(self, logits, asked, spoilt=()):
        logits[self.rows :] = float("nan")
        step = next(steps)
        logits[[column for n, column in spoilt if n == step]] = float("nan")
        chosen = real(self, logits, asked)
        assert chosen[self.rows :].eq(NOT_FINITE).all()
        assert self._tokens_C.ge(0).all()  # by which embeddings were looked up
        return chosen

    lengths = LENGTHS[:5]
    expected = naive_answers(decoder, prefilled_pack(decoder, lengths=lengths), stop_rules())
    prefilled = [prefilled_pack(decoder, lengths=lengths) for _ in range(2)]
    after_the_end = ((at, 0),) if late else ()
    with monkeypatch.context() as patched:
        patched.setattr(DecodeBatch, "_chosen", lambda *given: choose(*given, after_the_end))
        got, _ = answers(decoder, prefilled[0], EndAt(ends), late=late)
    assert [tokens for tokens, _ in got] == [expected[0][0][:10], *(tokens for tokens, _ in expected[1:])]
    steps = count(1)
    monkeypatch.setattr(DecodeBatch, "_chosen", lambda *given: choose(*given, ((15, 2),)))
    with pytest.raises(RowError, match="not finite"):
        answers(decoder, prefilled[1], stop_rules(), late=late)
    assert next(steps) == 15 + 1 + late  # given up at once


def test_a_prefill_whose_output_is_not_finite_is_given_up(late):
    decoder = tiny_model("llama")
    prefilled = prefilled_pack(decoder, lengths=LENGTHS[:2])
    with torch.inference_mode():
        prefilled.logits_BV[1] = float("nan")
    with pytest.raises(RowError, match="not finite"):
        answers(decoder, prefilled, stop_rules(), late=late)


def test_only_a_gpu_with_a_backend_that_can_be_captured_is_recorded():
    class Capturable(SdpaAttention):
        def captures(self, *_):
            return True

    assert recorder_for(torch.device("cpu"), torch.float32, 64, Capturable()) is None
    # there are no kernels for it, and torch's own attention reads the host
    assert recorder_for(torch.device("cuda", 0), torch.float64, 64, SdpaAttention()) is None
    failed = Capturable()
    failed.capture_failure = "RuntimeError: not permitted"
    assert recorder_for(torch.device("cuda", 0), torch.float32, 64, failed) is None


def test_steps_over_a_cache_that_needs_the_host_are_not_recorded(recorder, late):
    class Offloading(RaggedCache):
        on_device_alone = OffloadedCache.on_device_alone

    assert RaggedCache(1).on_device_alone
    decoder = tiny_model("llama")
    prefilled = prefilled_pack(decoder, lengths=LENGTHS[:1])
    expected = naive_answers(decoder, prefilled, stop_rules())
    prefilled.cache.__class__ = Offloading
    got, stats = answers(decoder, prefilled, stop_rules(), late=late)
    assert got == expected
    assert stats == DecodeStats(eager_steps=39)
    assert recorder.recorded == []


def test_a_cache_without_room_for_the_answer_is_an_error_of_the_caller():
    decoder = tiny_model("llama")
    with pytest.raises(AssertionError, match="no room"):
        answers(decoder, prefilled_pack(decoder, lengths=LENGTHS[:1], new_tokens=5), stop_rules())


@pytest.mark.parametrize("most", [1, 3, 8, 100, 256, 700])
def test_all_sizes_are_captured_beforehand_the_largest_first(most):
    made, ran = EagerRecorder(), []
    runner = StepRunner(ran.append, made, SdpaAttention(), stats := DecodeStats())
    needed = {runner.columns(rows, most) for rows in range(1, most + 1)}
    assert max(needed) == most
    assert len(needed) <= len(SIZES) + 1
    assert runner.prepare(StepSize(size, size) for size in needed) == len(needed)
    largest_first = sorted(needed, reverse=True)
    assert ran == [StepSize(size, size) for size in largest_first for _ in range(WARM_UP_STEPS)]
    for rows in range(1, most + 1):
        columns = runner.columns(rows, most)
        runner.run(StepSize(columns, columns), 1)
    assert stats == DecodeStats(replayed_steps=most, captures=len(needed))


def test_nothing_is_captured_beforehand_where_nothing_can_be():
    runner = StepRunner(lambda columns: None, None, SdpaAttention(), DecodeStats())
    assert runner.prepare([StepSize(8, 8)]) == 0
    assert [runner.columns(rows, 8) for rows in (1, 3, 7)] == [1, 3, 7]


def test_a_third_of_a_large_batch_at_most_pads_it():
    assert [padded(size) for size in SIZES] == list(SIZES)
    for rows in range(8, 3 * SIZES[-1]):
        assert 0 <= padded(rows) - rows < padded(rows) / 3
