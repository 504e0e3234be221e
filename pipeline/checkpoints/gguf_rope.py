"""RoPE as GGUF files tell it, as the `rope_parameters` of transformers.

A scaling is told by settings (linear, YaRN), or by a divisor of each frequency: in the tensor
`rope_freqs.weight`, as converters write the scaling of Llama 3, or in two tensors, LongRoPE's. For the
divisors of Llama 3 we find the parameters that give them, so that the configuration says what the model
does; what cannot be said that way is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.checkpoints.gguf_header import GgufError
from pipeline.families.configuration import ROPE_TYPES

THETA = 10_000.0  # llama.cpp's, where a file names none
TOLERANCE = 1e-4  # relative, of divisors in float32
LLAMA_3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
# settings of a scaling, by what transformers calls them
YARN = {
    "factor": "factor",
    "original_context_length": "original_max_position_embeddings",
    "yarn_attn_factor": "attention_factor",
    "yarn_beta_fast": "beta_fast",
    "yarn_beta_slow": "beta_slow",
}
# settings that change rotations in ways that transformers' models have not, by the value that changes nothing
NEUTRAL = {"yarn_ext_factor": 1.0, "yarn_log_multiplier": 0.0}
ALWAYS_NEUTRAL = {"attn_factor": 1.0, "alpha": 0.0}  # of a RoPE of any kind

Divisors = NDArray[np.float32]


def rope_parameters(settings: Mapping[str, Any], head_dim: int, divisors: Divisors | None) -> dict[str, Any]:
    """`settings` are the file's, without the architecture in front; `divisors`, of each of head_dim / 2
    frequencies, if it has them.

    Raises GgufError, without the file's name, for a scaling that transformers' model could not do.
    """
    theta = float(settings.get("rope.freq_base", THETA))
    begin = "rope.scaling."
    scaling = {key.removeprefix(begin): value for key, value in settings.items() if key.startswith(begin)}
    if "factor" not in scaling and "rope.scale_linear" in settings:  # of files before 2024
        scaling["factor"] = settings["rope.scale_linear"]
    parameters = _of_settings(scaling, settings["context_length"])
    if divisors is not None:
        if parameters["rope_type"] != "default":
            kind = parameters["rope_type"]
            raise GgufError(f"scales RoPE twice, by rope_freqs.weight and by the setting {kind!r}")
        parameters = _of_divisors(divisors, theta, head_dim)
    return {**parameters, "rope_theta": theta}


def long_rope(settings: Mapping[str, Any], rotated: int, short: Divisors, long: Divisors) -> dict[str, Any]:
    """LongRoPE (arXiv 2402.13753), of `rotated` dimensions of each head, by both its sets of divisors.

    Raises GgufError, without the file's name, for sets of another size or without the original context.
    """
    for divisors in (short, long):
        if divisors.shape != (rotated // 2,) or not np.isfinite(divisors).all() or divisors.min() <= 0:
            raise GgufError(f"is damaged: a tensor of LongRoPE has no {rotated // 2} positive divisors")
    original = settings.get("rope.scaling.original_context_length")
    if not original:
        raise GgufError("has LongRoPE, and lacks its setting rope.scaling.original_context_length")
    scale = settings.get("rope.scaling.attn_factor")
    return {
        "rope_type": "longrope",
        "rope_theta": float(settings.get("rope.freq_base", THETA)),
        "short_factor": [float(each) for each in short],
        "long_factor": [float(each) for each in long],
        "original_max_position_embeddings": original,
        "factor": settings["context_length"] / original,
        **({} if scale is None else {"attention_factor": scale}),
    }


def _of_settings(scaling: dict[str, Any], context: int) -> dict[str, Any]:
    factor = scaling.get("factor") or 0.0  # 0 stands for none
    kind = scaling.get("type", "linear")  # as llama.cpp takes it
    for name, neutral in ALWAYS_NEUTRAL.items():
        if scaling.get(name) not in (None, 0, neutral):
            raise GgufError(f"has rope.scaling.{name} {scaling[name]:g}, which is not supported")
    if kind in ("linear", "none") and (kind == "none" or factor in (0.0, 1.0)):
        return {"rope_type": "default"}
    if kind not in ("linear", "yarn"):
        raise GgufError(f"has RoPE type {kind!r}, which is not supported; types: {', '.join(ROPE_TYPES)}")
    for name, neutral in NEUTRAL.items():
        if scaling.get(name, neutral) != neutral:
            raise GgufError(f"has rope.scaling.{name} {scaling[name]:g}, which is not supported")
    if factor < 1:
        raise GgufError(f"scales RoPE ({kind}) by the factor {factor:g}, and it must be at least 1")
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    named = {ours: scaling[theirs] for theirs, ours in YARN.items() if theirs in scaling}
    return {"rope_type": "yarn", "original_max_position_embeddings": context, **named}


def _of_divisors(divisors: Divisors, theta: float, head_dim: int) -> dict[str, Any]:
    if divisors.shape != (head_dim // 2,) or not np.isfinite(divisors).all() or divisors.min() < 1:
        raise GgufError(f"is damaged: rope_freqs.weight has no {head_dim // 2} divisors of at least 1")
    factor = float(divisors.max())
    if np.allclose(divisors, divisors[0], rtol=TOLERANCE):
        return {"rope_type": "default"} if factor == 1 else {"rope_type": "linear", "factor": factor}
    frequencies = theta ** -(np.arange(0, head_dim, 2) / head_dim)
    for parameters in (LLAMA_3, _fitted(divisors, frequencies, factor)):
        if parameters and np.allclose(
            llama3_divisors(frequencies, factor=factor, **parameters), divisors, rtol=TOLERANCE
        ):
            return {"rope_type": "llama3", "factor": factor, **parameters}
    raise GgufError(
        "scales RoPE by rope_freqs.weight in a way that is neither linear nor Llama 3's, which is not"
        " supported; take the model as a folder of safetensors"
    )


def llama3_divisors(
    frequencies: NDArray[np.float64],
    *,
    factor: float,
    low_freq_factor: float,
    high_freq_factor: float,
    original_max_position_embeddings: int,
) -> NDArray[np.float64]:
    """What Llama 3's scaling divides each frequency by, given in radians a token.

    Between the two wavelengths the share of the frequency that is kept grows from 1 / factor to 1.
    """
    turns = original_max_position_embeddings * frequencies / (2 * np.pi)  # within the original context
    kept = np.clip((turns - low_freq_factor) / (high_freq_factor - low_freq_factor), 0, 1)
    return 1 / ((1 - kept) / factor + kept)


def _fitted(divisors: Divisors, frequencies: NDArray[np.float64], factor: float) -> dict[str, Any] | None:
    """Parameters of Llama 3's scaling by the frequencies between the two wavelengths, two at least.

    The share that is kept is a line over the frequency. A multiple of all three parameters gives the same
    line, so the lower factor is 1, as in every published model.
    """
    kept = (1 / divisors.astype(np.float64) - 1 / factor) / (1 - 1 / factor)
    between = (kept > TOLERANCE) & (kept < 1 - TOLERANCE)
    if between.sum() < 2:
        return None
    slope, offset = np.polyfit(frequencies[between], kept[between], 1)
    if slope <= 0 or offset >= 0:
        return None
    width = -1 / offset
    original = round(2 * np.pi * slope * width)
    return {
        "low_freq_factor": 1.0,
        "high_freq_factor": round(1 + width, 3),
        "original_max_position_embeddings": original,
    }
