"""The contract of a pruning method.

A method is immutable settings. After a layer's attention it is shown the layer and says which tokens go
through the feed-forward network, which leave the remaining layers, and whose keys and values are stored.
All indices are ascending, unique, and count the tokens that entered the layer.

Laws, checked by the tests for every registered method: what `protected` names survives; full settings keep
everything and equal `dense` through the real gather; a pack gives what its documents give alone; a run
leaves no trace in the next; `select` writes nothing but its state; planned bytes bound the real ones.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from itertools import zip_longest
from math import ceil
from operator import add
from typing import Any, ClassVar

import torch
from torch import Tensor

from pipeline.errors import ConfigError
from pipeline.kernels.scoring import window_importance
from pipeline.kernels.segments import Segments
from pipeline.kernels.select import top_mask
from pipeline.model.shape import ModelShape
from pipeline.records import Spans

Range = tuple[int, int]  # half-open, in original positions


def setting(default: Any, help: str) -> Any:
    """A dataclass field of a method, with the words `marsinfer methods` explains it by."""
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Upper bounds for one pack, known before anything runs."""

    shape: ModelShape
    lengths: tuple[int, ...]  # prompt tokens of each document
    cache_tokens: tuple[int, ...]  # of each layer: prompt tokens of the pack whose K/V are stored

    def kv_bytes(self, itemsize: int, new_tokens: int = 0) -> int:
        """Bytes of keys and values, with room for `new_tokens` generated ones a document."""
        slots = sum(self.cache_tokens) + self.shape.layers * new_tokens * len(self.lengths)
        return slots * self.shape.kv_bytes_per_token(itemsize)


@dataclass(frozen=True, kw_only=True)
class Selection:
    """What one layer does with the tokens that entered it; None means all of them.

    `ffn` without a value follows `live`: a token that leaves, leaves before this layer's feed-forward
    network, unless `ffn` names it. Each document's last token must stay live: it predicts the answer.
    """

    live: Tensor | None = None  # go on to the next layer
    ffn: Tensor | None = None  # pass the feed-forward network; the others keep their residual
    cache: Tensor | None = None  # have their keys and values stored for decoding


KEEP_ALL = Selection()


@dataclass(kw_only=True)
class LayerView:
    """What a method may look at after a layer's attention. Scores are computed only when asked for."""

    layer: int
    queries: Tensor  # (T, H, d) with RoPE
    keys: Tensor  # (T, K, d) with RoPE
    values: Tensor  # (T, K, d)
    hidden: Tensor  # (T, D) residual stream after attention
    positions: Tensor  # (T,) original positions, ascending within a document
    segments: Segments  # documents as they entered this layer
    lengths: tuple[int, ...]  # documents as they entered the model
    spans: tuple[Spans, ...]
    scored_pairs: tuple[int, ...] = ()  # of each document: query-key pairs recomputed for scoring

    def window_importance(self, window: int) -> Tensor:
        """(T,) attention each token gets from its document's last `window` queries, mean over heads."""
        before = self.scored_pairs or (0,) * len(self.segments)
        pairs = (min(window, length) * length for length in self.segments.lengths)
        self.scored_pairs = tuple(map(add, before, pairs))
        return window_importance(self.queries, self.keys, self.segments, window)

    @cached_property
    def all_indices(self) -> Tensor:
        return torch.arange(self.segments.total, device=self.hidden.device)

    def mask_of(self, ranges: Sequence[Sequence[Range]]) -> Tensor:
        """(T,) bool: tokens whose original position lies in one of their document's ranges."""
        mask_T = torch.zeros(self.segments.total, dtype=torch.bool, device=self.hidden.device)
        # the n-th range of all documents at once, however many documents there are
        for nth in zip_longest(*ranges, fillvalue=(0, 0)):
            first_B, stop_B = torch.tensor(nth, device=mask_T.device).T
            document_T = self.segments.document_T
            mask_T |= (self.positions >= first_B[document_T]) & (self.positions < stop_B[document_T])
        return mask_T


