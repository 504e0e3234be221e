"""What is named to a user whose model or document does not fit: nothing in use, nothing that cannot be."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from pipeline.model.loading import open_model
from pipeline.pruning.registry import make_method
from pipeline.settings.model_settings import ModelSettings
from pipeline.settings.run_settings import BatchConfig
from pipeline.setup.remedies import remedies_of

ALL = ["--kv-dtype fp8", "--tensor-parallel", "--linear-dtype fp8"]


@pytest.fixture
def on_gpu(model_folder, monkeypatch):
    """A model as it is opened where there is a GPU that computes in fp8."""
    monkeypatch.setattr("pipeline.families.configuration.fp8_available", lambda device: None)
    opened = open_model(ModelSettings(model=str(model_folder), device="cpu", dtype="bfloat16"))
    return replace(opened, device=torch.device("cuda"))


def named(model, method="dense", **flags):
    """What there is to give beside a smaller model."""
    config = BatchConfig(input=("in.jsonl",), output="out.jsonl", method=method, **flags)
    ways = remedies_of(config, make_method(method), model).for_document(model.dtype.itemsize)
    assert ways[-1] == "a smaller model"
    return ways[:-1]


def test_what_is_in_use_is_not_named(on_gpu):
    assert named(on_gpu) == ALL
    assert named(on_gpu, kv_dtype="fp8") == ALL[1:]
    assert named(on_gpu, linear_dtype="fp8") == ALL[:2]
    assert named(on_gpu, linear_dtype="mixed") == ALL  # which holds most weights twice
    assert named(replace(on_gpu, ranks=2), tensor_parallel=2)[1] == "a larger --tensor-parallel"
    assert "tensor-parallel" not in " ".join(named(replace(on_gpu, ranks=4), tensor_parallel=4))


@pytest.mark.parametrize(
    ("method", "flags", "left"),
    [
        ("uniprefill", {}, [ALL[0], ALL[2]]),  # which knows of no divided model
        ("sliminfer", {"kv_memory": 1 << 30}, ALL[2:]),  # offloaded blocks are in --dtype
        ("hip", {}, ALL[2:]),  # holds keys in the model's dtype
        ("dense", {"device": "cuda:1"}, [ALL[0], ALL[2]]),  # one that is named, and no other
        ("dense", {"trust_remote_code": True}, [ALL[0], ALL[2]]),
    ],
)
def test_what_the_method_or_a_flag_excludes_is_not_named(on_gpu, method, flags, left):
    assert named(on_gpu, method, **flags) == left


def test_what_the_device_or_the_data_type_excludes_is_not_named(on_gpu, model_folder, monkeypatch):
    assert named(replace(on_gpu, dtype=torch.float32)) == ["--tensor-parallel", "--dtype bfloat16"]
    monkeypatch.setattr("pipeline.families.configuration.fp8_available", lambda device: "too old")
    assert named(on_gpu) == ["--tensor-parallel"]
    assert named(open_model(ModelSettings(model=str(model_folder), device="cpu"))) == ["--dtype bfloat16"]


def test_a_model_that_is_loaded_keeps_its_weights(model_folder, monkeypatch):
    monkeypatch.setattr("pipeline.families.configuration.fp8_available", lambda device: None)
    loaded = open_model(ModelSettings(model=str(model_folder), device="cpu", dtype="bfloat16")).load()
    assert named(loaded) == ["--kv-dtype fp8"]
