"""Tiny models built from configurations: real modules, random weights, nothing downloaded."""

from __future__ import annotations

import functools
import gc
import math
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import typer.main
from example_runs import checkout, marsinfer, served  # noqa: F401
from kernel_cases import kernels  # noqa: F401
from object_storage import bucket, s3_server  # noqa: F401

from marsinfer_cli.app import run
from pipeline.checkpoints.building import random_model
from pipeline.checkpoints.random_weights import byte_tokenizer
from pipeline.engines import warm_up
from pipeline.families.decoder import Decoder
from pipeline.kernels.attention import SdpaAttention
from pipeline.model.loading import LoadedModel
from pipeline.model.prefill import Pack
from pipeline.records import EncodedDocument, Row, Spans

# the models are too small for more threads, and tests that run side by side would contend for the cores
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that tests start

signal.signal(signal.SIGHUP, signal.SIG_DFL)  # tests send it to themselves, and under nohup it is ignored

with suppress(ImportError):  # for tests/gpu alone it need not be there
    from hypothesis import HealthCheck, settings

    settings.register_profile("unhurried", deadline=None, suppress_health_check=[HealthCheck.too_slow])
    settings.load_profile("unhurried")

SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 256,
    "max_position_embeddings": 512,
    "eos_token_id": None,
    "bos_token_id": None,
    "pad_token_id": None,
}
FAMILY_SETTINGS: dict[str, dict[str, Any]] = {
    "llama": {
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 128,
        }
    },
    "mistral": {"sliding_window": None, "head_dim": 24},
    "qwen2": {},
    "qwen3": {"head_dim": 32},
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests come first, lest the last of them leave all workers but one idle."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


def pytest_collection_finish() -> None:
    """Engines collect garbage often, and need not look each time at what thousands of tests hold."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish() -> None:
    gc.unfreeze()


@pytest.fixture(scope="session", autouse=True)
def one_command_line() -> Iterator[None]:
    """Typer would build all commands anew at each call, for longer than many a tiny model runs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(typer.main, "get_command", functools.cache(typer.main.get_command))
        yield


@pytest.fixture(scope="session", autouse=True)
def no_note_of_a_slow_warm_up() -> Iterator[None]:
    """On a busy machine the smallest warm-up may take so long that a run says so."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(warm_up, "WORTH_A_NOTE_S", math.inf)
        yield


@pytest.fixture(autouse=True)
def poisoned_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that nobody wrote reads as NaN, so a test cannot pass on leftovers."""
    real = torch.empty

    def empty(*args: Any, **kwargs: Any) -> torch.Tensor:
        tensor = real(*args, **kwargs)
        return (
            tensor.fill_(float("nan"))
            if tensor.is_floating_point() and tensor.device.type == "cpu"
            else tensor
        )

    monkeypatch.setattr(torch, "empty", empty)


class Numbers:
    """A tokenizer that writes tokens as their numbers."""

    @staticmethod
    def decode(tokens, **_):
        return " ".join(map(str, tokens))


def loaded(decoder=None, tokenizer=Numbers, attention=None):
    """A loaded model around a decoder, of two layers by default, which never was in a file."""
    return LoadedModel(
        decoder=decoder or tiny_model("qwen2"),
        tokenizer=tokenizer,
        attention=attention or SdpaAttention(),
        generation_config=None,
        name="tiny",
        fingerprint="",
    )


def tiny_model(family: str, seed: int = 0) -> Decoder:
    settings = {**SIZES, **FAMILY_SETTINGS[family]}
    model = random_model(family, settings, device=torch.device("cpu"), dtype=torch.float32, seed=seed)
    return Decoder(sharpened(model))


def sharpened(model: torch.nn.Module) -> Any:
    """Larger weights: those of 0.02 make attention nearly uniform, and give it nothing to see."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(6)
    return model


def document(length: int, seed: int = 0, row: int = 0) -> EncodedDocument:
    ids = np.random.default_rng(seed).integers(0, SIZES["vocab_size"], length)
    spans = Spans(document=(2, length - 8), question=(length - 8, length - 3))
    return EncodedDocument(source=Row(row=row, id=str(row), place=f"row {row}"), input_ids=ids, spans=spans)


def pack_of(*documents: EncodedDocument) -> Pack:
    return Pack.of(documents, torch.device("cpu"))


@pytest.fixture(params=sorted(FAMILY_SETTINGS))
def decoder(request: pytest.FixtureRequest) -> Decoder:
    return tiny_model(request.param)


class SetClock:
    """Seconds that pass only when a test says so, and `tick` at every look."""

    def __init__(self) -> None:
        self.now, self.tick = 100.0, 0.0

    def __call__(self) -> float:
        self.now += self.tick
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SetClock:
    """In place of time.perf_counter, by which engines measure."""
    made = SetClock()
    monkeypatch.setattr(time, "perf_counter", made)
    return made


@pytest.fixture
def sdpa() -> SdpaAttention:
    return SdpaAttention()


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model as a user has one on disk: configuration, safetensors, tokenizer with a chat template."""
    return _saved(_small_model(), tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def sharp_model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with larger weights, so that what a method leaves out is missed."""
    return _saved(sharpened(_small_model()), tmp_path_factory.mktemp("sharp_model"))


def _small_model() -> Any:
    settings = {**SIZES, "vocab_size": 320, "max_position_embeddings": 1024}
    return random_model("qwen2", settings, device=torch.device("cpu"), dtype=torch.float32)


def _saved(model: Any, folder: Path) -> Path:
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


FISH: list[dict[str, Any]] = [
    {"doc": "a", "body": "one fish two fish " * 12, "ask": "how many fish?", "year": 1960},
    {"doc": "b", "body": "red fish " * 40, "ask": "what colour?", "year": 1961},
    {"doc": "c", "body": "blue fish", "ask": "what colour?", "year": None},
]


@pytest.fixture
def fish(tmp_path: Path) -> Path:
    path = tmp_path / "in.parquet"
    pq.write_table(pa.Table.from_pylist(FISH), path)
    return path


@pytest.fixture(autouse=True, scope="session")
def profiles(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What calibrate keeps for --method auto is not kept among the profiles of who runs the tests."""
    os.environ["XDG_CONFIG_HOME"] = str(tmp_path_factory.mktemp("config"))


@pytest.fixture
def call(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """`marsinfer batch`, whose model is the tiny one and whose method dense unless flags name others."""
    monkeypatch.setenv("MARSINFER_MODEL", str(model_folder))
    monkeypatch.setenv("MARSINFER_METHOD", "dense")

    def call(*arguments: object) -> int:
        return run(["batch", *map(str, arguments)])

    return call


@pytest.fixture
def refusal(call: Callable[..., int], capfd: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """What a call that must end with 2 says, in its one line."""

    def refusal(*arguments: object) -> str:
        assert call(*arguments) == 2
        printed = capfd.readouterr()
        assert printed.out == ""
        assert len(printed.err.splitlines()) == 1, printed.err
        return printed.err.removeprefix("marsinfer: error: ").rstrip()

    return refusal
