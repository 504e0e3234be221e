"""Quantised matrices as torch reads them: integers out of words of 32 bits, times the scales of groups.

All is computed in float32, in which products of a code and a scale are exact, and equal on every device.
"""

from __future__ import annotations

import torch
from torch import Tensor

MXFP4_BLOCK = 32  # inputs that share a power of two
FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # what the codes 0 to 7 mean, and less than 0 those from 8 on
# AWQ keeps these columns of eight in the fields of a word, from the lowest bits on
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def unpacked(words_NW: Tensor, bits: int) -> Tensor:
    """(N, 32 / bits * W) uint8: the fields of int32 words, those of the lowest bits first."""
    fields, mask = 32 // bits, (1 << bits) - 1
    codes_NWF = torch.empty(*words_NW.shape, fields, dtype=torch.uint8, device=words_NW.device)
    for field in range(fields):
        codes_NWF[..., field] = (words_NW >> (bits * field)) & mask
    return codes_NWF.flatten(-2)


def unpacked_awq(words_NW: Tensor) -> Tensor:
    """(N, 8 W) uint8: fields of four bits in AWQ's order."""
    places = torch.tensor(AWQ_ORDER, device=words_NW.device).argsort()
    return unpacked(words_NW, 4).unflatten(-1, (-1, 8))[..., places].flatten(-2)


def gptq_zeros(words_GW: Tensor, bits: int, *, less_one: bool) -> Tensor:
    """(G, 32 / bits * W) uint8 zero points; those of version 1 stand in the file as `less_one` each.

    One was taken from whole words, borrows included, so that it is added to whole words again.
    """
    ones = sum(1 << (bits * field) for field in range(32 // bits))
    whole_GW = (words_GW.long() + ones if less_one else words_GW.long()) & 0xFFFFFFFF
    return unpacked(whole_GW, bits)


def dequantised(codes_ND: Tensor, scale_NG: Tensor, zero_NG: Tensor | None, group_D: Tensor | None) -> Tensor:
    """(N, D) float32: (code - zero) * scale, of each input's group.

    `group_D` says which group an input is of; None: groups lie side by side, all of one size. Raises
    ValueError for scales that are no numbers, or that make nothing of codes which are not their zero point.
    """
    scale_NG = scale_NG.float()
    if not torch.isfinite(scale_NG).all():
        raise ValueError("its scales hold NaN or an infinity")
    values_ND = codes_ND.float()
    if group_D is None:
        groups_NGd = values_ND.unflatten(1, (scale_NG.shape[1], -1))
        scale, values = scale_NG[:, :, None], groups_NGd
        zero = None if zero_NG is None else zero_NG.float()[:, :, None]
    else:
        scale, values = scale_NG[:, group_D], values_ND
        zero = None if zero_NG is None else zero_NG.float()[:, group_D]
    if zero is not None:
        values -= zero
    if not scale_NG.all() and bool(((scale == 0) & (values != 0)).any()):
        raise ValueError("some of its scales are 0, and the weights below them are not")
    values *= scale
    return values_ND


def dequantised_blocks(codes_ND: Tensor, scale: Tensor, block: tuple[int, int]) -> Tensor:
    """(N, D) float32 of a matrix whose blocks of so many rows and columns each have one of the scales."""
    (outputs, inputs), (rows, columns) = codes_ND.shape, block
    grid = scale.float().reshape(-(-outputs // rows), -(-inputs // columns)).repeat_interleave(rows, 0)
    group_D = torch.arange(inputs, device=codes_ND.device) // columns
    return dequantised(codes_ND, grid[:outputs], None, group_D)


def dequantised_mxfp4(blocks_NGb: Tensor, scales_NG: Tensor) -> Tensor:
    """(N, D) bfloat16 of bytes that hold two codes each, the first in the lower half.

    A block is its codes' floats times two to the power of its scale less 127; of 255 it is NaN.
    """
    device = blocks_NGb.device
    floats = torch.tensor([*FP4, *(-each for each in FP4)], dtype=torch.bfloat16, device=device)
    pairs = torch.stack([floats.repeat(16), floats.repeat_interleave(16)], dim=1)  # of each byte
    values = pairs.index_select(0, blocks_NGb.flatten().int()).view(*scales_NG.shape, MXFP4_BLOCK)
    powers_NG = scales_NG.view(torch.float8_e8m0fnu).float().to(torch.bfloat16)
    return values.mul_(powers_NG[..., None]).flatten(1)
