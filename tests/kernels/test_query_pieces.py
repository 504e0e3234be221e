"""Attention a piece of the queries at a time against all of them together."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import reduce_by_halves

from pipeline.kernels import sparse
from pipeline.kernels.attention import SdpaAttention
from pipeline.kernels.blocks import block_attention
from pipeline.kernels.blocks.block_attention import block_sparse_attention
from pipeline.kernels.query_pieces import QueryPart, query_pieces
from pipeline.kernels.segments import Segments
from pipeline.kernels.sparse import BLOCK, choose_blocks
from pipeline.kernels.sparse_prefill import SparsePrefill


def qkv(tokens, heads=4, kv_heads=2, head_dim=16, dtype=torch.float64):
    generator = torch.Generator().manual_seed(tokens)
    return [
        torch.randn(tokens, n, head_dim, generator=generator, dtype=dtype) * scale
        for n, scale in ((heads, 4), (kv_heads, 1), (kv_heads, 1))
    ]


@pytest.mark.parametrize("lengths", [(1000,), (90, 700, 20, 300), (256, 256, 256), (5,)])
@pytest.mark.parametrize("most", [40, 128, 300, 4096])
def test_pieces_hold_each_token_once_and_in_order(lengths, most):
    segments = Segments.of(lengths)
    pieces = query_pieces(segments, most)
    held = [i for piece in pieces for i in range(piece.rows.start, piece.rows.stop)]
    assert held == list(range(sum(lengths)))
    assert max(piece.tokens for piece in pieces) <= most
    for piece in pieces:
        for part, rows in piece.placed():
            assert piece.start + rows.start == segments.offsets[part.document] + part.first
            assert part.first % BLOCK == 0 or most < BLOCK
    if sum(lengths) <= most:
        assert pieces[0].parts == tuple(QueryPart(b, 0, n) for b, n in enumerate(lengths))


@pytest.mark.parametrize("mass", [0.0, 0.4, 0.9])
@pytest.mark.parametrize("lengths", [(1000,), (500, 70, 130, 700, 257)])
def test_pieces_attend_as_the_whole(mass, lengths):
    """Long documents by blocks, short ones whole, of which one is cut too."""
    backend, segments = SdpaAttention(), Segments.of(lengths)
    backend.sparse_from = 300
    q, k, v = qkv(segments.total)
    whole = SparsePrefill(backend, segments, 64)
    expected, pairs = whole.attend(q, k, v, mass)
    pieces = query_pieces(segments, BLOCK)
    assert len(pieces) > len(lengths)
    made = [whole.attend_piece(piece, q[piece.rows], k, v, mass) for piece in pieces]
    assert (torch.cat([attended for attended, _ in made]) - expected).abs().max() < 1e-12
    assert torch.equal(whole.pairs(sum(listed for _, listed in made), 4), pairs)


@pytest.mark.parametrize("window", [None, 50])
def test_pieces_of_whole_attention(window):
    backend, segments = SdpaAttention(), Segments.of((400, 30, 170))
    q, k, v = qkv(segments.total)
    sinks = torch.tensor([0.5, -1.0, 2.0, 0.0])
    expected = backend.prefill(q, k, v, segments, window, sinks)
    parts = [
        backend.prefill_piece(q[piece.rows], k, v, segments, piece, window, sinks)
        for piece in query_pieces(segments, 70)
    ]
    assert len(parts) > 3
    assert (torch.cat(parts) - expected).abs().max() < 1e-12


@pytest.mark.skipif(torch.cuda.is_available(), reason="runs the interpreter")
@pytest.mark.parametrize("at_once", [1 << 15, 16])
def test_the_kernels_choose_and_attend_from_any_block_on(monkeypatch, at_once):
    """With few shares in registers at once they look at one stride of queries after the other."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # read when the kernels' module is imported
    pytest.importorskip("triton")
    from triton.runtime import interpreter

    from pipeline.kernels import triton_sparse
    from pipeline.kernels.blocks import triton_attention

    q, k, v = qkv(700, heads=2, kv_heads=1, dtype=torch.float32)
    expected = choose_blocks(q, k, 0.5)
    attended = block_sparse_attention(q, k, v, expected)
    monkeypatch.setattr(interpreter.ReduceOps, "generic_reduce", reduce_by_halves)
    monkeypatch.setattr(sparse, "_kernels", lambda x: triton_sparse)
    monkeypatch.setattr(block_attention, "_kernels", lambda x: triton_attention)
    monkeypatch.setattr(sparse, "CAPACITY", 16)
    monkeypatch.setattr(sparse, "CHOSEN_AT_ONCE", at_once)
    for first, end in ((0, 256), (256, 640), (640, 700)):
        rows = slice(first // BLOCK, -(-end // BLOCK))
        for mass in (0.5, 0.0):
            got = choose_blocks(q[first:end], k, mass, rows.start)
            if mass:
                assert torch.equal(got.indices, expected.indices[:, rows])
                assert torch.equal(got.counts, expected.counts[:, rows])
                part = block_sparse_attention(q[first:end], k, v, got)
                assert (part - attended[first:end]).abs().max() < 1e-5
            else:
                block = torch.arange(rows.start, rows.stop) + 1
                near = torch.where(block > 6 - sparse.WHOLE_ROWS, block, block.clamp(max=3))
                assert got.counts.tolist() == near.repeat(2, 1).tolist()
