"""How much memory a pack may take and how much it will: by arithmetic, for one method on one device."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import document, loaded

from pipeline.checkpoints.device_memory import is_out_of_memory
from pipeline.engines import memory
from pipeline.engines.memory import Packer, default_pack_tokens
from pipeline.model.activations import activation_bytes, lean_bytes, piece_bytes, running_bytes
from pipeline.pruning.dense import Dense
from pipeline.pruning.mars import Mars
from pipeline.pruning.marsinfer import MarsInfer
from pipeline.pruning.registry import make_method
from pipeline.pruning.shape import PIECE_TOKENS, ModelShape


@pytest.fixture
def model():
    return loaded()


@pytest.mark.parametrize(("wanted", "in_flight"), [(None, 1), (4, 1), (0, 0)])
def test_rows_of_a_method_that_holds_keys_itself_run_one_by_one_without_a_store(model, wanted, in_flight):
    packer = Packer.on(
        torch.device("cpu"),
        make_method("hip"),
        model.decoder.shape,
        itemsize=4,
        new_tokens=3,
        pack_tokens=None,
        in_flight=wanted,
    )
    rows = [document(10, seed=1), document(12, seed=2)]
    assert (packer.store_bytes, packer.in_flight) == (0, in_flight)
    assert packer.max_bytes == packer.all_bytes > packer.planned_bytes([12])
    assert [[row.prompt_tokens for row in pack] for pack in packer.packs(rows)] == [[12], [10]]
    assert all(map(packer.runs_alone, rows))


def test_memory_of_the_host_runs_out_too():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 55, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)
    assert not is_out_of_memory(RuntimeError("bad luck"))


def test_planned_bytes_grow_with_tokens_and_documents(model):
    shape = model.decoder.shape
    cpu = torch.device("cpu")
    planned = Packer.on(cpu, Dense(), shape, itemsize=4, new_tokens=10, pack_tokens=None).planned_bytes
    kv = shape.layers * 2 * shape.kv_heads * shape.head_dim * 4
    logits = shape.vocab * 8
    assert planned([100]) == 110 * kv + lean_bytes(shape, 4, 100) + logits
    assert planned([50, 50]) == planned([100]) + 10 * kv + logits
    reading = Packer.on(
        cpu, MarsInfer(start_layer=1), shape, itemsize=4, new_tokens=10, pack_tokens=None
    ).planned_bytes
    scores = 12 * 64 * shape.heads  # a token of the longest document
    assert reading([100]) == 110 * kv + running_bytes(shape, 4, 100) + 100 * scores + logits
    assert reading([50, 50]) == reading([100]) + 10 * kv + logits - 50 * scores


@pytest.mark.parametrize(("tokens", "kv_itemsize", "fits"), [(1 << 20, 1, True), (1 << 20, None, False)])
def test_a_document_of_a_million_tokens_is_refused_where_it_does_not_fit(tokens, kv_itemsize, fits):
    """Of the shape of Qwen2-7B, on a GPU of which fp8 weights leave 71 GB."""
    shape = ModelShape(
        layers=28, hidden=3584, ffn=18944, heads=28, kv_heads=4, head_dim=128, vocab=152064, context=1 << 20
    )
    packer = Packer(
        device=torch.device("cuda"),
        method=Mars(),
        shape=shape,
        itemsize=2,
        new_tokens=64,
        pack_tokens=32768,
        max_bytes=int(0.9 * 71e9),
        kv_itemsize=kv_itemsize,
    )
    prompt = replace(document(10), input_ids=np.zeros(tokens - 64, dtype=np.int64))
    residual, kv = tokens * 3584 * 2, tokens * 28 * 2 * 4 * 128 * (kv_itemsize or 2)
    assert residual + kv < packer.bytes_alone(prompt) < residual + kv + 9.5e9
    assert packer.runs_alone(prompt)
    assert packer.refuses(prompt) is not fits


def test_the_default_pack_is_bounded_by_device_and_memory(model, monkeypatch):
    shape, cpu = model.decoder.shape, torch.device("cpu")
    assert default_pack_tokens(shape, itemsize=4, device=cpu) == 8192
    monkeypatch.setattr("pipeline.engines.memory.free_bytes", lambda device: 1_000_000)
    assert 1 < default_pack_tokens(shape, itemsize=4, device=cpu) < 1_000
    monkeypatch.setattr("pipeline.engines.memory.free_bytes", lambda device: 0)
    assert default_pack_tokens(shape, itemsize=4, device=cpu) == 1


def test_what_is_wide_is_planned_for_a_piece_and_the_rest_for_every_token(model, monkeypatch):
    shape = model.decoder.shape
    piece = PIECE_TOKENS
    a_token, wide = activation_bytes(shape, 4), piece_bytes(shape, 4, 1)
    assert wide >= (3 * shape.ffn + shape.hidden) * 4
    assert running_bytes(shape, 4, piece) == piece * (a_token + wide)
    assert running_bytes(shape, 4, 8 * piece) == 8 * piece * a_token + piece * wide
    # a pack as large as memory allows is planned to fill it, in one piece or in several
    monkeypatch.setitem(memory.MOST_PACK_TOKENS, "cpu", 10**9)
    kv = shape.layers * shape.kv_bytes_per_token(4)
    for tokens in (piece // 2, piece, piece + 1, 5 * piece):
        needed = tokens * kv + running_bytes(shape, 4, tokens)
        monkeypatch.setattr(memory, "free_bytes", lambda device, needed=needed: needed)
        assert default_pack_tokens(shape, itemsize=4, device=torch.device("cpu")) == tokens
