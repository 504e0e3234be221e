"""Attention backends against the reference, and how one is chosen."""

from __future__ import annotations

import pytest
import torch

from pipeline.errors import ConfigError
from pipeline.kernels import attention, reference
from pipeline.kernels.attention import SdpaAttention, choose_attention
from pipeline.kernels.decode_slots import DecodeSlots
from pipeline.kernels.sdpa import sdpa
from pipeline.kernels.segments import Segments

SIZES = {"heads": 4, "kv_heads": 2, "head_dim": 16}


def qkv(segments):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(segments.total, heads, 16, generator=generator) for heads in (4, 2, 2)]


def test_documents_of_a_pack_do_not_see_each_other():
    segments = Segments.of((33, 1, 70))
    q, k, v = qkv(segments)
    mixed = SdpaAttention().prefill(q, k, v, segments)
    assert (mixed - reference.causal_attention(q, k, v, segments)).abs().max() < 1e-5


def test_decode_attends_to_each_documents_own_slots():
    segments = Segments.of((5, 9))
    q, k, v = qkv(segments)
    slots = DecodeSlots.of([0, 5], [5, 9], segments.total, segments.device)
    mixed = SdpaAttention().decode(q[[4, 13]], k, v, slots)
    assert (mixed - reference.causal_attention(q, k, v, segments)[[4, 13]]).abs().max() < 1e-5


def test_auto_on_a_cpu_says_why_not_the_faster_ones():
    backend, refused = choose_attention("auto", device=torch.device("cpu"), dtype=torch.float32, **SIZES)
    assert backend.name == "sdpa"
    assert refused == dict.fromkeys(["fa3", "flash", "cudnn", "varlen"], "needs a GPU")


def test_a_backend_asked_for_by_name_is_not_replaced():
    with pytest.raises(ConfigError, match=r"no attention backend works on cpu .*: fa3: needs a GPU"):
        choose_attention("fa3", device=torch.device("cpu"), dtype=torch.float32, **SIZES)


def test_a_backend_that_is_wrong_on_the_trial_is_refused(monkeypatch):
    class Acausal(SdpaAttention):
        def prefill(self, q, k, v, segments, *_):
            return torch.cat([sdpa(q[a:b], k[a:b], v[a:b], causal=False) for a, b in segments.ranges()])

    monkeypatch.setitem(attention.BACKENDS, "sdpa", Acausal)
    with pytest.raises(ConfigError, match=r"sdpa: its prefill is off by"):
        choose_attention("sdpa", device=torch.device("cpu"), dtype=torch.float32, **SIZES)
