"""All tensors of a checkpoint as weights of a model, and what reads them one after the other."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

import torch
from torch import Tensor

from pipeline.checkpoints.quantised import AWQ, COMPRESSED, FP8, FP8_DTYPES, GPTQ, MXFP4, Scheme
from pipeline.checkpoints.safetensor_files import DTYPES, Stored, read_part
from pipeline.checkpoints.stored_matrices import (
    SCALES,
    AwqMatrix,
    Fp8Matrix,
    GptqMatrix,
    IntegerMatrix,
    Mxfp4Experts,
    PackedMatrix,
    Parts,
    StoredWeight,
)
from pipeline.kernels.fp8 import Fp8Weight
from pipeline.ranks.shares import TensorPart


def stored_weights(stored: Mapping[str, Stored], scheme: Scheme | None) -> dict[str, StoredWeight]:
    """All tensors of a checkpoint as weights, by the names of their parameters.

    Raises ValueError for a quantised weight whose parts are not there, or do not fit it.
    """
    layers: dict[str, dict[str, Stored]] = defaultdict(dict)
    for name, each in stored.items():
        stem, _, part = name.rpartition(".")
        layers[stem][part] = each
    found: dict[str, StoredWeight] = {}
    for stem, parts in layers.items():
        weights = {} if scheme is None else _quantised(parts, scheme)
        for own, weight in weights.items():
            weight.check()
            found[f"{stem}.{own}"] = weight
        taken = {part for weight in weights.values() for part in weight.parts}
        for part, each in parts.items():
            if part not in taken:
                found[each.name] = StoredWeight(parts={part: each})
    return found


def _quantised(parts: Parts, scheme: Scheme) -> dict[str, StoredWeight]:
    """What is quantised of a module's tensors, by the last part of the parameters' names."""
    if scheme.kind == MXFP4:
        stems = [part.removesuffix("_blocks") for part in parts if part.endswith("_blocks")]
        return {
            stem: Mxfp4Experts(parts=_taken(parts, scheme, f"{stem}_blocks", f"{stem}_scales"), scheme=scheme)
            for stem in stems
        }
    weight = _quantised_matrix(parts, scheme)
    return {} if weight is None else {"weight": weight}


def _quantised_matrix(parts: Parts, scheme: Scheme) -> StoredWeight | None:
    """A layer's matrix; None if it is not quantised."""
    weight = parts.get("weight")
    if scheme.kind in (GPTQ, AWQ) and "qweight" in parts:
        kind = GptqMatrix if scheme.kind == GPTQ else AwqMatrix
        return kind(parts=_taken(parts, scheme, "qweight", "scales", "qzeros", "g_idx?"), scheme=scheme)
    if scheme.kind == COMPRESSED:
        zeros = "weight_zero_point" + ("?" if scheme.symmetric else "")
        more = ("weight_scale", zeros, "weight_g_idx?")
        if "weight_packed" in parts:
            return PackedMatrix(
                parts=_taken(parts, scheme, "weight_packed", "weight_shape", *more), scheme=scheme
            )
        if weight is not None and weight.dtype == "I8":
            return IntegerMatrix(parts=_taken(parts, scheme, "weight", *more), scheme=scheme)
    if scheme.kind in (FP8, COMPRESSED) and weight is not None and weight.dtype in FP8_DTYPES:
        scale = next((name for name in SCALES if name in parts), SCALES[0])
        return Fp8Matrix(parts=_taken(parts, scheme, "weight", scale), scheme=scheme)
    return None


def _taken(parts: Parts, scheme: Scheme, *names: str) -> dict[str, Stored]:
    """The parts of these names, in this order; those that end in a question mark need not be there."""
    taken = {}
    for name in names:
        own = name.removesuffix("?")
        if own in parts:
            taken[own] = parts[own]
        elif own == name:
            first = next(iter(taken.values())).name
            wanted = first.rpartition(".")[0] + "." + name
            raise ValueError(f"the {scheme.name} tensor {first} has no {wanted} beside it: download it again")
    return taken


class CheckpointWeights:
    """Reads the weights of a checkpoint on a device, each when it is asked for."""

    def __init__(
        self,
        placed: Mapping[str, StoredWeight],
        parts: Mapping[str, tuple[str, ...]],
        device: torch.device,
    ) -> None:
        """`placed` are weights by the names of a `Layout`, those that are tied by both, `parts` are its."""
        self._placed, self._parts, self._device = placed, parts, device

    def write(self, name: str, target: Tensor, /) -> None:
        parts = self._parts[name]
        if len(parts) == 1:
            target.copy_(self._placed[parts[0]].read(self._device))
            return
        rows = target.view(-1, target.shape[-1])
        for part, own in zip(parts, rows.chunk(len(parts)), strict=True):
            own.copy_(self._placed[part].read(self._device))

    def part(self, name: str, part: TensorPart, /) -> Tensor | None:
        """Part of a parameter that is stored as it is, in one tensor; None of others."""
        placed = [self._placed[each] for each in self._parts[name]]
        if len(placed) > 1 or type(placed[0]) is not StoredWeight or placed[0].first.dtype not in DTYPES:
            return None
        return read_part(placed[0].first, part)

    def fp8(self, name: str, device: torch.device, /) -> Fp8Weight | None:
        forms = []
        for part in self._parts[name]:
            form = self._placed[part].fp8(device)
            if form is None:
                return None
            forms.append(form)
        return Fp8Weight.joined(forms)
