"""Attention with sinks, a score of each head that no key has, against a softmax with one score more."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import reduce_by_halves

from pipeline.kernels import attention, decoding, reference, sparse
from pipeline.kernels.attention import FlashAttention, SdpaAttention, VarlenAttention, choose_attention
from pipeline.kernels.blocks import block_attention
from pipeline.kernels.blocks.block_attention import block_sparse_attention
from pipeline.kernels.decode_slots import DecodeSlots
from pipeline.kernels.decoding import shared_ranges, windowed_ranges
from pipeline.kernels.segments import Segments

SEGMENTS = Segments.of((70, 5, 33))
CPU = torch.device("cpu")
SINKS = torch.tensor([-9.0, 0.5, 2.0, 40.0])  # of nothing, and of nearly all


def qkv_of(tokens, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(tokens, heads, 16, generator=generator, dtype=dtype) for heads in (4, 2, 2)]


@pytest.fixture
def qkv():
    return qkv_of(SEGMENTS.total)


@pytest.fixture(params=[False, True], ids=["plain", "kernels"])
def kernels(request, monkeypatch):
    """Kernels run in Triton's interpreter, which has no float64."""
    if not request.param:
        return torch.float64
    if torch.cuda.is_available():
        pytest.skip("kernels on a GPU are tried in tests/gpu")
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # read when the kernels' module is imported
    pytest.importorskip("triton")
    from triton.runtime import interpreter

    from pipeline.kernels import triton_decoding, triton_sparse
    from pipeline.kernels.blocks import triton_attention

    monkeypatch.setattr(interpreter.ReduceOps, "generic_reduce", reduce_by_halves)
    monkeypatch.setattr(decoding, "_kernels", lambda x: triton_decoding)
    monkeypatch.setattr(sparse, "_kernels", lambda x: triton_sparse)
    monkeypatch.setattr(block_attention, "_kernels", lambda x: triton_attention)
    return torch.float32


def test_the_reference_is_a_softmax_over_one_score_more(qkv):
    q, k, v = (x[:9] for x in qkv)
    scores = torch.einsum("qhd,thd->hqt", q, k.repeat_interleave(2, dim=1)) / 4
    scores = scores.masked_fill(torch.ones(9, 9).triu(1).bool(), -torch.inf)
    exponentials = scores.exp()
    weights = exponentials / (exponentials.sum(-1, keepdim=True) + SINKS.double().exp()[:, None, None])
    expected = torch.einsum("hqt,thd->qhd", weights, v.repeat_interleave(2, dim=1))
    found = reference.causal_attention(q, k, v, Segments.of((9,)), sinks_H=SINKS)
    assert (found - expected).abs().max() < 1e-12


@pytest.mark.parametrize("window", [None, 1, 24, 69, 500])
def test_prefill(qkv, window):
    found = SdpaAttention().prefill(*qkv, SEGMENTS, window, SINKS)
    expected = reference.causal_attention(*qkv, SEGMENTS, window, SINKS)
    assert (found - expected).abs().max() < 1e-12
    assert (expected - reference.causal_attention(*qkv, SEGMENTS, window)).abs().max() > 0.1


@pytest.mark.parametrize("queries", [(1, 1, 1), (4, 1, 9), (70, 5, 33)])
@pytest.mark.parametrize("window", [None, 5, 24])
def test_queries_behind_their_slots(qkv, window, queries):
    documents = zip(SEGMENTS.ranges(), queries, strict=True)
    last = torch.cat([torch.arange(end - count, end) for (_, end), count in documents])
    expected = reference.causal_attention(*qkv, SEGMENTS, window, SINKS)[last]
    q, k, v = qkv
    slots = DecodeSlots.of(SEGMENTS.offsets[:-1], SEGMENTS.lengths, SEGMENTS.total, CPU, queries)
    found = SdpaAttention().decode(q[last], k, v, slots.within(window), SINKS)
    assert (found - expected).abs().max() < 1e-12


def test_parts_are_merged_with_sinks(kernels):
    """Each query of two ranges; the last has none, and gets nothing whatever its sink."""
    q, k, v = qkv_of(90, kernels)
    own = windowed_ranges([10, 40], [20, 50], [1, 2], 12, CPU)
    before = shared_ranges([0], [7], [[0, 2]], 4, CPU)
    found = decoding.attention(q[:4], [(k, v, own), (k, v, before)], SINKS)
    seen = [[*range(18, 30), *range(7)], [*range(77, 89)], [*range(78, 90), *range(7)]]
    for query, places in enumerate(seen):
        weights = reference.attention_weights(
            q[query : query + 1], k[places], len(places) - 1, sinks_H=SINKS
        )[:, 0]
        expected = torch.einsum("ht,thd->hd", weights, v[places].double().repeat_interleave(2, dim=1))
        assert (found[query] - expected).abs().max() < 1e-5
    assert not found[3].any()


