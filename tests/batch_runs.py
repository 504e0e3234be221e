"""Rows of a small model that come and go in one batch, beside their answers without any other row."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from conftest import document, pack_of
from decode_steps import METHODS, exact_model

from pipeline.generation.decode import decode
from pipeline.generation.decode_loop import DecodeLoop
from pipeline.generation.generated import Generated, StopRules
from pipeline.generation.lookup import drafts_of
from pipeline.generation.sampling import Draws, RowDraws, Sampling, first_tokens, next_tokens, settings_of
from pipeline.generation.step_tables import Seat
from pipeline.kernels.attention import SdpaAttention
from pipeline.model.prefill import prefill
from pipeline.model.store import Extent, KvStore, slots_needed
from pipeline.pruning.registry import make_method

NEW_TOKENS = 14
LENGTHS = (61, 23, 40, 97, 55, 12, 48, 83, 30, 71)
SAMPLINGS = {
    "greedy": Sampling(),
    "sampled": Sampling(temperature=1.0, seed=5),
    "top_p": Sampling(temperature=1.0, top_p=0.9, seed=5),
    "all": Sampling(temperature=1.0, top_k=30, top_p=0.95, min_p=0.02, repetition_penalty=1.3, seed=5),
    "penalised": Sampling(repetition_penalty=1.5),
}
model = cache(exact_model)


def prompt(number):
    return document(LENGTHS[number], seed=number).input_ids


def prefilled(rows, method, new_tokens=0):
    documents = [document(LENGTHS[row], seed=row, row=row) for row in rows]
    chosen = make_method(method, METHODS[method])
    return prefill(model(), SdpaAttention(), chosen, pack_of(*documents), new_tokens)


def drawn_alone(row, method, sampling, rules):
    draws = [sampling.draws(row, NEW_TOKENS)]
    pack = prefilled([row], method, NEW_TOKENS)
    return decode(model(), SdpaAttention(), pack, rules, draws=draws, prompts=[prompt(row)], late=0)[0]


def chosen(logits, sampling, uniforms):
    """The tokens of rows that are all drawn in the same way."""
    if sampling.is_greedy:
        return next_tokens(logits, None)
    settings = torch.tensor(settings_of(RowDraws(sampling, uniforms)))[:, None].expand(-1, len(uniforms))
    return next_tokens(logits, Draws(settings, uniforms, sampling.sorts, sampling.has_floor))


@cache
def alone(method, kind):
    """The rules of a run in which rows end at many lengths, and each row's answer without any other."""
    sampling = SAMPLINGS[kind]
    whole = [
        drawn_alone(row, method, sampling, StopRules(max_new_tokens=NEW_TOKENS)).tokens
        for row in range(len(LENGTHS))
    ]
    stops = frozenset({whole[1][4], whole[3][9], whole[4][0]})
    rules = StopRules(max_new_tokens=NEW_TOKENS, token_ids=stops)
    answers = [drawn_alone(row, method, sampling, rules) for row in range(len(LENGTHS))]
    assert len({len(answer.tokens) for answer in answers}) > 2  # not vacuous
    assert len({tuple(answer.tokens) for answer in answers}) > 5
    return rules, [(answer.tokens, answer.finish_reason) for answer in answers]


@dataclass(kw_only=True, eq=False)
class Row(Generated):
    number: int
    extent: Extent
    position: int  # of the first token


