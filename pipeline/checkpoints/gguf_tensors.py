"""Tensors of GGUF files: which ones a model takes, under which names, and their values."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace
from math import prod

import gguf
import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedConfig

from pipeline.checkpoints.building import parameters_of
from pipeline.checkpoints.gguf_families import ARCHITECTURES, GGUF_FAMILIES, Forms
from pipeline.checkpoints.gguf_header import GgufError, GgufHeader
from pipeline.checkpoints.safetensor_files import Stored, matrices_of_zeros
from pipeline.families.configuration import slots_of
from pipeline.kernels.fp8 import Fp8Weight

BLOCK = re.compile(r"model\.layers\.(?P<number>\d+)\.(?P<name>.+)")
NUMBERS_AT_ONCE = 1 << 20  # that are dequantised, in whole rows
NAMED = 4  # tensors in a message
HARMLESS = ".attn_rot_embd."  # the frequencies again, in files of 2023; llama.cpp passes over them too

Found = dict[str, Stored]  # by the tensor's name


def found_tensors(parts: Iterable[GgufHeader]) -> Found:
    found: Found = {}
    for part in parts:
        for each in part.tensors:
            if each.name in found:
                first = found[each.name].file.name
                raise GgufError(f"{part.path.name} is no part of the same model: {first} has {each.name} too")
            found[each.name] = each
    return found


class Names:
    """Where the tensors of a file go in the parameters of transformers' model of this configuration."""

    def __init__(self, config: PreTrainedConfig) -> None:
        """Raises GgufError for an architecture that the installed gguf package does not know."""
        architecture = ARCHITECTURES[config.model_type]
        self._forms = GGUF_FAMILIES[architecture].forms
        architectures = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
        if architecture not in architectures:
            raise GgufError(f"architecture {architecture!r} is none of the installed gguf package's")
        self._map = gguf.get_tensor_name_map(architectures[architecture], config.num_hidden_layers)

    def of(self, parameter: str) -> Forms:
        """The tensors of which a parameter is made, each with the view of the parameter that it fills."""
        block = BLOCK.fullmatch(parameter)
        if block is not None and block["name"] in self._forms:
            forms = self._forms[block["name"]]
            return {f"blk.{block['number']}.{name}": view for name, view in forms.items()}
        name = self._map.get_name(parameter, try_suffixes=(".weight", ".bias"))
        if name is None:
            raise GgufError(f"GGUF files have no name for {parameter}")
        return {name: lambda whole: whole}

    def shapes(self, parameter: str, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        """Of the tensors of which a parameter of this shape is made."""
        empty = torch.empty(shape, device="meta")
        return {name: tuple(view(empty).shape) for name, view in self.of(parameter).items()}


def check_tensors(file: str, config: PreTrainedConfig, found: Found, ignored: str | None = None) -> list[str]:
    """Raise GgufError unless the model has all the tensors that this configuration takes, and no others.

    Those that match the pattern `ignored` may be there; what it returns is worth a note.
    """
    names, layout = Names(config), parameters_of(config)
    shapes: dict[str, tuple[int, ...]] = {}
    for each, shape in layout.shapes.items():
        if each not in layout.tied:
            shapes |= names.shapes(each, shape)
    kind = f"a {config.model_type} of {config.num_hidden_layers} blocks"
    missing = [name for name in shapes if name not in found]
    if missing:
        raise GgufError(f"{file} lacks {_listed(missing)}, which {kind} has; download or convert it again")
    used = {*shapes, *GGUF_FAMILIES[ARCHITECTURES[config.model_type]].rope_tensors}
    others = [name for name in found if name not in used and HARMLESS not in name]
    unused = [name for name in others if ignored is None or not re.search(ignored, name)]
    if unused:
        raise GgufError(
            f"{file} holds {_listed(unused)}, which {kind} does not use; without them its answers would be"
            " another model's; --ignore-unused-tensors REGEX goes on without those that it matches"
        )
    for name, shape in shapes.items():
        held = found[name].shape
        if held != shape:
            raise GgufError(f"{file} is damaged: {name} is {_sides(held)}, not {_sides(shape)}")
    _check_kinds(file, found)
    empty = matrices_of_zeros({name: found[name] for name in shapes})
    if empty:
        raise GgufError(
            f"{file} holds zeros alone in {_listed(empty)}, as where a download was cut off: download or copy"
            " it again"
        )
    return [f"{file} holds {_listed(others)}, which {kind} does not use: they are left out"] if others else []


def _check_kinds(file: str, found: Found) -> None:
    """Each type is tried on one block: the package knows the sizes of more types than it can read."""
    for kind in {gguf.GGMLQuantizationType[each.dtype] for each in found.values()}:
        try:
            gguf.dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[kind][1]), dtype=np.uint8), kind)
        except NotImplementedError:
            raise GgufError(
                f"{file} stores tensors in type {kind.name}, which the gguf package cannot read; get the"
                " model in another quantisation, such as Q8_0 or Q4_K_M"
            ) from None


