"""Rows that come and go between steps: each gets the tokens that it gets alone."""

from __future__ import annotations

import random
from itertools import count

import pytest
import torch
from batch_runs import LENGTHS, NEW_TOKENS, SAMPLINGS, Run, alone, chosen, model
from decode_steps import METHODS, EagerRecorder

import pipeline.model.graphs as graphs_module
from pipeline.generation.decode_batch import DecodeBatch
from pipeline.generation.sampling import NOT_FINITE, Sampling

pytestmark = pytest.mark.slow


@pytest.fixture(params=[0, 1])
def late(request):
    """How many steps are queued before tokens are looked at."""
    return request.param


@pytest.fixture(params=["padded", "plain"])
def recorder(request, monkeypatch):
    """None where batches are not padded."""
    made = EagerRecorder() if request.param == "padded" else None
    monkeypatch.setattr(graphs_module, "recorder_for", lambda *_: made)
    return made


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("kind", SAMPLINGS)
@pytest.mark.parametrize("method", METHODS)
def test_rows_that_come_and_go_have_the_answers_that_they_have_alone(method, kind, recorder, late, seed):
    random_, run = random.Random(f"{method} {kind} {seed}"), Run(method, kind, late)
    waiting = random_.sample(range(len(LENGTHS)), len(LENGTHS)) * 2
    ended, given_up = [], 0
    while waiting or run.running:
        chosen = waiting[: random_.randint(1, 3)]
        if chosen and run.has_room_for(chosen) and random_.random() < 0.4:
            waiting = waiting[len(chosen) :]
            ended += run.admit(chosen)
        elif run.loop.rows and random_.random() < 0.05:
            given_up += 1
            ended += run.give_up(random_.choice(run.loop.rows))
        else:
            ended += run.step()
    # a step may be on its way that nobody waits for, of rows that had ended before it
    assert run.loop.drain() == []
    assert not run.loop.is_busy
    assert run.store.free == run.store.size
    assert len(ended) == 2 * len(LENGTHS)
    for row in ended:
        run.check(row)
    assert sum(row.finish_reason == "timeout" for row in ended) == given_up
    if recorder is not None:
        assert run.loop.stats.replayed_steps > 0
        run.loop.close()
        assert all(again.closed for again in recorder.recorded)


def test_rows_that_have_been_moved_go_on(recorder, late):
    """In a store so full that letting a row in moves the others."""
    run, ended = Run("dense", "greedy", late), []
    waiting = list(range(len(LENGTHS))) * 3
    while waiting or run.running:
        if waiting and run.has_room_for(waiting[:1]):
            ended += run.admit([waiting.pop(0)])
        ended += run.step()
    assert run.store.moves > 0
    assert len(ended) == 3 * len(LENGTHS)
    for row in ended:
        run.check(row)


@pytest.mark.parametrize("kind", SAMPLINGS)
def test_steps_captured_beforehand_serve_rows_that_come_and_go(kind, late, monkeypatch):
    monkeypatch.setattr(graphs_module, "recorder_for", lambda *_: EagerRecorder())
    run, ended = Run("sliminfer", kind, late), []
    assert run.loop.prepare() == 4  # of 5, 4, 2 and 1 columns
    run.check_counts()
    waiting = list(range(len(LENGTHS)))
    while waiting or run.running:
        if waiting and run.has_room_for(waiting[:1]):
            ended += run.admit([waiting.pop(0)])
        ended += run.step()
    assert len(ended) == len(LENGTHS)
    for row in ended:
        run.check(row)
    stats = run.loop.stats
    assert (stats.eager_steps, stats.captures) == (0, 4)
    assert stats.replayed_steps > NEW_TOKENS


@pytest.mark.parametrize("columns", [3, 8])
def test_columns_are_those_of_the_next_size_and_no_more_than_there_are(recorder, late, columns, monkeypatch):
    seen, real = [], DecodeBatch.step

    def step(batch, size):
        seen.append((batch.rows, size.columns))
        real(batch, size)

    _, answers = alone("dense", "greedy")  # before steps are seen
    by_length = {len(tokens): number for number, (tokens, _) in enumerate(answers) if len(tokens) > 1}
    monkeypatch.setattr(DecodeBatch, "step", step)
    run = Run("dense", "greedy", late, columns=columns)
    run.admit(sorted(by_length.values())[:3])
    while run.running:
        run.step()
    expected = {3: min(4, columns), 2: 2, 1: 1}
    assert {rows for rows, _ in seen} == {3, 2, 1}
    assert seen == [(rows, rows if recorder is None else expected[rows]) for rows, _ in seen]


