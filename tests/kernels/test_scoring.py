"""Scoring and selection against their plain references."""

from __future__ import annotations

import pytest
import torch

from pipeline.kernels import reference
from pipeline.kernels.scoring import window_importance
from pipeline.kernels.segments import Segments
from pipeline.kernels.select import mass_mask, top_mask


@pytest.mark.parametrize("lengths", [(1,), (7, 50, 3), (129, 64, 65)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_window_importance_equals_the_reference(lengths, dtype):
    segments = Segments.of(lengths)
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(segments.total, 6, 16, generator=generator).to(dtype)
    k = torch.randn(segments.total, 2, 16, generator=generator).to(dtype)
    scores = window_importance(q, k, segments, window=50)
    expected = reference.window_importance(q, k, segments, window=50)
    assert (scores - expected).abs().max() < 1e-6
    for start, end in segments.ranges():
        assert scores[start:end].sum().item() == pytest.approx(1.0, abs=1e-5)


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
