"""What it costs to offload K/V to the host: beside a cache that stays, and beside copies that do not hide."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from pipeline.bench.timing import in_turns, now, peak_bytes, tidied
from pipeline.errors import ConfigError
from pipeline.generation.decode import decode
from pipeline.generation.generated import StopRules
from pipeline.model.cache import RaggedCache
from pipeline.model.loading import LoadedModel
from pipeline.model.offload import KvLimits, OffloadedCache
from pipeline.model.prefill import Pack, prefill
from pipeline.pruning.base import PruningMethod
from pipeline.records import EncodedDocument, RowError


@dataclass(frozen=True, kw_only=True)
class OffloadMeasurement:
    """One variant; medians over the repeats, device-synchronised, warm-up left out."""

    variant: str
    tokens: int
    ttft_ms: float
    step_ms: float  # of a decode step
    step_ms_spread: tuple[float, float]
    device_kv_bytes: int
    host_kv_bytes: int = 0
    peak_bytes: int | None
    decisions: int = 0
    swaps: int = 0
    swapped_bytes_per_step: float = 0.0
    copy_ms_per_step: float | None = None  # on the copying stream; None on the CPU
    stall_ms_per_step: float | None = None  # of the computing stream, waiting for copies
    # share of the answer up to the first token that differs from that of the cache that stays on the device,
    # whose active set is larger, and from that of synchronous copies, whose active set is the same
    same_as_resident: float | None = None
    same_as_synchronous: float | None = None
    hidden: float | None = None  # share of the copies' time in which the computing stream did not wait


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
    check: Callable[[], None] = lambda: None,
) -> list[OffloadMeasurement]:
    """A cache that stays, one that offloads behind the computation, and one that waits for its copies.

    `check` is called before each run, and may raise to give up. Raises ConfigError for a document that does
    not fit the limits.
    """
    limits = KvLimits(device_bytes=device_bytes, host_bytes=host_bytes, measure=True)
    variants: dict[str, KvLimits | None] = {
        "all on the device": None,
        "offloaded": limits,
        "offloaded, synchronous": replace(limits, synchronous=True),
    }
    if not with_resident:
        del variants["all on the device"]
    run = partial(_run, model, document, method, new_tokens)
    runs = {name: partial(run, name, chosen) for name, chosen in variants.items()}
    done = in_turns(runs, repeats + 1, check)  # the first turn warms up
    answers = {name: [answer for _, answer in own] for name, own in done.items()}
    resident = answers["all on the device"][0] if with_resident else None
    synchronous = answers["offloaded, synchronous"][0]
    return [
        replace(
            _medians([measured for measured, _ in done[name][1:]]),
            same_as_resident=_agreement(answers[name], resident) if resident else None,
            same_as_synchronous=_agreement(answers[name], synchronous) if chosen else None,
        )
        for name, chosen in variants.items()
    ]


def _run(
    model: LoadedModel,
    document: EncodedDocument,
    method: PruningMethod,
    new_tokens: int,
    variant: str,
    limits: KvLimits | None,
) -> tuple[OffloadMeasurement, list[int]]:
    """One answer, measured, and its tokens."""
    pack = Pack.of([document], model.device)
    started = tidied(model.device)
    try:
        prefilled = prefill(
            model.decoder, model.attention, method, pack, new_tokens, limits=limits, draft=model.draft
        )
    except RowError as error:
        raise ConfigError(str(error)) from error
    first_at = now(model.device)
    rules = StopRules(max_new_tokens=new_tokens)
    (generated,) = decode(model.decoder, model.attention, prefilled, rules)
    step_ms = (now(model.device) - first_at) * 1e3 / max(new_tokens - 1, 1)
    return OffloadMeasurement(
        variant=variant,
        tokens=document.prompt_tokens,
        ttft_ms=(first_at - started) * 1e3,
        step_ms=step_ms,
        step_ms_spread=(step_ms, step_ms),
        device_kv_bytes=prefilled.cache.nbytes,
        peak_bytes=peak_bytes(model.device),
        **_traffic(prefilled.cache),
    ), generated.tokens


def _traffic(cache: RaggedCache) -> dict[str, Any]:
    """Fields of a measurement: what went between device and host, if anything could."""
    if not isinstance(cache, OffloadedCache):
        return {}
    counts, times_ms = cache.counts, cache.copy_ms()
    steps = max(counts.steps, 1)
    copy_ms, stall_ms = (None if ms is None else ms / steps for ms in times_ms)
    return {
        "host_kv_bytes": cache.host_bytes,
        "decisions": counts.decisions,
        "swaps": counts.swaps,
        "swapped_bytes_per_step": counts.swapped_bytes / steps,
        "copy_ms_per_step": copy_ms,
        "stall_ms_per_step": stall_ms,
    }


def _medians(runs: Sequence[OffloadMeasurement]) -> OffloadMeasurement:
    """The last run, with the times of them all."""
    steps_ms = [run.step_ms for run in runs]
    times: dict[str, Any] = {"step_ms_spread": (min(steps_ms), max(steps_ms))}
    for name in ("ttft_ms", "step_ms", "copy_ms_per_step", "stall_ms_per_step"):
        known = [ms for run in runs if (ms := getattr(run, name)) is not None]
        times[name] = statistics.median(known) if known else None
    copy_ms, stall_ms = times["copy_ms_per_step"], times["stall_ms_per_step"]
    hidden = max(0.0, 1 - stall_ms / copy_ms) if copy_ms and stall_ms is not None else None
    return replace(runs[-1], hidden=hidden, **times)


def _agreement(answers: Sequence[Sequence[int]], reference: Sequence[int]) -> float:
    """Share of tokens up to the first that differs, in the worst of several answers."""
    same = len(reference)
    for answer in answers:
        pairs = zip(answer, reference, strict=True)
        same = min(same, next((i for i, (a, b) in enumerate(pairs) if a != b), same))
    return same / len(reference)
