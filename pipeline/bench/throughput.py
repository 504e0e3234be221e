"""A whole batch, from file to answers: documents a second, and how long the device had nothing to do."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.autograd.profiler import profile

from pipeline.bench.timing import wait_for
from pipeline.errors import InputError
from pipeline.model.loading import LoadedModel
from pipeline.model.variant import Variant
from pipeline.run import run_batch
from pipeline.summary import Summary

Interval = tuple[int, int]  # start and end in nanoseconds


@dataclass(frozen=True, kw_only=True)
class Throughput:
    """One run of a batch. `wall_s` goes from the first pack's start to the last pack's end, warmed up."""

    variant: str
    documents: int  # that were answered
    errors: int
    prompt_tokens: int
    new_tokens: int
    packs: int
    run_s: float  # the whole run, with reading the first rows, warming up, and writing the output
    warm_up_s: float
    wall_s: float
    prefill_s: float  # until the first tokens were known, over all packs
    decode_s: float
    idle: float | None  # share without a kernel or a copy, of a second run's wall time; None on the CPU
    profiled_wall_s: float | None  # of that run, which the profiler slows down
    between_packs_s: float  # neither prefill nor decode: statistics, the journal, packing, waiting for rows
    documents_per_second: float  # of the wall time, as all that follow
    prompt_tokens_per_second: float
    new_tokens_per_second: float
    prefill_share: float
    decode_share: float
    between_packs_share: float


def measure_throughput(
    model: LoadedModel,
    variant: Variant,
    input: str | Sequence[str],
    *,
    note: Callable[[str], None] = lambda text: None,
    **options: Any,
) -> Throughput:
    """Run `input` through `run_batch`, into a folder that is thrown away; `options` are `run_batch`'s.

    On a GPU twice: the second time under the profiler, for the idle share alone. InputError where no row
    is answered.
    """

    def run(note: Callable[[str], None] = lambda text: None) -> Summary:
        with tempfile.TemporaryDirectory(prefix="marsinfer-bench-") as folder:
            return run_batch(
                input,
                str(Path(folder) / "answers.jsonl"),
                model=model,
                method=variant.method,
                linear_dtype=variant.linears,
                group="off",  # else rows about one document might be answered by dense
                note=note,
                **options,
            )

    summary = run(note)
    times = summary.times
    if not times.packs:
        kinds = ", ".join(f"{kind} {count:,}" for kind, count in summary.errors.most_common(3))
        named = input if isinstance(input, str) else ", ".join(input)
        raise InputError(f"{named} has no row that was answered" + (f" ({kinds})" if kinds else ""))
    idle = _profiled(run, model.device) if model.device.type == "cuda" else None
    wall_s, between_s = times.span_s, times.span_s - times.prefill_s - times.decode_s
    return Throughput(
        variant=variant.name,
        documents=summary.status["ok"],
        errors=summary.status["error"],
        prompt_tokens=summary.prompt_tokens,
        new_tokens=summary.new_tokens,
        packs=times.packs,
        run_s=summary.seconds,
        warm_up_s=times.warm_up_s,
        wall_s=wall_s,
        prefill_s=times.prefill_s,
        decode_s=times.decode_s,
        idle=idle and idle[0],
        profiled_wall_s=idle and idle[1],
        between_packs_s=between_s,
        documents_per_second=summary.status["ok"] / wall_s,
        prompt_tokens_per_second=summary.prompt_tokens / wall_s,
        new_tokens_per_second=summary.new_tokens / wall_s,
        prefill_share=times.prefill_s / wall_s,
        decode_share=times.decode_s / wall_s,
        between_packs_share=between_s / wall_s,
    )


def _profiled(run: Callable[[], Summary], device: torch.device) -> tuple[float, float] | None:
    """The idle share of a run's wall time, and that time; None where the profiler saw nothing."""
    _mark(device)  # the marker's kernel is loaded before it is timed
    with profile(use_cpu=False, use_device="cuda", use_kineto=True) as profiler:
        marked_ns = _mark(device)
        summary = run()
        wait_for(device)
    # not `events()`, which makes Python objects of all kernels and sorts them into a tree
    assert profiler.kineto_results is not None
    busy = [
        (event.start_ns(), event.start_ns() + event.duration_ns())
        for event in profiler.kineto_results.events()
        if event.device_type() == DeviceType.CUDA and event.device_index() == device.index
    ]
    times = summary.times
    if not busy or times.began is None or times.ended is None:
        return None
    # the profiler's clock is not ours: the first thing that it saw is the marker
    offset_ns = min(busy)[0] - marked_ns
    window = (int(times.began * 1e9) + offset_ns, int(times.ended * 1e9) + offset_ns)
    return idle_share(busy, window), times.span_s


def _mark(device: torch.device) -> int:
    """Launch one kernel on the idle device; returns when, in nanoseconds of time.perf_counter()."""
    wait_for(device)
    started_ns = time.perf_counter_ns()
    torch.zeros(1, device=device)
    wait_for(device)
    return started_ns


def idle_share(busy: Iterable[Interval], window: Interval) -> float:
    """Share of `window` that none of the intervals covers; they may overlap, and reach beyond it."""
    first, last = window
    covered, reached = 0, first
    for start, end in sorted(busy):
        start, end = max(start, reached), min(end, last)
        if end > start:
            covered += end - start
            reached = end
    return 1 - covered / (last - first)
