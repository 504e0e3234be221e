"""Products of groups of rows, and the gate of gpt-oss, against each row by itself."""

from __future__ import annotations

import pytest
import torch
from transformers import GptOssConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

from pipeline.kernels import expert_products
from pipeline.kernels.expert_products import (
    Groups,
    clamped_swiglu,
    grouped_fp8_available,
    grouped_fp8_product,
    grouped_product,
)
from pipeline.kernels.fp8 import Fp8Weight
from pipeline.kernels.fused import quantize_rows

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
EXPERTS, CHOSEN = 5, 2


def random(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).bfloat16().to(DEVICE)


def choice(tokens):
    """Of each token two experts, of which nobody has the third and the last."""
    generator = torch.Generator().manual_seed(1)
    names = torch.tensor([0, 1, 3])
    return torch.stack([names[torch.randperm(3, generator=generator)[:CHOSEN]] for _ in range(tokens)]).to(
        DEVICE
    )


def test_rows_are_grouped_by_expert():
    expert_TA = choice(7)
    groups = Groups.of(expert_TA, EXPERTS)
    assert groups.expert_S.tolist() == sorted(expert_TA.flatten().tolist())
    assert groups.ends_E.tolist() == [(expert_TA <= expert).sum().item() for expert in range(EXPERTS)]
    assert groups.ends_E.dtype == torch.int32
    assert torch.equal(groups.expert_S[groups.place_TA], expert_TA)
    x_TD = random(7, 16)
    gathered = groups.gathered(x_TD)
    for token in range(7):
        assert all(torch.equal(gathered[place], x_TD[token]) for place in groups.place_TA[token])
    quantised, scale = quantize_rows(x_TD)
    in_fp8 = groups.gathered(quantised)
    assert torch.equal(in_fp8.float() * groups.gathered(scale), groups.gathered(quantised.float() * scale))


@pytest.fixture(params=[False, True], ids=["plain", "kernel"])
def kernel(request, monkeypatch):
    if GPU or not request.param:
        return
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # read when the kernels' module is imported
    pytest.importorskip("triton")
    from pipeline.kernels import triton_experts

    monkeypatch.setattr(expert_products, "kernels_for", lambda x, module: triton_experts)


@pytest.mark.parametrize("width", [32, 1030])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_weighted_sum(dtype, width, kernel):
    groups = Groups.of(choice(9), EXPERTS)
    made, weights = random(18, width).to(dtype), random(9, CHOSEN, seed=3).to(dtype)
    expected = (made.double()[groups.place_TA] * weights.double()[..., None]).sum(1)
    found = groups.weighted_sum(made, weights)
    assert found.dtype == dtype
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2**-7}[dtype]
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("tokens", [1, 7, 300])
def test_an_fp8_product_is_that_of_each_group(tokens):
    groups = Groups.of(choice(tokens), EXPERTS)
    weights = random(EXPERTS, 48, 64, seed=1)
    weight = Fp8Weight.of(weights)
    assert weight.quantised.shape == (EXPERTS, 48, 64)
    x, scale = quantize_rows(groups.gathered(random(tokens, 64, seed=2)))
    found = grouped_fp8_product(x, scale, weight, groups.ends_E)
    exact = weight.quantised.double() * weight.scale.double().transpose(1, 2)
    expected = torch.einsum("sd,snd->sn", x.double() * scale.double(), exact[groups.expert_S])
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.double(), expected, rtol=2**-7, atol=0.02)
    near = grouped_product(groups.gathered(random(tokens, 64, seed=2)), weights, groups.ends_E).double()
    assert 0.005 < (found.double() - near).norm() / near.norm() < 0.06


@pytest.mark.parametrize("contiguous", [True, False])
def test_weights_of_experts_are_quantised_one_by_one(contiguous):
    weights = random(3, 32, 48) if contiguous else random(3, 48, 32).transpose(1, 2)
    made = Fp8Weight.of(weights)
    for expert in range(3):
        alone = Fp8Weight.of(weights[expert].contiguous())
        assert torch.equal(made.quantised[expert].float(), alone.quantised.float())
        assert torch.equal(made.scale[expert], alone.scale)
    rows = Fp8Weight.of(weights.reshape(96, 48)).shaped((3, 32, 48))
    assert torch.equal(rows.quantised.float(), made.quantised.float())
    assert torch.equal(rows.scale, made.scale)


@pytest.mark.parametrize("width", [96, 1030])
def test_the_gate_is_that_of_stock_transformers(width, kernel):
    """Also where its limits are: a third of these numbers is beyond them."""
    stock = GptOssExperts(GptOssConfig(hidden_size=16, intermediate_size=width, num_local_experts=EXPERTS))
    products, bias = random(40, 2 * width).float() * 8, random(EXPERTS, 2 * width, seed=1).float()
    expert_S = torch.arange(40, device=DEVICE) // 8
    found = clamped_swiglu(products, bias, expert_S)
    expected = stock._apply_gate(products + bias[expert_S])
    assert found.shape == (40, width)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert clamped_swiglu(products.bfloat16(), bias.bfloat16(), expert_S).dtype == torch.bfloat16


def test_where_there_is_a_product_in_fp8(monkeypatch):
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA L4")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    assert grouped_fp8_available(torch.device("cpu")) is None
    assert grouped_fp8_available(gpu) == (
        "experts in FP8 need a GPU of compute capability 9.0 (Hopper); NVIDIA L4 has 8.9"
    )
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert grouped_fp8_available(gpu) is None
    monkeypatch.delattr(torch.nn.functional, "scaled_grouped_mm")
    assert "need a torch with scaled_grouped_mm" in grouped_fp8_available(gpu)
