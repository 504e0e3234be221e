"""Values in e4m3: what is lost of them, where they stand, and the kernel in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import interpreted

from pipeline.kernels.blocks import rounded_values
from pipeline.kernels.blocks.rounded_values import RoundedValues, in_order


@pytest.fixture
def kernels(monkeypatch):
    return interpreted(monkeypatch, "blocks.triton_rounding", "round_values_kernel")


def values(tokens=300, heads=2, head_dim=16):
    generator = torch.Generator().manual_seed(tokens)
    v = torch.randn(tokens, heads, head_dim, generator=generator)
    v[..., 3] = v[..., 3] * 0.01 + 40  # which all tokens have nearly in common
    v[..., 5] *= 1000
    return v


def as_kept(rounded, tokens):
    place = in_order(torch.arange(rounded.values_KdT.shape[2]))
    kept_KdT = torch.empty_like(rounded.values_KdT, dtype=torch.float32)
    kept_KdT[..., place] = rounded.values_KdT.float()
    assert not kept_KdT[..., tokens:].any()
    return (kept_KdT[..., :tokens] * rounded.spans_Kd[..., None] + rounded.middles_Kd[..., None]).permute(
        2, 0, 1
    )


@pytest.mark.parametrize("tokens", [1, 128, 300])
def test_values_are_kept_but_for_the_last_bits_of_what_sets_them_apart(tokens):
    v = values(tokens)
    rounded = RoundedValues.of(v)
    assert rounded.values_KdT.shape[2] % 128 == 0
    apart = (v - v.mean(0)).abs()
    assert ((as_kept(rounded, tokens) - v).abs() <= apart / 16 + apart.amax(0) / 448 / 512 + 1e-5).all()


def test_each_16_tokens_stand_in_the_order_in_which_threads_hold_their_weights():
    """A thread of four has two neighbours of each eight columns of a product, and four of the operand."""
    held = [8 * b + 2 * c + e for c in range(4) for b in range(2) for e in range(2)]
    assert in_order(torch.arange(32)).tolist() == held + [16 + each for each in held]


@pytest.mark.parametrize("broken", [float("nan"), float("inf"), float("-inf")])
def test_a_value_that_is_no_number_is_told_by_its_channel(broken):
    v = values()
    v[200, 1, 2] = broken
    spans = RoundedValues.of(v).spans_Kd
    assert not torch.isfinite(spans[1, 2])
    assert torch.isfinite(spans).sum() == spans.numel() - 1


def test_values_that_are_all_the_same_are_kept():
    v = torch.full((200, 1, 16), 1.7)
    assert torch.equal(as_kept(RoundedValues.of(v), 200), v)


@pytest.mark.parametrize("tokens", [1, 128, 300])
def test_the_kernel_does_the_same(kernels, monkeypatch, tokens):
    v = torch.cat([values(tokens), values(tokens)], dim=1)[:, 1:3]  # with more between tokens than the heads
    wanted = RoundedValues.of(v)
    monkeypatch.setattr(rounded_values, "_kernels", lambda x: kernels)
    found = RoundedValues.of(v)
    assert torch.equal(found.spans_Kd, wanted.spans_Kd)
    kept, ought = found.values_KdT.float(), wanted.values_KdT.float()
    is_near = (
        kept - ought
    ).abs() <= ought.abs() / 8 + 1 / 512  # a step, where it is rounded from between two
    assert is_near.all()
    assert (kept == ought).float().mean() > 0.99
