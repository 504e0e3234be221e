"""A layer's decode step: the operations of a prefill one by one, or what a GPU does in their place."""

from __future__ import annotations

import pytest
import torch
from conftest import FAMILY_SETTINGS, SIZES, sharpened, tiny_model
from kernel_cases import rounding_to_nearest

from pipeline.checkpoints.building import random_model
from pipeline.families import decoder as decoder_module
from pipeline.families import projection
from pipeline.families.decoder import STEP_ROWS, Decoder
from pipeline.generation.sampling import most_likely
from pipeline.kernels import fused, step
from pipeline.kernels.kv_fp8 import KvTarget

SLOTS = 600
BIASES = {"attention_bias": True, "mlp_bias": True}  # of every projection, which only Llama may have


class Run:
    """All layers for one token of each row: what was stored, what was asked, and the residual stream."""

    @torch.inference_mode()
    def __init__(self, decoder, rows, run_layer):
        shape, generator = decoder.shape, torch.Generator().manual_seed(rows)
        sizes = SLOTS, shape.kv_heads, shape.head_dim
        self.hidden = torch.randn(rows, shape.hidden, generator=generator).to(decoder.dtype)
        self.places = torch.randperm(SLOTS, generator=generator)[:rows]
        self.keys = [torch.randn(sizes, generator=generator).to(decoder.dtype) for _ in range(shape.layers)]
        self.values = [torch.randn(sizes, generator=generator).to(decoder.dtype) for _ in range(shape.layers)]
        self.queries, self.groups = [], shape.heads // shape.kv_heads
        self.normed = None
        rope = decoder.rope(self.hidden, torch.randint(0, 400, (rows,), generator=generator))
        for layer in range(shape.layers):
            run_layer(self, decoder, layer, rope)

    def attend(self, layer, q_BHd):
        """Something of the queries and of the new keys and values, which must have been stored by now."""
        self.queries.append(q_BHd.clone())
        new = (self.keys[layer] + self.values[layer]).index_select(0, self.places)
        return q_BHd + new.repeat_interleave(self.groups, dim=1)

    def tensors(self):
        return [self.hidden, *self.keys, *self.values, *self.queries]


def separately(run, decoder, layer, rope):
    q_BHd, k_BKd, v_BKd = decoder.qkv(layer, run.hidden, rope)
    run.keys[layer].index_copy_(0, run.places, k_BKd)
    run.values[layer].index_copy_(0, run.places, v_BKd)
    decoder.add_attention_(layer, run.hidden, run.attend(layer, q_BHd))
    decoder.add_feed_forward_(layer, run.hidden)


def in_a_step(run, decoder, layer, rope):
    target = KvTarget(run.keys[layer], run.values[layer], run.places)
    arguments = target, lambda q: run.attend(layer, q), run.normed
    run.normed = decoder.step_layer_(layer, run.hidden, rope, *arguments)


def forgetting_the_norm(run, decoder, layer, rope):
    run.normed = None
    in_a_step(run, decoder, layer, rope)


def assert_equal(run, other):
    for actual, wanted in zip(run.tensors(), other.tensors(), strict=True):
        assert torch.equal(actual, wanted)


def distance(a, b):
    return ((a.float() - b.float()).norm() / b.float().norm()).item()


def distances(run, other):
    return [distance(a, b) for a, b in zip(run.tensors(), other.tensors(), strict=True)]


def distances_of_first_layer(run, other):
    """Of what was made of the stream as it came: queries, keys and values."""
    places = run.places
    return [
        distance(run.queries[0], other.queries[0]),
        distance(run.keys[0][places], other.keys[0][places]),
        distance(run.values[0][places], other.values[0][places]),
    ]


def bf16_model(family, **settings):
    sizes = {**SIZES, **FAMILY_SETTINGS[family], **settings}
    return Decoder(sharpened(random_model(family, sizes, device=torch.device("cpu"), dtype=torch.bfloat16)))


@pytest.fixture
def fp8_decoder(monkeypatch):
    """Of a family, with every linear layer in fp8 by torch's slow path."""
    monkeypatch.setattr("pipeline.families.configuration.fp8_available", lambda device: None)

    def make(family, **settings):
        decoder = bf16_model(family, **settings)
        decoder.use_linears("fp8", keep=True)
        return decoder

    return make


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """Steps take the way of a GPU, by the functions' paths in plain torch."""
    monkeypatch.setattr(decoder_module, "has_kernels", lambda x: True)


@pytest.fixture
def row_wise_products(monkeypatch):
    """How often such a product was computed."""
    calls, real = [], projection.fp8_linear
    monkeypatch.setattr(projection, "fp8_linear", lambda *a, **more: calls.append(a) or real(*a, **more))
    return calls


