"""Reading ahead: a draft model reads prompts and goes on, by which a method chooses what is prefilled.

From the first layer to the choice the host waits for nothing: while the device is still busy with the prompts
it queues the tokens behind them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from pipeline.families.decoder import Decoder
from pipeline.kernels.attention import AttentionBackend
from pipeline.kernels.decode_slots import DecodeSlots
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


@runtime_checkable
class StepsAhead(Protocol):
    """A draft that takes look-ahead steps faster than from Python."""

    def has_room(self, cache: RaggedCache) -> bool:
        """Whether it can take those behind the prompts of this cache."""

    def scores(self, cache: RaggedCache, last_BD: Tensor, pool: int, check: Callable[[], None]) -> Tensor:
        """The same as `look_ahead_scores`; the cache is not needed any more."""


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


class NothingStored(RaggedCache):
    """Of prompts that no token comes behind, which would read their keys and values."""

    def store(self, k_TKd: Tensor, v_TKd: Tensor, segments: Segments) -> None:
        pass


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
    cache = RaggedCache(method.look_ahead) if method.look_ahead else NothingStored(0)
    begun = PartialPrefill.afresh(decoder, pack, cache)
    outcome = run_layers(decoder, attention, reader, pack, state, begun, check)
    assert isinstance(outcome, Survivors)
    protected = [method.protected(n, spans) for n, spans in zip(pack.lengths, pack.spans, strict=True)]
    protected_T = mask_of(protected, segments, pack.positions_T)
    scores_ST, count = state.largest(segments, method.pool)[None], method.look_ahead
    if count:
        scores: Callable[..., Tensor] = partial(look_ahead_scores, decoder, attention)
        if isinstance(draft, StepsAhead) and draft.has_room(begun.cache):
            scores = draft.scores
        ahead_ST = scores(begun.cache, outcome.hidden_TD, method.pool, check)
        scores_ST = torch.cat((scores_ST, ahead_ST))
    return DraftReading(
        chosen_C=method.chosen(scores_ST, segments, protected_T),
        segments=segments,
        shape=decoder.shape,
        work=begun.work,
        look_ahead=count,
    )


@torch.inference_mode()
def look_ahead_scores(
    decoder: Decoder,
    attention: AttentionBackend,
    cache: RaggedCache,
    last_BD: Tensor,
    pool: int,
    check: Callable[[], None],
) -> Tensor:
    """(S, T) what S tokens behind each prompt of the cache attend to, for which it has room; see `attended`.

    They are generated greedily, the first by the residual stream of each prompt's last token, `last_BD`.
    """
    own, hidden_BD, count = decoder.own, last_BD, cache.new_tokens
    size = (own.layers, count, len(last_BD), own.heads, own.head_dim)
    queries_NSBHd = torch.empty(size, dtype=decoder.dtype, device=decoder.device)
    for step in range(count):
        check()
        token_B = decoder.head(hidden_BD).argmax(-1)
        hidden_BD = _step(decoder, attention, cache, token_B, queries_NSBHd[:, step])
    slots = cache.slots[0]
    places = [slice(start, start + used) for start, used in zip(slots.starts, slots.used, strict=True)]
    return attended(queries_NSBHd, [[keys[place] for keys in cache.keys] for place in places], pool)


def _step(
    decoder: Decoder, attention: AttentionBackend, cache: RaggedCache, token_B: Tensor, queries_NBHd: Tensor
) -> Tensor:
    """Run a token of each document through all layers, and into the cache; the residual stream, (B, D).

    Their queries with RoPE are written to `queries_NBHd`.
    """
    device, slots = decoder.device, cache.slots[0]
    places = [start + used for start, used in zip(slots.starts, slots.used, strict=True)]
    place_B, position_B = on_device(places, device), on_device(slots.used, device)
    cache.advance((1,) * len(places))
    seen = DecodeSlots.of(slots.starts, slots.used, slots.capacity, device)
    hidden_BD = decoder.embed(token_B)
    rope, normed = decoder.rope(hidden_BD, position_B, on_device(cache.reaches, device)), None
    for layer in range(decoder.shape.layers):

        def attend(q_BHd: Tensor, layer: int = layer) -> Tensor:
            queries_NBHd[layer] = q_BHd
            return attention.decode(q_BHd, *cache.buffers(layer), seen, decoder.sinks(layer))

        target = KvTarget(*cache.buffers(layer), place_B)
        normed = decoder.step_layer_(layer, hidden_BD, rope, target, attend, normed)
    return hidden_BD


def attended(queries_NSBHd: Tensor, keys: Sequence[Sequence[Tensor]], pool: int) -> Tensor:
    """(S, T) what each of S tokens attended to, the largest of heads and layers; tokens T of whole prompts.

    `keys` are of each prompt and of its N layers, those of the S tokens at their end. Of each head it is
    averaged over `pool` neighbours.
    """
    documents = [
        look_ahead_importance(queries_NSBHd[:, :, b], of_layers, pool) for b, of_layers in enumerate(keys)
    ]
    return torch.cat(documents, dim=1)
