"""The prefill: one layer loop for every method, over a pack of documents without padding."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pipeline.bench.flops import LayerWork
from pipeline.errors import MarsError
from pipeline.kernels.attention import AttentionBackend
from pipeline.kernels.segments import Segments
from pipeline.kernels.sparse import sparse_prefill
from pipeline.model.adapters import DecoderAdapter
from pipeline.model.cache import RaggedCache
from pipeline.model.offload import KvLimits, make_cache
from pipeline.model.parking import Parked
from pipeline.pruning.base import LayerView, PruningMethod, Selection
from pipeline.records import EncodedDocument, Spans
from pipeline.tiers import FFN, FP8, LIVE


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


@dataclass(kw_only=True)
class Work:
    """Tokens that each layer of one pass worked on, layer by layer and document by document."""

    kept: list[tuple[int, ...]] = field(default_factory=list)  # entered the layer: attention and projections
    ffn_B: list[Tensor] = field(default_factory=list)  # passed the FFN; on the device until asked for
    ffn_fp8_B: list[Tensor] = field(default_factory=list)  # of these in fp8, as the method chose
    scored_pairs: list[tuple[int, ...]] = field(default_factory=list)  # query-key pairs for scoring
    pairs_B: list[Tensor | None] = field(
        default_factory=list
    )  # those of attention, where not all causal ones
    parked: list[tuple[int, ...]] = field(default_factory=list)  # gave keys and values alone
    marks: list[Tensor] | None = None  # (T,) uint8 of the tokens that entered, where they are asked for

    def ffn(self) -> list[list[int]]:
        """Of each layer, FFN tokens of each document; the one copy to the host a pass needs."""
        return torch.stack(self.ffn_B).tolist()

    def by_layer(self) -> list[list[LayerWork]]:
        """Of each layer and document."""
        fp8 = torch.stack(self.ffn_fp8_B).tolist()
        pairs = [[None] * len(self.kept[0]) if counts is None else counts.tolist() for counts in self.pairs_B]
        columns = zip(self.kept, self.ffn(), self.scored_pairs, fp8, pairs, self.parked, strict=True)
        return [[LayerWork(*counts) for counts in zip(*layer, strict=True)] for layer in columns]

    def count(
        self,
        view: LayerView,
        ffn: Tensor | None,
        ffn_fp8: Tensor | None = None,
        *,
        pairs_B: Tensor | None = None,
        parked: tuple[int, ...] | None = None,
    ) -> None:
        """Add a layer, of whose tokens `ffn` (None: all) and `ffn_fp8` passed its feed-forward network.

        `pairs_B` are the query-key pairs of its attention, unless they are all causal ones.
        """
        self.kept.append(view.segments.lengths)
        self.scored_pairs.append(view.scored_pairs or (0,) * len(view.segments))
        self.pairs_B.append(pairs_B)
        self.parked.append(parked or (0,) * len(view.segments))
        segments = view.segments
        lengths_B = segments.cu_seqlens.long().diff()
        fp8_B = torch.zeros_like(lengths_B) if ffn_fp8 is None else segments.counts(ffn_fp8)
        self.ffn_B.append(fp8_B + (lengths_B if ffn is None else segments.counts(ffn)))
        self.ffn_fp8_B.append(fp8_B)

    def mark(self, view: LayerView, live: Tensor | None, ffn: Tensor | None, fp8: Tensor | None) -> None:
        """Note, if that is asked for, who goes on and who passed the feed-forward network (None: all)."""
        if self.marks is None:
            return
        marks_T = torch.zeros(view.segments.total, dtype=torch.uint8, device=view.hidden.device)
        marks_T[slice(None) if live is None else live] |= LIVE
        marks_T[slice(None) if ffn is None else ffn] |= FFN
        if fp8 is not None:
            marks_T[fp8] |= FFN | FP8
        self.marks.append(marks_T)


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
) -> Prefilled:
    """Run a pack's prompts through the model, pruned by `method`.

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
        cache = make_cache(
            plan,
            new_tokens,
            limits,
            device=adapter.device,
            itemsize=adapter.dtype.itemsize,
            score=partial(method.select_decode, state=state),
        )
        passes.append(Work(marks=[] if marks else None))
        outcome = _one_pass(adapter, attention, method, pack, state, cache, passes[-1], check)
        if isinstance(outcome, Selection):
            assert outcome.restart is not None
            pack = pack.only(outcome.restart)
            continue
        return Prefilled(
            logits_BV=outcome,
            cache=cache,
            passes=passes,
            lengths=lengths,
            next_positions=pack.segments.lengths,
        )


