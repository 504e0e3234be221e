"""Reading ahead: a draft model reads prompts and goes on, by which a method chooses what is prefilled.

From the first layer to the choice the host waits for nothing: while the device is still busy with the prompts
it queues the tokens behind them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from pipeline.families.decoder import Decoder
from pipeline.kernels.attention import AttentionBackend
from pipeline.kernels.decode_slots import DecodeSlots, HostSlots
from pipeline.kernels.kv_fp8 import KvTarget
from pipeline.kernels.scoring import look_ahead_importance
from pipeline.kernels.segments import Segments, on_device
from pipeline.model.cache import RaggedCache
from pipeline.model.layers import Survivors, run_layers
from pipeline.model.pack import Pack, PartialPrefill
from pipeline.model.work import Work
from pipeline.pruning.base import PruningMethod
from pipeline.pruning.capabilities import ReadsAhead
from pipeline.pruning.operations import LayerWork, passes_flops
from pipeline.pruning.shape import ModelShape
from pipeline.pruning.speculative import DraftReader
from pipeline.pruning.view import mask_of


class Draft(Protocol):
    """A loaded model, as far as it is needed to read prompts for another one."""

    @property
    def decoder(self) -> Decoder: ...

    @property
    def attention(self) -> AttentionBackend: ...


@dataclass(frozen=True, kw_only=True)
class DraftReading:
    """What a draft's reading of a pack's prompts came to."""

    chosen_C: Tensor  # ascending indices of the tokens that the model computes
    segments: Segments  # of the whole prompts
    shape: ModelShape  # of the draft
    work: Work  # its prefill
    look_ahead: int  # tokens that it generated behind each prompt

    @cached_property
    def flops(self) -> tuple[int, ...]:
        """Operations of the draft for each document: its prefill, and look-ahead tokens, which are scored.

        Waits for the device.
        """
        by_document = zip(*self.work.by_layer(), strict=True)
        count = self.look_ahead
        ahead = [
            LayerWork(count, count, scored_pairs=count * n, pairs=count * n) for n in self.segments.lengths
        ]
        return tuple(
            passes_flops(self.shape, [layers, [more] * self.shape.layers])
            for layers, more in zip(by_document, ahead, strict=True)
        )


def read_ahead(
    draft: Draft, method: PruningMethod, pack: Pack, check: Callable[[], None] = lambda: None
) -> DraftReading:
    """Have a draft read whole prompts and go on for some tokens; the tokens that `method` chooses by that.

    `method` is one that `ReadsAhead`, and the draft's vocabulary that of the model; its memory is given back.
    `check` is called before every layer and every look-ahead token, and may raise.
    """
    assert isinstance(method, ReadsAhead)
    decoder, attention, segments = draft.decoder, draft.attention, pack.segments
    # tables of embeddings may be padded to different sizes, and random tokens lie beyond the smaller one
    ids = pack.input_ids.clamp(max=decoder.shape.vocab - 1)
    pack = replace(pack, input_ids=ids, answer_tokens=())  # it goes on by tokens of its own
    reader = DraftReader(ahead=method)
    state = reader.begin(reader.plan(decoder.shape, segments.lengths))
    begun = PartialPrefill.afresh(decoder, pack, RaggedCache(method.look_ahead))
    outcome = run_layers(decoder, attention, reader, pack, state, begun, check)
    assert isinstance(outcome, Survivors)
    assert state.window_T is not None
    protected = [method.protected(n, spans) for n, spans in zip(pack.lengths, pack.spans, strict=True)]
    protected_T = mask_of(protected, segments, pack.positions_T)
    scores_ST, count = state.window_T[None], method.look_ahead
    if count:
        ahead = LookAhead(decoder, attention, begun.cache, count)
        ahead.run(outcome.hidden_TD, check)
        scores_ST = torch.cat((scores_ST, ahead.scores(method.pool)))
    return DraftReading(
        chosen_C=method.chosen(scores_ST, segments, protected_T),
        segments=segments,
        shape=decoder.shape,
        work=begun.work,
        look_ahead=count,
    )


class LookAhead:
    """Tokens that a draft generates behind each prompt of a pack, greedily, and what they attend to.

    What a step works on stays on the device, where it is counted too. Letters beside those of segments.py: N
    layers, S steps.
    """

    def __init__(self, decoder: Decoder, attention: AttentionBackend, cache: RaggedCache, count: int) -> None:
        """Of prompts that the `cache` holds all of, with room for `count` more tokens each."""
        self._decoder, self._attention, self._cache, self._count = decoder, attention, cache, count
        self._slots = cache.slots[0]
        device, lengths = decoder.device, self._slots.segments.lengths
        self._documents = len(lengths)
        own = decoder.own
        self._queries_NSBHd = torch.empty(
            (own.layers, count, self._documents, own.heads, own.head_dim), dtype=decoder.dtype, device=device
        )
        self._token_B = torch.zeros(self._documents, dtype=torch.int64, device=device)
        self._position_B = on_device(lengths, device, torch.int64)  # of that token
        self._place_B = self._position_B + on_device(self._slots.starts, device)
        self._used_B = on_device([n + 1 for n in lengths], device, torch.int32)  # that token included
        self._bounds_B1 = on_device([*self._slots.starts, self._slots.capacity], device, torch.int32)
        self._queries_B1 = torch.arange(self._documents + 1, dtype=torch.int32, device=device)
        self._reach_B = on_device(cache.reaches, device)
        self._step_1 = torch.zeros(1, dtype=torch.int64, device=device)
        self._host_step = 0  # the same, where attention needs counts of the host
        self._by_device = attention.captures(device, decoder.dtype, own.head_dim)

    @torch.inference_mode()
    def run(self, last_BD: Tensor, check: Callable[[], None]) -> None:
        """Generate the tokens, the first of them by the residual stream of each prompt's last token."""
        self._token_B.copy_(self._decoder.head(last_BD).argmax(-1))
        for _ in range(self._count):
            check()
            self._step()

    @torch.inference_mode()
    def scores(self, pool: int) -> Tensor:
        """(S, T) what each step attended to, the largest of heads and layers; tokens T of whole prompts.

        Of each head it is averaged over `pool` neighbours.
        """
        slots, room = self._slots, self._count
        documents = [
            look_ahead_importance(
                self._queries_NSBHd[:, :, b],
                [keys[start : start + length + room] for keys in self._cache.keys],
                pool,
            )
            for b, (start, length) in enumerate(zip(slots.starts, slots.segments.lengths, strict=True))
        ]
        return torch.cat(documents, dim=1)

    def _step(self) -> None:
        """Run the newest token of each prompt through the draft, and go on to the one that follows it."""
        decoder, cache = self._decoder, self._cache
        hidden_BD = decoder.embed(self._token_B)
        rope = decoder.rope(hidden_BD, self._position_B, self._reach_B)
        slots, normed = self._seen(), None
        for layer in range(decoder.shape.layers):
            target = KvTarget(*cache.buffers(layer), self._place_B, None, None)

            def attend(q_BHd: Tensor, layer: int = layer) -> Tensor:
                self._queries_NSBHd[layer].index_copy_(0, self._step_1, q_BHd[None])
                return self._attention.decode(q_BHd, *cache.buffers(layer), slots, decoder.sinks(layer))

            normed = decoder.step_layer_(layer, hidden_BD, rope, target, attend, normed)
        self._token_B.copy_(decoder.head(hidden_BD).argmax(-1))
        for counted in (self._position_B, self._place_B, self._used_B, self._step_1):
            counted.add_(1)
        self._host_step += 1

    def _seen(self) -> DecodeSlots:
        """What the newest tokens attend to, in every layer: their prompts, and all behind those."""
        lengths, host = self._slots.segments.lengths, None
        if not self._by_device:
            used = [n + 1 + self._host_step for n in lengths]
            host = HostSlots(tuple(self._slots.starts), used, (1,) * self._documents)
        return DecodeSlots(
            longest=max(lengths) + self._count,
            used_B=self._used_B,
            bounds_B1=self._bounds_B1,
            queries_B1=self._queries_B1,
            most_queries=1,
            host=host,
        )
