"""Linear layers a few tokens at a time: the same results, and memory that the widest of them do not fill."""

from __future__ import annotations

import pytest
import torch
from conftest import FAMILY_SETTINGS, SIZES, document, pack_of, sharpened, tiny_model
from torch.profiler import ProfilerActivity, profile

from pipeline.checkpoints.building import random_model
from pipeline.doctor.selftest import small
from pipeline.engines import memory
from pipeline.engines.memory import Packer
from pipeline.families.decoder import Decoder
from pipeline.families.projection import Norm
from pipeline.generation.decode import decode
from pipeline.generation.generated import StopRules
from pipeline.kernels.attention import SdpaAttention
from pipeline.kernels.fused import FP8
from pipeline.kernels.sdpa import sdpa_last
from pipeline.model import activations
from pipeline.model.prefill import prefill
from pipeline.pruning.dense import Dense
from pipeline.pruning.mars import Mars
from pipeline.pruning.marsinfer import MarsInfer
from pipeline.pruning.registry import method_names

pytestmark = pytest.mark.slow

PIECE = 7


def documents():
    return [document(60), document(9, seed=1), document(33, seed=2)]


def both(decoder, sdpa, method, given=None):
    """The same pack in one piece, and in pieces of a few tokens."""
    pack = pack_of(*(given or documents()))
    whole = prefill(decoder, sdpa, method, pack, new_tokens=2)
    decoder.piece_tokens = PIECE
    return whole, prefill(decoder, sdpa, method, pack, new_tokens=2)


def assert_same(whole, pieced, tolerance=1e-4):
    assert (whole.logits_BV - pieced.logits_BV).abs().max() <= tolerance
    assert whole.by_document() == pieced.by_document()
    for kind in ("keys", "values"):
        pairs = zip(getattr(whole.cache, kind), getattr(pieced.cache, kind), strict=True)
        assert all((a - b).abs().max() <= tolerance for a, b in pairs)


@pytest.mark.parametrize("name", method_names())
def test_pieces_change_nothing(decoder, sdpa, name):
    assert_same(*both(decoder, sdpa, small(name)))


def test_the_largest_matrix_products_are_of_a_piece(sdpa, monkeypatch):
    decoder, seen = tiny_model("qwen3"), []
    real = Norm.__call__
    monkeypatch.setattr(Norm, "__call__", lambda norm, x: seen.append(len(x)) or real(norm, x))
    decoder.piece_tokens = PIECE
    prefill(decoder, sdpa, Dense(), pack_of(*documents()))
    assert max(seen) == PIECE
    seen.clear()
    prefill(decoder, sdpa, MarsInfer(share=0.5, start_layer=0, window=5, prefix=4), pack_of(*documents()))
    assert max(seen) == PIECE


def test_what_fits_a_piece_is_computed_as_ever(sdpa):
    decoder = tiny_model("qwen2")
    whole = prefill(decoder, sdpa, Dense(), pack_of(document(60)))
    decoder.piece_tokens = 60
    assert torch.equal(prefill(decoder, sdpa, Dense(), pack_of(document(60))).logits_BV, whole.logits_BV)


@pytest.mark.parametrize(
    ("tokens", "sizes"), [(0, []), (7, [7]), (8, [4, 4]), (20, [7, 7, 6]), (22, [6, 6, 6, 4]), (1, [1])]
)
def test_pieces_are_few_and_of_like_size(tokens, sizes):
    decoder = tiny_model("llama")
    decoder.piece_tokens = PIECE
    pieces = decoder.pieces(tokens)
    assert [piece.stop - piece.start for piece in pieces] == sizes
    assert [i for piece in pieces for i in range(piece.start, piece.stop)] == list(range(tokens))


@pytest.mark.parametrize(("tokens", "sizes"), [(300, [192, 108]), (17_557, [8832, 8725]), (16_384, [16_384])])
def test_large_pieces_begin_at_whole_rows_together(tokens, sizes):
    decoder = tiny_model("llama")
    decoder.piece_tokens = 256 if tokens == 300 else 16_384
    assert [piece.stop - piece.start for piece in decoder.pieces(tokens)] == sizes


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
@pytest.mark.parametrize("linears", ["fp8", "mixed"])
def test_pieces_in_fp8(sdpa, monkeypatch, family, linears):
    monkeypatch.setattr("pipeline.families.configuration.fp8_available", lambda device: None)
    settings = {**SIZES, **FAMILY_SETTINGS[family]}
    model = random_model(family, settings, device=torch.device("cpu"), dtype=torch.bfloat16)
    decoder = Decoder(sharpened(model))
    decoder.use_linears(linears, ffn=True, keep=True)
    method = MarsInfer(low="fp8", start_layer=2, eta=1.0, eta_high=0.0, window=6, prefix=4)
    whole, pieced = both(decoder, sdpa, method, [document(150), document(70, seed=1)])
    # as far apart as with attention in float32: what is rounded to fp8 behind it steps by an eighth
    assert (whole.logits_BV - pieced.logits_BV).norm() <= 0.1 * whole.logits_BV.norm()


