"""One layer loop for every method, over a pack of documents without padding.

Of the model's last layer nothing is read but each prompt's last token, and the keys and values of all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pipeline.errors import MarsError
from pipeline.families.decoder import Decoder
from pipeline.families.rope import Rope
from pipeline.kernels.attention import AttentionBackend
from pipeline.kernels.decode_slots import DecodeSlots
from pipeline.kernels.segments import Segments
from pipeline.kernels.sparse import SparsePrefill
from pipeline.model.cache import RaggedCache
from pipeline.model.early_exit import EarlyExit
from pipeline.model.precision import Kept, kept_of
from pipeline.model.work import Work
from pipeline.pruning.agreeing import agreed
from pipeline.pruning.base import PruningMethod, Selection
from pipeline.pruning.operations import causal_pairs
from pipeline.pruning.view import LayerView
from pipeline.records import EncodedDocument, Spans


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
class PartialPrefill:
    """A pass over a pack before layer `layers`: what the layers before it have made."""

    layers: int
    hidden_TD: Tensor  # overwritten by the layers that follow
    cache: RaggedCache
    work: Work

    @classmethod
    def afresh(cls, decoder: Decoder, pack: Pack, cache: RaggedCache, marks: bool = False) -> PartialPrefill:
        work = Work(marks=[] if marks else None)
        return cls(layers=0, hidden_TD=decoder.embed(pack.input_ids), cache=cache, work=work)


@dataclass(frozen=True, kw_only=True)
class Survivors:
    """The tokens that are left of a pack after some layers; after the model's last, one of each document."""

    hidden_TD: Tensor
    positions_T: Tensor
    segments: Segments
    whole: bool  # none has been dropped


def run_layers(
    decoder: Decoder,
    attention: AttentionBackend,
    method: PruningMethod,
    pack: Pack,
    state: Any,
    begun: PartialPrefill,
    check: Callable[[], None],
    stop: int | None = None,
) -> Survivors | Selection:
    """From `begun` through the layers before `stop`, or the selection that asks to begin anew.

    Without `stop` the run goes to the end, and nothing but each prompt's last token is read behind it: the
    model's last layer computes keys and values of all tokens, and beyond that, unless `method` is to see it,
    the last token alone.
    """
    run = _Run.of(decoder, attention, method, pack, state, begun)
    last = decoder.shape.layers - 1
    for layer in range(begun.layers, decoder.shape.layers if stop is None else stop):
        check()
        ends = stop is None and layer == last
        if ends and not method.needs_last_layer(decoder.shape):
            run.end(layer)
            continue
        restart = run.layer(layer, ends=ends)
        if restart is not None:
            return restart
    return Survivors(
        hidden_TD=run.hidden_TD, positions_T=run.positions_T, segments=run.segments, whole=run.whole
    )


class _Attended(NamedTuple):
    """What a layer's attention makes, and what it took."""

    attended_THd: Tensor
    stored: tuple[Tensor, Tensor, Segments]  # keys and values that there are to be stored
    pairs_B: Tensor | None = None  # query-key pairs; None for all causal ones
    estimated: tuple[int, ...] | None = None  # those by which blocks were chosen; None for none


