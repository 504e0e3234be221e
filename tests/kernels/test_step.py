"""What lies between the products of a decode step: the kernels against plain torch, and that in float64.

Kernels run in Triton's interpreter, or on a GPU if there is one.
"""

from __future__ import annotations

import math

import pytest
import torch
from kernel_cases import (
    DEVICE,
    EPS,
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

from pipeline.kernels import fused, step
from pipeline.kernels.decoding import Fp8Scales
from pipeline.kernels.fp8 import Fp8Weight, fp8_linear, fp8_product
from pipeline.kernels.kv_fp8 import KvTarget
from pipeline.kernels.step import Product

pytestmark = pytest.mark.slow

KINDS = ["whole", "biased", "scaled", "scaled, biased"]
SHAPES = [
    (1, 1),
    (3, 24),
    *(pytest.param(shape, marks=pytest.mark.slow) for shape in [(5, 100), (1, 257), (2, 448)]),
]
HEADS = [(1, 1, 1, 24), (3, 4, 2, 24), (4, 3, 3, 80), (2, 7, 1, 128), (2, 6, 2, 100)]


def product(rows, width, dtype, kind, seed=0):
    """Columns of a wider tensor, with scales and a bias as `kind` says."""
    raw, _ = as_columns_of_wider(normal(rows, width, dtype=dtype, seed=seed, scale=3))
    scales = (None, None)
    if "scaled" in kind:
        raw.mul_(1000)
        scales = normal(rows, 1, seed=seed + 1).exp() / 30, normal(1, width, seed=seed + 2).exp() / 30
    bias = normal(width, dtype=dtype, seed=seed + 3) if "biased" in kind else None
    return Product(raw, *scales, bias)


def copied(of):
    """With values that nobody else writes to, in their wider tensor."""
    return of._replace(raw_BN=as_columns_of_wider(of.raw_BN)[0])


def completed64(of):
    values = of.raw_BN.double()
    if of.row_scale_B1 is not None:
        values = values * of.row_scale_B1.double() * of.scale_1N.double()
    return values if of.bias_N is None else values + of.bias_N.double()


def rotary(tokens, head_dim, dtype):
    angles = normal(tokens, head_dim // 2, seed=3, scale=9).repeat(1, 2)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def turned64(x, cos, sin):
    first, second = x.chunk(2, dim=-1)
    return x * cos.double()[:, None] + torch.cat((-second, first), -1) * sin.double()[:, None]


def buffers(slots, kv_heads, head_dim, dtype):
    """Keys whose slots and heads lie apart, and values that lie together."""
    wide = torch.full((slots, kv_heads + 1, head_dim + 8), 5.0, dtype=dtype, device=DEVICE)
    values = torch.full((slots, kv_heads, head_dim), 6.0, dtype=dtype, device=DEVICE)
    return wide[:, :kv_heads, :head_dim], values, wide


@pytest.mark.parametrize("path", ["plain", "kernel"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("shape", HEADS)
def test_heads_are_turned_and_stored_and_nothing_else_is_written(kernels, shape, dtype, kind, path):
    tokens, heads, kv_heads, head_dim = shape
    qkv = product(tokens, (heads + 2 * kv_heads) * head_dim, dtype, kind)
    (cos, sin), places = rotary(tokens, head_dim, dtype), torch.tensor([8, 0, 5, 2], device=DEVICE)[:tokens]
    before, exact = qkv.raw_BN.clone(), completed64(qkv).unflatten(1, (-1, head_dim))
    keys, values, wide = buffers(10, kv_heads, head_dim, dtype)
    call = plain if path == "plain" else lambda function, *arguments: function(*arguments)
    q = call(step.rope_and_store_, qkv, cos, sin, KvTarget(keys, values, places))

    wanted_q, k, v = exact.split((heads, kv_heads, kv_heads), dim=1)
    tolerance = {**TOLERANCES[dtype], "atol": 2e-5}  # of float32 sums that nearly cancel
    torch.testing.assert_close(q, turned64(wanted_q, cos, sin).to(dtype), **tolerance)
    torch.testing.assert_close(keys[places], turned64(k, cos, sin).to(dtype), **tolerance)
    torch.testing.assert_close(values[places], v.to(dtype), **tolerance)
    assert q.data_ptr() == qkv.raw_BN.data_ptr()
    columns = heads * head_dim
    assert torch.equal(qkv.raw_BN[:, columns:], before[:, columns:])
    others = [slot for slot in range(10) if slot not in places.tolist()]
    assert (wide[others] == 5).all()
    assert (wide[:, kv_heads:] == 5).all()
    assert (wide[..., head_dim:] == 5).all()
    assert (values[others] == 6).all()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("shape", HEADS)
def test_without_scales_the_kernel_gives_the_bytes_of_the_separate_steps(kernels, shape, dtype):
    tokens, heads, kv_heads, head_dim = shape
    qkv = product(tokens, (heads + 2 * kv_heads) * head_dim, dtype, "whole")
    (cos, sin), places = rotary(tokens, head_dim, dtype), torch.arange(tokens, device=DEVICE)
    q, k, v = copied(qkv).raw_BN.unflatten(1, (-1, head_dim)).split((heads, kv_heads, kv_heads), dim=1)
    fused.rope_(q, k, cos, sin)
    keys, values, _ = buffers(tokens, kv_heads, head_dim, dtype)
    turned = step.rope_and_store_(qkv, cos, sin, KvTarget(keys, values, places))
    assert torch.equal(values, v)
    for actual, wanted in ((turned, q), (keys, k)):
        # compiled apart, the sums of two products may be rounded in another order
        torch.testing.assert_close(actual, wanted, **(TOLERANCES[dtype] if GPU else {"rtol": 0, "atol": 0}))


@pytest.mark.parametrize("kind", ["whole", "scaled"])
@pytest.mark.parametrize("shape", HEADS)
def test_what_is_stored_in_e4m3_is_what_plain_torch_stores(kernels, shape, kind):
    tokens, heads, kv_heads, head_dim = shape
    qkv = product(tokens, (heads + 2 * kv_heads) * head_dim, torch.bfloat16, kind)
    cos, sin = rotary(tokens, head_dim, torch.bfloat16)
    scales = Fp8Scales(
        keys_LK=normal(7, kv_heads).abs() / 10 + 0.01,
        values_LK=normal(7, kv_heads, seed=1).abs() / 10 + 0.01,
        means_LKd=normal(7, kv_heads, head_dim),
    )
    lines = torch.tensor([6, 1, 1, 3], dtype=torch.int32, device=DEVICE)[:tokens]
    places, stored = torch.tensor([8, 0, 5, 2], device=DEVICE)[:tokens], []
    for call in (plain, lambda function, *arguments: function(*arguments)):
        buffers = [torch.zeros(10, kv_heads, head_dim, device=DEVICE).to(fused.FP8) for _ in range(2)]
        q = call(step.rope_and_store_, copied(qkv), cos, sin, KvTarget(*buffers, places, scales, lines))
        stored.append((q, *(codes(buffer) for buffer in buffers)))
    torch.testing.assert_close(stored[1][0], stored[0][0], **TOLERANCES[torch.bfloat16])
    for mine, plainly in zip(stored[1][1:], stored[0][1:], strict=True):
        assert (mine - plainly).abs().max() <= 1  # a step of e4m3, where sums are rounded in another order
        assert (mine != plainly).float().mean() < 0.02


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")  # numpy's, which computes for the interpreter
class TestRows:
    def test_sums(self, kernels, shape, dtype, kind):
        (total, wider), added = as_columns_of_wider(normal(*shape, dtype=dtype)), product(*shape, dtype, kind)
        expected, others = total.double() + completed64(added), wider.clone()
        others[:, 5 : 5 + shape[1]] = expected
        plainly = total.clone()
        plain(step.add_product_, plainly, added)
        step.add_product_(total, added)
        tolerance = {**TOLERANCES[dtype], "atol": 2e-5}
        torch.testing.assert_close(wider, others, **tolerance)
        torch.testing.assert_close(plainly, expected.to(dtype), **tolerance)

    def test_normed_sums(self, kernels, shape, dtype, kind):
        (total, _), added = as_columns_of_wider(normal(*shape, dtype=dtype)), product(*shape, dtype, kind)
        weight, plainly, summed = normal(shape[1], dtype=dtype), total.clone(), total.clone()
        wanted = plain(step.add_product_normed_, plainly, added, weight, EPS)
        rows = step.add_product_normed_(total, added, weight, EPS)
        step.add_product_(summed, added)
        torch.testing.assert_close(total, summed, **(TOLERANCES[dtype] if GPU else {"rtol": 0, "atol": 0}))
        torch.testing.assert_close(total, plainly, **{**TOLERANCES[dtype], "atol": 2e-5})
        if not GPU:  # where a sum may be rounded another way, and its norm with it
            assert_same_rows(rows, wanted, dtype)
        exact = norm64(total, weight)
        assert ((dequantised(rows) - exact).abs() <= exact.abs() / 12 + exact.abs().amax() / 448 / 512).all()

    def test_gated(self, kernels, shape, dtype, kind):
        rows, width = shape
        gate_up = product(rows, 2 * width, dtype, kind)
        wanted, actual = (
            plain(step.product_silu_mul_quantized, gate_up),
            step.product_silu_mul_quantized(gate_up),
        )
        assert_same_rows(actual, wanted, dtype)
        exact = silu64(completed64(gate_up))
        peaks = exact.abs().amax(1, keepdim=True)
        assert ((dequantised(actual) - exact).abs() <= exact.abs() / 12 + peaks / 448 / 512 + 1e-6).all()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")
@pytest.mark.parametrize("dtype", TYPES)
def test_each_step_is_rounded_before_the_next(kernels, dtype):
    """The stored sum is what is normed, the normed and the gated row in their type are what is quantised."""
    added, weight = product(16, 448, dtype, "scaled"), normal(448, dtype=dtype)
    total = normal(16, 448, dtype=dtype)
    rows = step.add_product_normed_(total, added, weight, EPS)
    gated = step.product_silu_mul_quantized(added)
    rounded = plain(fused.silu_mul, added.completed()).to(dtype)
    for (values, _), (wanted, _) in (
        (rows, plain(fused.rms_norm_quantized, total, weight, EPS)),
        (gated, plain(fused.quantize_rows, rounded)),
    ):
        differing = (codes(values) != codes(wanted)).float().mean().item()
        assert differing < (0.01 if GPU else 0.001)


@pytest.mark.parametrize("width", [24, 448])
def test_a_sum_and_its_norm_are_in_bits_what_two_kernels_make(kernels, width):
    """Of a finished product, as a prefill has it; written to some rows of a larger room."""
    dtype = torch.bfloat16
    (total, _), added = as_columns_of_wider(normal(5, width, dtype=dtype)), product(5, width, dtype, "whole")
    weight, summed = normal(width, dtype=dtype), total + added.raw_BN
    values, scale = fused.rms_norm_quantized(summed, weight, EPS)
    room = fused.empty_fp8(normal(9, width), width)
    before = [codes(each.zero_()).clone() for each in room]
    step.add_product_normed_(total, added, weight, EPS, tuple(each[2:7] for each in room))
    assert torch.equal(total, summed)
    for each, made, untouched in zip(room, (values, scale), before, strict=True):
        assert torch.equal(codes(each[2:7]), codes(made))
        assert torch.equal(codes(each)[[0, 1, 7, 8]], untouched[[0, 1, 7, 8]])


@pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")  # numpy's, which computes for the interpreter
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_rows_that_are_not_finite_are_seen_and_others_are_not_touched(kernels, bad):
    x = normal(3, 64, dtype=torch.bfloat16)
    x[1, 7] = bad
    quantised, scale = fused.quantize_rows(x)
    weight = Fp8Weight.of(normal(64, 64, dtype=torch.bfloat16, seed=1))
    added = Product(fp8_product(quantised, weight), scale, weight.scale)
    total = normal(3, 64, dtype=torch.bfloat16, seed=2)
    rows = step.add_product_normed_(total, added, torch.ones_like(total[0]), EPS)
    for values in (total, dequantised(rows), dequantised(step.product_silu_mul_quantized(added))):
        assert not values[1].isfinite().any()
        assert values[[0, 2]].isfinite().all()


def test_rows_of_zeros_stay_zeros(kernels):
    quantised, scale = fused.quantize_rows(torch.zeros(2, 64, dtype=torch.bfloat16, device=DEVICE))
    weight = Fp8Weight.of(normal(32, 64, dtype=torch.bfloat16))
    total = torch.zeros(2, 32, dtype=torch.bfloat16, device=DEVICE)
    added = Product(fp8_product(quantised, weight), scale, weight.scale)
    values, _ = step.add_product_normed_(total, added, torch.ones_like(total[0]), EPS)
    assert (total == 0).all()
    assert (values.float() == 0).all()


@pytest.mark.parametrize("tokens", [1, 3, 16, 200])
def test_a_completed_product_is_that_of_the_scaled_layer(tokens):
    dtype = torch.bfloat16
    x, scale = plain(fused.quantize_rows, normal(tokens, 256, dtype=dtype))
    weight, bias = Fp8Weight.of(normal(48, 256, dtype=dtype, seed=1)), normal(48, dtype=dtype, seed=2)
    raw = fp8_product(x, weight)
    assert raw.dtype == dtype
    completed = Product(raw, scale, weight.scale, bias).completed()
    expected = x.double() * scale.double() @ (weight.quantised.double() * weight.scale.double().t()).t()
    torch.testing.assert_close(completed.double(), expected + bias.double(), rtol=2**-7, atol=0.05)
    torch.testing.assert_close(completed.to(dtype), fp8_linear(x, scale, weight, bias), rtol=2**-6, atol=0.1)


@pytest.mark.skipif(not GPU, reason="needs a GPU")
def test_the_rows_of_a_large_model_on_a_gpu(kernels):
    dtype = torch.bfloat16
    gate_up, down = product(64, 2 * 18944, dtype, "scaled"), product(64, 8192, dtype, "scaled, biased")
    assert_same_rows(
        step.product_silu_mul_quantized(gate_up), plain(step.product_silu_mul_quantized, gate_up), dtype
    )
    total, weight = normal(64, 8192, dtype=dtype), normal(8192, dtype=dtype)
    expected = total.double() + completed64(down)
    rows = step.add_product_normed_(total, down, weight, EPS)
    torch.testing.assert_close(total, expected.to(dtype), **{**TOLERANCES[dtype], "atol": 2e-5})
    assert_same_rows(rows, plain(fused.rms_norm_quantized, total, weight, EPS), dtype)
