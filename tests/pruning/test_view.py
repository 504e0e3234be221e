"""What a method sees of a layer: scores of its windows, and the operations counted for them."""

from __future__ import annotations

import pytest
import torch

from pipeline.kernels import reference
from pipeline.kernels.segments import Segments
from pipeline.pruning.view import LayerView
from pipeline.records import Spans

LENGTHS = (5, 30)


@pytest.fixture
def view():
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(sum(LENGTHS), heads, 8, generator=generator) for heads in (4, 2, 2))
    segments = Segments.of(LENGTHS)
    return LayerView(
        layer=0,
        queries=q,
        keys=k,
        values=v,
        hidden=torch.zeros(sum(LENGTHS), 16),
        positions=segments.index_in_document_T,
        segments=segments,
        lengths=LENGTHS,
        spans=(Spans(document=(0, 2), question=(2, 3)),) * 2,
    )


@pytest.mark.parametrize(("window", "pairs"), [(8, (25, 240)), ((2, 40), (10, 900))])
@pytest.mark.parametrize("heads", ["mean", "max"])
def test_a_window_counts_no_more_queries_than_the_document_has(view, window, pairs, heads):
    scores = view.window_importance(window, heads=heads)
    expected = reference.window_importance(view.queries, view.keys, view.segments, window, heads=heads)
    assert (scores - expected).abs().max() < 1e-6
    assert view.scored_pairs == pairs
    view.window_importance_by_head(window)
    assert view.scored_pairs == tuple(2 * count for count in pairs)


def test_windows_for_other_documents_are_refused(view):
    with pytest.raises(ValueError, match="3 windows for 2 documents"):
        view.window_importance((1, 2, 3))