class Run:
    """A store and a loop of few columns, whose counts are looked at after all that is done."""

    def __init__(self, method, kind, late, *, columns=5, lookup=None):
        self.method, self.sampling = method, SAMPLINGS[kind]
        self.rules, self.expected = alone(method, kind)
        self.lookup = lookup
        shape = model().shape
        slots = 3 * slots_needed([max(LENGTHS)] * shape.layers, NEW_TOKENS, model().device)
        self.store = KvStore(slots, shape, dtype=model().dtype, device=torch.device("cpu"))
        self.loop = DecodeLoop(
            model(),
            SdpaAttention(),
            self.store,
            new_tokens=NEW_TOKENS,
            sampling=self.sampling,
            capacity=columns,
            longest=max(LENGTHS) + NEW_TOKENS,
            lookup=lookup,
            late=late,
        )
        self.running: list[Row] = []  # also those whose last tokens are on their way

    @property
    def batch(self):
        return self.loop._batch

    def has_room_for(self, numbers):
        """As if nothing were pruned."""
        layers, device = model().shape.layers, model().device
        room = NEW_TOKENS + drafts_of(self.lookup)
        needed = sum(slots_needed([LENGTHS[number]] * layers, room, device) for number in numbers)
        return needed <= self.store.free and len(self.running) + len(numbers) <= self.batch.capacity

    def admit(self, numbers):
        """Prefill rows together and let them in; returns those that end with their first token."""
        pack = prefilled(numbers, self.method)
        draws = [self.sampling.draws(number, NEW_TOKENS) for number in numbers]
        tokens = first_tokens(pack.logits_BV, draws, [prompt(number) for number in numbers])
        moves = self.store.moves
        extents = self.store.adopt(pack.cache, [NEW_TOKENS + drafts_of(self.lookup)] * len(numbers))
        if self.store.moves > moves:
            self.loop.moved([row.extent.starts for row in self.loop.rows])
        rows = [
            Row(rules=self.rules, number=number, extent=extent, position=position)
            for number, extent, position in zip(numbers, extents, pack.next_positions, strict=True)
        ]
        for row, token in zip(rows, tokens, strict=True):
            row.take(token)
        live = [b for b, row in enumerate(rows) if row.finish_reason is None]
        seats = [
            Seat(
                starts=extents[b].starts,
                used=extents[b].stored,
                position=rows[b].position,
                prompt=prompt(rows[b].number),
            )
            for b in live
        ]
        if live:
            self.loop.join([rows[b] for b in live], seats, [draws[b] for b in live])
        self.running += rows
        self.check_counts()
        return self.finish([row for row in rows if row.finish_reason is not None])

    def step(self):
        ended = self.loop.step()
        self.check_counts()
        return self.finish(ended)

    def give_up(self, row):
        """Take a row out in the middle of its answer."""
        row.finish_reason = "timeout"
        self.loop.leave([row])
        self.check_counts()
        return self.finish([row])

    def finish(self, rows):
        for row in rows:
            self.running.remove(row)
            self.store.release(row.extent, wipe=row.finish_reason == "not_finite")
        return rows

    def check(self, row):
        tokens, reason = self.expected[row.number]
        if row.finish_reason in ("timeout", "not_finite"):
            assert row.tokens == tokens[: len(row.tokens)]
        else:
            assert (row.tokens, row.finish_reason) == (tokens, reason)

    def check_counts(self):
        """What the device counts, where rows are and in the columns of nobody."""
        batch, rows = self.batch, self.loop.rows
        assert batch.rows == len(rows)
        drawn = batch._drawn_C[: len(rows)].tolist()
        if self.lookup is None:
            assert drawn == [row.queued for row in rows]
        else:
            assert all(row.queued <= count <= NEW_TOKENS for count, row in zip(drawn, rows, strict=True))
        pairs = list(zip(drawn, rows, strict=True))
        assert batch._starts_LC[:, : len(rows)].T.tolist() == [row.extent.starts for row in rows]
        stored = [[tokens + count for tokens in row.extent.stored] for count, row in pairs]
        assert batch._used_LC[:, : len(rows)].T.tolist() == stored
        assert batch._position_C[: len(rows)].tolist() == [row.position + count - 1 for count, row in pairs]
        assert batch._moving_C.tolist() == [1] * len(rows) + [0] * (batch.capacity + 1 - len(rows))
        places = batch._queries(batch.capacity, None).places_LQ
        assert (places[:, len(rows) :] == 0).all()
