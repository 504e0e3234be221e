"""Quantised checkpoints give the weights that their scales make of their codes, or are refused by name."""

from __future__ import annotations

import json
from functools import partial

import pytest
import torch
from checkpoints import change_config, copied, opened, refusal, tensors, write
from packed_weights import awq, gptq, int_quantized, pack_quantized, packed, quantise

from pipeline.checkpoints.dequantising import gptq_zeros
from pipeline.errors import ModelError

GROUP = {"targets": ["Linear"], "weights": {"num_bits": 8, "type": "float", "symmetric": True}}
COMPRESSED = {
    "quant_method": "compressed-tensors",
    "format": "float-quantized",
    "config_groups": {"g": GROUP},
}
FORMS = {  # rows and columns of a block, a scale's name and type, the configuration
    # sides that blocks do not divide
    "blocks": ((40, 24), "_scale_inv", torch.float32, {"quant_method": "fp8", "weight_block_size": [40, 24]}),
    "channels": ((1, None), "_scale", torch.bfloat16, COMPRESSED),
    "tensors": ((None, None), "_scale", torch.float32, COMPRESSED),
    "static": (
        (None, None),
        "_scale_inv",
        torch.float32,
        {"quant_method": "fp8", "activation_scheme": "static"},
    ),
}


@pytest.fixture
def folder(model_folder, tmp_path):
    return copied(model_folder, tmp_path / "model")


def quantised(weight, block, dtype):
    """(FP8, scales, what they make), block by block."""
    rows, columns = (side or whole for side, whole in zip(block, weight.shape, strict=True))
    low, full = torch.zeros_like(weight, dtype=torch.float8_e4m3fn), torch.zeros_like(weight)
    scales = torch.zeros(-(-weight.shape[0] // rows), -(-weight.shape[1] // columns), dtype=dtype)
    for row in range(scales.shape[0]):
        for column in range(scales.shape[1]):
            part = slice(row * rows, (row + 1) * rows), slice(column * columns, (column + 1) * columns)
            scales[row, column] = weight[part].abs().max() / 400
            low[part] = (weight[part] / scales[row, column].float()).to(low.dtype)
            full[part] = low[part].float() * scales[row, column].float()
    return low, scales, full


def make_fp8(folder, form):
    """Quantise a folder; what its weights must be."""
    block, name, dtype, config = FORMS[form]
    found, wanted = tensors(folder), tensors(folder)
    for key in [key for key in found if key.endswith("_proj.weight")]:
        found[key], scales, wanted[key] = quantised(found[key], block, dtype)
        found[key + name] = scales.reshape(()) if form == "tensors" else scales
        if form == "static":
            found[key.replace("weight", "activation_scale")] = torch.ones(())
    write(folder, found)
    change_config(folder, quantization_config=config)
    return wanted


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("form", FORMS)
def test_fp8_weights_are_dequantised(folder, form, dtype):
    wanted = make_fp8(folder, form)
    model = opened(folder, dtype=dtype).load()
    state = model.decoder.model.state_dict()
    assert state.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(state[name], tensor.to(model.dtype)), name


def test_an_fp8_decoder_without_its_prefix(folder):
    wanted = make_fp8(folder, "blocks")
    write(folder, {name.removeprefix("model."): each for name, each in tensors(folder).items()})
    state = opened(folder).load().decoder.model.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in wanted.items())


def test_scales_that_lack_or_do_not_fit(folder):
    make_fp8(folder, "blocks")
    found = tensors(folder)
    scale = "model.layers.1.mlp.up_proj.weight_scale_inv"
    write(folder, {name: each for name, each in found.items() if name != scale})
    assert refusal(folder) == (
        f"model '{folder}' cannot be loaded: the FP8 tensor model.layers.1.mlp.up_proj.weight has no {scale} "
        "beside it: download it again"
    )
    write(folder, {**found, scale: found[scale][:2].clone()})
    assert (
        "FP8 scales of shape (2, 3) do not fit a weight of shape (96, 64) in blocks of (40, 24)"
        in refusal(folder)
    )
    write(folder, {**found, scale: found[scale].to(torch.uint8)})
    assert f"{scale} holds scales of type U8, which is not read" in refusal(folder)


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 16, "desc_act": False, "sym": True}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 16, "zero_point": True, "version": "gemm"}


def compressed(form="pack-quantized", **weights):
    group = {
        "num_bits": 4,
        "type": "int",
        "symmetric": True,
        "strategy": "group",
        "group_size": 16,
        **weights,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": group}},
        "ignore": ["lm_head"],
    }


