"""Scoring and selection against their plain references.

The kernels of window scoring run in Triton's interpreter, or on a GPU if there is one.
"""

from __future__ import annotations

import pytest
import torch
from kernel_cases import reduce_by_halves

from pipeline.kernels import reference, scoring
from pipeline.kernels.scoring import window_importance, window_importance_by_head
from pipeline.kernels.segments import Segments
from pipeline.kernels.select import mass_mask, top_mask

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
TYPES = [torch.float32, torch.bfloat16, torch.float16]


def without_kernels(monkeypatch):
    monkeypatch.setattr(scoring, "_kernels", lambda x: None)


def with_kernels(monkeypatch):
    """Launches the kernels; the interpreter is mended where it is wrong, or slow."""
    if GPU:
        return
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # read when the kernels' module is imported
    pytest.importorskip("triton")
    from triton.runtime import interpreter

    from pipeline.kernels import triton_scoring

    multiply = interpreter.InterpreterBuilder.create_dot

    def in_float32(self, a, b, *others):
        """Bfloat16 factors by their values: the interpreter would multiply their bits as integers."""
        return multiply(self, *(widened(self, factor) for factor in (a, b)), *others)

    def widened(builder, factor):
        is_bfloat16 = factor.dtype.scalar == interpreter.tl.bfloat16
        return builder.create_fp_ext(factor, interpreter.tl.float32) if is_bfloat16 else factor

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", in_float32)
    monkeypatch.setattr(interpreter.ReduceOps, "generic_reduce", reduce_by_halves)
    monkeypatch.setattr(scoring, "_kernels", lambda x: triton_scoring)


@pytest.fixture(params=[without_kernels, pytest.param(with_kernels, marks=pytest.mark.slow)])
def either_path(request, monkeypatch):
    request.param(monkeypatch)


def queries_and_keys(segments, heads, kv_heads, head_dim, dtype=torch.float32):
    """Views into one projection, wider than they are, whose other values would show."""
    generator = torch.Generator().manual_seed(segments.total)
    width = (heads + kv_heads) * head_dim
    projected = torch.full((segments.total, width + 24), 1e4)
    projected[:, :width] = torch.randn(segments.total, width, generator=generator) * 1.5
    projected = projected.to(dtype).to(DEVICE)
    q, k = projected[:, :width].split([heads * head_dim, kv_heads * head_dim], dim=1)
    return q.unflatten(1, (heads, head_dim)), k.unflatten(1, (kv_heads, head_dim))


def assert_scores(q, k, segments, window, heads="mean", atol=1e-6):
    scores = window_importance(q, k, segments, window, heads=heads)
    expected = reference.window_importance(q, k, segments, window, heads=heads)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores.double(), expected, rtol=2e-5, atol=atol)
    return scores


@pytest.mark.parametrize("heads", ["mean", "max"])
@pytest.mark.parametrize("lengths", [(1,), (7, 50, 3), pytest.param((129, 64, 65), marks=pytest.mark.slow)])
@pytest.mark.parametrize("dtype", TYPES)
def test_window_importance_equals_the_reference(either_path, lengths, dtype, heads):
    segments = Segments.of(lengths, DEVICE)
    q, k = queries_and_keys(segments, 6, 2, 16, dtype)
    scores = assert_scores(q, k, segments, 50, heads)
    for start, end in segments.ranges():
        total = scores[start:end].sum().item()
        assert total == pytest.approx(1.0, abs=1e-5) if heads == "mean" or end - start == 1 else total > 1.01


@pytest.mark.parametrize("heads", ["mean", "max"])
@pytest.mark.parametrize("shape", [(1, 1, 24), (4, 4, 80), (7, 1, 100), (6, 3, 128), (2, 1, 160)])
@pytest.mark.parametrize("window", [1, 4, pytest.param(66, marks=pytest.mark.slow)])
def test_heads_and_windows_of_any_size(either_path, shape, window, heads):
    segments = Segments.of((70, 1, 133), DEVICE)
    assert_scores(*queries_and_keys(segments, *shape), segments, window, heads)


@pytest.mark.slow
@pytest.mark.parametrize("heads", ["mean", "max"])
@pytest.mark.parametrize("dtype", TYPES)
def test_each_document_may_have_a_window_of_its_own(either_path, dtype, heads):
    segments = Segments.of((40, 9, 140, 1), DEVICE)
    q, k = queries_and_keys(segments, 4, 2, 32, dtype)
    windows = (3, 80, 17, 2)
    scores = assert_scores(q, k, segments, windows, heads)
    for (start, end), window in zip(segments.ranges(), windows, strict=True):
        alone = window_importance(
            q[start:end], k[start:end], Segments.of((end - start,), DEVICE), window, heads=heads
        )
        torch.testing.assert_close(scores[start:end], alone)


def test_scores_by_head_have_the_windows_too(either_path):
    segments = Segments.of((40, 150), DEVICE)
    q, k = queries_and_keys(segments, 6, 2, 32)
    scores_KT = window_importance_by_head(q, k, segments, (7, 20))
    for head in range(2):
        of_group, own = q[:, 3 * head : 3 * head + 3], k[:, head : head + 1]
        expected = reference.window_importance(of_group, own, segments, (7, 20))
        torch.testing.assert_close(scores_KT[head].double(), expected, rtol=2e-5, atol=1e-6)


