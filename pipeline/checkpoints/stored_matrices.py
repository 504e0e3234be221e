"""A parameter of a model as tensors of a checkpoint hold it: plain, in fp8, or as codes in words or bytes.

Each knows its shape from the headers of files alone; what does not fit raises ValueError that names the
tensor, before any is read.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from pipeline.checkpoints.dequantising import (
    MXFP4_BLOCK,
    dequantised,
    dequantised_blocks,
    dequantised_mxfp4,
    gptq_zeros,
    unpacked,
    unpacked_awq,
)
from pipeline.checkpoints.quantised import FP8_DTYPES, Scheme
from pipeline.checkpoints.safetensor_files import Stored, read_tensor
from pipeline.kernels.fp8 import Fp8Weight

SCALE_DTYPES = ("F32", "BF16", "F16", "F64", "F8_E8M0")
FLOATS = ("F64", "F32", "F16", "BF16", *FP8_DTYPES)
SCALES = ("weight_scale_inv", "weight_scale")  # of FP8: DeepSeek's form, that of compressed-tensors

Parts = Mapping[str, Stored]  # the tensors of one linear layer, by the last part of their names


@dataclass(frozen=True, kw_only=True)
class StoredWeight:
    """A parameter of a model in tensors of a file: here in one, as it is."""

    parts: Parts
    scheme: Scheme | None = None  # None: as it is

    @property
    def shape(self) -> tuple[int, ...]:
        return self.first.shape

    @property
    def first(self) -> Stored:
        """The tensor that has the numbers."""
        return next(iter(self.parts.values()))

    @property
    def is_number(self) -> bool:
        return self.first.dtype in FLOATS

    def check(self) -> None:
        """Raise ValueError where the tensors do not fit each other."""

    def read(self, device: torch.device) -> Tensor:
        """The parameter on a device, in the file's type or in float32. Raises ValueError."""
        return read_tensor(self.first).to(device)

    def fp8(self, device: torch.device) -> Fp8Weight | None:
        """The same numbers as they are stored, if that is in fp8 with scales for rows; else None."""
        return None

    def _tensor(self, part: str, device: torch.device) -> Tensor:
        return read_tensor(self.parts[part]).to(device)


@dataclass(frozen=True, kw_only=True)
class _Quantised(StoredWeight, ABC):
    """A matrix (N, D) beside scales."""

    @property
    def is_number(self) -> bool:
        return True

    def check(self) -> None:
        if self._scale.dtype not in SCALE_DTYPES:
            raise ValueError(
                f"{self._scale.name} holds scales of type {self._scale.dtype}, which is not read"
            )
        if len(self.first.shape) != 2:
            raise ValueError(
                f"{self.first.name} is quantised, and no matrix: its shape is {self.first.shape}"
            )

    def read(self, device: torch.device) -> Tensor:
        try:
            return self._dequantised(device)
        except ValueError as error:
            raise ValueError(f"{self.first.name} is damaged: {error}; download it again") from error

    @property
    def _scale(self) -> Stored:
        return self.parts["scales" if "scales" in self.parts else "weight_scale"]

    @abstractmethod
    def _dequantised(self, device: torch.device) -> Tensor:
        """The whole matrix. Raises ValueError where its parts do not fit each other."""

    def _expect(self, part: str, shape: tuple[int, ...]) -> None:
        held = self.parts[part]
        if held.shape != shape:
            raise ValueError(
                f"{held.name} is {held.shape}, and {shape} fits {self.first.name} of shape {self.first.shape}"
                f" by the quantization_config of config.json: mend that, or download it again"
            )


