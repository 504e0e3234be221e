"""The engine when a pack goes wrong: the culprit gets an error row, the others their answers."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import document, loaded

from pipeline.checkpoints.device_memory import is_out_of_memory
from pipeline.engines import local, memory, prefilling, warm_up
from pipeline.engines.local import LocalEngine
from pipeline.engines.memory import (
    Packer,
    activation_bytes,
    default_pack_tokens,
    lean_bytes,
    piece_bytes,
    running_bytes,
)
from pipeline.errors import Interrupted, MarsError
from pipeline.generation.decode_loop import DecodeLoop
from pipeline.generation.generated import StopRules
from pipeline.generation.sampling import Sampling
from pipeline.pruning.base import PruningMethod, Selection
from pipeline.pruning.dense import Dense
from pipeline.pruning.mars import Mars
from pipeline.pruning.marsinfer import MarsInfer
from pipeline.pruning.shape import PIECE_TOKENS, ModelShape


@pytest.fixture
def model():
    return loaded()


def engine_for(model, method=None):
    return LocalEngine(model, method or Dense(), rules=StopRules(max_new_tokens=3), sampling=Sampling())


def documents():
    return [document(20 + row, seed=row, row=row) for row in range(7)]


def failing_on(row, error, monkeypatch, module=prefilling):
    """A prefill that fails whenever a given document is in the pack."""
    real, culprit = module.prefill, document(20 + row, seed=row, row=row).prompt_tokens

    def prefill(decoder, attention, method, pack, *options, **more):
        if culprit in pack.segments.lengths:
            raise error
        return real(decoder, attention, method, pack, *options, **more)

    monkeypatch.setattr(module, "prefill", prefill)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("error", "kind"),
    [(torch.OutOfMemoryError("CUDA out of memory"), "out_of_memory"), (ValueError("bad luck"), "internal")],
)
def test_the_culprit_of_a_pack_stands_alone(model, monkeypatch, error, kind):
    engine = engine_for(model)
    expected = [row.answer for row in engine.answer(documents())]
    failing_on(4, error, monkeypatch)
    rows = engine.answer(documents())
    assert [row.row for row in rows] == list(range(7))
    assert [row.status for row in rows] == ["ok"] * 4 + ["error"] + ["ok"] * 2
    assert rows[4].error_type == kind
    assert rows[4].error_message.startswith("row 4: ")
    assert [row.answer for row in rows if row.status == "ok"] == expected[:4] + expected[5:]


def test_memory_of_the_host_runs_out_too():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 55, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)
    assert not is_out_of_memory(RuntimeError("bad luck"))


def test_output_that_is_not_finite_is_an_error_and_no_answer(model):
    expected = [row.answer for row in engine_for(model).answer(documents())]
    shortest = documents()[0].prompt_tokens
    real = model.decoder.rope

    def poison(hidden, positions, *rest):  # every pack that the shortest document leads
        rope = real(hidden, positions, *rest)
        for cos, _ in rope.tables.values() if len(positions) == shortest else ():
            cos.fill_(float("nan"))
        return rope

    model.decoder.rope = poison
    rows = engine_for(model).answer(documents()[:1]) + engine_for(model).answer(documents()[1:])
    assert (rows[0].status, rows[0].error_type, rows[0].answer) == ("error", "not_finite", None)
    assert rows[0].error_message.startswith("row 0: the model's output is not finite")
    assert [row.answer for row in rows[1:]] == expected[1:]


def test_an_out_of_memory_row_says_how_much_it_needs(model, monkeypatch):
    engine = engine_for(model)
    failing_on(4, torch.OutOfMemoryError("CUDA out of memory"), monkeypatch)
    (row,) = engine.answer(documents()[4:5])
    assert "24 tokens need about 0.0 GB on cpu and" in row.error_message


def test_on_the_cpu_a_document_over_the_memory_is_refused_before_it_runs(model):
    engine = engine_for(model)
    engine.packer = engine.packer.within(engine.packer.planned_bytes([22]))
    rows = [engine.answer([doc])[0] for doc in documents()]
    assert [row.status for row in rows] == ["ok"] * 3 + ["error"] * 4
    assert {row.error_type for row in rows[3:]} == {"out_of_memory"}


def test_a_row_that_takes_too_long_costs_its_pack_mates_nothing(model, monkeypatch, clock):
    engine = engine_for(model)
    expected = [row.answer for row in engine.answer(documents())]
    slow, real = documents()[4].prompt_tokens, model.decoder.add_attention_

    def add_attention_(layer, hidden, mixed, fp8=None, later=False):
        clock.now += 0.4 if slow in lengths and len(hidden) > len(documents()) else 0  # not in decode steps
        real(layer, hidden, mixed, fp8)

    lengths = ()
    pack_of = prefilling.Pack.of

    def remember(docs, *others):
        nonlocal lengths
        pack = pack_of(docs, *others)
        lengths = pack.segments.lengths
        return pack

    monkeypatch.setattr(prefilling.Pack, "of", remember)
    model.decoder.add_attention_ = add_attention_
    engine.attempts.row_timeout = 0.3
    rows = engine.answer(documents())
    assert [row.status for row in rows] == ["ok"] * 4 + ["error"] + ["ok"] * 2
    assert rows[4].error_type == "timeout"
    assert rows[4].error_message == "row 4: not answered within --row-timeout 0.3 s"
    assert [row.answer for row in rows if row.status == "ok"] == expected[:4] + expected[5:]


def test_the_warm_up_is_not_under_the_time_limit_of_a_row(model):
    engine = engine_for(model)
    engine.attempts.row_timeout = 1e-9
    assert warm_up.warm_up(engine, 60)
    assert engine.answer(documents()[:1])[0].error_type == "timeout"


def warm_up_lengths(engine, monkeypatch):
    """Tokens of each document that warms up, and of its answer."""
    seen, real = [], warm_up.prefill

    def prefill(decoder, attention, method, pack, new_tokens, *options, **more):
        seen.append((*pack.segments.lengths, new_tokens))
        return real(decoder, attention, method, pack, new_tokens, *options, **more)

    monkeypatch.setattr(warm_up, "prefill", prefill)
    assert warm_up.warm_up(engine, 60)
    return seen


@pytest.mark.parametrize(
    ("pack_tokens", "longest", "expected"),
    [
        (300, 4096, [(64, 12), (300, 12)]),  # a pack
        (8192, 4096, [(64, 12), (500, 12)]),  # the context of 512, less the answer
        (8192, 200, [(64, 12), (200, 12)]),
        (1, 200, [(64, 12), (200, 12)]),  # one document at a time, of whatever length
        (30, 200, [(64, 12)]),
        (8192, 64, [(64, 12)]),
    ],
)
def test_a_document_as_long_as_a_pack_warms_up(model, monkeypatch, pack_tokens, longest, expected):
    monkeypatch.setitem(warm_up.WARM_UP_TOKENS, "cpu", longest)
    monkeypatch.setattr(warm_up, "WARM_UP_NEW_TOKENS", 14)
    rules = StopRules(max_new_tokens=12, token_ids=frozenset(range(256)))
    engine = LocalEngine(model, Dense(), rules=rules, sampling=Sampling(), pack_tokens=pack_tokens)
    steps = []
    monkeypatch.setattr(engine.attempts, "check", lambda: steps.append(1))
    assert warm_up_lengths(engine, monkeypatch) == expected
    # four layers and eleven steps each: no stop token ends an answer that warms up
    assert len(steps) == len(expected) * (4 + 11)
    assert engine.times.warm_up_s > 0
    assert (engine.times.packs, engine.times.span_s) == (0, 0)


def test_a_warm_up_without_end_is_given_up_between_layers(model):
    engine = engine_for(model)
    assert not warm_up.warm_up(engine, limit_s=0)
    assert engine.answer(documents()[:1])[0].status == "ok"


def test_a_warm_up_can_be_interrupted(model):
    def check():
        raise Interrupted("enough", 143)

    engine = engine_for(model)
    engine.attempts.check = check
    with pytest.raises(Interrupted):
        warm_up.warm_up(engine, 60)


def test_a_warm_up_that_fits_no_memory_leaves_it_to_the_rows(model, monkeypatch):
    engine = engine_for(model)
    with monkeypatch.context() as patched:
        failing_on(44, torch.OutOfMemoryError("CUDA out of memory"), patched, warm_up)  # of 64 tokens
        assert warm_up.warm_up(engine, 60)
    assert engine.answer(documents()[:1])[0].status == "ok"


def test_the_engine_knows_where_its_time_went(model):
    engine = engine_for(model)
    rows = [engine.answer(documents()[:3]), engine.answer(documents()[3:])]
    times = engine.times
    assert times.packs == 2
    assert times.prefill_s == pytest.approx(sum(pack[0].ttft_ms for pack in rows) / 1e3)
    assert times.decode_s >= sum(max(row.decode_ms for row in pack) for pack in rows) / 1e3
    assert times.prefill_s + times.decode_s < times.span_s


@pytest.mark.parametrize("calls", [1, 3, 6])
def test_a_check_between_layers_and_steps_can_end_the_run(model, calls):
    seen = []

    def check():
        seen.append(1)
        if len(seen) == calls:  # four layers of prefill, then two steps of decoding
            raise Interrupted("enough", 143)

    engine = engine_for(model)
    engine.attempts.check = check
    with pytest.raises(Interrupted):
        engine.answer(documents())
    assert len(seen) == calls


class DropsTheLast(PruningMethod):
    """A method that breaks the contract."""

    name = "drops-the-last"

    def select(self, layer, view, state):
        return Selection(live=view.all_indices[:-1]) if layer == 0 else Selection()


def test_a_method_that_breaks_the_contract_ends_the_run(model):
    with pytest.raises(MarsError, match=r"^method drops-the-last dropped a prompt's last token"):
        engine_for(model, DropsTheLast()).answer(documents())


def test_planned_bytes_grow_with_tokens_and_documents(model):
    shape = model.decoder.shape
    cpu = torch.device("cpu")
    planned = Packer.on(cpu, Dense(), shape, itemsize=4, new_tokens=10, pack_tokens=None).planned_bytes
    kv = shape.layers * 2 * shape.kv_heads * shape.head_dim * 4
    logits = shape.vocab * 8
    assert planned([100]) == 110 * kv + lean_bytes(shape, 4, 100) + logits
    assert planned([50, 50]) == planned([100]) + 10 * kv + logits
    reading = Packer.on(
        cpu, MarsInfer(start_layer=1), shape, itemsize=4, new_tokens=10, pack_tokens=None
    ).planned_bytes
    scores = 12 * 64 * shape.heads  # a token of the longest document
    assert reading([100]) == 110 * kv + running_bytes(shape, 4, 100) + 100 * scores + logits
    assert reading([50, 50]) == reading([100]) + 10 * kv + logits - 50 * scores


@pytest.mark.parametrize(("tokens", "kv_itemsize", "fits"), [(1 << 20, 1, True), (1 << 20, None, False)])
def test_a_document_of_a_million_tokens_is_refused_where_it_does_not_fit(tokens, kv_itemsize, fits):
    """Of the shape of Qwen2-7B, on a GPU of which fp8 weights leave 71 GB."""
    shape = ModelShape(
        layers=28, hidden=3584, ffn=18944, heads=28, kv_heads=4, head_dim=128, vocab=152064, context=1 << 20
    )
    packer = Packer(
        device=torch.device("cuda"),
        method=Mars(),
        shape=shape,
        itemsize=2,
        new_tokens=64,
        pack_tokens=32768,
        max_bytes=int(0.9 * 71e9),
        kv_itemsize=kv_itemsize,
    )
    prompt = replace(document(10), input_ids=np.zeros(tokens - 64, dtype=np.int64))
    residual, kv = tokens * 3584 * 2, tokens * 28 * 2 * 4 * 128 * (kv_itemsize or 2)
    assert residual + kv < packer.bytes_alone(prompt) < residual + kv + 9e9
    assert packer.runs_alone(prompt)
    assert packer.refuses(prompt) is not fits


def test_the_default_pack_is_bounded_by_device_and_memory(model, monkeypatch):
    shape, cpu = model.decoder.shape, torch.device("cpu")
    assert default_pack_tokens(shape, itemsize=4, device=cpu) == 8192
    monkeypatch.setattr("pipeline.engines.memory.free_bytes", lambda device: 1_000_000)
    assert 1 < default_pack_tokens(shape, itemsize=4, device=cpu) < 1_000
    monkeypatch.setattr("pipeline.engines.memory.free_bytes", lambda device: 0)
    assert default_pack_tokens(shape, itemsize=4, device=cpu) == 1


def test_what_is_wide_is_planned_for_a_piece_and_the_rest_for_every_token(model, monkeypatch):
    shape = model.decoder.shape
    piece = PIECE_TOKENS
    a_token, wide = activation_bytes(shape, 4), piece_bytes(shape, 4, 1)
    assert wide >= (3 * shape.ffn + shape.hidden) * 4
    assert running_bytes(shape, 4, piece) == piece * (a_token + wide)
    assert running_bytes(shape, 4, 8 * piece) == 8 * piece * a_token + piece * wide
    # a pack as large as memory allows is planned to fill it, in one piece or in several
    monkeypatch.setitem(memory.MOST_PACK_TOKENS, "cpu", 10**9)
    kv = shape.layers * shape.kv_bytes_per_token(4)
    for tokens in (piece // 2, piece, piece + 1, 5 * piece):
        needed = tokens * kv + running_bytes(shape, 4, tokens)
        monkeypatch.setattr(memory, "free_bytes", lambda device, needed=needed: needed)
        assert default_pack_tokens(shape, itemsize=4, device=torch.device("cpu")) == tokens


class StepClock:
    """The clock of decoding, which goes on by a second a step."""

    def __init__(self):
        self.seconds = 0.0

    def start(self):
        self.seconds += 1.0

    def stop(self):
        return 0.0


@pytest.mark.parametrize(("limit", "status"), [(4.5, "ok"), (3.5, "error")])
def test_the_time_limit_of_a_row_counts_its_own_steps(model, limit, status):
    engine = LocalEngine(
        model, Dense(), rules=StopRules(max_new_tokens=6), sampling=Sampling(), in_flight=2, pack_tokens=30
    )
    engine._clock, engine.attempts.row_timeout = StepClock(), limit
    for row in documents():
        engine.add([row])
    rows = []
    while engine.is_busy:
        rows += [answer for _, answer, _ in engine.advance()]
    assert {row.status for row in rows} == {status}  # each takes five steps, and is looked at after four
    assert len(rows) == 7
    assert engine._clock.seconds > 3 * limit  # of all rows together
    if status == "error":
        assert {row.error_type for row in rows} == {"timeout"}
        assert rows[0].error_message == "row 0: not answered within --row-timeout 3.5 s"


def test_a_step_that_fails_has_its_rows_run_again_and_says_so(model, monkeypatch):
    notes = []
    engine = LocalEngine(
        model, Dense(), rules=StopRules(max_new_tokens=3), sampling=Sampling(), note=notes.append
    )
    expected = [row.answer for row in engine.answer(documents())]
    calls, real = [], DecodeLoop.step

    def step(self):
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("bad luck")
        return real(self)

    monkeypatch.setattr(DecodeLoop, "step", step)
    rows = engine.answer(documents())
    assert [row.answer for row in rows] == expected
    assert {row.pack_documents for row in rows} == {1}
    assert notes == ["a decode step failed (row 6: RuntimeError: bad luck): its 7 rows run again, each alone"]


def test_memory_that_runs_out_makes_pieces_smaller_before_packs(model, monkeypatch):
    monkeypatch.setattr(local, "FEWEST_PIECE_TOKENS", 20)
    monkeypatch.setattr(model.decoder, "piece_tokens", 10_000)
    engine = engine_for(model)
    expected = [row.answer for row in engine.answer(documents())]
    real, sizes = prefilling.prefill, []

    def prefill(decoder, attention, method, pack, *options, **more):
        sizes.append((len(pack.segments), decoder.piece_tokens))
        if decoder.piece_tokens > 50:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(decoder, attention, method, pack, *options, **more)

    monkeypatch.setattr(prefilling, "prefill", prefill)
    assert [row.answer for row in engine.answer(documents())] == expected
    total = sum(row.prompt_tokens for row in documents())
    assert sizes == [(7, 10_000), (7, total // 2), (7, total // 4)]


def test_the_times_of_a_row_add_up_to_its_way_through_the_engine(model, clock):
    clock.tick = 1e-3  # each look at it: a real one may stand still for a row, and run for the next
    engine = LocalEngine(
        model, Dense(), rules=StopRules(max_new_tokens=5), sampling=Sampling(), in_flight=2, pack_tokens=30
    )
    began = clock()
    given = [replace(row, ready_at=began) for row in documents()]
    rows = engine.answer(given)
    took_ms = (clock() - began) * 1e3
    for row in rows:
        assert min(row.queue_ms, row.ttft_ms, row.decode_ms) >= 0
        assert row.queue_ms + row.ttft_ms + row.decode_ms <= took_ms
    assert max(row.queue_ms for row in rows) > max(row.ttft_ms for row in rows)  # five waited for two
    assert engine.times.prefill_s + engine.times.decode_s <= engine.times.span_s