INTEGERS = {
    "gptq": (gptq, GPTQ),
    "gptq of version 2": (partial(gptq, version=2), {**GPTQ, "checkpoint_format": "gptq_v2", "sym": False}),
    "gptq in act order": (partial(gptq, act_order=True), {**GPTQ, "desc_act": True}),
    "gptq of 8 bits": (partial(gptq, bits=8), {**GPTQ, "bits": 8}),
    "gptq of 2 bits": (partial(gptq, bits=2), {**GPTQ, "bits": 2}),
    "awq": (awq, AWQ),
    "packed": (pack_quantized, compressed()),
    "packed, 8 bits": (partial(pack_quantized, bits=8), compressed(num_bits=8)),
    "packed, with zero points": (partial(pack_quantized, symmetric=False), compressed(symmetric=False)),
    "packed, channels": (partial(pack_quantized, size=1000), compressed(strategy="channel", group_size=None)),
    "packed in act order": (partial(pack_quantized, act_order=True), compressed(actorder="group")),
    "integers": (int_quantized, compressed("int-quantized", num_bits=8, strategy="channel", group_size=None)),
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", INTEGERS)
def test_integer_weights_are_dequantised(folder, kind, dtype):
    make, config = INTEGERS[kind]
    before = tensors(folder)
    wanted = quantise(folder, make, config)
    unloaded = opened(folder, dtype=dtype)
    assert "are dequantised when they are loaded" in unloaded.notes[0]
    model = unloaded.load()
    state = model.decoder.model.state_dict()
    assert state.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(state[name], tensor.to(model.dtype)), name
    name = "model.layers.0.mlp.up_proj.weight"
    error = (wanted[name] - before[name]).norm() / before[name].norm()
    assert (
        0
        < error
        < {2: 0.8, 4: 0.15, 8: 0.01}[
            8 if "8 bits" in kind or kind == "integers" else 2 if "2 bits" in kind else 4
        ]
    )


def test_zero_points_that_borrowed_from_their_neighbours():
    """GPTQ of version 1 takes 1 from whole words, so that a zero point of 0 borrows from the next field."""
    zeros = torch.tensor([[0, 8, 15, 0, 0, 1, 0, 3]])
    less = (packed(zeros, 4).long() - 0x11111111) & 0xFFFFFFFF
    words = (less - ((less >> 31) << 32)).int()
    assert torch.equal(gptq_zeros(words, 4, less_one=True), zeros.byte())
    assert torch.equal(gptq_zeros(packed(zeros, 4), 4, less_one=False), zeros.byte())


LAYER = "model.layers.1.mlp.up_proj"


@pytest.mark.parametrize(
    ("kind", "part", "change", "said"),
    [
        (
            "gptq",
            "scales",
            None,
            f"the GPTQ tensor {LAYER}.qweight has no {LAYER}.scales beside it: download",
        ),
        ("gptq", "scales", lambda t: t[:2], f"{LAYER}.scales is (2, 96), and (4, 96) fits {LAYER}.qweight"),
        ("gptq", "qzeros", lambda t: t[:, :3], f"{LAYER}.qzeros is (4, 3), and (4, 12) fits"),
        ("gptq", "g_idx", lambda t: t[:8], f"{LAYER}.g_idx is (8,), and (64,) fits"),
        ("awq", "qzeros", None, f"the AWQ tensor {LAYER}.qweight has no {LAYER}.qzeros beside it"),
        ("awq", "scales", lambda t: t.int(), f"{LAYER}.scales holds scales of type I32, which is not read"),
        ("packed", "weight_shape", None, f"has no {LAYER}.weight_shape beside it"),
        ("packed", "weight_shape", lambda t: t * 2, f"{LAYER}.weight_packed is (96, 8), and (192, 16) fits"),
        ("packed", "weight_scale", lambda t: t[:, :1], f"{LAYER}.weight_scale is (96, 1), and (96, 4) fits"),
        (
            "packed, with zero points",
            "weight_zero_point",
            None,
            f"has no {LAYER}.weight_zero_point beside it",
        ),
        ("integers", "weight_scale", lambda t: t[:9], f"{LAYER}.weight_scale is (9, 1), and (96, 1) fits"),
    ],
)
def test_parts_that_lack_or_do_not_fit(folder, kind, part, change, said):
    quantise(folder, *INTEGERS[kind])
    found, name = tensors(folder), f"{LAYER}.{part}"
    value = found.pop(name)
    write(folder, found if change is None else {**found, name: change(value)})
    assert said in refusal(folder)


@pytest.mark.parametrize(
    ("kind", "part", "spoil", "said"),
    [
        ("awq", "scales", lambda t: t.fill_(torch.nan), "its scales hold NaN or an infinity"),
        ("gptq", "scales", lambda t: t.fill_(torch.inf), "its scales hold NaN or an infinity"),
        ("packed", "weight_scale", lambda t: t[3].zero_(), "some of its scales are 0, and the weights below"),
        ("gptq", "g_idx", lambda t: t.fill_(1), f"{LAYER}.g_idx does not name each of its 4 groups"),
        ("gptq", "g_idx", lambda t: t.sub_(1), f"{LAYER}.g_idx does not name each of its 4 groups"),
    ],
)
def test_numbers_that_mean_nothing(folder, kind, part, spoil, said):
    quantise(folder, *INTEGERS[kind])
    found = tensors(folder)
    spoil(found[f"{LAYER}.{part}"])
    write(folder, found)
    with pytest.raises(ModelError) as caught:
        opened(folder).load()
    message = str(caught.value)
    assert message.startswith(f"model '{folder}' cannot be loaded: {LAYER}.")
    assert f" is damaged: {said}" in message
    assert len(message.splitlines()) == 1


@pytest.mark.parametrize("value", [0.0, float("nan")])
@pytest.mark.parametrize("form", ["channels", "tensors", "blocks"])
def test_fp8_scales_that_mean_nothing(folder, form, value):
    make_fp8(folder, form)
    found = tensors(folder)
    name = f"{LAYER}.weight{FORMS[form][1]}"
    write(folder, {**found, name: torch.full_like(found[name], value)})
    with pytest.raises(ModelError, match=f"{LAYER}.weight is damaged: "):
        opened(folder).load()


@pytest.mark.parametrize(
    ("config", "name"),
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes"),
        ({"load_in_8bit": True}, "bitsandbytes"),
        ({"quant_method": "mxfp4"}, "MXFP4"),
        ({"quant_method": "never heard"}, "never heard"),
    ],
)
def test_others_are_refused_as_what_they_are(folder, config, name):
    change_config(folder, quantization_config=config)
    assert refusal(folder) == (
        f"model {folder} is quantised with {name} (config.json, quantization_config), which is not "
        "supported: name the model that it was made from, unquantised, or a GGUF file of it"
    )