def values(stored: Stored) -> np.ndarray:
    """A small tensor, such as the divisors of frequencies, in float32."""
    return np.concatenate([rows for _, rows in _pieces(stored)]).reshape(stored.shape)


class GgufWeights:
    """Writes tensors of the files into parameters of transformers' model."""

    def __init__(self, config: PreTrainedConfig, found: Found) -> None:
        self.names = Names(config)
        self.found = found
        self.config = config
        self._norm_offset = slots_of(config).norm_offset

    def fp8(self, name: str, device: torch.device, /) -> Fp8Weight | None:
        return None

    def write(self, parameter: str, target: Tensor, /) -> None:
        """Write the tensors of the parameter of this name to `target`, of its shape, on any device."""
        # converters store the weights of norms with what transformers' modules add to them
        offset = self._norm_offset if parameter.endswith("norm.weight") else 0.0
        for name, view in self.names.of(parameter).items():
            stored, part = self.found[name], view(target)
            places = self._places(parameter, stored.shape[0])
            if len(stored.shape) < 3:
                _write(stored, part, places, offset)
                continue
            for one, matrix in zip(_matrices(stored), part, strict=True):
                _write(one, matrix, None, offset)

    def _places(self, parameter: str, rows: int) -> Tensor | None:
        """Where each of the file's rows goes, if not to its own place.

        llama.cpp rotates neighbours, transformers the two halves of a head, so that of Llama's queries and
        keys the converter writes rows h and h + d / 2 of a head side by side.
        """
        heads: dict[str, int] = {
            "q_proj": self.config.num_attention_heads,
            "k_proj": self.config.num_key_value_heads,
        }
        module = parameter.split(".")[-2]
        if self.config.model_type != "llama" or module not in heads:
            return None
        order = torch.arange(rows).view(heads[module], 2, rows // heads[module] // 2)
        return order.transpose(1, 2).reshape(-1)


def _write(stored: Stored, target: Tensor, places: Tensor | None, offset: float) -> None:
    """Write a vector or a matrix, less `offset`, to `target`, each row to its place if there are `places`."""
    rows = target.reshape(len(places), -1) if places is not None else target.view(-1, stored.shape[-1])
    for first, piece in _pieces(stored):
        numbers = torch.from_numpy(piece - offset).to(target.dtype).to(target.device).view(-1, rows.shape[1])
        if places is None:
            rows[first : first + len(numbers)].copy_(numbers)
        else:
            rows.index_copy_(0, places[first : first + len(numbers)].to(target.device), numbers)


def _matrices(stored: Stored) -> Iterable[Stored]:
    """Each expert's, of a tensor that holds all experts'."""
    experts, *sides = stored.shape
    size = (stored.end - stored.begin) // experts
    for begin in range(stored.begin, stored.end, size):
        yield replace(stored, shape=tuple(sides), begin=begin, end=begin + size)


def _pieces(stored: Stored) -> Iterable[tuple[int, np.ndarray]]:
    """(first row, rows in float32) of a tensor, a few rows at a time; a vector is one row."""
    kind, size = gguf.GGMLQuantizationType[stored.dtype], stored.end - stored.begin
    data = np.memmap(stored.file, dtype=np.uint8, mode="r", offset=stored.begin, shape=(size,))
    rows = data.reshape(prod(stored.shape[:-1]), -1)
    step = max(1, NUMBERS_AT_ONCE // stored.shape[-1])
    for first in range(0, len(rows), step):
        piece = gguf.dequantize(np.array(rows[first : first + step]), kind)
        yield first, np.asarray(piece, dtype=np.float32)


def _listed(names: list[str]) -> str:
    more = len(names) - NAMED
    return ", ".join(names[:NAMED]) + (f" and {more} more tensors" if more > 0 else "")


def _sides(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))
