"""The contract of a pruning method.

A method is immutable settings. After a layer's attention it is shown the layer and says which tokens go
through the feed-forward network, which leave the remaining layers, and whose keys and values are stored.
What it may be able to do beside that is in `capabilities`. All indices are ascending, unique, and count the
tokens that entered the layer.

Laws, checked by the tests for every registered method: what `protected` names survives; full settings keep
everything and equal `dense` through the real gather; a pack gives what its documents give alone; a run
leaves no trace in the next; `select` writes nothing but its state; planned bytes bound the real ones; who
need not see the last layer gives the same when asked there.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from math import ceil
from typing import Any, ClassVar, Self

from torch import Tensor

from pipeline.errors import ConfigError
from pipeline.kernels.select import top_mask
from pipeline.pruning.capabilities import Rescoring
from pipeline.pruning.limits import at_layer, check_limits, limits_of, setting, several
from pipeline.pruning.operations import LayerWork, attended_pairs
from pipeline.pruning.shape import ModelShape
from pipeline.pruning.view import LayerView, Range
from pipeline.records import Spans

WIDEST_SPARSE_HEAD = 256  # dimensions
PAPER_DEPTH = 32  # layers of the models that the papers prune
ASSUMED_SHARE = (
    0.5  # of the tokens, where attention decides: between what eta=0.95 and p=0.99 left in our runs
)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Upper bounds for one pack, known before anything runs."""

    shape: ModelShape
    lengths: tuple[int, ...]  # prompt tokens of each document
    cache_tokens: tuple[int, ...]  # of each layer: prompt tokens of the pack whose K/V are stored
    rescoring: Rescoring | None = None

    def kv_bytes(self, itemsize: int, new_tokens: int = 0) -> int:
        """Bytes of keys and values, with room for `new_tokens` generated ones a document."""
        slots = sum(self.cache_tokens) + self.shape.layers * new_tokens * len(self.lengths)
        return slots * self.shape.kv_bytes_per_token(itemsize)


@dataclass(frozen=True, kw_only=True)
class Selection:
    """What one layer does with the tokens that entered it; None means all of them.

    `ffn` without a value follows `live`: a token that leaves, leaves before this layer's feed-forward
    network, unless `ffn` or `ffn_fp8` names it. Each document's last token must stay live: it predicts the
    answer. `cache` may name other tokens for each key/value head, as (K, C), of each document equally many. A
    method that knows beforehand how many tokens of each document are in `live` or `cache` should say so: the
    host need not wait to learn it.
    """

    live: Tensor | None = None  # go on to the next layer
    ffn: Tensor | None = None  # pass the feed-forward network; the others keep their residual
    ffn_fp8: Tensor | None = (
        None  # pass it too, in fp8; disjoint from `ffn`, which is then in the model's dtype
    )
    cache: Tensor | None = None  # have their keys and values stored for decoding
    live_lengths: tuple[int, ...] | None = None
    cache_lengths: tuple[int, ...] | None = None
    # who leaves gives later layers keys and values, of the hidden state it left with: those in `live` must be
    # each document's last tokens, and no token may have left before
    early_exit: bool = False
    restart: Tensor | None = None  # the prefill begins anew with these tokens alone, numbered from 0
    blocks: Tensor | None = None  # (N,) scores of the pack's blocks, at a layer of the plan's `rescoring`


KEEP_ALL = Selection()