@pytest.mark.parametrize("rows", [1, 3, 64])
def test_on_a_cpu_it_equals_the_separate_operations(decoder, rows):
    assert_equal(Run(decoder, rows, in_a_step), Run(decoder, rows, separately))


@pytest.mark.parametrize("linears", ["auto", "fp8", "mixed"])
@pytest.mark.parametrize("family", sorted(FAMILY_SETTINGS))
def test_without_kernels_so_it_does_in_every_precision(fp8_decoder, family, linears):
    decoder = fp8_decoder(family)
    decoder.use_linears(linears, keep=True)
    run = Run(decoder, 5, in_a_step)
    assert_equal(run, Run(decoder, 5, separately))
    assert run.normed is None


@pytest.mark.parametrize("family", sorted(FAMILY_SETTINGS))
def test_kernels_in_bf16_store_and_turn_as_the_separate_operations(as_on_a_gpu, family):
    decoder = bf16_model(family)
    assert_equal(Run(decoder, 5, in_a_step), Run(decoder, 5, separately))


@pytest.mark.parametrize("rows", [1, 3, 64])
@pytest.mark.parametrize(
    ("family", "settings"), [("llama", {}), ("llama", BIASES), ("mistral", {}), ("qwen2", {})]
)
def test_fp8_products_without_scales_are_near_those_with_them(
    fp8_decoder, as_on_a_gpu, row_wise_products, family, settings, rows
):
    decoder = fp8_decoder(family, **settings)
    expected = Run(decoder, rows, separately)
    assert row_wise_products
    row_wise_products.clear()
    run = Run(decoder, rows, in_a_step)
    assert row_wise_products == []
    # the first layer's products differ by roundings, and by those what is quantised next: a step of float8
    # is sixteen of bfloat16
    assert 0 < max(distances_of_first_layer(run, expected)) < 0.006
    assert max(distances(run, expected)) < 0.13
    decoder.use_linears("auto")
    exact = Run(decoder, rows, separately)
    near, far = (sum(distances(other, exact)) for other in (run, expected))
    assert near < 1.3 * far  # no less exact, but for chance
    decoder.use_linears("fp8", keep=True)
    assert_equal(Run(decoder, rows, forgetting_the_norm), run)


@pytest.mark.slow
def test_the_kernels_are_given_what_they_want(fp8_decoder, as_on_a_gpu, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # read when the kernels' module is imported
    pytest.importorskip("triton")
    from triton.runtime import interpreter

    from pipeline.kernels import triton_kernels

    decoder = fp8_decoder("llama", **BIASES)
    expected = Run(decoder, 3, in_a_step)
    for module in (fused, step):
        monkeypatch.setattr(module, "_kernels", lambda x: triton_kernels)
    monkeypatch.setattr(interpreter, "_convert_float", rounding_to_nearest)
    assert max(distances(Run(decoder, 3, in_a_step), expected)) < 0.03
    decoder.use_linears("auto")
    assert max(distances(Run(decoder, 3, in_a_step), Run(decoder, 3, separately))) < 0.03


@pytest.mark.parametrize(("family", "rows"), [("qwen3", 5), ("qwen2", STEP_ROWS + 1)])
def test_norms_of_heads_and_many_rows_in_fp8_take_the_separate_operations(
    fp8_decoder, as_on_a_gpu, family, rows
):
    decoder = fp8_decoder(family)
    assert_equal(Run(decoder, rows, in_a_step), Run(decoder, rows, separately))


def test_the_head_orders_tokens_as_the_logits_do():
    decoder = bf16_model("llama", vocab_size=5000)
    hidden = torch.randn(40, decoder.shape.hidden, generator=torch.Generator().manual_seed(0)).bfloat16()
    hidden[3] = torch.nan
    with torch.inference_mode():
        scores, logits = decoder.head(hidden), decoder.logits(hidden)
    assert (scores.dtype, logits.dtype) == (torch.bfloat16, torch.float32)
    assert torch.equal(most_likely(scores), most_likely(logits))
    tied = (scores == scores.amax(-1, keepdim=True)).sum(-1)
    assert (tied > 1).any()  # which bfloat16 often is


def test_only_the_places_of_the_new_tokens_are_written():
    run, before = (Run(tiny_model("llama"), 3, function) for function in (in_a_step, lambda *_: None))
    for now, then in zip((*run.keys, *run.values), (*before.keys, *before.values), strict=True):
        changed = (now != then).flatten(1).any(1).nonzero().flatten()
        assert changed.tolist() == sorted(run.places.tolist())
