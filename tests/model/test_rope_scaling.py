"""`--rope-scaling`: YaRN through transformers' own configuration, for a context that grows."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from conftest import FAMILY_SETTINGS, SIZES, document, pack_of, sharpened
from transformers import AutoConfig, AutoModelForCausalLM

from pipeline import run_batch
from pipeline.checkpoints.building import random_model
from pipeline.errors import ConfigError, ModelError
from pipeline.families.configuration import check_config, shape_of, with_rope_scaling
from pipeline.model.loading import load_model, open_model
from pipeline.model.prefill import prefill
from pipeline.pruning.dense import Dense
from pipeline.settings.model_settings import ModelSettings
from pipeline.settings.parse import parse_rope_scaling

PLAIN = {**FAMILY_SETTINGS, "llama": {}}  # the tests' llama has llama3's scaling


@pytest.fixture(params=sorted(PLAIN))
def folder(request, model_folder, tmp_path):
    """A model of each family with a context of 128, and the tokenizer of the tests."""
    settings = {**SIZES, **PLAIN[request.param], "max_position_embeddings": 128}
    model = random_model(request.param, settings, device=torch.device("cpu"), dtype=torch.float32)
    shutil.copytree(model_folder, tmp_path / "model")
    sharpened(model).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def by_hand(folder, **scaling):
    """Stock transformers with the lines that a model card tells to add to config.json."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    theta = config.pop("rope_parameters")["rope_theta"]
    path.write_text(json.dumps(config | {"rope_theta": theta, "rope_scaling": {"type": "yarn", **scaling}}))
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.mark.parametrize(
    ("spec", "factor", "original", "context"),
    [("yarn:4", 4.0, 128, 512), ("yarn:2.5:100", 2.5, 100, 250)],
)
def test_the_logits_are_those_of_stock_transformers(folder, sdpa, tmp_path, spec, factor, original, context):
    model = load_model(str(folder), device="cpu", rope_scaling=spec)
    assert (model.shape.context, model.rope_scaling) == (context, spec)
    doc = document(context - 3)
    ours = prefill(model.decoder, sdpa, Dense(), pack_of(doc)).logits_BV[0]
    unscaled = load_model(str(folder), device="cpu")
    assert unscaled.shape.context == 128
    assert unscaled.fingerprint == model.fingerprint
    without = prefill(unscaled.decoder, sdpa, Dense(), pack_of(doc)).logits_BV[0]
    shutil.copytree(folder, tmp_path / "by_hand")
    stock_model = by_hand(tmp_path / "by_hand", factor=factor, original_max_position_embeddings=original)
    with torch.inference_mode():
        stock = stock_model(torch.from_numpy(doc.input_ids)[None]).logits[0, -1]
    assert stock.std() > 0.1
    assert (ours - stock).abs().max() <= 1e-4
    assert (ours - without).abs().max() > 1e-2  # or the scaling changes nothing, and this test shows nothing


def test_what_is_said_before_the_weights_are_loaded(model_folder):
    unloaded = open_model(ModelSettings(model=str(model_folder), device="cpu", rope_scaling="yarn:2"))
    assert unloaded.shape.context == 2048
    assert unloaded.config.max_position_embeddings == 1024
    loaded = unloaded.load()
    assert (loaded.shape.context, loaded.fingerprint) == (2048, unloaded.fingerprint)


def context(**settings):
    return shape_of(AutoConfig.for_model("qwen2", **{**SIZES, **settings})).context


YARN = {"factor": 4.0, "original_max_position_embeddings": 128}


def test_yarn_in_the_configuration_extends_the_context(folder, sdpa, tmp_path):
    shutil.copytree(folder, tmp_path / "by_hand")
    stock_model = by_hand(tmp_path / "by_hand", **YARN)
    model = load_model(str(tmp_path / "by_hand"), device="cpu")
    flagged = load_model(str(folder), device="cpu", rope_scaling="yarn:4")
    assert model.shape == flagged.shape
    assert model.shape.context == 512
    doc = document(500)
    ours = prefill(model.decoder, sdpa, Dense(), pack_of(doc)).logits_BV[0]
    with torch.inference_mode():
        stock = stock_model(torch.from_numpy(doc.input_ids)[None]).logits[0, -1]
    assert (ours - stock).abs().max() <= 1e-4
    assert torch.equal(ours, prefill(flagged.decoder, sdpa, Dense(), pack_of(doc)).logits_BV[0])


