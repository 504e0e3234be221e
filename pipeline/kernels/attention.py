"""Causal attention over packs of documents, through whichever library is fastest on the device.

Every backend computes the same two things: `prefill`, where each document's tokens attend within the
document, and `decode`, where the newest tokens of each document, most often one, attend to its slots of the
cache.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from importlib import import_module
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from pipeline.errors import ConfigError, first_line
from pipeline.kernels import decoding, reference
from pipeline.kernels.decoding import Fp8Scales, Ranges
from pipeline.kernels.segments import Segments, on_device

TOLERANCE = 0.02  # of the reference's largest value, for a trial in bf16


class AttentionUnavailable(Exception):
    """Why a backend cannot be used here."""


class HostSlots(NamedTuple):
    """What the host knows of `DecodeSlots`, by document."""

    starts: tuple[int, ...]
    used: list[int]
    queries: tuple[int, ...]


@dataclass(kw_only=True)
class DecodeSlots:
    """The slots of one buffer that the queries of a decode step attend to.

    Document b's are starts[b] .. starts[b] + used[b], new tokens included, of which its queries, at least
    one, are the last. Within a captured step the device's counts go on, and the host has none.
    """

    longest: int  # no document ever uses more slots
    used_B: Tensor  # int32, as the following
    bounds_B1: Tensor  # the starts and the buffer's end
    queries_B1: Tensor  # bounds of each document's queries
    most_queries: int  # of a document
    host: HostSlots | None
    shared: Ranges | None = None  # slots before these that several documents share, of the same buffer
    scales: Fp8Scales | None = None  # of a buffer in e4m3
    lines_B: Tensor | None = None  # of each document, in the scales

    @classmethod
    def of(
        cls,
        starts: Sequence[int],
        used: Sequence[int],
        slots: int,
        device: torch.device,
        queries: Sequence[int] | None = None,
    ) -> Self:
        """Of a buffer of `slots`, for a step that will not be captured; one query a document by default."""
        asked = Segments.of((1,) * len(starts) if queries is None else queries, device)
        return cls(
            longest=max(used),
            used_B=on_device(used, device, torch.int32),
            bounds_B1=on_device([*starts, slots], device, torch.int32),
            queries_B1=asked.cu_seqlens,
            most_queries=asked.longest,
            host=HostSlots(tuple(starts), list(used), asked.lengths),
        )

    @property
    def known(self) -> HostSlots:
        """The host's counts, where there are any."""
        assert self.host is not None, "the device alone knows these slots"
        return self.host

    @property
    def ranges(self) -> Ranges:
        """The same as the kernels for few queries want it."""
        return Ranges(
            starts_N=self.bounds_B1[:-1],
            used_N=self.used_B,
            queries_N1=self.queries_B1,
            most_queries=self.most_queries,
            longest=self.longest,
            scales=self.scales,
            lines_N=self.lines_B,
        )


class AttentionBackend(ABC):
    """One way to compute attention; chosen once, then used for every pack."""

    name: ClassVar[str]
    capture_failure: str | None = None  # why decoding with this backend goes on without CUDA graphs
    # tokens of a document from which a method may have its attention block-sparse, by plain torch where there
    # are no kernels; None: where there are kernels, and it pays
    sparse_from: int | None = None

    def captures(self, device: torch.device, dtype: torch.dtype) -> bool:
        """Whether `decode`, of a query a document, reads nothing of the host that changes between steps."""
        return decoding.available(device, dtype)

    @abstractmethod
    def prefill(self, q_THd: Tensor, k_TKd: Tensor, v_TKd: Tensor, segments: Segments) -> Tensor:
        """Causal attention within each document, (T, H, d)."""

    def decode(self, q_QHd: Tensor, k_SKd: Tensor, v_SKd: Tensor, slots: DecodeSlots) -> Tensor:
        """Each document's queries over its slots, (Q, H, d): the last sees all, the one before one less.

        By kernels of ours where there are any for so few queries, else as the backend does it.
        """
        if slots.shared is not None:
            attended = [(k_SKd, v_SKd, ranges) for ranges in (slots.ranges, slots.shared)]
            return decoding.attention(q_QHd, attended)
        by_ranges = slots.scales is not None or slots.host is None
        if by_ranges or decoding.takes(q_QHd, k_SKd, slots.most_queries):
            return decoding.attention(q_QHd, [(k_SKd, v_SKd, slots.ranges)])
        return self.decode_many(q_QHd, k_SKd, v_SKd, slots)

    def decode_many(self, q_QHd: Tensor, k_SKd: Tensor, v_SKd: Tensor, slots: DecodeSlots) -> Tensor:
        """The same for any number of queries."""
        starts, used, queries = slots.known
        outputs = [
            _sdpa_last(q, k_SKd[start : start + count], v_SKd[start : start + count])
            for q, start, count in zip(q_QHd.split(queries), starts, used, strict=True)
        ]
        return torch.cat(outputs)


