"""LoRA adapters: merged into what the model's files make, or refused before any weight is read."""

from __future__ import annotations

import json
import math

import pyarrow.parquet as pq
import pytest
import torch
from checkpoints import copied, opened, tensors, write
from packed_weights import quantise
from safetensors.torch import load_file
from test_quantised import INTEGERS, make_fp8

from pipeline.errors import ConfigError, ModelError
from pipeline.families.projection import LinearPrecision
from pipeline.model.loading import load_model, open_model
from pipeline.run import run_batch
from pipeline.settings.model_settings import ModelSettings

RANK, ALPHA = 4, 6
ABOUT = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "bias": "none", "lora_dropout": 0.1}
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def folder(model_folder, tmp_path):
    return copied(model_folder, tmp_path / "model")


def make_adapter(model_folder, target, ends=("q_proj", "down_proj"), layers=range(4), ranks=None, **about):
    """An adapter's folder, and what it adds to the model's matrices before scaling."""
    target.mkdir(exist_ok=True)
    random, found, deltas = torch.Generator().manual_seed(3), {}, {}
    for name, weight in tensors(model_folder).items():
        module = name.removesuffix(".weight")
        if not module.endswith(tuple(ends)) or not any(f".layers.{n}." in name for n in layers):
            continue
        rank = next((each for end, each in (ranks or {}).items() if module.endswith(end)), RANK)
        a = torch.randn(rank, weight.shape[1], generator=random) / 8
        b = torch.randn(weight.shape[0], rank, generator=random) / 8
        found[f"base_model.model.{module}.lora_A.weight"] = a
        found[f"base_model.model.{module}.lora_B.weight"] = b
        deltas[name] = b.double() @ a.double()
    assert deltas
    write(target, found, WEIGHTS)
    (target / "adapter_config.json").write_text(json.dumps({**ABOUT, "target_modules": list(ends), **about}))
    return deltas


def change(adapter, **about):
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | about))


def merged(folder, adapter, **settings):
    return opened(folder, adapter=str(adapter), **settings).load().decoder.model.state_dict()


def check_merged(state, before, deltas, scale):
    changed = 0
    for name, weight in before.items():
        wanted = weight.double() + scale * deltas[name] if name in deltas else weight.double()
        assert torch.allclose(state[name].double(), wanted, rtol=0, atol=1e-6), name
        changed += not torch.equal(state[name], weight.to(state[name].dtype))
    assert changed == len(deltas)


@pytest.mark.parametrize(
    ("about", "scale"),
    [
        ({}, ALPHA / RANK),
        ({"use_rslora": True}, ALPHA / math.sqrt(RANK)),
        ({"alpha_pattern": {"q_proj": 6, "self_attn.x": 9}}, ALPHA / RANK),
        ({"target_modules": r".*\.(q_proj|down_proj)"}, ALPHA / RANK),
        ({"layers_to_transform": [1, 3], "layers": (1, 3)}, ALPHA / RANK),
        ({"layers_to_transform": 2, "layers": (2,)}, ALPHA / RANK),
    ],
)
def test_pairs_are_merged(folder, tmp_path, about, scale):
    deltas = make_adapter(folder, tmp_path / "lora", **{"layers": range(4), **about})
    unloaded = opened(folder, adapter=str(tmp_path / "lora"))
    assert unloaded.notes == (
        f"the LoRA adapter {tmp_path / 'lora'} (rank {RANK}) is merged into {len(deltas)} matrices",
    )
    check_merged(unloaded.load().decoder.model.state_dict(), tensors(folder), deltas, scale)


def test_the_model_that_it_was_trained_on_is_told(folder, tmp_path):
    make_adapter(folder, tmp_path / "lora", base_model_name_or_path="someone/base")
    (note,) = opened(folder, adapter=str(tmp_path / "lora")).notes
    assert f"(rank {RANK}), trained on someone/base, is merged" in note


def test_all_linear_layers(folder, tmp_path):
    ends = [f"{each}_proj" for each in ("q", "k", "v", "o", "gate", "up", "down")]
    deltas = make_adapter(folder, tmp_path / "lora", ends, target_modules="all-linear")
    assert len(deltas) == 28
    check_merged(merged(folder, tmp_path / "lora"), tensors(folder), deltas, ALPHA / RANK)


def test_patterns_of_ranks(folder, tmp_path):
    patterns = {"rank_pattern": {"down_proj": 2}, "alpha_pattern": {r"layers\.\d+\.mlp\.down_proj": 3}}
    deltas = make_adapter(folder, tmp_path / "lora", ranks={"down_proj": 2}, **patterns)
    assert ALPHA / RANK == 3 / 2
    check_merged(merged(folder, tmp_path / "lora"), tensors(folder), deltas, ALPHA / RANK)