def poison_store(run, row, monkeypatch):
    """NaN among what a row has stored in one layer."""
    start, stored = row.extent.starts[2], row.extent.stored[2]
    run.store.buffers(2)[1][start + stored // 2] = float("nan")


def poison_output(run, row, monkeypatch):
    """Of the row's column; for once, since others take the column when it has left."""
    column, real, calls = run.loop.rows.index(row), model().head, count()

    def head(hidden):
        logits = real(hidden)
        if next(calls) == 0:
            logits[column] = float("nan")
        return logits

    monkeypatch.setattr(model(), "head", head)


@pytest.mark.parametrize("kind", SAMPLINGS)
@pytest.mark.parametrize("poison", [poison_store, poison_output])
def test_a_row_whose_output_is_not_finite_ends_and_its_neighbours_do_not_see_it(
    poison, kind, recorder, late, monkeypatch
):
    run = Run("dense", kind, late)
    numbers = [n for n, (tokens, _) in enumerate(run.expected) if len(tokens) > 8][:4]
    spoilt_number = numbers[1]
    ended = run.admit(numbers)
    for _step in range(3):
        ended += run.step()
    assert ended == []
    (spoilt,) = [row for row in run.running if row.number == spoilt_number]
    poison(run, spoilt, monkeypatch)
    for _step in range(1 + late):
        assert spoilt.finish_reason is None
        ended += run.step()
    assert ended == [spoilt]
    assert spoilt.finish_reason == "not_finite"
    assert spoilt.tokens == run.expected[spoilt_number][0][:4]
    assert spoilt.finished_at > 0
    # nothing of it is left, also where it took one step more
    assert all(pool.isfinite().all() for pool in run.store.buffers(0))
    ended += run.admit([spoilt_number])  # in its place
    while run.running:
        ended += run.step()
    assert len(ended) == 5
    for row in ended:
        run.check(row)
    assert [row.finish_reason for row in ended].count("not_finite") == 1


@pytest.mark.parametrize("kind", SAMPLINGS)
def test_an_answer_does_not_depend_on_who_else_is_in_the_batch(kind, recorder, late):
    """Nor on the column that the row has."""
    for company in ([3], [7, 3], [3, 9, 8, 1], [5, 6, 1, 0, 3]):
        run, ended = Run("dense", kind, late), []
        ended += run.admit(company)
        while run.running:
            ended += run.step()
        assert {row.number for row in ended} == set(company)
        for row in ended:
            run.check(row)


@pytest.mark.parametrize("seed", [0, 3])
@pytest.mark.parametrize("row", [0, 1, 4_000_000_000])
@pytest.mark.parametrize("tokens", [1, 5, 64, 1000])
def test_numbers_for_draws_are_those_of_a_generator_asked_one_by_one(seed, row, tokens):
    mixed = (seed * 0x9E3779B97F4A7C15 + row * 0xBF58476D1CE4E5B9) % 2**63
    generator = torch.Generator().manual_seed(mixed)
    one_by_one = [torch.rand((), generator=generator).item() for _ in range(tokens)]
    uniforms = Sampling(temperature=1, seed=seed).uniforms(row, tokens)
    assert uniforms.tolist() == one_by_one
    assert uniforms.tolist() == Sampling(temperature=1, seed=seed).uniforms(row, 2000)[:tokens].tolist()


def test_seeds_and_rows_have_numbers_of_their_own():
    drawn = {
        tuple(Sampling(temperature=1, seed=seed).uniforms(row, 3).tolist())
        for seed in range(4)
        for row in range(50)
    }
    assert len(drawn) == 200


def naive_draw(logits, uniform, sampling):
    """Inversion in float64 and in words: tokens in their order until their mass exceeds the number."""
    masses = (logits.double() / sampling.temperature).softmax(-1).tolist()
    tokens = list(range(len(masses)))
    if sampling.top_p < 1:
        tokens.sort(key=lambda token: -masses[token])
        before, nucleus = 0.0, []
        for token in tokens:
            if before >= sampling.top_p:
                break
            nucleus.append(token)
            before += masses[token]
        tokens = nucleus
    target, reached = uniform * sum(masses[token] for token in tokens), 0.0
    for token in tokens:
        reached += masses[token]
        if reached > target:
            return token
    return tokens[-1]


@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.0])
def test_a_draw_is_the_inversion_of_the_distribution(temperature, top_p):
    sampling = Sampling(temperature=temperature, top_p=top_p)
    generator = torch.Generator().manual_seed(1)
    logits = 3 * torch.randn(300, 40, generator=generator)
    uniforms = torch.rand(300, generator=generator)
    drawn = chosen(logits, sampling, uniforms).tolist()
    expected = [naive_draw(*pair, sampling) for pair in zip(logits, uniforms.tolist(), strict=True)]
    # float32 may stand on the other side of a border between two tokens
    assert sum(a != b for a, b in zip(drawn, expected, strict=True)) <= 1
    assert len(set(drawn)) > 5


@pytest.mark.parametrize("top_p", [0.5, 1.0])
def test_no_number_draws_a_token_beyond_the_last(top_p):
    sampling = Sampling(temperature=1.0, top_p=top_p)
    largest = torch.nextafter(torch.tensor(1.0), torch.tensor(0.0))
    for uniform in (0.0, float(largest)):
        logits = torch.randn(200, 1000, generator=torch.Generator().manual_seed(2))
        drawn = chosen(logits, sampling, torch.full((200,), uniform))
        assert ((drawn >= 0) & (drawn < 1000)).all()


@pytest.mark.parametrize("kind", SAMPLINGS)
def test_output_that_is_not_finite_is_no_token(kind):
    logits = torch.randn(70, 9, generator=torch.Generator().manual_seed(0))
    spoilt = {3: float("nan"), 40: float("inf"), 69: -float("inf")}
    for row, value in spoilt.items():
        logits[row] = value
    tokens = chosen(logits, SAMPLINGS[kind], torch.full((70,), 0.5)).tolist()
    assert [row for row, token in enumerate(tokens) if token == NOT_FINITE] == list(spoilt)
    logits[5, 2] = float("nan")  # one of a row's is enough
    assert chosen(logits, SAMPLINGS[kind], torch.full((70,), 0.5))[5] == NOT_FINITE