class SdpaAttention(AttentionBackend):
    """torch's scaled_dot_product_attention, a document at a time, with torch's own choice of kernel."""

    name = "sdpa"

    def prefill(self, q_THd: Tensor, k_TKd: Tensor, v_TKd: Tensor, segments: Segments) -> Tensor:
        outputs = []
        for start, end in segments.ranges():
            q, k, v = (x[start:end] for x in (q_THd, k_TKd, v_TKd))
            with self._kernel(end - start):
                outputs.append(_sdpa(q, k, v, causal=True))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def _kernel(self, length: int) -> AbstractContextManager[Any]:
        """The choice of kernel for a document of `length` tokens."""
        return nullcontext()


class CudnnAttention(SdpaAttention):
    """The same, with cuDNN's kernel forced: faster than the default on Hopper."""

    name = "cudnn"

    def _kernel(self, length: int) -> AbstractContextManager[Any]:
        # cuDNN takes no single key
        return sdpa_kernel(SDPBackend.CUDNN_ATTENTION) if length > 1 else nullcontext()


class VarlenAttention(AttentionBackend):
    """torch's variable-length attention: one launch for the pack."""

    name = "varlen"

    def __init__(self) -> None:
        try:
            self._attend = import_module("torch.nn.attention.varlen").varlen_attn
        except (ImportError, AttributeError) as error:
            raise AttentionUnavailable("this torch has no torch.nn.attention.varlen") from error
        # grouped heads came after torch 2.11; before, key/value heads are repeated by us
        self._grouped = "enable_gqa" in inspect.signature(self._attend).parameters

    def prefill(self, q_THd: Tensor, k_TKd: Tensor, v_TKd: Tensor, segments: Segments) -> Tensor:
        options: dict[str, Any] = {"window_size": (-1, 0)}  # without it, attention is not causal
        if self._grouped:
            options["enable_gqa"] = True
        else:
            groups = q_THd.shape[1] // k_TKd.shape[1]
            k_TKd, v_TKd = (x.repeat_interleave(groups, dim=1) for x in (k_TKd, v_TKd))
        bounds, longest = segments.cu_seqlens, segments.longest
        return self._attend(q_THd, k_TKd, v_TKd, bounds, bounds, longest, longest, **options)


class FlashAttention(AttentionBackend):
    """FlashAttention-2 from the package flash-attn."""

    name = "flash"
    module = "flash_attn"

    def __init__(self) -> None:
        try:
            # FlashAttention-2 and -4 share a package name: only the function tells them apart
            self._attend: Callable[..., Any] = import_module(self.module).flash_attn_varlen_func
        except (ImportError, AttributeError, OSError) as error:
            raise AttentionUnavailable(f"{self.module}.flash_attn_varlen_func: {error}") from error

    def prefill(self, q_THd: Tensor, k_TKd: Tensor, v_TKd: Tensor, segments: Segments) -> Tensor:
        bounds, longest = segments.cu_seqlens, segments.longest
        return self._call(
            q_THd,
            k_TKd,
            v_TKd,
            cu_seqlens_q=bounds,
            cu_seqlens_k=bounds,
            max_seqlen_q=longest,
            max_seqlen_k=longest,
            causal=True,
        )

    def _call(self, *tensors: Tensor, **options: Any) -> Tensor:
        result = self._attend(*tensors, **options)
        return result[0] if isinstance(result, tuple) else result


class Flash3Attention(FlashAttention):
    """FlashAttention-3 for Hopper, from the prebuilt wheel fa3-fwd."""

    name = "fa3"
    module = "fa3_fwd_interface"
    # of a document's keys, for few queries; 0: as many as fill the device. With 1, the library's default for
    # packs, a few documents would leave most of its multiprocessors idle
    splits: ClassVar[int] = 0

    def captures(self, device: torch.device, dtype: torch.dtype) -> bool:
        return device.type == "cuda"

    def decode_many(self, q_QHd: Tensor, k_SKd: Tensor, v_SKd: Tensor, slots: DecodeSlots) -> Tensor:
        return self._call(
            q_QHd,
            k_SKd,
            v_SKd,
            cu_seqlens_q=slots.queries_B1,
            cu_seqlens_k=slots.bounds_B1,
            max_seqlen_q=slots.most_queries,
            max_seqlen_k=slots.longest,
            seqused_k=slots.used_B,
            causal=True,
            num_splits=self.splits,
        )


