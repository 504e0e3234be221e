"""What a guard compares: tasks, lengths, and what was kept of documents that could leave out as much."""

from __future__ import annotations

import tomllib
from dataclasses import replace
from types import SimpleNamespace

import pytest
from conftest import document
from hypothesis import given
from hypothesis import strategies as st

from pipeline.records import Answer
from pipeline.setup.guard import ATTENTION, SHARES, Guard, kind_of, spoken_for
from pipeline.setup.profile import Profile
from pipeline.texts.toml import toml_of

SPARSE_FROM = 13_000
# prompts of 9K to 30K tokens whose attention was verified: whole below SPARSE_FROM, then falling with length
VERIFIED = {9_000: 1.0, 12_500: 1.0, 13_400: 0.74, 15_000: 0.70, 19_000: 0.63, 24_000: 0.56, 30_000: 0.50}


def scored(prompt_tokens, **shares):
    return SimpleNamespace(prompt_tokens=prompt_tokens, **dict.fromkeys(SHARES, 0.5) | shares)


def guard_of(about):
    return Guard.of(Profile(about=about, batch={}))


def verified_on(*scores, tasks=(), sparse_from=None):
    return guard_of({"guard": spoken_for(tasks, scores, sparse_from=sparse_from)})


def answer(prompt_tokens, method="marsinfer", **shares):
    values = dict.fromkeys(SHARES, 0.5) | shares
    return Answer(id="x", row=0, method=method, prompt_tokens=prompt_tokens, **values)


def of_attention(guard, prompt_tokens, share, sparse_tokens=None):
    """The guard's reason for a prompt, of which by default all is block-sparse where that pays."""
    if sparse_tokens is None:
        sparse_tokens = prompt_tokens if prompt_tokens >= SPARSE_FROM else 0
    return guard.after(answer(prompt_tokens, attention_ratio=share), sparse_tokens)


@pytest.fixture
def guard():
    scores = [scored(tokens, attention_ratio=share) for tokens, share in VERIFIED.items()]
    return verified_on(*scores, sparse_from=SPARSE_FROM)


def test_what_is_kept_is_held_against_documents_of_about_this_length():
    guard = verified_on(
        *(scored(1000, ffn_ratio=0.6), scored(1020, ffn_ratio=0.8), scored(40_000, ffn_ratio=0.3)),
        tasks=["qa", "qa"],
    )
    assert guard.tasks == {"qa"}
    assert guard.most["ffn_ratio"] == {1000: 0.8, 1020: 0.8, 40_000: 0.3}
    assert guard.after(answer(1020, ffn_ratio=0.81)) is None
    assert guard.after(answer(1020, ffn_ratio=0.83)) == (
        "flat attention: ffn_ratio is 0.83, and at most 0.80 was calibrated on"
    )
    assert str(guard.after(answer(33_000, ffn_ratio=0.5))).startswith("flat attention: ffn_ratio is 0.50")
    assert str(guard.after(answer(60_000, ffn_ratio=0.5))).startswith("flat attention: ffn_ratio is 0.50")
    assert guard.after(answer(33_000, method="dense", ffn_ratio=1.0)) is None
    assert guard.after(Answer(id="x", row=0, status="error")) is None


@pytest.mark.parametrize(
    ("prompt_tokens", "share", "is_flat"),
    [
        (12_000, 1.0, False),  # whole attention, by its length
        (13_100, 0.75, False),
        (14_000, 0.72, False),
        (14_000, 0.97, True),
        (15_900, 0.97, True),
        (21_000, 0.60, False),
        (21_000, 0.75, True),
        (40_000, 0.45, False),
        (40_000, 0.65, True),
    ],
)
def test_attention_is_compared_only_where_its_blocks_were_chosen(guard, prompt_tokens, share, is_flat):
    reason = of_attention(guard, prompt_tokens, share)
    assert (reason is not None) == is_flat
    assert reason is None or reason.startswith(f"flat attention: {ATTENTION} is {share:.2f}")


def test_a_long_prompt_is_not_compared_where_its_attention_was_whole(guard):
    """As on a device without kernels, and behind a shared beginning that is short."""
    assert of_attention(guard, 20_000, 1.0, sparse_tokens=0) is None


def test_verified_attention_that_was_whole_bounds_nothing():
    guard = verified_on(scored(20_000, attention_ratio=1.0), sparse_from=None)
    assert guard.most[ATTENTION] == {}
    assert of_attention(guard, 20_000, 1.0) is None


