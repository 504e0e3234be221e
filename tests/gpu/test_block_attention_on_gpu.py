"""Block-sparse attention by the kernel for Hopper, against plain torch in float64."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import in_eight_bits

from pipeline.kernels import modules, sparse
from pipeline.kernels.attention import SdpaAttention
from pipeline.kernels.blocks import block_attention, rounded_keys
from pipeline.kernels.blocks.block_attention import block_sparse_attention
from pipeline.kernels.segments import Segments
from pipeline.kernels.sparse import BLOCK, BlockLists, choose_blocks
from pipeline.kernels.sparse_prefill import SparsePrefill

hopper_attention = pytest.importorskip("pipeline.kernels.blocks.hopper_attention", exc_type=ImportError)
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


@pytest.fixture(params=[False, True], ids=["16 bits", "8 bits"])
def rounded(request, monkeypatch):
    """Whether keys and values are rounded, however few."""
    monkeypatch.setattr(rounded_keys, "ROUNDED_FROM", 1 if request.param else 1 << 40)
    return request.param


def qkv(tokens, head_dim, heads=4, kv_heads=2):
    generator = torch.Generator().manual_seed(tokens)
    joined = torch.randn(tokens, heads + 2 * kv_heads, head_dim, generator=generator).to(
        "cuda", torch.bfloat16
    )
    return joined.split((heads, kv_heads, kv_heads), dim=1)


def random_lists(heads, tokens, share=0.5):
    """With so much of the blocks; `share` may be a tensor, of each head and row."""
    rows = -(-tokens // BLOCK)
    generator = torch.Generator().manual_seed(0)
    kept = torch.rand(heads, rows, rows, generator=generator) < share
    kept = (kept | torch.eye(rows, dtype=torch.bool)) & torch.ones(rows, rows, dtype=torch.bool).tril()
    return sparse._lists(kept.cuda())


def expected(q, k, v, blocks, sinks=None):
    """(Q, H, d) float64 on the CPU, of what is rounded where the kernel rounds it."""
    if hopper_attention.rounds(k, blocks, sinks):
        return in_eight_bits(q, k, v, blocks).cpu()
    return in_16_bits(q, k, v, blocks, sinks)


def in_16_bits(q, k, v, blocks, sinks=None):
    if blocks.indices is None:
        rows = slice(blocks.before, blocks.before + blocks.counts.shape[1])
        near = sparse._near(rows, -(-len(k) // BLOCK), torch.device("cpu"))
        blocks = sparse._lists(near.expand(q.shape[1], -1, -1), blocks.before)
    on_host = BlockLists(blocks.indices.cpu(), blocks.counts.cpu(), blocks.before)
    q, k, v = (x.cpu().double() for x in (q, k, v))
    return block_attention._plain(q, k, v, on_host, None if sinks is None else sinks.cpu().double(), BLOCK)


def gap(found, wanted):
    return (found.cpu().double() - wanted).abs().max().item()


def agrees(found, wanted, *, rounded=False):
    """In eight bits a weight between two of e4m3, which lie up to an eighth apart, may become the other."""
    if not rounded:
        return gap(found, wanted) < 0.02
    return gap(found, wanted) < 0.1 and (found.cpu().double() - wanted).abs().mean() < 0.001


@pytest.mark.parametrize(
    ("head_dim", "rounded"), [(64, False), (128, False), (128, True), (256, False)], indirect=["rounded"]
)
@pytest.mark.parametrize("tokens", [1, 128, 300, 2048, 2500])
def test_it_gives_what_plain_torch_does(told, rounded, tokens, head_dim):
    q, k, v = qkv(tokens, head_dim)
    blocks = random_lists(4, tokens)
    found = block_sparse_attention(q, k, v, blocks)
    assert len(told) == 1
    assert not told[0].any()
    assert agrees(found, expected(q, k, v, blocks), rounded=rounded)


@pytest.mark.parametrize("mass", [0.0, 0.5])
@pytest.mark.parametrize("sinks", [None, (0.5, -1.0, 3.0, 200.0)])
def test_sinks_pieces_and_rows_left_out(told, rounded, mass, sinks):
    tokens, first, end = 3000, 8 * BLOCK, 20 * BLOCK
    q, k, v = qkv(tokens, 128)
    sinks = None if sinks is None else torch.tensor(sinks, device="cuda")
    blocks = choose_blocks(q[first:end], k, mass, 8)
    rounded = rounded and mass > 0 and sinks is None
    assert hopper_attention.rounds(k, blocks, sinks) == rounded
    found = block_sparse_attention(q[first:end], k, v, blocks, left_out=2, sinks_H=sinks)
    done = end - first - 2 * BLOCK
    assert len(told) == 1
    wanted = expected(q[first:end], k, v, blocks, sinks)
    assert agrees(found[:done], wanted[:done], rounded=rounded)


@pytest.mark.parametrize("mass", [0.0, 0.5])
def test_blocks_that_attend_to_everything_are_done_beside_the_others(told, rounded, mass):
    """But for those whose keys would be rounded: these are left to whole attention, of exact products."""
    segments = Segments.of((3000, 20, 2100), torch.device("cuda"))
    q, k, v = qkv(segments.total, 128, heads=8)  # more blocks of queries than multiprocessors
    left = []

    class Noted(SdpaAttention):
        def decode(self, q, *rest):
            left.append(len(q))
            return super().decode(q, *rest)

    noted = Noted()
    noted.sparse_from = 300
    found, _ = SparsePrefill(noted, segments, 1024).attend(q, k, v, mass)
    assert left == ([56 + BLOCK + 52 + BLOCK] if rounded and mass else [])
    assert len(told) == 2
    for start, end in (segments.ranges()[0], segments.ranges()[2]):
        part = q[start:end], k[start:end], v[start:end]
        whole = in_16_bits(*part, choose_blocks(*part[:2], 1.0))
        asked = (end - start) % BLOCK + BLOCK
        assert gap(found[end - asked : end], whole[-asked:]) < 0.02
        sparsely = expected(*part, choose_blocks(*part[:2], mass))
        assert agrees(found[start : end - asked], sparsely[:-asked], rounded=rounded and mass > 0)


def test_one_head_of_many_rows_and_many_heads_of_one(told, rounded):
    for tokens, heads in ((140 * BLOCK, 1), (BLOCK, 300)):
        q, k, v = qkv(tokens, 128, heads=heads, kv_heads=1)
        blocks = random_lists(heads, tokens, 0.05)
        found = block_sparse_attention(q, k, v, blocks)
        assert agrees(found, expected(q, k, v, blocks), rounded=rounded)


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


def test_numbers_that_are_none_stay_none(told, rounded):
    q, k, v = (x.clone() for x in qkv(700, 128))
    q[300, 1] = float("nan")
    found = block_sparse_attention(q, k, v, random_lists(4, 700))
    bad = torch.isnan(found).any(-1)
    assert bad[300, 1]
    assert bad.sum() == 1


def test_every_work_is_done_once_however_long_it_takes(told, rounded):
    """Over a thousand works of many lengths, which are taken by whoever is free, again and again."""
    tokens, heads = 70 * BLOCK + 5, 16
    q, k, v = qkv(tokens, 128, heads=heads, kv_heads=4)
    generator = torch.Generator().manual_seed(1)
    share = torch.rand(heads, 71, 1, generator=generator) ** 4  # from nearly all to hardly any
    blocks = random_lists(heads, tokens, share)
    wanted = expected(q, k, v, blocks)
    for _ in range(20):
        assert agrees(block_sparse_attention(q, k, v, blocks), wanted, rounded=rounded)
    assert not any(each.any() for each in told)


@pytest.mark.parametrize("rounded", [True], indirect=True)
@pytest.mark.parametrize("tokens", [2048, 131_072])
def test_values_of_one_sign_are_summed_up_to_as_many_as_there_are(told, rounded, tokens):
    """Sums of products in e4m3 are cut off, if they are long: what comes of a tile is added in float32."""
    q, k, v = qkv(tokens, 128, heads=2, kv_heads=1)
    v, asked = v.abs() + 1, q[-3 * BLOCK :]
    blocks = choose_blocks(asked, k, 1.0, tokens // BLOCK - 3)
    found, wanted = block_sparse_attention(asked, k, v, blocks), in_16_bits(asked, k, v, blocks)
    assert not told[0].any()
    assert (found.cpu() - wanted).abs().mean() < 0.004  # of about 1.8, in bfloat16
    assert abs((found.cpu() - wanted).mean()) < 0.0005


@pytest.mark.parametrize("rounded", [True], indirect=True)
def test_rounding_loses_little_of_keys_with_wide_channels(told, rounded):
    q, k, v = (x.clone() for x in qkv(3000, 128))
    k[..., 5] = k[..., 5] * 40 + 100
    q[..., 5] /= 10
    blocks = random_lists(4, 3000)
    found, wanted = block_sparse_attention(q, k, v, blocks), in_16_bits(q, k, v, blocks)
    assert not told[0].any()
    assert (found.cpu() - wanted).abs().mean() < 0.006
    assert agrees(found, expected(q, k, v, blocks), rounded=True)


@pytest.mark.parametrize("rounded", [True], indirect=True)
def test_a_head_that_rounding_would_harm_is_computed_again(told, rounded):
    """Its largest keys leave the others next to nothing."""
    q, k, v = (x.clone() for x in qkv(2000, 128))
    k[900:903, 1] *= 300
    blocks = random_lists(4, 2000)
    found = block_sparse_attention(q, k, v, blocks)
    assert told[0][2:].all()
    assert not told[0][:2].any()
    wanted = in_16_bits(q, k, v, blocks)
    assert gap(found[:, 2:], wanted[:, 2:]) < 0.1
    assert agrees(found[:, :2], in_eight_bits(q, k, v, blocks).cpu()[:, :2], rounded=True)


@pytest.mark.parametrize("of", ["keys", "values"])
def test_what_is_no_number_harms_those_who_see_it(told, rounded, of):
    """Of what is rounded the whole head is computed again."""
    q, k, v = (x.clone() for x in qkv(900, 128))
    (k if of == "keys" else v)[500, 1, 3] = float("nan")
    before = 500 if of == "keys" else 500 // BLOCK * BLOCK  # a weight of 0 does not take a value out
    found = block_sparse_attention(q, k, v, random_lists(4, 900, 1.0))
    assert bool(told[0][2:].all()) == rounded
    assert torch.isnan(found[500:, 2:, 3]).all()
    assert of == "values" or torch.isnan(found[500:, 2:]).all()
    assert torch.isfinite(found[:before]).all()
    assert torch.isfinite(found[:, :2]).all()
