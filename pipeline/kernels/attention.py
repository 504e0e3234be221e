"""Causal attention over packs of documents, through whichever library is fastest on the device.

Every backend computes the same two things: `prefill`, where each document's tokens attend within the
document, and `decode`, where the newest tokens of each document, most often one, attend to its slots of the
cache. Both take sinks: a number of each query head, in float32, that counts in its softmax as the score of
one more key, whose value is zero. A library that returns the log-sum-exp of the scores need not know of them.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from importlib import import_module
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from pipeline.errors import ConfigError, first_line
from pipeline.kernels import decoding, reference
from pipeline.kernels.decode_slots import DecodeSlots
from pipeline.kernels.decoding import windowed_ranges
from pipeline.kernels.query_pieces import QueryPiece
from pipeline.kernels.sdpa import sdpa, sdpa_last
from pipeline.kernels.segments import Segments, end_to_end

TRIAL_WINDOW = 24  # tokens
TOLERANCE = 0.02  # of the reference's largest value, for a trial in bf16


class AttentionUnavailable(Exception):
    """Why a backend cannot be used here."""


class AttentionBackend(ABC):
    """One way to compute attention; chosen once, then used for every pack."""

    name: ClassVar[str]
    capture_failure: str | None = None  # why decoding with this backend goes on without CUDA graphs
    # tokens of a document from which a method may have its attention block-sparse, by plain torch where there
    # are no kernels; None: where there are kernels, and it pays
    sparse_from: int | None = None

    def cuts_queries(self, device: torch.device) -> bool:
        """Whether `prefill_piece` takes parts of documents without a mask of all their pairs."""
        return False

    def captures(self, device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
        """Whether `decode`, of a query a document, reads nothing of the host that changes between steps."""
        return decoding.available(device, dtype, head_dim)

    @abstractmethod
    def prefill(
        self,
        q_THd: Tensor,
        k_TKd: Tensor,
        v_TKd: Tensor,
        segments: Segments,
        window: int | None = None,
        sinks_H: Tensor | None = None,
    ) -> Tensor:
        """Causal attention within each document, (T, H, d).

        With a `window` each token attends to the last so many, its own among them.
        """

    def prefill_piece(
        self,
        q_QHd: Tensor,
        k_TKd: Tensor,
        v_TKd: Tensor,
        segments: Segments,
        piece: QueryPiece,
        window: int | None = None,
        sinks_H: Tensor | None = None,
    ) -> Tensor:
        """The same of some of the queries, (Q, H, d), over the keys and values of the whole pack."""
        if piece.is_whole(segments):
            return self.prefill(q_QHd, k_TKd, v_TKd, segments, window, sinks_H)
        starts = [segments.offsets[part.document] for part in piece.parts]
        counts = [part.end - part.first for part in piece.parts]
        slots = DecodeSlots.of(starts, [part.end for part in piece.parts], len(k_TKd), q_QHd.device, counts)
        return self.decode(q_QHd, k_TKd, v_TKd, slots.within(window), sinks_H)

    def decode(
        self,
        q_QHd: Tensor,
        k_SKd: Tensor,
        v_SKd: Tensor,
        slots: DecodeSlots,
        sinks_H: Tensor | None = None,
    ) -> Tensor:
        """Each document's queries over its slots, (Q, H, d): the last sees all, the one before one less.

        With a window each sees the last so many of these. By kernels of ours where there are any for so few
        queries, else as the backend does it.
        """
        if slots.shared is not None:
            attended = [(k_SKd, v_SKd, ranges) for ranges in (slots.ranges, slots.shared)]
            return decoding.attention(q_QHd, attended, sinks_H)
        if slots.window is not None:
            return self._decode_within(q_QHd, k_SKd, v_SKd, slots, slots.window, sinks_H)
        by_ranges = slots.scales is not None or slots.host is None
        if by_ranges or decoding.takes(q_QHd, k_SKd, slots.most_queries):
            return decoding.attention(q_QHd, [(k_SKd, v_SKd, slots.ranges)], sinks_H)
        return self.decode_many(q_QHd, k_SKd, v_SKd, slots, sinks_H)

    def _decode_within(
        self,
        q_QHd: Tensor,
        k_SKd: Tensor,
        v_SKd: Tensor,
        slots: DecodeSlots,
        window: int,
        sinks_H: Tensor | None,
    ) -> Tensor:
        """Of several queries a document, with a window."""
        assert slots.scales is None, "several tokens of a row behind keys and values in e4m3"
        if not decoding.takes(q_QHd, k_SKd, slots.most_queries):
            return self.decode_many(q_QHd, k_SKd, v_SKd, slots, sinks_H)
        ranges = windowed_ranges(*slots.known, window, q_QHd.device)
        return decoding.attention(q_QHd, [(k_SKd, v_SKd, ranges)], sinks_H)

    def decode_many(
        self,
        q_QHd: Tensor,
        k_SKd: Tensor,
        v_SKd: Tensor,
        slots: DecodeSlots,
        sinks_H: Tensor | None = None,
    ) -> Tensor:
        """The same for any number of queries."""
        starts, used, queries = slots.known
        outputs = [
            sdpa_last(q, k_SKd[start : start + count], v_SKd[start : start + count], slots.window, sinks_H)
            for q, start, count in zip(q_QHd.split(queries), starts, used, strict=True)
        ]
        return torch.cat(outputs)


class SdpaAttention(AttentionBackend):
    """torch's scaled_dot_product_attention, a document at a time, with torch's own choice of kernel."""

    name = "sdpa"

    def cuts_queries(self, device: torch.device) -> bool:
        return device.type == "cpu"  # where masks, some queries at a time, cost little time

    def prefill(
        self,
        q_THd: Tensor,
        k_TKd: Tensor,
        v_TKd: Tensor,
        segments: Segments,
        window: int | None = None,
        sinks_H: Tensor | None = None,
    ) -> Tensor:
        outputs = []
        for start, end in segments.ranges():
            q, k, v = (x[start:end] for x in (q_THd, k_TKd, v_TKd))
            if window is not None and window < end - start:
                outputs.append(sdpa_last(q, k, v, window, sinks_H))
                continue
            with self._kernel(end - start):
                outputs.append(sdpa(q, k, v, causal=True, sinks_H=sinks_H))
        return end_to_end(outputs)

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
            module = import_module("torch.nn.attention.varlen")
            self._attend, self._with_logs = module.varlen_attn, module.AuxRequest(lse=True)
        except (ImportError, AttributeError) as error:
            raise AttentionUnavailable("this torch has no torch.nn.attention.varlen") from error
        # grouped heads came after torch 2.11; before, key/value heads are repeated by us
        self._grouped = "enable_gqa" in inspect.signature(self._attend).parameters

    def prefill(
        self,
        q_THd: Tensor,
        k_TKd: Tensor,
        v_TKd: Tensor,
        segments: Segments,
        window: int | None = None,
        sinks_H: Tensor | None = None,
    ) -> Tensor:
        # how many tokens before its own one attends to, -1 for all; without it, attention is not causal
        options: dict[str, Any] = {"window_size": (-1 if window is None else window - 1, 0)}
        if self._grouped:
            options["enable_gqa"] = True
        else:
            groups = q_THd.shape[1] // k_TKd.shape[1]
            k_TKd, v_TKd = (x.repeat_interleave(groups, dim=1) for x in (k_TKd, v_TKd))
        if sinks_H is not None:
            options["return_aux"] = self._with_logs
        bounds, longest = segments.cu_seqlens, segments.longest
        made: Any = self._attend(q_THd, k_TKd, v_TKd, bounds, bounds, longest, longest, **options)
        return made if sinks_H is None else _with_sinks_(made[0], made[1], sinks_H)


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

    def prefill(
        self,
        q_THd: Tensor,
        k_TKd: Tensor,
        v_TKd: Tensor,
        segments: Segments,
        window: int | None = None,
        sinks_H: Tensor | None = None,
    ) -> Tensor:
        bounds, longest = segments.cu_seqlens, segments.longest
        return self._call(
            (q_THd, k_TKd, v_TKd),
            sinks_H,
            cu_seqlens_q=bounds,
            cu_seqlens_k=bounds,
            max_seqlen_q=longest,
            max_seqlen_k=longest,
            causal=True,
            **_window_option(window),
        )

    def _call(self, tensors: tuple[Tensor, Tensor, Tensor], sinks_H: Tensor | None, **options: Any) -> Tensor:
        if sinks_H is not None:
            attended, logs, *_ = self._attend(*tensors, **options, return_attn_probs=True)
            return _with_sinks_(attended, logs, sinks_H)
        result = self._attend(*tensors, **options)
        return result[0] if isinstance(result, tuple) else result


class Flash3Attention(FlashAttention):
    """FlashAttention-3 for Hopper, from the prebuilt wheel fa3-fwd."""

    name = "fa3"
    module = "fa3_fwd_interface"
    # of a document's keys, for few queries; 0: as many as fill the device. With 1, the library's default for
    # packs, a few documents would leave most of its multiprocessors idle
    splits: ClassVar[int] = 0

    def cuts_queries(self, device: torch.device) -> bool:
        return True

    def captures(self, device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
        return device.type == "cuda"

    def decode_many(
        self,
        q_QHd: Tensor,
        k_SKd: Tensor,
        v_SKd: Tensor,
        slots: DecodeSlots,
        sinks_H: Tensor | None = None,
    ) -> Tensor:
        return self._call(
            (q_QHd, k_SKd, v_SKd),
            sinks_H,
            cu_seqlens_q=slots.queries_B1,
            cu_seqlens_k=slots.bounds_B1,
            max_seqlen_q=slots.most_queries,
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


def _with_sinks_(attended_THd: Tensor, logs_HT: Tensor, sinks_H: Tensor) -> Tensor:
    """What sinks leave of attention, whose natural log-sum-exp is given: in place."""
    share_HT = torch.sigmoid(logs_HT - sinks_H[:, None])
    return attended_THd.mul_(share_HT.t()[..., None])


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
    sinks: bool = False,
) -> tuple[AttentionBackend, dict[str, str]]:
    """The backend to use, and for each faster one why it was not taken.

    `wanted` is a name of `BACKENDS` or `auto`; with `slides` it is to have windows, too, and sinks with
    `sinks`. A backend is taken only after a small trial on the device agrees with the reference. Raises
    ConfigError when none does, or the one asked for by name does not.
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
            _try_once(backend, device=device, dtype=dtype, slides=slides, sinks=sinks, **sizes)
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
    sinks: bool,
) -> None:
    segments = Segments.of((70, 33), device)
    generator = torch.Generator(device="cpu").manual_seed(0)
    shapes = [(segments.total, n, head_dim) for n in (heads, kv_heads, kv_heads)]
    q, k, v = (torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes)
    sinks_H = torch.randn(heads, generator=generator).to(device) if sinks else None
    last = segments.last_indices()
    whole = DecodeSlots.of(segments.offsets[:-1], segments.lengths, segments.total, device)
    for window in (None, TRIAL_WINDOW) if slides else (None,):
        traits = [*(["a window"] if window else []), *(["sinks"] if sinks else [])]
        told = f" with {' and '.join(traits)}" if traits else ""
        expected = reference.causal_attention(q, k, v, segments, window, sinks_H)
        _compare(backend.prefill(q, k, v, segments, window, sinks_H), expected, f"prefill{told}")
        got = backend.decode(q[last], k, v, whole.within(window), sinks_H)
        _compare(got, expected[last], f"decode{told}")


def _compare(got: Tensor, expected: Tensor, what: str) -> None:
    error = ((got.double() - expected).abs().max() / expected.abs().max()).item()
    if not error <= TOLERANCE:
        raise AttentionUnavailable(f"its {what} is off by {error:.3g} on a trial")
