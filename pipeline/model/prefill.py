"""The prefill: one layer loop for every method, over a pack of documents without padding."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pipeline.bench.flops import LayerWork
from pipeline.errors import MarsError
from pipeline.kernels.attention import AttentionBackend
from pipeline.kernels.segments import Segments
from pipeline.kernels.sparse import SparsePrefill
from pipeline.model.adapters import DecoderAdapter
from pipeline.model.cache import RaggedCache
from pipeline.model.offload import KvLimits, make_cache
from pipeline.model.parking import Parked
from pipeline.model.precision import Kept, kept_of
from pipeline.model.work import Work
from pipeline.pruning.base import LayerView, PruningMethod, Selection
from pipeline.records import EncodedDocument, Spans

_ALL = ((slice(None), None),)  # of a pack's tokens, in the precision of all linear layers


@dataclass(frozen=True, kw_only=True)
class Pack:
    """Documents that are prefilled together, end to end."""

    input_ids: Tensor  # (T,)
    segments: Segments
    spans: tuple[Spans, ...]

    @classmethod
    def of(cls, documents: Sequence[EncodedDocument], device: torch.device) -> Pack:
        ids = torch.cat([torch.from_numpy(document.input_ids) for document in documents])
        lengths = [document.prompt_tokens for document in documents]
        spans = tuple(document.spans for document in documents)
        return cls(input_ids=ids.to(device), segments=Segments.of(lengths, device), spans=spans)

    def only(self, indices: Tensor) -> Pack:
        """The same documents with some of their tokens; the spans remain those of the whole prompts."""
        ids = self.input_ids.index_select(0, indices)
        return replace(self, input_ids=ids, segments=surviving(self.segments, indices))


@dataclass(frozen=True, kw_only=True)
class Begun:
    """A pass over a pack before layer `layers`: what the layers before it have made."""

    layers: int
    hidden_TD: Tensor  # overwritten by the layers that follow
    cache: RaggedCache
    work: Work

    @classmethod
    def afresh(cls, adapter: DecoderAdapter, pack: Pack, cache: RaggedCache, marks: bool = False) -> Begun:
        work = Work(marks=[] if marks else None)
        return cls(layers=0, hidden_TD=adapter.embed(pack.input_ids), cache=cache, work=work)


@dataclass(frozen=True, kw_only=True)
class Survivors:
    """The tokens that are left of a pack after some layers."""

    hidden_TD: Tensor
    positions_T: Tensor
    segments: Segments


@dataclass(kw_only=True)
class Prefilled:
    """All that decoding needs of a prefilled pack."""

    logits_BV: Tensor  # float32, at each prompt's last token
    cache: RaggedCache
    passes: list[Work]  # one, or two where a method began anew with fewer tokens
    lengths: tuple[int, ...]  # prompt tokens of each document
    next_positions: tuple[int, ...]  # of each document's first generated token

    def by_document(self) -> list[list[list[LayerWork]]]:
        """Of each document, pass and layer."""
        counted = [work.by_layer() for work in self.passes]
        return [[[layer[b] for layer in layers] for layers in counted] for b in range(len(self.lengths))]

    @property
    def work(self) -> Work:
        """The last pass, whose keys and values are in the cache."""
        return self.passes[-1]


@torch.inference_mode()
def prefill(
    adapter: DecoderAdapter,
    attention: AttentionBackend,
    method: PruningMethod,
    pack: Pack,
    new_tokens: int = 0,
    check: Callable[[], None] = lambda: None,
    limits: KvLimits | None = None,
    marks: bool = False,
    begun: Begun | None = None,
) -> Prefilled:
    """Run a pack's prompts through the model, pruned by `method`, or on from where they have `begun`.

    The cache gets room for `new_tokens` more tokens a document, and offloads to the host what exceeds
    `limits`. `check` is called before every layer, and may raise to give the pack up. With `marks` the work
    of each pass holds who was computed in each layer, a byte a token, on the device. Nothing is copied to
    the host for a method that keeps all tokens alive and counts them beforehand; a token that is dropped
    keeps its position, unless the method begins anew.
    """
    lengths = pack.segments.lengths
    plan = method.plan(adapter.shape, lengths)
    state = method.begin(plan)
    passes: list[Work] = []
    while True:
        if begun is None:
            cache = make_cache(
                plan,
                new_tokens,
                limits,
                device=adapter.device,
                itemsize=adapter.dtype.itemsize,
                score=partial(method.select_decode, state=state),
            )
            begun = Begun.afresh(adapter, pack, cache, marks)
        passes.append(begun.work)
        outcome = run_layers(adapter, attention, method, pack, state, begun, check)
        if isinstance(outcome, Selection):
            assert outcome.restart is not None
            pack, begun = pack.only(outcome.restart), None
            continue
        _check_last_token(method, outcome.positions_T, outcome.segments, pack.segments)
        return Prefilled(
            logits_BV=adapter.logits(outcome.hidden_TD.index_select(0, outcome.segments.last_indices())),
            cache=begun.cache,
            passes=passes,
            lengths=lengths,
            next_positions=pack.segments.lengths,
        )


def run_layers(
    adapter: DecoderAdapter,
    attention: AttentionBackend,
    method: PruningMethod,
    pack: Pack,
    state: Any,
    begun: Begun,
    check: Callable[[], None],
    stop: int | None = None,
) -> Survivors | Selection:
    """From `begun` through the layers before `stop` (None: all), or the selection that asks to begin anew."""
    cache, work, segments = begun.cache, begun.work, pack.segments
    positions_T = segments.index_in_document_T
    hidden_TD = begun.hidden_TD
    rope = adapter.rope(hidden_TD, positions_T)
    parked: Parked | None = None
    kept, sparse = _kept(adapter, segments), _sparse(adapter, attention, segments)
    masses = method.attention_masses(adapter.shape.layers)
    for layer in range(begun.layers, adapter.shape.layers if stop is None else stop):
        check()
        q_THd, k_TKd, v_TKd = adapter.qkv(layer, hidden_TD, rope)
        stored, pairs_B = (k_TKd, v_TKd, segments), None
        if parked is not None:
            stored = (*parked.keys_values(adapter, layer, k_TKd, v_TKd), parked.whole)
            mixed_THd = parked.attend(attention, q_THd, *stored[:2])
            pairs_B = parked.pairs_B()
        elif (mass := masses[layer]) is not None:
            mixed_THd, pairs_B = sparse.attend(q_THd, k_TKd, v_TKd, mass)
        else:
            mixed_THd = attention.prefill(q_THd, k_TKd, v_TKd, segments)
        for rows, fp8 in _ALL if kept is None else kept.parts:
            adapter.add_attention_(layer, hidden_TD[rows], mixed_THd[rows], fp8)
        view = LayerView(
            layer=layer,
            queries=q_THd,
            keys=k_TKd,
            values=v_TKd,
            hidden=hidden_TD,
            positions=positions_T,
            segments=segments,
            lengths=pack.segments.lengths,
            spans=pack.spans,
        )
        selection = method.select(layer, view, state)
        if selection.restart is not None:
            work.count(view, view.all_indices[:0])
            work.mark(view, selection.restart, view.all_indices[:0], None)
            return selection
        if selection.blocks is not None:
            cache.settle(layer, selection.blocks)
        _store(cache, *stored, selection)
        ffn, ffn_fp8 = _feed_forward(adapter, layer, hidden_TD, selection, kept)
        counts = None if parked is None else parked.counts
        work.count(view, ffn, ffn_fp8, pairs_B=pairs_B, parked=counts)
        work.mark(view, selection.live, ffn, ffn_fp8)
        if selection.live is not None:
            segments = surviving(segments, selection.live, selection.live_lengths)
            if selection.parks:
                assert view.segments is pack.segments, "tokens have left before"
                parked = Parked.of(pack.segments, segments, selection.live, hidden_TD, rope)
            kept, sparse = _kept(adapter, segments), _sparse(adapter, attention, segments)
            hidden_TD = hidden_TD.index_select(0, selection.live)
            positions_T = positions_T.index_select(0, selection.live)
            rope = (rope[0].index_select(0, selection.live), rope[1].index_select(0, selection.live))
    return Survivors(hidden_TD=hidden_TD, positions_T=positions_T, segments=segments)


def _kept(adapter: DecoderAdapter, segments: Segments) -> Kept | None:
    """The tokens that keep the model's dtype beside others in fp8; None: all are in one precision."""
    return kept_of(segments, adapter.shape) if adapter.linears == "mixed" else None


