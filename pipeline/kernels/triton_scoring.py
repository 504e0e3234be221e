"""Window scoring in Triton: two passes over the keys, and no matrix of weights in memory.

Imported only where Triton is: importing this module fails without it. The first pass leaves, for each query
of a window and each block of keys, the logarithm of the block's sum of exponentials; a small kernel adds up
a document's blocks; the second pass computes the products anew and sums the weights they make. Logarithms
and exponentials are to base 2, and the scale of the products includes the change of base.

The queries of a key/value head's window are numbered head by head: G * W rows, for G query heads that share
keys and W the document's window. What the kernels hand on is flat and ragged, as the documents are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate

import torch
import triton
import triton.language as tl
from torch import Tensor

from pipeline.kernels.modules import power_of_two
from pipeline.kernels.segments import Segments, on_device
from pipeline.kernels.triton_parts import larger, plus

KEYS = 128  # of a block, which its program holds while it goes through the window
ROWS = 64  # of the window at a time
WIDE_HEAD, WIDE_KEYS = 256, 64  # beyond half of it fewer, or they outgrow a small GPU's shared memory
FLOAT32_KEYS, FLOAT32_ROWS = 32, 16  # whose products keep both factors in registers, in two parts each
ROWS_OF_PROGRAM = 1024  # of the window, in the first pass: several programs go through a longer one
FEWEST = 16  # rows or dimensions that Triton multiplies
ADDED_BLOCKS, ADDED_ROWS = 64, 16  # that a program adds up at a time
DOCUMENTS = 1024  # among which a program looks for its own at a time
UNSEEN: tl.constexpr = tl.constexpr(-3e38)  # finite: a block that a query does not see must not make NaN


def window_attention(
    q_THd: Tensor,
    k_TKd: Tensor,
    segments: Segments,
    windows: Sequence[int],
    *,
    largest: bool,
    by_head: bool = False,
    decay: float = 1.0,
    absent: int = 0,
    apart: Sequence[int] | None = None,
) -> Tensor:
    """(K, T) float32 attention of each document's last `windows[b]` queries, mean over them.

    Of the query heads that share keys the mean, or the largest, or with `by_head` each, (H, T). Heads are of
    up to 256 dimensions. Three launches, whatever the documents; float32 is multiplied on tensor cores too,
    as three products of parts. Each query counts `decay` times as much as the one after it. The queries of
    the first `absent` tokens are not there.

    With `apart` the queries of document b are its last token and those `apart[b]`, 2 * `apart[b]`, ... before
    it. Of each of them what a key gets counts as often as the query has keys, and only if the key stands at
    least `apart[b]` tokens before it: see `scoring.received_attention`.
    """
    (tokens, kv_heads), (_, heads, head_dim) = k_TKd.shape[:2], q_THd.shape
    group, widest = heads // kv_heads, max(windows)  # as asked for: a short document compiles nothing anew
    keys, most_rows = _tile(q_THd.dtype, head_dim)
    rows, joint_rows = (power_of_two(count, FEWEST, most_rows) for count in (widest, group * widest))
    judged, apart = apart is not None, tuple(apart or (1,) * len(segments))
    table, blocks, partials, queries = _table(segments.lengths, tuple(windows), apart, keys, segments.device)
    partial_logs, logs, sums_KT = (
        torch.empty(shape, dtype=torch.float32, device=q_THd.device)
        for shape in (partials * heads, queries * heads, (heads if by_head else kv_heads, tokens))
    )
    inputs = (
        *(q_THd, *q_THd.stride()[:2], k_TKd, *k_TKd.stride()[:2], head_dim, kv_heads, group),
        *(math.log2(math.e) / math.sqrt(head_dim), table, len(segments), absent),
    )
    sizes = {"KEYS": keys, "DIM": power_of_two(head_dim, FEWEST), "DOCUMENTS": DOCUMENTS, "num_stages": 2}
    partial_sums_kernel[(blocks, kv_heads, -(-group * widest // ROWS_OF_PROGRAM))](
        *(*inputs, partial_logs),
        **sizes,
        ROWS=joint_rows,
        ROWS_OF_PROGRAM=ROWS_OF_PROGRAM,
        num_warps=8 if joint_rows == ROWS else 4,
    )
    added = {"KEYS": keys, "BLOCKS": ADDED_BLOCKS, "ROWS": ADDED_ROWS}
    grid = (len(segments), kv_heads, -(-group * widest // ADDED_ROWS))
    added_sums_kernel[grid](partial_logs, table, len(segments), kv_heads, group, logs, **added)
    given = (*inputs, logs, sums_KT, tokens, math.log2(decay))
    options = {"LARGEST": largest, "BY_HEAD": by_head, "JUDGED": judged}
    weights_kernel[(blocks, kv_heads, group if by_head else 1)](*given, **sizes, ROWS=rows, **options)
    return sums_KT


def _tile(dtype: torch.dtype, head_dim: int) -> tuple[int, int]:
    """Keys of a block, and most rows of the window at a time."""
    if dtype == torch.float32:
        return FLOAT32_KEYS, FLOAT32_ROWS
    return (WIDE_KEYS if head_dim > WIDE_HEAD // 2 else KEYS), ROWS


@lru_cache(maxsize=4)  # the layers of a prefill mostly see the same documents
def _table(
    lengths: tuple[int, ...],
    windows: tuple[int, ...],
    apart: tuple[int, ...],
    keys: int,
    device: torch.device,
) -> tuple[Tensor, int, int, int]:
    """(7, B) int32 that the kernels find documents in, and the sums of its columns 0, 4 and 5.

    First block of keys, first token, length, window, first of the partial sums and first of the queries,
    these two counted for one query head, and how many tokens each query stands before the next.
    """
    places = [-(-length // step) for length, step in zip(lengths, apart, strict=True)]
    seen = [min(window, count) for window, count in zip(windows, places, strict=True)]
    blocks = [-(-length // keys) for length in lengths]
    firsts, starts, partials, queries = (
        list(accumulate(counts, initial=0))
        for counts in (blocks, lengths, (n * window for n, window in zip(blocks, seen, strict=True)), seen)
    )
    columns = (firsts[:-1], starts[:-1], lengths, seen, partials[:-1], queries[:-1], apart)
    return on_device(columns, device, torch.int32), firsts[-1], partials[-1], queries[-1]


@triton.jit(do_not_specialize=["documents", "absent"])
def partial_sums_kernel(  # type: ignore[no-untyped-def]
    q,
    q_token_stride,
    q_head_stride,
    k,
    k_token_stride,
    k_head_stride,
    head_dim,
    kv_heads,
    group,
    scale,
    table,
    documents,
    absent,
    partial_logs,
    KEYS: tl.constexpr,
    DIM: tl.constexpr,
    DOCUMENTS: tl.constexpr,
    ROWS: tl.constexpr,
    ROWS_OF_PROGRAM: tl.constexpr,
):
    """The first pass: each program takes one block of keys of one head, and some rows of the window."""
    block, kv_head = tl.program_id(0), tl.program_id(1)
    document = _document_of(block, table, documents, DOCUMENTS)
    first_block, start, length, window = _document(table, documents, document)
    key = (block - first_block) * KEYS + tl.arange(0, KEYS)
    keys = _vectors(k, k_token_stride, k_head_stride, head_dim, start + key, kv_head, key < length, DIM)
    count, apart = group * window, tl.load(table + 6 * documents + document)
    partial = tl.load(table + 4 * documents + document).to(tl.int64) + (block - first_block) * window
    out = partial_logs + (partial * kv_heads + kv_head * window) * group
    first_of_program = tl.program_id(2) * ROWS_OF_PROGRAM
    for first_row in range(first_of_program, tl.minimum(count, first_of_program + ROWS_OF_PROGRAM), ROWS):
        row = first_row + tl.arange(0, ROWS)
        query = length - 1 - (window - 1 - row % window) * apart
        head = kv_head * group + row // window
        at = start + query - absent
        queries = _vectors(q, q_token_stride, q_head_stride, head_dim, at, head, row < count, DIM)
        products = tl.dot(queries, tl.trans(keys), input_precision="tf32x3") * scale
        products = tl.where(key[None, :] <= query[:, None], products, UNSEEN)
        highest = tl.reduce(products, 1, larger)
        total = tl.reduce(tl.exp2(products - highest[:, None]), 1, plus)
        tl.store(out + row, highest + tl.log2(total), mask=row < count)


@triton.jit(do_not_specialize=["documents"])
def added_sums_kernel(  # type: ignore[no-untyped-def]
    partial_logs,
    table,
    documents,
    kv_heads,
    group,
    logs,
    KEYS: tl.constexpr,
    BLOCKS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Each program adds up all blocks of one document, for some queries that share keys."""
    document, kv_head = tl.program_id(0), tl.program_id(1)
    _, _, length, window = _document(table, documents, document)
    count = group * window
    row = tl.program_id(2) * ROWS + tl.arange(0, ROWS)
    partial = tl.load(table + 4 * documents + document).to(tl.int64)
    highest = tl.full([ROWS], UNSEEN, tl.float32)
    total = tl.full([ROWS], 0, tl.float32)
    blocks = (length + KEYS - 1) // KEYS
    for first_block in range(0, blocks, BLOCKS):
        block = first_block + tl.arange(0, BLOCKS)
        start = ((partial + block * window) * kv_heads + kv_head * window) * group
        inside = (block < blocks)[:, None] & (row < count)[None, :]
        part = tl.load(partial_logs + start[:, None] + row[None, :], mask=inside, other=UNSEEN)
        higher = tl.maximum(highest, tl.reduce(part, 0, larger))
        total = total * tl.exp2(highest - higher) + tl.reduce(tl.exp2(part - higher[None, :]), 0, plus)
        highest = higher
    query = tl.load(table + 5 * documents + document).to(tl.int64)
    out = logs + (query * kv_heads + kv_head * window) * group
    tl.store(out + row, highest + tl.log2(total), mask=row < count)


