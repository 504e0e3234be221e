"""How many bytes of a device a prefill needs while a layer runs, by formulas."""

from __future__ import annotations

import torch

from pipeline.kernels.blocks.rounded_keys import HEAD_DIM, ROUNDED_FROM
from pipeline.kernels.decoding import MOST_PROGRAMS, MOST_SPLITS
from pipeline.kernels.sdpa import masked_at_once
from pipeline.kernels.sparse import BLOCK, SHARES_AT_ONCE, STRIDE
from pipeline.pruning.shape import PIECE_TOKENS, QUERY_PIECES, ModelShape

SCORING_QUERIES = 64  # about as many as methods observe
SCORE_BYTES = 3 * 4  # float32, before and after the softmax and once more on the way
PLACE_VALUES = 16  # numbers of bfloat16 that four indices take
PLACES = 64  # bytes a token of what says where it lies: its document, its position, its slot


def running_bytes(shape: ModelShape, itemsize: int, tokens: int) -> int:
    """Bytes that so many tokens need while a layer runs, beside the keys and values that are stored."""
    return tokens * activation_bytes(shape, itemsize) + piece_bytes(shape, itemsize, tokens)


def lean_bytes(shape: ModelShape, itemsize: int, tokens: int) -> int:
    """The same for a method that does not read layers: queries and attention are of a few pieces at once.

    Of all tokens there are the residual stream, which such a method copies for no one, a layer's keys and
    values, and RoPE. Of as many as are taken together there are queries, what attention makes of them by
    document and joined, and all of the former once more where tokens are gathered. In fp8 there is also the
    stream after a norm, which takes less than attention by document, gone by then.
    """
    of_all = (shape.hidden + (2 * shape.kv_heads + 2) * shape.head_dim) * itemsize + PLACES
    of_some = (shape.hidden + (3 * shape.heads + 2 * shape.kv_heads + 2) * shape.head_dim) * itemsize
    at_once = min(tokens, QUERY_PIECES * PIECE_TOKENS)
    return tokens * of_all + at_once * of_some + piece_bytes(shape, itemsize, tokens)


def choosing_bytes(shape: ModelShape, itemsize: int, longest: int) -> int:
    """Bytes of the blocks that block-sparse attention chooses, of the estimate, and of what it rounds.

    The estimate is in bfloat16, or in float32 of queries that are.
    """
    blocks = -(-longest // BLOCK)
    rows = min(blocks, QUERY_PIECES * PIECE_TOKENS // BLOCK)
    at_once = max(shape.heads * (BLOCK // STRIDE) * blocks, SHARES_AT_ONCE)
    shares = min(at_once, shape.heads * rows * (BLOCK // STRIDE) * blocks)
    are_rounded = longest >= ROUNDED_FROM and shape.head_dim == HEAD_DIM
    rounded = 2 * longest * shape.kv_heads * shape.head_dim if are_rounded else 0  # keys and values
    return min(itemsize, 4) * shares + 4 * shape.heads * rows * (blocks + 1) + rounded


def activation_bytes(shape: ModelShape, itemsize: int) -> int:
    """Bytes each token needs while a layer runs, beside what a piece of them needs for a moment.

    The residual stream as it entered the model, as it enters the layer, and of those that go on; queries and
    what attention makes of them, by document and joined; keys and values, and those picked from them or
    merged with others to be stored; RoPE, before and after tokens leave.
    """
    heads = 3 * shape.heads + 4 * shape.kv_heads + 4
    one_head_scored = SCORING_QUERIES * shape.heads // shape.kv_heads * SCORE_BYTES
    return (3 * shape.hidden + heads * shape.head_dim) * itemsize + one_head_scored


def piece_bytes(shape: ModelShape, itemsize: int, tokens: int) -> int:
    """Bytes of what linear layers need for a moment, of as many of `tokens` as they run on at once.

    Before attention that are the norm, the projection before its own norms, and the steps of RoPE. The FFN
    holds the tokens gathered for it, their norm, gate, up and their product and the sum, and beside them, if
    there is one piece only, still queries and keys before their norms. Where there are experts it holds a
    row for each token and each of its experts, as it is gathered and as it is made, and where these rows are.
    """
    qk = (shape.heads + shape.kv_heads) * shape.head_dim
    before_attention = 3 * shape.hidden + 4 * qk
    ffn = 4 * shape.hidden + qk + 3 * shape.ffn_per_token
    if shape.experts:
        ffn += shape.experts_per_token * (2 * shape.hidden + PLACE_VALUES) + 4 * shape.experts
    return min(tokens, PIECE_TOKENS) * max(before_attention, ffn) * itemsize


def mask_bytes(queries: int, seen: int, itemsize: int) -> int:
    """Bytes of a mask for so many queries, of which each sees `seen` keys: of bool, and as SDPA adds it."""
    at_once = min(queries, masked_at_once(seen))
    return at_once * (seen + at_once) * (1 + itemsize)


def merged_bytes(shape: ModelShape, queries: int, device: torch.device) -> int:
    """Bytes of the parts that attention to two ranges of keys is merged from, in float32."""
    splits = 1 if device.type == "cpu" else min(MOST_SPLITS, 1 + MOST_PROGRAMS // max(1, queries))
    return 4 * queries * 2 * splits * shape.heads * (shape.head_dim + 1)
