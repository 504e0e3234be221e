"""The prefill: one layer loop for every method, over a pack of documents without padding."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.errors import MarsError
from pipeline.kernels.attention import AttentionBackend
from pipeline.kernels.segments import Segments
from pipeline.model.adapters import DecoderAdapter
from pipeline.model.cache import RaggedCache
from pipeline.pruning.base import LayerView, PruningMethod
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


@dataclass(kw_only=True)
class Work:
    """Tokens that each layer worked on, layer by layer and document by document."""

    kept: list[tuple[int, ...]]  # entered the layer: attention and projections
    ffn_B: list[Tensor]  # passed the FFN; on the device until asked for
    scored_pairs: list[tuple[int, ...]]  # query-key pairs recomputed for scoring

    def ffn(self) -> list[list[int]]:
        """Of each layer, FFN tokens of each document; the one copy to the host a pack needs."""
        return torch.stack(self.ffn_B).tolist()


@dataclass(kw_only=True)
class Prefilled:
    """All that decoding needs of a prefilled pack."""

    logits_BV: Tensor  # float32, at each prompt's last token
    cache: RaggedCache
    work: Work
    lengths: tuple[int, ...]  # prompt tokens of each document


@torch.inference_mode()
def prefill(
    adapter: DecoderAdapter,
    attention: AttentionBackend,
    method: PruningMethod,
    pack: Pack,
    new_tokens: int = 0,
    check: Callable[[], None] = lambda: None,
) -> Prefilled:
    """Run a pack's prompts through the model, pruned by `method`.

    The cache gets room for `new_tokens` more tokens a document. `check` is called before every layer, and
    may raise to give the pack up. Nothing is copied to the host for a method
    that keeps all tokens alive and counts them beforehand; a token that is dropped keeps its position.
    """
    segments = pack.segments
    state = method.begin(method.plan(adapter.shape, segments.lengths))
    positions_T = segments.index_in_document_T
    cache = RaggedCache(new_tokens)
    work = Work(kept=[], ffn_B=[], scored_pairs=[])
    hidden_TD = adapter.embed(pack.input_ids)
    rope = adapter.rope(hidden_TD, positions_T)
    for layer in range(adapter.shape.layers):
        check()
        q_THd, k_TKd, v_TKd = adapter.qkv(layer, hidden_TD, rope)
        mixed_THd = attention.prefill(q_THd, k_TKd, v_TKd, segments)
        hidden_TD += adapter.attention_output(layer, mixed_THd)
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
        _store(cache, k_TKd, v_TKd, segments, selection.cache)
        passes = selection.live if selection.ffn is None else selection.ffn
        feed_forward_(adapter, layer, hidden_TD, passes)
        _count(work, view, passes)
        if selection.live is not None:
            segments = surviving(segments, selection.live)
            hidden_TD = hidden_TD.index_select(0, selection.live)
            positions_T = positions_T.index_select(0, selection.live)
            rope = (rope[0].index_select(0, selection.live), rope[1].index_select(0, selection.live))
    _check_last_token(method, positions_T, segments, pack.segments)
    logits_BV = adapter.logits(hidden_TD.index_select(0, segments.last_indices()))
    return Prefilled(logits_BV=logits_BV, cache=cache, work=work, lengths=pack.segments.lengths)


def feed_forward_(adapter: DecoderAdapter, layer: int, hidden_TD: Tensor, passes: Tensor | None) -> None:
    """Add the feed-forward network's output in place, for the tokens `passes` (None: all).

    The network and its norm run on the gathered tokens alone; the rows of the others are not touched.
    """
    if passes is None:
        hidden_TD += adapter.feed_forward(layer, hidden_TD)
        return
    chosen_CD = hidden_TD.index_select(0, passes)
    hidden_TD.index_copy_(0, passes, chosen_CD + adapter.feed_forward(layer, chosen_CD))


def surviving(segments: Segments, indices: Tensor | None) -> Segments:
    """Segments of the tokens left; one small copy to the host, for kernels want lengths there."""
    if indices is None:
        return segments
    return Segments.of(segments.counts(indices).tolist(), segments.device)


def _store(
    cache: RaggedCache, k_TKd: Tensor, v_TKd: Tensor, segments: Segments, indices: Tensor | None
) -> None:
    if indices is not None:
        k_TKd, v_TKd = k_TKd.index_select(0, indices), v_TKd.index_select(0, indices)
    cache.store(k_TKd, v_TKd, surviving(segments, indices))


def _count(work: Work, view: LayerView, passes: Tensor | None) -> None:
    work.kept.append(view.segments.lengths)
    work.scored_pairs.append(view.scored_pairs or (0,) * len(view.segments))
    if passes is None:
        work.ffn_B.append(view.segments.cu_seqlens.long().diff())
    else:
        work.ffn_B.append(view.segments.counts(passes))


def _check_last_token(
    method: PruningMethod, positions_T: Tensor, segments: Segments, original: Segments
) -> None:
    if segments is original:
        return
    last = positions_T[segments.last_indices()].tolist() if min(segments.lengths) else []
    if last != [length - 1 for length in original.lengths]:
        raise MarsError(f"method {method.name} dropped a prompt's last token, which predicts the answer")