@dataclass(kw_only=True)
class _Run:
    """A pack between two layers of a pass: what is left of its tokens."""

    decoder: Decoder
    attention: AttentionBackend
    method: PruningMethod
    pack: Pack
    state: Any
    cache: RaggedCache
    work: Work
    stream_TD: Tensor  # `hidden_TD`, to which sums over ranks may still be on their way
    positions_T: Tensor
    segments: Segments
    rope: Rope
    masses: tuple[float | None, ...]
    kept: Kept | None
    sparse: SparsePrefill
    exited: EarlyExit | None = None
    whole: bool = True  # no token has left

    @classmethod
    def of(
        cls,
        decoder: Decoder,
        attention: AttentionBackend,
        method: PruningMethod,
        pack: Pack,
        state: Any,
        begun: PartialPrefill,
    ) -> _Run:
        segments, positions_T = pack.segments, pack.segments.index_in_document_T
        begun.cache.reaches = tuple(length + begun.cache.new_tokens for length in segments.lengths)
        reach_T = (segments.lengths_B + begun.cache.new_tokens)[segments.document_T]
        return cls(
            decoder=decoder,
            attention=attention,
            method=method,
            pack=pack,
            state=state,
            cache=begun.cache,
            work=begun.work,
            stream_TD=begun.hidden_TD,
            positions_T=positions_T,
            segments=pack.segments,
            rope=decoder.rope(begun.hidden_TD, positions_T, reach_T),
            masses=method.masses_in(decoder.shape),
            kept=_kept(decoder, pack.segments),
            sparse=_sparse(decoder, attention, pack.segments),
        )

    @property
    def hidden_TD(self) -> Tensor:
        """The residual stream, to be read by whom one likes."""
        if self.decoder.ranks is not None:
            self.decoder.ranks.settle()
        return self.stream_TD

    def layer(self, layer: int, *, ends: bool) -> Selection | None:
        """Run a layer over all tokens that are left; the selection, if it asks to begin anew.

        If it `ends` the run, of the tokens that `select` sends through the FFN only each prompt's last does
        pass it, and goes on.
        """
        decoder, work = self.decoder, self.work
        q_THd, k_TKd, v_TKd = self._qkv(layer)
        attended_THd, stored, pairs_B, estimated = self._attend(layer, q_THd, k_TKd, v_TKd)
        if self.kept is None:
            decoder.add_attention_(layer, self.stream_TD, attended_THd, later=True)
        else:
            self.kept.in_both_(partial(decoder.add_attention_, layer), self.hidden_TD, attended_THd)
        view = self._view(layer, q_THd, k_TKd, v_TKd)
        selection = self.method.select(layer, view, self.state)
        if decoder.ranks is not None:
            selection = agreed(selection, decoder.ranks, self.segments.total, decoder.device)
        if selection.restart is not None:
            work.count(view, view.all_indices[:0], pairs_B=pairs_B, estimated=estimated)
            work.mark(view, selection.restart, view.all_indices[:0], None)
            return selection
        if selection.blocks is not None:
            self.cache.settle(layer, selection.blocks)
        _store(self.cache, *stored, selection)
        read = self._last_tokens() if ends else None
        ffn, ffn_fp8 = _feed_forward(decoder, layer, self.stream_TD, selection, self.kept, read)
        counts = None if self.exited is None else self.exited.counts
        work.count(view, ffn, ffn_fp8, pairs_B=pairs_B, kv_only=counts, estimated=estimated)
        work.mark(view, selection.live, ffn, ffn_fp8)
        if selection.live is not None:
            self._go_on(selection.live, selection.live_lengths, early_exit=selection.early_exit and not ends)
        if ends:
            self._keep(self._last_tokens(), _singles(self.segments))
        return None

    def end(self, layer: int) -> None:
        """Run the model's last layer for what is read of it: keys and values, and each prompt's last token.

        The last token reads everything, also under block-sparse attention, and is always in the model's
        dtype where only some tokens are.
        """
        decoder, segments = self.decoder, self.segments
        last_B = self._last_tokens()
        k_TKd, v_TKd = decoder.keys_values(layer, self.hidden_TD, self.rope)
        counts, window = None, decoder.shape.window(layer)
        if self.exited is not None:
            k_TKd, v_TKd = self.exited.keys_values(decoder, layer, k_TKd, v_TKd)
            segments, counts = self.exited.whole, self.exited.counts
        self.cache.store(k_TKd, v_TKd, segments)
        pairs_B = None if window is None else torch.tensor([min(n, window) for n in segments.lengths])
        self.work.count_end(self.segments, last_B, counts, pairs_B)
        self._keep(last_B, _singles(segments))
        q_BHd, _, _ = decoder.qkv(layer, self.hidden_TD, self.rope)
        slots = DecodeSlots.of(segments.offsets[:-1], segments.lengths, segments.total, segments.device)
        sinks_H = decoder.sinks(layer)
        attended_BHd = self.attention.decode(q_BHd, k_TKd, v_TKd, slots.within(window), sinks_H)
        decoder.add_attention_(layer, self.hidden_TD, attended_BHd)
        decoder.add_feed_forward_(layer, self.hidden_TD)

    def _qkv(self, layer: int) -> tuple[Tensor, ...]:
        """See `Decoder.qkv`; of tokens that are kept beside others in fp8 in the model's dtype."""
        decoder, kept = self.decoder, self.kept
        if kept is None or not decoder.has_qkv_in_fp8(layer):
            return decoder.qkv(layer, self.stream_TD, self.rope)
        hidden_TD, rope, beside = self.hidden_TD, self.rope, kept.beside_all
        own = decoder.qkv(layer, hidden_TD.index_select(0, kept.rows), rope.at(kept.rows), fp8=False)
        if beside is not None:
            hidden_TD, rope = hidden_TD.index_select(0, beside), rope.at(beside)
        others = decoder.qkv(layer, hidden_TD, rope, fp8=True)
        return tuple(kept.merged(mine, other) for mine, other in zip(own, others, strict=True))

    def _attend(self, layer: int, q_THd: Tensor, k_TKd: Tensor, v_TKd: Tensor) -> _Attended:
        window, sinks_H = self.decoder.shape.window(layer), self.decoder.sinks(layer)
        if self.exited is not None:
            keys, values = self.exited.keys_values(self.decoder, layer, k_TKd, v_TKd)
            attended_THd = self.exited.attend(self.attention, q_THd, keys, values, window, sinks_H)
            return _Attended(attended_THd, (keys, values, self.exited.whole), self.exited.pairs_B(window))
        stored = (k_TKd, v_TKd, self.segments)
        mass = self.masses[layer]
        if window is not None or mass is None:
            attended_THd = self.attention.prefill(q_THd, k_TKd, v_TKd, self.segments, window, sinks_H)
            lengths = self.segments.lengths
            counts = None if window is None else [causal_pairs(n, window) for n in lengths]
            return _Attended(attended_THd, stored, None if counts is None else torch.tensor(counts))
        attended_THd, pairs_B = self.sparse.attend(q_THd, k_TKd, v_TKd, mass, sinks_H)
        return _Attended(attended_THd, stored, pairs_B, self.sparse.estimated_pairs(mass))

    def _view(self, layer: int, q_THd: Tensor, k_TKd: Tensor, v_TKd: Tensor) -> LayerView:
        return LayerView(
            layer=layer,
            queries=q_THd,
            keys=k_TKd,
            values=v_TKd,
            hidden=self.stream_TD,  # which methods for models on several GPUs do not read
            positions=self.positions_T,
            segments=self.segments,
            lengths=self.pack.segments.lengths,
            spans=self.pack.spans,
            ranks=self.decoder.ranks,
        )

    def _go_on(self, live_C: Tensor, lengths: tuple[int, ...] | None, *, early_exit: bool) -> None:
        """Leave behind, for good or by an early exit, all but the tokens `live_C`."""
        segments = surviving(self.segments, live_C, lengths)
        if early_exit:
            assert self.segments is self.pack.segments, "tokens have left before"
            self.exited = EarlyExit.of(self.pack.segments, segments, live_C, self.hidden_TD, self.rope)
        self.whole = False
        self._keep(live_C, segments)
        self.kept = _kept(self.decoder, self.segments)
        self.sparse = _sparse(self.decoder, self.attention, self.segments)

    def _keep(self, live_C: Tensor, segments: Segments) -> None:
        self.segments = segments
        self.stream_TD = self.hidden_TD.index_select(0, live_C)
        self.positions_T = self.positions_T.index_select(0, live_C)
        self.rope = self.rope.at(live_C)

    def _last_tokens(self) -> Tensor:
        """(B,) places of the last token that is left of each document."""
        if min(self.segments.lengths) == 0:
            raise dropped_last_token(self.method)
        return self.segments.last_indices()


