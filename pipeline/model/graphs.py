"""Replaying a decode step as a CUDA graph: from Python, its kernels take longer to launch than to run.

A graph is captured for each of a few batch sizes, all in one pool of memory; a batch of another size is
padded to the next of them.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, NamedTuple, Protocol

import torch

from pipeline.families.decoder import Decoder
from pipeline.kernels.attention import AttentionBackend
from pipeline.ranks.leading import OnEachRank, at_the_end, on_every_rank

WARM_UP_STEPS = 2  # run eagerly for each size: they load its kernels, which a capture must not do
FEWEST_STEPS = 8  # that a capture, which takes about as long as three eager steps, must be good for
FREE_BYTES = 1 << 30  # on the device, below which cached memory is given back before a capture
# a third of a batch's columns at most pad it; below 8 all cost the same
SIZES = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)
LARGE_STEP = 256  # between the sizes of larger batches


class StepSize(NamedTuple):
    """What a step is captured for."""

    columns: int
    queries: int  # as many, or more where drafts are verified
    shares: bool = False  # whether rows read documents that they share
    numbers: int = 0  # that a row may draw by, where one is drawn
    sorts: bool = False  # whether one is drawn by top-k, or a top-p below 1
    floors: bool = False  # whether one is drawn by a min-p
    penalises: bool = False  # whether one has a repetition penalty
    masked: bool = False  # whether one may go on with some tokens alone


Step = Callable[[StepSize], None]


@dataclass(kw_only=True)
class DecodeStats:
    """How steps were run."""

    eager_steps: int = 0
    replayed_steps: int = 0
    captures: int = 0
    failure: str | None = None  # why a capture was given up


class Recorded(Protocol):
    """A step that can be repeated."""

    def replay(self) -> None: ...

    def close(self) -> None:
        """Free what the step holds on the device."""


class Recorder(Protocol):
    """Makes recorded steps."""

    def warm_up(self, step: Callable[[], None]) -> None:
        """Run the step as it will be recorded."""

    def record(self, step: Callable[[], None]) -> Recorded: ...


def recorder_for(
    device: torch.device, dtype: torch.dtype, head_dim: int, attention: AttentionBackend
) -> Recorder | None:
    """None where steps cannot be captured: without a GPU, or with attention that reads the host."""
    if device.type != "cuda" or not attention.captures(device, dtype, head_dim):
        return None
    return None if attention.capture_failure else CudaRecorder(device)


class CudaRecorder:
    """Captures steps on a stream of their own, in a memory pool of their own."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = _capture_stream(device)
        with torch.cuda.device(device):
            self._pool = torch.cuda.MemPool()

    def warm_up(self, step: Callable[[], None]) -> None:
        # on the stream of the capture, so that the libraries' workspaces there lie outside the graphs' pool
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        try:
            with torch.cuda.stream(self._stream):
                step()
        finally:
            current.wait_stream(self._stream)

    def record(self, step: Callable[[], None]) -> StepGraph:
        if torch.cuda.mem_get_info(self._device)[0] < FREE_BYTES:
            torch.cuda.empty_cache()  # which the allocator cannot do in the middle of a capture
        return StepGraph(step, self._stream, self._pool)


class StepGraph:
    """One captured step. Capturing runs nothing: neither counts nor keys and values move."""

    def __init__(self, step: Callable[[], None], stream: torch.cuda.Stream, pool: Any) -> None:
        self._graph = torch.cuda.CUDAGraph()
        self._pool = pool  # which gives its memory back with its last graph
        try:
            self._capture(step, stream)
        except BaseException:
            self.close()
            raise

    def _capture(self, step: Callable[[], None], stream: torch.cuda.Stream) -> None:
        pool: Any = self._pool.id
        # not torch.cuda.graph, which first gives all cached memory back: the next prefill would wait for it
        with torch.cuda.stream(stream):
            # other threads, which prepare documents, may do as they like meanwhile
            self._graph.capture_begin(pool=pool, capture_error_mode="thread_local")
            try:
                step()
            finally:
                self._graph.capture_end()

    def replay(self) -> None:
        assert self._pool is not None, "a closed graph"
        self._graph.replay()

    def close(self) -> None:
        self._graph.reset()
        self._pool = None


