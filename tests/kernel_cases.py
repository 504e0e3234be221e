"""Inputs and comparisons of the tests of kernels, on a GPU if there is one."""

from __future__ import annotations

import math
from importlib import import_module

import numpy as np
import pytest
import torch

from pipeline.kernels import fused, step
from pipeline.kernels.blocks.rounded_keys import RoundedKeys
from pipeline.kernels.blocks.rounded_values import RoundedValues, in_order

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
EPS = 1e-6
EXACT = 1 if GPU else 0  # on a GPU torch divides by a number through its reciprocal, once rounded more
TYPES = [torch.float32, torch.bfloat16]
TORCH_TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp8e4nv": torch.float8_e4m3fn}
TOLERANCES = {  # float32 sums in another order; bfloat16 is one step where that moves it over a tie
    torch.float32: {"rtol": 1e-5, "atol": 1e-6},
    torch.bfloat16: {"rtol": 2**-7, "atol": 1e-6},
}


def rounding_to_nearest(values, source, target, _):
    """As a GPU converts; the interpreter would truncate, and lose the carry into float8's exponent."""
    source, target = TORCH_TYPES[source.name], TORCH_TYPES[target.name]
    converted = torch.from_numpy(values.copy()).view(source).to(target)
    return converted.view({1: torch.uint8, 2: torch.uint16, 4: torch.float32}[target.itemsize]).numpy()


def interpreted(monkeypatch, module, name):
    """A module of kernels, below `pipeline.kernels`, for Triton's interpreter; `name` is one that it has."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # read when the kernels' module is imported
    pytest.importorskip("triton")
    from triton.runtime import interpreter

    monkeypatch.setattr(interpreter, "_convert_float", rounding_to_nearest)
    found = import_module(f"pipeline.kernels.{module}")
    if not isinstance(getattr(found, name), interpreter.InterpretedFunction):
        pytest.skip("other tests of this process have compiled the kernels for the GPU")
    return found


@pytest.fixture
def kernels(monkeypatch):
    """Has the public functions of `fused` and `step` launch their kernels, which `plain` undoes."""
    if GPU:
        return
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # read when the kernels' module is imported
    pytest.importorskip("triton")
    from triton.runtime import interpreter

    from pipeline.kernels import triton_kernels

    monkeypatch.setattr(interpreter, "_convert_float", rounding_to_nearest)
    for module in (fused, step):
        monkeypatch.setattr(module, "_kernels", lambda x: triton_kernels)


def plain(function, *arguments):
    """The function's path in plain torch, which may write to the arguments as its kernel does."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (fused, step):
            patch.setattr(module, "_kernels", lambda x: None)
        return function(*arguments)


def reduce_by_halves(reduction, inputs):
    """A reduction of the interpreter along one axis, in few calls: its own takes one for every element."""
    (values,) = inputs
    data = values.handle.data
    while data.shape[reduction.axis] > 1:
        halves = (reduction.to_tensor(half, values.dtype) for half in np.split(data, 2, reduction.axis))
        data = reduction.combine_fn.fn(*halves).handle.data
    return [reduction.to_tensor(data.squeeze(reduction.axis), values.dtype)]


def normal(*shape, dtype=torch.float32, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed + math.prod(shape))
    return (torch.randn(*shape, generator=generator) * scale).to(dtype).to(DEVICE)


def as_columns_of_wider(x):
    """The same values with other strides, and the wider tensor that they lie in."""
    wider = torch.full((len(x), x.shape[1] + 13), 7.0, dtype=x.dtype, device=x.device)
    wider[:, 5 : 5 + x.shape[1]] = x
    return wider[:, 5 : 5 + x.shape[1]], wider


def codes(fp8):
    """Float8 as integers in the order of the values; NaN apart."""
    bits = fp8.view(torch.uint8).int()
    ordered = torch.where(bits < 128, bits, 128 - bits)
    return torch.where((bits & 127) == 127, 10_000, ordered)


def assert_same_rows(actual, expected, dtype, steps=1):
    """`steps` of float8 where a normed value may differ in its last bit, 0 for equal bytes and scales."""
    (values, scale), (values_wanted, scale_wanted) = actual, expected
    assert values.dtype == torch.float8_e4m3fn
    assert values.shape == values_wanted.shape
    assert scale.shape == (len(values), 1)
    assert (codes(values) - codes(values_wanted)).abs().max() <= steps
    tolerance = TOLERANCES[dtype] if steps else {"rtol": 0, "atol": 0}
    torch.testing.assert_close(scale, scale_wanted, equal_nan=True, **tolerance)


def dequantised(rows):
    values, scale = rows
    return values.double() * scale.double()


def norm64(x, weight):
    x = x.double()
    return x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * weight.double()


def silu64(gate_up):
    gate, up = gate_up.double().chunk(2, dim=-1)
    return gate / (1 + (-gate).exp()) * up


def as_rounded(q, k):
    """Queries and keys whose products are those that a kernel computes with rounded ones."""
    rounded = RoundedKeys.of(q, k)
    group = q.shape[1] // k.shape[1]
    wide = q.float() * rounded.factors_Kd.repeat_interleave(group, dim=0)
    unit = wide.abs().amax(-1, keepdim=True) / 127
    return (wide / unit).round() * unit, rounded.keys_TKd.float()


def in_eight_bits(q, k, v, blocks, block=128):
    """(Q, H, d) float64: block-sparse attention of what the kernel for Hopper rounds to eight bits."""
    (queries, heads, head_dim), group = q.shape, q.shape[1] // k.shape[1]
    rounded_q, rounded_k = (x.double() for x in as_rounded(q, k))
    values = RoundedValues.of(v)
    place = in_order(torch.arange(values.values_KdT.shape[2], device=v.device))
    plain_KdT = torch.empty_like(values.values_KdT, dtype=torch.float64)
    plain_KdT[:, :, place] = values.values_KdT.double()
    out = torch.zeros(queries, heads, head_dim, dtype=torch.float64, device=q.device)
    counts, lists = blocks.counts.tolist(), blocks.indices.tolist()
    for head in range(heads):
        own = head // group
        for row, start in enumerate(range(0, queries, block)):
            asking = rounded_q[start : start + block, head]
            at = blocks.before * block + torch.arange(start, start + len(asking), device=q.device)
            tiles = []
            for listed in lists[head][row][: counts[head][row]]:
                keys = slice(listed * block, min((listed + 1) * block, len(k)))
                scores = asking @ rounded_k[keys, own].T / math.sqrt(head_dim)
                key = torch.arange(keys.start, keys.stop, device=q.device)
                scores = scores.masked_fill(key > at[:, None], -math.inf)
                top = scores.amax(1, keepdim=True)
                exact = 128 * (scores - top).exp()
                weights = exact.float().to(torch.float8_e4m3fn).double()
                tiles.append((top, weights @ plain_KdT[own, :, keys].T, exact.sum(1, keepdim=True)))
            largest = torch.stack([top for top, _, _ in tiles]).amax(0)
            total = sum((top - largest).exp() * weight for top, _, weight in tiles)
            mixed = sum((top - largest).exp() * part for top, part, _ in tiles)
            out[start : start + block, head] = mixed / total * values.spans_Kd[own] + values.middles_Kd[own]
    return out
