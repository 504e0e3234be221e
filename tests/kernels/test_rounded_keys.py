"""Keys in int8: what their products with queries lose, and the kernel in Triton's interpreter."""

from __future__ import annotations

import math

import pytest
import torch
from kernel_cases import as_rounded, interpreted

from pipeline.kernels.blocks import rounded_keys
from pipeline.kernels.blocks.rounded_keys import RoundedKeys


@pytest.fixture
def kernels(monkeypatch):
    return interpreted(monkeypatch, "blocks.triton_rounding", "round_keys_kernel")


def biased(tokens=700, heads=4, kv_heads=2, head_dim=64):
    """Queries and keys as real ones are: some channels lie far off, some are far wider than the others."""
    generator = torch.Generator().manual_seed(head_dim)
    q, k = (torch.randn(tokens, n, head_dim, generator=generator) for n in (heads, kv_heads))
    wide = torch.ones(head_dim)
    wide[5], wide[7] = 60, 0.01
    off = torch.zeros(head_dim)
    off[5], off[9] = 100, -80
    return q / wide.sqrt(), k * wide + off


def weights(q, k):
    """(H, Q, T) float64."""
    k = k.double().repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    return (torch.einsum("qhd,thd->hqt", q.double(), k) / math.sqrt(q.shape[2])).softmax(-1)


def test_attention_is_nearly_that_of_the_keys_themselves():
    q, k = biased()
    rounded = RoundedKeys.of(q, k)
    assert rounded.keys_TKd.dtype == torch.int8
    assert rounded.keys_TKd.abs().max() == 127
    wanted, found = weights(q, k), weights(*as_rounded(q, k))
    assert (found - wanted).abs().sum(-1).mean() < 0.02
    # which plain rounding, to 127 parts of the largest, is far from
    unit = k.abs().max() / 127
    assert (weights(q, (k / unit).round() * unit) - wanted).abs().sum(-1).mean() > 0.2


def test_what_all_keys_share_is_of_no_account():
    q, k = biased()
    moved = torch.full((k.shape[2],), 32.0)
    near, far = RoundedKeys.of(q, k.round()), RoundedKeys.of(q, k.round() + moved)
    assert torch.equal(near.keys_TKd, far.keys_TKd)
    assert torch.equal(near.factors_Kd, far.factors_Kd)


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_a_key_that_is_no_number_is_told_by_its_heads_factors(broken):
    q, k = biased()
    k[300, 1, 3] = broken
    rounded = RoundedKeys.of(q, k)
    assert torch.isnan(rounded.factors_Kd[1]).all()
    assert torch.isfinite(rounded.factors_Kd[0]).all()


def test_a_head_whose_scores_would_move_too_far_is_told_by_its_factors():
    q, k = biased()
    k[100:110, 1] *= 90  # of which the steps are so large that all others are next to nothing
    rounded = RoundedKeys.of(q, k)
    assert torch.isnan(rounded.factors_Kd[1]).all()
    assert torch.isfinite(rounded.factors_Kd[0]).all()


def test_how_far_scores_move_is_foretold():
    q, k = biased()
    rounded = RoundedKeys.of(q, k)
    kept = (k.amax(0) + k.amin(0)) / 2 + rounded.keys_TKd * rounded.factors_Kd
    moved = torch.einsum("qhd,thd->hqt", q, (kept - k).repeat_interleave(2, dim=1)) / 8
    power = q.unflatten(1, (2, 2)).square().mean(0).amax(1)
    foretold = ((rounded.factors_Kd.square() * power).sum(1) / (12 * 64)).sqrt()
    torch.testing.assert_close(
        moved.square().mean((1, 2)).sqrt().unflatten(0, (2, 2)).amax(1), foretold, rtol=0.15, atol=0
    )


def test_keys_that_are_all_the_same_and_queries_of_zeros():
    q, k = torch.zeros(300, 2, 16), torch.full((300, 1, 16), 3.0)
    rounded = RoundedKeys.of(q, k)
    assert torch.isfinite(rounded.factors_Kd).all()
    assert not rounded.keys_TKd.any()


@pytest.mark.parametrize(("tokens", "kv_heads", "head_dim"), [(1, 1, 64), (128, 2, 64), (300, 2, 80)])
def test_the_kernel_does_the_same(kernels, monkeypatch, tokens, kv_heads, head_dim):
    q, k = biased(tokens, 2 * kv_heads, kv_heads, head_dim)
    k = torch.cat([k, k], dim=1)[:, :kv_heads]  # with more between tokens than the heads themselves
    wanted = RoundedKeys.of(q, k)
    monkeypatch.setattr(rounded_keys, "_kernels", lambda x: kernels)
    found = RoundedKeys.of(q, k)
    torch.testing.assert_close(found.factors_Kd, wanted.factors_Kd, rtol=1e-6, atol=0)
    apart = (found.keys_TKd.int() - wanted.keys_TKd.int()).abs()
    assert apart.max() <= 1
    assert apart.float().mean() < 0.001
    k = k.clone()
    k[0, 0, 2] = float("nan")
    assert torch.isnan(RoundedKeys.of(q, k).factors_Kd[0, 2])
    k[0] = 1e4
    assert torch.isnan(RoundedKeys.of(q, k).factors_Kd).all() == (tokens > 1)
    q[0, 0, 0] = float("nan")  # which hides how large queries are
    assert torch.isnan(RoundedKeys.of(q, k).factors_Kd[0]).all()