def test_what_was_trained_whole(folder, tmp_path):
    adapter = tmp_path / "lora"
    deltas = make_adapter(folder, adapter, modules_to_save=["lm_head"], bias="lora_only")
    before = tensors(folder)
    head, biases = before["lm_head.weight"] + 1, [f"model.layers.{n}.self_attn.q_proj.bias" for n in range(4)]
    more = {
        f"base_model.model.{each.replace('.bias', '.base_layer.bias')}": before[each] + 2 for each in biases
    }
    more["base_model.model.lm_head.modules_to_save.weight"] = head
    write(adapter, {**tensors_of(adapter), **more}, WEIGHTS)
    state = merged(folder, adapter)
    assert torch.equal(state["lm_head.weight"], head)
    assert torch.equal(state[biases[2]], before[biases[2]] + 2)
    name = next(iter(deltas))
    assert not torch.equal(state[name], before[name])


def tensors_of(adapter):
    return load_file(adapter / WEIGHTS)


@pytest.mark.parametrize("kind", ["awq", "gptq"])
def test_over_integers_it_is_merged_into_what_they_mean(folder, tmp_path, kind):
    deltas = make_adapter(folder, tmp_path / "lora")
    wanted = quantise(folder, *INTEGERS[kind])
    check_merged(merged(folder, tmp_path / "lora"), wanted, deltas, ALPHA / RANK)


def test_over_fp8_what_it_changes_is_quantised_again_and_the_rest_is_kept(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("pipeline.families.configuration.fp8_available", lambda device: None)
    deltas = make_adapter(folder, tmp_path / "lora", ends=("down_proj",))
    wanted = make_fp8(folder, "channels")
    unloaded = opened(folder, dtype="bfloat16", adapter=str(tmp_path / "lora"))
    layer = unloaded.load(LinearPrecision(linears="fp8")).decoder._layers[1]
    name, found = "model.layers.1.mlp.down_proj.weight", tensors(folder)
    made = layer.down.fp8.quantised.double() * layer.down.fp8.scale.t().double()
    full = wanted[name].double() + ALPHA / RANK * deltas[name]
    assert 0.005 < (made - full).norm() / full.norm() < 0.04
    own = found["model.layers.1.self_attn.o_proj.weight"]
    assert torch.equal(layer.output.fp8.quantised.view(torch.uint8), own.view(torch.uint8))


def test_a_folder_that_is_not_there():
    with pytest.raises(ModelError, match=r"^--adapter /nowhere: there is no such folder$"):
        open_model(ModelSettings(model="random:tiny", device="cpu", adapter="/nowhere"))


def spoil(adapter, **changes):
    found = tensors_of(adapter)
    for key, value in changes.items():
        name = next(each for each in found if key.replace("__", ".") in each)
        tensor = found.pop(name)
        if value is not None:
            found |= value(name, tensor)
    write(adapter, found, WEIGHTS)


Q = "base_model.model.model.layers.0.self_attn.q_proj"
Q_PAIR = "model.layers.0.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (
            lambda a: (a / "adapter_config.json").unlink(),
            "there is no adapter_config.json: name the folder of",
        ),
        (lambda a: (a / WEIGHTS).unlink(), f"there is no {WEIGHTS}"),
        (
            lambda a: (a / "adapter_config.json").write_text("{"),
            "adapter_config.json is no JSON: download or copy it again (",
        ),
        (lambda a: (a / WEIGHTS).write_bytes((a / WEIGHTS).read_bytes()[:-9]), f"{WEIGHTS} is cut short ("),
        (lambda a: change(a, peft_type="IA3"), "its peft_type is 'IA3', and LORA is what can be merged"),
        (lambda a: change(a, use_dora=True), "has settings that are not supported: use_dora"),
        (
            lambda a: change(a, fan_in_fan_out=True, lora_bias=True),
            "not supported: fan_in_fan_out, lora_bias",
        ),
        (
            lambda a: change(a, init_lora_weights="pissa_niter_4"),
            "its init_lora_weights is 'pissa_niter_4', which changed the model's own weights too",
        ),
        (lambda a: change(a, r=0), "adapter_config.json has r 0, and a number above 0 is needed"),
        (lambda a: change(a, rank_pattern={"(": 2}), "rank_pattern {'(': 2}, and a number above 0 for each"),
        (
            lambda a: change(a, alpha_pattern={"q_proj": math.nan}),
            "alpha_pattern {'q_proj': nan}, and a ",
        ),
        (
            lambda a: change(a, target_modules="(*"),
            "has target_modules '(*', and a list of names or",
        ),
        (lambda a: change(a, modules_to_save="lm_head"), "modules_to_save 'lm_head', and a list of names is"),
        (lambda a: change(a, bias="some"), "has bias 'some', and one of none, all, lora_only is needed"),
        (
            lambda a: change(a, bias="all"),
            "bias 'all' of its adapter_config.json means model.layers.0.",
        ),
        (lambda a: change(a, r=8), "lora_A.weight is (4, 96), and (8, 96) is what fits the model and"),
        (lambda a: change(a, target_modules=None), "its adapter_config.json has no target_modules"),
        (lambda a: change(a, target_modules=["down_proj"]), f"{WEIGHTS} has pairs of {Q_PAIR}, "),
        (
            lambda a: change(a, target_modules=["q_proj", "down_proj", "v_proj"]),
            "name model.layers.0.self_attn.v_proj.weight, model.layers.1.self_attn.v_proj.weight, ",
        ),
        (lambda a: change(a, modules_to_save=["lm_head"]), f"are lm_head, and {WEIGHTS} lacks them"),
        (lambda a: spoil(a, q_proj__lora_A=None), "it has lora_B of model.layers.0.self_attn.q_proj alone"),
        (
            lambda a: spoil(a, q_proj__lora_A=lambda n, t: {n: t[:, :32]}),
            f"{Q}.lora_A.weight is (4, 32), and (4, 64) is what fits",
        ),
        (
            lambda a: spoil(a, q_proj__lora_A=lambda n, t: {n: t, f"{Q}.lora_magnitude_vector": t + 0}),
            f"it holds {Q}.lora_magnitude_vector, and only pairs",
        ),
        (
            lambda a: spoil(a, q_proj__lora_A=lambda n, t: {n: t, "base_model.model.other.weight": t + 0}),
            "the model has no other.weight: it is an adapter of another model",
        ),
        (
            lambda a: spoil(
                a, q_proj__lora_A=lambda n, t: {n: t, "base_model.model.model.norm.weight": torch.ones(64)}
            ),
            f"{WEIGHTS} has model.norm.weight, of which its adapter_config.json says nothing",
        ),
    ],
)
def test_what_cannot_be_merged_is_refused_before_weights_are_read(folder, tmp_path, damage, said):
    adapter = tmp_path / "lora"
    make_adapter(folder, adapter)
    damage(adapter)
    with pytest.raises(ModelError) as caught:
        opened(folder, adapter=str(adapter))
    message = str(caught.value)
    assert message.startswith(f"--adapter {adapter}: ")
    assert said in message
    assert len(message.splitlines()) == 1


