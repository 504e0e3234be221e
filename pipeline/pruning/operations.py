"""How many floating-point operations a prefill takes, counted from the tokens each layer worked on.

A multiply-add counts as two. Norms, RoPE, activations and the sort of the scores are left out: they move
bytes, and none of them is a per-cent of the matrix products.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from pipeline.pruning.shape import ModelShape

NOTHING_LEFT_OUT = 1 - 1e-9  # share that a method kept, but for rounding


class LayerWork(NamedTuple):
    """What one layer did with one document."""

    tokens: int  # entered: keys and values at least, else the other projections and attention too
    ffn_tokens: int  # passed the feed-forward network
    scored_pairs: int = 0  # query-key pairs recomputed for scoring
    ffn_fp8_tokens: int = 0  # of the FFN tokens, those that the method sent through it in fp8
    pairs: int | None = None  # query-key pairs that attention computed, mean over heads; None: causal, all
    kv_only: int = 0  # tokens beside those that entered, of which only keys and values were computed
    last_only: bool = False  # so it was with those that entered, but for the document's last one
    estimated_pairs: int = 0  # query-key pairs by which block-sparse attention chose its blocks


Passes = Sequence[Sequence[LayerWork]]  # of one document, each pass's layers


def layer_flops(shape: ModelShape, work: LayerWork) -> int:
    """Operations of one layer over one document: projections, attention, FFN, scoring tokens and blocks."""
    return (
        projections_flops(shape, work)
        + attended_flops(shape, work)
        + work.ffn_tokens * ffn_flops(shape)
        + 2 * shape.heads * shape.head_dim * (work.scored_pairs + work.estimated_pairs)
    )


def projections_flops(shape: ModelShape, work: LayerWork) -> int:
    """Keys and values of all tokens, queries of those that were to attend, their outputs if they did.

    They did not where a prefill begins anew before a layer's attention.
    """
    a_head = 2 * shape.hidden * shape.head_dim
    asked = min(1, work.tokens) if work.last_only else work.tokens
    attended = 0 if work.pairs == 0 else asked
    return a_head * ((asked + attended) * shape.heads + 2 * (work.tokens + work.kv_only) * shape.kv_heads)


def attended_flops(shape: ModelShape, work: LayerWork) -> int:
    """QK^T and PV of the pairs that a layer's attention computed."""
    return 4 * shape.heads * shape.head_dim * attended_pairs(work)


def attended_pairs(work: LayerWork) -> int:
    """Query-key pairs of a layer's attention, mean over the heads."""
    if work.pairs is not None:
        return work.pairs
    return work.tokens + work.kv_only if work.last_only else causal_pairs(work.tokens)


def causal_pairs(tokens: int, window: int | None = None) -> int:
    """Query-key pairs of a document: each token and all up to it, or the last `window` of these."""
    within = tokens if window is None else min(tokens, window)
    return within * (within + 1) // 2 + (tokens - within) * within


def within_windows(shape: ModelShape, layers: Sequence[LayerWork], length: int) -> list[LayerWork]:
    """A pass over a prompt of `length` tokens, all attention whole, with the pairs that windows leave of it.

    In each layer it is the prompt's last tokens that attend.
    """
    return [
        work
        if (window := shape.window(layer)) is None
        else work._replace(pairs=_pairs_of_last(length, 1 if work.last_only else work.tokens, window))
        for layer, work in enumerate(layers)
    ]


def _pairs_of_last(length: int, queries: int, window: int) -> int:
    """Query-key pairs of the last `queries` tokens of a document."""
    return causal_pairs(length, window) - causal_pairs(length - queries, window)


def kept_ratio(shape: ModelShape, passes: Passes, length: int) -> float:
    """Of a prompt's `length` tokens, those that entered a layer, mean over layers."""
    return sum(work.tokens for layers in passes for work in layers) / (shape.layers * length)


def ffn_ratio(shape: ModelShape, passes: Passes, length: int) -> float:
    """Of the tokens that dense sends through its FFNs for a prompt of `length`, those that passed them."""
    passed = sum(work.ffn_tokens for layers in passes for work in layers)
    return passed / sum(work.ffn_tokens for work in dense_work(shape, length))


def attention_ratio(shape: ModelShape, passes: Passes, length: int) -> float:
    """Of the pairs that dense attention computes for a prompt of `length` tokens, those that were."""
    computed = sum(attended_pairs(work) for layers in passes for work in layers)
    return computed / sum(map(attended_pairs, dense_work(shape, length)))


