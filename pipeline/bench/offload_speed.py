"""What it costs to offload K/V to the host: beside a cache that stays, and beside copies that do not hide."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from pipeline.bench.ceilings import wait_for
from pipeline.errors import ConfigError, RowError
from pipeline.model.decode import StopRules, decode
from pipeline.model.loading import LoadedModel
from pipeline.model.offload import KvLimits, OffloadedCache
from pipeline.model.prefill import Pack, Prefilled, prefill
from pipeline.pruning.base import PruningMethod
from pipeline.records import EncodedDocument


@dataclass(frozen=True, kw_only=True)
class OffloadMeasurement:
    """One variant; medians over the repeats, device-synchronised, warm-up left out."""

    variant: str
    tokens: int
    ttft_ms: float
    step_ms: float  # of a decode step
    step_ms_spread: tuple[float, float]
    device_kv_bytes: int
    host_kv_bytes: int
    peak_bytes: int | None
    decisions: int
    swaps: int
    swapped_bytes_per_step: float
    copy_ms_per_step: float | None  # on the copying stream; None on the CPU
    stall_ms_per_step: float | None  # of the computing stream, waiting for copies
    # share of the answer up to the first token that differs from that of the cache that stays on the device,
    # whose active set is larger, and from that of synchronous copies, whose active set is the same
    same_as_resident: float | None = None
    same_as_synchronous: float | None = None

    @property
    def hidden(self) -> float | None:
        """Share of the copies' time in which the computing stream did not wait."""
        if not self.copy_ms_per_step or self.stall_ms_per_step is None:
            return None
        return max(0.0, 1 - self.stall_ms_per_step / self.copy_ms_per_step)

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "hidden": self.hidden}


def measure_offload(
    model: LoadedModel,
    document: EncodedDocument,
    method: PruningMethod,
    *,
    device_bytes: int,
    host_bytes: int,
    new_tokens: int,
    repeats: int,
    with_resident: bool = True,
) -> list[OffloadMeasurement]:
    """A cache that stays, one that offloads behind the computation, and one that waits for its copies.

    Raises ConfigError for a document that does not fit the limits.
    """
    limits = KvLimits(device_bytes=device_bytes, host_bytes=host_bytes, measure=True)
    variants: dict[str, KvLimits | None] = {
        "all on the device": None,
        "offloaded": limits,
        "offloaded, synchronous": replace(limits, synchronous=True),
    }
    if not with_resident:
        del variants["all on the device"]
    runs: dict[str, list[_OffloadRun]] = {name: [] for name in variants}
    for _turn in range(repeats + 1):  # the first turn warms up
        for name, chosen in variants.items():
            runs[name].append(_run(model, document, method, chosen, new_tokens))
    resident = runs["all on the device"][0].answer if with_resident else None
    synchronous = runs["offloaded, synchronous"][0].answer
    return [
        replace(
            _measurement(name, document, timed[1:]),
            same_as_resident=_agreement(timed, resident) if resident else None,
            same_as_synchronous=_agreement(timed, synchronous) if chosen else None,
        )
        for (name, timed), chosen in zip(runs.items(), variants.values(), strict=True)
    ]


@dataclass(kw_only=True)
class _OffloadRun:
    ttft_ms: float
    step_ms: float
    answer: list[int]
    peak_bytes: int | None
    device_kv_bytes: int
    host_kv_bytes: int = 0
    decisions: int = 0
    swaps: int = 0
    swapped_bytes: int = 0
    copy_ms: float | None = None
    stall_ms: float | None = None
    steps: int = 1


def _run(
    model: LoadedModel,
    document: EncodedDocument,
    method: PruningMethod,
    limits: KvLimits | None,
    new_tokens: int,
) -> _OffloadRun:
    cuda = model.device.type == "cuda"
    gc.collect()
    if cuda:
        torch.cuda.reset_peak_memory_stats(model.device)
    pack = Pack.of([document], model.device)
    started = _now(model.device)
    try:
        prefilled = prefill(model.adapter, model.attention, method, pack, new_tokens, limits=limits)
    except RowError as error:
        raise ConfigError(str(error)) from error
    first_at = _now(model.device)
    rules = StopRules(max_new_tokens=new_tokens)
    (generated,) = decode(model.adapter, model.attention, prefilled, rules)
    ended = _now(model.device)
    run = _OffloadRun(
        ttft_ms=(first_at - started) * 1e3,
        step_ms=(ended - first_at) * 1e3 / max(new_tokens - 1, 1),
        answer=generated.tokens,
        peak_bytes=torch.cuda.max_memory_allocated(model.device) if cuda else None,
        device_kv_bytes=prefilled.cache.nbytes,
    )
    _add_traffic(run, prefilled)
    return run


def _add_traffic(run: _OffloadRun, prefilled: Prefilled) -> None:
    cache = prefilled.cache
    if not isinstance(cache, OffloadedCache):
        return
    traffic = cache.counts
    run.host_kv_bytes, run.steps = cache.host_bytes, max(traffic.steps, 1)
    run.decisions, run.swaps, run.swapped_bytes = traffic.decisions, traffic.swaps, traffic.swapped_bytes
    run.copy_ms, run.stall_ms = cache.copy_ms()


def _measurement(name: str, document: EncodedDocument, runs: Sequence[_OffloadRun]) -> OffloadMeasurement:
    last = runs[-1]
    copies = [run.copy_ms / run.steps for run in runs if run.copy_ms is not None]
    stalls = [run.stall_ms / run.steps for run in runs if run.stall_ms is not None]
    steps_ms = sorted(run.step_ms for run in runs)
    return OffloadMeasurement(
        variant=name,
        tokens=document.prompt_tokens,
        ttft_ms=statistics.median(run.ttft_ms for run in runs),
        step_ms=statistics.median(steps_ms),
        step_ms_spread=(steps_ms[0], steps_ms[-1]),
        device_kv_bytes=last.device_kv_bytes,
        host_kv_bytes=last.host_kv_bytes,
        peak_bytes=last.peak_bytes,
        decisions=last.decisions,
        swaps=last.swaps,
        swapped_bytes_per_step=last.swapped_bytes / last.steps,
        copy_ms_per_step=statistics.median(copies) if copies else None,
        stall_ms_per_step=statistics.median(stalls) if stalls else None,
    )


def _agreement(runs: Sequence[_OffloadRun], reference: Sequence[int]) -> float:
    """Share of tokens up to the first that differs, in the worst run."""
    same = len(reference)
    for run in runs:
        pairs = zip(run.answer, reference, strict=True)
        same = min(same, next((i for i, (a, b) in enumerate(pairs) if a != b), same))
    return same / len(reference)


def _now(device: torch.device) -> float:
    wait_for(device)
    return time.perf_counter()
