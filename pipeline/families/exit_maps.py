"""Exit maps: keys and values of tokens that have stopped early, linear in the state that they stopped with.

A layer's keys and values are a linear function of its normed input. A token that has stopped has no input of
later layers; the nearest linear function of the normed state that it stopped with stands in for theirs, found
by ridge regression on text (calibration/exit_fitting.py). In a prefill it takes the place of the layer's
projection, so it costs nothing. The idea that later layers' keys and values may come from an earlier state is
SwiftKV's (arXiv 2410.03960), which trains the projections instead.

A file holds the maps of one model and one layer to stop after: safetensors, whose metadata says which.
Letters: D width of the model, N columns of all keys and values of a layer.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from pipeline.errors import ConfigError
from pipeline.families.decoder import Decoder
from pipeline.families.projection import Projection
from pipeline.pruning.capabilities import exit_maps_of
from pipeline.pruning.shape import ModelShape
from pipeline.storage.whole_file import writing

KIND = "marsinfer exit maps 1"
REMEDY = "calibrate makes such a file beside its profile"


@dataclass(frozen=True, kw_only=True)
class MapsHeader:
    """What a file of exit maps is for."""

    fingerprint: str  # of the model
    last_full: int  # the layer after which tokens stop
    tokens: int  # of text that the maps were fitted on
    digest: str = ""  # of the maps, once they are written

    @classmethod
    def of(cls, path: str) -> Self:
        """By the file's header alone. Raises ConfigError."""
        try:
            with safe_open(path, "pt") as file:
                told = file.metadata() or {}
        except (OSError, SafetensorError) as error:
            raise ConfigError(f"exit_maps={path} cannot be read: {error}; {REMEDY}") from error
        if told.get("kind") != KIND:
            raise ConfigError(f"exit_maps={path} holds no exit maps; {REMEDY}")
        return cls(
            fingerprint=told["fingerprint"],
            last_full=int(told["last_full"]),
            tokens=int(told["tokens"]),
            digest=told["digest"],
        )


def mapped_layers(shape: ModelShape, last_full: int) -> range:
    """The layers that need maps: the one behind `last_full` reads the very state that tokens stop with."""
    return range(last_full + 2, shape.layers)


def write_exit_maps(path: Path, about: MapsHeader, maps: Mapping[int, tuple[Tensor, Tensor]]) -> None:
    """Maps by layer, weight (N, D) and bias (N,), whole or not at all. Raises StorageError."""
    tensors: dict[str, Tensor] = {}
    for layer, (weight_ND, bias_N) in maps.items():
        tensors |= {f"{layer}.weight": weight_ND.cpu().contiguous(), f"{layer}.bias": bias_N.cpu()}
    digest = hashlib.sha256(safetensors.torch.save(tensors)).hexdigest()
    told = {"kind": KIND, **{name: str(value) for name, value in vars(about).items()}, "digest": digest}
    with writing(path) as file:
        file.write(safetensors.torch.save(tensors, told))


def check_exit_maps(method: object, shape: ModelShape, fingerprint: str) -> str | None:
    """The digest of the maps that a method names, if it names any.

    Raises ConfigError for a file that holds none, or not for this model.
    """
    wanted = exit_maps_of(method, shape)
    if wanted is None:
        return None
    path, last_full = wanted
    about = MapsHeader.of(path)
    if about.fingerprint != fingerprint:
        raise ConfigError(
            f"exit_maps={path} was fitted for another model ({about.fingerprint[:12]}, and this one is "
            f"{fingerprint[:12]}): calibrate this model, or leave it out"
        )
    if about.last_full != last_full:
        raise ConfigError(
            f"exit_maps={path} was fitted for last_full={about.last_full}, and last_full is {last_full}"
        )
    return about.digest


def exit_maps(decoder: Decoder, method: object) -> Mapping[int, Projection]:
    """The maps that a method names, by layer, read where they were not before; none where it names none.

    `check_exit_maps` has seen the file. Raises ConfigError where a model is divided.
    """
    wanted = exit_maps_of(method, decoder.shape)
    if wanted is None:
        return {}
    path, last_full = wanted
    digest = MapsHeader.of(path).digest  # a file of this name may have been written anew
    if digest not in decoder.exit_maps:
        if decoder.ranks is not None:
            raise ConfigError("exit_maps and --tensor-parallel exclude each other: leave one of them out")
        tensors = safetensors.torch.load_file(path)
        decoder.exit_maps[digest] = {
            layer: _projection(tensors[f"{layer}.weight"], tensors[f"{layer}.bias"], decoder)
            for layer in mapped_layers(decoder.shape, last_full)
        }
    return decoder.exit_maps[digest]


def _projection(weight_ND: Tensor, bias_N: Tensor, decoder: Decoder) -> Projection:
    """As a layer has its own."""
    module = nn.Linear(weight_ND.shape[1], len(weight_ND), device="meta")
    module.weight = nn.Parameter(weight_ND.to(decoder.device, decoder.dtype), requires_grad=False)
    module.bias = nn.Parameter(bias_N.to(decoder.device, decoder.dtype), requires_grad=False)
    return Projection(module)


@torch.no_grad()
def own_map(decoder: Decoder, layer: int) -> tuple[Tensor, Tensor]:
    """A layer's keys and values before RoPE as a map of the stream normed without a weight.

    (N, D) and (N,), in float32. Raises ConfigError for a family whose layers read the stream without a norm.
    """
    norm, projection = decoder.kv_parts(layer)
    if norm is None:
        raise ConfigError("exit maps need a model whose layers norm what attention reads")
    assert projection.weight is not None, "the model's own weights are kept while it is calibrated"
    weight_ND = projection.weight.float() * norm.weight.float()
    bias_N = weight_ND.new_zeros(len(weight_ND)) if projection.bias is None else projection.bias.float()
    return weight_ND, bias_N


def behind_norm(decoder: Decoder, layer: int, weight_ND: Tensor) -> Tensor:
    """(N, D) a map of the stream normed without a weight, as one of what the layer's own norm makes."""
    norm, _ = decoder.kv_parts(layer)
    assert norm is not None
    scale_D = norm.weight.float()
    return torch.where(scale_D == 0, 0.0, weight_ND / scale_D)


def plainly_normed(decoder: Decoder, layer: int, hidden_TD: Tensor) -> Tensor:
    """(T, D) in float32, the stream normed as before this layer but without a weight."""
    norm, _ = decoder.kv_parts(layer)
    assert norm is not None
    return torch.nn.functional.rms_norm(hidden_TD.float(), hidden_TD.shape[-1:], eps=norm.eps)
