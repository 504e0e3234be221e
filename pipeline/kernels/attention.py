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
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Any, ClassVar, Self

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from pipeline.errors import ConfigError, first_line
from pipeline.kernels import decoding, reference
from pipeline.kernels.decoding import Fp8Scales, Ranges, windowed_ranges
from pipeline.kernels.segments import Segments, on_device

WINDOW_BLOCK = 1024  # queries that plain torch takes at a time where attention has a window
TRIAL_WINDOW = 24  # tokens
TOLERANCE = 0.02  # of the reference's largest value, for a trial in bf16


class AttentionUnavailable(Exception):
    """Why a backend cannot be used here."""


@dataclass(kw_only=True)
class DecodeSlots:
    """The slots of one buffer that the queries of a decode step attend to, on the host and on the device.

    Document b's are starts[b] .. starts[b] + used[b], of which its queries are the last. The device's counts
    go on within a captured step, in which the host's are not looked at.
    """

    starts: tuple[int, ...]
    used: list[int]  # the new tokens count: at least as many as queries
    longest: int  # no document ever uses more slots
    used_B: Tensor  # int32, as the following
    bounds_B1: Tensor  # the starts and the buffer's end
    queries_B1: Tensor  # bounds of each document's queries
    queries: tuple[int, ...]  # how many each document has, at least 1
    shared: Ranges | None = None  # slots before these that several documents share, of the same buffer
    scales: Fp8Scales | None = None  # of a buffer in e4m3
    lines_B: Tensor | None = None  # of each document, in the scales
    window: int | None = None  # slots that a query sees, its own the last; None: all up to its own

    def within(self, window: int | None) -> DecodeSlots:
        """The same for queries that see the last `window` slots; None: all.

        Nothing is read of the device, so that it serves a captured step.
        """
        if window is None or self.longest <= window:
            return self
        assert self.shared is None, "attention with a window to documents that several rows share"
        most = [window + asked - 1 for asked in self.queries]
        seen_B = torch.minimum(self.used_B, self.queries_B1.diff() + (window - 1))
        bounds_B1 = self.bounds_B1.clone()
        bounds_B1[:-1] += self.used_B - seen_B
        used = [min(pair) for pair in zip(self.used, most, strict=True)]
        starts = zip(self.starts, self.used, used, strict=True)
        return replace(
            self,
            starts=tuple(start + before - left for start, before, left in starts),
            used=used,
            longest=min(self.longest, max(most)),
            used_B=seen_B,
            bounds_B1=bounds_B1,
            window=window if max(self.queries) > 1 else None,
        )

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
            starts=tuple(starts),
            used=list(used),
            longest=max(used),
            used_B=on_device(used, device, torch.int32),
            bounds_B1=on_device([*starts, slots], device, torch.int32),
            queries_B1=asked.cu_seqlens,
            queries=asked.lengths,
        )

    @property
    def ranges(self) -> Ranges:
        """The same as the kernels for few queries want it."""
        return Ranges(
            starts_N=self.bounds_B1[:-1],
            used_N=self.used_B,
            queries_N1=self.queries_B1,
            most_queries=max(self.queries),
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

    def prefill_within(
        self, q_THd: Tensor, k_TKd: Tensor, v_TKd: Tensor, segments: Segments, window: int
    ) -> Tensor:
        """The same of tokens that attend to the last `window`, their own among them."""
        parts = [
            _sdpa_within(q_THd[start:end], k_TKd[start:end], v_TKd[start:end], window)
            for start, end in segments.ranges()
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def decode(self, q_QHd: Tensor, k_SKd: Tensor, v_SKd: Tensor, slots: DecodeSlots) -> Tensor:
        """Each document's queries over its slots, (Q, H, d): the last sees all, the one before one less.

        With a window each sees the last so many of these. By kernels of ours where there are any for so few
        queries, else as the backend does it.
        """
        if slots.shared is not None:
            attended = [(k_SKd, v_SKd, ranges) for ranges in (slots.ranges, slots.shared)]
            return decoding.attention(q_QHd, attended)
        if slots.window is not None:
            return self._decode_within(q_QHd, k_SKd, v_SKd, slots, slots.window)
        if slots.scales is not None or decoding.takes(q_QHd, k_SKd, max(slots.queries)):
            return decoding.attention(q_QHd, [(k_SKd, v_SKd, slots.ranges)])
        return self.decode_many(q_QHd, k_SKd, v_SKd, slots)

    def _decode_within(
        self, q_QHd: Tensor, k_SKd: Tensor, v_SKd: Tensor, slots: DecodeSlots, window: int
    ) -> Tensor:
        """Of several queries a document, with a window."""
        assert slots.scales is None, "several tokens of a row behind keys and values in e4m3"
        if not decoding.takes(q_QHd, k_SKd, max(slots.queries)):
            return self.decode_many(q_QHd, k_SKd, v_SKd, slots)
        ranges = windowed_ranges(slots.starts, slots.used, slots.queries, window, q_QHd.device)
        return decoding.attention(q_QHd, [(k_SKd, v_SKd, ranges)])

    def decode_many(self, q_QHd: Tensor, k_SKd: Tensor, v_SKd: Tensor, slots: DecodeSlots) -> Tensor:
        """The same for any number of queries."""
        asked = q_QHd.split(slots.queries)
        outputs = [
            _sdpa_last(q, k_SKd[start : start + count], v_SKd[start : start + count], slots.window)
            for q, start, count in zip(asked, slots.starts, slots.used, strict=True)
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
        return self._causal(q_THd, k_TKd, v_TKd, segments, before=-1)

    def prefill_within(
        self, q_THd: Tensor, k_TKd: Tensor, v_TKd: Tensor, segments: Segments, window: int
    ) -> Tensor:
        return self._causal(q_THd, k_TKd, v_TKd, segments, before=window - 1)

    def _causal(self, q_THd: Tensor, k_TKd: Tensor, v_TKd: Tensor, segments: Segments, before: int) -> Tensor:
        """Of tokens that attend to themselves and so many `before` them; -1: to all."""
        options: dict[str, Any] = {"window_size": (before, 0)}  # without it, attention is not causal
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
        return self._causal(q_THd, k_TKd, v_TKd, segments)

    def prefill_within(
        self, q_THd: Tensor, k_TKd: Tensor, v_TKd: Tensor, segments: Segments, window: int
    ) -> Tensor:
        return self._causal(q_THd, k_TKd, v_TKd, segments, **_window_option(window))

    def _causal(
        self, q_THd: Tensor, k_TKd: Tensor, v_TKd: Tensor, segments: Segments, **options: Any
    ) -> Tensor:
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
            **options,
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
            max_seqlen_q=max(slots.queries),
            max_seqlen_k=slots.longest,
            seqused_k=slots.used_B,
            causal=True,
            num_splits=self.splits,
            **_window_option(slots.window),
        )


# fastest first: the order in which `auto` tries them on a GPU
BACKENDS: dict[str, Callable[[], AttentionBackend]] = {
    "fa3": Flash3Attention,
    "flash": FlashAttention,
    "cudnn": CudnnAttention,
    "varlen": VarlenAttention,
    "sdpa": SdpaAttention,
}


def _window_option(window: int | None) -> dict[str, tuple[int, int]]:
    """As FlashAttention wants it, which counts the tokens before a query's own."""
    return {} if window is None else {"window_size": (window - 1, 0)}


def choose_attention(
    wanted: str,
    *,
    device: torch.device,
    dtype: torch.dtype,
    heads: int,
    kv_heads: int,
    head_dim: int,
    slides: bool = False,
) -> tuple[AttentionBackend, dict[str, str]]:
    """The backend to use, and for each faster one why it was not taken.

    `wanted` is a name of `BACKENDS` or `auto`; with `slides` it is to have windows, too. A backend is taken
    only after a small trial on the device agrees with the reference. Raises ConfigError when none does, or
    the one asked for by name does not.
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
            _try_once(backend, device=device, dtype=dtype, slides=slides, **sizes)
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
    slides: bool,
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
    if slides:
        expected = reference.causal_attention(q, k, v, segments, TRIAL_WINDOW)
        got = backend.prefill_within(q, k, v, segments, TRIAL_WINDOW)
        _compare(got, expected, "prefill with a window")
        got = backend.decode(q[last], k, v, slots.within(TRIAL_WINDOW))
        _compare(got, expected[last], "decode with a window")


def _compare(got: Tensor, expected: Tensor, what: str) -> None:
    error = ((got.double() - expected).abs().max() / expected.abs().max()).item()
    if not error <= TOLERANCE:
        raise AttentionUnavailable(f"its {what} is off by {error:.3g} on a trial")


def _sdpa_within(q_THd: Tensor, k_TKd: Tensor, v_TKd: Tensor, window: int) -> Tensor:
    """A document whose tokens attend to the last `window`, a block of them at a time."""
    tokens = len(q_THd)
    if tokens <= window:
        return _sdpa(q_THd, k_TKd, v_TKd, causal=True)
    parts = []
    for first in range(0, tokens, WINDOW_BLOCK):
        end, reached = min(first + WINDOW_BLOCK, tokens), max(0, first - window + 1)
        parts.append(_sdpa_last(q_THd[first:end], k_TKd[reached:end], v_TKd[reached:end], window))
    return torch.cat(parts)


def _sdpa_last(q_QHd: Tensor, k_TKd: Tensor, v_TKd: Tensor, window: int | None = None) -> Tensor:
    """A document's last Q tokens over all T, or of these the last `window` each.

    SDPA's own causal mask would take them for the first ones.
    """
    queries, tokens = len(q_QHd), len(k_TKd)
    if window is not None and window >= tokens:
        window = None
    if queries == 1 and window is None:
        return _sdpa(q_QHd, k_TKd, v_TKd, causal=False)
    if queries == tokens and window is None:
        return _sdpa(q_QHd, k_TKd, v_TKd, causal=True)
    seen_QT = torch.ones(queries, tokens, dtype=torch.bool, device=q_QHd.device).tril(tokens - queries)
    if window is not None:
        seen_QT = seen_QT.triu_(tokens - queries - window + 1)
    return _sdpa(q_QHd, k_TKd, v_TKd, causal=False, mask_QT=seen_QT)


def _sdpa(
    q_QHd: Tensor, k_TKd: Tensor, v_TKd: Tensor, *, causal: bool, mask_QT: Tensor | None = None
) -> Tensor:
    """One document through SDPA, which wants (1, heads, tokens, d)."""
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q_QHd, k_TKd, v_TKd))
    grouped = q.shape[1] != k.shape[1]
    if grouped and q.is_cuda and (q.dtype == torch.float32 or mask_QT is not None):
        # no fused CUDA kernel takes grouped heads so, and the plain one would hold the Q x T matrix
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        grouped = False
    mixed = scaled_dot_product_attention(q, k, v, attn_mask=mask_QT, is_causal=causal, enable_gqa=grouped)
    return mixed.squeeze(0).transpose(0, 1)
