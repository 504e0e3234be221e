"""Attention of decode steps against a softmax over all keys that a query sees.

The kernels run in Triton's interpreter, or on a GPU if there is one.
"""

from __future__ import annotations

import math

import pytest
import torch
from kernel_cases import reduce_by_halves

from pipeline.kernels import decoding
from pipeline.kernels.decoding import Fp8Scales, Ranges, attention

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
HEADS, KV_HEADS, WIDTH = 6, 2, 16


def without_kernels(monkeypatch):
    monkeypatch.setattr(decoding, "_kernels", lambda x: None)


def with_kernels(monkeypatch):
    """Launches the kernels; the interpreter is mended where it is slow."""
    if GPU:
        return
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # read when the kernels' module is imported
    pytest.importorskip("triton")
    from triton.runtime import interpreter

    from pipeline.kernels import triton_decoding

    monkeypatch.setattr(interpreter.ReduceOps, "generic_reduce", reduce_by_halves)
    monkeypatch.setattr(decoding, "_kernels", lambda x: triton_decoding)


@pytest.fixture(params=[without_kernels, with_kernels])
def either_path(request, monkeypatch):
    request.param(monkeypatch)


def int32(values):
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def buffers(slots, queries, seed=0):
    """Queries, and keys and values of all slots."""
    generator = torch.Generator().manual_seed(seed)
    sizes = ((queries, HEADS), (slots, KV_HEADS), (slots, KV_HEADS))
    return [torch.randn(*size, WIDTH, generator=generator).to(DEVICE) for size in sizes]


def expected(q_QHd, k_SKd, v_SKd, seen):
    """(Q, H, d): `seen` has each query's slots."""
    group = HEADS // KV_HEADS
    rows = []
    for query, slots in zip(q_QHd.double(), seen, strict=True):
        keys, values = (x[slots].double().repeat_interleave(group, dim=1) for x in (k_SKd, v_SKd))
        weights = (torch.einsum("hd,thd->ht", query, keys) / math.sqrt(WIDTH)).softmax(-1)
        rows.append(torch.einsum("ht,thd->hd", weights, values))
    return torch.stack(rows)


def own(starts, used, queries):
    bounds = [0]
    for count in queries:
        bounds.append(bounds[-1] + count)
    return Ranges(
        starts_N=int32(starts),
        used_N=int32(used),
        queries_N1=int32(bounds),
        most_queries=max(queries),
        longest=max(used),
    )


def causal(starts, used, queries):
    """The slots that each query of its range sees."""
    return [
        list(range(start, start + count - asked + nth + 1))
        for start, count, asked in zip(starts, used, queries, strict=True)
        for nth in range(asked)
    ]


