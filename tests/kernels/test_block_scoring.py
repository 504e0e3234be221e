"""Scores of units, blocks and heads, and the choice of blocks, against loops over one element at a time."""

from __future__ import annotations

import pytest
import torch

from pipeline.kernels import reference
from pipeline.kernels.scoring import (
    block_means,
    block_scores,
    last_query_products,
    smoothed,
    unit_keys,
    window_importance_by_head,
)
from pipeline.kernels.segments import Segments
from pipeline.kernels.select import tokens_of_blocks, top_blocks

# one token, shorter than a unit or block, an exact multiple, one more and one less than that
LENGTHS = [1, 3, 8, 16, 17, 31, 100]
DTYPES = [torch.float32, torch.bfloat16]
HEADS, KV_HEADS, HEAD_DIM = 6, 2, 16


def randoms(*sizes, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(size, generator=generator).to(dtype) for size in sizes]


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_units_key_is_the_mean_of_its_keys(length, dtype):
    (keys,) = randoms((length, KV_HEADS, HEAD_DIM), dtype=dtype)
    units = unit_keys(keys, unit=8)
    expected = [keys[start : start + 8].double().mean(0) for start in range(0, length, 8)]
    assert units.dtype == dtype
    assert units.shape == (len(expected), KV_HEADS, HEAD_DIM)
    # a mean in float64, rounded to the keys' type
    torch.testing.assert_close(units, torch.stack(expected).to(dtype))


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("units_per_block", [1, 2, 4])
def test_a_blocks_score_is_that_of_its_best_unit(length, units_per_block):
    query, units = randoms((HEADS, HEAD_DIM), (length, KV_HEADS, HEAD_DIM))
    scores = block_scores(query, units, units_per_block)
    expected = []
    for start in range(0, length, units_per_block):
        of_units = []
        for unit in units[start : start + units_per_block]:
            products = [(query[h].double() @ unit[h // 3].double()).abs() for h in range(HEADS)]
            of_units.append(sum(products) / HEADS)
        expected.append(max(of_units))
    assert scores.dtype == torch.float32
    assert scores.tolist() == pytest.approx([float(score) for score in expected], rel=1e-5)


def test_heads_that_disagree_in_sign_do_not_cancel():
    query = torch.tensor([[1.0], [-1.0]])
    assert block_scores(query, torch.tensor([[[3.0]]]), 1).tolist() == [3.0]


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("block", [1, 8, 64])
def test_a_blocks_mean_is_over_its_own_tokens(length, block):
    (scores,) = randoms((length,))
    expected = [scores[start : start + block].double().mean().item() for start in range(0, length, block)]
    assert block_means(scores, block).tolist() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("width", [1, 3, 7])
def test_a_smoothed_score_is_the_mean_of_its_neighbours_and_zeros_beyond(length, width):
    (scores,) = randoms((2, length))
    expected = torch.zeros(2, length, dtype=torch.float64)
    for row in range(2):
        for at in range(length):
            for neighbour in range(at - width // 2, at + width // 2 + 1):
                if 0 <= neighbour < length:
                    expected[row, at] += scores[row, neighbour].double() / width
    assert smoothed(scores, width).shape == scores.shape
    assert (smoothed(scores, width) - expected).abs().max() < 1e-6


@pytest.mark.parametrize("lengths", [(1,), (7, 50, 3), (40, 1)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_last_query_products_sum_over_heads_within_each_document(lengths, dtype):
    segments = Segments.of(lengths)
    total = segments.total
    queries, keys = randoms((total, HEADS, HEAD_DIM), (total, KV_HEADS, HEAD_DIM), dtype=dtype)
    expected = []
    for start, end in segments.ranges():
        for token in range(start, end):
            products = [queries[end - 1, h].double() @ keys[token, h // 3].double() for h in range(HEADS)]
            expected.append(float(sum(products)))
    products = last_query_products(queries, keys, segments)
    assert products.dtype == torch.float32
    assert products.tolist() == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("lengths", [(1,), (7, 50, 3), (129, 64, 65)])
@pytest.mark.parametrize("window", [1, 8, 64])
@pytest.mark.parametrize("dtype", DTYPES)
def test_window_importance_by_head_is_the_mean_over_the_heads_that_share_keys(lengths, window, dtype):
    segments = Segments.of(lengths)
    total = segments.total
    queries, keys = randoms((total, HEADS, HEAD_DIM), (total, KV_HEADS, HEAD_DIM), dtype=dtype)
    scores = window_importance_by_head(queries, keys, segments, window)
    assert scores.shape == (KV_HEADS, total)
    for start, end in segments.ranges():
        first = max(start, end - window)
        weights = reference.attention_weights(queries[first:end], keys[start:end], first_query=first - start)
        for head in range(KV_HEADS):
            expected = weights[3 * head : 3 * head + 3].mean(dim=(0, 1))
            assert (scores[head, start:end] - expected).abs().max() < 1e-6


@pytest.mark.parametrize("blocks", [1, 2, 3, 10])
@pytest.mark.parametrize("count", [0, 1, 2, 3, 7, 10, 20])
def test_top_blocks_are_the_best_with_the_first_and_the_last(blocks, count):
    (scores,) = randoms((blocks,))
    before = scores.clone()
    inner = sorted(range(1, blocks - 1), key=lambda block: -scores[block])[: max(0, count - 2)]
    assert top_blocks(scores, count).tolist() == sorted({0, *inner, blocks - 1})
    assert torch.equal(scores, before)


def test_of_equal_blocks_the_earlier_is_kept():
    assert top_blocks(torch.zeros(6), 4).tolist() == [0, 1, 2, 5]
    assert top_blocks(torch.tensor([9.0, 1.0, 5.0, 5.0, 5.0, 0.0]), 4).tolist() == [0, 2, 3, 5]


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("block", [1, 8, 64])
def test_tokens_of_blocks_end_where_the_document_ends(length, block):
    last = (length - 1) // block
    for kept in ({0, last}, set(range(last + 1)), {last}, {*range(0, last, 2), last}):
        tokens = tokens_of_blocks(torch.tensor(sorted(kept)), block, length)
        assert tokens.tolist() == [token for token in range(length) if token // block in kept]
