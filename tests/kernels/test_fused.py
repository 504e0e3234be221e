"""The steps of a layer: plain torch against formulas in float64, and the kernels against plain torch.

Kernels run in Triton's interpreter, or on a GPU if there is one.
"""

from __future__ import annotations

import math

import pytest
import torch
from kernel_cases import (
    DEVICE,
    EPS,
    EXACT,
    GPU,
    TOLERANCES,
    TYPES,
    as_columns_of_wider,
    assert_same_rows,
    codes,
    dequantised,
    norm64,
    normal,
    plain,
    silu64,
)
from torch.nn.functional import rms_norm
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from pipeline.kernels import fused

SHAPES = [
    (1, 1),
    (3, 24),
    *(pytest.param(shape, marks=pytest.mark.slow) for shape in [(5, 100), (1, 257), (2, 448)]),
]


class TestPlain:
    """Against float64, whose quantised values may be off by half a step: 1/16 of the value."""

    def test_silu_mul(self):
        x = normal(7, 60, scale=3)
        torch.testing.assert_close(fused.silu_mul(x).double(), silu64(x), rtol=1e-5, atol=1e-6)
        assert fused.silu_mul(x.bfloat16()).dtype == torch.bfloat16

    @pytest.mark.parametrize("scale", [1e-30, 1e-3, 1.0, 1e30])
    def test_quantize_rows(self, scale):
        x = normal(9, 50, scale=scale)
        rows = fused.quantize_rows(x)
        peak = x.double().abs().amax(1, keepdim=True)
        assert ((dequantised(rows) - x.double()).abs() <= x.abs() / 16 + peak / 448 * 2**-10 * 1.001).all()
        torch.testing.assert_close(rows[1].double(), peak / 448, rtol=1e-6, atol=0)
        assert (rows[0].float().abs().amax(1) == 448).all()

    def test_zeros_have_a_scale_and_stay_zeros(self):
        values, scale = fused.quantize_rows(torch.zeros(3, 20, device=DEVICE))
        assert (scale > 0).all()
        assert (values.float() == 0).all()

    def test_norms(self):
        x, weight = normal(6, 40), normal(40)
        for rows, wanted in (
            (fused.rms_norm_quantized(x, weight, EPS), norm64(x, weight)),
            (fused.silu_mul_quantized(x), silu64(x)),
        ):
            torch.testing.assert_close(dequantised(rows), wanted, rtol=1 / 15, atol=0.02)

    @pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
    def test_what_is_not_finite_is_seen(self, bad):
        x = normal(4, 16)
        x[2, 5] = bad
        values = dequantised(fused.quantize_rows(x))
        assert not values[2].isfinite().any()
        assert values[[0, 1, 3]].isfinite().all()


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("shape", SHAPES)
class TestKernels:
    def test_silu_mul(self, kernels, shape, dtype):
        rows, width = shape
        x, _ = as_columns_of_wider(normal(rows, 2 * width, dtype=dtype, scale=3))
        expected = plain(fused.silu_mul, x)
        torch.testing.assert_close(fused.silu_mul(x), expected, **TOLERANCES[dtype])
        assert_same_rows(fused.silu_mul_quantized(x), plain(fused.silu_mul_quantized, x), dtype)
        assert expected.count_nonzero()

    def test_quantize_rows_gives_equal_bytes(self, kernels, shape, dtype):
        for scale in (1e-38, 1e-6, 1.0, 1e6, 1e37):
            x, _ = as_columns_of_wider(normal(*shape, dtype=dtype, scale=scale))
            assert_same_rows(fused.quantize_rows(x), plain(fused.quantize_rows, x), dtype, steps=EXACT)

    def test_rms_norm(self, kernels, shape, dtype):
        (x, _), weight = as_columns_of_wider(normal(*shape, dtype=dtype)), normal(shape[1], dtype=dtype)
        expected = plain(fused.rms_norm_quantized, x, weight, EPS)
        assert_same_rows(fused.rms_norm_quantized(x, weight, EPS), expected, dtype)


@pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")  # numpy's, which computes for the interpreter
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("value", [0.0, math.inf, -math.inf, math.nan, 3e38, 1e-45])
def test_kernels_treat_extremes_as_plain_torch(kernels, value, dtype):
    x = normal(3, 24, dtype=dtype)
    x[0, 3], x[1] = value, value
    weight = torch.ones(24, dtype=dtype, device=DEVICE)
    assert_same_rows(fused.quantize_rows(x), plain(fused.quantize_rows, x), dtype, steps=EXACT)
    for function, arguments in (
        (fused.rms_norm_quantized, (x, weight, EPS)),
        (fused.silu_mul_quantized, (x,)),
    ):
        assert_same_rows(function(*arguments), plain(function, *arguments), dtype)


