"""`--engine ray` and what goes with it, refused before anything is started."""

from __future__ import annotations

import re
import socket
import sys

import pytest

from marsinfer_cli.progress import BatchProgress
from pipeline import load_model, run_batch
from pipeline.engines.clock import EngineTimes
from pipeline.errors import ConfigError
from pipeline.records import Answer
from pipeline.summary import Summary


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
        (
            ("--engine", "ray", "--gpus-per-worker", "2"),
            "--gpus-per-worker 2: choose from 0, 1; --tensor-parallel N gives each worker N GPUs, among "
            "which its model is divided",
        ),
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


def test_the_line_of_a_run_with_workers(capfd):
    summary = Summary(method="dense", output="out.parquet")
    summary.add([Answer(id="a", row=0, prompt_tokens=10, ttft_ms=12.0)])
    summary.workers = 2
    with BatchProgress(quiet=False) as progress:
        progress(summary)
    line = r"marsinfer: 1 row, 10 tokens, [\d,]+ tokens/s, 2 workers, TTFT p50 12 ms\n"
    assert re.fullmatch(line, capfd.readouterr().err)


def test_times_of_engines_side_by_side():
    first = EngineTimes(
        load_s=3.0, warm_up_s=2.0, packs=3, prefill_s=1.0, decode_s=0.5, began=10.0, ended=14.0
    )
    second = EngineTimes(
        load_s=4.0, warm_up_s=1.0, packs=1, prefill_s=2.0, shared_s=0.5, began=11.0, ended=15.0
    )
    both = EngineTimes.together([first, second.mirrored(20.0).mirrored(20.0), EngineTimes()])
    assert (both.load_s, both.warm_up_s, both.packs) == (4.0, 2.0, 4)
    assert (both.prefill_s, both.shared_s) == (3.0, 0.5)
    assert both.span_s == 5.0
    assert EngineTimes.together([]).span_s == 0.0
