"""Operations a second of attention alone: every backend that works here, on single documents and packs."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pipeline.bench.ceilings import wait_for
from pipeline.checkpoints.random_weights import SHAPES
from pipeline.errors import ConfigError
from pipeline.kernels import reference
from pipeline.kernels.attention import BACKENDS
from pipeline.kernels.segments import Segments
from pipeline.model.loading import attention_for
from pipeline.pruning.operations import attention_flops
from pipeline.pruning.shape import ModelShape

CANDIDATES = tuple(BACKENDS)

TRIAL_LENGTHS = (331, 64, 129)  # against the reference, which holds whole matrices in float64
SHORTEST_TURN_S = 0.02  # calls are timed in runs that last so long: one is short beside a wait for the device
MOST_CALLS = 50


class Candidate(NamedTuple):
    """Something that computes causal attention within each document of a pack."""

    name: str
    prefill: Callable[[Tensor, Tensor, Tensor, Segments], Tensor]  # (T, H, d), (T, K, d) twice -> (T, H, d)


@dataclass(frozen=True, kw_only=True)
class PackRate:
    """One candidate on one pack; times of a single call in milliseconds, warm-up left out."""

    pack: str
    documents: int
    tokens: int
    median_ms: float
    fastest_ms: float
    slowest_ms: float
    tflops_per_second: float  # at the median; operations of the causal triangles alone


@dataclass(kw_only=True)
class AttentionMeasurement:
    """One candidate: its error, and its rate on each pack that it could run."""

    backend: str
    relative_error: float  # Frobenius norm of the difference from float64, over that of float64's result
    rates: list[PackRate] = field(default_factory=list)
    failures: dict[str, str] = field(default_factory=dict)  # of a pack: why not

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def attention_shape(
    name: str, *, heads: int | None = None, kv_heads: int | None = None, head_dim: int | None = None
) -> ModelShape:
    """The heads of a published shape, or others; of its other dimensions attention knows nothing."""
    if name not in SHAPES:
        raise ConfigError(f"--shape {name!r}: choose from {', '.join(SHAPES)}")
    settings = SHAPES[name][1]
    of_shape = settings["num_attention_heads"]
    width = head_dim or settings["hidden_size"] // of_shape
    heads, kv_heads = heads or of_shape, kv_heads or settings["num_key_value_heads"]
    if heads % kv_heads:
        raise ConfigError(f"--heads {heads} is no multiple of --kv-heads {kv_heads}")
    sizes = {"layers": 1, "hidden": heads * width, "ffn": 0, "vocab": 0}
    return ModelShape(heads=heads, kv_heads=kv_heads, head_dim=width, context=0, **sizes)


def available(
    names: Sequence[str], shape: ModelShape, *, device: torch.device, dtype: torch.dtype
) -> tuple[list[Candidate], dict[str, str]]:
    """The backends that pass their trial here, and why the others do not; ConfigError for unknown names."""
    unknown = next((name for name in names if name not in CANDIDATES), None)
    if unknown is not None:
        raise ConfigError(f"unknown attention backend {unknown!r}; backends: {', '.join(CANDIDATES)}")
    found: list[Candidate] = []
    refused: dict[str, str] = {}
    for name in dict.fromkeys(names):
        try:
            backend, _others = attention_for(name, device, dtype, shape)
        except ConfigError as error:
            refused[name] = str(error).rpartition(f" {name}: ")[2]
        else:
            found.append(Candidate(name, backend.prefill))
    return found, refused


@torch.inference_mode()
def measure_attention(
    candidates: Sequence[Candidate],
    packs: Mapping[str, Sequence[int]],
    shape: ModelShape,
    *,
    device: torch.device,
    dtype: torch.dtype,
    repeats: int,
) -> list[AttentionMeasurement]:
    """Run every candidate on every pack (a name, and the lengths of its documents), taking turns."""
    results = [
        AttentionMeasurement(
            backend=candidate.name,
            relative_error=relative_error(candidate, shape, device=device, dtype=dtype),
        )
        for candidate in candidates
    ]
    for pack, lengths in packs.items():
        segments = Segments.of(lengths, device)
        qkv = _random_qkv(shape, segments, dtype)
        operations = sum(attention_flops(shape, length) for length in lengths)
        runs: list[tuple[AttentionMeasurement, Candidate, int, list[float]]] = []
        for result, candidate in zip(results, candidates, strict=True):
            try:
                calls = _calls_a_turn(candidate, qkv, segments)
            except (
                RuntimeError,
                TypeError,
                ValueError,
            ) as error:  # out of memory, or a size that its kernel does not take
                result.failures[pack] = f"{type(error).__name__}: {error}".splitlines()[0]
            else:
                runs.append((result, candidate, calls, []))
        for _turn in range(repeats):
            for _result, candidate, calls, times in runs:
                times.append(_seconds(candidate, qkv, segments, calls) / calls * 1e3)
        for result, _candidate, _calls, times in runs:
            median = statistics.median(times)
            result.rates.append(
                PackRate(
                    pack=pack,
                    documents=len(lengths),
                    tokens=segments.total,
                    median_ms=median,
                    fastest_ms=min(times),
                    slowest_ms=max(times),
                    tflops_per_second=operations / median / 1e9,
                )
            )
        del qkv
    return results


@torch.inference_mode()
def relative_error(
    candidate: Candidate, shape: ModelShape, *, device: torch.device, dtype: torch.dtype
) -> float:
    """How far a candidate is from float64 on the same rounded inputs, in a small pack."""
    segments = Segments.of(TRIAL_LENGTHS, device)
    q_THd, k_TKd, v_TKd = _random_qkv(shape, segments, dtype)
    expected = reference.causal_attention(q_THd, k_TKd, v_TKd, segments)
    difference = candidate.prefill(q_THd, k_TKd, v_TKd, segments).double() - expected
    return (difference.norm() / expected.norm()).item()


def _random_qkv(shape: ModelShape, segments: Segments, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator(segments.device).manual_seed(0)
    q, k, v = (
        torch.randn(
            segments.total, heads, shape.head_dim, generator=generator, device=segments.device, dtype=dtype
        )
        for heads in (shape.heads, shape.kv_heads, shape.kv_heads)
    )
    return q, k, v


def _calls_a_turn(candidate: Candidate, qkv: tuple[Tensor, Tensor, Tensor], segments: Segments) -> int:
    """Calls that last long enough to be timed, after one that warms up."""
    _seconds(candidate, qkv, segments, 1)
    seconds = _seconds(candidate, qkv, segments, 1)
    return max(1, min(MOST_CALLS, round(SHORTEST_TURN_S / seconds)))


def _seconds(
    candidate: Candidate, qkv: tuple[Tensor, Tensor, Tensor], segments: Segments, calls: int
) -> float:
    wait_for(segments.device)
    started = time.perf_counter()
    for _call in range(calls):
        candidate.prefill(*qkv, segments)
    wait_for(segments.device)
    return time.perf_counter() - started
