"""Keys and values in e4m3: what rounding takes from them, and from attention."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import DEVICE, GPU, codes, reduce_by_halves, rounding_to_nearest

from pipeline.kernels import kv_fp8
from pipeline.kernels.decoding import Fp8Scales, Ranges, attention
from pipeline.kernels.fused import FP8, FP8_MAX
from pipeline.kernels.kv_fp8 import KvTarget, put_prompts, quantised, rounded, scales_of
from pipeline.kernels.segments import Segments

KV_HEADS, WIDTH = 2, 32


def keys_values(tokens, bias=0.0, seed=0):
    """With a bias that is the same for all keys, as Qwen2's projections add one."""
    generator = torch.Generator().manual_seed(seed)
    k, v = (torch.randn(tokens, KV_HEADS, WIDTH, generator=generator).to(DEVICE) for _ in range(2))
    return k + bias * torch.randn(KV_HEADS, WIDTH, generator=generator).to(DEVICE), v


@pytest.mark.parametrize("bias", [0, 100])
def test_values_lose_a_sixteenth_at_most_and_keys_as_much_of_what_tells_them_apart(bias):
    segments = Segments.of((200, 1, 37), DEVICE)
    k, v = keys_values(segments.total, bias)
    near_k, near_v = rounded(k, v, segments)
    for document, (a, b) in enumerate(segments.ranges()):
        centred = k[a:b] - k[a:b].mean(0)
        assert ((near_k[a:b] - k[a:b]).abs() <= centred.abs() / 16 + 0.02 + 1e-5 * bias).all(), document
        assert ((near_v[a:b] - v[a:b]).abs() <= v[a:b].abs() / 16 + 0.01).all(), document


def test_a_scale_leaves_room_for_larger_tokens_and_beyond_it_they_are_cut_off():
    segments = Segments.of((50,), DEVICE)
    k, v = keys_values(50)
    scales = scales_of(k, v, segments)
    buffers = torch.zeros(2, 4, KV_HEADS, WIDTH, device=DEVICE).to(FP8)
    target = KvTarget(*buffers, torch.tensor([2], device=DEVICE), scales, torch.zeros(1, device=DEVICE).int())
    largest = v.abs().amax(dim=(0, 2))
    new = torch.ones(1, KV_HEADS, WIDTH, device=DEVICE)
    target.put(new, 1.9 * largest[None, :, None] * new)
    stored = buffers[1][2].float() * scales.values_LK[0, :, None]
    assert (stored / (1.9 * largest[:, None]) - 1).abs().max() < 1 / 16
    target.put(new, 1000 * largest[None, :, None] * new)
    stored = buffers[1][2].float() * scales.values_LK[0, :, None]
    assert torch.allclose(stored, 2 * largest[:, None].expand_as(stored))
    assert not buffers[1][:2].float().any()


def test_behind_one_token_there_is_room_for_others_of_its_size():
    k, v = keys_values(1)
    scales = scales_of(k, v, Segments.of((1,), DEVICE))
    assert (scales.keys_LK[0] * FP8_MAX / k[0].abs().amax(1) - 2).abs().max() < 1e-5


def test_a_row_of_zeros_stays_zeros():
    segments = Segments.of((3,), DEVICE)
    nothing = torch.zeros(3, KV_HEADS, WIDTH, device=DEVICE)
    assert [x.abs().max().item() for x in rounded(nothing, nothing, segments)] == [0, 0]


def test_nan_stays_nan():
    segments = Segments.of((3,), DEVICE)
    k, v = keys_values(3)
    v[1, 0, 5] = float("nan")
    assert rounded(k, v, segments)[1].isnan().any()


