"""Experts of published checkpoints: quantised one by one, or all in one tensor, read as their bytes say."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from checkpoints import (
    bytes_held,
    change_config,
    copied,
    dequantised,
    loaded,
    opened,
    refusal,
    tensors,
    write,
)
from family_cases import model_of
from packed_weights import awq, gptq, int_quantized, pack_quantized, quantise
from test_quantised import AWQ, FORMS, GPTQ, compressed, make_fp8
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from pipeline.checkpoints.random_weights import byte_tokenizer
from pipeline.errors import ModelError
from pipeline.families.projection import LinearPrecision
from pipeline.kernels.fp8 import Fp8Weight

EXPERTS, STEM = 8, "model.layers.{}.mlp.experts.{}.{}.weight"
MADE_BY = {
    "gptq": (gptq, GPTQ),
    "awq": (awq, AWQ),
    "packed integers": (pack_quantized, compressed()),
    "integers": (int_quantized, compressed("int-quantized", num_bits=8, strategy="channel")),
    **{form: (partial(make_fp8, form=form), None) for form in FORMS},
}


@pytest.fixture(autouse=True)
def slow_cpu(monkeypatch):
    monkeypatch.setattr("pipeline.families.configuration.fp8_available", lambda device: None)


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """Folders of models in bfloat16, by case."""

    def save(name):
        folder = tmp_path_factory.mktemp(name)
        model_of(name, torch.bfloat16).model.save_pretrained(folder)
        byte_tokenizer().save_pretrained(folder)
        return folder

    return {name: save(name) for name in ("qwen3_moe", "gpt_oss-windows")}


@pytest.fixture
def folder(published, tmp_path):
    return copied(published["qwen3_moe"], tmp_path / "model")


@pytest.fixture
def oss(published, tmp_path):
    return copied(published["gpt_oss-windows"], tmp_path / "model")


def quantised(folder, kind):
    """Quantise a folder; what its weights must be."""
    make, config = MADE_BY[kind]
    return make(folder) if config is None else quantise(folder, make, config)


def of_all(wanted, layer, *parts):
    """(E, N, D) of tensors that hold the matrices of each expert, of some parts end to end."""
    matrices = [
        torch.cat([wanted[STEM.format(layer, expert, part)] for part in parts]) for expert in range(EXPERTS)
    ]
    return torch.stack(matrices)


def pairs(decoder, wanted):
    """Each layer's projections of experts, and what their weights must be."""
    for n, layer in enumerate(decoder._layers):
        yield layer.experts.gate_up, of_all(wanted, n, "gate_proj", "up_proj")
        yield layer.experts.down, of_all(wanted, n, "down_proj")


@pytest.mark.parametrize("kind", MADE_BY)
def test_experts_are_dequantised(folder, kind):
    wanted = quantised(folder, kind)
    for projection, expected in pairs(loaded(folder), wanted):
        assert torch.equal(projection.weight, expected.bfloat16())
        assert projection.fp8 is None


@pytest.mark.parametrize("form", ["channels", "tensors"])
def test_experts_in_fp8_by_rows_are_the_checkpoints_own(folder, form):
    wanted = make_fp8(folder, form)
    found = {name: each.view(torch.uint8) for name, each in tensors(folder).items() if name in wanted}
    decoder = loaded(folder, linears="fp8")
    for projection, stored in pairs(decoder, found):
        assert projection.weight is None
        assert torch.equal(projection.fp8.quantised.view(torch.uint8), stored)
    for projection, expected in pairs(decoder, wanted):
        assert torch.equal(dequantised(projection.fp8).bfloat16(), expected)