def _sparse(adapter: DecoderAdapter, attention: AttentionBackend, segments: Segments) -> SparsePrefill:
    return SparsePrefill(attention, segments, width=adapter.shape.heads * adapter.shape.head_dim)


def _feed_forward(
    adapter: DecoderAdapter, layer: int, hidden_TD: Tensor, selection: Selection, kept: Kept | None
) -> tuple[Tensor | None, Tensor | None]:
    """Take the tokens selected through the network: those (None: all) by default, and those in fp8."""
    ffn, ffn_fp8 = selection.live if selection.ffn is None else selection.ffn, selection.ffn_fp8
    if ffn is not None and len(ffn) == len(hidden_TD):
        ffn = None
    if ffn_fp8 is None and kept is not None:
        own, others = kept.split(ffn)
        if ffn is None:
            for rows, fp8 in kept.parts:
                adapter.add_feed_forward_(layer, hidden_TD[rows], fp8)
            return own, others
        ffn, ffn_fp8 = own, others
    if ffn_fp8 is None:
        feed_forward_(adapter, layer, hidden_TD, ffn)
    else:
        feed_forward_(adapter, layer, hidden_TD, ffn, fp8=False)
        feed_forward_(adapter, layer, hidden_TD, ffn_fp8, fp8=True)
    return ffn, ffn_fp8


