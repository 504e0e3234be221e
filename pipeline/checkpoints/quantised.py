"""What a configuration says of how a checkpoint's weights are quantised, or why it is refused.

A setting that is not known here may change what the stored numbers mean, so that it is refused by name.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from pipeline.errors import ModelError

FP8, GPTQ, AWQ, COMPRESSED, MXFP4 = "fp8", "gptq", "awq", "compressed-tensors", "mxfp4"
MXFP4_FAMILIES = ("gpt_oss",)  # whose names of such tensors are known
FP8_DTYPES = ("F8_E4M3", "F8_E5M2")
NAMES = {"gptq": "GPTQ", "awq": "AWQ", "fp8": "FP8", "hqq": "HQQ", "mxfp4": "MXFP4", "modelopt": "ModelOpt"}
# files in which quantisers wrote it before config.json had a place for it
OWN_FILES = {
    "quantize_config.json": "GPTQ",
    "quant_config.json": "AWQ",
    "quantization_config.json": "a quantiser",
    "hf_quant_config.json": "ModelOpt",
}
GPTQ_BITS, PACKED_BITS = (2, 4, 8), (4, 8)
INTEGER_FORMATS = ("int-quantized", "pack-quantized", "naive-quantized")
FLOAT_FORMATS = ("float-quantized", "naive-quantized")

# settings that are read, and those of how a model was quantised or is run, which leave its numbers alone
_QUANTISING = {
    "damp_percent",
    "damp_auto_increment",
    "dataset",
    "tokenizer",
    "true_sequential",
    "model_seqlen",
}
_QUANTISING |= {"block_name_to_quantize", "module_name_preceding_first_block", "batch_size", "pad_token_id"}
_QUANTISING |= {"max_input_length", "cache_block_outputs", "modules_in_block_to_quantize", "static_groups"}
_QUANTISING |= {"desc_act", "act_group_aware", "sym", "mse", "meta", "lm_head", "model_name_or_path"}
_QUANTISING |= {"model_file_base_name", "offload_to_disk", "offload_to_disk_path"}
_QUANTISING |= {"modules_to_not_convert", "ignored_layers", "modules_to_convert", "version"}
_RUNNING = {"quant_method", "backend", "use_exllama", "disable_exllama", "exllama_config", "use_cuda_fp16"}
_RUNNING |= {"do_fuse", "modules_to_fuse", "fuse_max_seq_len", "dequantize", "run_compressed"}
_RUNNING |= {"use_optimized_inference", "activation_scheme", "quantizer"}
_KNOWN = {
    FP8: {"weight_block_size", "fmt", "scale_fmt"},
    GPTQ: {"bits", "group_size", "checkpoint_format", "format", "pack_dtype", "is_marlin_format"},
    AWQ: {"bits", "group_size", "checkpoint_format", "format", "zero_point", "pack_dtype"},
    COMPRESSED: {
        *("format", "config_groups", "ignore", "kv_cache_scheme", "quantization_status"),
        *("global_compression_ratio", "sparsity_config", "transform_config"),
    },
    MXFP4: set(),
}
_WEIGHT_KNOWN = {"num_bits", "type", "symmetric", "strategy", "group_size", "block_structure", "actorder"}
_WEIGHT_KNOWN |= {"dynamic", "observer", "observer_kwargs", "scale_dtype", "zp_dtype"}


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """How the quantised weights of a checkpoint are to be read."""

    kind: str  # FP8, GPTQ, AWQ, COMPRESSED or MXFP4
    name: str  # in messages
    bits: int = 8  # of an integer code
    group_size: int = 0  # inputs that share a scale; 0: all of them
    symmetric: bool = True  # without zero points, where these are not always there
    zeros_less_one: bool = False  # zero points, as version 1 of GPTQ's format has them
    block: tuple[int, int] | None = None  # rows and columns of a block that has a scale
    notes: tuple[str, ...] = ()  # what a user should know


def scheme_of(model: str, config: PreTrainedConfig) -> Scheme | None:
    """The scheme of a configuration, None where it has none; raises ModelError for one that is not read."""
    found = quantisation(config)
    if not found:
        return None
    kind = str(found.get("quant_method"))
    if kind not in _KNOWN or (kind == MXFP4 and config.model_type not in MXFP4_FAMILIES):
        raise _refused(model, found)
    unread = _unread(found, _KNOWN[kind] | _QUANTISING | _RUNNING)
    if unread:
        raise _refused(model, found, f"by settings that are not read: {', '.join(unread)}")
    try:
        schemes = {FP8: _fp8, GPTQ: _gptq, AWQ: _awq, COMPRESSED: _compressed, MXFP4: _mxfp4}
        return schemes[kind](model, found)
    except ValueError as error:
        raise _refused(model, found, str(error)) from error
    except (TypeError, AttributeError, KeyError) as error:  # a number where there should be a group, or so
        raise _refused(model, found, "by settings of a form that is not read") from error


def quantisation(config: PreTrainedConfig) -> dict[str, Any] | None:
    """What a configuration says of how its weights are quantised."""
    found = getattr(config, "quantization_config", None) or getattr(config, "compression_config", None)
    if found is not None and not isinstance(found, dict):
        found = found.to_dict()
    return found


def check_own_files(model: str, folder: Path) -> None:
    """Raise ModelError for a folder that a quantiser left, in whose configuration nothing is said of it."""
    for name, method in OWN_FILES.items():
        if (folder / name).is_file():
            raise ModelError(
                f"model {model} is quantised with {method} ({name}), of which its config.json says nothing: "
                "give that a quantization_config that says the same, or name another copy of the model"
            )


def _refused(model: str, found: Mapping[str, Any], why: str = "") -> ModelError:
    told = f" {why}" if why else ""
    return ModelError(
        f"model {model} is quantised with {_name_of(found)} (config.json, quantization_config){told}, which "
        "is not supported: name the model that it was made from, unquantised, or a GGUF file of it"
    )


def _name_of(found: Mapping[str, Any]) -> str:
    if found.get("load_in_4bit") or found.get("load_in_8bit"):
        return "bitsandbytes"
    method = str(found.get("quant_method") or "an unknown method")
    form = f" ({found['format']})" if method == COMPRESSED and found.get("format") else ""
    return NAMES.get(method, method) + form


def _unread(found: Mapping[str, Any], known: Collection[str]) -> list[str]:
    """Settings that are not known, and say something."""
    return sorted(
        key for key, value in found.items() if key not in known and value not in (None, False, [], {})
    )


def _fp8(model: str, found: Mapping[str, Any]) -> Scheme:
    if found.get("fmt") not in (None, "e4m3", "float8_e4m3fn"):
        raise ValueError(f"in the format {found['fmt']}")
    static = found.get("activation_scheme") == "static"
    return Scheme(
        kind=FP8, name="FP8", block=_block(found.get("weight_block_size")), notes=_static(model, static)
    )


def _gptq(model: str, found: Mapping[str, Any]) -> Scheme:
    form = str(found.get("checkpoint_format") or found.get("format") or "gptq")
    if form not in ("gptq", "gptq_v2") or found.get("is_marlin_format"):
        raise ValueError(f"in the format {'marlin' if found.get('is_marlin_format') else form}")
    bits = _bits(found.get("bits"), GPTQ_BITS)
    return Scheme(
        kind=GPTQ,
        name="GPTQ",
        bits=bits,
        group_size=_group_size(found),
        zeros_less_one=form == "gptq",
        notes=_dequantised(model, f"GPTQ, {bits} bits"),
    )


def _awq(model: str, found: Mapping[str, Any]) -> Scheme:
    said = (found.get(name) for name in ("version", "checkpoint_format", "format"))
    others = sorted({str(form).lower() for form in said if form} - {"gemm"})
    if others:
        raise ValueError(f"in the format {', '.join(others)}")
    if found.get("zero_point", True) is not True:
        raise ValueError("without zero points")
    _bits(found.get("bits"), (4,))
    notes = _dequantised(model, "AWQ, 4 bits")
    return Scheme(kind=AWQ, name="AWQ", bits=4, group_size=_group_size(found), notes=notes)


def _mxfp4(model: str, found: Mapping[str, Any]) -> Scheme:
    return Scheme(kind=MXFP4, name="MXFP4", notes=_dequantised(model, "MXFP4"))


def _compressed(model: str, found: Mapping[str, Any]) -> Scheme:
    """One scheme for all groups: which layers they mean is told by the tensors themselves."""
    if found.get("quantization_status") not in (None, "compressed", "frozen"):
        raise ValueError(f"with the status {found['quantization_status']}")
    for name in ("sparsity_config", "transform_config"):
        about = found.get(name) or {}
        if about.get("format", "dense") != "dense" or about.get("config_groups"):
            raise ValueError(f"with a {name}")
    groups = found.get("config_groups")
    groups = list(groups.values()) if isinstance(groups, dict) else []
    weights = [each.get("weights") for each in groups]
    if not weights or not all(isinstance(each, dict) for each in weights):
        raise ValueError("without config_groups that say how weights are")
    if any(_meaning(each) != _meaning(weights[0]) for each in weights):
        raise ValueError("in groups of different kinds")
    forms = {found.get("format"), *(each.get("format") for each in groups)} - {None}
    return _group(model, weights[0], forms, _compressed_notes(model, found, groups))


def _group(model: str, weights: Mapping[str, Any], forms: set[Any], notes: tuple[str, ...]) -> Scheme:
    unread = _unread(weights, _WEIGHT_KNOWN)
    if unread:
        raise ValueError(f"by settings that are not read: {', '.join(unread)}")
    kind, strategy = weights.get("type", "int"), weights.get("strategy")
    if kind not in ("int", "float"):
        raise ValueError(f"in numbers of type {kind}")
    known = FLOAT_FORMATS if kind == "float" else INTEGER_FORMATS
    if forms - set(known):
        raise ValueError(f"in {kind}s of the format {', '.join(sorted(map(str, forms)))}")
    bits = _bits(weights.get("num_bits"), (8,) if kind == "float" else PACKED_BITS)
    if strategy not in (None, "tensor", "channel", "block" if kind == "float" else "group"):
        raise ValueError(f"by {strategy}")
    name = f"{COMPRESSED} ({', '.join(sorted(map(str, forms)))})" if forms else COMPRESSED
    if kind == "float":
        block = _block(weights.get("block_structure"))
        return Scheme(kind=COMPRESSED, name="FP8", block=block, notes=notes)
    return Scheme(
        kind=COMPRESSED,
        name=name,
        bits=bits,
        group_size=_group_size(weights) if strategy == "group" else 0,
        symmetric=bool(weights.get("symmetric", True)),
        notes=(*_dequantised(model, f"{name}, {bits} bits"), *notes),
    )


def _meaning(weights: Mapping[str, Any]) -> list[Any]:
    """Of the weights of a group, what their numbers depend on."""
    return [weights.get(name) for name in sorted(_WEIGHT_KNOWN - {"observer", "observer_kwargs", "actorder"})]


def _compressed_notes(
    model: str, found: Mapping[str, Any], groups: Collection[Mapping[str, Any]]
) -> tuple[str, ...]:
    inputs = [each.get("input_activations") or {} for each in groups]
    static = any(each and each.get("dynamic") is False for each in inputs)
    cache = (
        (f"the scales of a K/V cache that {model} brings are not used: --kv-dtype says what it is held in",)
        if found.get("kv_cache_scheme")
        else ()
    )
    return (*_static(model, static), *cache)


def _static(model: str, static: bool) -> tuple[str, ...]:
    if not static:
        return ()
    return (f"the scales of activations that {model} brings are not used: in fp8 each row has its own",)


def _dequantised(model: str, how: str) -> tuple[str, ...]:
    return (f"the weights of {model} ({how}) are dequantised when they are loaded, to --dtype",)


def _bits(bits: Any, known: tuple[int, ...]) -> int:
    if bits not in known or isinstance(bits, bool):
        raise ValueError(f"in {bits} bits")
    return int(bits)


def _group_size(found: Mapping[str, Any]) -> int:
    """Inputs that share a scale; 0 for all of them."""
    size = found.get("group_size")
    if not isinstance(size, int) or isinstance(size, bool) or size == 0 or size < -1:
        raise ValueError(f"in groups of {size}")
    return max(0, size)


def _block(size: Any) -> tuple[int, int] | None:
    """Rows and columns of a block, where blocks have scales; compressed-tensors writes 128x128 too."""
    if size is None:
        return None
    sides = size.split("x") if isinstance(size, str) else size
    try:
        rows, columns = map(int, sides)
    except (TypeError, ValueError):
        raise ValueError(f"in blocks of {size}") from None
    if min(rows, columns) < 1:
        raise ValueError(f"in blocks of {size}")
    return rows, columns