@pytest.mark.parametrize("bias", [0, 100])
def test_attention_over_e4m3_is_near_that_over_all_bits(bias, monkeypatch):
    segments = Segments.of((300, 150), DEVICE)
    k, v = keys_values(segments.total, bias)
    generator = torch.Generator().manual_seed(3)
    q = torch.randn(2, 4, WIDTH, generator=generator).to(DEVICE, torch.bfloat16)

    def attended(queries, keys, values, **options):
        ranges = Ranges(
            starts_N=segments.cu_seqlens[:-1],
            used_N=segments.lengths_B.int(),
            queries_N1=torch.arange(3, device=DEVICE).int(),
            most_queries=1,
            longest=300,
            **options,
        )
        return attention(queries, [(keys, values, ranges)]).float()

    scales, lines = scales_of(k, v, segments), torch.arange(2, device=DEVICE).int()
    if GPU:
        near = attended(q, *quantised(k, v, scales, segments.document_T), scales=scales, lines_N=lines)
    monkeypatch.setattr("pipeline.kernels.decoding._kernels", lambda x: None)
    exact = attended(q.float(), k, v)
    if not GPU:
        near = attended(q, *quantised(k, v, scales, segments.document_T), scales=scales, lines_N=lines)
    assert (near - exact).norm() / exact.norm() < 0.1


def test_bytes_go_to_their_places():
    buffer = torch.zeros(5, KV_HEADS, WIDTH, device=DEVICE).to(FP8)
    rows = torch.ones(2, KV_HEADS, WIDTH, device=DEVICE)
    kv_fp8.put_rows(buffer, torch.tensor([4, 1], device=DEVICE), rows)
    assert buffer.float()[:, 0, 0].tolist() == [0, 1, 0, 0, 1]


@pytest.fixture
def kernels(monkeypatch):
    """The kernels, which the interpreter runs where there is no GPU."""
    if GPU:
        return
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # read when the kernels' module is imported
    pytest.importorskip("triton")
    from triton.runtime import interpreter

    from pipeline.kernels import triton_kernels

    monkeypatch.setattr(interpreter, "_convert_float", rounding_to_nearest)
    monkeypatch.setattr(interpreter.ReduceOps, "generic_reduce", reduce_by_halves)
    monkeypatch.setattr(kv_fp8, "_kernels", lambda x: triton_kernels)


@pytest.mark.parametrize("lengths", [(1,), (130, 5, 128)], ids=str)
@pytest.mark.parametrize("bias", [0, 100])
def test_prompts_are_stored_as_plain_torch_stores_them(kernels, lengths, bias, monkeypatch):
    segments = Segments.of(lengths, DEVICE)
    k, v = keys_values(segments.total, bias)
    starts = torch.tensor([10 * b + 3 + sum(lengths[:b]) for b in range(len(lengths))], device=DEVICE)
    lines = torch.arange(len(lengths), 0, -1, device=DEVICE)
    made = []
    for path in ("kernel", "plain"):
        if path == "plain":
            monkeypatch.setattr(kv_fp8, "_kernels", lambda x: None)
        buffers = [torch.zeros(400, KV_HEADS, WIDTH, device=DEVICE).to(FP8) for _ in range(2)]
        scales = Fp8Scales(
            keys_LK=torch.zeros(5, KV_HEADS, device=DEVICE),
            values_LK=torch.zeros(5, KV_HEADS, device=DEVICE),
            means_LKd=torch.zeros(5, KV_HEADS, WIDTH, device=DEVICE),
        )
        put_prompts(k, v, segments, KvTarget(*buffers, starts, scales, lines))
        made.append((*map(codes, buffers), scales.keys_LK, scales.values_LK, scales.means_LKd))
    for mine, plainly in zip(*made, strict=True):
        if mine.dtype == torch.float32:
            torch.testing.assert_close(mine, plainly, rtol=1e-4, atol=1e-5)
        else:  # e4m3 of sums in another order: most bytes are the same, and the others next to it
            assert (mine != plainly).float().mean() < 0.02
    assert (made[0][3][0] == 0).all()  # a line of nobody
    assert (made[0][3][1 : len(lengths) + 1] > 0).all()
