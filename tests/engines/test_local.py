"""The engine when a pack goes wrong: the culprit gets an error row, the others their answers."""

from __future__ import annotations

import pytest
import torch
from conftest import document, loaded

from pipeline.engines import local, prefilling, warm_up
from pipeline.engines.local import LocalEngine
from pipeline.errors import Interrupted, MarsError
from pipeline.generation.decode_loop import DecodeLoop
from pipeline.generation.generated import StopRules
from pipeline.generation.sampling import Sampling
from pipeline.pruning.base import PruningMethod, Selection
from pipeline.pruning.dense import Dense


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

    def add_attention_(layer, hidden, mixed, fp8=None, **how):
        clock.now += 0.4 if slow in lengths and len(hidden) > len(documents()) else 0  # not in decode steps
        return real(layer, hidden, mixed, fp8, **how)

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