@pytest.mark.slow
def test_sharp_attention_and_keys_out_of_sight(either_path):
    """Products of hundreds: no weight overflows, and a block that a query does not see makes no NaN."""
    segments = Segments.of((300,), DEVICE)
    q, k = queries_and_keys(segments, 2, 1, 32)
    assert_scores(q * 10, k * 10, segments, 256, "max", atol=1e-4)


@pytest.mark.slow
def test_more_documents_than_a_program_looks_through_at_a_time(monkeypatch):
    with_kernels(monkeypatch)
    pytest.importorskip("triton")
    from pipeline.kernels import triton_scoring

    monkeypatch.setattr(triton_scoring, "DOCUMENTS", 16)
    segments = Segments.of([1 + i % 3 * 70 for i in range(33)], DEVICE)
    assert_scores(*queries_and_keys(segments, 1, 1, 16), segments, 2)


def test_what_does_not_fit_is_refused():
    segments = Segments.of((3, 4))
    q, k = torch.zeros(7, 2, 8), torch.zeros(7, 1, 8)
    with pytest.raises(ValueError, match="1 windows for 2 documents"):
        window_importance(q, k, segments, (3,))
    with pytest.raises(ValueError, match="heads='sum' must be 'mean' or 'max'"):
        window_importance(q, k, segments, 3, heads="sum")


def test_mass_mask_keeps_the_smallest_set_that_reaches_eta():
    scores = torch.tensor([0.1, 0.5, 0.1, 0.3, 2.0, 1.0, 1.0])
    mask = mass_mask(scores, Segments.of((4, 3)), eta=0.8)
    assert mask.tolist() == [False, True, False, True, True, True, True]
    assert mass_mask(scores, Segments.of((4, 3)), eta=0.45).tolist() == [
        False,
        True,
        False,
        False,
        True,
        False,
        False,
    ]


def test_ties_go_to_the_earlier_token():
    scores = torch.ones(6)
    assert mass_mask(scores, Segments.of((4, 2)), eta=0.5).tolist() == [True, True, False, False, True, False]
    assert top_mask(scores, Segments.of((4, 2)), [1, 2]).tolist() == [True, False, False, False, True, True]


def test_top_mask_takes_each_documents_own_count():
    scores = torch.tensor([3.0, 1.0, 2.0, -5.0, 9.0])
    assert top_mask(scores, Segments.of((3, 2)), [2, 1]).tolist() == [True, False, True, False, True]


def test_what_keys_receive_of_the_last_queries(either_path):
    """Of queries that are held alone, each of which counts less than the one after it."""
    segments = Segments.of((150,), DEVICE)
    q, k = queries_and_keys(segments, heads=4, kv_heads=2, head_dim=16)
    got_HT = scoring.attention_received(q[-70:], k, 0.9)
    k_HTd = k.double().repeat_interleave(2, dim=1).transpose(0, 1)
    scores_HQT = q[-70:].double().transpose(0, 1) @ k_HTd.transpose(1, 2) / 4
    future = torch.ones(70, 150, dtype=torch.bool, device=DEVICE).triu(81)
    weights_HQT = scores_HQT.masked_fill(future, float("-inf")).softmax(-1)
    counts = 0.9 ** torch.arange(69, -1, -1, dtype=torch.float64, device=DEVICE)
    expected_HT = (weights_HQT * counts[:, None]).sum(1)
    assert (got_HT - expected_HT).abs().max() < 1e-5


@pytest.mark.parametrize(("judges", "lengths"), [(20, (1, 170, 45)), (64, (3, 1, 30))])
def test_what_spaced_judges_give_the_tokens_before_them(either_path, monkeypatch, judges, lengths):
    """Documents with judges of their own distances; and some judges at a time in plain torch."""
    monkeypatch.setattr(scoring, "JUDGES_AT_ONCE", 7)
    segments = Segments.of(lengths, DEVICE)
    q, k = queries_and_keys(segments, heads=6, kv_heads=2, head_dim=16)
    got_T = scoring.received_attention(q, k, segments, judges)
    expected = []
    for start, end in segments.ranges():
        length, apart = end - start, -(-(end - start) // judges)
        given = [[] for _ in range(length)]
        for judge in range(length - 1, -1, -apart):
            seen = slice(start, start + judge + 1)
            k_HTd = k[seen].double().repeat_interleave(3, dim=1).transpose(0, 1)
            weights_T = (k_HTd @ q[start + judge].double()[..., None] / 4).softmax(1).mean((0, 2))
            for token in range(judge - apart + 1):
                given[token].append(weights_T[token].item() * (judge + 1))
        expected += [sum(each) / len(each) if each else float("inf") for each in given]
    torch.testing.assert_close(got_T.double().cpu(), torch.tensor(expected).double(), rtol=2e-5, atol=1e-6)
