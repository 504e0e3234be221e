"""The operation count against numbers worked out by hand, and the benchmark command on a small model."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from marsinfer_cli.app import run
from pipeline.bench import ttft
from pipeline.bench.ttft import Measurement, saving_reached
from pipeline.model import loading
from pipeline.pruning.operations import dense_flops, prefill_flops
from pipeline.pruning.shape import ModelShape

SHAPE = ModelShape(layers=2, hidden=8, ffn=16, heads=4, kv_heads=2, head_dim=2, vocab=10, context=64)


def test_operations_of_a_dense_prefill_by_hand():
    # a token: q and o 8x8, k and v 8x4: 2 * (64 + 64 + 32 + 32) = 384; FFN 3 products 8x16: 768
    # three tokens attend to 1 + 2 + 3 keys, QK and PV, 8 wide: 4 * 8 * 6 = 192
    first = 3 * 384 + 192 + 3 * 768
    # the last layer has k and v of three tokens, 128 each, and q, o, attention to 3 keys and FFN of one
    last = 3 * 128 + 256 + 4 * 8 * 3 + 768
    assert dense_flops(SHAPE, 3) == first + last + 2 * 8 * 10


def test_operations_follow_the_tokens_of_each_layer():
    # layer 2: two tokens enter, one passes the FFN, and scoring looked at 5 query-key pairs
    second = 2 * 384 + 4 * 8 * 3 + 768 + 2 * 8 * 5
    first = 3 * 384 + 192 + 3 * 768
    assert prefill_flops(SHAPE, [3, 2], [3, 1], [0, 5]) == first + second + 160


def measurement(ttft_ms, flops_ratio):
    return Measurement(
        variant="x",
        tokens=1,
        ttft_ms=ttft_ms,
        fastest_ms=0,
        slowest_ms=0,
        repeats=1,
        peak_bytes=None,
        flops_ratio=flops_ratio,
    )


def test_the_saving_is_compared_with_what_the_operations_predict():
    dense = measurement(100.0, 1.0)
    assert saving_reached(measurement(85.0, 0.8), dense) == pytest.approx(0.75)
    assert saving_reached(dense, dense) is None


def test_ttft_measures_each_variant_in_one_run(model_folder, capfd):
    flags = ["--lengths", "300", "--methods", "dense,marsinfer:share=0.5:start_layer=2", "--repeats", "2"]
    assert run(["bench", "ttft", "--model", str(model_folder), *flags, "--json"]) == 0
    report = json.loads(capfd.readouterr().out)
    assert report["attention"] == "sdpa"
    variants = {result["variant"]: result for result in report["results"]}
    assert set(variants) == {"transformers", "dense", "marsinfer:share=0.5:start_layer=2"}
    assert variants["dense"]["ffn_ratio"] == 1
    pruned = variants["marsinfer:share=0.5:start_layer=2"]
    assert pruned["ffn_share_by_layer"] == [1.0, 1.0, 0.5, 1.0]
    assert pruned["flops_ratio"] < 1
    assert all(0 < v["fastest_ms"] <= v["ttft_ms"] <= v["slowest_ms"] for v in variants.values())


@pytest.mark.parametrize("fails_at", [64, 128])
def test_lengths_that_ended_are_shown_though_a_later_one_fails(model_folder, capfd, monkeypatch, fails_at):
    prefill_of = ttft.prefill

    def failing(decoder, attention, method, pack, *others, **options):
        if len(pack.input_ids) == fails_at:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return prefill_of(decoder, attention, method, pack, *others, **options)

    monkeypatch.setattr(ttft, "prefill", failing)
    flags = ["--lengths", "64,128", "--methods", "dense", "--baselines", "none", "--repeats", "1", "--json"]
    assert run(["bench", "ttft", "--model", str(model_folder), *flags]) == 1
    printed = capfd.readouterr()
    assert f"error: {fails_at} tokens fails: OutOfMemoryError: CUDA out of memory" in printed.err
    if fails_at == 64:
        assert printed.out == ""
    else:
        shown = json.loads(printed.out)
        assert [each["tokens"] for each in shown["results"]] == [64]
        assert (shown["not measured"], len(shown["ceilings"])) == ("128 tokens", 1)


def test_ttft_reads_a_real_document_and_prints_a_table(model_folder, tmp_path, capfd):
    source = tmp_path / "docs.jsonl"
    source.write_text(json.dumps({"text": "short"}) + "\n" + json.dumps({"text": "word " * 60}) + "\n")
    flags = [
        "--input",
        str(source),
        "--row",
        "1",
        "--methods",
        "dense",
        "--baselines",
        "none",
        "--repeats",
        "1",
    ]
    assert run(["bench", "ttft", "--model", str(model_folder), *flags]) == 0
    printed = capfd.readouterr().out
    assert "| tokens | variant |" in printed
    assert "| dense |" in printed


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--methods", "dens"], "unknown method 'dens' (did you mean 'dense'?)"),
        (["--baselines", "vllm"], "unknown baseline 'vllm'; baselines: transformers, transformers-cudnn"),
        (["--model", "random:gpt-5"], "model 'random:gpt-5': there is no such shape; shapes: qwen2-7b, "),
        (
            ["--baselines", "transformers-cudnn"],
            "baseline transformers-cudnn needs an NVIDIA GPU; leave it out",
        ),
        (["--lengths", "64,0"], "--lengths '64,0': a prompt has at least one token"),
        (["--methods", "dense,dense"], "--methods names 'dense' twice"),
        (["--lengths", "8q"], "--lengths '8q': give a whole number such as 8192, 32k or 1m"),
        (["--input", "examples/licenses.jsonl", "--row", "99"], "examples/licenses.jsonl has no row 99"),
    ],
)
def test_bench_refuses_what_cannot_be_measured(model_folder, capfd, flags, message):
    assert run(["bench", "ttft", "--model", str(model_folder), "--lengths", "64", *flags]) == 2
    assert capfd.readouterr().err.startswith(f"marsinfer: error: {message}")


@pytest.mark.slow
def test_fixed_shares_go_to_the_methods_without_settings(model_folder, capfd):
    methods = (
        "dense,sliminfer:layers=1/2:budget=.5/.25:block=8:unit=2,uniprefill:first_layer=1,fastkv,gemfilter"
    )
    flags = ["--lengths", "600", "--methods", methods, "--keep", "0.5", "--baselines", "none"]
    command = ["bench", "ttft", "--model", str(model_folder), *flags, "--repeats", "1", "--new-tokens", "3"]
    assert run([*command, "--json"]) == 0
    report = json.loads(capfd.readouterr().out)
    assert [measured["tokens"] for measured in report["ceilings"]] == [600]
    results = {result["variant"].partition(":")[0]: result for result in report["results"]}
    assert results["sliminfer"]["kept_share_by_layer"] == [1.0, 1.0, 0.5067, 0.2533]
    assert results["fastkv"]["kept_share_by_layer"] == [1.0, 1.0, 1.0, 0.5]
    assert results["gemfilter"]["kv_ratio"] == 0.5
    assert results["uniprefill"]["kept_share_by_layer"][0] == 1.0  # its own settings were given
    for name, result in results.items():
        assert result["select_ms"] >= 0
        assert result["floor_ms"] > 0
        assert result["end_to_end_ms"] > 0
        assert (result["kv_ratio"] < 1) == (name not in ("dense", "uniprefill"))


@pytest.mark.slow
def test_a_plot_is_drawn(model_folder, tmp_path, capfd):
    pytest.importorskip("matplotlib")
    for lengths in ("64", "64,128"):
        path = tmp_path / f"{len(lengths)}.png"
        flags = ["--lengths", lengths, "--methods", "dense", "--repeats", "1", "--plot", str(path)]
        assert run(["bench", "ttft", "--model", str(model_folder), *flags]) == 0
        assert path.read_bytes().startswith(b"\x89PNG")
    capfd.readouterr()
    assert run(["bench", "ttft", "--model", str(model_folder), "--plot", "x.doc"]) == 2
    assert capfd.readouterr().err == "marsinfer: error: --plot x.doc: name a .png, .svg or .pdf file\n"
    nowhere = tmp_path / "nowhere" / "x.png"
    assert run(["bench", "ttft", "--model", str(model_folder), "--plot", str(nowhere)]) == 2
    assert capfd.readouterr().err == f"marsinfer: error: --plot {nowhere}: there is no such folder\n"


def test_offloading_is_measured_beside_a_cache_that_stays(model_folder, capfd):
    method = "sliminfer:layers=1/2:budget=.5/.25:block=8:unit=2"
    flags = ["--lengths", "600", "--method", method, "--kv-memory", "200kB", "--new-tokens", "6"]
    assert run(["bench", "offload", "--model", str(model_folder), *flags, "--repeats", "1", "--json"]) == 0
    stays, moves, waits = json.loads(capfd.readouterr().out)["results"]
    assert (stays["host_kv_bytes"], stays["decisions"]) == (0, 0)
    assert moves["host_kv_bytes"] == waits["host_kv_bytes"] > 0
    assert moves["device_kv_bytes"] <= 200_000 < stays["device_kv_bytes"]
    assert moves["decisions"] == 2 * 5
    assert moves["same_as_synchronous"] == waits["same_as_synchronous"] == 1
    assert run(["bench", "offload", "--model", str(model_folder), *flags, "--repeats", "1"]) == 0
    assert "| 600 | offloaded, synchronous |" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--method", "dense"], "the keys and values of 600 tokens take "),
        (["--kv-memory", "100B"], "600 tokens cannot run in 0.00 GB of --kv-memory: at least "),
        (["--method", "dense,sliminfer"], "unknown method 'dense,sliminfer'"),
        (["--method", "sliminfer:fp8"], "fp8 cannot be used here: "),
        (["--method", "sliminfer:mixed"], "fp8 cannot be used here: "),
        (["--method", "sliminfer:fp8:mixed"], "--methods 'sliminfer:fp8:mixed': give fp8 or mixed, not both"),
        (["--lengths", "0"], "--lengths '0': a prompt has at least one token"),
    ],
)
def test_offloading_refuses_what_cannot_be_measured(model_folder, capfd, flags, message):
    given = ["--model", str(model_folder), "--lengths", "600", "--kv-memory", "200kB", *flags]
    assert run(["bench", "offload", *given]) == 2
    assert capfd.readouterr().err.startswith(f"marsinfer: error: {message}")


@pytest.mark.slow
def test_decode_steps_are_measured_beside_the_bytes_they_read(model_folder, capfd):
    method = "sliminfer:layers=1/2:budget=.5/.25:block=8:unit=2"
    flags = ["--lengths", "200", "--documents", "3", "--methods", f"dense,{method}", "--new-tokens", "6"]
    assert run(["bench", "decode", "--model", str(model_folder), *flags, "--repeats", "2", "--json"]) == 0
    dense, slim = json.loads(capfd.readouterr().out)["results"]
    assert (dense["variant"], dense["documents"], dense["tokens"]) == ("dense", 3, 600)
    # in float32, K and V of 2 heads of 16 in 4 layers; half of the 6 new tokens
    assert dense["kv_bytes"] == 3 * (200 + 3) * 4 * (2 * 2 * 16 * 4)
    assert slim["kv_bytes"] < dense["kv_bytes"]
    matrices = 4 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 96) + 320 * 64  # four layers' and the head's
    assert dense["weight_bytes"] == slim["weight_bytes"] == 4 * matrices
    for result in (dense, slim):
        read = result["weight_bytes"] + result["kv_bytes"]
        assert result["bytes_per_second"] == pytest.approx(read / result["eager_step_ms"] * 1e3)
        assert result["bandwidth_share"] > 0
        assert result["graph_step_ms"] is result["same_tokens"] is None  # a CPU captures nothing
    assert run(["bench", "decode", "--model", str(model_folder), *flags, "--repeats", "1"]) == 0
    assert "| 3 | 600 | dense |" in capfd.readouterr().out


@pytest.mark.parametrize(
    "command",
    [
        ["ttft", "--lengths", "64", "--methods", "dense", "--baselines", "none", "--repeats", "1"],
        ["decode", "--lengths", "64", "--methods", "dense", "--new-tokens", "3", "--repeats", "1"],
        [
            *("offload", "--lengths", "600", "--kv-memory", "200kB", "--new-tokens", "3", "--repeats", "1"),
            *("--method", "sliminfer:layers=1/2:budget=.5/.25:block=8:unit=2"),
        ],
    ],
    ids=lambda command: command[0],
)
def test_what_is_to_be_known_of_a_models_files_is_told_once(model_folder, capfd, monkeypatch, command):
    opened = loading.open_model
    told = "2 tensors are not used"
    monkeypatch.setattr(loading, "open_model", lambda *given: replace(opened(*given), notes=(told,)))
    assert run(["bench", *command, "--model", str(model_folder), "--json"]) == 0
    assert capfd.readouterr().err.count(f"marsinfer: note: {told}\n") == 1