CASES = {
    "one key": ([3], [1], [1]),
    "ragged": ([200, 0, 90], [100, 70, 3], [1, 1, 1]),
    "several queries": ([0, 150], [130, 40], [3, 5]),
    "in an order of its own": ([300, 0, 150, 77], [5, 64, 128, 65], [2, 1, 4, 1]),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("keys", [16, 64])
def test_queries_see_what_stands_before_them(case, keys, either_path, monkeypatch):
    monkeypatch.setattr(decoding, "KEYS", keys)
    monkeypatch.setattr(decoding, "LEAST_KEYS", ((1 << 30, 32),))  # so that these ranges are split
    starts, used, queries = CASES[case]
    q, k, v = buffers(400, sum(queries))
    made = attention(q, [(k, v, own(starts, used, queries))])
    assert (made - expected(q, k, v, causal(starts, used, queries))).abs().max() < 1e-5


def test_what_lies_beside_a_range_is_not_read(either_path):
    q, k, v = buffers(300, 1)
    clean = attention(q, [(k, v, own([100], [70], [1]))])
    for x in (k, v):
        x[:100], x[170:] = math.nan, math.nan
    assert torch.equal(attention(q, [(k, v, own([100], [70], [1]))]), clean)


def shared(starts, used, members):
    """Ranges that the queries `members` see whole; ranges of nobody stand for places that are free."""
    bounds, order = [0], []
    for names in members:
        order += names
        bounds.append(len(order))
    return Ranges(
        starts_N=int32(starts),
        used_N=int32(used),
        queries_N1=int32(bounds),
        most_queries=max(map(len, members)),
        longest=max(used),
        order_O=int32(order),
    )


def test_ranges_that_rows_share_are_merged_with_their_own(either_path, monkeypatch):
    monkeypatch.setattr(decoding, "LEAST_KEYS", ((1 << 30, 32),))
    q, k, v = buffers(500, 5)
    starts, used = [300, 340, 350, 390, 400], [40, 1, 33, 5, 70]
    members = [[3, 0], [], [4, 1]]  # the third query has only keys of its own
    document = shared([10, 0, 120], [100, 0, 129], members)
    made = attention(q, [(k, v, own(starts, used, [1] * 5)), (k, v, document)])
    seen = causal(starts, used, [1] * 5)
    for names, (start, count) in zip(members, [(10, 100), (0, 0), (120, 129)], strict=True):
        for name in names:
            seen[name] = [*range(start, start + count), *seen[name]]
    assert (made - expected(q, k, v, seen)).abs().max() < 1e-5


def test_a_query_without_a_range_gets_zeros(either_path):
    """As those have that pad a step; and the device alone knows how many queries a range has."""
    q, k, v = buffers(100, 7)
    ranges = own([10, 0, 50], [40, 9, 30], [3, 1, 2])
    made = attention(q, [(k, v, ranges)])
    assert (made[6] == 0).all()
    assert (made[:6] - expected(q[:6], k, v, causal([10, 0, 50], [40, 9, 30], [3, 1, 2]))).abs().max() < 1e-5


def test_a_merge_holds_where_one_part_outweighs_the_other(either_path):
    q, k, v = buffers(64, 1)
    k[:32] = 60 * q[0, ::3]  # scores of thousands: exponentials of them would overflow
    made = attention(q, [(k, v, own([32], [32], [1])), (k, v, shared([0], [32], [[0]]))])
    assert (made - expected(q, k, v, [list(range(64))])).abs().max() < 1e-4


@pytest.mark.skipif(not GPU, reason="the interpreter multiplies the bits of bfloat16 and float16")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_types_of_a_gpu(dtype):
    q, k, v = (x.to(dtype) for x in buffers(5000, 3))
    starts, used = [0, 3000, 100], [3000, 2000, 1]
    made = attention(q, [(k, v, own(starts, used, [1] * 3))])
    wanted = expected(q, k, v, causal(starts, used, [1] * 3))
    assert made.dtype == dtype
    assert (made - wanted).abs().max() / wanted.abs().max() < {torch.float32: 1e-5}.get(dtype, 1e-2)


def in_fp8(k, v):
    """Keys and values in e4m3, all of one line of scales, about means that are far from zero."""
    means = torch.full((1, KV_HEADS, WIDTH), 3.0, device=DEVICE)
    scales = Fp8Scales(
        keys_LK=torch.full((1, KV_HEADS), 1 / 32, device=DEVICE),
        values_LK=torch.full((1, KV_HEADS), 1 / 64, device=DEVICE),
        means_LKd=means,
    )
    return ((k - 3) * 32).to(torch.float8_e4m3fn), (v * 64).to(torch.float8_e4m3fn), scales


def test_e4m3_is_what_its_scales_make_of_it(monkeypatch):
    if not GPU:
        without_kernels(monkeypatch)
    q, k, v = buffers(400, 3)
    k8, v8, scales = in_fp8(k + 3, v)
    ranges, document = own([0, 100, 170], [100, 70, 9], [1] * 3), shared([200], [200], [[2, 0]])
    with_scales = [
        Ranges(**{**vars(each), "scales": scales, "lines_N": int32([0] * len(each.starts_N))})
        for each in (ranges, document)
    ]
    made = attention(q.bfloat16(), [(k8, v8, each) for each in with_scales])
    keys, values = decoding.dequantised(k8, v8, scales, 0)
    seen = causal([0, 100, 170], [100, 70, 9], [1] * 3)
    for name in (2, 0):
        seen[name] = [*range(200, 400), *seen[name]]
    wanted = expected(q.bfloat16(), keys, values, seen)
    assert (made - wanted).abs().max() / wanted.abs().max() < 1e-2


def test_splits_suit_few_ranges_and_many():
    def splits(count, longest):
        return decoding._splits(
            Ranges(
                starts_N=int32([0] * count),
                used_N=int32([1] * count),
                queries_N1=int32(range(count + 1)),
                most_queries=1,
                longest=longest,
            ),
            kv_heads=4,
        )

    assert splits(1, 131_072) == (32, 256)
    assert splits(64, 33_000) == (32, 1024)
    assert splits(256, 33_000) == (8, 2048)
    assert splits(4096, 33_000) == (1, 2048)
    assert splits(64, 1000) == (1, 1024)


class Broken:
    """Stands for kernels that no device could run, or that do nothing."""

    def __init__(self, error=None):
        self.error = error

    def __getattr__(self, name):
        return self

    def __getitem__(self, grid):
        return self

    def __call__(self, *arguments, **options):
        if self.error is not None:
            raise self.error


class TooLarge(Exception):
    """As a compiler says it."""


@pytest.mark.parametrize(
    ("kernels", "reason"),
    [
        (Broken(TooLarge("out of resource: shared memory\nand more")), "out of resource: shared memory"),
        (Broken(), "off by"),
    ],
)
def test_kernels_that_fail_on_a_trial_are_not_used(kernels, reason, monkeypatch):
    monkeypatch.setattr(decoding, "_REFUSED", {})
    monkeypatch.setattr(decoding, "kernels_on", lambda kind: True)
    monkeypatch.setattr(decoding, "kernels_for", lambda x, module: kernels)
    empty = torch.empty  # of which nothing is known
    monkeypatch.setattr(torch, "empty", lambda *shape, **options: empty(*shape, **options).fill_(9))
    device = torch.device(DEVICE) if not GPU else torch.device("cuda", 0)
    sizes = {"heads": HEADS, "kv_heads": KV_HEADS, "head_dim": WIDTH}
    assert decoding.available(device, torch.float32, WIDTH)
    found = decoding.try_once(device, torch.float32, **sizes)
    assert found.startswith(reason)
    assert not decoding.available(device, torch.float32, WIDTH)
    assert decoding.available(device, torch.float32, 2 * WIDTH), "those of another size were not tried"
    assert decoding.try_once(device, torch.float32, **sizes) == found
    q, k, v = buffers(300, 1)
    made = attention(q, [(k, v, own([100], [70], [1]))])
    assert (made - expected(q, k, v, [list(range(100, 170))])).abs().max() < 1e-5


def test_kernels_that_work_are_used(monkeypatch):
    with_kernels(monkeypatch)
    used = decoding._kernels
    monkeypatch.setattr(decoding, "_REFUSED", {})
    monkeypatch.setattr(decoding, "kernels_on", lambda kind: True)
    module = used(torch.zeros(1, device=DEVICE))
    monkeypatch.setattr(decoding, "_kernels", lambda x: None if decoding._REFUSED else module)
    device = torch.device(DEVICE) if not GPU else torch.device("cuda", 0)
    assert decoding.try_once(device, torch.float32, heads=HEADS, kv_heads=KV_HEADS, head_dim=WIDTH) is None
    assert decoding.available(device, torch.float32, WIDTH)
