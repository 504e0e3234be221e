"""The memory of `cascade`: the first tokens of a document, and caches each of which is older and sparser.

New tokens wait behind the caches, and attend to these and to each other, until a chunk of them is full. Then
they enter the first cache one after the other, and what that drops enters the next. A cache that is full
takes every 2nd, 4th or 8th token that the prompt has had, for which it drops its oldest; another token takes
the place of the cache's newest if it has received more attention than that. What is held is numbered from 0,
by age, so positions stay below what is held. Letters beside those of segments.py: M tokens held, N new ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pipeline.kernels.scoring import attention_received
from pipeline.kernels.segments import end_to_end, on_device
from pipeline.pruning.memories.key_memory import KeyMemory, MemoryNeeds, attended_by_last


class CascadeSizes(NamedTuple):
    """Of what each layer holds, in tokens."""

    sink: int  # first ones, which stay
    caches: int
    slots: int  # of each cache
    chunk: int  # of new tokens

    @property
    def most(self) -> int:
        """Tokens that are held at once."""
        return self.sink + self.caches * self.slots + self.chunk

    def held(self, tokens: int) -> int:
        """How many are left of so many tokens that have entered."""
        left = max(0, tokens - self.sink)
        held = tokens - left
        for number in range(self.caches):
            held += min(left, self.slots)
            left = max(0, left - self.slots) >> (number > 0)  # the first cache drops as many as come
        return held


class CascadeMemory(KeyMemory):
    """What each key/value head of each layer holds of a document: equally many tokens, not the same ones."""

    def __init__(self, needs: MemoryNeeds, sizes: CascadeSizes, *, decay: float) -> None:
        """Of the attention that a token receives each query counts `decay` times as much as the next."""
        shape = needs.shape
        super().__init__(shape.layers)
        room = min(sizes.most, needs.length + needs.new_tokens)
        self._rotation, self._attention = needs.rotation(room), needs.attention
        self._sizes, self._decay, self._device = sizes, decay, needs.device
        self._layers = [_CascadeLayer.empty(needs, sizes, room) for _ in range(shape.layers)]

    @property
    def stored(self) -> list[int]:
        return [each.held + each.waiting for each in self._layers]

    @property
    def nbytes(self) -> int:
        return sum(
            x.nbytes for each in self._layers for x in (each.keys, each.turned, each.values, each.score_HM)
        )

    def attend(self, layer: int, q_QHd: Tensor, k_NKd: Tensor, v_NKd: Tensor) -> Tensor:
        assert len(q_QHd) == len(k_NKd), "the attention that keys receive is that of all queries"
        of, outputs, done = self._layers[layer], [], 0
        while done < len(k_NKd):
            if of.waiting == self._sizes.chunk:
                of.enter(self._sizes)
                self._turn(layer, 0, of.held)
            part = slice(done, done + min(len(k_NKd) - done, self._sizes.chunk - of.waiting))
            outputs.append(self._attended(layer, q_QHd[part], k_NKd[part], v_NKd[part]))
            done = part.stop
        return end_to_end(outputs)

    def _turn(self, layer: int, start: int, end: int) -> None:
        """Give the tokens held at these places their positions."""
        of = self._layers[layer]
        of.turned[start:end] = of.keys[start:end]
        self._rotation.turn_keys_(layer, of.turned[start:end], self._places(start, end))

    def _places(self, start: int, end: int) -> Tensor:
        return torch.arange(start, end, device=self._device)

    def _attended(self, layer: int, q_QHd: Tensor, k_QKd: Tensor, v_QKd: Tensor) -> Tensor:
        """Let tokens wait, and attend to what is held and to those before them that wait."""
        of, queries = self._layers[layer], len(q_QHd)
        start = of.held + of.waiting
        end = start + queries
        of.keys[start:end], of.values[start:end] = k_QKd, v_QKd
        of.score_HM[:, start:end] = 0
        of.waiting += queries
        self._turn(layer, start, end)
        q_QHd = self._rotation.queries(layer, q_QHd, self._places(start, end))
        keys, values = of.turned[:end], of.values[:end]
        received_HM = attention_received(q_QHd, keys, self._decay)
        of.score_HM[:, :end].mul_(self._decay**queries).add_(received_HM, alpha=1 - self._decay)
        pairs = queries * (2 * end - queries + 1) // 2
        self.pairs[layer] += pairs
        self.estimated_pairs[layer] += pairs  # whose products are computed once more
        return attended_by_last(self._attention, q_QHd, keys, values)


class _CascadeLayer:
    """Of one layer: first tokens, then caches, the last of them first, then new tokens, all by age."""

    def __init__(self, keys: Tensor, turned: Tensor, values: Tensor, score_HM: Tensor, caches: int) -> None:
        self.keys, self.turned, self.values = keys, turned, values  # (M, K, d); keys before RoPE and with it
        self.score_HM = score_HM  # the attention received of each query head, float32
        self.sunk, self.sizes = 0, [0] * caches  # tokens that stay, and those of each cache, the first first
        self.entered = 0  # tokens that have come to the caches so far
        self.waiting = 0

    @classmethod
    def empty(cls, needs: MemoryNeeds, sizes: CascadeSizes, room: int) -> _CascadeLayer:
        size = (room, needs.shape.kv_heads, needs.shape.head_dim)
        # zeros, since kernels multiply what they mask
        tensors = [torch.zeros(size, dtype=needs.dtype, device=needs.device) for _ in range(3)]
        score_HM = torch.zeros(needs.shape.heads, room, dtype=torch.float32, device=needs.device)
        return cls(tensors[0], tensors[1], tensors[2], score_HM, sizes.caches)

    @property
    def held(self) -> int:
        """Tokens before those that wait."""
        return self.sunk + sum(self.sizes)

    def enter(self, sizes: CascadeSizes) -> None:
        """Let the tokens that wait enter the caches."""
        staying = min(sizes.sink - self.sunk, self.waiting)
        self.sunk += staying
        end = self.held + self.waiting - staying
        entering = self.waiting - staying
        kv_heads = self.keys.shape[1]
        score_KM = self.score_HM[:, self.sunk : end].unflatten(0, (kv_heads, -1)).amax(1)
        places_KN, self.sizes = entered(score_KM, self.sizes, slots=sizes.slots, first=self.entered)
        self.entered, self.waiting = self.entered + entering, 0
        places_KN = places_KN + self.sunk
        new = slice(self.sunk, self.held)
        places_HN = places_KN.repeat_interleave(len(self.score_HM) // kv_heads, dim=0)
        self.score_HM[:, new] = self.score_HM.gather(1, places_HN)
        index_NKd = places_KN.T[:, :, None].expand(-1, -1, self.keys.shape[-1])
        for tensor in (self.keys, self.values):
            tensor[new] = tensor.gather(0, index_NKd)


def entered(score_KM: Tensor, sizes: Sequence[int], *, slots: int, first: int) -> tuple[Tensor, list[int]]:
    """Let tokens enter caches of `slots` tokens each, one after the other.

    `score_KM` are of the tokens in the caches, of which the last stands first and the first last, with
    `sizes` of the first first, and of the new tokens behind them; so all stand by their age. `first` is how
    many tokens had entered before. Returns the places of those that are held now, (K, N), again by age, and
    the new sizes. No step is taken for a token alone: which of them a cache takes is known beforehand, and
    between two of these at most one other comes, which competes with the one before it.
    """
    device, in_caches = score_KM.device, sum(sizes)
    place_KM = torch.arange(score_KM.shape[1], device=device).expand(len(score_KM), -1)
    ends = in_caches - np.cumsum([0, *sizes])
    held = [place_KM[:, end - size : end] for end, size in zip(ends, sizes, strict=False)]
    coming_KA = place_KM[:, in_caches:]
    entries = _entries(tuple(sizes), coming_KA.shape[1], slots, first, device)
    for number, (queue_KN, entry) in enumerate(zip(held, entries, strict=True)):
        queue_KN = torch.cat((queue_KN, coming_KA[:, : entry.free]), dim=1)
        coming_KA = coming_KA[:, entry.free :]
        newest_KN = torch.cat((queue_KN[:, -1:], coming_KA[:, entry.taken]), dim=1)
        if len(entry.others):
            other_KB, rival_KB = coming_KA[:, entry.others], newest_KN[:, entry.rivals]
            is_better_KB = score_KM.gather(1, other_KB) > score_KM.gather(1, rival_KB)
            newest_KN[:, entry.rivals] = torch.where(is_better_KB, other_KB, rival_KB)
        joined_KN = torch.cat((queue_KN[:, :-1], newest_KN), dim=1) if queue_KN.shape[1] else queue_KN
        dropped = len(entry.taken)
        held[number], coming_KA = joined_KN[:, dropped:], joined_KN[:, :dropped]
    return torch.cat(held[::-1], dim=1), [queue.shape[1] for queue in held]


class _Entry(NamedTuple):
    """What a cache does with tokens that come to it: the same for all heads and layers."""

    free: int  # of the first there is room for
    # of the others, places: those that it takes, those that compete, and with which of its newest and `taken`
    taken: Tensor
    others: Tensor
    rivals: Tensor


@lru_cache(maxsize=2)  # a chunk enters all layers of a document before the next does
def _entries(
    sizes: tuple[int, ...], coming: int, slots: int, first: int, device: torch.device
) -> tuple[_Entry, ...]:
    """Of each cache, when so many tokens come after the `first` ones."""
    steps_A, entries = np.arange(first, first + coming), []
    for number, size in enumerate(sizes):
        free = min(slots - size, len(steps_A))
        steps_A = steps_A[free:]
        taken_A = steps_A % (1 << number) == 0
        before_B = np.cumsum(taken_A)[~taken_A]
        assert len(np.unique(before_B)) == len(before_B), "two tokens compete with the same one"
        places = (np.flatnonzero(taken_A), np.flatnonzero(~taken_A), before_B)
        entries.append(_Entry(free, *(on_device(each.tolist(), device, torch.int64) for each in places)))
        steps_A = steps_A[taken_A]
    return tuple(entries)
