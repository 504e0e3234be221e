"""Documents that several rows share: each is prefilled once, and kept while its rows follow in chunks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from pipeline.engines.group_packs import GroupPack, GroupPacker, Numbered
from pipeline.generation.decode import decode
from pipeline.generation.generated import StopRules
from pipeline.model.loading import LoadedModel
from pipeline.model.prefill import Prefilled
from pipeline.model.shared import SharedPrefixes, prefill_behind, prefill_prefixes
from pipeline.pruning.dense import Dense
from pipeline.records import EncodedDocument, Row, Spans

REHEARSED_TOKENS = 16  # of a question


@dataclass(frozen=True, kw_only=True)
class Shared:
    """What rows have in common with others, and what it took; lists have a value a row."""

    method: str  # by which the rows are answered
    ms: float
    flops: list[int]
    group_rows: list[int]
    pack_tokens: int  # that were prefilled together, behind what is shared


@dataclass(frozen=True, kw_only=True)
class Prefix:
    """The documents of a pack's groups, prefilled."""

    pack: GroupPack
    made: SharedPrefixes
    seconds: float

    @classmethod
    def of(
        cls, pack: GroupPack, model: LoadedModel, now: Callable[[], float], check: Callable[[], None]
    ) -> Prefix:
        """`now` tells the time once the device has done what was queued."""
        started = now()
        prefixes = prefill_prefixes(
            model.decoder,
            model.attention,
            pack.sharing.method,
            [group.rows[0].input_ids[: group.shared_tokens] for group in pack.groups],
            pack.sharing.layers,
            check,
        )
        return cls(pack=pack, made=prefixes, seconds=now() - started)

    def prefill(self, model: LoadedModel, chunk: Sequence[Numbered], check: Callable[[], None]) -> Prefilled:
        """What is left of the prompts of some of the pack's rows."""
        return prefill_behind(
            model.decoder,
            model.attention,
            self.pack.sharing.method,
            self.made,
            [row for _, row in chunk],
            [number for number, _ in chunk],
            0,
            check,
        )

    def shared_by(self, chunk: Sequence[Numbered], model: LoadedModel, packer: GroupPacker) -> Shared:
        """What to say of it in the rows of a chunk."""
        flops = self.made.flops(model.decoder)
        return Shared(
            method=self.pack.sharing.method.name,
            ms=self.seconds * 1e3,
            flops=[flops[number] for number, _ in chunk],
            group_rows=[len(self.pack.groups[number].rows) for number, _ in chunk],
            pack_tokens=packer.running_tokens(self.pack, chunk),
        )


def rehearse_group(
    model: LoadedModel, ids: np.ndarray, check: Callable[[], None], kv_dtype: torch.dtype | None = None
) -> None:
    """Answer two rows about a throw-away document: what they read together has kernels of its own."""
    decoder, attention, dense = model.decoder, model.attention, Dense()
    end = len(ids) - min(REHEARSED_TOKENS, len(ids) - 1)
    spans = Spans(document=(0, end), question=(end, len(ids)))
    row = EncodedDocument(source=Row(row=0, id="", place=""), input_ids=ids, spans=spans)
    layers = decoder.shape.layers
    shared = prefill_prefixes(decoder, attention, dense, [ids[:end]], layers, check)
    made = prefill_behind(decoder, attention, dense, shared, [row, row], [0, 0], 1, check)
    decode(decoder, attention, made, StopRules(max_new_tokens=2), graphs=False, kv_dtype=kv_dtype)