@pytest.mark.slow
def test_each_step_is_rounded_before_the_next(kernels):
    """Without that a good part of the bytes would differ from those of the separate steps."""
    dtype = torch.bfloat16
    x, weight = normal(16, 448, dtype=dtype), normal(448, dtype=dtype)
    for (values, _), separate in (
        (fused.silu_mul_quantized(x), plain(fused.silu_mul, x)),
        (fused.rms_norm_quantized(x, weight, EPS), rms_norm(x, weight.shape, weight, EPS)),
    ):
        wanted, _ = plain(fused.quantize_rows, separate)
        differing = (codes(values) != codes(wanted)).float().mean().item()
        assert differing < (0.01 if GPU else 0.001)


def rotary_inputs(tokens, heads, kv_heads, head_dim, dtype):
    """Views into one projection, which holds values besides, and cosines and sines of any angles."""
    projected = normal(tokens, (heads + 2 * kv_heads) * head_dim, dtype=dtype)
    q, k, _ = projected.split([heads * head_dim, kv_heads * head_dim, kv_heads * head_dim], dim=1)
    angles = normal(tokens, head_dim // 2, seed=3, scale=9).repeat(1, 2)
    split = (-1, head_dim)
    return (
        projected,
        q.unflatten(1, split),
        k.unflatten(1, split),
        angles.cos().to(dtype),
        angles.sin().to(dtype),
    )


ROTARY_SHAPES = [(1, 1, 1, 24), (3, 4, 2, 24), (4, 3, 3, 80), (2, 7, 1, 128), (2, 2, 1, 256), (5, 2, 2, 100)]


@pytest.mark.parametrize("shape", ROTARY_SHAPES)
def test_plain_rope_equals_that_of_transformers(shape):
    _, q, k, cos, sin = rotary_inputs(*shape, torch.float32)
    expected = apply_rotary_pos_emb(q, k, cos, sin)
    plain_q, plain_k = q.clone(), k.clone()
    plain(fused.rope_, plain_q, plain_k, cos, sin)
    assert torch.equal(plain_q, expected[0])
    assert torch.equal(plain_k, expected[1])


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("shape", ROTARY_SHAPES)
def test_the_rope_kernel_turns_queries_and_keys_and_nothing_else(kernels, shape, dtype):
    projected, q, k, cos, sin = rotary_inputs(*shape, dtype)
    before = projected.clone()
    expected = apply_rotary_pos_emb(q.float(), k.float(), cos.float(), sin.float())
    fused.rope_(q, k, cos, sin)
    for actual, wanted in zip((q, k), expected, strict=True):
        torch.testing.assert_close(actual, wanted.to(dtype), **TOLERANCES[dtype])
    values = shape[2] * shape[3]
    assert torch.equal(projected[:, -values:], before[:, -values:])


def test_rope_takes_heads_that_lie_apart(kernels):
    wide_q, wide_k = normal(3, 4, 64, dtype=torch.float32), normal(3, 2, 40)
    _, _, _, cos, sin = rotary_inputs(3, 4, 2, 24, torch.float32)
    expected_q, expected_k = wide_q.clone(), wide_k.clone()
    turned = apply_rotary_pos_emb(wide_q[..., 8:32], wide_k[..., :24], cos, sin)
    expected_q[..., 8:32], expected_k[..., :24] = turned
    fused.rope_(wide_q[..., 8:32], wide_k[..., :24], cos, sin)
    torch.testing.assert_close(wide_q, expected_q)
    torch.testing.assert_close(wide_k, expected_k)


@pytest.mark.skipif(not GPU, reason="needs a GPU")
@pytest.mark.parametrize("width", [8192, 32768])
def test_wide_rows_on_a_gpu(width):
    x = normal(300, 2 * width, dtype=torch.bfloat16)
    expected = plain(fused.silu_mul_quantized, x)
    assert_same_rows(fused.silu_mul_quantized(x), expected, torch.bfloat16)
    if width == 8192:
        weight = normal(width, dtype=torch.bfloat16)
        wanted = plain(fused.rms_norm_quantized, x[:, :width], weight, EPS)
        assert_same_rows(fused.rms_norm_quantized(x[:, :width], weight, EPS), wanted, torch.bfloat16)
