"""A row's answer is the one that it gets alone, whoever else is in the batch, and whenever they come and go.

In float64, where sums in another order do not move a choice.
"""

from __future__ import annotations

import random
from types import SimpleNamespace

import pytest
import torch
from conftest import FAMILY_SETTINGS, SIZES, document, loaded, sharpened

from pipeline.checkpoints.building import random_model
from pipeline.doctor.selftest import small
from pipeline.engines.local import LocalEngine
from pipeline.families.decoder import Decoder
from pipeline.generation import decode_loop
from pipeline.generation.generated import StopRules
from pipeline.generation.sampling import Sampling
from pipeline.model.store import slots_needed
from pipeline.pruning.dense import Dense
from pipeline.pruning.registry import method_names
from pipeline.settings.method_settings import IN_STEPS

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
ROWS, NEW_TOKENS = 12, 10
STOPS = StopRules(max_new_tokens=NEW_TOKENS, token_ids=frozenset(range(0, 256, 11)))


@pytest.fixture(scope="module", params=sorted(FAMILY_SETTINGS))
def model(request):
    settings = {**SIZES, **FAMILY_SETTINGS[request.param]}
    decoder = Decoder(sharpened(random_model(request.param, settings, device=CPU, dtype=torch.float64)))
    tokenizer = SimpleNamespace(decode=lambda tokens, **_: " ".join(map(str, tokens)))
    return loaded(decoder, tokenizer=tokenizer)


def engine_for(model, method, *, sampling=None, **options):
    return LocalEngine(model, method, rules=STOPS, sampling=sampling or Sampling(), **options)


def documents():
    lengths = random.Random(5)
    return [document(lengths.randrange(14, 130), seed=row, row=row) for row in range(ROWS)]


def told(answer):
    return answer.status, answer.answer, answer.finish_reason, answer.new_tokens, answer.kept_tokens


def fuzzed(engine, rows, draws):
    """Answers by row; documents come in random numbers, at random times."""
    waiting, found = list(rows), {}
    draws.shuffle(waiting)
    while waiting or engine.is_busy:
        if waiting and (not engine.is_busy or draws.random() < 0.3):
            count = draws.randint(1, 4)
            engine.add(waiting[:count])
            del waiting[:count]
        for _, answer, _ in engine.advance():
            assert answer.row not in found
            found[answer.row] = told(answer)
    return [found[row] for row in range(len(rows))]


def squeezed(engine, rows, count):
    """The engine with a store for about so many of the rows, so that they wait for each other's room."""
    need = max(engine.packer.slots(row.prompt_tokens, NEW_TOKENS) for row in rows)
    engine.packer = engine.packer.within(engine.packer.all_bytes)
    store = count * need * engine.packer.slot_bytes
    engine.packer = type(engine.packer)(**{**vars(engine.packer), "store_bytes": store})
    return engine


@pytest.mark.parametrize("name", [name for name in method_names() if name not in IN_STEPS])
@pytest.mark.parametrize("late", [0, 1])
def test_who_else_is_there_changes_no_answer(model, name, late, monkeypatch):
    rows, method = documents(), small(name)
    alone = [told(engine_for(model, method, pack_tokens=1).answer([row])[0]) for row in rows]
    assert {finish for _, _, finish, _, _ in alone} == {"stop", "length"}  # rows leave at different times
    monkeypatch.setitem(decode_loop.LATE, "cpu", late)
    for seed, (in_flight, pack_tokens, room) in enumerate([(16, None, 16), (3, 200, 3), (8, 90, 2)]):
        engine = engine_for(model, method, pack_tokens=pack_tokens, in_flight=in_flight)
        squeezed(engine, rows, room)
        assert fuzzed(engine, rows, random.Random(seed)) == alone


def test_draws_do_not_depend_on_the_batch(model):
    rows = documents()
    for top_p in (0.8, 1.0):
        sampling = Sampling(temperature=0.9, top_p=top_p, seed=3)
        alone = [
            told(engine_for(model, Dense(), sampling=sampling, pack_tokens=1).answer([row])[0])
            for row in rows
        ]
        engine = squeezed(
            engine_for(model, Dense(), sampling=sampling, in_flight=5, pack_tokens=150), rows, 4
        )
        assert fuzzed(engine, rows, random.Random(top_p)) == alone


def test_a_document_larger_than_the_store_runs_alone_among_others(model):
    rows = [*documents(), document(300, seed=99, row=ROWS)]
    alone = [told(engine_for(model, Dense(), pack_tokens=1).answer([row])[0]) for row in rows]
    engine = squeezed(engine_for(model, Dense(), in_flight=6, pack_tokens=200), rows[:ROWS], 2)
    layers = model.decoder.shape.layers
    assert slots_needed([300] * layers, NEW_TOKENS, CPU) > engine.packer.store_slots
    assert fuzzed(engine, rows, random.Random(1)) == alone


def test_a_row_that_is_not_finite_harms_no_neighbour(model, monkeypatch):
    rows = documents()
    expected = [told(answer) for answer in engine_for(model, Dense()).answer(rows)]
    long_answer = next(row for row, (*_, new_tokens, _) in zip(rows, expected, strict=True) if new_tokens > 4)
    sick, real = long_answer.prompt_tokens, Decoder.head
    positions = {sick + 2}  # of its third token, which the fourth is chosen by

    def head(self, hidden):
        logits = real(self, hidden)
        if self.seen is not None and len(self.seen) == len(hidden):
            logits[[int(n) in positions for n in self.seen]] = float("nan")
        return logits

    rope = Decoder.rope

    def remember(self, hidden, at, reach):
        self.seen = at.clone()
        return rope(self, hidden, at, reach)

    monkeypatch.setattr(Decoder, "seen", None, raising=False)
    monkeypatch.setattr(Decoder, "head", head)
    monkeypatch.setattr(Decoder, "rope", remember)
    others = [row for row in rows if sick + 2 not in range(row.prompt_tokens, row.prompt_tokens + NEW_TOKENS)]
    assert len(others) > 4
    answers = [told(answer) for answer in engine_for(model, Dense()).answer([long_answer, *others])]
    assert answers[0][:2] == ("error", None)
    assert answers[1:] == [expected[row.source.row] for row in others]
