"""One layer loop for every method, over a pack of documents without padding.

Of the model's last layer nothing is read but each prompt's last token, and the keys and values of all.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pipeline.errors import MarsError
from pipeline.families.decoder import Decoder
from pipeline.families.exit_maps import exit_maps
from pipeline.families.rope import Rope
from pipeline.kernels.attention import AttentionBackend
from pipeline.kernels.decode_slots import DecodeSlots
from pipeline.kernels.query_pieces import QueryPiece, query_pieces
from pipeline.kernels.segments import Segments, on_device
from pipeline.kernels.sparse_prefill import SparsePrefill
from pipeline.model.cache import RaggedCache
from pipeline.model.early_exit import EarlyExit, LayerAttention
from pipeline.model.pack import Pack, PartialPrefill
from pipeline.model.precision import Kept, Make, Piece, feed_forward, kept_of
from pipeline.model.work import Work
from pipeline.pruning.agreeing import agreed
from pipeline.pruning.base import PruningMethod, Selection
from pipeline.pruning.view import LayerView


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
    pieces: tuple[Piece, ...]
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
        segments, positions_T = pack.segments, pack.positions_T
        kept = _kept(decoder, segments)
        begun.cache.reaches = pack.reaches(begun.cache.new_tokens)
        reach_T = on_device(begun.cache.reaches, segments.device)[segments.document_T]
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
            segments=segments,
            rope=decoder.rope(begun.hidden_TD, positions_T, reach_T),
            masses=method.masses_in(decoder.shape),
            kept=kept,
            sparse=_sparse(decoder, attention, segments),
            pieces=_pieces(decoder, segments, kept, cut=attention.cuts_queries(decoder.device)),
            whole=pack.whole is None,
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
        q_THd, k_TKd, v_TKd = self._projected(layer)
        selection = None
        if layer == self.method.restarting_layer(decoder.shape):
            view = self._view(layer, q_THd, k_TKd, v_TKd)
            selection = self._selected(layer, view)
            if selection.restart is not None:
                return self._restarted(view, selection, torch.zeros(len(self.segments), dtype=torch.int64))
        attention = self._attention(layer, k_TKd, v_TKd)
        # where all tokens pass the network, and are not so many that all of their norms take much memory
        norms = not self.method.reads_layers and len(self.pieces) == 1
        for piece in self.pieces:
            if q_THd is None:
                (q_QHd,) = self._made(partial(decoder.queries, layer), layer, piece)
            else:
                q_QHd = q_THd[piece.rows]
            attended_QHd = attention.of(piece.queries, q_QHd)
            stream_TD = self.stream_TD if piece.kept is None else self.hidden_TD
            piece.take_(partial(decoder.add_attention_, layer, norms=norms), stream_TD, attended_QHd)
        del q_QHd, attended_QHd  # whose memory the feed-forward network needs
        pairs_B, estimated = attention.pairs_B(decoder.own.heads), attention.estimated
        if selection is None:
            view = self._view(layer, q_THd, k_TKd, v_TKd)
            selection = self._selected(layer, view)
        if selection.restart is not None:
            return self._restarted(view, selection, pairs_B, estimated)
        if selection.blocks is not None:
            self.cache.settle(layer, selection.blocks)
        self.cache.store_chosen(*attention.stored, selection.cache, selection.cache_lengths)
        read, pieces = self._last_tokens() if ends else None, self.pieces
        ffn, ffn_fp8 = feed_forward(
            decoder, layer, self.stream_TD, selection, self.kept, pieces, read, norms=norms
        )
        counts = None if self.exited is None else self.exited.counts
        work.count(view, ffn, ffn_fp8, pairs_B=pairs_B, kv_only=counts, estimated=estimated)
        work.mark(view, selection.live, ffn, ffn_fp8)
        if selection.live is not None:
            self._go_on(selection.live, selection.live_lengths, early_exit=selection.early_exit and not ends)
        if ends:
            self._keep(self._last_tokens(), _singles(self.segments))
        return None

    def _selected(self, layer: int, view: LayerView) -> Selection:
        """What the method decides, the same on all ranks."""
        selection, ranks = self.method.select(layer, view, self.state), self.decoder.ranks
        if ranks is None:
            return selection
        return agreed(selection, ranks, self.segments.total, self.decoder.device)

    def _restarted(
        self,
        view: LayerView,
        selection: Selection,
        pairs_B: Tensor | None,
        estimated: tuple[int, ...] | None = None,
    ) -> Selection:
        """Count a layer behind which the prefill begins anew, and the pairs that its attention computed."""
        self.work.count(view, view.all_indices[:0], pairs_B=pairs_B, estimated=estimated)
        self.work.mark(view, selection.restart, view.all_indices[:0], None)
        return selection

    def end(self, layer: int) -> None:
        """Run the model's last layer for what is read of it: keys and values, and each prompt's last token.

        The last token reads everything, also under block-sparse attention, and is always in the model's
        dtype where only some tokens are.
        """
        decoder, segments = self.decoder, self.segments
        last_B = self._last_tokens()
        normed = self._all_tokens().give_normed()
        k_TKd, v_TKd = decoder.keys_values(layer, self.hidden_TD, self.rope, normed=normed)
        counts, window = None, decoder.shape.window(layer)
        if self.exited is not None:
            k_TKd, v_TKd = self.exited.keys_values(decoder, layer, k_TKd, v_TKd)
            segments, counts = self.exited.whole, self.exited.counts
        self.cache.store(k_TKd, v_TKd, segments)
        pairs_B = None if window is None else torch.tensor([min(n, window) for n in segments.lengths])
        scored = self._show_end(layer, k_TKd, v_TKd)
        self.work.count_end(self.segments, last_B, counts, pairs_B, scored)
        self._keep(last_B, _singles(segments))
        q_BHd, _, _ = decoder.qkv(layer, self.hidden_TD, self.rope)
        slots = DecodeSlots.of(segments.offsets[:-1], segments.lengths, segments.total, segments.device)
        sinks_H = decoder.sinks(layer)
        attended_BHd = self.attention.decode(q_BHd, k_TKd, v_TKd, slots.within(window), sinks_H)
        decoder.add_attention_(layer, self.hidden_TD, attended_BHd)
        decoder.add_feed_forward_(layer, self.hidden_TD)

    def _show_end(self, layer: int, k_TKd: Tensor, v_TKd: Tensor) -> tuple[int, ...]:
        """Show the last layer to a method that reads some queries of it; by how many pairs it has scored."""
        asked = self.method.queries_at_end(self.pack.lengths, self.pack.spans)
        if asked is None:
            return ()
        rows_N = self.segments.ends(asked)
        hidden_ND, rope = self.hidden_TD.index_select(0, rows_N), self.rope.at(rows_N)
        (q_NHd,) = self.decoder.queries(layer, hidden_ND, rope)
        q_THd = q_NHd.new_empty((self.segments.total, *q_NHd.shape[1:])).index_copy_(0, rows_N, q_NHd)
        view = self._view(layer, q_THd, k_TKd, v_TKd)
        self.method.select(layer, view, self.state)
        return view.scored_pairs

    def _projected(self, layer: int) -> tuple[Tensor | None, Tensor, Tensor]:
        """Queries (T, H, d), keys and values (T, K, d); without queries if each piece is to make its own."""
        decoder = self.decoder
        if len(self.pieces) == 1 or self.method.reads_layers:
            whole = self._all_tokens()
            make = partial(decoder.qkv, layer, normed=whole.give_normed())
            q_THd, k_TKd, v_TKd = self._made(make, layer, whole)
            return q_THd, k_TKd, v_TKd
        size = (self.segments.total, decoder.own.kv_heads, decoder.own.head_dim)
        keys, values = (self.stream_TD.new_empty(size) for _ in range(2))
        for piece in self.pieces:
            made = self._made(partial(decoder.keys_values, layer), layer, piece)
            keys[piece.rows], values[piece.rows] = made
        return None, keys, values

    def _made(self, make: Make, layer: int, piece: Piece) -> tuple[Tensor, ...]:
        """What `make` makes of a piece's tokens, of those that are kept in the model's dtype."""
        rope = self.rope.at(piece.rows)
        if piece.kept is None or not self.decoder.has_qkv_in_fp8(layer):
            return make(self.stream_TD[piece.rows], rope)
        return piece.kept.in_both(make, self.hidden_TD[piece.rows], rope)

    def _all_tokens(self) -> Piece:
        """All that are left, as one piece."""
        if len(self.pieces) == 1:
            return self.pieces[0]
        return Piece(queries=QueryPiece.whole(self.segments), kept=self.kept)

    def _attention(self, layer: int, k_TKd: Tensor, v_TKd: Tensor) -> LayerAttention:
        window, mass = self.decoder.shape.window(layer), self.masses[layer]
        if self.exited is not None:
            k_TKd, v_TKd = self.exited.keys_values(self.decoder, layer, k_TKd, v_TKd)
        return LayerAttention(
            attention=self.attention,
            segments=self.segments,
            k_TKd=k_TKd,
            v_TKd=v_TKd,
            window=window,
            sinks_H=self.decoder.sinks(layer),
            sparse=self.sparse if window is None and mass is not None else None,
            mass=mass or 0.0,
            exited=self.exited,
        )

    def _view(self, layer: int, q_THd: Tensor | None, k_TKd: Tensor, v_TKd: Tensor) -> LayerView:
        shape = self.decoder.own
        no_queries = k_TKd.new_empty(0, shape.heads, shape.head_dim)
        return LayerView(
            layer=layer,
            queries=q_THd if q_THd is not None and self.method.reads_layers else no_queries,
            keys=k_TKd,
            values=v_TKd,
            hidden=self.stream_TD,  # which methods for models on several GPUs do not read
            positions=self.positions_T,
            segments=self.segments,
            lengths=self.pack.lengths,
            spans=self.pack.spans,
            ranks=self.decoder.ranks,
        )

    def _go_on(self, live_C: Tensor, lengths: tuple[int, ...] | None, *, early_exit: bool) -> None:
        """Leave behind, for good or by an early exit, all but the tokens `live_C`."""
        segments = self.segments.left(live_C, lengths)
        if early_exit:
            assert self.segments is self.pack.segments, "tokens have left before"
            self.exited = EarlyExit(
                whole=self.pack.segments,
                live=segments,
                live_Q=live_C,
                hidden_TD=self.hidden_TD,
                rope=self.rope,
                maps=exit_maps(self.decoder, self.method),
            )
        self.whole = False
        self._keep(live_C, segments)
        self.kept = _kept(self.decoder, self.segments)
        cut = self.exited is None and self.attention.cuts_queries(self.decoder.device)
        self.pieces = _pieces(self.decoder, self.segments, self.kept, cut=cut)
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


def _pieces(decoder: Decoder, segments: Segments, kept: Kept | None, *, cut: bool) -> tuple[Piece, ...]:
    """Those whose queries are held at once; without `cut` one for all."""
    pieces = query_pieces(segments, decoder.query_tokens) if cut else (QueryPiece.whole(segments),)
    if len(pieces) == 1:
        return (Piece(queries=pieces[0], kept=kept),)
    return tuple(
        Piece(queries=each, kept=None if kept is None else kept.within(each.rows)) for each in pieces
    )


def _sparse(decoder: Decoder, attention: AttentionBackend, segments: Segments) -> SparsePrefill:
    return SparsePrefill(attention, segments, width=decoder.shape.heads * decoder.shape.head_dim)


def dropped_last_token(method: PruningMethod) -> MarsError:
    """What to raise of a method that breaks the law of the last token."""
    return MarsError(f"method {method.name} dropped a prompt's last token, which predicts the answer")
