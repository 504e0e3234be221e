"""Documents that are prefilled together, and how far their prefill has come."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from operator import add
from typing import NamedTuple

import torch
from torch import Tensor

from pipeline.families.decoder import Decoder
from pipeline.kernels.segments import Segments
from pipeline.model.cache import RaggedCache
from pipeline.model.work import Work
from pipeline.records import EncodedDocument, Spans


class Whole(NamedTuple):
    """The prompts of a pack before tokens of theirs were left out."""

    lengths: tuple[int, ...]
    positions_T: Tensor  # (T,) of the tokens that are left


@dataclass(frozen=True, kw_only=True)
class Pack:
    """Documents that are prefilled together, end to end."""

    input_ids: Tensor  # (T,)
    segments: Segments
    spans: tuple[Spans, ...]
    whole: Whole | None = None  # prompts that these are only some tokens of
    answer_tokens: tuple[int, ...] = ()  # that may follow each prompt, which LongRoPE depends on

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each whole prompt."""
        return self.segments.lengths if self.whole is None else self.whole.lengths

    @property
    def positions_T(self) -> Tensor:
        """(T,) the places of the tokens in their whole prompts."""
        return self.segments.index_in_document_T if self.whole is None else self.whole.positions_T

    def reaches(self, new_tokens: int) -> tuple[int, ...]:
        """Tokens that each document may come to have, with `new_tokens` of answers that nothing tells of."""
        return tuple(map(add, self.lengths, self.answer_tokens or (new_tokens,) * len(self.lengths)))

    @classmethod
    def of(
        cls, documents: Sequence[EncodedDocument], device: torch.device, answer_tokens: Sequence[int] = ()
    ) -> Pack:
        """`answer_tokens` are needed where answers are decoded elsewhere than in the prefill's cache."""
        ids = torch.cat([torch.from_numpy(document.input_ids) for document in documents])
        lengths = [document.prompt_tokens for document in documents]
        spans = tuple(document.spans for document in documents)
        segments = Segments.of(lengths, device)
        return cls(
            input_ids=ids.to(device), segments=segments, spans=spans, answer_tokens=tuple(answer_tokens)
        )

    def only(self, indices: Tensor) -> Pack:
        """The same documents with some of their tokens; the spans remain those of the whole prompts."""
        ids = self.input_ids.index_select(0, indices)
        return replace(self, input_ids=ids, segments=self.segments.left(indices), whole=None)

    def thinned(self, indices: Tensor) -> Pack:
        """The same documents with some of their tokens, at the positions that they have in all of them."""
        whole = Whole(lengths=self.lengths, positions_T=self.positions_T.index_select(0, indices))
        return replace(self.only(indices), whole=whole)


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