@dataclass(frozen=True, kw_only=True)
class PruningMethod(ABC):
    """Base of all methods: subclass it as a frozen keyword-only dataclass, one file each.

    The class docstring's first line is shown by `marsinfer methods`, `source` beside it. A subclass that
    checks its own settings in `__post_init__` calls this one's too.
    """

    name: ClassVar[str]
    source: ClassVar[str] = ""
    # whether `select` looks at the queries, keys, values or hidden states that it is shown, or drops tokens
    # but by an early exit: without, queries are made a piece at a time where there are many, it sees none,
    # and memory is planned closely
    reads_layers: ClassVar[bool] = True

    sparse_attention: float | tuple[float, ...] | None = setting(
        None,
        "attention mass that block-sparse attention is to reach, in long documents",
        low=0,
        high=1,
        per_layer=True,
    )

    def __post_init__(self) -> None:
        for parameter in fields(self):
            check_limits(parameter.name, getattr(self, parameter.name), limits_of(parameter))

    def plan(self, shape: ModelShape, lengths: Sequence[int]) -> Plan:
        """Upper bounds of what `select` will keep; the default stores every token in every layer.

        Raises ConfigError when a setting does not fit the model's depth.
        """
        self.check_depth(shape)
        return Plan(shape=shape, lengths=tuple(lengths), cache_tokens=(sum(lengths),) * shape.layers)

    def check_depth(self, shape: ModelShape) -> None:
        """Raise ConfigError for a layer that the model has not, or values that are not one a layer.

        And for a model whose layers have sliding windows, where the method does not suit them.
        """
        if not self.suits(shape):
            which = "some" if None in shape.windows else "all"
            window = min(filter(None, shape.windows))
            raise ConfigError(
                f"method {self.name} does not suit this model, {which} of whose layers have sliding windows"
                f" of {window:,} tokens: take dense or mars"
            )
        for parameter in fields(self):
            value, limits = getattr(self, parameter.name), limits_of(parameter)
            if limits.per_layer and isinstance(value, tuple) and len(value) != shape.layers:
                raise ConfigError(
                    f"{parameter.name} has {len(value)} values, and the model has {shape.layers} layers: "
                    "give one value, or one a layer"
                )
            for layer in several(value) if limits.is_layer else ():
                if layer is not None and layer >= shape.layers:
                    raise ConfigError(
                        f"{parameter.name}={layer}, and the model has layers 0 to {shape.layers - 1}"
                    )

    @classmethod
    def suits(cls, shape: ModelShape) -> bool:
        """Whether it stays right where layers attend to a window of the last positions.

        It does not if it drops keys and values, or judges tokens by the attention of such a layer.
        """
        return not shape.slides

    def protected(self, length: int, spans: Spans) -> tuple[Range, ...]:
        """Original positions of a document of `length` tokens that this method never drops or skips."""
        return ((length - 1, length),)

    def alike(self, lengths: Sequence[int]) -> bool:
        """Whether prompts of these lengths take the same passes: only such are put into one pack.

        A prompt that would not begin anew when it runs alone would else do so beside others that do.
        """
        return True

    def begin(self, plan: Plan) -> Any:
        """The mutable state of one pack's prefill, handed to every `select`."""
        return None

    def needs_last_layer(self, shape: ModelShape) -> bool:
        """Whether `select` must be asked at the model's last layer; it may look at all of it there.

        Nothing behind that layer reads any token but each prompt's last, which is all that passes its FFN. So
        False claims that `select` would store every token there, and would take the last one through the FFN
        without naming it in `ffn_fp8`: then queries and attention, too, are computed of it alone.
        """
        return True

    def restarting_layer(self, shape: ModelShape) -> int | None:
        """The layer, if there is one, at which `select` usually asks to begin anew.

        It is asked there before attention, which is left out if it does; `hidden` is what entered the layer.
        """
        return None

    def queries_at_end(self, lengths: Sequence[int], spans: Sequence[Spans]) -> tuple[int, ...] | None:
        """Of how many last tokens of each document `select` reads the queries at the model's last layer.

        For a method that says by `needs_last_layer` that it need not see all of it, and keeps all tokens
        there: `select` is then asked once these queries and all keys and values are made, and what it returns
        is not looked at. None: it is not asked.
        """
        return None

    def to_the_end(self, shape: ModelShape, layers: Sequence[LayerWork]) -> list[LayerWork]:
        """A pass through all layers as it would be, but of the model's last one only what is read of it."""
        *before, last = layers
        if self.needs_last_layer(shape):
            return [*before, last._replace(ffn_tokens=min(1, last.ffn_tokens))]
        last = last._replace(ffn_tokens=1, pairs=None, last_only=True)
        window = shape.window(shape.layers - 1)
        return [*before, last if window is None else last._replace(pairs=min(attended_pairs(last), window))]

    def attention_masses(self, layers: int) -> tuple[float | None, ...]:
        """What block-sparse attention is to reach in each of a model's layers; None: it is to be whole.

        With 0 each block of queries attends to itself, the block before it and the first.
        """
        masses = [at_layer(self.sparse_attention, layer) for layer in range(layers)]
        return tuple(None if mass is None or mass >= 1 else mass for mass in masses)

    def masses_in(self, shape: ModelShape) -> tuple[float | None, ...]:
        """`attention_masses` of a model's layers, of which those with a window compute all that is in it.

        None too where heads are wider than those that the kernels of block-sparse attention are tuned for.
        """
        masses = self.attention_masses(shape.layers)
        if shape.head_dim > WIDEST_SPARSE_HEAD:
            return (None,) * shape.layers
        return tuple(None if shape.window(layer) else mass for layer, mass in enumerate(masses))

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

    start_layer: int = setting(10, "first layer that is pruned, from 0", is_layer=True)
    share: float | tuple[float, ...] | None = setting(
        0.5, "share of tokens that pass the FFN", low=0, high=1, per_layer=True
    )

    @abstractmethod
    def score(self, layer: int, view: LayerView) -> Tensor:
        """(T,) one score a token, higher means keep."""

    def with_keep(self, shares: tuple[float, ...]) -> Self:
        return replace(self, share=one_share(self.name, shares))

    def select(self, layer: int, view: LayerView, state: Any) -> Selection:
        if layer < self.start_layer:
            return KEEP_ALL
        return Selection(ffn=self.kept(layer, view))

    def kept(self, layer: int, view: LayerView) -> Tensor:
        """Ascending indices of the tokens that pass the FFN."""
        share = at_layer(self.share, layer)
        if share >= 1:
            return view.all_indices
        scores_T = self.score(layer, view)
        if not isinstance(scores_T, Tensor) or scores_T.shape != (view.segments.total,):
            made = tuple(scores_T.shape) if isinstance(scores_T, Tensor) else type(scores_T).__name__
            raise ConfigError(
                f"method {self.name}: score must return a tensor of one number a token, here of shape "
                f"({view.segments.total},), and returned {made}"
            )
        return self.share_mask(scores_T, view, share).nonzero().flatten()

    def share_mask(self, scores_T: Tensor, view: LayerView, share: float) -> Tensor:
        """(T,) bool: the best `ceil(share * length)` tokens of each document.

        Protected tokens count towards the share; where they alone exceed it, they are what is kept.
        """
        counts = [ceil(share * length) for length in view.segments.lengths]
        protected_T = self.protected_mask(view)
        first_T = scores_T.masked_fill(protected_T, float("inf"))
        return top_mask(first_T, view.segments, counts) | protected_T


def layer_of(given: int | None, paper_layer: int, depth: int) -> int:
    """The layer `given`, or else the paper's of 32, scaled to a model of `depth` layers."""
    return min(round(paper_layer * depth / PAPER_DEPTH), depth - 1) if given is None else given


def one_share(name: str, shares: tuple[float, ...]) -> float:
    """The only share to keep; raises ConfigError for several."""
    if len(shares) != 1:
        raise ConfigError(f"method {name} keeps one share of the tokens, not {len(shares)}")
    return shares[0]