@pytest.mark.parametrize(
    ("own", "scaling", "expected"),
    [
        (128, {"type": "yarn", **YARN}, 512),  # as the cards of Qwen2.5 say
        (128, {"rope_type": "yarn", **YARN}, 512),
        (128, {"rope_type": "yarn", "factor": 2.5}, 320),  # over max_position_embeddings
        (160, {"rope_type": "yarn", **YARN}, 512),  # as those of Qwen3, which has some more
        (512, {"rope_type": "yarn", **YARN}, 512),  # said already
        (600, {"rope_type": "yarn", **YARN}, 600),
        (128, {"rope_type": "linear", "factor": 4.0}, 128),  # nobody can say whether the factor is in it
        (128, FAMILY_SETTINGS["llama"]["rope_parameters"], 128),
    ],
)
def test_contexts_of_configurations_that_scale(own, scaling, expected):
    assert context(max_position_embeddings=own, rope_scaling=dict(scaling)) == expected
    new_form = {"rope_theta": 1e4, "rope_type": scaling.get("type"), **scaling}
    assert context(max_position_embeddings=own, rope_parameters=new_form) == expected


def test_a_sliding_window_leaves_an_extended_context():
    config = AutoConfig.for_model(
        "mistral", **SIZES, sliding_window=200, rope_scaling={"rope_type": "yarn", **YARN}
    )
    shape = shape_of(config)
    assert (shape.context, shape.windows) == (512, (200,) * 4)


@pytest.mark.parametrize("factor", [0.5, "4", None])
def test_factors_that_are_none_are_refused(factor):
    config = AutoConfig.for_model("qwen2", **SIZES)
    config.rope_parameters = {"rope_type": "yarn", "rope_theta": 1e4, **YARN, "factor": factor}
    with pytest.raises(ModelError) as caught:
        check_config(config)
    assert str(caught.value) == (
        f"RoPE type 'yarn' has the factor {factor!r}, and it must be a number from 1 on"
    )


def refusal(family, spec, **settings):
    config = AutoConfig.for_model(family, **{**SIZES, **settings})
    with pytest.raises(ModelError) as caught:
        with_rope_scaling(config, spec)
    return str(caught.value)


def test_models_that_scale_already_are_refused():
    assert refusal("llama", "yarn:4", **FAMILY_SETTINGS["llama"]) == (
        "--rope-scaling yarn:4: the model's configuration scales its RoPE already (llama3, factor 4 over"
        " 128 tokens: a context of 512), and the two cannot be combined; leave the flag out, or take the"
        " scaling out of the configuration"
    )


def test_yarn_beside_yarn_is_refused():
    assert refusal("qwen2", "yarn:2", rope_scaling={"type": "yarn", **YARN}, max_position_embeddings=128) == (
        "--rope-scaling yarn:2: the model's configuration scales its RoPE already (yarn, factor 4 over 128"
        " tokens: a context of 512), and the two cannot be combined; leave the flag out, or take the scaling"
        " out of the configuration"
    )


def test_contexts_that_do_not_grow_are_refused():
    assert refusal("qwen2", "yarn:2:128") == (
        "--rope-scaling yarn:2:128: the context would be 256 tokens, and is 512 without it; give a larger"
        " factor, or leave the flag out"
    )
    assert refusal("qwen2", "yarn:2:1k").endswith("the model's context is 512, less than 1,024")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("yarn", "write it as yarn:FACTOR or yarn:FACTOR:ORIGINAL, for example yarn:4"),
        ("linear:2", "write it as yarn:FACTOR or yarn:FACTOR:ORIGINAL, for example yarn:4"),
        ("yarn:1", "the factor must be above 1"),
        ("yarn:0.5", "the factor must be above 1"),
        ("yarn:4:0", "the original context must be at least 1 token"),
    ],
)
def test_specs_that_cannot_work(text, message):
    with pytest.raises(ConfigError, match=f"^--rope-scaling '{text}': {message}$"):
        parse_rope_scaling(text)


def test_specs():
    assert parse_rope_scaling("yarn:4") == (4.0, None)
    assert parse_rope_scaling(" YaRN:2.5:32k ") == (2.5, 32768)


def test_a_run_in_one_pass(call, tmp_path, capfd):
    source, out = tmp_path / "in.jsonl", tmp_path / "out.parquet"
    source.write_text(json.dumps({"text": "one fish " * 150}) + "\n")
    flags = ["--question", "what?", "--max-new-tokens", "3", "--quiet"]
    assert call(source, out, *flags, "--fail-on-error") == 3
    assert call(source, out, *flags, "--overwrite", "--fail-on-error", "--rope-scaling", "yarn:2") == 0
    capfd.readouterr()
    assert call(source, out, *flags, "--resume", "--rope-scaling", "yarn:4") == 2
    told = capfd.readouterr().err
    assert 'was begun with other settings: model.rope_scaling was "yarn:2" and is now "yarn:4"' in told


def test_a_loaded_model_has_its_scaling_already(model_folder, fish, tmp_path):
    model = load_model(str(model_folder), device="cpu", rope_scaling="yarn:2")
    options = {"text_column": "body", "question": "what?", "max_new_tokens": 2}
    with pytest.raises(ConfigError, match=r"^rope_scaling goes with a model's name: give it to load_model$"):
        run_batch(str(fish), str(tmp_path / "out.parquet"), model=model, rope_scaling="yarn:2", **options)
    assert run_batch(str(fish), str(tmp_path / "out.parquet"), model=model, **options).status["ok"] == 3
