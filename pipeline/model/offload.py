"""The KV cache of a document that is too long for the device: blocks of it wait in host memory.

After SlimInfer (AAAI 2026, arXiv 2508.06447). Its method scores, at its pruning layers, the blocks of
tokens that entered the layer; those layers cut the model into stages. A block's keys and values in a stage
never change once written, so the host keeps them all and the device a few of them, the active set: to
offload a block is to forget it. Copies run on a stream of their own, behind the rest of the decode step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import pairwise
from math import ceil

import torch
from torch import Tensor

from pipeline.kernels.segments import Segments, on_device
from pipeline.kernels.select import top_blocks
from pipeline.kernels.swap import BlockCopies, as_rows
from pipeline.model.cache import RaggedCache, Slots
from pipeline.pruning.base import Plan
from pipeline.pruning.capabilities import Rescoring
from pipeline.records import RowError

Score = Callable[[int, Tensor], Tensor | None]  # blocks' scores at a layer, by the queries (H, d) of a token

Pair = tuple[Tensor, Tensor]  # of keys and of values

IN_FLIGHT = 2  # layers of a prefill whose copies to the host the device may lag behind


@dataclass(frozen=True, kw_only=True)
class KvLimits:
    """Bytes of keys and values that one pack may hold."""

    device_bytes: int
    host_bytes: int
    synchronous: bool = False  # copy on the computing stream, to measure what hiding the copies gains
    measure: bool = False  # time copies and waits while decoding


@dataclass(kw_only=True)
class Traffic:
    """What the copies of one document came to."""

    decisions: int = 0
    swaps: int = 0
    swapped_bytes: int = 0  # to the device, while decoding
    steps: int = 0


def make_cache(
    plan: Plan,
    new_tokens: int,
    limits: KvLimits | None,
    *,
    device: torch.device,
    itemsize: int,
    score: Score | None,
    dtype: torch.dtype | None = None,
) -> RaggedCache:
    """A cache that stays on the device, in `dtype`, if the plan fits there, else one that offloads.

    Raises RowError if a pack of several documents, or a method that scores no blocks, exceeds the limits.
    """
    if limits is None or plan.kv_bytes(itemsize, new_tokens) <= limits.device_bytes:
        return RaggedCache(new_tokens, dtype=dtype)
    if plan.rescoring is None or score is None or len(plan.lengths) > 1:
        raise RowError(
            "kv_memory",
            f"the keys and values of {sum(plan.lengths):,} tokens take "
            f"{plan.kv_bytes(itemsize, new_tokens) / 1e9:.2f} GB, more than --kv-memory allows",
        )
    return OffloadedCache(plan, plan.rescoring, new_tokens, limits, device, itemsize, score)


@dataclass(kw_only=True)
class Stage:
    """The layers before a pruning layer, which store the same tokens."""

    scored_at: int
    layers: range
    tokens: int
    blocks_on_device: int
    host: list[Pair] = field(default_factory=list)  # of each layer, pinned K and V (T, K, d)
    active: list[int] = field(default_factory=list)  # the block in each slot
    copies: BlockCopies | None = None  # of all layers' whole blocks, once slots are there
    pending: tuple[Tensor, torch.cuda.Event | None] | None = None  # the best blocks, on their way to the host

    def of(self, layer: int) -> Pair:
        """K and V of a layer on the host, filled up to whole blocks."""
        return self.host[layer - self.layers.start]


class Clock:
    """Time between pairs of events on a stream, summed once the device has passed them all."""

    def __init__(self) -> None:
        self._pairs: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def timing(self, stream: torch.cuda.Stream) -> Iterator[None]:
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record(stream)
        yield
        last.record(stream)
        self._pairs.append((first, last))

    def ms(self) -> float:
        torch.cuda.synchronize()
        return sum(first.elapsed_time(last) for first, last in self._pairs)


class Copier:
    """Copies between host and device, on a stream of their own where there is one."""

    def __init__(self, device: torch.device, synchronous: bool) -> None:
        self._asynchronous = device.type == "cuda" and not synchronous
        self._cuda = device.type == "cuda"
        self._stream = torch.cuda.Stream(device) if self._asynchronous else None

    @property
    def is_synchronous(self) -> bool:
        return not self._asynchronous

    @property
    def stream(self) -> torch.cuda.Stream:
        """The one that copies."""
        return self._stream or torch.cuda.current_stream()

    def after_compute(self) -> None:
        """Let later copies begin after all work queued so far: it may read what they write."""
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))

    def copy(self, target: Tensor, source: Tensor) -> None:
        """Queue a copy; both tensors may be let go of at once."""
        with self._copying(target, source):
            target.copy_(source, non_blocking=self._asynchronous)

    def fetch(self, copies: BlockCopies, places: Sequence[tuple[int, int]]) -> int:
        """Queue copies to slots of blocks; returns their bytes."""
        with self._copying(*copies.targets):
            slots_N, blocks_N = on_device(places, copies.targets[0].device).T.contiguous()
            return copies.fetch(slots_N, blocks_N)

    @contextmanager
    def _copying(self, *used: Tensor) -> Iterator[None]:
        """On the copying stream, which keeps the device tensors that it uses from being reused."""
        with torch.cuda.stream(self._stream) if self._stream is not None else nullcontext():
            yield
        if self._stream is not None:
            for tensor in used:
                if tensor.is_cuda:
                    tensor.record_stream(self._stream)

    def done(self) -> torch.cuda.Event | None:
        """An event after all copies queued so far."""
        return self._stream.record_event() if self._stream is not None else None

    def wait(self, event: torch.cuda.Event | None) -> None:
        """Let later computation begin after an event of `done`."""
        if event is not None:
            torch.cuda.current_stream().wait_event(event)

    def to_host(self, values: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
        """A small tensor on its way to the host, behind the computation queued so far."""
        if not self._cuda:
            return values, None
        host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
        host.copy_(values, non_blocking=True)
        return host, torch.cuda.current_stream(values.device).record_event()


class OffloadedCache(RaggedCache):
    """One document's cache, of whose earlier stages only the active blocks are on the device."""

    def __init__(
        self,
        plan: Plan,
        rescoring: Rescoring,
        new_tokens: int,
        limits: KvLimits,
        device: torch.device,
        itemsize: int,
        score: Score,
    ) -> None:
        """Raises RowError if the document does not fit the limits."""
        super().__init__(new_tokens)
        self.counts = Traffic()
        self._block, self._gamma = rescoring.block, rescoring.gamma
        self._score = score
        self._device = device
        self._stages = _stages(plan, rescoring, limits, new_tokens, itemsize)
        self._stage_of = {layer: stage for stage in self._stages for layer in stage.layers}
        self._scored = {stage.scored_at: stage for stage in self._stages}
        self._copier = Copier(device, limits.synchronous)
        self._clocks = (Clock(), Clock()) if limits.measure and device.type == "cuda" else None
        self._copied: dict[int, torch.cuda.Event | None] = {}  # of each layer, its last copies

    def store(self, k_TKd: Tensor, v_TKd: Tensor, segments: Segments) -> None:
        layer = len(self.slots)
        stage = self._stage_of.get(layer)
        if stage is None:
            super().store(k_TKd, v_TKd, segments)
            return
        assert segments.lengths == (stage.tokens,), "a plan of rescoring must be exact"
        pinned = self._device.type == "cuda"
        rows = ceil(stage.tokens / self._block) * self._block
        self._copier.after_compute()
        host = []
        for values in (k_TKd, v_TKd):
            host.append(torch.empty((rows, *values.shape[1:]), dtype=values.dtype, pin_memory=pinned))
            self._copier.copy(host[-1][: stage.tokens], values)
        self._copied[layer] = self._copier.done()
        self._copier.wait(self._copied.get(layer - IN_FLIGHT))
        stage.host.append((host[0], host[1]))
        # until the method has scored the blocks, nothing of the layer is on the device; a view of no rows
        # would keep the whole tensor there, and with it all that was projected together
        self.slots.append(Slots(segments, self.new_tokens))
        self.keys.append(k_TKd.new_empty((0, *k_TKd.shape[1:])))
        self.values.append(v_TKd.new_empty((0, *v_TKd.shape[1:])))

    def settle(self, layer: int, scores_N: Tensor) -> None:
        stage = self._scored.get(layer)
        if stage is None:
            return
        stage.active = top_blocks(scores_N, stage.blocks_on_device).tolist()
        length = len(stage.active) * self._block - (-stage.tokens % self._block)
        slots = Slots(Segments.of((length,), self._device), self.new_tokens)
        for at in stage.layers:
            self.slots[at] = slots
            for buffers in (self.keys, self.values):
                buffers[at] = buffers[at].new_zeros((slots.capacity, *buffers[at].shape[1:]))
        # the last block, perhaps a short one, never moves again
        last, first = (n * self._block for n in (len(stage.active) - 1, stage.active[-1]))
        targets = [buffers[at] for at in stage.layers for buffers in (self.keys, self.values)]
        sources = [host for at in stage.layers for host in stage.of(at)]
        stage.copies = BlockCopies(
            [as_rows(target[:last], self._block) for target in targets],
            [as_rows(source, self._block) for source in sources],
        )
        self._copier.after_compute()
        self._fetch(stage, list(enumerate(stage.active[:-1])))
        for target, source in zip(targets, sources, strict=True):
            self._copier.copy(target[last:length], source[first : stage.tokens])
        self._copied |= dict.fromkeys(stage.layers, self._copier.done())

    def ready(self, layer: int) -> None:
        event = self._copied.pop(layer, None)
        if self._clocks is None or event is None:
            self._copier.wait(event)
            return
        with self._clocks[1].timing(torch.cuda.current_stream()):
            self._copier.wait(event)

    def observe(self, layer: int, q_BHd: Tensor) -> None:
        stage = self._scored.get(layer)
        if stage is not None:
            scores_N = self._score(layer, q_BHd[0])
            assert scores_N is not None, "a method that rescores must do so at each of its layers"
            best_N = top_blocks(scores_N, stage.blocks_on_device)
            stage.pending = self._copier.to_host(best_N)
        for other in self._stages:
            if other.pending is not None and (other.pending[1] is None or other.pending[1].query()):
                self._decide(other)

    @property
    def on_device_alone(self) -> bool:
        return False  # blocks are swapped between layers, by what the host decides

    def stepped(self) -> None:
        self.counts.steps += 1
        for stage in self._stages:
            if stage.pending is not None:
                if stage.pending[1] is not None:
                    stage.pending[1].synchronize()
                self._decide(stage)

    @property
    def host_bytes(self) -> int:
        return sum(x.nbytes for stage in self._stages for pair in stage.host for x in pair)

    def traffic(self) -> tuple[int, int]:
        return self.host_bytes, self.counts.swapped_bytes

    def copy_ms(self) -> tuple[float, float] | tuple[None, None]:
        """Time of the copies while decoding, and time that the computation waited for them, if measured."""
        if self._clocks is None:
            return None, None
        copying, waiting = (clock.ms() for clock in self._clocks)
        return copying, copying if self._copier.is_synchronous else waiting

    def prompt_tokens(self) -> list[list[int]]:
        stored = super().prompt_tokens()
        for layer, stage in self._stage_of.items():
            stored[layer] = [stage.tokens]
        return stored

    def _decide(self, stage: Stage) -> None:
        """Swap the active set for the best blocks, unless it still holds enough of them."""
        assert stage.pending is not None
        best = set(stage.pending[0].tolist())
        stage.pending = None
        self.counts.decisions += 1
        if len(best & set(stage.active)) >= self._gamma * len(best):
            return
        entering = iter(sorted(best - set(stage.active)))
        places = [(slot, next(entering)) for slot, block in enumerate(stage.active) if block not in best]
        for slot, block in places:
            stage.active[slot] = block
        self.counts.swaps += 1
        self._copier.after_compute()
        with self._clocks[0].timing(self._copier.stream) if self._clocks is not None else nullcontext():
            self.counts.swapped_bytes += self._fetch(stage, places)

    def _fetch(self, stage: Stage, places: Sequence[tuple[int, int]]) -> int:
        """Queue the copies of whole blocks to their slots, in all layers of the stage; returns the bytes."""
        if not places:
            return 0
        assert stage.copies is not None
        copied = self._copier.fetch(stage.copies, places)
        self._copied |= dict.fromkeys(stage.layers, self._copier.done())
        return copied