def _singles(segments: Segments) -> Segments:
    """As many documents, of one token each."""
    return Segments.of((1,) * len(segments), segments.device)


def _kept(decoder: Decoder, segments: Segments) -> Kept | None:
    """The tokens that keep the model's dtype beside others in fp8; None: all are in one precision."""
    return kept_of(segments, decoder.shape) if decoder.linears == "mixed" else None


def _sparse(decoder: Decoder, attention: AttentionBackend, segments: Segments) -> SparsePrefill:
    return SparsePrefill(attention, segments, width=decoder.shape.heads * decoder.shape.head_dim)


def _feed_forward(
    decoder: Decoder,
    layer: int,
    hidden_TD: Tensor,
    selection: Selection,
    kept: Kept | None,
    read_B: Tensor | None,
) -> tuple[Tensor | None, Tensor | None]:
    """Take the tokens selected through the network: those (None: all) by default, and those in fp8.

    Of them only `read_B`, if that is given: what becomes of the others is not read.
    """
    ffn, ffn_fp8 = selection.live if selection.ffn is None else selection.ffn, selection.ffn_fp8
    if read_B is not None:
        ffn = read_B if ffn is None else ffn[torch.isin(ffn, read_B)]
        ffn_fp8 = None if ffn_fp8 is None else ffn_fp8[torch.isin(ffn_fp8, read_B)]
    if ffn is not None and len(ffn) == len(hidden_TD):
        ffn = None
    if decoder.ranks is not None and not (ffn is None and ffn_fp8 is None and kept is None):
        decoder.ranks.settle()  # what is gathered is read
    if ffn_fp8 is None and kept is not None:
        own, others = kept.split(ffn)
        if ffn is None:
            kept.in_both_(partial(decoder.add_feed_forward_, layer), hidden_TD)
            return own, others
        ffn, ffn_fp8 = own, others
    if ffn_fp8 is None:
        feed_forward_(decoder, layer, hidden_TD, ffn)
    else:
        feed_forward_(decoder, layer, hidden_TD, ffn, fp8=False)
        feed_forward_(decoder, layer, hidden_TD, ffn_fp8, fp8=True)
    return ffn, ffn_fp8


def feed_forward_(
    decoder: Decoder,
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
        decoder.add_feed_forward_(layer, hidden_TD, fp8, later=True)
        return
    for rows in decoder.pieces(len(passes)):
        chosen_C = passes[rows]
        chosen_CD = hidden_TD.index_select(0, chosen_C)
        decoder.add_feed_forward_(layer, chosen_CD, fp8)
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


def dropped_last_token(method: PruningMethod) -> MarsError:
    """What to raise of a method that breaks the law of the last token."""
    return MarsError(f"method {method.name} dropped a prompt's last token, which predicts the answer")