@pytest.mark.parametrize("mass", [0.05, 1.0])
def test_blocks_that_are_chosen(mass, kernels):
    q, k, v = qkv_of(1000, torch.float32)
    q = q * 3
    blocks = sparse.choose_blocks(q, k, mass)
    found = block_sparse_attention(q, k, v, blocks, sinks_H=SINKS)
    rows = blocks.counts.shape[1]
    chosen_HMN = torch.zeros(4, rows, rows, dtype=torch.bool)
    for head, row in ((head, row) for head in range(4) for row in range(rows)):
        chosen_HMN[head, row, blocks.indices[head, row, : blocks.counts[head, row]].long()] = True
    assert (chosen_HMN.sum() == 4 * rows * (rows + 1) // 2) == (mass == 1.0)
    seen_HTT = chosen_HMN.repeat_interleave(sparse.BLOCK, 1).repeat_interleave(sparse.BLOCK, 2)
    seen_HTT = seen_HTT[:, :1000, :1000] & torch.ones(1000, 1000, dtype=torch.bool).tril()
    scores_HTT = torch.einsum("qhd,thd->hqt", q, k.repeat_interleave(2, dim=1)) / 4
    scores_HTT = scores_HTT.masked_fill(~seen_HTT, -torch.inf)
    with_sinks = torch.cat([scores_HTT, SINKS[:, None, None].expand(-1, 1000, 1)], dim=-1)
    weights_HTT = with_sinks.softmax(-1)[..., :-1]
    expected = torch.einsum("hqt,thd->qhd", weights_HTT, v.repeat_interleave(2, dim=1))
    assert (found - expected).abs().max() < 1e-5


def log_sum_exps(q_THd, k_TKd, segments, window):
    """(H, T) as libraries return them."""
    parts = []
    for start, end in segments.ranges():
        scores = torch.einsum("qhd,thd->hqt", q_THd[start:end], k_TKd[start:end].repeat_interleave(2, 1)) / 4
        behind = torch.arange(end - start)[:, None] - torch.arange(end - start)
        unseen = (behind < 0) | (behind >= (window or end))
        parts.append(scores.masked_fill(unseen, -torch.inf).logsumexp(-1))
    return torch.cat(parts, dim=1)


def as_flash_attention(q, k, v, *, window_size=(-1, -1), return_attn_probs=False, **_):
    window = None if window_size[0] < 0 else window_size[0] + 1
    attended = reference.causal_attention(q, k, v, SEGMENTS, window)
    logs = log_sum_exps(q, k, SEGMENTS, window)
    return (attended, logs, None) if return_attn_probs else attended


def as_varlen(q, k, v, *_, window_size, return_aux=None, enable_gqa=False):
    made = as_flash_attention(q, k, v, window_size=window_size, return_attn_probs=True)
    return made[0] if return_aux is None else made[:2]


@pytest.mark.parametrize("window", [None, 24])
@pytest.mark.parametrize(
    ("kind", "library"), [(FlashAttention, as_flash_attention), (VarlenAttention, as_varlen)]
)
def test_libraries_that_return_the_log_sum_exp(kind, library, window, qkv):
    backend = object.__new__(kind)
    backend._attend, backend._with_logs, backend._grouped = library, object(), True
    for sinks in (None, SINKS):
        expected = reference.causal_attention(*qkv, SEGMENTS, window, sinks)
        assert (backend.prefill(*qkv, SEGMENTS, window, sinks) - expected).abs().max() < 1e-12


class ForgettingSinks(SdpaAttention):
    """As a library that takes no notice of the argument."""

    name = "forgetting"

    def decode(self, q_QHd, k_SKd, v_SKd, slots, sinks_H=None):
        return super().decode(q_QHd, k_SKd, v_SKd, slots)


def test_a_backend_without_sinks_is_refused_where_they_are_needed(monkeypatch):
    sizes = {"device": CPU, "dtype": torch.float32, "heads": 4, "kv_heads": 2, "head_dim": 16}
    monkeypatch.setattr(attention, "BACKENDS", {"sdpa": ForgettingSinks})
    assert choose_attention("sdpa", **sizes, slides=True)[0].name == "forgetting"
    with pytest.raises(attention.ConfigError, match="sdpa: its decode with sinks is off by"):
        choose_attention("sdpa", **sizes, slides=True, sinks=True)
    monkeypatch.setattr(attention, "BACKENDS", {"sdpa": SdpaAttention})
    assert choose_attention("sdpa", **sizes, slides=True, sinks=True)[0].name == "sdpa"
