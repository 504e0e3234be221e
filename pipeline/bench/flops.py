"""How many floating-point operations a prefill takes, counted from the tokens each layer worked on.

A multiply-add counts as two. Norms, RoPE, activations and the sort of the scores are left out: they move
bytes, and none of them is a per-cent of the matrix products.
"""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.model.shape import ModelShape

# of each pass over a document, each layer's tokens that entered, FFN tokens and scored query-key pairs
Passes = Sequence[Sequence[tuple[int, int, int]]]


def layer_flops(shape: ModelShape, tokens: int, ffn_tokens: int, scored_pairs: int = 0) -> int:
    """Operations of one layer over one document: projections, causal attention, FFN, scoring."""
    return (
        tokens * projection_flops(shape)
        + attention_flops(shape, tokens)
        + ffn_tokens * ffn_flops(shape)
        + 2 * shape.heads * shape.head_dim * scored_pairs
    )


def projection_flops(shape: ModelShape) -> int:
    """Q, K, V and output projections of one token in one layer."""
    return 2 * shape.hidden * shape.head_dim * (2 * shape.heads + 2 * shape.kv_heads)


def ffn_flops(shape: ModelShape) -> int:
    """Gate, up and down projections of one token in one layer."""
    return 6 * shape.hidden * shape.ffn


def attention_flops(shape: ModelShape, tokens: int) -> int:
    """QK^T and PV over the causal triangle of one document in one layer."""
    return 4 * shape.heads * shape.head_dim * tokens * (tokens + 1) // 2


def prefill_flops(
    shape: ModelShape,
    tokens: Sequence[int],
    ffn_tokens: Sequence[int],
    scored_pairs: Sequence[int] | None = None,
) -> int:
    """Operations of one document's prefill, from the tokens of each layer; with the last token's logits."""
    pairs = scored_pairs or [0] * shape.layers
    layers = zip(tokens, ffn_tokens, pairs, strict=True)
    return sum(layer_flops(shape, *layer) for layer in layers) + 2 * shape.hidden * shape.vocab


def layer_tokens(passes: Passes) -> tuple[list[int], list[int]]:
    """Of each layer, the tokens that entered it and those that passed its FFN, over all passes."""
    columns = [
        [layers[i] for layers in passes if i < len(layers)] for i in range(max(map(len, passes), default=0))
    ]
    entered = [sum(tokens for tokens, _, _ in column) for column in columns]
    return entered, [sum(ffn_tokens for _, ffn_tokens, _ in column) for column in columns]


def passes_flops(shape: ModelShape, passes: Passes) -> int:
    """Operations of one document's prefill, with the last token's logits."""
    layers = [layer for layers in passes for layer in layers]
    return sum(layer_flops(shape, *layer) for layer in layers) + 2 * shape.hidden * shape.vocab


def dense_flops(shape: ModelShape, length: int) -> int:
    """Operations of an unpruned prefill of `length` tokens."""
    return prefill_flops(shape, [length] * shape.layers, [length] * shape.layers)
