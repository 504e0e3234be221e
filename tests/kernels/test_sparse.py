"""Block-sparse attention: kernels against plain torch, and which blocks are chosen."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import reduce_by_halves

from pipeline.kernels import reference, sparse
from pipeline.kernels.attention import SdpaAttention, choose_attention
from pipeline.kernels.blocks import block_attention
from pipeline.kernels.blocks.block_attention import block_sparse_attention
from pipeline.kernels.devices import is_hopper
from pipeline.kernels.segments import Segments
from pipeline.kernels.sparse import BLOCK, choose_blocks
from pipeline.kernels.sparse_prefill import SparsePrefill

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"


@pytest.fixture
def kernels(monkeypatch):
    """Has the public functions launch their kernels."""
    if GPU:
        return
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # read when the kernels' module is imported
    pytest.importorskip("triton")
    from triton.runtime import interpreter

    from pipeline.kernels import triton_sparse
    from pipeline.kernels.blocks import triton_attention

    monkeypatch.setattr(interpreter.ReduceOps, "generic_reduce", reduce_by_halves)
    monkeypatch.setattr(sparse, "_kernels", lambda x: triton_sparse)
    monkeypatch.setattr(block_attention, "_kernels", lambda x: triton_attention)
    monkeypatch.setattr(sparse, "CAPACITY", 16)  # of blocks, each of which takes the interpreter's time


@pytest.fixture
def plain(monkeypatch):
    monkeypatch.setattr(sparse, "_kernels", lambda x: None)
    monkeypatch.setattr(block_attention, "_kernels", lambda x: None)


def qkv(tokens, head_dim=16, heads=2, kv_heads=1, dtype=torch.float32, seed=0):
    """Views of one joined projection."""
    generator = torch.Generator().manual_seed(tokens + seed)
    joined = torch.randn(tokens, heads + 2 * kv_heads, head_dim, generator=generator).to(DEVICE, dtype)
    return joined.split((heads, kv_heads, kv_heads), dim=1)


def masked_reference(q, k, v, blocks, size=BLOCK):
    """(T, H, d) float64, from a mask of all pairs."""
    tokens, heads, head_dim = q.shape
    group = heads // k.shape[1]
    k_HTd, v_HTd = (x.double().transpose(0, 1).repeat_interleave(group, dim=0) for x in (k, v))
    scores = q.double().transpose(0, 1) @ k_HTd.transpose(1, 2) / head_dim**0.5
    place = torch.arange(tokens, device=q.device)
    seen = torch.zeros_like(scores, dtype=torch.bool)
    for head in range(heads):
        for row in range(blocks.counts.shape[1]):
            for block in blocks.indices[head, row, : blocks.counts[head, row]].tolist():
                seen[head, row * size : (row + 1) * size, block * size : (block + 1) * size] = True
    seen &= place[None, :] <= place[:, None]
    return (scores.masked_fill(~seen, float("-inf")).softmax(-1) @ v_HTd).transpose(0, 1), seen


def random_lists(heads, tokens, seed=0, size=BLOCK):
    rows = -(-tokens // size)
    generator = torch.Generator().manual_seed(seed)
    kept = torch.rand(heads, rows, rows, generator=generator) < 0.4
    kept = (kept | torch.eye(rows, dtype=torch.bool)) & torch.ones(rows, rows, dtype=torch.bool).tril()
    return sparse._lists(kept.to(DEVICE))


@pytest.mark.parametrize("tokens", [1, 130, 700])
@pytest.mark.parametrize(("head_dim", "heads", "kv_heads"), [(16, 2, 1), (24, 4, 2)])
def test_plain_attention_is_that_of_the_blocks_alone(plain, tokens, head_dim, heads, kv_heads):
    q, k, v = qkv(tokens, head_dim, heads, kv_heads)
    blocks = random_lists(heads, tokens)
    expected, _ = masked_reference(q, k, v, blocks)
    assert (block_sparse_attention(q, k, v, blocks) - expected).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("tokens", "head_dim", "heads", "kv_heads"),
    [(1, 16, 2, 1), (400, 24, 2, 1), (200, 16, 6, 2), (150, 256, 2, 1)],
)
def test_the_kernel_gives_what_plain_torch_does(kernels, tokens, head_dim, heads, kv_heads):
    q, k, v = qkv(tokens, head_dim, heads, kv_heads)
    blocks = random_lists(heads, tokens)
    expected, _ = masked_reference(q, k, v, blocks)
    assert (block_sparse_attention(q, k, v, blocks) - expected).abs().max() < 1e-4


def test_the_kernel_of_blocks_of_64(kernels):
    q, k, v = qkv(300)
    blocks = random_lists(2, 300, size=64)
    expected, _ = masked_reference(q, k, v, blocks, size=64)
    assert (block_sparse_attention(q, k, v, blocks, block=64) - expected).abs().max() < 1e-4


def test_only_what_is_told_is_computed_again(kernels):
    q, k, v = qkv(300)
    blocks = random_lists(2, 300)
    expected, _ = masked_reference(q, k, v, blocks)
    breached = torch.zeros(2, 3, 2, dtype=torch.int32, device=DEVICE)
    breached[0, 1, 0] = breached[1, 2, 1] = 1
    out = torch.full_like(q.contiguous(), -7.0)
    block_attention._by_triton(block_attention._kernels(q), q, k, v, out, blocks, 3, None, BLOCK, breached)
    again = torch.zeros(300, 2, dtype=torch.bool)
    again[128:256, 0] = again[256:, 1] = True
    assert (out[again] - expected[again]).abs().max() < 1e-4
    assert (out[~again] == -7.0).all()


@pytest.mark.parametrize(("tokens", "left_out"), [(1, 0), (300, 0), (400, 2), (200, 2)])
def test_blocks_that_are_not_listed(kernels, tokens, left_out):
    q, k, v = qkv(tokens, heads=1)
    got = block_sparse_attention(q, k, v, choose_blocks(q, k, 0.0), left_out=left_out)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sparse, "_kernels", lambda x: None)
        blocks = choose_blocks(q, k, 0.0)
    assert choose_blocks(q, k, 0.0).indices is None
    expected, _ = masked_reference(q, k, v, blocks)
    done = min(tokens, max(0, -(-tokens // BLOCK) - left_out) * BLOCK)
    torch.testing.assert_close(got[:done].double(), expected[:done], rtol=0, atol=1e-4)


@pytest.mark.parametrize("group", [2, 3])
def test_the_estimate_reads_the_keys_that_a_head_shares(kernels, group):
    """Those of key/value head h // group, of which each has a block of its own that stands out."""
    kv_heads, blocks = 2, 6
    q, k, _ = (x.clone() for x in qkv(blocks * BLOCK, heads=kv_heads * group, kv_heads=kv_heads))
    q[:], k[:] = 1.0, 0.0
    for head in range(kv_heads):
        k[(head + 1) * BLOCK : (head + 2) * BLOCK, head] = 8.0
    shares = sparse._plain_shares(q, k)[:, 24]
    assert shares.argmax(-1).tolist() == [head + 1 for head in range(kv_heads) for _ in range(group)]
    got = choose_blocks(q, k, 0.4)
    for head in range(kv_heads * group):
        assert got.indices[head, 3, : got.counts[head, 3]].tolist() == sorted({0, head // group + 1, 2, 3})


@pytest.mark.parametrize("step", [1, 2])
@pytest.mark.parametrize("tokens", [100, 256, 300, 353])
def test_the_estimate_is_the_attention_to_means_of_keys(plain, monkeypatch, tokens, step):
    """Of all queries, or in long documents of every other."""
    monkeypatch.setattr(sparse, "OTHERS_FROM", 1 if step == 2 else tokens + 1)
    q, k, _ = qkv(tokens)
    got = sparse._plain_shares(q, k)
    means = torch.stack([part.double().mean(0) for part in k[:, 0].split(BLOCK)])
    for head in range(2):
        for row in range(-(-tokens // sparse.STRIDE)):
            queries = q[row * sparse.STRIDE : (row + 1) * sparse.STRIDE : step, head].double()
            own = row * sparse.STRIDE // BLOCK
            expected = (queries @ means[: own + 1].T / 16**0.5).softmax(-1).mean(0)
            assert (got[head, row, : own + 1] - expected).abs().max() < 1e-6
            assert not got[head, row, own + 1 :].any()
    asked = [1 + row // BLOCK for row in range(0, tokens, step)]
    assert sparse.estimated_pairs(tokens) == sum(asked)


def test_what_few_queries_look_for_is_found(plain):
    """Of a block one stride looks elsewhere than all others."""
    q, k, _ = (torch.zeros_like(x) for x in qkv(2048, heads=1))
    k[640:768, 0, 15], k[896:1024, 0, 0] = 8.0, 8.0
    q[1280:1408, 0, 0] = 8.0
    q[1328:1344, 0, 0], q[1328:1344, 0, 15] = 0.0, 8.0
    blocks = choose_blocks(q, k, 0.8)
    assert blocks.indices[0, 10, : blocks.counts[0, 10]].tolist() == [0, 5, 7, 9, 10]


@pytest.mark.parametrize("at_once", [1 << 27, 200])
def test_the_estimate_takes_as_much_room_as_it_may(kernels, monkeypatch, at_once):
    q, k, _ = qkv(700)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sparse, "_kernels", lambda x: None)
        expected = choose_blocks(q * 4, k, 0.5)
    monkeypatch.setattr(sparse, "SHARES_AT_ONCE", at_once)
    got = choose_blocks(q * 4, k, 0.5)
    assert torch.equal(got.indices, expected.indices)


def test_what_is_always_attended_to(plain):
    q, k, _ = qkv(1000)
    blocks = choose_blocks(q, k, 0.0)
    for head in range(2):
        for row in range(8):
            listed = blocks.indices[head, row, : blocks.counts[head, row]].tolist()
            assert listed == sorted(set(listed))
            assert listed[-1] == row
            assert {0, max(0, row - 1)} <= set(listed)
            assert row < 6 or listed == list(range(row + 1))


def test_more_mass_attends_to_more(plain):
    q, k, _ = qkv(2000)
    sets = []
    for mass in (0.05, 0.2, 0.4, 1.0):
        blocks = choose_blocks(q, k, mass)
        sets.append(
            {
                (head, row, block)
                for head in range(2)
                for row in range(16)
                for block in blocks.indices[head, row, : blocks.counts[head, row]].tolist()
            }
        )
    assert sets[0] < sets[1] < sets[2] < sets[3]
    assert len(sets[3]) == 2 * 16 * 17 // 2


@pytest.mark.parametrize("tokens", [1, 128, 300, 1000])
def test_the_pairs_of_local_attention_are_known_beforehand(plain, tokens):
    q, k, _ = qkv(tokens)
    rows = -(-tokens // BLOCK)
    counts = [row + 1 if row >= rows - sparse.WHOLE_ROWS else min(row + 1, 3) for row in range(rows - 1)]
    sdpa = SdpaAttention()
    sdpa.sparse_from = 1
    prefill = SparsePrefill(sdpa, Segments.of([tokens], q.device), width=q[0].numel())
    listed = sparse.listed_blocks(choose_blocks(q, k, 0.0), tokens)
    pairs = prefill.pairs(listed[None], q.shape[1])
    assert pairs.tolist() == [sum(counts) * BLOCK**2 + sparse.ragged_pairs(tokens)]


def test_a_block_that_matters_is_found(plain):
    q, k, _ = qkv(2000)
    q, k = q.clone(), k.clone()
    q[1280:1408, 1] += 3.0
    k[512:640, 0] += 3.0
    blocks = choose_blocks(q, k, 0.3)
    assert blocks.indices[1, 10, : blocks.counts[1, 10]].tolist() == [0, 4, 9, 10]
    shares = sparse._plain_shares(q, k)[:, 80:88, 4]
    assert shares[1].min() > 0.5 > shares[0].max()


@pytest.mark.parametrize("tokens", [5, 300, pytest.param(1300, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("mass", "others"), [(0.4, False), (0.9, False), (0.9, True), (0.9999999, False)])
def test_the_choosing_kernel_gives_what_plain_torch_does(kernels, monkeypatch, tokens, mass, others):
    monkeypatch.setattr(sparse, "OTHERS_FROM", 1 if others else 1 << 40)
    q, k, _ = qkv(tokens)
    got = choose_blocks(q * 4, k, mass)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sparse, "_kernels", lambda x: None)
        expected = choose_blocks(q * 4, k, mass)
    assert torch.equal(got.counts, expected.counts)
    assert torch.equal(got.indices, expected.indices)
    assert tokens < 1300 or got.counts.unique().numel() > 4


@pytest.mark.slow
def test_of_blocks_with_equal_shares_all_are_chosen_or_none(kernels):
    q, k, _ = (torch.zeros_like(x) for x in qkv(2048))
    q[:, :, 0], k[256:640, :, 0], k[896:1024, :, 0] = 1.0, 2.0, 3.0
    got = choose_blocks(q * 8, k, 0.5)
    assert got.indices[0, 11, : got.counts[0, 11]].tolist() == [0, 7, 10, 11]
    got = choose_blocks(q * 8, k, 0.9)
    assert got.indices[0, 11, : got.counts[0, 11]].tolist() == [0, 2, 3, 4, 7, 10, 11]


@pytest.mark.parametrize("mass", [0.0, 0.3])
def test_packs_of_long_and_short_documents(plain, mass):
    segments = Segments.of((500, 20, 299, 700), DEVICE)
    q, k, v = qkv(segments.total, heads=4, kv_heads=2)
    packs = []

    class Noted(SdpaAttention):
        def prefill(self, q, k, v, segments, **options):
            packs.append(segments.lengths)
            return super().prefill(q, k, v, segments, **options)

    noted, sdpa = Noted(), SdpaAttention()
    noted.sparse_from = sdpa.sparse_from = 300
    whole, pairs = SparsePrefill(noted, segments, 64).attend(q, k, v, 1.0)
    assert packs == [(20, 299)]
    assert (whole - reference.causal_attention(q, k, v, segments)).abs().max() < 1e-5
    assert pairs.tolist() == [n * (n + 1) // 2 for n in segments.lengths]
    some, pairs = SparsePrefill(sdpa, segments, 64).attend(q, k, v, mass)
    for b, (start, end) in enumerate(segments.ranges()):
        part = q[start:end], k[start:end], v[start:end]
        if b in (1, 2):
            assert torch.equal(some[start:end], whole[start:end])
            continue
        expected, seen = masked_reference(*part, choose_blocks(*part[:2], mass))
        assert (some[start:end] - expected).abs().max() < 1e-5
        assert pairs[b] == seen.sum(dim=(1, 2)).double().mean().floor()


def test_short_documents_go_to_dense_attention_unchanged():
    segments = Segments.of((50, 20), DEVICE)
    q, k, v = qkv(70)
    mixed, pairs = SparsePrefill(SdpaAttention(), segments, 32).attend(q, k, v, 0.5)
    assert torch.equal(mixed, SdpaAttention().prefill(q, k, v, segments))
    assert pairs is None


@pytest.mark.skipif(not GPU, reason="needs a GPU")
def test_the_host_never_waits():
    segments = Segments.of((20_000,), DEVICE)
    q, k, v = qkv(segments.total, 128, heads=12, kv_heads=2, dtype=torch.bfloat16)
    backend, _ = choose_attention("auto", device=q.device, dtype=q.dtype, heads=12, kv_heads=2, head_dim=128)
    own = SparsePrefill(backend, segments, 12 * 128)
    own.attend(q, k, v, 0.5)
    torch.cuda.set_sync_debug_mode("error")
    try:
        _, some = own.attend(q, k, v, 0.5)
        _, local = own.attend(q, k, v, 0.0)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert 0 < local.item() < some.item() < segments.total**2 / 2


@pytest.mark.skipif(not GPU, reason="needs a GPU")
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_in_bfloat16_on_a_gpu(head_dim):
    q, k, v = qkv(5001, head_dim, heads=6, kv_heads=2, dtype=torch.bfloat16)
    blocks = choose_blocks(q, k, 0.5)
    expected, _ = masked_reference(q, k, v, blocks)
    got = block_sparse_attention(q, k, v, blocks)
    assert (got - expected).norm() / expected.norm() < 0.01


def test_on_a_gpu_it_must_pay(monkeypatch):
    gpu = torch.device("cuda")
    monkeypatch.setattr(sparse, "kernels_on", lambda kind: kind == "cuda")
    assert sparse.applies(14_000, 1536, gpu)
    assert not sparse.applies(13_000, 1536, gpu)
    assert not sparse.applies(4_000, 1 << 20, gpu)


def test_the_shortest_block_sparse_document_is_the_first(monkeypatch):
    gpu = torch.device("cuda")
    assert sparse.shortest(1536, torch.device("cpu")) is None
    monkeypatch.setattr(sparse, "kernels_on", lambda kind: kind == "cuda")
    assert sparse.shortest(1 << 20, gpu) == sparse.SHORTEST
    assert sparse.shortest(1 << 12, gpu) == 1 << 13  # a square that is met exactly
    for width in (896, 1536, 3584):
        least = sparse.shortest(width, gpu)
        assert least**2 * width >= sparse.LEAST_WORK > (least - 1) ** 2 * width


def test_the_first_layer_that_chooses_blocks():
    assert sparse.first_choosing((None, 0.0, 0.9, 0.5)) == 2
    assert sparse.first_choosing((None, 0.0)) is None


def test_without_kernels_attention_is_whole_unless_the_reference_is_asked_for():
    cpu = torch.device("cpu")
    assert not sparse.applies(100_000, 1536, cpu)
    assert sparse.applies(256, 1536, cpu, sparse_from=256)
    assert not sparse.applies(255, 1536, cpu, sparse_from=256)


@pytest.mark.parametrize(("chunk", "queries", "head_dim"), [(8, 64, 24), (256, 16, 16), (64, 4, 16)])
def test_the_kernel_goes_down_the_same_halves(kernels, chunk, queries, head_dim):
    generator = torch.Generator().manual_seed(chunk)
    tokens, stops = 700, torch.tensor([128, 690])
    q = torch.randn(4, 2, queries, head_dim, generator=generator).to(DEVICE)
    _, k, _ = qkv(tokens, head_dim=head_dim, heads=4, kv_heads=2)
    starts = torch.arange(64, 700 + 2 * chunk, chunk, device=DEVICE).expand(4, 2, -1)
    got = sparse.best_products(q, k, starts, stops.to(DEVICE), chunk)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sparse, "_kernels", lambda x: None)
        expected = sparse.best_products(q, k, starts, stops.to(DEVICE), chunk)
    assert torch.isinf(expected).any()
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("device", "capability", "rocm", "is_one"),
    [("cuda", 9, None, True), ("cuda", 10, None, False), ("cuda", 9, "6.4", False), ("cpu", 9, None, False)],
)
def test_the_kernel_for_hopper_is_for_no_gpu_of_amd(device, capability, rocm, is_one, monkeypatch):
    """Whose own versions are 9 too, such as 9.4 of the MI300."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (capability, 4))
    monkeypatch.setattr(torch.version, "hip", rocm)
    assert is_hopper(torch.device(device)) is is_one
