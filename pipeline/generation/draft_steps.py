"""A draft's look-ahead steps as decode steps: the same batch, the same CUDA graphs, in a store that stays."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import NamedTuple

import torch
from torch import Tensor

from pipeline.families.decoder import Decoder
from pipeline.generation.decode_batch import DecodeBatch
from pipeline.generation.graphs import FEWEST_STEPS, DecodeStats, StepRunner, runner_for
from pipeline.generation.step_tables import Seat
from pipeline.model.cache import RaggedCache
from pipeline.model.reading_ahead import Draft, attended
from pipeline.model.store import Extent, KvStore, slots_needed
from pipeline.pruning.base import PruningMethod
from pipeline.pruning.capabilities import ReadsAhead
from pipeline.pruning.shape import ModelShape

MOST_PROMPTS = 32  # of a pack: behind more, steps are run from Python
BETWEEN = MOST_PROMPTS * 64  # tokens that there is room for beside those of prompts, in each layer
SHARE = 0.05  # of the memory, which the store may have at most


class WatchedStore(KvStore):
    """A store beside which the queries of the newest step lie."""

    def __init__(self, slots: int, decoder: Decoder, columns: int) -> None:
        super().__init__(slots, decoder.own, dtype=decoder.dtype, device=decoder.device)
        own = decoder.own
        size = (own.layers, columns, own.heads, own.head_dim)
        self.queries_NBHd = torch.zeros(size, dtype=decoder.dtype, device=decoder.device)

    def observe(self, layer: int, q_BHd: Tensor) -> None:
        self.queries_NBHd[layer, : len(q_BHd)] = q_BHd


class _Opened(NamedTuple):
    """What lives from pack to pack."""

    store: WatchedStore
    batch: DecodeBatch
    runner: StepRunner


class DraftSteps:
    """A draft that takes its look-ahead steps by graphs, captured once for each number of prompts.

    A graph reads keys and values where they were when it was captured, so that those of each pack are copied
    to a store that stays. Its memory is taken with the first pack that fits into it.
    """

    def __init__(self, draft: Draft, *, slots: int, look_ahead: int) -> None:
        """Of packs whose keys and values fit into so many slots, and of `look_ahead` tokens a prompt."""
        self.decoder, self.attention = draft.decoder, draft.attention
        self.stats = DecodeStats()
        self._slots, self._look_ahead = slots, look_ahead
        self._opened: _Opened | None = None

    @property
    def nbytes(self) -> int:
        """Of the store, on the device."""
        return 0 if self._opened is None else self._opened.store.nbytes

    def has_room(self, cache: RaggedCache) -> bool:
        """Whether the steps behind the prompts of this cache are taken here: not after a failed capture."""
        if self.attention.capture_failure or self.stats.failure:
            self.close()
            return False
        prompts = list(zip(*cache.own_tokens(), strict=True))
        needed = sum(slots_needed(stored, cache.new_tokens, cache.device) for stored in prompts)
        fits = len(prompts) <= MOST_PROMPTS and cache.new_tokens <= self._look_ahead
        return fits and needed <= self._slots and self._open() is not None

    @torch.inference_mode()
    def scores(self, cache: RaggedCache, last_BD: Tensor, pool: int, check: Callable[[], None]) -> Tensor:
        """What `look_ahead_scores` gives, of a cache that it `has_room` for, and whose layers it frees."""
        opened = self._open()
        assert opened is not None
        try:
            return self._scores(*opened, cache, last_BD, pool, check)
        except BaseException:
            self.close()  # whatever has been left there
            raise

    def _scores(
        self,
        store: WatchedStore,
        batch: DecodeBatch,
        runner: StepRunner,
        cache: RaggedCache,
        last_BD: Tensor,
        pool: int,
        check: Callable[[], None],
    ) -> Tensor:
        prompts, count = len(last_BD), cache.new_tokens
        token_B = self.decoder.head(last_BD).argmax(-1)
        extents = store.adopt(cache, [count] * prompts, frees=True)
        seats = [
            Seat(starts=extent.starts, used=extent.stored, position=extent.stored[0], reach=reach)
            for extent, reach in zip(extents, cache.reaches, strict=True)
        ]
        batch.join(seats, [0] * prompts)
        column_B = torch.arange(prompts, device=token_B.device)
        # the device alone knows the first tokens
        batch.place(torch.stack((column_B, torch.ones_like(column_B), token_B), 1))
        columns = runner.columns(prompts, batch.capacity)
        size = batch.size(columns, columns)
        steps = []
        for _ in range(count):
            check()
            runner.run(size, FEWEST_STEPS)  # a graph serves the packs that follow, too
            steps.append(store.queries_NBHd[:, :prompts].clone())
        scores_ST = attended(torch.stack(steps, 1), [_keys(store, each, count) for each in extents], pool)
        batch.keep([])
        for extent in extents:
            store.release(extent, wipe=True)
        return scores_ST

    def close(self) -> None:
        """Give graphs and store back; the next pack would make them again."""
        if self._opened is not None:
            self._opened.runner.close()
            self._opened = None

    def _open(self) -> _Opened | None:
        """None where there is no memory for it, and from then on."""
        if self._opened is not None:
            return self._opened
        try:
            store = WatchedStore(self._slots, self.decoder, MOST_PROMPTS)
            batch = DecodeBatch(
                self.decoder,
                self.attention,
                store,
                capacity=MOST_PROMPTS,
                longest=self._slots // self.decoder.own.layers,
                new_tokens=1 + self._look_ahead,
            )
        except torch.OutOfMemoryError:
            self._slots = 0
            return None
        runner = runner_for(self.decoder, self.attention, batch.step, self.stats, captured=True)
        self._opened = _Opened(store, batch, runner)
        return self._opened


def _keys(store: KvStore, extent: Extent, new_tokens: int) -> list[Tensor]:
    """The keys of each layer of a prompt and of the new tokens behind it."""
    places = zip(extent.starts, extent.stored, strict=True)
    return [
        store.buffers(layer)[0][start : start + stored + new_tokens]
        for layer, (start, stored) in enumerate(places)
    ]


def with_steps(draft: Draft | None, method: PruningMethod, slots: int, held: ExitStack) -> Draft | None:
    """The draft with `DraftSteps`, which `held` closes, if the method needs steps and they can be captured.

    Those behind packs of more than so many slots are run from Python all the same.
    """
    if draft is None or not slots or not isinstance(method, ReadsAhead):
        return draft
    decoder = draft.decoder
    kind = (decoder.device, decoder.dtype, decoder.shape.head_dim)
    if decoder.device.type != "cuda" or decoder.ranks is not None or not draft.attention.captures(*kind):
        return draft
    steps = DraftSteps(draft, slots=slots, look_ahead=method.look_ahead)
    held.callback(steps.close)
    return steps


def slots_for_steps(
    draft: ModelShape | None,
    method: PruningMethod,
    tokens: int,
    usable: int,
    itemsize: int,
    device: torch.device,
) -> tuple[int, int]:
    """Slots that `DraftSteps` are to have for packs of so many tokens, and the bytes of each.

    None on a CPU, and without a draft that takes steps; and no more than `SHARE` of the usable bytes.
    """
    if draft is None or device.type == "cpu" or not isinstance(method, ReadsAhead) or not method.look_ahead:
        return 0, 0
    of_slot = draft.kv_bytes_per_token(itemsize)
    return min(draft.layers * (tokens + BETWEEN), int(SHARE * usable) // of_slot), of_slot


def held_bytes(draft: Draft | None) -> int:
    """What a draft holds of the device's memory for its steps, beside its weights."""
    return draft.nbytes if isinstance(draft, DraftSteps) else 0