@triton.jit(do_not_specialize=["documents", "absent", "tokens"])
def weights_kernel(  # type: ignore[no-untyped-def]
    q,
    q_token_stride,
    q_head_stride,
    k,
    k_token_stride,
    k_head_stride,
    head_dim,
    kv_heads,
    group,
    scale,
    table,
    documents,
    absent,
    logs,
    sums,
    tokens,
    decay,
    KEYS: tl.constexpr,
    DIM: tl.constexpr,
    DOCUMENTS: tl.constexpr,
    ROWS: tl.constexpr,
    LARGEST: tl.constexpr,
    BY_HEAD: tl.constexpr,
    JUDGED: tl.constexpr,
):
    """The second pass: each program takes one block of keys of one head; a tile never spans query heads.

    With `BY_HEAD` it takes one of the query heads that share them.
    `decay` is the logarithm of what a query counts less than the one after it.
    The keys come first in the product here, so that a sum over queries stays within a few threads.
    """
    block, kv_head = tl.program_id(0), tl.program_id(1)
    document = _document_of(block, table, documents, DOCUMENTS)
    first_block, start, length, window = _document(table, documents, document)
    key = (block - first_block) * KEYS + tl.arange(0, KEYS)
    keys = _vectors(k, k_token_stride, k_head_stride, head_dim, start + key, kv_head, key < length, DIM)
    log_start = tl.load(table + 5 * documents + document).to(tl.int64)
    head_logs = logs + (log_start * kv_heads + kv_head * window) * group
    apart = tl.load(table + 6 * documents + document)
    tiles = (window + ROWS - 1) // ROWS
    first_head, heads = (tl.program_id(2), 1) if BY_HEAD else (0, group)
    total = tl.full([KEYS], 0, tl.float32)
    head_total = total
    for tile in range(first_head * tiles, (first_head + heads) * tiles):
        head, row = tile // tiles, tile % tiles * ROWS + tl.arange(0, ROWS)
        inside = row < window
        query = length - 1 - (window - 1 - row) * apart
        at = start + query - absent
        queries = _vectors(
            q, q_token_stride, q_head_stride, head_dim, at, kv_head * group + head, inside, DIM
        )
        log = tl.load(head_logs + head * window + row, mask=inside, other=0)
        products = tl.dot(keys, tl.trans(queries), input_precision="tf32x3") * scale
        seen = (key[:, None] <= query[None, :]) & inside[None, :]
        log -= decay * (window - 1 - row)
        if JUDGED:
            seen &= key[:, None] <= query[None, :] - apart
            log -= tl.log2((query + 1).to(tl.float32))
        weights = tl.reduce(tl.exp2(tl.where(seen, products, UNSEEN) - log[None, :]), 1, plus)
        if LARGEST:
            # a head's sum only grows from tile to tile, so it may be compared before it is complete
            head_total = tl.where(tile % tiles == 0, 0.0, head_total) + weights
            total = tl.maximum(total, head_total)
        else:
            total += weights
    share = total / window if LARGEST or BY_HEAD else total / (group * window)
    place = kv_head * group + first_head if BY_HEAD else kv_head
    tl.store(sums + place.to(tl.int64) * tokens + start + key, share, mask=key < length)


@triton.jit
def _document_of(block, table, documents, DOCUMENTS: tl.constexpr):  # type: ignore[no-untyped-def]
    """The last document that begins at `block` or before."""
    begun = 0
    for first in range(0, documents, DOCUMENTS):
        at = first + tl.arange(0, DOCUMENTS)
        first_block = tl.load(table + at, mask=at < documents, other=2147483647)
        begun += tl.reduce((first_block <= block).to(tl.int32), 0, plus)
    return begun - 1


@triton.jit
def _document(table, documents, document):  # type: ignore[no-untyped-def]
    """Its first block, first token, length and window."""
    at = table + document
    first_token = tl.load(at + documents).to(tl.int64)
    return tl.load(at), first_token, tl.load(at + 2 * documents), tl.load(at + 3 * documents)


@triton.jit
def _vectors(x, token_stride, head_stride, head_dim, token, head, inside, DIM: tl.constexpr):  # type: ignore[no-untyped-def]
    """(tokens, DIM) of a head, or of a head a token, zeros beyond."""
    at = tl.arange(0, DIM)
    places = (token * token_stride + head * head_stride)[:, None] + at[None, :]
    return tl.load(x + places, mask=inside[:, None] & (at < head_dim)[None, :], other=0)
