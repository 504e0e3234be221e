"""Quantised checkpoints: FP8 gives the weights that its scales make of it, others are refused by name."""

from __future__ import annotations

import json

import pytest
import torch
from checkpoints import change_config, copied, opened, refusal, tensors, write

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
        f"model '{folder}' cannot be loaded: the FP8 tensor model.layers.1.mlp.up_proj.weight has no scales "
        f"beside it ({scale}): download it again"
    )
    write(folder, {**found, scale: found[scale][:2].clone()})
    assert (
        "FP8 scales of shape (2, 3) do not fit a weight of shape (96, 64) in blocks of (40, 24)"
        in refusal(folder)
    )
    write(folder, {**found, scale: found[scale].to(torch.uint8)})
    assert f"{scale} holds scales of type U8, which is not supported: name the model" in refusal(folder)


@pytest.mark.parametrize(
    ("config", "name"),
    [
        ({"quant_method": "gptq", "bits": 4}, "GPTQ"),
        ({"quant_method": "awq", "bits": 4}, "AWQ"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes"),
        ({"load_in_8bit": True}, "bitsandbytes"),
        ({"quant_method": "mxfp4"}, "MXFP4"),
        (
            {"quant_method": "compressed-tensors", "format": "pack-quantized"},
            "compressed-tensors (pack-quantized)",
        ),
        ({"quant_method": "never heard"}, "never heard"),
    ],
)
def test_others_are_refused_as_what_they_are(folder, config, name):
    change_config(folder, quantization_config=config)
    assert refusal(folder) == (
        f"model {folder} is quantised with {name} (config.json, quantization_config), which is not "
        "supported: name the model that it was made from, unquantised, or a GGUF file of it"
    )


@pytest.mark.parametrize(("file", "name"), [("quantize_config.json", "GPTQ"), ("quant_config.json", "AWQ")])
def test_quantisers_that_wrote_a_file_of_their_own(folder, file, name):
    (folder / file).write_text(json.dumps({"bits": 4}))
    assert f"is quantised with {name} ({file}), which is not supported" in refusal(folder)
