"""Drafts that are looked up: what is found, and that no draft changes an answer."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from batch_runs import LENGTHS, NEW_TOKENS, SAMPLINGS, Run, model
from decode_steps import METHODS, EagerRecorder

import pipeline.model.graphs as graphs_module
from pipeline.generation import lookup
from pipeline.generation.lookup import (
    LONGEST_MATCH,
    SHORTEST_MATCH,
    DraftPace,
    Lookup,
    Spread,
    Texts,
    drafts_of,
)
from pipeline.kernels.kv_fp8 import FP8
from pipeline.model.store import KvStore

VOCABULARY = 90
FIXED, ADAPTIVE = (Lookup(drafts=4, adaptive=adaptive) for adaptive in (False, True))


@pytest.fixture(params=[0, 1])
def late(request):
    """How many steps are queued before tokens are looked at."""
    return request.param


def naive_drafts(text, most):
    """What follows the last of the longest matches of the newest tokens."""
    for length in range(LONGEST_MATCH, SHORTEST_MATCH - 1, -1):
        for end in range(len(text) - 2, LONGEST_MATCH - 2, -1):
            if text[end - length + 1 : end + 1] == text[-length:]:
                return text[end + 1 : end + 1 + most]
    return []


def texts_of(rows, chosen=FIXED):
    made = Texts(chosen, len(rows) + 1, max(map(len, rows)) + 20, torch.device("cpu"))
    for column, row in enumerate(rows):
        made.join(column, torch.tensor(row[:-1]), row[-1])
    return made


def found(texts, rows, most=10**6):
    moving = torch.tensor([1] * rows + [0], dtype=torch.int32)
    tokens, counts = texts.drafts(moving, most)
    assert counts[rows] == 0  # of nobody
    return [row[:count] for row, count in zip(tokens[:rows].tolist(), counts.tolist(), strict=False)]


@pytest.mark.parametrize("symbols", [2, 5, 40])
def test_drafts_follow_the_last_of_the_longest_matches(symbols):
    numbers = np.random.default_rng(symbols)
    rows = [numbers.integers(0, symbols, length).tolist() for length in (1, 2, 3, 4, 5, 9, 30, 80, 200)]
    texts = texts_of(rows)
    expected = [naive_drafts(row, FIXED.drafts) for row in rows]
    assert found(texts, len(rows)) == expected
    assert symbols == 40 or sum(map(bool, expected)) > 2  # not vacuous
    # a step adds tokens of its own, of some rows none, and rows leave
    added = [numbers.integers(0, symbols, n % 4).tolist() for n in range(len(rows))]
    grid = torch.full((len(rows) + 1, 5), 7)
    for column, tokens in enumerate(added):
        grid[column, : len(tokens)] = torch.tensor(tokens, dtype=torch.int64)
    made = torch.tensor([*map(len, added), 0], dtype=torch.int32)
    texts.take(grid, made, torch.zeros_like(made), torch.zeros_like(made))
    rows = [row + tokens for row, tokens in zip(rows, added, strict=True)]
    assert found(texts, len(rows)) == [naive_drafts(row, FIXED.drafts) for row in rows]
    kept = [7, 2, 8]
    texts.keep(torch.tensor(kept))
    moving = torch.tensor([1, 1, 1], dtype=torch.int32)
    tokens, counts = texts.drafts(moving, 100)
    assert [row[:n] for row, n in zip(tokens.tolist(), counts.tolist(), strict=True)] == [
        naive_drafts(rows[row], FIXED.drafts) for row in kept
    ]


def test_of_more_drafts_than_a_step_takes_each_row_is_cut_alike():
    quoting = [0, 0, 0, 1, 2, 3, 4, 5, 6, 1, 2]
    rows = [quoting, quoting, [5, 6, 7, 8], [3, 3, 1, 2, 1, 1, 2, 8, 8, 1, 2]]
    texts = texts_of(rows)
    whole = found(texts, 4)
    assert [len(row) for row in whole] == [4, 4, 0, 4]
    for most, each in ((11, 3), (9, 3), (8, 2), (5, 1), (2, 0)):
        assert found(texts, 4, most) == [row[:each] for row in whole]


@pytest.mark.parametrize(("queries", "cost"), [(5, 1.0), (10, 1.0), (16, 0.625), (40, 0.25)])
def test_a_row_whose_drafts_are_refused_has_fewer_and_tries_again(queries, cost, monkeypatch):
    """The fewer the nearer a step of two columns with 4 drafts each is to being full."""
    monkeypatch.setitem(lookup.MOST_QUERIES, "cpu", queries)
    row = [0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 1, 2]
    texts = texts_of([row], ADAPTIVE)
    column, seen = torch.zeros(2, dtype=torch.int32), []
    for _step in range(300):
        (drafts,) = found(texts, 1)
        seen.append(len(drafts))
        verified = torch.tensor([len(drafts), 0], dtype=torch.int32)
        texts.take(torch.zeros((2, 5), dtype=torch.int64), column, verified, column)  # none is accepted
    assert seen[:4] == [4] * 4
    assert sum(seen[100:]) == pytest.approx(200 * lookup.CREDIT_OF_STEP / cost, abs=4)
    verified = torch.tensor([1, 0], dtype=torch.int32)
    texts.take(torch.zeros((2, 5), dtype=torch.int64), column, verified, verified)
    assert len(found(texts, 1)[0]) == 4  # as soon as one is accepted


def test_places_are_given_to_owners_in_turn():
    bounds, owner, index, spare = Spread.of(torch.tensor([2, 0, 3, 1], dtype=torch.int32), 8)
    assert bounds.tolist() == [0, 2, 2, 5, 6]
    assert owner.tolist()[:6] == [0, 0, 2, 2, 2, 3]
    assert index.tolist()[:6] == [0, 1, 0, 1, 2, 0]
    assert spare.tolist() == [False] * 6 + [True] * 2


def test_steps_verify_drafts_as_long_as_that_pays():
    pace, verified = DraftPace(ADAPTIVE), 0
    for _step in range(400):
        if pace.drafts(1.0):
            verified += 1
            pace.made(4, 0)
    assert verified < 40  # and not none: what rows are about changes
    assert verified > lookup.TRIAL_STEPS
    while not pace.drafts(1.0):
        pass
    for _step in range(50):
        pace.made(4, 8)
        assert pace.drafts(1.0)
    always = DraftPace(FIXED)
    for _step in range(50):
        assert always.drafts(1.0)
        always.made(4, 0)


def test_drafts_that_cost_little_are_verified_for_a_small_gain():
    pace = DraftPace(ADAPTIVE)
    for _step in range(400):
        pace.drafts(1.0)
        pace.made(10, 1)
    assert all(pace.drafts(0.15) for _step in range(30))
    assert sum(pace.drafts(1.0) for _step in range(30)) <= lookup.SHORT_TRIAL_STEPS


def oracle(run, seed):
    """In place of what is looked up: the tokens to come, of which a random one and what follows is wrong."""
    chosen = random.Random(seed)

    def drafts(texts, moving, most):
        columns, width = len(moving), run.lookup.drafts
        tokens, counts = torch.zeros((columns, width), dtype=torch.int32), []
        for column, row in enumerate(run.loop.rows):
            drawn = int(run.batch._drawn_C[column])
            following = run.expected[row.number][0][drawn : drawn + width]
            wrong = chosen.randint(0, width)
            for n in range(width):
                right = n < len(following) and n != wrong
                tokens[column, n] = following[n] if right else chosen.randrange(VOCABULARY)
            counts.append(chosen.randint(0, width))
        counts += [0] * (columns - len(counts))
        return tokens, lookup._within(torch.tensor(counts, dtype=torch.int32), width, most)

    return drafts


@pytest.fixture(params=["padded", "plain"])
def recorder(request, monkeypatch):
    made = EagerRecorder() if request.param == "padded" else None
    monkeypatch.setattr(graphs_module, "recorder_for", lambda *_: made)
    return made


@pytest.mark.parametrize("queries", [7, 16])  # of a step; with few most drafts are cut off
@pytest.mark.parametrize("kind", SAMPLINGS)
@pytest.mark.parametrize("method", METHODS)
def test_no_draft_changes_an_answer(method, kind, queries, recorder, late, monkeypatch):
    """Greedy or drawn, with rows that come and go, whichever drafts are right."""
    monkeypatch.setitem(lookup.MOST_QUERIES, "cpu", queries)
    run = Run(method, kind, late, lookup=FIXED)
    monkeypatch.setattr(Texts, "drafts", oracle(run, queries))
    waiting = [*range(len(LENGTHS)), 3, 1, 0]
    order, ended, steps = random.Random(method + kind), [], 0
    while waiting or run.running:
        chosen = waiting[: order.randint(1, 3)]
        if chosen and run.has_room_for(chosen) and order.random() < 0.4:
            waiting = waiting[len(chosen) :]
            ended += run.admit(chosen)
        else:
            ended, steps = ended + run.step(), steps + 1
    assert len(ended) == 13
    for row in ended:
        run.check(row)
    longer = [row for row in ended if row.drafts is not None]
    assert 0 < sum(row.accepted for row in longer) < sum(row.drafts for row in longer)
    assert all(row.accepted < len(row.tokens) for row in longer)


def test_no_draft_changes_an_answer_over_keys_and_values_in_fp8(recorder, late, monkeypatch):
    """Against the same steps without drafts, as rounding changes answers too."""
    shape, answers = model().shape, {}
    for chosen in (None, FIXED):
        run = Run("dense", "greedy", late, lookup=chosen)
        store = KvStore(
            run.store.free, shape, dtype=FP8, device=torch.device("cpu"), extents=run.batch.capacity
        )
        for holder, name in ((run, "store"), (run.loop, "_kv"), (run.batch, "_kv")):
            setattr(holder, name, store)
        if chosen is not None:
            run.expected = [answers[number] for number in range(len(LENGTHS))]
            monkeypatch.setattr(Texts, "drafts", oracle(run, 5))
        ended = []
        for first in range(0, len(LENGTHS), 2):
            ended += run.admit([first, first + 1])
            while run.running:
                ended += run.step()
        if chosen is None:
            answers = {row.number: (row.tokens, row.finish_reason) for row in ended}
        else:
            assert sum(row.accepted for row in ended) > 10
        assert {row.number: (row.tokens, row.finish_reason) for row in ended} == answers


def test_what_is_looked_up_is_accepted_where_an_answer_repeats(monkeypatch):
    """Without an oracle: a model that goes in circles quotes itself."""
    monkeypatch.setitem(lookup.MOST_QUERIES, "cpu", 64)
    run, ended = Run("dense", "greedy", 0, lookup=FIXED), []
    ended += run.admit(range(4))
    while run.running:
        ended += run.step()
    for row in ended:
        run.check(row)
    assert all(row.drafts is not None for row in ended if len(row.tokens) > 1)


def test_a_row_that_is_not_finite_ends_with_its_last_sound_token(recorder, late, monkeypatch):
    run = Run("dense", "greedy", late, lookup=FIXED)
    monkeypatch.setattr(Texts, "drafts", oracle(run, 1))
    numbers = [n for n, (tokens, _) in enumerate(run.expected) if len(tokens) > 10][:3]
    ended = run.admit(numbers)
    ended += run.step()
    spoilt = run.running[1]
    start, stored = spoilt.extent.starts[2], spoilt.extent.stored[2]
    run.store.buffers(2)[1][start + stored // 2] = float("nan")
    while run.running:
        ended += run.step()
    for row in ended:
        run.check(row)
    assert [row for row in ended if row.finish_reason == "not_finite"] == [spoilt]
    assert all(pool.isfinite().all() for pool in run.store.buffers(0))


def test_no_row_writes_behind_its_room(late, monkeypatch):
    """Though all drafts are accepted, and the host learns of it late."""
    run = Run("dense", "greedy", late, lookup=Lookup(drafts=7, adaptive=False))
    monkeypatch.setitem(lookup.MOST_QUERIES, "cpu", 64)
    right = oracle(run, 0)

    def all_right(texts, moving, most):
        tokens, _ = right(texts, moving, most)
        for column, row in enumerate(run.loop.rows):
            drawn = int(run.batch._drawn_C[column])
            following = run.expected[row.number][0][drawn : drawn + 7]
            tokens[column, : len(following)] = torch.tensor(following, dtype=torch.int32)
        return tokens, 7 * moving

    monkeypatch.setattr(Texts, "drafts", all_right)
    numbers = [n for n, (tokens, _) in enumerate(run.expected) if len(tokens) == NEW_TOKENS][:3]
    places, real = [], run.batch._queries

    def watched(columns, drafts):
        asked = real(columns, drafts)
        for column, row in enumerate(run.loop.rows):
            own = asked.places_LQ[:, (asked.column_Q == column)]
            for layer, (start, stored) in enumerate(zip(row.extent.starts, row.extent.stored, strict=True)):
                places.append(int(own[layer].max()) - start - stored)
        return asked

    run.admit(numbers)
    run.batch._queries = watched
    while run.running:
        run.step()
    assert NEW_TOKENS - 1 <= max(places) < NEW_TOKENS + drafts_of(run.lookup)
