"""FFN-SkipLLM: decode steps against a plain loop over stock modules, and what it does not go with."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import FAMILY_SETTINGS, SIZES, document, loaded, pack_of, sharpened

from pipeline.checkpoints.building import random_model
from pipeline.engines.local import LocalEngine
from pipeline.errors import ConfigError
from pipeline.families.decoder import Decoder
from pipeline.generation.decode import decode
from pipeline.generation.generated import StopRules
from pipeline.generation.sampling import Sampling
from pipeline.model.prefill import prefill
from pipeline.pruning.dense import Dense
from pipeline.pruning.ffn_skip import FfnSkip

NEW_TOKENS, PROMPT = 12, 20
LAYERS = 8


@pytest.fixture(scope="module")
def model():
    settings = {**SIZES, **FAMILY_SETTINGS["qwen2"], "num_hidden_layers": LAYERS}
    made = random_model("qwen2", settings, device=torch.device("cpu"), dtype=torch.float64, seed=3)
    return Decoder(sharpened(made))


@torch.inference_mode()
def naive(model, ids, method):
    """A greedy answer's tokens, and the networks each step leaves out; stock modules, all tokens anew."""
    rule, body = method.step_skips(model.shape), model.model.model
    model.model.set_attn_implementation("eager")
    ids, tokens, skipped = list(ids), [], []
    while True:
        hidden = body.embed_tokens(torch.tensor([ids]))
        n = len(ids)
        rope = body.rotary_emb(hidden, torch.arange(n)[None])
        mask = torch.full((n, n), float("-inf"), dtype=hidden.dtype).triu(1)[None, None]
        left, counts = [0] * n, [0] * n
        for index, layer in enumerate(body.layers):
            after = hidden + layer.self_attn(layer.input_layernorm(hidden), rope, mask)[0]
            fed = after + layer.mlp(layer.post_attention_layernorm(after))
            for place in range(PROMPT, n):  # the answer's tokens, whose step makes token `place - PROMPT + 2`
                if left[place] and index in rule.layers:
                    fed[0, place] = after[0, place]
                    left[place] -= 1
                    counts[place] += 1
                elif index + 1 in rule.layers and place - PROMPT + 2 > rule.warm_up:
                    cosine = torch.nn.functional.cosine_similarity(after[0, place], fed[0, place], dim=0)
                    left[place] = rule.most if cosine >= rule.threshold else 0
            hidden = fed
        tokens.append(int(model.model.lm_head(body.norm(hidden))[0, -1].argmax()))
        if n > PROMPT:
            skipped.append(counts[-1])
        if len(tokens) == NEW_TOKENS:
            return tokens, skipped
        ids.append(tokens[-1])


def answered(model, sdpa, ids_document, method):
    rule = method.step_skips(model.shape)
    made = prefill(model, sdpa, method, pack_of(ids_document), NEW_TOKENS)
    (answer,) = decode(model, sdpa, made, StopRules(max_new_tokens=NEW_TOKENS), skips=rule)
    return answer


@pytest.mark.parametrize(
    "method",
    [
        FfnSkip(threshold=-1.0, warm_up=5),
        FfnSkip(threshold=-1.0, warm_up=0, cold_first=1, cold_last=0, most=2),
        FfnSkip(threshold=0.8, warm_up=3, cold_first=1, cold_last=1),
    ],
    ids=str,
)
def test_steps_equal_a_plain_loop(model, sdpa, method):
    doc = document(PROMPT, seed=4)
    answer, (tokens, skipped) = answered(model, sdpa, doc, method), naive(model, doc.input_ids, method)
    assert answer.tokens == tokens
    assert answer.skipped_ffns == skipped
    warm = max(0, method.warm_up - 1)  # steps: the first token comes of the prefill
    assert not any(skipped[:warm])
    assert any(skipped[warm:])
    if method == FfnSkip(threshold=-1.0, warm_up=5):
        assert skipped[warm:] == [LAYERS // 2] * (NEW_TOKENS - 5)  # all but the cold quarters


def test_a_threshold_that_nothing_reaches_is_dense(model, sdpa):
    doc = document(PROMPT, seed=4)
    dense = prefill(model, sdpa, Dense(), pack_of(doc), NEW_TOKENS)
    (expected,) = decode(model, sdpa, dense, StopRules(max_new_tokens=NEW_TOKENS))
    answer = answered(model, sdpa, doc, FfnSkip(threshold=2.0, warm_up=0))
    assert answer.tokens == expected.tokens
    assert answer.skipped_ffns == [0] * (NEW_TOKENS - 1)
    other = answered(model, sdpa, doc, FfnSkip(threshold=-1.0, warm_up=0))
    assert other.tokens != expected.tokens


def test_an_engine_that_decodes_several_rows_refuses_it():
    rules = StopRules(max_new_tokens=2)
    with pytest.raises(ConfigError, match=r"^method ffn-skip needs in_flight=1, so that each row is decoded"):
        LocalEngine(loaded(), FfnSkip(), rules=rules, sampling=Sampling(), in_flight=2)


def test_layers_that_a_model_has_not_are_refused(model):
    with pytest.raises(ConfigError, match=r"^cold_first=9, and the model has 8 layers$"):
        FfnSkip(cold_first=9).check_depth(model.shape)


ALONE = "which gains nothing where several rows are decoded together: give --in-flight 1"


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        ((), f"--method ffn-skip leaves out parts of decode steps, {ALONE}"),
        (("--in-flight", "2"), f"--method ffn-skip leaves out parts of decode steps, {ALONE}"),
        (("--in-flight", "1", "--lookup", "4"), "--method ffn-skip and --lookup 4 exclude each other"),
        (("--in-flight", "1", "--group", "any"), "--method ffn-skip and --group any exclude each other"),
    ],
)
def test_what_it_does_not_go_with_is_refused(fish, refusal, flags, complaint):
    asked = ("--text-column", "body", "--question-column", "ask", "--method", "ffn-skip")
    assert refusal(fish, "out.jsonl", *asked, *flags) == complaint


def test_rows_tell_the_share_of_networks_left_out(fish, call, tmp_path, capfd):
    asked = ("--text-column", "body", "--question-column", "ask", "--max-new-tokens", "6")
    skip = ("--method", "ffn-skip", "--in-flight", "1", "--set", "warm_up=3", "--set", "threshold=-1")
    assert call(fish, tmp_path / "skip.jsonl", *asked, *skip) == 0
    assert "changed nothing on all" not in capfd.readouterr().err
    assert call(fish, tmp_path / "dense.jsonl", *asked) == 0
    rows, dense = (
        [json.loads(line) for line in (tmp_path / f"{name}.jsonl").open()] for name in ("skip", "dense")
    )
    assert [row["ffn_ratio"] for row in rows] == [1.0] * 3
    for row in rows:  # of the steps behind the warm-up half of the layers are left out
        steps = row["new_tokens"] - (row["finish_reason"] == "length")
        assert row["skipped_ffn_ratio"] == pytest.approx(0.5 * max(0, steps - 2) / steps)
    assert max(row["skipped_ffn_ratio"] for row in rows) == pytest.approx(0.3)
    assert "skipped_ffn_ratio" not in dense[0]
