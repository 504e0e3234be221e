"""The prefill: a pack's prompts through all layers, once or, where a method begins anew, twice."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from pipeline.families.decoder import Decoder
from pipeline.kernels.attention import AttentionBackend
from pipeline.kernels.segments import Segments
from pipeline.model.cache import RaggedCache
from pipeline.model.layers import Pack, PartialPrefill, Survivors, dropped_last_token, run_layers
from pipeline.model.offload import KvLimits, make_cache
from pipeline.model.work import Work
from pipeline.pruning.base import PruningMethod, Selection
from pipeline.pruning.capabilities import RescoresBlocks
from pipeline.pruning.operations import LayerWork
from pipeline.ranks.leading import on_every_rank


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
) -> Prefilled:
    """Run a pack's prompts through the model, pruned by `method`, or on from where they have `begun`.

    The cache gets room for `new_tokens` more tokens a document, and offloads to the host what exceeds
    `limits`; else it is in `kv_dtype`, if that is float8_e4m3fn, which only a pack of one document can be
    decoded from. `check` is called before every layer, and may raise to give the pack up. With `marks` work
    of each pass holds who was computed in each layer, a byte a token, on the device. Nothing is copied to
    the host for a method that keeps all tokens alive and counts them beforehand; a token that is dropped
    keeps its position, unless the method begins anew.
    """
    lengths = pack.segments.lengths
    method.check_depth(decoder.shape)
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
        _check_last_token(method, outcome, pack.segments)
        return Prefilled(
            logits_BV=logits_BV,
            cache=begun.cache,
            passes=passes,
            lengths=lengths,
            next_positions=pack.segments.lengths,
        )


def _check_last_token(method: PruningMethod, survivors: Survivors, original: Segments) -> None:
    if survivors.whole:
        return
    if survivors.positions_T.tolist() != [length - 1 for length in original.lengths]:
        raise dropped_last_token(method)