@pytest.mark.parametrize(
    ("config", "why"),
    [
        ({**GPTQ, "bits": 3}, "in 3 bits"),
        ({**GPTQ, "group_size": 0}, "in groups of 0"),
        ({**GPTQ, "checkpoint_format": "marlin"}, "in the format marlin"),
        ({**GPTQ, "dynamic": {"-:lm_head": {}}}, "by settings that are not read: dynamic"),
        ({**AWQ, "version": "gemv"}, "in the format gemv"),
        ({**AWQ, "checkpoint_format": "marlin"}, "in the format marlin"),
        (compressed(type="uint"), "in numbers of type uint"),
        ({**compressed(), "config_groups": {"group_0": 4}}, "by settings of a form that is not read"),
        ({**AWQ, "zero_point": False}, "without zero points"),
        ({**AWQ, "bits": 8}, "in 8 bits"),
        (compressed("nvfp4-pack-quantized", type="float"), "in floats of the format nvfp4-pack-quantized"),
        (compressed("mxfp4-pack-quantized", type="float"), "in floats of the format mxfp4-pack-quantized"),
        (compressed(strategy="tensor_group"), "by tensor_group"),
        (compressed(unheard_of=1), "by settings that are not read: unheard_of"),
        ({**compressed(), "transform_config": {"config_groups": {"r": {}}}}, "with a transform_config"),
        ({**compressed(), "sparsity_config": {"format": "sparse-24-bitmask"}}, "with a sparsity_config"),
        ({**compressed(), "config_groups": {}}, "without config_groups that say how weights are"),
        ({"quant_method": "fp8", "weight_block_size": [128]}, "in blocks of [128]"),
        ({"quant_method": "fp8", "fmt": "e5m2"}, "in the format e5m2"),
    ],
)
def test_what_is_not_read_of_a_known_method_is_named(folder, config, why):
    change_config(folder, quantization_config=config)
    assert f"(config.json, quantization_config) {why}, which is not supported: name the model" in refusal(
        folder
    )


def test_groups_of_different_kinds(folder):
    config = compressed()
    other = {
        "targets": ["re:.*down.*"],
        "weights": {**config["config_groups"]["group_0"]["weights"], "num_bits": 8},
    }
    config["config_groups"]["group_1"] = other
    change_config(folder, quantization_config=config)
    assert "in groups of different kinds, which is not supported" in refusal(folder)


def test_scales_of_activations_and_of_a_cache_are_told(folder):
    make_fp8(folder, "tensors")
    found = tensors(folder)
    group = {**GROUP, "input_activations": {"num_bits": 8, "type": "float", "dynamic": False}}
    more = {f"{LAYER}.input_scale": torch.ones(()), "model.layers.1.self_attn.k_scale": torch.ones(())}
    write(folder, {**found, **more})
    config = {
        **COMPRESSED,
        "config_groups": {"g": group},
        "kv_cache_scheme": {"num_bits": 8, "type": "float"},
    }
    change_config(folder, quantization_config=config)
    activations, cache, unused = opened(folder).notes
    assert activations.startswith(f"the scales of activations that {folder} brings are not used")
    assert cache.startswith(f"the scales of a K/V cache that {folder} brings are not used")
    assert unused.startswith(f"2 tensors of {folder} are not used: ")


@pytest.mark.parametrize(("file", "name"), [("quantize_config.json", "GPTQ"), ("quant_config.json", "AWQ")])
def test_quantisers_that_wrote_a_file_of_their_own(folder, file, name):
    (folder / file).write_text(json.dumps({"bits": 4}))
    assert f"is quantised with {name} ({file}), of which its config.json says nothing" in refusal(folder)
