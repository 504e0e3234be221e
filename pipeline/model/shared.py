"""What prompts about one document share, computed once; what stands behind it follows in each.

Letters beside those of segments.py: G prefixes, P tokens of all of them, N tokens behind them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pipeline.families.decoder import Decoder
from pipeline.kernels.attention import AttentionBackend
from pipeline.kernels.segments import Segments, on_device
from pipeline.model.cache import RaggedCache, SharedDocuments
from pipeline.model.continuation import continue_with
from pipeline.model.layers import Survivors, run_layers
from pipeline.model.pack import Pack, PartialPrefill
from pipeline.model.prefill import Prefilled, prefill
from pipeline.model.work import Work
from pipeline.pruning.base import PruningMethod
from pipeline.pruning.dense import Dense
from pipeline.pruning.operations import layer_flops
from pipeline.ranks.leading import OnEachRank, on_every_rank
from pipeline.records import EncodedDocument, Spans


@dataclass(kw_only=True, eq=False)
class SharedPrefixes(OnEachRank):
    """What the model's first layers, or all of them, have made of some documents' prefixes."""

    segments: Segments
    cache: RaggedCache  # keys and values (P, K, d) of each layer that is shared
    hidden_PD: Tensor  # the residual stream behind the last of them; of no use behind the model's last layer
    work: Work

    @property
    def layers(self) -> int:
        """How many layers are shared."""
        return len(self.cache.slots)

    def flops(self, decoder: Decoder) -> list[int]:
        """Operations that each prefix took."""
        by_layer = self.work.by_layer()
        return [
            sum(layer_flops(decoder.shape, layer[g]) for layer in by_layer) for g in range(len(self.segments))
        ]


@on_every_rank
@torch.inference_mode()
def prefill_prefixes(
    decoder: Decoder,
    attention: AttentionBackend,
    method: PruningMethod,
    prefixes: Sequence[np.ndarray],
    layers: int,
    check: Callable[[], None] = lambda: None,
) -> SharedPrefixes:
    """Run token ids through the first `layers` layers, at least one, in which `method` drops nothing.

    Where its attention is block-sparse, the last blocks of a prefix attend to everything before them, as
    those of a prompt do: what follows reads a document that is computed no less exactly than in its prompt.
    """
    ids = torch.cat([torch.from_numpy(part) for part in prefixes]).to(decoder.device)
    segments = Segments.of([len(part) for part in prefixes], decoder.device)
    spans = tuple(Spans(document=(0, n), question=(n, n)) for n in segments.lengths)
    pack = Pack(input_ids=ids, segments=segments, spans=spans)
    dense = Dense.attending_as(method, decoder.shape)
    begun = PartialPrefill.afresh(decoder, pack, RaggedCache(0))
    # behind all layers no row reads more of a document than its keys and values
    stop = layers if layers < decoder.shape.layers else None
    outcome = run_layers(decoder, attention, dense, pack, None, begun, check, stop=stop)
    assert isinstance(outcome, Survivors)
    return SharedPrefixes(segments=segments, cache=begun.cache, hidden_PD=outcome.hidden_TD, work=begun.work)


@on_every_rank
@torch.inference_mode()
def prefill_behind(
    decoder: Decoder,
    attention: AttentionBackend,
    method: PruningMethod,
    shared: SharedPrefixes,
    documents: Sequence[EncodedDocument],
    of_prefix: Sequence[int],
    new_tokens: int = 0,
    check: Callable[[], None] = lambda: None,
) -> Prefilled:
    """Prompts of which `of_prefix` says with which of `shared` each begins: what is left of their prefill.

    The tokens behind a prefix pass the shared layers on their own, with whole attention; the layers that
    follow run over the whole prompts, pruned by `method`, and want a copy of the keys and values that are
    shared. If all layers are shared nothing is copied: the prompts' cache names the documents'.
    """
    pack = Pack.of(documents, decoder.device)
    known = [shared.segments.lengths[g] for g in of_prefix]
    asked = [document.input_ids[n:].tolist() for document, n in zip(documents, known, strict=True)]
    behind = Segments.of([len(part) for part in asked], decoder.device)
    ends = shared.layers == decoder.shape.layers
    cache = RaggedCache(new_tokens, SharedDocuments(shared.cache, tuple(of_prefix)) if ends else None)
    cache.reaches = tuple(length + new_tokens for length in pack.segments.lengths)
    places = [range(*shared.segments.ranges()[g]) for g in of_prefix]
    if ends:
        cache.reserve(behind, decoder.own, decoder.dtype)
    else:
        pairs = list(zip(shared.cache.keys, shared.cache.values, strict=True))
        cache.share(pairs, places, pack.segments)
    hidden_ND = continue_with(decoder, attention, cache, asked, known, check, last_only=ends)
    work = Work()
    work.count_behind(shared.work, pack.segments, of_prefix)
    if not ends:
        hidden_TD = _joined(shared, places, hidden_ND, behind, pack.segments)
        begun = PartialPrefill(layers=shared.layers, hidden_TD=hidden_TD, cache=cache, work=work)
        return prefill(decoder, attention, method, pack, new_tokens, check, begun=begun)
    return Prefilled(
        logits_BV=decoder.logits(hidden_ND),
        cache=cache,
        passes=[work],
        lengths=pack.segments.lengths,
        next_positions=pack.segments.lengths,
    )


def _joined(
    shared: SharedPrefixes, places: Sequence[range], hidden_ND: Tensor, behind: Segments, whole: Segments
) -> Tensor:
    """(T, D) the residual stream of whole prompts, from that of their two parts."""
    device = whole.device
    start_B = on_device([tokens.start for tokens in places], device)
    known_B = on_device([len(tokens) for tokens in places], device)
    index_T, document_T = whole.index_in_document_T, whole.document_T
    source_T = start_B[document_T] + torch.minimum(index_T, known_B[document_T] - 1)
    hidden_TD = shared.hidden_PD.index_select(0, source_T)
    first_B = whole.bounds[:-1] + known_B
    return hidden_TD.index_copy_(0, first_B[behind.document_T] + behind.index_in_document_T, hidden_ND)
