"""Linear layers that are loaded in fp8: a checkpoint's own bytes, or quantised one after the other."""

from __future__ import annotations

import pytest
import torch
from checkpoints import bytes_held, copied, dequantised, loaded, opened, tensors
from test_quantised import make_fp8

from pipeline.checkpoints.device_memory import Remedies
from pipeline.errors import ModelError
from pipeline.families.projection import LinearPrecision
from pipeline.kernels.fp8 import Fp8Weight
from pipeline.model.loading import open_model
from pipeline.settings.model_settings import ModelSettings

QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
JOINED = {"qkv": QKV, "output": ("self_attn.o_proj",), "gate_up": ("mlp.gate_proj", "mlp.up_proj")}
JOINED |= {"down": ("mlp.down_proj",)}


@pytest.fixture(autouse=True)
def slow_cpu(monkeypatch):
    monkeypatch.setattr("pipeline.families.configuration.fp8_available", lambda device: None)


@pytest.fixture
def folder(model_folder, tmp_path):
    return copied(model_folder, tmp_path / "model")


@pytest.mark.parametrize("form", ["channels", "tensors"])
def test_fp8_by_rows_is_the_checkpoints_own(folder, form):
    make_fp8(folder, form)
    decoder, found = loaded(folder, linears="fp8"), tensors(folder)
    assert decoder.linears == "fp8"
    for n, layer in enumerate(decoder._layers):
        for part, names in JOINED.items():
            projection = getattr(layer, part)
            weights = [found[f"model.layers.{n}.{name}.weight"] for name in names]
            scales = [found[f"model.layers.{n}.{name}.weight_scale"].float().reshape(-1, 1) for name in names]
            rows = [each.expand(len(weight), 1) for each, weight in zip(scales, weights, strict=True)]
            assert projection.weight is None
            assert torch.equal(
                projection.fp8.quantised.view(torch.uint8), torch.cat(weights).view(torch.uint8)
            )
            assert torch.equal(projection.fp8.scale, torch.cat(rows).t())
    assert all(
        not each.weight.numel()
        for each in decoder.model.model.layers[0].mlp.children()
        if hasattr(each, "weight")
    )


def test_blocks_are_quantised_again_by_rows_at_a_loss_of_fp8s_own_size(folder):
    wanted = make_fp8(folder, "blocks")
    decoder, low = loaded(folder, linears="fp8"), {}
    for n, layer in enumerate(decoder._layers):
        fp8 = layer.down.fp8
        low[f"model.layers.{n}.mlp.down_proj.weight"] = fp8.quantised.float() * fp8.scale.t()
    for name, weight in low.items():
        assert torch.equal(weight, dequantised(Fp8Weight.of(wanted[name].bfloat16())))
        error = (weight - wanted[name]).norm() / wanted[name].norm()
        assert 0.005 < error < 0.04


def test_mixed_holds_both_forms_and_the_fp8_one_is_the_checkpoints(folder):
    wanted = make_fp8(folder, "channels")
    decoder, found = loaded(folder, linears="mixed"), tensors(folder)
    layer, name = decoder._layers[0], "model.layers.0.mlp.down_proj.weight"
    assert torch.equal(layer.down.weight, wanted[name].bfloat16())
    assert torch.equal(layer.down.fp8.quantised.view(torch.uint8), found[name].view(torch.uint8))
    assert layer.qkv.fp8 is None
    assert torch.equal(layer.qkv.weight[:64], wanted["model.layers.0.self_attn.q_proj.weight"].bfloat16())


@pytest.mark.parametrize(
    "precision", [{"linears": "fp8"}, {"linears": "mixed"}, {"ffn": True}, {"linears": "fp8", "ffn": True}]
)
def test_loading_in_fp8_equals_quantising_what_was_loaded(folder, precision):
    early, late = loaded(folder, **precision), loaded(folder)
    late.use_linears(precision.get("linears", "auto"), ffn=precision.get("ffn", False))
    for one, other in zip(early._layers, late._layers, strict=True):
        for part in JOINED:
            mine, theirs = getattr(one, part), getattr(other, part)
            assert (mine.weight is None) == (theirs.weight is None)
            assert mine.weight is None or torch.equal(mine.weight, theirs.weight)
            assert (mine.fp8 is None) == (theirs.fp8 is None)
            if mine.fp8 is not None:
                assert torch.equal(dequantised(mine.fp8), dequantised(theirs.fp8))


def test_random_weights_are_quantised_as_they_are_drawn():
    unloaded = open_model(ModelSettings(model="random:tiny", device="cpu", dtype="bfloat16"))
    in_fp8, full = unloaded.load(LinearPrecision(linears="fp8")).decoder, unloaded.load().decoder
    for one, other in zip(in_fp8._layers, full._layers, strict=True):
        assert one.down.weight is None
        assert torch.equal(dequantised(one.down.fp8), dequantised(Fp8Weight.of(other.down.weight)))
    head, other = in_fp8.model.lm_head.weight, full.model.lm_head.weight
    assert torch.equal(head, other)
    assert head.float().std() > 0.01


@pytest.mark.parametrize("precision", [{}, {"linears": "fp8"}, {"linears": "mixed"}])
def test_the_memory_that_is_foretold_is_that_of_the_weights(folder, precision):
    foretold = opened(folder, dtype="bfloat16").memory(LinearPrecision(**precision))
    assert foretold.held == bytes_held(loaded(folder, **precision))
    assert foretold.most > foretold.held


def test_a_model_that_cannot_fit_is_refused_before_it_is_read(folder, monkeypatch):
    unloaded = opened(folder)
    monkeypatch.setattr("pipeline.model.loading.free_memory", lambda device: 300_000)
    monkeypatch.setattr(
        "pipeline.checkpoints.stored_matrices.read_tensor", lambda stored: pytest.fail("read")
    )
    with pytest.raises(ModelError) as caught:
        unloaded.load()
    assert str(caught.value) == (
        f"model {folder} does not fit on CPU: loading its weights takes 0.000742 GB, and 0.0003 GB are free; "
        "take --dtype bfloat16 or a smaller model"
    )
    remedies = Remedies(weights=("--linear-dtype fp8",))  # which who loads it has a flag for, and can give
    with pytest.raises(ModelError, match=r"are free; take --linear-dtype fp8 or a smaller model$"):
        opened(folder, dtype="bfloat16").load(remedies=remedies)