@dataclass(frozen=True, kw_only=True)
class Fp8Matrix(_Quantised):
    """One scale for the matrix, for each output or for each block: shapes tell which."""

    def check(self) -> None:
        super().check()
        self._block()

    @property
    def _scale(self) -> Stored:
        return next(self.parts[name] for name in SCALES if name in self.parts)

    def _block(self) -> tuple[int, int]:
        """Rows and columns that a scale is for. Raises ValueError where it fits none."""
        (rows, columns), scale = self.shape, self._scale.shape
        block = self.scheme.block if self.scheme is not None else None
        if all(side == 1 for side in scale):
            return rows, columns
        if block is not None and scale == (-(-rows // block[0]), -(-columns // block[1])):
            return block
        if scale in ((rows,), (rows, 1)):
            return 1, columns
        raise ValueError(
            f"FP8 scales of shape {scale} do not fit a weight of shape {self.shape} in blocks of {block}: "
            "download it again, or mend the quantization_config of config.json"
        )

    def _dequantised(self, device: torch.device) -> Tensor:
        codes, scale = self._tensor("weight", device), read_tensor(self._scale).to(device)
        return dequantised_blocks(codes, scale, self._block())

    def fp8(self, device: torch.device) -> Fp8Weight | None:
        """Of a scale for the whole matrix every row has it."""
        rows, columns = self._block()
        by_rows = columns == self.shape[1] and rows in (1, self.shape[0])
        if not by_rows or self.first.dtype != "F8_E4M3":
            return None
        scale = read_tensor(self._scale).float().reshape(1, -1)
        if not torch.isfinite(scale).all() or not scale.all():
            self.read(device)  # which says what is wrong, if zeros are
        scale_1N = scale.expand(1, self.shape[0]).contiguous()
        return Fp8Weight(self._tensor("weight", device), scale_1N.to(device))


@dataclass(frozen=True, kw_only=True)
class _Grouped(_Quantised):
    """Integer codes, of which groups of inputs share a scale, and perhaps a zero point."""

    @property
    def _groups(self) -> int:
        """How many there are by the configuration."""
        assert self.scheme is not None
        size = self.scheme.group_size
        return 1 if size <= 0 else -(-self.shape[1] // size)

    def _group_D(self, part: str, device: torch.device) -> Tensor | None:
        """Which group an input is of; None where they lie side by side, all of one size."""
        assert self.scheme is not None
        inputs, groups = self.shape[1], self._groups
        if part in self.parts:
            group_D = self._tensor(part, device).long()
            if int(group_D.min()) < 0 or not torch.equal(
                group_D.unique(), torch.arange(groups, device=device)
            ):
                raise ValueError(f"{self.parts[part].name} does not name each of its {groups} groups")
            return group_D
        if inputs % groups == 0 and inputs // groups == (self.scheme.group_size if groups > 1 else inputs):
            return None
        return torch.arange(inputs, device=device) // self.scheme.group_size


@dataclass(frozen=True, kw_only=True)
class GptqMatrix(_Grouped):
    """Words of inputs (D / fields, N), and of zero points of outputs (G, N / fields)."""

    @property
    def shape(self) -> tuple[int, ...]:
        assert self.scheme is not None
        return self.first.shape[1], self.first.shape[0] * 32 // self.scheme.bits

    def check(self) -> None:
        super().check()
        assert self.scheme is not None
        outputs, inputs = self.shape
        self._expect("scales", (self._groups, outputs))
        self._expect("qzeros", (self._groups, outputs * self.scheme.bits // 32))
        if "g_idx" in self.parts:
            self._expect("g_idx", (inputs,))

    def _dequantised(self, device: torch.device) -> Tensor:
        assert self.scheme is not None
        bits = self.scheme.bits
        codes_ND = unpacked(self._tensor("qweight", device).t(), bits)
        zeros = gptq_zeros(self._tensor("qzeros", device), bits, less_one=self.scheme.zeros_less_one)
        scale_GN = self._tensor("scales", device)
        return dequantised(codes_ND, scale_GN.t(), zeros.t(), self._group_D("g_idx", device))


@dataclass(frozen=True, kw_only=True)
class AwqMatrix(_Grouped):
    """Words of outputs (D, N / 8), and of their zero points (G, N / 8)."""

    @property
    def shape(self) -> tuple[int, ...]:
        return self.first.shape[1] * 8, self.first.shape[0]

    def check(self) -> None:
        super().check()
        self._expect("scales", (self._groups, self.shape[0]))
        self._expect("qzeros", (self._groups, self.first.shape[1]))

    def _dequantised(self, device: torch.device) -> Tensor:
        codes_ND = unpacked_awq(self._tensor("qweight", device)).t()
        zero_GN = unpacked_awq(self._tensor("qzeros", device))
        return dequantised(
            codes_ND, self._tensor("scales", device).t(), zero_GN.t(), self._group_D("", device)
        )


@dataclass(frozen=True, kw_only=True)
class IntegerMatrix(_Grouped):
    """Signed codes of compressed-tensors: bytes (N, D), with a zero point that is a byte."""

    def check(self) -> None:
        super().check()
        scale = self._scale.shape
        wanted = (self.shape[0], self._groups)
        if self._groups > 1 or (scale not in ((), (1,), (self.shape[0],)) and scale != wanted):
            self._expect("weight_scale", wanted)
        self._check_zeros(self._scale.shape)
        if "weight_g_idx" in self.parts:
            self._expect("weight_g_idx", (self.shape[1],))

    def _check_zeros(self, shape: tuple[int, ...]) -> None:
        if "weight_zero_point" in self.parts:
            self._expect("weight_zero_point", shape)

    def _codes(self, device: torch.device) -> Tensor:
        return self._tensor("weight", device)

    def _zeros(self, device: torch.device) -> Tensor:
        return self._tensor("weight_zero_point", device)

    def _dequantised(self, device: torch.device) -> Tensor:
        rows = self.shape[0], self._groups
        scale_NG = self._by_rows(self._tensor("weight_scale", device), rows)
        asymmetric = "weight_zero_point" in self.parts
        zero_NG = self._by_rows(self._zeros(device), rows) if asymmetric else None
        return dequantised(self._codes(device), scale_NG, zero_NG, self._group_D("weight_g_idx", device))

    @staticmethod
    def _by_rows(values: Tensor, rows: tuple[int, int]) -> Tensor:
        return values.reshape(-1, rows[1]).expand(rows)


@dataclass(frozen=True, kw_only=True)
class PackedMatrix(IntegerMatrix):
    """The same codes in words of inputs (N, D / fields), each with half of its range added."""

    @cached_property
    def shape(self) -> tuple[int, ...]:
        return tuple(read_tensor(self.parts["weight_shape"]).tolist())

    def check(self) -> None:
        assert self.scheme is not None
        if len(self.shape) != 2:
            raise ValueError(f"{self.parts['weight_shape'].name} is no shape of a matrix: {self.shape}")
        self._expect("weight_packed", (self.shape[0], -(-self.shape[1] // self._fields)))
        super().check()

    def _check_zeros(self, shape: tuple[int, ...]) -> None:
        if "weight_zero_point" in self.parts:
            self._expect("weight_zero_point", (-(-self.shape[0] // self._fields), self._groups))

    @property
    def _fields(self) -> int:
        assert self.scheme is not None
        return 32 // self.scheme.bits

    def _signed(self, words: Tensor) -> Tensor:
        assert self.scheme is not None
        return unpacked(words, self.scheme.bits).short() - (1 << (self.scheme.bits - 1))

    def _codes(self, device: torch.device) -> Tensor:
        return self._signed(self._tensor("weight_packed", device))[:, : self.shape[1]]

    def _zeros(self, device: torch.device) -> Tensor:
        return self._signed(self._tensor("weight_zero_point", device).t())[:, : self.shape[0]].t()


@dataclass(frozen=True, kw_only=True)
class Mxfp4Experts(StoredWeight):
    """Matrices of experts (E, N, D) in blocks of four-bit floats, of a parameter (E, D, N).

    Blocks are (E, N, D / 32, 16) bytes, each with a power of two, (E, N, D / 32) bytes.
    """

    @property
    def shape(self) -> tuple[int, ...]:
        experts, outputs, blocks, _ = self.first.shape
        return experts, blocks * MXFP4_BLOCK, outputs

    @property
    def is_number(self) -> bool:
        return True

    @property
    def _scales(self) -> Stored:
        return list(self.parts.values())[1]

    def check(self) -> None:
        shape, scales = self.first.shape, self._scales
        if len(shape) != 4 or shape[3] != MXFP4_BLOCK // 2 or scales.shape != shape[:3]:
            raise ValueError(
                f"MXFP4 scales of shape {scales.shape} do not fit the blocks {self.first.name} of shape"
                f" {shape}: download it again"
            )
        if {self.first.dtype, scales.dtype} != {"U8"}:
            raise ValueError(
                f"{self.first.name} and its scales are {self.first.dtype} and {scales.dtype}, and MXFP4 is"
                " bytes: download it again"
            )

    def read(self, device: torch.device) -> Tensor:
        """In bfloat16, which holds such numbers exactly; an expert at a time, to bound the memory needed."""
        blocks_ENGb, scales_ENG = (read_tensor(each).to(device) for each in (self.first, self._scales))
        experts, inputs, outputs = self.shape
        weight_END = torch.empty(experts, outputs, inputs, dtype=torch.bfloat16, device=device)
        for expert in range(experts):
            weight_END[expert] = dequantised_mxfp4(blocks_ENGb[expert], scales_ENG[expert])
        if not torch.isfinite(weight_END).all():
            raise ValueError(f"{self._scales.name} is damaged, some are no numbers; download it again")
        return weight_END.transpose(1, 2)