def _one_pass(
    adapter: DecoderAdapter,
    attention: AttentionBackend,
    method: PruningMethod,
    pack: Pack,
    state: Any,
    cache: RaggedCache,
    work: Work,
    check: Callable[[], None],
) -> Tensor | Selection:
    """The logits (B, vocabulary) at each prompt's end, or the selection that asks to begin anew."""
    segments = pack.segments
    positions_T = segments.index_in_document_T
    hidden_TD = adapter.embed(pack.input_ids)
    rope = adapter.rope(hidden_TD, positions_T)
    parked: Parked | None = None
    for layer in range(adapter.shape.layers):
        check()
        q_THd, k_TKd, v_TKd = adapter.qkv(layer, hidden_TD, rope)
        stored, pairs_B = (k_TKd, v_TKd, segments), None
        if parked is not None:
            stored = (*parked.keys_values(adapter, layer, k_TKd, v_TKd), parked.whole)
            mixed_THd = parked.attend(attention, q_THd, *stored[:2])
            pairs_B = parked.pairs_B()
        elif (mass := method.attention_mass(layer)) is not None:
            mixed_THd, pairs_B = sparse_prefill(q_THd, k_TKd, v_TKd, segments, mass, attention.prefill)
        else:
            mixed_THd = attention.prefill(q_THd, k_TKd, v_TKd, segments)
        adapter.add_attention_(layer, hidden_TD, mixed_THd)
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
        ffn = selection.live if selection.ffn is None else selection.ffn
        if selection.ffn_fp8 is None:
            feed_forward_(adapter, layer, hidden_TD, ffn)
        else:
            feed_forward_(adapter, layer, hidden_TD, ffn, fp8=False)
            feed_forward_(adapter, layer, hidden_TD, selection.ffn_fp8, fp8=True)
        counts = None if parked is None else parked.counts
        work.count(view, ffn, selection.ffn_fp8, pairs_B=pairs_B, parked=counts)
        work.mark(view, selection.live, ffn, selection.ffn_fp8)
        if selection.live is not None:
            segments = surviving(segments, selection.live, selection.live_lengths)
            if selection.parks:
                assert view.segments is pack.segments, "tokens have left before"
                parked = Parked.of(pack.segments, segments, selection.live, hidden_TD, rope)
            hidden_TD = hidden_TD.index_select(0, selection.live)
            positions_T = positions_T.index_select(0, selection.live)
            rope = (rope[0].index_select(0, selection.live), rope[1].index_select(0, selection.live))
    _check_last_token(method, positions_T, segments, pack.segments)
    return adapter.logits(hidden_TD.index_select(0, segments.last_indices()))


def feed_forward_(
    adapter: DecoderAdapter,
    layer: int,
    hidden_TD: Tensor,
    passes: Tensor | None,
    fp8: bool | None = None,
) -> None:
    """Add the feed-forward network's output in place, for the tokens `passes` (None: all).

    The network and its norm run on the gathered tokens alone; the rows of the others are not touched.
    `fp8` says in which precision, None in that of all linear layers.
    """
    if passes is None:
        adapter.add_feed_forward_(layer, hidden_TD, fp8)
    elif len(passes):
        chosen_CD = hidden_TD.index_select(0, passes)
        adapter.add_feed_forward_(layer, chosen_CD, fp8)
        hidden_TD.index_copy_(0, passes, chosen_CD)


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