@pytest.mark.parametrize("piece", [1 << 14, 100])
@pytest.mark.parametrize("name", method_names())
def test_planned_bytes_bound_what_a_prefill_takes(sdpa, monkeypatch, name, piece):
    """Of a model whose feed-forward network is wide, as real ones' are."""
    monkeypatch.setitem(SIZES, "intermediate_size", 512)
    pieces_of(piece, monkeypatch)
    decoder, method = tiny_model("qwen3"), small(name)
    decoder.piece_tokens = piece
    alone = {"in_flight": 1} if name == "ffn-skip" else {}
    packer = Packer.on(
        decoder.device, method, decoder.shape, itemsize=4, new_tokens=2, pack_tokens=None, **alone
    )
    lengths = (1500, 400, 900)
    given = pack_of(*(document(length, seed=length) for length in lengths))
    peak = peak_bytes(lambda: prefill(decoder, sdpa, method, given, new_tokens=2))
    planned = packer.planned_bytes(lengths)
    assert planned / 4 < peak <= planned


def pieces_of(tokens, monkeypatch):
    """Plan pieces of so many tokens."""
    for module in (memory, activations):
        monkeypatch.setattr(module, "PIECE_TOKENS", tokens)


def peak_bytes(run):
    run()  # what is made once
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        run()
    held = highest = 0
    for event in seen.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            highest = max(highest, held)
    return highest


@pytest.mark.parametrize(
    "method", [Dense(), Mars(sparse_attention=0.5, window=5), MarsInfer(eta=0.9, start_layer=1)]
)
def test_queries_of_a_piece_see_what_all_see(monkeypatch, method):
    """In float64, a piece at a time of 128 tokens of long documents and short ones; keys and values whole."""
    decoder, backend = Decoder(tiny_model("qwen2").model.double()), SdpaAttention()
    backend.sparse_from, asked = 300, []
    real = Decoder.queries
    monkeypatch.setattr(Decoder, "queries", lambda *given: asked.append(len(given[2])) or real(*given))
    pack = pack_of(document(700), document(40, seed=1), document(333, seed=2))
    whole = prefill(decoder, backend, method, pack, new_tokens=2)
    assert not asked
    decoder.piece_tokens = 32
    pieced = prefill(decoder, backend, method, pack, new_tokens=2)
    assert max(asked, default=0) == (0 if method.reads_layers else 128)
    assert_same(whole, pieced, 1e-9)


@pytest.mark.parametrize("method", [Dense(), Mars()])
def test_the_memory_of_a_long_document_is_planned_closely(sdpa, monkeypatch, method):
    """Beside its keys and values little more than the residual stream is there of all tokens."""
    pieces_of(64, monkeypatch)
    monkeypatch.setitem(SIZES, "hidden_size", 128)
    decoder = tiny_model("qwen2")
    decoder.piece_tokens = 64
    packer = Packer.on(decoder.device, method, decoder.shape, itemsize=4, new_tokens=2, pack_tokens=None)
    peak = peak_bytes(lambda: prefill(decoder, sdpa, method, pack_of(document(6000)), new_tokens=2))
    planned = packer.planned_bytes([6000])
    assert planned / 1.5 < peak <= planned
    shape, beside = decoder.shape, packer.kv_bytes([6000]) + packer.mask_bytes(decoder.query_tokens, 6000)
    assert planned - beside < 6000 * 4 * (shape.hidden + shape.heads * shape.head_dim + 400)


@pytest.mark.parametrize(("queries", "window"), [(2000, None), (6000, 3000)])
def test_the_mask_that_queries_need_on_a_cpu_is_planned(queries, window):
    q_QHd, k_TKd, v_TKd = (torch.ones(count, heads, 16) for count, heads in ((queries, 4), *[(6000, 2)] * 2))
    peak = peak_bytes(lambda: sdpa_last(q_QHd, k_TKd, v_TKd, window)) - q_QHd.nbytes
    planned = activations.mask_bytes(queries, window or 6000, 4)
    assert planned / 1.3 < peak < 1.1 * planned < 30e6


@pytest.mark.parametrize("method", [Mars(), small("frugal")], ids=lambda method: method.name)
def test_keys_and_values_are_stored_in_e4m3_as_they_are_made(sdpa, method):
    """Decoded where they are, with the same answers as rounded behind the prefill, n times too.

    A method that begins anew stores nothing before.
    """
    decoder, pack, rules = tiny_model("qwen2"), pack_of(document(90)), StopRules(max_new_tokens=6)
    before = prefill(decoder, sdpa, method, pack, new_tokens=6)
    stored = prefill(decoder, sdpa, method, pack, new_tokens=6, kv_dtype=FP8)
    assert stored.cache.nbytes * 4 == before.cache.nbytes
    (expected,) = decode(decoder, sdpa, before, rules, kv_dtype=FP8, graphs=False)
    for _ in range(2):
        (got,) = decode(decoder, sdpa, stored, rules, kv_dtype=FP8, graphs=False, again=True)
        assert got.tokens == expected.tokens
