"""Which documents warm up: all kernels that a run may need are loaded by one of them."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from pipeline.engines import warm_up
from pipeline.kernels import sparse
from pipeline.kernels.attention import SdpaAttention
from pipeline.model import precision
from pipeline.model.shape import ModelShape
from pipeline.pruning.registry import make_method

GPU = torch.device("cuda")
SHAPE = ModelShape(
    layers=28, hidden=1536, ffn=8960, heads=12, kv_heads=2, head_dim=128, vocab=151936, context=131072
)


def engine(linears="auto", method="dense", device=GPU):
    adapter = SimpleNamespace(shape=SHAPE, linears=linears)
    return SimpleNamespace(
        model=SimpleNamespace(adapter=adapter, device=device, attention=SdpaAttention()),
        method=make_method(method, {}),
    )


def test_the_first_length_of_which_something_is_so():
    assert warm_up._first(lambda n: n >= 700, 10_000) == 700
    assert warm_up._first(lambda n: False, 10_000) == 10_001


def test_dense_in_one_precision_needs_no_longer_documents():
    assert warm_up._longer(engine(), 100_000) == set()


def test_mixed_precision_warms_up_where_fp8_begins():
    (length,) = warm_up._longer(engine(linears="mixed"), 100_000)
    assert precision.worthwhile(length - precision.WINDOW, SHAPE, GPU)
    assert not precision.worthwhile(length - precision.WINDOW - 1, SHAPE, GPU)


@pytest.mark.parametrize(
    ("longest", "expected"),
    [
        (None, warm_up.LONG_WARM_UP_TOKENS),
        (20_000, 20_000),
        (50_000, warm_up.LONG_WARM_UP_TOKENS),
        (900, None),
    ],
)
def test_block_sparse_attention_warms_up_where_it_begins_and_beyond(longest, expected, monkeypatch):
    monkeypatch.setattr(sparse, "kernels_on", lambda kind: kind == "cuda")
    lengths = warm_up._longer(engine(method="mars"), 100_000, longest)
    width = SHAPE.heads * SHAPE.head_dim
    assert sparse.worthwhile(min(lengths), width, GPU)
    assert not sparse.worthwhile(min(lengths) - 1, width, GPU)
    assert max(lengths) == expected or (expected is None and len(lengths) == 1)


@pytest.mark.parametrize(("room", "device"), [(5_000, GPU), (100_000, torch.device("cpu"))])
def test_nothing_is_longer_than_the_context_and_a_cpu_has_one_kind_of_kernel(room, device):
    assert warm_up._longer(engine(linears="mixed", method="mars", device=device), room) == set()