@dataclass(frozen=True, kw_only=True)
class PruningMethod(ABC):
    """Base of all methods: subclass it as a frozen keyword-only dataclass, one file each.

    The class docstring's first line is shown by `marsinfer methods`, `source` beside it.
    """

    name: ClassVar[str]
    source: ClassVar[str] = ""

    def plan(self, shape: ModelShape, lengths: Sequence[int]) -> Plan:
        """Upper bounds of what `select` will keep; the default stores every token in every layer.

        Raises ConfigError when a setting given a value a layer does not fit the model's depth.
        """
        for parameter in fields(self):
            value = getattr(self, parameter.name)
            if isinstance(value, tuple) and len(value) != shape.layers:
                raise ConfigError(
                    f"{parameter.name} has {len(value)} values, and the model has {shape.layers} layers: "
                    "give one value, or one a layer"
                )
        return Plan(shape=shape, lengths=tuple(lengths), cache_tokens=(sum(lengths),) * shape.layers)

    def protected(self, length: int, spans: Spans) -> tuple[Range, ...]:
        """Original positions of a document of `length` tokens that this method never drops or skips."""
        return ((length - 1, length),)

    def begin(self, plan: Plan) -> Any:
        """The mutable state of one pack's prefill, handed to every `select`."""
        return None

    @abstractmethod
    def select(self, layer: int, view: LayerView, state: Any) -> Selection:
        """Decide after the attention of `layer`."""

    def protected_mask(self, view: LayerView) -> Tensor:
        """(T,) bool: the tokens that `protected` names, among those still alive."""
        named = [self.protected(n, spans) for n, spans in zip(view.lengths, view.spans, strict=True)]
        return view.mask_of(named)


@dataclass(frozen=True, kw_only=True)
class ScoredMethod(PruningMethod):
    """A method that only writes `score`: the best tokens pass the FFN, the others skip it."""

    start_layer: int = setting(10, "first layer that is pruned, from 0")
    share: float | tuple[float, ...] | None = setting(0.5, "share of tokens that pass the FFN")

    def __post_init__(self) -> None:
        check_range("start_layer", self.start_layer, low=0)
        check_range("share", self.share, low=0, high=1)

    @abstractmethod
    def score(self, layer: int, view: LayerView) -> Tensor:
        """(T,) one score a token, higher means keep."""

    def select(self, layer: int, view: LayerView, state: Any) -> Selection:
        if layer < self.start_layer:
            return KEEP_ALL
        return Selection(ffn=self.kept(layer, view))

    def kept(self, layer: int, view: LayerView) -> Tensor:
        """Ascending indices of `ceil(share * length)` tokens a document.

        Protected tokens count towards the share; where they alone exceed it, they are what is kept.
        """
        share = at_layer(self.share, layer)
        if share >= 1:
            return view.all_indices
        counts = [ceil(share * length) for length in view.segments.lengths]
        protected_T = self.protected_mask(view)
        scores_T = self.score(layer, view).masked_fill(protected_T, float("inf"))
        return (top_mask(scores_T, view.segments, counts) | protected_T).nonzero().flatten()


def at_layer(value: Any, layer: int) -> Any:
    """A setting's value at a layer: one for all layers, or a tuple with one a layer."""
    return value[layer] if isinstance(value, tuple) else value


def check_range(name: str, value: Any, *, low: float | None = None, high: float | None = None) -> None:
    """Raise ConfigError unless each value lies in [low, high]; None passes."""
    for number in value if isinstance(value, tuple) else (value,):
        if number is None:
            continue
        if not isinstance(number, int | float) or isinstance(number, bool) or number != number:
            raise ConfigError(f"{name} must be a number, not {number!r}")
        if (low is not None and number < low) or (high is not None and number > high):
            bounds = f"at least {low}" if high is None else f"between {low} and {high}"
            raise ConfigError(f"{name}={number} is out of range: it must be {bounds}")
