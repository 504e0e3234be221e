"""Checkpoints that are quantised: FP8 weights are dequantised at loading, others refused as what they are.

An FP8 weight stands beside its scales, one for the tensor, for each output channel or for each block; shapes
tell which. The result is the same on every device, and needs no other package.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import PreTrainedConfig, PreTrainedModel

from pipeline.checkpoints.safetensor_files import Stored
from pipeline.errors import ModelError

SCALES = (".weight_scale_inv", ".weight_scale")  # of DeepSeek's form, of compressed-tensors
SCALE_DTYPES = ("F32", "BF16", "F16")
FP8_DTYPES = ("F8_E4M3", "F8_E5M2")
NAMES = {"gptq": "GPTQ", "awq": "AWQ", "fp8": "FP8", "hqq": "HQQ", "mxfp4": "MXFP4", "modelopt": "ModelOpt"}
# files in which quantisers wrote it before config.json had a place for it
OWN_FILES = {
    "quantize_config.json": "GPTQ",
    "quant_config.json": "AWQ",
    "quantization_config.json": "a quantiser",
    "hf_quant_config.json": "ModelOpt",
}


def quantisation(config: PreTrainedConfig) -> dict[str, Any] | None:
    """What a configuration says of how its weights are quantised."""
    found = getattr(config, "quantization_config", None) or getattr(config, "compression_config", None)
    if found is not None and not isinstance(found, dict):
        found = found.to_dict()
    return found


def check_quantisation(model: str, config: PreTrainedConfig) -> None:
    """Raise ModelError for a configuration of weights that are quantised otherwise than in FP8."""
    found = quantisation(config)
    if found and not _is_fp8(found):
        raise _refused(model, _name_of(found), "config.json, quantization_config")


def check_own_files(model: str, folder: Path) -> None:
    """The same of a folder, in whose configuration nothing is said of it."""
    for name, method in OWN_FILES.items():
        if (folder / name).is_file():
            raise _refused(model, method, name)


def _refused(model: str, method: str, where: str) -> ModelError:
    return ModelError(
        f"model {model} is quantised with {method} ({where}), which is not supported: name the model that it "
        "was made from, unquantised, or a GGUF file of it"
    )


def _name_of(found: Mapping[str, Any]) -> str:
    if found.get("load_in_4bit") or found.get("load_in_8bit"):
        return "bitsandbytes"
    method = str(found.get("quant_method") or "an unknown method")
    form = f" ({found['format']})" if method == "compressed-tensors" and found.get("format") else ""
    return NAMES.get(method, method) + form


def _is_fp8(found: Mapping[str, Any]) -> bool:
    method = found.get("quant_method")
    if method == "fp8":
        return True
    weights = _weight_groups(found)
    eight_bit_floats = all(each.get("type") == "float" and each.get("num_bits") == 8 for each in weights)
    return method == "compressed-tensors" and bool(weights) and eight_bit_floats


def _weight_groups(found: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    groups = found.get("config_groups")
    values = groups.values() if isinstance(groups, dict) else ()
    return [each.get("weights") or {} for each in values if isinstance(each, dict)]


def _block(found: Mapping[str, Any]) -> tuple[int, int] | None:
    """Rows and columns of a block, where blocks have scales."""
    sizes = [found.get("weight_block_size"), *(each.get("block_structure") for each in _weight_groups(found))]
    for size in sizes:
        if isinstance(size, list | tuple) and len(size) == 2 and all(isinstance(each, int) for each in size):
            return size[0], size[1]
    return None


def without_quantisation(config: PreTrainedConfig) -> PreTrainedConfig:
    """A configuration under which transformers reads FP8 weights as they are, without their scales."""
    plain = copy.deepcopy(config)
    for name in ("quantization_config", "compression_config"):
        if hasattr(plain, name):
            delattr(plain, name)
    return plain


def scales_of(stored: Mapping[str, Stored], config: PreTrainedConfig) -> dict[str, Stored]:
    """The scales of a checkpoint by the name of their FP8 weight; none where the configuration has none.

    Raises ValueError for an FP8 weight whose scales are not there, or do not fit it.
    """
    found = quantisation(config)
    if not found:
        return {}
    weights = {name: each for name, each in stored.items() if each.dtype in FP8_DTYPES}
    scales = {name: _scale_of(name, stored) for name in weights}
    for name, weight in weights.items():
        _block_of(weight.shape, scales[name].shape, _block(found))
    return scales


def _scale_of(weight: str, stored: Mapping[str, Stored]) -> Stored:
    stem = weight.removesuffix(".weight")
    scale = next((stored[stem + end] for end in SCALES if stem + end in stored), None)
    if scale is None:
        raise ValueError(
            f"the FP8 tensor {weight} has no scales beside it ({stem}{SCALES[0]}): download it again"
        )
    if scale.dtype not in SCALE_DTYPES:
        raise ValueError(
            f"{scale.name} holds scales of type {scale.dtype}, which is not supported: name the "
            "model that it was made from, unquantised, or a GGUF file of it"
        )
    return scale


def _block_of(
    weight: tuple[int, ...], scale: tuple[int, ...], block: tuple[int, int] | None
) -> tuple[int, int]:
    """Rows and columns of a weight that one element of its scales is for."""
    rows, columns = weight
    if all(side == 1 for side in scale):
        return rows, columns
    if block is not None and scale == (-(-rows // block[0]), -(-columns // block[1])):
        return block
    if scale in ((rows,), (rows, 1)):
        return 1, columns
    raise ValueError(
        f"FP8 scales of shape {scale} do not fit a weight of shape {weight} in blocks of {block}: "
        "download it again, or mend the quantization_config of config.json"
    )


@torch.no_grad()
def apply_scales_(model: PreTrainedModel, scales: Mapping[str, Stored], config: PreTrainedConfig) -> None:
    """Multiply weights, which were read as they are, by `scales`, whose keys are the model's parameters."""
    block = _block(quantisation(config) or {})
    for name, stored in scales.items():
        with safe_open(stored.file, framework="pt") as file:
            scale = file.get_tensor(stored.name)
        weight = model.get_parameter(name)
        rows, columns = _block_of(tuple(weight.shape), tuple(scale.shape), block)
        grid = scale.float().to(weight.device).reshape(-(-weight.shape[0] // rows), -1)
        full = grid.repeat_interleave(rows, 0)[: weight.shape[0]]
        full = full.repeat_interleave(columns, 1)[:, : weight.shape[1]]
        weight.copy_(weight.float() * full)
