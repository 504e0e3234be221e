"""Time of a decode step, with CUDA graphs and without, against the bytes that it must read."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch

from pipeline.bench.inputs import random_document
from pipeline.bench.timing import best_seconds, in_turns, wait_for
from pipeline.generation.decode import decode
from pipeline.generation.generated import StopRules
from pipeline.model.graphs import DecodeStats
from pipeline.model.loading import LoadedModel
from pipeline.model.prefill import Pack, Prefilled, prefill
from pipeline.model.variant import Variant, prepare
from pipeline.pruning.operations import layer_weights

COPIED_BYTES = {"cpu": 1 << 26, "cuda": 1 << 32}  # more than any cache of the device holds


@dataclass(frozen=True, kw_only=True)
class DecodeMeasurement:
    """One method on one batch; medians over the steps of all repeats, after a warm-up."""

    variant: str
    tokens: int  # of all prompts together
    documents: int
    new_tokens: int
    eager_step_ms: float
    graph_step_ms: float | None  # of replayed steps; None where steps cannot be captured
    graph_answer_ms: float | None  # a whole answer's, with its eager steps and the capture
    eager_answer_ms: float
    weight_bytes: int  # read by a step
    kv_bytes: int  # read by a step in the middle of the answer
    copy_bytes_per_second: float  # read and written, by a large copy on the device in the same run
    same_tokens: bool | None  # with graphs as without
    capture_failure: str | None
    bytes_per_second: float  # read by the faster of the two steps
    bandwidth_share: float  # of what a copy reaches

    @property
    def step_ms(self) -> float:
        return self.eager_step_ms if self.graph_step_ms is None else self.graph_step_ms


def measure_decode(
    model: LoadedModel,
    lengths: Sequence[int],
    methods: Sequence[Variant],
    *,
    new_tokens: int,
    repeats: int,
    check: Callable[[], None] = lambda: None,
) -> list[DecodeMeasurement]:
    """Answer one batch of random prompts of these lengths, with every method, all answers equally long.

    `check` is called before each method, and may raise to give up.
    """
    documents = [random_document(model, length, row) for row, length in enumerate(lengths)]
    copied = copy_bytes_per_second(model.device)
    prepare(model, methods)
    results = []
    for variant in methods:
        check()
        pack = Pack.of(documents, model.device)
        method = variant.use(model)  # which sets the model's attention, too
        prefilled = prefill(model.decoder, model.attention, method, pack, new_tokens, draft=model.draft)
        results.append(_measure(model, variant, prefilled, new_tokens, repeats, copied))
        del prefilled
    return results


@dataclass(kw_only=True)
class _DecodeRun:
    steps_ms: list[float]
    replayed_ms: list[float]
    answer_ms: float
    answers: list[list[int]]
    failure: str | None


def _measure(
    model: LoadedModel, variant: Variant, prefilled: Prefilled, new_tokens: int, repeats: int, copied: float
) -> DecodeMeasurement:
    both = {graphs: partial(_run, model, prefilled, new_tokens, graphs) for graphs in (False, True)}
    runs = in_turns(both, repeats + 1)  # the first turn warms up
    eager, graphed = runs[False][1:], runs[True][1:]
    replayed = [ms for run in graphed for ms in run.replayed_ms]
    eager_ms = statistics.median(ms for run in eager for ms in run.steps_ms)
    graph_ms = statistics.median(replayed) if replayed else None
    weight_bytes = weight_bytes_read(model, len(prefilled.lengths), linears_in_fp8=variant.linears_in_fp8)
    kv_bytes = _kv_bytes_read(model, prefilled, new_tokens)
    rate = (weight_bytes + kv_bytes) / (eager_ms if graph_ms is None else graph_ms) * 1e3
    return DecodeMeasurement(
        variant=variant.name,
        tokens=sum(prefilled.lengths),
        documents=len(prefilled.lengths),
        new_tokens=new_tokens,
        eager_step_ms=eager_ms,
        graph_step_ms=graph_ms,
        graph_answer_ms=statistics.median(run.answer_ms for run in graphed) if replayed else None,
        eager_answer_ms=statistics.median(run.answer_ms for run in eager),
        weight_bytes=weight_bytes,
        kv_bytes=kv_bytes,
        copy_bytes_per_second=copied,
        same_tokens=graphed[-1].answers == eager[-1].answers if replayed else None,
        capture_failure=next((run.failure for run in runs[True] if run.failure), None),
        bytes_per_second=rate,
        bandwidth_share=rate / copied,
    )


def _run(model: LoadedModel, prefilled: Prefilled, new_tokens: int, graphs: bool) -> _DecodeRun:
    """One answer of every document; a step ends with its tokens on the host, before the next one's check."""
    stats = DecodeStats()
    times: list[float] = []
    replayed: list[int] = []

    def check() -> None:
        times.append(time.perf_counter())
        replayed.append(stats.replayed_steps)

    rules = StopRules(max_new_tokens=new_tokens)
    wait_for(model.device)
    generated = decode(
        model.decoder, model.attention, prefilled, rules, check=check, graphs=graphs, stats=stats
    )
    check()
    steps = [(later - earlier) * 1e3 for earlier, later in pairwise(times)]
    counts = pairwise(replayed)
    # a first replay stands behind the capture
    only_replayed = [ms for ms, (before, after) in zip(steps, counts, strict=True) if 0 < before < after]
    return _DecodeRun(
        steps_ms=steps,
        replayed_ms=only_replayed,
        answer_ms=(times[-1] - times[0]) * 1e3,
        answers=[answer.tokens for answer in generated],
        failure=stats.failure,
    )


def weight_bytes_read(model: LoadedModel, rows: int, *, linears_in_fp8: bool = False) -> int:
    """Bytes of the matrices that a step of so many rows reads: the layers', and the head's."""
    shape, itemsize = model.shape, model.dtype.itemsize
    layers = layer_weights(shape, rows)
    return layers * (1 if linears_in_fp8 else itemsize) + shape.vocab * shape.hidden * itemsize


def _kv_bytes_read(model: LoadedModel, prefilled: Prefilled, new_tokens: int) -> int:
    per_token = model.shape.kv_bytes_per_token(model.dtype.itemsize)
    stored = sum(sum(layer) for layer in prefilled.cache.prompt_tokens())
    return (stored + model.shape.layers * len(prefilled.lengths) * (new_tokens // 2)) * per_token


def copy_bytes_per_second(device: torch.device) -> float:
    """Bytes that a large copy on the device reads and writes a second, at its best."""
    size = COPIED_BYTES[device.type]
    if device.type == "cuda":
        size = min(size, torch.cuda.mem_get_info(device)[0] // 4)
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    return 2 * size / best_seconds(lambda: target.copy_(source), device)