class StepRunner(OnEachRank):
    """Runs steps, eagerly at first and by replay where that pays."""

    def __init__(
        self,
        step: Step,
        recorder: Recorder | None,
        attention: AttentionBackend,
        stats: DecodeStats,
        fewest: int = FEWEST_STEPS,
    ) -> None:
        """A capture must be good for `fewest` steps."""
        self._step, self._recorder, self._fewest = step, recorder, fewest
        self._attention, self._stats = attention, stats
        self._recorded: dict[StepSize, Recorded] = {}
        self._warm: Counter[StepSize] = Counter()

    @on_every_rank
    def prepare(self, sizes: Iterable[StepSize]) -> int:
        """Capture steps of these sizes, the largest first; returns how many."""
        for size in sorted(set(sizes), reverse=True):
            if self._recorder is None:
                break
            for _ in range(WARM_UP_STEPS):
                self._recorder.warm_up(partial(self._step, size))
            self._record(self._recorder, size)
        return len(self._recorded)

    def columns(self, rows: int, capacity: int) -> int:
        """How many columns a step for so many rows runs: more where that is the size of a graph."""
        return rows if self._recorder is None else min(padded(rows), capacity)

    @on_every_rank
    def run(self, size: StepSize, steps_left: int) -> None:
        """The next step of at most `steps_left`."""
        if self._recorder is not None and size not in self._recorded:
            if self._warm[size] < WARM_UP_STEPS:
                self._warm[size] += 1
                self._stats.eager_steps += 1
                return self._recorder.warm_up(partial(self._step, size))
            if steps_left >= self._fewest:
                self._record(self._recorder, size)
        recorded = self._recorded.get(size)
        if recorded is None:
            self._stats.eager_steps += 1
            return self._step(size)
        self._stats.replayed_steps += 1
        return recorded.replay()

    @at_the_end
    def close(self) -> None:
        recorded, self._recorded = self._recorded, {}
        for each in recorded.values():
            each.close()

    def _record(self, recorder: Recorder, size: StepSize) -> None:
        try:
            self._recorded[size] = recorder.record(partial(self._step, size))
            self._stats.captures += 1
        except (RuntimeError, TypeError, ValueError) as error:
            self._recorder = None
            self._stats.failure = f"{type(error).__name__}: {error}".splitlines()[0]
            if not _ran_out_of_memory(error):  # another batch may need less; other reasons stay
                self._attention.capture_failure = self._stats.failure


@on_every_rank
def runner_for(
    decoder: Decoder,
    attention: AttentionBackend,
    step: Step,
    stats: DecodeStats,
    *,
    captured: bool,
    fewest: int = FEWEST_STEPS,
) -> StepRunner:
    """Of steps of a batch that may be `captured`, if they can, and as `StepRunner` takes them."""
    kind = (decoder.device, decoder.dtype, decoder.shape.head_dim)
    recorder = recorder_for(*kind, attention) if captured else None
    return StepRunner(step, recorder, attention, stats, fewest)


def padded(rows: int) -> int:
    """The smallest size of a graph that holds so many rows."""
    at = bisect_left(SIZES, rows)
    return SIZES[at] if at < len(SIZES) else -(-rows // LARGE_STEP) * LARGE_STEP


def _ran_out_of_memory(error: BaseException) -> bool:
    """Also where ending the capture failed in its turn."""
    errors = (error, error.__context__)
    return any(isinstance(e, torch.OutOfMemoryError) or "out of memory" in str(e) for e in errors)


@cache
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    """One for the process: libraries keep a workspace for every stream they have seen."""
    return torch.cuda.Stream(device)
