"""Block-sparse attention by the kernel for Hopper, against plain torch in float64."""

from __future__ import annotations

import pytest
import torch

from pipeline.kernels import modules, sparse
from pipeline.kernels.blocks import block_attention
from pipeline.kernels.blocks.block_attention import block_sparse_attention
from pipeline.kernels.sparse import BLOCK, BlockLists, choose_blocks

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture
def told(monkeypatch):
    """What the kernel told to be computed again, of each call."""
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs a Hopper GPU")
    hopper = modules.kernels_for(torch.empty(1, device="cuda"), "blocks.hopper_attention")
    assert hopper is not None, "Triton here is not one that it is written for"
    calls, attend = [], hopper.attend

    def recorded(*arguments):
        calls.append(attend(*arguments))
        return calls[-1]

    monkeypatch.setattr(hopper, "attend", recorded)
    return calls


def qkv(tokens, head_dim, heads=4, kv_heads=2):
    generator = torch.Generator().manual_seed(tokens)
    joined = torch.randn(tokens, heads + 2 * kv_heads, head_dim, generator=generator).to(
        "cuda", torch.bfloat16
    )
    return joined.split((heads, kv_heads, kv_heads), dim=1)


def random_lists(heads, tokens, share=0.5):
    rows = -(-tokens // BLOCK)
    generator = torch.Generator().manual_seed(0)
    kept = torch.rand(heads, rows, rows, generator=generator) < share
    kept = (kept | torch.eye(rows, dtype=torch.bool)) & torch.ones(rows, rows, dtype=torch.bool).tril()
    return sparse._lists(kept.cuda())


def expected(q, k, v, blocks, sinks=None):
    """(Q, H, d) float64 on the CPU."""
    if blocks.indices is None:
        rows = slice(blocks.before, blocks.before + blocks.counts.shape[1])
        near = sparse._near(rows, -(-len(k) // BLOCK), torch.device("cpu"))
        blocks = sparse._lists(near.expand(q.shape[1], -1, -1), blocks.before)
    on_host = BlockLists(blocks.indices.cpu(), blocks.counts.cpu(), blocks.before)
    q, k, v = (x.cpu().double() for x in (q, k, v))
    return block_attention._plain(q, k, v, on_host, None if sinks is None else sinks.cpu().double(), BLOCK)


def gap(found, wanted):
    return (found.cpu().double() - wanted).abs().max().item()


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("tokens", [1, 128, 300, 2048, 2500])
def test_it_gives_what_plain_torch_does(told, tokens, head_dim):
    q, k, v = qkv(tokens, head_dim)
    blocks = random_lists(4, tokens)
    found = block_sparse_attention(q, k, v, blocks)
    assert len(told) == 1
    assert not told[0].any()
    assert gap(found, expected(q, k, v, blocks)) < 0.02


@pytest.mark.parametrize("mass", [0.0, 0.5])
def test_sinks_pieces_and_rows_left_out(told, mass):
    tokens, first, end = 3000, 8 * BLOCK, 20 * BLOCK
    q, k, v = qkv(tokens, 128)
    sinks = torch.tensor([0.5, -1.0, 3.0, 200.0], device="cuda")
    blocks = choose_blocks(q[first:end], k, mass, 8)
    found = block_sparse_attention(q[first:end], k, v, blocks, left_out=2, sinks_H=sinks)
    done = end - first - 2 * BLOCK
    assert len(told) == 1
    assert gap(found[:done], expected(q[first:end], k, v, blocks, sinks)[:done]) < 0.02


def test_one_head_of_many_rows_and_many_heads_of_one(told):
    for tokens, heads in ((140 * BLOCK, 1), (BLOCK, 300)):
        q, k, v = qkv(tokens, 128, heads=heads, kv_heads=1)
        blocks = random_lists(heads, tokens, 0.05)
        assert gap(block_sparse_attention(q, k, v, blocks), expected(q, k, v, blocks)) < 0.02


def test_scores_far_above_those_of_the_own_block_are_computed_again(told):
    """Those of keys in the middle, of which some queries are so fond that a fixed maximum would overflow."""
    tokens = 2048
    q, k, v = (x.clone() for x in qkv(tokens, 128))
    k[640:768] *= 90
    blocks = random_lists(4, tokens)
    found = block_sparse_attention(q, k, v, blocks)
    assert told[0].any()
    assert not told[0].all()
    assert torch.isfinite(found).all()
    assert gap(found, expected(q, k, v, blocks)) < 0.1


def test_numbers_that_are_none_stay_none(told):
    q, k, v = (x.clone() for x in qkv(700, 128))
    q[300, 1] = float("nan")
    found = block_sparse_attention(q, k, v, random_lists(4, 700))
    bad = torch.isnan(found).any(-1)
    assert bad[300, 1]
    assert bad.sum() == 1