def feed_forward_(
    adapter: DecoderAdapter,
    layer: int,
    hidden_TD: Tensor,
    passes: Tensor | None,
    fp8: bool | None = None,
) -> None:
    """Add the feed-forward network's output in place, for the tokens `passes` (None: all).

    The network and its norm run on the gathered tokens alone, a piece at a time; the rows of the others are
    not touched. `fp8` says in which precision, None in that of all linear layers.
    """
    if passes is None:
        adapter.add_feed_forward_(layer, hidden_TD, fp8)
        return
    for rows in adapter.pieces(len(passes)):
        chosen_C = passes[rows]
        chosen_CD = hidden_TD.index_select(0, chosen_C)
        adapter.add_feed_forward_(layer, chosen_CD, fp8)
        hidden_TD.index_copy_(0, chosen_C, chosen_CD)


def surviving(segments: Segments, indices: Tensor, lengths: tuple[int, ...] | None = None) -> Segments:
    """Segments of the tokens left; kernels want their lengths on the host, which waits unless it knows."""
    return Segments.of(segments.counts(indices).tolist() if lengths is None else lengths, segments.device)


def _store(
    cache: RaggedCache, k_TKd: Tensor, v_TKd: Tensor, segments: Segments, selection: Selection
) -> None:
    """Store the tokens `selection.cache`: (C,) of all heads, or (K, C) of each head its own."""
    indices = selection.cache
    if indices is None:
        cache.store(k_TKd, v_TKd, segments)
        return
    stored = surviving(segments, indices if indices.dim() == 1 else indices[0], selection.cache_lengths)
    if indices.dim() == 1:
        cache.store(k_TKd.index_select(0, indices), v_TKd.index_select(0, indices), stored)
    else:
        index_CKd = indices.T[:, :, None].expand(-1, -1, k_TKd.shape[-1])
        cache.store(k_TKd.gather(0, index_CKd), v_TKd.gather(0, index_CKd), stored)


def _check_last_token(
    method: PruningMethod, positions_T: Tensor, segments: Segments, original: Segments
) -> None:
    if segments is original:
        return
    last = positions_T[segments.last_indices()].tolist() if min(segments.lengths) else []
    if last != [length - 1 for length in original.lengths]:
        raise MarsError(f"method {method.name} dropped a prompt's last token, which predicts the answer")
