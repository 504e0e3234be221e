"""Speculative prefill: a draft model reads the prompt, and the model computes what it attended to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from math import ceil
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from pipeline.kernels.scoring import block_means, smoothed
from pipeline.kernels.segments import Segments
from pipeline.kernels.select import top_share_mask
from pipeline.pruning.base import KEEP_ALL, Plan, PruningMethod, Selection, one_share
from pipeline.pruning.capabilities import ReadsAhead
from pipeline.pruning.limits import check_pool, setting
from pipeline.pruning.prompt_ends import PromptEnds
from pipeline.pruning.shape import ModelShape
from pipeline.pruning.view import LayerView, Range
from pipeline.records import Spans


@dataclass(frozen=True, kw_only=True)
class Speculative(PruningMethod):
    """A small draft model reads the prompt first; the model computes only the chunks it attended to.

    Source: Speculative Prefill (arXiv 2502.02789).

    The draft, which `--draft-model` names, has the model's tokenizer. It reads the whole prompt and generates
    `look_ahead` tokens greedily. The softmax attention of each of these over the prompt is averaged over
    `pool` neighbours; the largest over all its heads and layers counts, and of this the mean over the tokens.
    The prompt is cut into chunks of `chunk` tokens, judged by the mean of their tokens, and the best share
    `keep` of the chunks stays. The model prefills what stays alone, at its original positions, and only that
    has keys and values.

    Our choices: the prompt's last tokens, from the end of the document on, count as one more look-ahead
    token: the mean of their attention, the largest of heads, averaged over neighbours, the largest of layers.
    Instruction and question always stay, wherever they stand: up to `most` tokens each of what is before the
    document, of the question, and of what is behind the document, and at least the first `sink` and the last
    `window` tokens. They come on top of `keep`, and chunks are judged by their other tokens; a chunk without
    others is not counted. Chunks are cut from the prompt's first token on, and their number is rounded up; of
    equal ones the earlier wins. The paper keeps 10 to 35%.
    """

    name: ClassVar[str] = "speculative"
    source: ClassVar[str] = "arXiv 2502.02789"
    reads_layers: ClassVar[bool] = False  # of the model; the draft's attention is read

    keep: float = setting(0.3, "share of the chunks that the model computes", low=0, high=1)
    chunk: int = setting(32, "tokens of a chunk, kept or dropped together", low=1, whole=True)
    look_ahead: int = setting(
        8, "tokens that the draft generates, by whose attention it chooses", low=0, whole=True
    )
    pool: int = setting(13, "neighbours that attention is averaged over; odd", low=1, whole=True)
    sink: int = setting(32, "first tokens, always kept", low=0, whole=True)
    window: int = setting(32, "fewest last tokens that are kept, whose attention counts", low=1, whole=True)
    most: int = setting(256, "most of them, and of the instruction and the question", low=1, whole=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_pool(self.pool)
        _ = self.ends  # which checks its numbers

    @property
    def ends(self) -> PromptEnds:
        """What is kept around a document."""
        return PromptEnds(sink=self.sink, window=self.window, most=self.most)

    def plan(self, shape: ModelShape, lengths: Sequence[int]) -> Plan:
        self.check_depth(shape)
        tokens = sum(self.most_kept(lengths))
        return Plan(shape=shape, lengths=tuple(lengths), cache_tokens=(tokens,) * shape.layers)

    def needs_last_layer(self, shape: ModelShape) -> bool:
        return False

    def protected(self, length: int, spans: Spans) -> tuple[Range, ...]:
        return self.ends.ranges(length, spans)

    def with_keep(self, shares: tuple[float, ...]) -> Self:
        return replace(self, keep=one_share(self.name, shares))

    def select(self, layer: int, view: LayerView, state: Any) -> Selection:
        return KEEP_ALL

    # what the draft's reading comes to

    def most_kept(self, lengths: Sequence[int]) -> tuple[int, ...]:
        chunked = [ceil(self.keep * ceil(n / self.chunk)) * self.chunk for n in lengths]
        return tuple(min(n, kept + self.ends.bound) for n, kept in zip(lengths, chunked, strict=True))

    def windows(self, lengths: Sequence[int], spans: Sequence[Spans]) -> tuple[int, ...]:
        return tuple(self.ends.window_of(n, each) for n, each in zip(lengths, spans, strict=True))

    def chosen(self, scores_ST: Tensor, segments: Segments, protected_T: Tensor) -> Tensor:
        open_T = (~protected_T).float()
        means, counts, chunks = [], [], []
        for start, end in segments.ranges():
            open_N = block_means(open_T[start:end], self.chunk)  # the share that no rule protects
            score_N = block_means(scores_ST.mean(0)[start:end] * open_T[start:end], self.chunk)
            means.append(torch.where(open_N > 0, score_N / open_N, -1.0))
            counts.append((open_N > 0).sum())
            chunks.append(len(open_N))
        blocks = Segments.of(chunks, scores_ST.device)
        kept_N = top_share_mask(torch.cat(means), blocks, self.keep, torch.stack(counts))
        first_B = blocks.bounds[:-1]
        chunk_T = first_B[segments.document_T] + segments.index_in_document_T // self.chunk
        return (kept_N[chunk_T] | protected_T).nonzero().flatten()


@dataclass(kw_only=True)
class DraftScores:
    """What a draft's layers have attended to so far; the largest of heads, of N layers."""

    windows_NT: list[Tensor] = field(default_factory=list)  # of each layer, from each prompt's last tokens

    def largest(self, segments: Segments, pool: int) -> Tensor:
        """(T,) the largest of all layers, each averaged over `pool` neighbours."""
        scores_NT = torch.stack(self.windows_NT)
        return torch.cat([smoothed(scores_NT[:, a:b], pool).amax(0) for a, b in segments.ranges()])


@dataclass(frozen=True, kw_only=True)
class DraftReader(PruningMethod):
    """What the draft computes with: everything, while the attention of each prompt's last tokens is noted."""

    name: ClassVar[str] = "the draft's reading"

    ahead: ReadsAhead

    def needs_last_layer(self, shape: ModelShape) -> bool:
        return False

    def queries_at_end(self, lengths: Sequence[int], spans: Sequence[Spans]) -> tuple[int, ...]:
        return self.ahead.windows(lengths, spans)

    def begin(self, plan: Plan) -> DraftScores:
        return DraftScores()

    def select(self, layer: int, view: LayerView, state: DraftScores) -> Selection:
        windows = self.ahead.windows(view.lengths, view.spans)
        state.windows_NT.append(view.window_importance(windows, heads="max"))
        return KEEP_ALL
