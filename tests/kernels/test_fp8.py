"""Float8 weights and products: against the dequantised product, and against the exact one."""

from __future__ import annotations

import pytest
import torch

from pipeline.kernels import fp8
from pipeline.kernels.fp8 import Fp8Weight, fp8_available, fp8_linear
from pipeline.kernels.fused import quantize_rows

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")


def random(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).bfloat16().to(DEVICE)


def dequantised(weight):
    return weight.quantised.double() * weight.scale.double().t()


def test_a_weight_is_within_half_a_step_of_itself():
    exact = random(48, 64)
    weight = Fp8Weight.of(exact)
    assert weight.quantised.shape == (48, 64)
    assert weight.scale.shape == (1, 48)
    assert ((dequantised(weight) - exact.double()).abs() <= exact.abs() / 16 + 1e-4).all()


@pytest.mark.parametrize("at_once", [1, 64 * 5, 64 * 48])
def test_chunks_change_nothing(monkeypatch, at_once):
    whole = Fp8Weight.of(random(48, 64))
    monkeypatch.setattr(fp8, "VALUES_AT_ONCE", at_once)
    parts = Fp8Weight.of(random(48, 64))
    assert torch.equal(whole.quantised.view(torch.uint8), parts.quantised.view(torch.uint8))
    assert torch.equal(whole.scale, parts.scale)


@pytest.mark.parametrize("shape", [(24, 64), (64, 100)])
def test_sides_that_tensor_cores_cannot_take_are_refused(shape):
    with pytest.raises(ValueError, match=rf"sides divide by 16, got {shape[0]} x {shape[1]}"):
        Fp8Weight.of(random(*shape))


@pytest.mark.parametrize("tokens", [1, 5, 16, 300])
@pytest.mark.parametrize("with_bias", [False, True])
def test_linear_is_the_product_of_what_was_quantised(tokens, with_bias):
    x, scale = quantize_rows(random(tokens, 256))
    weight = Fp8Weight.of(random(48, 256, seed=1))
    bias = random(48, seed=2) if with_bias else None
    result = fp8_linear(x, scale, weight, bias)
    expected = x.double() * scale.double() @ dequantised(weight).t()
    if bias is not None:
        expected += bias.double()
    assert result.dtype == torch.bfloat16
    torch.testing.assert_close(result.double(), expected, rtol=2**-7, atol=0.05)


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_linear_is_near_the_exact_product(scale):
    exact_x, exact_weight = random(64, 512) * scale, random(128, 512, seed=1)
    result = fp8_linear(*quantize_rows(exact_x), Fp8Weight.of(exact_weight)).double()
    expected = exact_x.double() @ exact_weight.double().t()
    error = ((result - expected).norm() / expected.norm()).item()
    assert 0.001 < error < 0.04  # an error of nothing would mean that nothing was quantised


@pytest.mark.parametrize("first", [1, 4, 7])
def test_rows_of_a_larger_tensor_are_as_good_as_a_copy(monkeypatch, first):
    """Also where their scales begin somewhere that cuBLAS does not take."""
    given, real = [], torch._scaled_mm

    def recorded(*arguments, **named):
        given.append(named["scale_a"].data_ptr() % 16)
        return real(*arguments, **named)

    monkeypatch.setattr(torch, "_scaled_mm", recorded)
    weight = Fp8Weight.of(random(48, 64))
    x_TD, scale_T1 = quantize_rows(random(40, 64, seed=1))
    part = slice(first, first + 21)
    found = fp8_linear(x_TD[part], scale_T1[part], weight)
    assert torch.equal(found, fp8_linear(x_TD[part].clone(), scale_T1[part].clone(), weight))
    assert given == [0, 0]


def test_no_tokens_are_fine():
    x, scale = torch.zeros(0, 64, device=DEVICE).to(torch.float8_e4m3fn), torch.ones(0, 1, device=DEVICE)
    assert fp8_linear(x, scale, Fp8Weight.of(random(48, 64))).shape == (0, 48)


def test_infinities_do_not_become_numbers():
    exact = random(3, 64)
    exact[1, 7] = torch.inf
    result = fp8_linear(*quantize_rows(exact), Fp8Weight.of(random(48, 64)))
    assert not result[1].isfinite().any()
    assert result[[0, 2]].isfinite().all()


def test_where_it_runs(monkeypatch):
    cpu, gpu = torch.device("cpu"), torch.device("cuda", 0)
    assert fp8_available(cpu) == "FP8 needs an NVIDIA GPU, and on a CPU would only be slower"
    assert fp8_available(cpu, slow_cpu=True) is None
    assert fp8_available(torch.device("mps")) == "FP8 needs an NVIDIA GPU, and mps is none"
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    reason = "FP8 needs a GPU of compute capability 8.9 or more; NVIDIA A100 has 8.0"
    assert fp8_available(gpu) == reason
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert fp8_available(gpu) is None