def test_pickled_adapters_are_refused(folder, tmp_path):
    make_adapter(folder, tmp_path / "lora")
    (tmp_path / "lora" / WEIGHTS).rename(tmp_path / "lora" / "adapter_model.bin")
    with pytest.raises(ModelError, match=r"; adapter_model.bin can run code: save it as safetensors$"):
        opened(folder, adapter=str(tmp_path / "lora"))


def test_numbers_that_are_none(folder, tmp_path):
    make_adapter(folder, tmp_path / "lora")
    spoil(tmp_path / "lora", q_proj__lora_B=lambda n, t: {n: t.fill_(torch.nan)})
    with pytest.raises(
        ModelError, match=r"lora_B.weight of .* holds NaN or an infinity: take another adapter$"
    ):
        opened(folder, adapter=str(tmp_path / "lora")).load()


def test_a_run_goes_on_with_the_same_adapter_alone(folder, tmp_path, fish):
    adapter, output = tmp_path / "lora", tmp_path / "out.parquet"
    make_adapter(folder, adapter)
    options = {"text_column": "body", "question_column": "ask", "id_column": "doc", "device": "cpu"}
    options |= {"model": str(folder), "max_new_tokens": 4}
    notes = []
    run_batch(str(fish), str(output), adapter=str(adapter), note=notes.append, **options)
    assert any(note.startswith(f"the LoRA adapter {adapter}") for note in notes)
    told = json.loads(pq.read_schema(output).metadata[b"marsinfer"])
    assert told["config"]["adapter"] == str(adapter)
    moved = copied(adapter, tmp_path / "elsewhere")
    run_batch(str(fish), str(output), adapter=str(moved), resume=True, **options)
    for other in (None, str(moved)):
        spoil(moved, q_proj__lora_A=lambda n, t: {n: t + 1})
        with pytest.raises(ConfigError, match=r"model.fingerprint"):
            run_batch(str(fish), str(output), adapter=other, resume=True, **options)


def test_a_loaded_model_has_its_adapter(folder, tmp_path, fish):
    make_adapter(folder, tmp_path / "lora")
    model = load_model(str(folder), device="cpu", adapter=str(tmp_path / "lora"))
    assert model.fingerprint.startswith("adapted:")
    with pytest.raises(ConfigError, match=r"^adapter goes with a model's name: give it to load_model$"):
        run_batch(str(fish), str(tmp_path / "out.parquet"), model=model, adapter="x")