# fastest first: the order in which `auto` tries them on a GPU
BACKENDS: dict[str, Callable[[], AttentionBackend]] = {
    "fa3": Flash3Attention,
    "flash": FlashAttention,
    "cudnn": CudnnAttention,
    "varlen": VarlenAttention,
    "sdpa": SdpaAttention,
}


def choose_attention(
    wanted: str,
    *,
    device: torch.device,
    dtype: torch.dtype,
    heads: int,
    kv_heads: int,
    head_dim: int,
) -> tuple[AttentionBackend, dict[str, str]]:
    """The backend to use, and for each faster one why it was not taken.

    `wanted` is a name of `BACKENDS` or `auto`. A backend is taken only after a small trial on the device
    agrees with the reference. Raises ConfigError when none does, or the one asked for by name does not.
    """
    candidates = list(BACKENDS) if wanted == "auto" else [wanted]
    sizes = {"heads": heads, "kv_heads": kv_heads, "head_dim": head_dim}
    refused: dict[str, str] = {}
    reason = decoding.try_once(device, dtype, **sizes)
    if reason is not None:
        refused["kernel of decode steps"] = reason
    for name in candidates:
        try:
            if device.type == "cpu" and name != "sdpa":
                raise AttentionUnavailable("needs a GPU")
            backend = BACKENDS[name]()
            _try_once(backend, device=device, dtype=dtype, **sizes)
        except (AttentionUnavailable, RuntimeError, TypeError, ValueError, ImportError) as error:
            refused[name] = first_line(error)
        else:
            return backend, refused
    reasons = "; ".join(f"{name}: {reason}" for name, reason in refused.items())
    raise ConfigError(f"no attention backend works on {device} with {dtype}: {reasons}")


def _try_once(
    backend: AttentionBackend,
    *,
    device: torch.device,
    dtype: torch.dtype,
    heads: int,
    kv_heads: int,
    head_dim: int,
) -> None:
    segments = Segments.of((70, 33), device)
    generator = torch.Generator(device="cpu").manual_seed(0)
    shapes = [(segments.total, n, head_dim) for n in (heads, kv_heads, kv_heads)]
    q, k, v = (torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes)
    expected = reference.causal_attention(q, k, v, segments)
    last = segments.last_indices()
    _compare(backend.prefill(q, k, v, segments), expected, "prefill")
    slots = DecodeSlots.of(segments.offsets[:-1], segments.lengths, segments.total, device)
    _compare(backend.decode(q[last], k, v, slots), expected[last], "decode")


def _compare(got: Tensor, expected: Tensor, what: str) -> None:
    error = ((got.double() - expected).abs().max() / expected.abs().max()).item()
    if not error <= TOLERANCE:
        raise AttentionUnavailable(f"its {what} is off by {error:.3g} on a trial")


def _sdpa_last(q_QHd: Tensor, k_TKd: Tensor, v_TKd: Tensor) -> Tensor:
    """A document's last Q tokens over all T: SDPA's own causal mask would take them for the first ones."""
    queries, tokens = len(q_QHd), len(k_TKd)
    if queries == 1:
        return _sdpa(q_QHd, k_TKd, v_TKd, causal=False)
    if queries == tokens:
        return _sdpa(q_QHd, k_TKd, v_TKd, causal=True)
    seen_QT = torch.ones(queries, tokens, dtype=torch.bool, device=q_QHd.device).tril(tokens - queries)
    return _sdpa(q_QHd, k_TKd, v_TKd, causal=False, mask_QT=seen_QT)


def _sdpa(
    q_QHd: Tensor, k_TKd: Tensor, v_TKd: Tensor, *, causal: bool, mask_QT: Tensor | None = None
) -> Tensor:
    """One document through SDPA, which wants (1, heads, tokens, d)."""
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q_QHd, k_TKd, v_TKd))
    grouped = q.shape[1] != k.shape[1]
    if grouped and q.is_cuda and q.dtype == torch.float32:
        # no fused CUDA kernel takes grouped heads in fp32, and the plain one would hold the T x T matrix
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        grouped = False
    mixed = scaled_dot_product_attention(q, k, v, attn_mask=mask_QT, is_causal=causal, enable_gqa=grouped)
    return mixed.squeeze(0).transpose(0, 1)
