"""Linear layers in fp8, as far as a CPU can show it: through torch's slow path."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from conftest import FAMILY_SETTINGS, SIZES, document, pack_of

from pipeline.checkpoints.building import random_model
from pipeline.errors import ConfigError
from pipeline.families.decoder import Decoder
from pipeline.model.continuation import continue_with
from pipeline.model.layers import _Run
from pipeline.model.offload import make_cache
from pipeline.model.pack import PartialPrefill
from pipeline.model.prefill import prefill
from pipeline.pruning.dense import Dense
from pipeline.pruning.mars import Mars
from pipeline.pruning.marsinfer import MarsInfer

TIERS = MarsInfer(low="fp8", start_layer=1, eta=0.8, eta_high=0.4, window=6, prefix=4)


@pytest.fixture
def slow_cpu(monkeypatch):
    monkeypatch.setattr("pipeline.families.configuration.fp8_available", lambda device: None)


def bf16_model(family="qwen3"):
    settings = {**SIZES, **FAMILY_SETTINGS[family]}
    device, dtype = torch.device("cpu"), torch.bfloat16
    model = random_model(family, settings, device=device, dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(6)
    return Decoder(model)


def logits(decoder, sdpa, method=Dense()):  # noqa: B008 - immutable
    return prefill(decoder, sdpa, method, pack_of(document(120), document(40, seed=1)))


def distance(a, b):
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_linear_layers_in_fp8_stay_close(slow_cpu, sdpa, family):
    decoder = bf16_model(family)
    full = logits(decoder, sdpa).logits_BV
    decoder.use_linears("fp8", keep=True)
    assert 0 < distance(logits(decoder, sdpa).logits_BV, full) < 0.3
    decoder.use_linears("auto")
    assert torch.equal(logits(decoder, sdpa).logits_BV, full)


def test_without_keep_the_other_weights_are_given_up(slow_cpu, sdpa):
    decoder = bf16_model()
    before = sum(p.numel() for p in decoder.model.parameters())
    decoder.use_linears("fp8")
    logits(decoder, sdpa)
    block = decoder.model.model.layers[0]
    assert block.mlp.up_proj.weight.numel() == block.self_attn.q_proj.weight.numel() == 0
    assert sum(p.numel() for p in decoder.model.parameters()) < before


def test_mixed_keeps_the_end_of_each_prompt_and_what_is_asked_behind_it(slow_cpu, sdpa):
    decoder = bf16_model("qwen2")
    pack = pack_of(document(150), document(70, seed=1), document(40, seed=2))
    full = prefill(decoder, sdpa, Dense(), pack).logits_BV
    decoder.use_linears("fp8", keep=True)
    in_fp8 = prefill(decoder, sdpa, Dense(), pack).logits_BV
    decoder.use_linears("mixed", keep=True)
    prefilled = prefill(decoder, sdpa, Dense(), pack, new_tokens=3)
    near, far = (distance(x[:2], full[:2]) for x in (prefilled.logits_BV, in_fp8))
    assert 0 < near < far / 2
    # a document of at most the window is computed as without fp8
    assert distance(prefilled.logits_BV[2], full[2]) < 1e-2
    for ((*works, last),), length in zip(prefilled.by_document(), (150, 70, 40), strict=True):
        assert (last.ffn_tokens, last.ffn_fp8_tokens) == (1, 0)
        assert {(work.ffn_tokens, work.ffn_fp8_tokens) for work in works} == {(length, max(0, length - 64))}
    behind = continue_with(decoder, sdpa, prefilled.cache, [[1, 2]] * 3, prefilled.next_positions)
    decoder.use_linears("auto")
    plain = prefill(decoder, sdpa, Dense(), pack, new_tokens=3)
    expected = continue_with(decoder, sdpa, plain.cache, [[1, 2]] * 3, plain.next_positions)
    assert distance(behind[4:], expected[4:]) < 1e-2
    assert 0 < distance(behind[:4], expected[:4]) < 0.2


@pytest.mark.parametrize("piece", [1 << 14, 32])
@pytest.mark.parametrize("lengths", [(150, 70), (600,)])
def test_mixed_has_queries_keys_and_values_of_the_middle_layers_in_fp8(slow_cpu, sdpa, lengths, piece):
    """But for the kept tokens, be they many of the pack or few, and queries all at once or by pieces."""
    decoder, method = bf16_model("qwen2"), Dense()
    decoder.use_linears("fp8", keep=True)
    decoder.use_linears("mixed", keep=True)
    pack = pack_of(*(document(length, seed=length) for length in lengths))
    plan = method.plan(decoder.shape, lengths)
    cache = make_cache(plan, 0, None, device=decoder.device, itemsize=2, score=None)
    decoder.piece_tokens = piece
    with torch.inference_mode():
        run = _Run.of(decoder, sdpa, method, pack, None, PartialPrefill.afresh(decoder, pack, cache))
        assert (len(run.pieces) > 1) == (piece == 32)
        assert (run.kept.beside_all is None) == (lengths == (600,))
        for layer in range(decoder.shape.layers):
            in_full, in_fp8 = (decoder.qkv(layer, run.hidden_TD, run.rope, fp8=fp8) for fp8 in (False, True))
            q, *keys_values = run._projected(layer)
            if q is None:
                asked = partial(decoder.queries, layer)
                q = torch.cat([run._made(asked, layer, each)[0] for each in run.pieces])
            for made, full, low in zip((q, *keys_values), in_full, in_fp8, strict=True):
                assert distance(made[run.kept.rows].float(), full[run.kept.rows].float()) < 1e-2
                expected = low if 1 / 3 <= layer / decoder.shape.layers < 2 / 3 else full
                others = run.kept.others
                assert distance(made[others].float(), expected[others].float()) < 1e-2
                assert distance(low[others].float(), full[others].float()) > 1e-2


def test_mixed_keeps_short_documents_whatever_their_pack(slow_cpu, sdpa, monkeypatch):
    monkeypatch.setattr("pipeline.model.precision.worthwhile", lambda length, *_: length >= 100)
    decoder = bf16_model("qwen2")
    long, short = document(150), document(90, seed=1)
    full = prefill(decoder, sdpa, Dense(), pack_of(short)).logits_BV
    decoder.use_linears("mixed", keep=True)
    alone = prefill(decoder, sdpa, Dense(), pack_of(short))
    packed = prefill(decoder, sdpa, Dense(), pack_of(long, short))
    assert torch.equal(alone.logits_BV[0], full[0])
    assert distance(packed.logits_BV[1], full[0]) < 1e-2
    assert [works[0].ffn_fp8_tokens for (works,) in packed.by_document()] == [150 - 64, 0]


@pytest.mark.parametrize("method", [MarsInfer(start_layer=1, eta=0.7), Mars(last_full=1, window=70, most=70)])
def test_mixed_goes_with_methods_that_select(slow_cpu, sdpa, method):
    decoder = bf16_model("qwen2")
    full = logits(decoder, sdpa, method)
    decoder.use_linears("mixed", keep=True)
    mixed = logits(decoder, sdpa, method)
    for (before,), (after,) in zip(full.by_document(), mixed.by_document(), strict=True):
        assert [work.tokens for work in after] == [work.tokens for work in before]
        assert all(work.ffn_fp8_tokens <= max(0, work.ffn_tokens - min(64, work.tokens)) for work in after)
    assert any(work.ffn_fp8_tokens for (works,) in mixed.by_document() for work in works)
    assert 0 < distance(mixed.logits_BV, full.logits_BV) < 0.3


def test_mixed_keeps_both_forms_of_its_weights(slow_cpu, sdpa):
    decoder = bf16_model()
    before = sum(p.numel() for p in decoder.model.parameters())
    decoder.use_linears("mixed")
    assert sum(p.numel() for p in decoder.model.parameters()) == before


def test_tiers_count_what_each_precision_did(slow_cpu, sdpa):
    decoder = bf16_model()
    decoder.use_linears("auto", ffn=True)
    prefilled = logits(decoder, sdpa, TIERS)
    for passes in prefilled.by_document():
        first, *others, last = passes[0]
        assert (last.tokens, last.ffn_tokens, last.ffn_fp8_tokens) == (first.tokens, 1, 0)
        assert first.ffn_fp8_tokens == 0
        assert first.ffn_tokens == first.tokens
        for work in others:
            assert 0 < work.ffn_fp8_tokens < work.ffn_tokens <= work.tokens


def test_all_tokens_in_the_high_tier_equal_dense(slow_cpu, sdpa):
    decoder = bf16_model()
    decoder.use_linears("auto", ffn=True)
    everything = MarsInfer(low="fp8", start_layer=1, eta=1.0, eta_high=1.0)
    assert torch.equal(logits(decoder, sdpa, everything).logits_BV, logits(decoder, sdpa).logits_BV)


def test_with_no_high_tier_kept_tokens_are_all_in_fp8_and_nothing_is_scored_for_eta_1(slow_cpu, sdpa):
    decoder = bf16_model()
    decoder.use_linears("auto", ffn=True)
    prefilled = logits(decoder, sdpa, MarsInfer(low="fp8", start_layer=0, eta=1.0))
    for ((*layers, last),) in prefilled.by_document():
        assert all(work.ffn_fp8_tokens == work.tokens for work in layers)
        assert last.ffn_fp8_tokens == last.ffn_tokens == 1
    assert all(work.scored_pairs == 0 for (layers,) in prefilled.by_document() for work in layers)


def test_weights_whose_sides_the_tensor_cores_do_not_take_are_refused(slow_cpu):
    sizes = {**SIZES, **FAMILY_SETTINGS["llama"], "intermediate_size": 100}
    decoder = Decoder(random_model("llama", sizes, device=torch.device("cpu"), dtype=torch.bfloat16))
    with pytest.raises(ConfigError, match=r"the sides of its weights, .* 100, .* must divide by 16"):
        decoder.use_linears("fp8")
    assert not decoder.linears_in_fp8


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"low": "int8"}, "low=int8: choose fp8 or none"),
        ({"eta_high": 0.5}, "eta_high and share_high need low=fp8"),
        ({"low": "fp8", "share_high": 1.5}, "share_high=1.5 is out of range: it must be between 0 and 1"),
    ],
)
def test_settings_that_do_not_fit(settings, message):
    with pytest.raises(ConfigError) as caught:
        MarsInfer(**settings)
    assert str(caught.value) == message


def test_a_device_that_cannot_is_refused_with_the_reason(refusal, fish, tmp_path):
    flags = ["--text-column", "body", "--question-column", "ask", "--id-column", "doc"]
    said = "fp8 cannot be used here: FP8 needs an NVIDIA GPU, and on a CPU would only be slower"
    for more in (
        ["--linear-dtype", "fp8"],
        ["--method", "marsinfer", "--set", "start_layer=1", "--set", "low=fp8"],
    ):
        assert refusal(fish, tmp_path / "out.parquet", *flags, *more) == said
    assert refusal(fish, tmp_path / "out.parquet", *flags, "--linear-dtype", "int4") == (
        "--linear-dtype 'int4': choose from auto, fp8, mixed"
    )
    assert refusal(fish, tmp_path / "out.parquet", *flags, "--attention-dtype", "fp8") == (
        "--attention-dtype fp8: attention in fp8 is taken out: the sums of FlashAttention-3's kernel lose 7% "
        "at 4,096 tokens and 65% at 131,072 where values share a sign; leave it out, and use --linear-dtype "
        "fp8 or mixed"
    )
