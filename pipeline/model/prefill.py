"""The prefill: a pack's prompts through all layers, once or, where a method begins anew, twice.

A method may have a draft model read the prompts before, and choose by that which tokens are prefilled at all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from pipeline.families.decoder import Decoder
from pipeline.families.rope import UNROTATED
from pipeline.kernels.attention import AttentionBackend
from pipeline.kernels.segments import Segments
from pipeline.model.cache import MemoryCache, RaggedCache
from pipeline.model.layers import Survivors, dropped_last_token, run_layers
from pipeline.model.offload import KvLimits, make_cache
from pipeline.model.pack import Pack, PartialPrefill
from pipeline.model.reading_ahead import Draft, DraftReading, read_ahead
from pipeline.model.work import Work
from pipeline.pruning.base import PruningMethod, Selection
from pipeline.pruning.capabilities import HoldsUnrotatedKeys, ReadsAhead, RescoresBlocks, check_memories
from pipeline.pruning.memories.key_memory import KeyMemory, MemoryNeeds
from pipeline.pruning.operations import LayerWork
from pipeline.pruning.tiers import FFN, LIVE
from pipeline.ranks.leading import on_every_rank


@dataclass(kw_only=True)
class Prefilled:
    """All that decoding needs of a prefilled pack."""

    logits_BV: Tensor  # float32, at each prompt's last token
    cache: RaggedCache
    passes: list[Work]  # one, or two where a method began anew with fewer tokens
    lengths: tuple[int, ...]  # prompt tokens of each document
    next_positions: tuple[int, ...]  # of each document's first generated token
    reading: DraftReading | None = None  # of a draft model, before the passes

    def by_document(self) -> list[list[list[LayerWork]]]:
        """Of each document, pass and layer."""
        counted = [work.by_layer() for work in self.passes]
        return [[[layer[b] for layer in layers] for layers in counted] for b in range(len(self.lengths))]

    @property
    def draft_flops(self) -> tuple[int, ...]:
        """Operations of a draft model for each document."""
        return (0,) * len(self.lengths) if self.reading is None else self.reading.flops

    @property
    def work(self) -> Work:
        """The last pass, whose keys and values are in the cache."""
        return self.passes[-1]


@on_every_rank
@torch.inference_mode()
def prefill(
    decoder: Decoder,
    attention: AttentionBackend,
    method: PruningMethod,
    pack: Pack,
    new_tokens: int = 0,
    check: Callable[[], None] = lambda: None,
    limits: KvLimits | None = None,
    marks: bool = False,
    begun: PartialPrefill | None = None,
    kv_dtype: torch.dtype | None = None,
    draft: Draft | None = None,
) -> Prefilled:
    """Run a pack's prompts through the model, pruned by `method`, or on from where they have `begun`.

    The cache gets room for `new_tokens` more tokens a document, and offloads to the host what exceeds
    `limits`; else it is in `kv_dtype`, if that is float8_e4m3fn, which only a pack of one document can be
    decoded from. `check` is called before every layer, and may raise to give the pack up. With `marks` work
    of each pass holds who was computed in each layer, a byte a token, on the device. Nothing is copied to
    the host for a method that keeps all tokens alive and counts them beforehand; a token that is dropped
    keeps its position, unless the method begins anew. `draft` reads the prompts first, if the method wants
    that; without one the model itself does, which saves nothing.
    """
    lengths = pack.lengths
    method.check_depth(decoder.shape)
    if isinstance(method, HoldsUnrotatedKeys):
        refused = {
            "--kv-memory": limits is not None,
            "--kv-dtype fp8": kv_dtype not in (None, decoder.dtype),
            "--linear-dtype mixed": decoder.linears == "mixed",
        }
        check_memories(method, refused)
        return _into_memories(decoder, attention, method, pack, new_tokens, check, marks)
    reading = None
    if isinstance(method, ReadsAhead):
        own = _Reader(decoder=decoder, attention=attention)
        reading = read_ahead(own if draft is None else draft, method, pack, check)
        pack = pack.thinned(reading.chosen_C)
    plan = method.plan(decoder.shape, lengths)
    state = method.begin(plan)
    rescores = partial(method.select_decode, state=state) if isinstance(method, RescoresBlocks) else None
    passes: list[Work] = []
    while True:
        if begun is None:
            cache = make_cache(
                plan,
                new_tokens,
                limits,
                device=decoder.device,
                itemsize=decoder.dtype.itemsize,
                score=rescores,
                dtype=kv_dtype,
            )
            begun = PartialPrefill.afresh(decoder, pack, cache, marks)
        passes.append(begun.work)
        outcome = run_layers(decoder, attention, method, pack, state, begun, check)
        if isinstance(outcome, Selection):
            assert outcome.restart is not None
            pack, begun = pack.only(outcome.restart), None
            continue
        if decoder.ranks is not None:
            begun.work.average_pairs(decoder.ranks)
        logits_BV = decoder.logits(outcome.hidden_TD)
        _check_last_token(method, outcome, pack.lengths)
        return Prefilled(
            logits_BV=logits_BV,
            cache=begun.cache,
            passes=passes,
            lengths=lengths,
            next_positions=pack.lengths,
            reading=reading,
        )


class _Reader(NamedTuple):
    """A model that reads its own prompts."""

    decoder: Decoder
    attention: AttentionBackend


def _into_memories(
    decoder: Decoder,
    attention: AttentionBackend,
    method: PruningMethod,
    pack: Pack,
    new_tokens: int,
    check: Callable[[], None],
    marks: bool,
) -> Prefilled:
    """Prefill documents one after the other into memories of their own, by a method that holds them."""
    assert isinstance(method, HoldsUnrotatedKeys)
    method.plan(decoder.shape, pack.segments.lengths)
    ends, memories = [], []
    whole = method.needs_last_layer(decoder.shape)
    for start, end in pack.segments.ranges():
        ids_N = pack.input_ids[start:end]
        needs = MemoryNeeds(
            shape=decoder.shape,
            length=len(ids_N),
            new_tokens=new_tokens,
            dtype=decoder.dtype,
            device=decoder.device,
            attention=attention,
            rotation=partial(decoder.rotary.rotation, decoder.embed(ids_N[:1])),
        )
        memory = method.memory(needs)
        for ids_C in ids_N.split(method.chunk_tokens(decoder.piece_tokens)):
            hidden_1D = _chunk(decoder, memory, ids_C, whole=whole, check=check)
        ends.append(hidden_1D)
        memories.append(memory)
    cache = MemoryCache(memories, decoder.device, new_tokens)
    cache.reaches = tuple(length + new_tokens for length in pack.segments.lengths)
    return Prefilled(
        logits_BV=decoder.logits(torch.cat(ends)),
        cache=cache,
        passes=[_work_of(memories, pack.segments, decoder.shape.layers, whole, marks)],
        lengths=pack.segments.lengths,
        next_positions=pack.segments.lengths,
    )


def _chunk(
    decoder: Decoder, memory: KeyMemory, ids_C: Tensor, *, whole: bool, check: Callable[[], None]
) -> Tensor:
    """(1, D) the last token of a prompt's next chunk after all layers.

    Of the model's last layer nothing else is read; `whole` if its attention is to be computed of all tokens.
    """
    cache, last = MemoryCache([memory], decoder.device, 0), decoder.shape.layers - 1
    hidden_CD = decoder.embed(ids_C)
    for layer in range(last):
        cache.layer_(decoder, layer, hidden_CD, (len(ids_C),), check)
    check()
    k_CKd, v_CKd = decoder.keys_values(last, hidden_CD, UNROTATED)
    asking_QD = hidden_CD if whole else hidden_CD[-1:]
    (q_QHd,) = decoder.queries(last, asking_QD, UNROTATED)
    attended_QHd = memory.attend(last, q_QHd, k_CKd, v_CKd)
    hidden_1D = hidden_CD[-1:].clone()
    decoder.add_attention_(last, hidden_1D, attended_QHd[-1:])
    decoder.add_feed_forward_(last, hidden_1D)
    return hidden_1D


def _work_of(
    memories: Sequence[KeyMemory], segments: Segments, layers: int, whole: bool, marks: bool
) -> Work:
    """Of a prefill in which every token passes every layer, but for the FFN of the last."""
    lengths_B, none = segments.lengths_B, (0,) * len(segments)
    all_but_last = [lengths_B] * (layers - 1)
    marked_T = torch.full((segments.total,), LIVE | FFN, dtype=torch.uint8, device=segments.device)
    return Work(
        kept=[segments.lengths] * layers,
        ffn_B=[*all_but_last, torch.ones_like(lengths_B)],
        ffn_fp8_B=[torch.zeros_like(lengths_B)] * layers,
        scored_pairs=[none] * layers,
        pairs_B=[torch.tensor(pairs) for pairs in zip(*(memory.pairs for memory in memories), strict=True)],
        kv_only=[none] * layers,
        last_only=[*[False] * (layers - 1), not whole],
        estimated=list(zip(*(memory.estimated_pairs for memory in memories), strict=True)),
        marks=[marked_T] * layers if marks else None,
    )


def _check_last_token(method: PruningMethod, survivors: Survivors, lengths: Sequence[int]) -> None:
    if survivors.whole:
        return
    if survivors.positions_T.tolist() != [length - 1 for length in lengths]:
        raise dropped_last_token(method)
