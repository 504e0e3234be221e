"""Operations a second of attention alone: every backend that works here, on single documents and packs."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from pipeline.bench.ceilings import random_qkv
from pipeline.bench.timing import in_turns, now
from pipeline.checkpoints.random_weights import SHAPES
from pipeline.errors import ConfigError
from pipeline.kernels import reference
from pipeline.kernels.attention import BACKENDS
from pipeline.kernels.segments import Segments
from pipeline.model.loading import attention_for
from pipeline.pruning.operations import attention_flops
from pipeline.pruning.shape import ModelShape

CANDIDATES = tuple(BACKENDS)
# causal attention within each document of a pack: (T, H, d), (T, K, d) twice -> (T, H, d)
Prefill = Callable[..., Tensor]
TRIAL_LENGTHS = (331, 64, 129)  # against the reference, which holds whole matrices in float64
SHORTEST_TURN_S = 0.02  # calls are timed in runs that last so long: one is short beside a wait for the device
MOST_CALLS = 50


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


def attention_shape(
    name: str, *, heads: int | None = None, kv_heads: int | None = None, head_dim: int | None = None
) -> ModelShape:
    """The heads of a published shape, or others; of its other dimensions attention knows nothing."""
    if name not in SHAPES:
        raise ConfigError(f"--shape {name!r}: choose from {', '.join(SHAPES)}")
    settings = SHAPES[name][1]
    of_shape = settings["num_attention_heads"]
    width = head_dim or settings.get("head_dim") or settings["hidden_size"] // of_shape
    heads, kv_heads = heads or of_shape, kv_heads or settings["num_key_value_heads"]
    if heads % kv_heads:
        raise ConfigError(f"--heads {heads} is no multiple of --kv-heads {kv_heads}")
    return ModelShape(
        layers=1,
        hidden=heads * width,
        ffn=0,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=width,
        vocab=0,
        context=0,
    )


def available(
    names: Sequence[str], shape: ModelShape, *, device: torch.device, dtype: torch.dtype
) -> tuple[dict[str, Prefill], dict[str, str]]:
    """The backends that pass their trial here, and why the others do not; ConfigError for unknown names."""
    unknown = next((name for name in names if name not in CANDIDATES), None)
    if unknown is not None:
        raise ConfigError(f"unknown attention backend {unknown!r}; backends: {', '.join(CANDIDATES)}")
    found: dict[str, Prefill] = {}
    refused: dict[str, str] = {}
    for name in dict.fromkeys(names):
        try:
            backend, _others = attention_for(name, device, dtype, shape)
        except ConfigError as error:
            refused[name] = str(error).rpartition(f" {name}: ")[2]
        else:
            found[name] = backend.prefill
    return found, refused


@torch.inference_mode()
def measure_attention(
    candidates: Mapping[str, Prefill],
    packs: Mapping[str, Sequence[int]],
    shape: ModelShape,
    *,
    device: torch.device,
    dtype: torch.dtype,
    repeats: int,
) -> list[AttentionMeasurement]:
    """Run every candidate on every pack (a name, and the lengths of its documents), taking turns."""
    results = {
        name: AttentionMeasurement(
            backend=name, relative_error=relative_error(prefill, shape, device=device, dtype=dtype)
        )
        for name, prefill in candidates.items()
    }
    for pack, lengths in packs.items():
        segments = Segments.of(lengths, device)
        qkv = random_qkv(shape, segments.total, device, dtype)
        operations = sum(attention_flops(shape, length) for length in lengths)
        calls: dict[str, int] = {}
        for name, prefill in candidates.items():
            try:
                calls[name] = _calls_a_turn(prefill, qkv, segments)
            except (RuntimeError, TypeError, ValueError) as error:  # no memory, or a size that it cannot take
                results[name].failures[pack] = f"{type(error).__name__}: {error}".splitlines()[0]
        runs = {name: partial(_seconds, candidates[name], qkv, segments, n) for name, n in calls.items()}
        for name, seconds in in_turns(runs, repeats).items():
            times = [each / calls[name] * 1e3 for each in seconds]
            median = statistics.median(times)
            results[name].rates.append(
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
    return list(results.values())


@torch.inference_mode()
def relative_error(prefill: Prefill, shape: ModelShape, *, device: torch.device, dtype: torch.dtype) -> float:
    """How far a candidate is from float64 on the same rounded inputs, in a small pack."""
    segments = Segments.of(TRIAL_LENGTHS, device)
    q_THd, k_TKd, v_TKd = random_qkv(shape, segments.total, device, dtype)
    expected = reference.causal_attention(q_THd, k_TKd, v_TKd, segments)
    return distance(prefill(q_THd, k_TKd, v_TKd, segments), expected)


def distance(got: Tensor, expected: Tensor) -> float:
    """Norm of the difference over that of what is expected; not a number where `got` holds one."""
    return ((got.double() - expected.double()).norm() / expected.double().norm()).item()


def _calls_a_turn(prefill: Prefill, qkv: Sequence[Tensor], segments: Segments) -> int:
    """Calls that last long enough to be timed, after one that warms up."""
    _seconds(prefill, qkv, segments, 1)
    seconds = _seconds(prefill, qkv, segments, 1)
    return max(1, min(MOST_CALLS, round(SHORTEST_TURN_S / seconds)))


def _seconds(prefill: Prefill, qkv: Sequence[Tensor], segments: Segments, calls: int) -> float:
    started = now(segments.device)
    for _call in range(calls):
        prefill(*qkv, segments)
    return now(segments.device) - started
