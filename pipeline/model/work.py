"""What each layer of a prefill worked on, counted while it runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pipeline.kernels.segments import Segments, on_device
from pipeline.pruning.operations import LayerWork
from pipeline.pruning.tiers import FFN, FP8, LIVE
from pipeline.pruning.view import LayerView
from pipeline.ranks.collectives import Ranks


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
    kv_only: list[tuple[int, ...]] = field(default_factory=list)  # gave keys and values alone
    last_only: list[bool] = field(default_factory=list)  # so did all but each document's last token
    estimated: list[tuple[int, ...]] = field(
        default_factory=list
    )  # query-key pairs by which blocks were chosen
    marks: list[Tensor] | None = None  # (T,) uint8 of the tokens that entered, where they are asked for

    def ffn(self) -> list[list[int]]:
        """Of each layer, FFN tokens of each document; the one copy to the host a pass needs."""
        return torch.stack(self.ffn_B).tolist()

    def by_layer(self) -> list[list[LayerWork]]:
        """Of each layer and document."""
        fp8 = torch.stack(self.ffn_fp8_B).tolist()
        pairs = [[None] * len(self.kept[0]) if counts is None else counts.tolist() for counts in self.pairs_B]
        last_only = [[flag] * len(self.kept[0]) for flag in self.last_only]
        counted = (
            self.kept,
            self.ffn(),
            self.scored_pairs,
            fp8,
            pairs,
            self.kv_only,
            last_only,
            self.estimated,
        )
        columns = zip(*counted, strict=True)
        return [[LayerWork(*counts) for counts in zip(*layer, strict=True)] for layer in columns]

    def average_pairs(self, ranks: Ranks) -> None:
        """Count pairs as the mean over the heads of all ranks, each of which has counted those of its own."""
        counted = [pairs_B for pairs_B in self.pairs_B if pairs_B is not None]
        if not counted:
            return
        mean_LB = ranks.sum_(torch.stack([pairs_B.to(ranks.device) for pairs_B in counted])) // ranks.count
        means = iter(mean_LB)
        self.pairs_B = [None if pairs_B is None else next(means) for pairs_B in self.pairs_B]

    def mark(self, view: LayerView, live: Tensor | None, ffn: Tensor | None, fp8: Tensor | None) -> None:
        """Note, if that is asked for, who goes on and who passed the feed-forward network (None: all)."""
        if self.marks is None:
            return
        self._mark(view.segments, live, ffn, fp8)

    def _mark(self, segments: Segments, live: Tensor | None, ffn: Tensor | None, fp8: Tensor | None) -> None:
        assert self.marks is not None
        marks_T = torch.zeros(segments.total, dtype=torch.uint8, device=segments.device)
        marks_T[slice(None) if live is None else live] |= LIVE
        marks_T[slice(None) if ffn is None else ffn] |= FFN
        if fp8 is not None:
            marks_T[fp8] |= FFN | FP8
        self.marks.append(marks_T)

    def count(
        self,
        view: LayerView,
        ffn: Tensor | None,
        ffn_fp8: Tensor | None = None,
        *,
        pairs_B: Tensor | None = None,
        kv_only: tuple[int, ...] | None = None,
        estimated: tuple[int, ...] | None = None,
    ) -> None:
        """Add a layer, of whose tokens `ffn` (None: all) and `ffn_fp8` passed its feed-forward network.

        `pairs_B` are the query-key pairs of its attention, unless they are all causal ones; `estimated` those
        by which its blocks were chosen.
        """
        self.kept.append(view.segments.lengths)
        self.estimated.append(estimated or (0,) * len(view.segments))
        self.scored_pairs.append(view.scored_pairs or (0,) * len(view.segments))
        self.pairs_B.append(pairs_B)
        self.kv_only.append(kv_only or (0,) * len(view.segments))
        segments = view.segments
        lengths_B = segments.lengths_B
        fp8_B = torch.zeros_like(lengths_B) if ffn_fp8 is None else segments.counts(ffn_fp8)
        self.ffn_B.append(fp8_B + (lengths_B if ffn is None else segments.counts(ffn)))
        self.ffn_fp8_B.append(fp8_B)
        self.last_only.append(False)

    def count_end(
        self,
        segments: Segments,
        last_B: Tensor,
        kv_only: tuple[int, ...] | None,
        pairs_B: Tensor | None = None,
        scored_pairs: tuple[int, ...] = (),
    ) -> None:
        """Add and mark the model's last layer, of which only the tokens `last_B` were computed to the end.

        `pairs_B` are the query-key pairs of its attention, unless they see all, `scored_pairs` those for
        scoring, if there are any.
        """
        self._count_last_only(segments, kv_only or (0,) * len(segments), pairs_B, scored_pairs)
        if self.marks is not None:
            self._mark(segments, last_B, last_B, None)

    def _count_last_only(
        self,
        segments: Segments,
        kv_only: tuple[int, ...],
        pairs_B: Tensor | None = None,
        scored_pairs: tuple[int, ...] = (),
    ) -> None:
        self.kept.append(segments.lengths)
        self.estimated.append((0,) * len(segments))
        self.scored_pairs.append(scored_pairs or (0,) * len(segments))
        self.pairs_B.append(pairs_B)
        self.kv_only.append(kv_only)
        self.ffn_B.append(torch.ones_like(segments.lengths_B))
        self.ffn_fp8_B.append(torch.zeros_like(segments.lengths_B))
        self.last_only.append(True)

    def count_behind(self, shared: Work, segments: Segments, of_prefix: Sequence[int]) -> None:
        """Add the layers of `shared`, for documents whose first tokens it has counted, whole.

        `of_prefix` says for each document of `segments` which of `shared` it begins with. Behind that all
        tokens passed everything, as far as those before them did.
        """
        lengths_B = segments.lengths_B
        none = (0,) * len(segments)
        layers = zip(shared.kept, shared.pairs_B, shared.estimated, shared.last_only, strict=True)
        for counts, pairs_G, estimated, last_only in layers:
            if last_only:
                self._count_last_only(segments, none)
                continue
            pairs_B = None
            if pairs_G is not None:
                known = [counts[g] for g in of_prefix]
                behind = [_causal(n) - _causal(k) for n, k in zip(segments.lengths, known, strict=True)]
                chosen_B = pairs_G[on_device(of_prefix, pairs_G.device)]
                pairs_B = chosen_B + on_device(behind, pairs_G.device)
            self.kept.append(segments.lengths)
            self.scored_pairs.append(none)
            self.estimated.append(tuple(estimated[g] for g in of_prefix))
            self.pairs_B.append(pairs_B)
            self.kv_only.append(none)
            self.ffn_B.append(lengths_B)
            self.ffn_fp8_B.append(torch.zeros_like(lengths_B))
            self.last_only.append(False)


def _causal(tokens: int) -> int:
    """Query-key pairs of whole attention over a document."""
    return tokens * (tokens + 1) // 2
