"""Which tokens keep the model's dtype beside fp8."""

from __future__ import annotations

import pytest
import torch

from pipeline.kernels.segments import Segments
from pipeline.model.precision import WINDOW, kept_of, worthwhile
from pipeline.pruning.shape import ModelShape

SHAPE = ModelShape(
    layers=28, hidden=1536, ffn=8960, heads=12, kv_heads=2, head_dim=128, vocab=151936, context=32768
)


@pytest.fixture
def from_1000_tokens(monkeypatch):
    monkeypatch.setattr("pipeline.model.precision.worthwhile", lambda length, *_: length >= 1000)


def test_the_ends_of_long_documents_and_all_of_short_ones_are_kept(from_1000_tokens):
    lengths = (1500, 200, 300, 2000, 1200)
    kept = kept_of(Segments.of(lengths), SHAPE)
    ends = [1500, 4000, 5200]
    assert kept.ranges == ((1500 - WINDOW, 2000), (4000 - WINDOW, 4000), (5200 - WINDOW, 5200))
    assert len(kept.rows) == 500 + WINDOW * len(ends)
    assert kept.rows[[0, 63, 64, 564, -1]].tolist() == [1436, 1499, 1500, 3936 + 0, 5199]
    both = torch.cat([kept.rows, kept.others])
    assert torch.equal(both.sort().values, torch.arange(5200))


def test_nothing_is_split_where_all_tokens_are_kept(from_1000_tokens):
    assert kept_of(Segments.of((100, 900)), SHAPE) is None
    # what is left of a document may be no more than its end, or nothing
    assert kept_of(Segments.of((WINDOW, 0)), SHAPE) is None


def test_of_tokens_selected_those_are_kept_that_are(from_1000_tokens):
    kept = kept_of(Segments.of((1100,)), SHAPE)
    own, others = kept.split(torch.tensor([0, 5, 1035, 1036, 1099]))
    assert own.tolist() == [1036, 1099]
    assert others.tolist() == [0, 5, 1035]


@pytest.mark.parametrize("lengths", [(4000, 3000), (1500, 900, 1200)])
def test_each_token_takes_a_step_in_its_precision(from_1000_tokens, lengths):
    kept = kept_of(Segments.of(lengths), SHAPE)
    hidden_TD, input_T = torch.zeros(sum(lengths), 1), torch.arange(sum(lengths))
    steps = []

    def step(hidden_TD, input_T, *, fp8):
        steps.append((fp8, len(hidden_TD)))
        hidden_TD += input_T[:, None] * 2 + fp8

    kept.in_both_(step, hidden_TD, input_T)
    others = sum(lengths) if len(lengths) == 2 else len(kept.others)
    assert steps == [(False, len(kept.rows)), (True, others)]
    is_kept = torch.isin(input_T, kept.rows)
    assert torch.equal(hidden_TD[:, 0], (input_T * 2 + ~is_kept).float())
    beside = input_T if kept.beside_all is None else kept.others
    merged = kept.merged(-kept.rows.float(), beside.float())
    assert torch.equal(merged, torch.where(is_kept, -input_T, input_T).float())


def test_on_a_gpu_short_documents_are_not_worth_it():
    gpu = torch.device("cuda")
    assert [worthwhile(n, SHAPE, gpu) for n in (5000, 7000)] == [False, True]
    assert worthwhile(1, SHAPE, torch.device("cpu"))
