"""Folders of quantised models, written code by code as the quantisers' formats say, and what they hold."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from checkpoints import change_config, tensors, write
from torch import Tensor

GROUP = 16  # inputs of a group
Parts = dict[str, Tensor]


def packed(codes: Tensor, bits: int, order: tuple[int, ...] | None = None) -> Tensor:
    """Along the last side, into int32 words: the lowest field has the column that `order` names first."""
    fields = 32 // bits
    width = -(-codes.shape[1] // fields)
    words = torch.zeros(codes.shape[0], width, dtype=torch.int64)
    for column in range(codes.shape[1]):
        word, place = divmod(column, fields)
        field = place if order is None else order.index(place)
        words[:, word] += codes[:, column].long() << (bits * field)
    return (words - ((words >> 31) << 32)).int()  # as signed numbers


def codes_of(weight: Tensor, bits: int, group: Tensor, *, symmetric: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(codes (N, D), scales (N, G) in half precision, zero points (N, G)), all codes from 0 on."""
    groups, most = int(group.max()) + 1, (1 << bits) - 1
    scales = torch.zeros(len(weight), groups)
    zeros = torch.full((len(weight), groups), 1 << (bits - 1))
    codes = torch.zeros(weight.shape, dtype=torch.int64)
    for n in range(groups):
        own = weight[:, group == n].float()
        low, high = own.amin(1), own.amax(1)
        if symmetric:
            scales[:, n] = (2 * own.abs().amax(1) / most).half().float()
        else:
            scales[:, n] = ((high - low) / most).half().float()
            zeros[:, n] = (-low / scales[:, n]).round().clamp(0, most)
        made = (own / scales[:, n : n + 1]).round() + zeros[:, n : n + 1]
        codes[:, group == n] = made.clamp(0, most).long()
    return codes, scales.half(), zeros.long()


def made_of(codes: Tensor, scales: Tensor, zeros: Tensor, group: Tensor) -> Tensor:
    """What the codes mean, in float32, one input after the other."""
    columns = [
        (codes[:, i] - zeros[:, g]).float() * scales[:, g].float() for i, g in enumerate(group.tolist())
    ]
    return torch.stack(columns, dim=1)


def side_by_side(inputs: int, size: int = GROUP) -> Tensor:
    return torch.arange(inputs) // size


def gptq(weight: Tensor, *, bits: int = 4, version: int = 1, act_order: bool = False) -> tuple[Parts, Tensor]:
    group = side_by_side(weight.shape[1])
    if act_order:
        group = group[torch.randperm(len(group), generator=torch.Generator().manual_seed(5))]
    codes, scales, zeros = codes_of(weight, bits, group, symmetric=version == 1)
    parts = {
        "qweight": packed(codes, bits).t(),
        "qzeros": packed((zeros - int(version == 1)).t(), bits),
        "scales": scales.t(),
        "g_idx": group.int(),
    }
    return parts, made_of(codes, scales, zeros, group)


def awq(weight: Tensor) -> tuple[Parts, Tensor]:
    group, order = side_by_side(weight.shape[1]), (0, 2, 4, 6, 1, 3, 5, 7)
    codes, scales, zeros = codes_of(weight, 4, group, symmetric=False)
    parts = {
        "qweight": packed(codes.t(), 4, order),
        "qzeros": packed(zeros.t(), 4, order),
        "scales": scales.t(),
    }
    return parts, made_of(codes, scales, zeros, group)


def pack_quantized(
    weight: Tensor, *, bits: int = 4, symmetric: bool = True, size: int = GROUP, act_order: bool = False
) -> tuple[Parts, Tensor]:
    group = side_by_side(weight.shape[1], size)
    if act_order:
        group = group[torch.randperm(len(group), generator=torch.Generator().manual_seed(5))]
    codes, scales, zeros = codes_of(weight, bits, group, symmetric=symmetric)
    parts = {
        "weight_packed": packed(codes, bits),
        "weight_scale": scales.bfloat16(),
        "weight_shape": torch.tensor(weight.shape),
    }
    if not symmetric:
        parts["weight_zero_point"] = packed(zeros.t(), bits).t()
    if act_order:
        parts["weight_g_idx"] = group.int()
    return parts, made_of(codes, scales.bfloat16(), zeros, group)


def int_quantized(weight: Tensor) -> tuple[Parts, Tensor]:
    scale = weight.float().abs().amax(1, keepdim=True) / 127
    codes = (weight / scale).round().to(torch.int8)
    return {"weight": codes, "weight_scale": scale}, codes.float() * scale


def quantise(
    folder: Path, make: Callable[[Tensor], tuple[Parts, Tensor]], config: Mapping[str, Any]
) -> dict[str, Tensor]:
    """Quantise a folder's linear layers; what its weights must be."""
    found, wanted = tensors(folder), tensors(folder)
    for key in [key for key in found if key.endswith("_proj.weight")]:
        parts, wanted[key] = make(found.pop(key))
        found |= {key.replace("weight", part): each for part, each in parts.items()}
    write(folder, found)
    change_config(folder, quantization_config=config)
    return wanted
