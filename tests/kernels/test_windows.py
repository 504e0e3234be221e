"""Attention that sees the last so many positions, against the reference."""

from __future__ import annotations

import pytest
import torch

from pipeline.kernels import attention, decoding, reference, sdpa
from pipeline.kernels.attention import SdpaAttention, choose_attention
from pipeline.kernels.decode_slots import DecodeSlots
from pipeline.kernels.decoding import windowed_ranges
from pipeline.kernels.segments import Segments

SEGMENTS = Segments.of((70, 5, 33))
CPU = torch.device("cpu")


@pytest.fixture
def qkv():
    generator = torch.Generator().manual_seed(0)
    sizes = [(SEGMENTS.total, heads, 16) for heads in (4, 2, 2)]
    return [torch.randn(size, generator=generator, dtype=torch.float64) for size in sizes]


def last_of(queries):
    """Places of each document's last tokens, so many of each."""
    documents = zip(SEGMENTS.ranges(), queries, strict=True)
    return torch.cat([torch.arange(end - count, end) for (_, end), count in documents])


@pytest.mark.parametrize("block", [1024, 16, 7])
@pytest.mark.parametrize("window", [1, 2, 24, 33, 69, 70, 500])
def test_prefill(qkv, window, block, monkeypatch):
    monkeypatch.setattr(sdpa, "masked_at_once", lambda seen: block)
    found = SdpaAttention().prefill(*qkv, SEGMENTS, window)
    assert (found - reference.causal_attention(*qkv, SEGMENTS, window)).abs().max() < 1e-12


@pytest.mark.parametrize("queries", [(1, 1, 1), (4, 1, 9), (70, 5, 33), (30, 2, 1)])
@pytest.mark.parametrize("window", [1, 5, 24, 69, 70])
def test_queries_behind_their_slots(qkv, window, queries):
    q_THd, k_TKd, v_TKd = qkv
    expected = reference.causal_attention(*qkv, SEGMENTS, window)[last_of(queries)]
    asked = q_THd[last_of(queries)]
    whole = DecodeSlots.of(SEGMENTS.offsets[:-1], SEGMENTS.lengths, SEGMENTS.total, CPU, queries)
    found = SdpaAttention().decode(asked, k_TKd, v_TKd, whole.within(window))
    assert (found - expected).abs().max() < 1e-12
    ranges = windowed_ranges(*whole.known, window, CPU)
    assert (decoding.attention(asked, [(k_TKd, v_TKd, ranges)]) - expected).abs().max() < 1e-12


@pytest.mark.parametrize("queries", [(1, 1, 1), (4, 1, 9)])
def test_the_device_is_told_what_the_host_knows(queries):
    slots = DecodeSlots.of((3, 80, 90), (70, 9, 33), 130, CPU, queries).within(24)
    expected = [min(n, 23 + m) for n, m in zip((70, 9, 33), queries, strict=True)]
    starts, used, _ = slots.known
    assert used == slots.used_B.tolist() == expected
    assert list(starts) == slots.bounds_B1.tolist()[:-1]
    assert [start + count for start, count in zip(starts, used, strict=True)] == [73, 89, 123]
    assert max(used) <= slots.longest <= 23 + max(queries)
    assert slots.window == (None if max(queries) == 1 else 24)


def test_slots_that_no_window_cuts_stay_as_they_are():
    slots = DecodeSlots.of((0, 70), (70, 9), 80, CPU)
    assert slots.within(None) is slots
    assert slots.within(70) is slots


class ForgettingWindows(SdpaAttention):
    """As a library that takes no notice of the argument."""

    name = "forgetting"

    def prefill(self, q_THd, k_TKd, v_TKd, segments, window=None, sinks_H=None):
        return super().prefill(q_THd, k_TKd, v_TKd, segments, None, sinks_H)


def test_a_backend_without_windows_is_refused_where_they_are_needed(monkeypatch):
    sizes = {"device": CPU, "dtype": torch.float32, "heads": 4, "kv_heads": 2, "head_dim": 16}
    monkeypatch.setattr(attention, "BACKENDS", {"sdpa": ForgettingWindows})
    assert choose_attention("sdpa", **sizes)[0].name == "forgetting"
    with pytest.raises(attention.ConfigError, match="sdpa: its prefill with a window is off by"):
        choose_attention("sdpa", **sizes, slides=True)
    monkeypatch.setattr(attention, "BACKENDS", {"sdpa": SdpaAttention})
    assert choose_attention("sdpa", **sizes, slides=True)[0].name == "sdpa"