def test_blocks_of_experts_are_quantised_again_by_rows_at_a_loss_of_fp8s_own_size(folder):
    wanted = make_fp8(folder, "blocks")
    for projection, expected in pairs(loaded(folder, linears="fp8"), wanted):
        low = dequantised(projection.fp8)
        assert torch.equal(low, dequantised(Fp8Weight.of(expected.bfloat16())))
        assert 0.005 < (low - expected).norm() / expected.norm() < 0.04


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss-windows"])
@pytest.mark.parametrize(
    "precision", [{"linears": "fp8"}, {"linears": "mixed"}, {"ffn": True}, {"linears": "mixed", "ffn": True}]
)
def test_loading_in_fp8_equals_quantising_what_was_loaded(published, name, precision):
    early, late = loaded(published[name], **precision), loaded(published[name])
    late.use_linears(precision.get("linears", "auto"), ffn=precision.get("ffn", False))
    for one, other in zip(early._layers, late._layers, strict=True):
        for part in ("gate_up", "down"):
            mine, theirs = getattr(one.experts, part), getattr(other.experts, part)
            assert (mine.weight is None) == (theirs.weight is None) == ("ffn" not in precision)
            assert mine.weight is None or torch.equal(mine.weight, theirs.weight)
            assert torch.equal(dequantised(mine.fp8), dequantised(theirs.fp8))


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss-windows"])
@pytest.mark.parametrize("precision", [{}, {"linears": "fp8"}, {"linears": "mixed"}, {"ffn": True}])
def test_the_memory_that_is_foretold_is_that_of_the_weights(published, name, precision):
    foretold = opened(published[name], dtype="bfloat16").memory(LinearPrecision(**precision))
    assert foretold.held == bytes_held(loaded(published[name], **precision))
    assert foretold.most > foretold.held


def make_mxfp4(folder):
    """Random codes and powers in place of all experts' matrices; what these must be, by transformers."""
    found, wanted = tensors(folder), tensors(folder)
    generator = torch.Generator().manual_seed(0)
    for key in [key for key in found if key.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        experts, inputs, outputs = found.pop(key).shape
        shape = (experts, outputs, inputs // 32)
        blocks = torch.randint(0, 256, (*shape, 16), generator=generator, dtype=torch.uint8)
        scales = torch.randint(115, 124, shape, generator=generator, dtype=torch.uint8)
        found |= {f"{key}_blocks": blocks, f"{key}_scales": scales}
        wanted[key] = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
    write(folder, found)
    config = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}
    change_config(folder, quantization_config=config)
    return wanted


def test_mxfp4_is_dequantised(oss):
    wanted = make_mxfp4(oss)
    model = opened(oss, dtype="float32").load()
    assert model.notes == (f"the weights of {oss} (MXFP4) are dequantised when they are loaded, to --dtype",)
    state = model.decoder.model.state_dict()
    assert state.keys() == wanted.keys()
    assert all(torch.equal(state[name], tensor.float()) for name, tensor in wanted.items())


def test_mxfp4_in_fp8(oss):
    wanted = make_mxfp4(oss)
    for n, layer in enumerate(loaded(oss, linears="fp8")._layers):
        for part, projection in (("gate_up_proj", layer.experts.gate_up), ("down_proj", layer.experts.down)):
            rows_first = wanted[f"model.layers.{n}.mlp.experts.{part}"].transpose(1, 2)
            assert projection.weight is None
            assert torch.equal(dequantised(projection.fp8), dequantised(Fp8Weight.of(rows_first.bfloat16())))


def test_mxfp4_that_is_damaged(oss):
    make_mxfp4(oss)
    found = tensors(oss)
    name = "model.layers.1.mlp.experts.down_proj"
    write(oss, {key: each for key, each in found.items() if key != f"{name}_scales"})
    assert f"the MXFP4 tensor {name}_blocks has no {name}_scales beside it: download it again" in refusal(oss)
    write(oss, {**found, f"{name}_scales": found[f"{name}_scales"][:, :-1].clone()})
    assert "MXFP4 scales of shape (6, 63, 3) do not fit the blocks " in refusal(oss)
    write(oss, {**found, f"{name}_scales": found[f"{name}_scales"].to(torch.int32)})
    assert "are U8 and I32, and MXFP4 is bytes: download it again" in refusal(oss)
    write(
        oss,
        {
            **found,
            f"{name}_blocks": found[f"{name}_blocks"][:-1],
            f"{name}_scales": found[f"{name}_scales"][:-1],
        },
    )
    assert f"of other shapes than a gpt_oss model of this configuration: {name} is (5, 96, 64)" in refusal(
        oss
    )
    scales = found[f"{name}_scales"].clone()
    scales[2, 3, 1] = 255
    write(oss, {**found, f"{name}_scales": scales})
    with pytest.raises(ModelError, match=f"{name}_scales is damaged, some are no numbers"):
        opened(oss).load()