@pytest.mark.parametrize(("shared_share", "is_flat"), [(0.71, False), (0.95, True)])
def test_behind_a_shared_beginning_that_beginning_is_compared(guard, shared_share, is_flat):
    """Of 28,000 tokens 14,000 are shared: what stands behind them attends to everything."""
    tokens, shared = 28_000, 14_000
    pairs = {n: n * (n + 1) // 2 for n in (tokens, shared)}
    computed = shared_share * pairs[shared] + pairs[tokens] - pairs[shared]
    reason = of_attention(guard, tokens, computed / pairs[tokens], sparse_tokens=shared)
    assert (reason is not None) == is_flat
    assert reason is None or reason.startswith(f"flat attention: {ATTENTION} is 0.95, ")


def test_a_share_that_was_whole_is_never_exceeded():
    guard = verified_on(scored(100, kept_ratio=1.0))
    assert guard.after(answer(100, kept_ratio=1.0)) is None
    assert guard.tasks == frozenset()


def test_a_short_prompt_may_keep_as_many_tokens_as_a_long_one():
    """A method that keeps 4,000 tokens keeps all of such a prompt; one that keeps all of more is flat."""
    guard = verified_on(*(scored(n, kept_ratio=4_000 / n) for n in (10_000, 20_000)))
    for tokens in (150, 4_000, 7_000, 12_000):
        assert guard.after(answer(tokens, kept_ratio=min(1.0, 4_000 / tokens))) is None
    assert str(guard.after(answer(7_000, kept_ratio=1.0))).startswith("flat attention: kept_ratio is 1.00")


STORED = st.dictionaries(st.integers(1, 200_000), st.floats(0.001, 1.1), min_size=1, max_size=40)


@given(STORED, st.integers(1, 200_000))
def test_documents_like_those_that_were_verified_are_never_flagged(seen, sparse_from):
    scores = [scored(tokens, **dict.fromkeys(SHARES, share)) for tokens, share in seen.items()]
    guard = verified_on(*scores, sparse_from=sparse_from)
    for tokens, share in seen.items():
        again = answer(tokens, **dict.fromkeys(SHARES, share))
        assert guard.after(again, tokens if tokens >= sparse_from else 0) is None


@given(STORED, st.integers(1, 300_000), st.integers(1, 300_000))
def test_bounds_fall_with_length_and_lie_within_what_was_verified(seen, one, other):
    bounds = verified_on(*(scored(n, ffn_ratio=share) for n, share in seen.items())).bounds["ffn_ratio"]
    shorter, longer = sorted((one, other))
    assert bounds.at(shorter) >= bounds.at(longer) * (1 - 1e-9)
    if longer >= min(seen):
        assert min(seen.values()) <= bounds.at(longer) * (1 + 1e-9)
        assert longer < bounds.tokens[0] or bounds.at(longer) <= max(seen.values()) + 1e-4


def test_what_a_profile_stores_does_not_grow_with_the_rows():
    scores = [scored(tokens) for tokens in range(8_192, 32_768, 5)]
    stored = spoken_for([], scores, sparse_from=16_384)["shares"]
    assert {name: len(each) for name, each in stored.items()} == {
        "kept_ratio": 8,
        "ffn_ratio": 8,
        ATTENTION: 4,
    }


def test_a_guard_is_what_its_profile_says(guard):
    about = {"guard": spoken_for(["qa"], [scored(900), scored(14_000)], sparse_from=SPARSE_FROM)}
    read = guard_of(tomllib.loads(toml_of(about)))
    assert read == guard_of(about)
    assert Guard.from_dict(read.as_dict()) == read
    assert sorted(read.as_dict()) == ["longest", "shares", "tasks"]


@pytest.fixture
def of_before():
    """A profile whose shares stand for octaves, of rows of 9,000 to 30,000 tokens."""
    attention = {"8192": 1.0, "16384": 0.66}
    return guard_of({"guard": {"tasks": [], "ffn_ratio": {"8192": 0.8}, ATTENTION: attention}})


@pytest.mark.parametrize(
    ("prompt_tokens", "share", "is_flat"),
    [(12_000, 1.0, False), (14_000, 0.75, False), (14_000, 0.97, True), (20_000, 0.8, True)],
)
def test_profiles_of_before_bound_attention_too(of_before, prompt_tokens, share, is_flat):
    assert (of_attention(of_before, prompt_tokens, share) is not None) == is_flat


def test_profiles_of_before_bound_whole_octaves(of_before):
    assert of_before.bounds["ffn_ratio"].at(8_192) == of_before.bounds["ffn_ratio"].at(16_383) == 0.8
    assert sorted(of_before.as_dict()) == ["longest", "most", "tasks"]  # as outputs that they began have it
    assert Guard.from_dict(of_before.as_dict()) == of_before


def test_a_profile_without_a_guard_speaks_for_all():
    guard = guard_of({})
    assert guard.before(document(300)) is None
    assert guard.after(answer(300, ffn_ratio=1.0)) is None


def test_tasks_and_lengths_are_told_beforehand():
    guard = guard_of({"guard": {"tasks": ["qa"]}, "lengths": {"max": 200}})
    plain = document(300)
    assert guard.before(plain) is None  # the row says no task
    asked = replace(plain, source=replace(plain.source, task="summary"))
    assert guard.before(asked) == "task: the profile was not verified on 'summary'"
    assert str(guard.before(document(301))).startswith("length: 301 tokens are far beyond the 200 ")


def test_a_reason_begins_with_its_kind(guard):
    told = guard_of({"guard": {"tasks": ["qa"]}, "lengths": {"max": 200}})
    asked = replace(document(20), source=replace(document(20).source, task="a: b"))
    reasons = (told.before(asked), told.before(document(301)), of_attention(guard, 14_000, 0.97))
    assert [kind_of(reason) for reason in reasons] == ["task", "length", "flat attention"]