def shares_of_dense(shape: ModelShape, passes: Passes, length: int, draft_flops: int = 0) -> dict[str, float]:
    """What a prompt of `length` tokens took, of what dense takes: the ratios of an output row, by name.

    `draft_flops` are operations of a draft model, which count with the others.
    """
    return {
        "kept_ratio": kept_ratio(shape, passes, length),
        "ffn_ratio": ffn_ratio(shape, passes, length),
        "attention_ratio": attention_ratio(shape, passes, length),
        "flops_ratio": (passes_flops(shape, passes) + draft_flops) / dense_flops(shape, length),
    }


def leave_nothing_out(*shares: float) -> bool:
    """Whether shares of what dense computes or stores are whole, but for rounding.

    Of the tokens that entered layers some may be fewer even so: of the last layer dense reads one alone.
    """
    return min(shares) > NOTHING_LEFT_OUT


def dense_work(shape: ModelShape, length: int) -> list[LayerWork]:
    """An unpruned prefill of `length` tokens: of the last layer nothing is read but the last token.

    And keys and values, so those are computed of all tokens.
    """
    layers = [*whole_layers(shape.layers - 1, length), LayerWork(length, 1, last_only=True)]
    return within_windows(shape, layers, length)


def whole_layers(count: int, length: int) -> list[LayerWork]:
    """Layers that compute all tokens of a prompt; see `PruningMethod.to_the_end` for a model's last one."""
    return [LayerWork(length, length)] * count


def ffn_flops(shape: ModelShape) -> int:
    """Gate, up and down projections of one token in one layer, and the choice of its experts."""
    return 6 * shape.hidden * shape.ffn_per_token + 2 * shape.hidden * shape.experts


def layer_weights(shape: ModelShape, rows: int) -> int:
    """Weights of all layers' matrices that a decode step of so many rows reads.

    Of experts those that the rows have, if no two have the same.
    """
    attention = 2 * shape.hidden * shape.head_dim * (shape.heads + shape.kv_heads)
    networks = min(shape.experts, rows * shape.experts_per_token) if shape.experts else 1
    return shape.layers * (attention + 3 * shape.hidden * shape.ffn * networks)


def attention_flops(shape: ModelShape, tokens: int) -> int:
    """QK^T and PV over the causal triangle of one document in one layer."""
    return 4 * shape.heads * shape.head_dim * tokens * (tokens + 1) // 2


def prefill_flops(
    shape: ModelShape,
    tokens: Sequence[int],
    ffn_tokens: Sequence[int],
    scored_pairs: Sequence[int] | None = None,
) -> int:
    """Operations of a prefill that computes all of each layer's tokens; with the last token's logits."""
    pairs = scored_pairs or [0] * shape.layers
    return passes_flops(shape, [[LayerWork(*work) for work in zip(tokens, ffn_tokens, pairs, strict=True)]])


def layer_tokens(passes: Passes) -> tuple[list[int], list[int]]:
    """Of each layer, the tokens that entered it and those that passed its FFN, over all passes."""
    columns = [
        [layers[i] for layers in passes if i < len(layers)] for i in range(max(map(len, passes), default=0))
    ]
    entered = [sum(work.tokens for work in column) for column in columns]
    return entered, [sum(work.ffn_tokens for work in column) for column in columns]


def fp8_tokens(passes: Passes, *, everywhere: bool) -> list[int]:
    """Of each layer, the FFN tokens in fp8, over all passes; `everywhere` if that is the default."""
    return [
        sum(_in_fp8(layers[i], everywhere) for layers in passes if i < len(layers))
        for i in range(max(map(len, passes), default=0))
    ]


def _in_fp8(work: LayerWork, everywhere: bool) -> int:
    """Where a method says which tokens are in fp8, the others are in the model's dtype."""
    return work.ffn_tokens if everywhere and not work.ffn_fp8_tokens else work.ffn_fp8_tokens


def passes_flops(shape: ModelShape, passes: Passes) -> int:
    """Operations of one document's prefill, with the last token's logits."""
    layers = [work for layers in passes for work in layers]
    return sum(layer_flops(shape, work) for work in layers) + 2 * shape.hidden * shape.vocab


def dense_flops(shape: ModelShape, length: int) -> int:
    """Operations of an unpruned prefill of `length` tokens."""
    return passes_flops(shape, [dense_work(shape, length)])