def _stages(
    plan: Plan, rescoring: Rescoring, limits: KvLimits, new_tokens: int, itemsize: int
) -> list[Stage]:
    """All stages but the last, each with the same share of its blocks on the device."""
    per_token = plan.shape.kv_bytes_per_token(itemsize)
    bounds = [0, *rescoring.layers]
    spans = [range(a, b) for a, b in pairwise(bounds) if b > a]
    movable = sum(len(span) * plan.cache_tokens[span.start] * per_token for span in spans)
    fixed = plan.kv_bytes(itemsize, new_tokens) - movable
    share = (limits.device_bytes - fixed) / movable if movable else 0.0
    stages = []
    for span in spans:
        tokens = plan.cache_tokens[span.start]
        stages.append(
            Stage(
                scored_at=span.stop,
                layers=span,
                tokens=tokens,
                # the last block, perhaps a short one, is always there, so that rounding up first is safe
                blocks_on_device=int(share * ceil(tokens / rescoring.block)),
            )
        )
    if not stages or min(stage.blocks_on_device for stage in stages) < 2:
        least = fixed + sum(2 * rescoring.block * per_token * len(span) for span in spans)
        raise RowError(
            "kv_memory",
            f"{plan.lengths[0]:,} tokens cannot run in {limits.device_bytes / 1e9:.2f} GB of --kv-memory: "
            f"at least {least / 1e9:.2f} GB must be on the device",
        )
    if movable > limits.host_bytes:
        raise RowError(
            "host_memory",
            f"{plan.lengths[0]:,} tokens need {movable / 1e9:.2f} GB of host memory for keys and values, and "
            f"{limits.host_bytes / 1e9:.2f} GB may be used; raise --kv-memory, so that less is offloaded",
        )
    return stages
