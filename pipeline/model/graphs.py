"""Replaying a decode step as a CUDA graph: from Python, its kernels take longer to launch than to run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor

from pipeline.kernels.attention import AttentionBackend
from pipeline.model.cache import RaggedCache

WARM_UP_STEPS = 2  # run eagerly for each batch: they load its kernels, which a capture must not do
FEWEST_STEPS = 8  # that a capture, which takes about as long as three eager steps, must be good for
# of the rows that still answer, at or below which a smaller batch is captured. A row that has finished costs
# little (see NextSlots.park), a capture with the steps before it as much as some twenty replayed steps
SHRINK_SHARE = 0.25
FREE_BYTES = 1 << 30  # on the device, below which cached memory is given back before a capture


@dataclass(frozen=True, kw_only=True)
class StepOutput:
    """What a step leaves on the device; a replayed one overwrites that of the step before."""

    logits_BV: Tensor  # float32
    greedy_B: Tensor  # the most likely tokens, -1 where the logits are not finite


Step = Callable[[], StepOutput]


@dataclass(kw_only=True)
class DecodeStats:
    """How the steps of a pack were run."""

    eager_steps: int = 0
    replayed_steps: int = 0
    captures: int = 0
    failure: str | None = None  # why a capture was given up


class Recorded(Protocol):
    """A step that can be repeated."""

    def replay(self) -> StepOutput: ...

    def close(self) -> None:
        """Free what the step holds on the device."""


class Recorder(Protocol):
    """Makes recorded steps."""

    def warm_up(self, step: Step) -> StepOutput:
        """Run the step as it will be recorded."""

    def record(self, step: Step) -> Recorded: ...


def recorder_for(device: torch.device, attention: AttentionBackend, kv: RaggedCache) -> Recorder | None:
    """None where steps cannot be captured: without a GPU, or where a step waits for or reads the host."""
    # an offloaded cache swaps blocks between layers, by what the host decides
    if device.type != "cuda" or not attention.capturable or type(kv) is not RaggedCache:
        return None
    return None if attention.capture_failure else CudaRecorder(device)


class CudaRecorder:
    """Captures steps on a stream of their own, in a memory pool of their own."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = _capture_stream(device)

    def warm_up(self, step: Step) -> StepOutput:
        # on the stream of the capture, so that the libraries' workspaces there lie outside the graph's pool
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        try:
            with torch.cuda.stream(self._stream):
                return step()
        finally:
            current.wait_stream(self._stream)

    def record(self, step: Step) -> StepGraph:
        if torch.cuda.mem_get_info(self._device)[0] < FREE_BYTES:
            torch.cuda.empty_cache()  # which the allocator cannot do in the middle of a capture
        return StepGraph(step, self._device, self._stream)


class StepGraph:
    """One captured step. Capturing runs nothing: neither counters nor cache move."""

    def __init__(self, step: Step, device: torch.device, stream: torch.cuda.Stream) -> None:
        self._graph = torch.cuda.CUDAGraph()
        self._output: StepOutput | None = None
        with torch.cuda.device(device):
            self._pool: torch.cuda.MemPool | None = torch.cuda.MemPool()
        try:
            self._capture(step, stream)
        except BaseException:
            self.close()
            raise

    def _capture(self, step: Step, stream: torch.cuda.Stream) -> None:
        assert self._pool is not None
        pool: Any = self._pool.id
        # not torch.cuda.graph, which first gives all cached memory back: the next prefill would wait for it
        with torch.cuda.stream(stream):
            # other threads, which prepare documents, may do as they like meanwhile
            self._graph.capture_begin(pool=pool, capture_error_mode="thread_local")
            try:
                self._output = step()
            finally:
                self._graph.capture_end()

    def replay(self) -> StepOutput:
        assert self._output is not None, "a closed graph"
        self._graph.replay()
        return self._output

    def close(self) -> None:
        # the pool gives its memory back with its last reference, once nothing lies in it
        self._output = None
        self._graph.reset()
        self._pool = None


class StepRunner:
    """Runs the steps of one pack, eagerly at first and by replay where that pays."""

    def __init__(
        self, step: Step, recorder: Recorder | None, attention: AttentionBackend, stats: DecodeStats
    ) -> None:
        self._step, self._recorder = step, recorder
        self._attention, self._stats = attention, stats
        self._recorded: Recorded | None = None
        self._warm = 0

    def shrinks(self, live: int, rows: int, steps_left: int) -> bool:
        """Whether finished documents should leave the batch now; a replayed batch keeps its size a while."""
        if live == rows or self._recorded is None:
            return live < rows
        return live <= SHRINK_SHARE * rows and steps_left >= FEWEST_STEPS + WARM_UP_STEPS

    def run(self, steps_left: int) -> StepOutput:
        """The next step of at most `steps_left`."""
        if self._recorder is not None and self._recorded is None:
            if self._warm < WARM_UP_STEPS:
                self._warm += 1
                self._stats.eager_steps += 1
                return self._recorder.warm_up(self._step)
            if steps_left >= FEWEST_STEPS:
                self._record(self._recorder)
        if self._recorded is None:
            self._stats.eager_steps += 1
            return self._step()
        self._stats.replayed_steps += 1
        return self._recorded.replay()

    def restart(self) -> None:
        """Begin anew, with another batch."""
        self._warm = 0
        self.close()

    def close(self) -> None:
        recorded, self._recorded = self._recorded, None
        if recorded is not None:
            recorded.close()

    def _record(self, recorder: Recorder) -> None:
        try:
            self._recorded = recorder.record(self._step)
            self._stats.captures += 1
        except (RuntimeError, TypeError, ValueError) as error:
            self._recorder = None
            self._stats.failure = f"{type(error).__name__}: {error}".splitlines()[0]
            if not _ran_out_of_memory(error):  # another pack may need less; other reasons stay
                self._attention.capture_failure = self._stats.failure


def _ran_out_of_memory(error: BaseException) -> bool:
    """Also where ending the capture failed in its turn."""
    errors = (error, error.__context__)
    return any(isinstance(e, torch.OutOfMemoryError) or "out of memory" in str(e) for e in errors)


@cache
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    """One for the process: libraries keep a workspace for every stream they have seen."""
    return torch.cuda.Stream(device)
