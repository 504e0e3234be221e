"""`--engine ray` and what goes with it, refused before anything is started."""

from __future__ import annotations

import socket
import sys

import pytest

from pipeline import load_model, run_batch
from pipeline.errors import ConfigError


@pytest.fixture
def ask(refusal, fish, tmp_path):
    return lambda *flags: refusal(
        fish, tmp_path / "out.parquet", "--text-column", "body", *flags, "--question", "?"
    )


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--engine", "dask"), "--engine 'dask': choose from local, ray"),
        (("--workers", "2"), "--workers needs --engine ray"),
        (("--ray-address", "auto"), "--ray-address needs --engine ray"),
        (("--gpus-per-worker", "0"), "--gpus-per-worker needs --engine ray"),
        (("--engine", "ray", "--workers", "some"), "--workers 'some': give a number of at least 1, or all"),
        (("--engine", "ray", "--gpus-per-worker", "2"), "--gpus-per-worker 2: choose from 0, 1"),
        (
            ("--engine", "ray", "--device", "cuda:1"),
            "--device 'cuda:1': Ray gives each worker its GPU; choose from auto, cpu, cuda",
        ),
        (
            ("--engine", "ray", "--device", "cpu", "--gpus-per-worker", "1"),
            "--device cpu and --gpus-per-worker 1 exclude each other",
        ),
        (
            ("--engine", "ray", "--ray-address", "ray://head:10001"),
            "--ray-address 'ray://head:10001': give HOST:PORT or auto, on a machine of the cluster",
        ),
    ],
)
def test_flags_that_cannot_work(ask, flags, message):
    assert ask(*flags) == message


def test_an_address_where_nobody_answers(ask):
    pytest.importorskip("ray")
    with socket.socket() as taken:  # bound, but not listening
        taken.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        said = ask("--engine", "ray", "--ray-address", address)
    assert said.startswith(f"--ray-address {address}: nobody answers there (")


def test_without_ray(ask, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)  # as if it were not installed
    assert ask("--engine", "ray").startswith("--engine ray needs Ray: pip install 'marsinfer[ray]' (")


def test_a_loaded_model_cannot_be_in_other_processes(fish, tmp_path, model_folder):
    model = load_model(str(model_folder), device="cpu")
    with pytest.raises(ConfigError, match="give its name, not a loaded model"):
        run_batch(
            str(fish),
            str(tmp_path / "o.parquet"),
            model=model,
            text_column="body",
            question="?",
            engine="ray",
        )


def test_the_local_engine_needs_no_ray(call, fish, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    assert call(fish, tmp_path / "out.parquet", "--text-column", "body", "--question", "?", "--quiet") == 0
