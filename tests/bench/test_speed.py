"""Attention alone, packs of several documents, and a whole run: the commands, and what they count."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import document, loaded

from marsinfer_cli.app import run
from marsinfer_cli.variants import parse_packs, parse_variants
from pipeline.bench.attention_speed import attention_shape, measure_attention
from pipeline.bench.ceilings import Ceilings
from pipeline.bench.throughput import idle_share
from pipeline.bench.ttft import measure_ttft
from pipeline.checkpoints.random_weights import SHAPES
from pipeline.errors import ConfigError
from pipeline.families.projection import IN_FULL, LinearPrecision
from pipeline.kernels.attention import SdpaAttention
from pipeline.model.loading import UnloadedModel
from pipeline.model.variant import Variant, precision_of
from pipeline.pruning.dense import Dense
from pipeline.pruning.operations import LayerWork, attention_flops, dense_flops, dense_work, passes_flops
from pipeline.pruning.registry import make_method

CPU = torch.device("cpu")
HEADS = ["--heads", "4", "--kv-heads", "2", "--head-dim", "16"]


def test_packs_are_written_as_sums_and_products():
    packs = parse_packs("8k; 2x40 3x5+7 1m")
    assert packs == {"8k": [8192], "2x40": [40, 40], "3x5+7": [5, 5, 5, 7], "1m": [1 << 20]}


def test_slashes_divide_lists_and_no_names_of_files():
    listed, mapped = parse_variants(
        "mars:sparse_attention=0.9/8e-1:mixed,mars:exit_maps=/a/b-1.safetensors", None
    )
    assert listed.method.sparse_attention == (0.9, 0.8)
    assert mapped.method.exit_maps == "/a/b-1.safetensors"
    with pytest.raises(ConfigError, match=r"^--methods 'ffn-skip': ffn-skip is for decode steps of batch"):
        parse_variants("dense,ffn-skip", None)


def test_attention_is_measured_on_every_pack_and_what_is_missing_is_named(capfd):
    flags = [*HEADS, "--packs", "64;3x17+1", "--repeats", "2", "--device", "cpu"]
    assert run(["bench", "attention", *flags, "--json"]) == 0
    report = json.loads(capfd.readouterr().out)
    assert (report["heads"], report["kv_heads"], report["head_dim"]) == (4, 2, 16)
    assert report["not_available"] == dict.fromkeys(("fa3", "flash", "cudnn", "varlen"), "needs a GPU")
    (sdpa,) = report["results"]
    assert 0 < sdpa["relative_error"] < 1e-5
    assert [(rate["documents"], rate["tokens"]) for rate in sdpa["rates"]] == [(1, 64), (4, 52)]
    for rate, triangle in zip(sdpa["rates"], (64 * 65 // 2, 3 * (17 * 18 // 2) + 1), strict=True):
        per_second = 4 * 4 * 16 * triangle / (rate["median_ms"] / 1e3)
        assert rate["tflops_per_second"] == pytest.approx(per_second / 1e12)
        assert 0 < rate["fastest_ms"] <= rate["median_ms"] <= rate["slowest_ms"]
    assert run(["bench", "attention", *flags]) == 0
    printed = capfd.readouterr().out
    assert "| backend | relative error | 64 TFLOP/s | 3x17+1 TFLOP/s |" in printed
    assert "\nfa3: not available: needs a GPU\n" in printed


def test_a_candidate_that_is_wrong_or_fails_shows_it():
    def half(q_THd, k_TKd, v_TKd, segments):
        if segments.total == 9:
            raise RuntimeError("no nine tokens\nsecond line")
        return SdpaAttention().prefill(q_THd, k_TKd, v_TKd, segments) / 2

    shape = attention_shape("qwen2-7b", heads=4, kv_heads=2, head_dim=16)
    candidates = {"half": half, "whole": SdpaAttention().prefill}
    packs = {"9": [9], "8": [8]}
    wrong, right = measure_attention(candidates, packs, shape, device=CPU, dtype=torch.float32, repeats=1)
    assert wrong.relative_error == pytest.approx(0.5, rel=1e-4)
    assert right.relative_error < 1e-5
    assert wrong.failures == {"9": "RuntimeError: no nine tokens"}
    assert [rate.pack for rate in wrong.rates] == ["8"]
    assert [rate.pack for rate in right.rates] == ["9", "8"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--backends", "fa4"],
            "unknown attention backend 'fa4'; backends: fa3, flash, cudnn, varlen, sdpa",
        ),
        (["--shape", "gpt-5"], f"--shape 'gpt-5': choose from {', '.join(SHAPES)}"),
        (["--kv-heads", "5"], "--heads 28 is no multiple of --kv-heads 5"),
        (["--packs", "4x8q"], "--packs '8q': give a whole number such as 8192, 32k or 1m"),
        (["--packs", "8+0"], "--packs '8+0': a pack has documents, and a document at least one token"),
        (["--packs", "0x8"], "--packs '0x8': a pack has documents, and a document at least one token"),
        (["--packs", ";"], "--packs ';': name a pack, such as 32k, 4x8k or 16k+8k+5k"),
    ],
)
def test_bench_attention_refuses_what_it_cannot_measure(capfd, flags, message):
    assert run(["bench", "attention", "--device", "cpu", *flags]) == 2
    assert capfd.readouterr().err == f"marsinfer: error: {message}\n"


def test_without_a_backend_the_reasons_remain(capfd):
    flags = [*HEADS, "--device", "cpu", "--backends", "fa3", "--packs", "8"]
    assert run(["bench", "attention", *flags]) == 0
    printed = capfd.readouterr().out
    assert "| backend |" not in printed
    assert "fa3: not available: needs a GPU" in printed


@pytest.fixture
def tiny():
    return loaded(tokenizer=None)


def test_operations_and_bytes_of_a_pack_are_sums_over_its_documents(tiny):
    lengths, shape = (30, 100), tiny.shape
    documents = [document(length, seed=row, row=row) for row, length in enumerate(lengths)]
    settings = {"share": "0.5", "start_layer": "2", "window": "4", "prefix": "4"}
    halved = make_method("marsinfer", settings)
    variants = [Variant("dense", Dense()), Variant("halved", halved)]
    ceilings = Ceilings(tokens=130, matrix_tflops=1e-3, attention_tflops=2e-3)
    dense, half = measure_ttft(tiny, documents, variants, repeats=1, new_tokens=3, ceilings=ceilings)
    assert (dense.documents, dense.tokens) == (half.documents, half.tokens) == (2, 130)
    every = sum(dense_flops(shape, length) for length in lengths)
    attended = 3 * sum(attention_flops(shape, length) for length in lengths)
    attended += 4 * shape.heads * shape.head_dim * sum(lengths)  # the last tokens' in the last layer
    assert dense.floor_ms == pytest.approx(((every - attended) / 1e9 + attended / 2e9) * 1e3)
    assert dense.tflops_per_second == pytest.approx(every / dense.ttft_ms / 1e9)
    assert dense.kv_bytes == half.kv_bytes == 130 * shape.layers * shape.kv_bytes_per_token(4)
    assert (dense.flops_ratio, dense.kv_ratio, dense.ffn_ratio) == (1, 1, 1)
    whole = [dense_work(shape, n) for n in lengths]
    pruned = [LayerWork(n, n // 2) for n in lengths]
    passed = [(*layers[:2], half_layer, layers[-1]) for layers, half_layer in zip(whole, pruned, strict=True)]
    done = sum(passes_flops(shape, [layers]) for layers in passed)
    assert half.ffn_share_by_layer == (1, 1, 0.5, 1)
    assert half.ffn_ratio == pytest.approx(sum((2.5 * n + 1) / (3 * n + 1) for n in lengths) / 2)
    assert half.flops_ratio == pytest.approx(done / every, rel=0.05)  # scoring comes on top
    assert half.flops_ratio > done / every
    assert half.end_to_end_ms > 0


def test_ttft_of_several_documents_in_one_pack(model_folder, capfd):
    flags = ["--documents", "3", "--lengths", "50", "--methods", "dense", "--new-tokens", "2"]
    given = ["bench", "ttft", "--model", str(model_folder), *flags, "--repeats", "1"]
    assert run([*given, "--json"]) == 0
    report = json.loads(capfd.readouterr().out)
    assert [measured["tokens"] for measured in report["ceilings"]] == [150]
    (dense,) = report["results"]  # stock transformers is left out unasked
    assert (dense["documents"], dense["tokens"], dense["kv_ratio"]) == (3, 150, 1)
    assert run(given) == 0
    assert "| 3 | 150 | dense |" in capfd.readouterr().out
    assert run([*given, "--baselines", "transformers"]) == 2
    assert capfd.readouterr().err == (
        "marsinfer: error: baseline transformers runs one document at a time, and --documents is 3: "
        "give --baselines none\n"
    )


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "docs.jsonl"
    rows = [{"text": f"fish {n} " * (5 + 9 * n), "ask": "how many?"} for n in range(5)]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


@pytest.mark.slow
def test_ttft_takes_consecutive_rows_of_a_file(model_folder, source, capfd):
    flags = ["--input", str(source), "--methods", "dense", "--repeats", "1", "--json"]
    given = ["bench", "ttft", "--model", str(model_folder), *flags]
    tokens = {}
    for rows in ("1 1", "2 1", "1 2"):
        row, count = rows.split()
        assert run([*given, "--row", row, "--documents", count]) == 0
        tokens[rows] = json.loads(capfd.readouterr().out)["results"][-1]["tokens"]
    assert tokens["1 2"] == tokens["1 1"] + tokens["2 1"]
    assert run([*given, "--row", "3", "--documents", "3"]) == 2
    assert capfd.readouterr().err == f"marsinfer: error: {source} has no row 5\n"


def test_a_whole_run_is_measured(model_folder, source, capfd):
    flags = ["--question-column", "ask", "--max-new-tokens", "3", "--pack-tokens", "200", "--limit", "4"]
    given = ["bench", "batch", str(source), "--model", str(model_folder), *flags]
    assert run([*given, "--method", "marsinfer:share=0.5:start_layer=2", "--json"]) == 0
    report = json.loads(capfd.readouterr().out)
    assert (report["variant"], report["documents"], report["errors"]) == (
        "marsinfer:share=0.5:start_layer=2",
        4,
        0,
    )
    assert 1 < report["packs"] <= 4
    assert report["new_tokens"] == 12
    assert 0 < report["prefill_s"] + report["decode_s"] < report["wall_s"] < report["run_s"]
    shares = (report["prefill_share"], report["decode_share"], report["between_packs_share"])
    assert all(share > 0 for share in shares)
    assert sum(shares) == pytest.approx(1)
    assert report["documents_per_second"] == pytest.approx(4 / report["wall_s"])
    assert report["prompt_tokens_per_second"] == pytest.approx(report["prompt_tokens"] / report["wall_s"])
    assert report["idle"] is None  # a CPU
    assert run([*given, "--method", "dense"]) == 0
    printed = capfd.readouterr().out
    assert "| variant | documents | packs | documents/s |" in printed
    assert "| dense | 4 |" in printed
    assert "idle: not measured" in printed


def test_a_run_that_answers_nothing_is_an_error(model_folder, source, capfd):
    given = ["bench", "batch", "--model", str(model_folder), "--method", "dense"]
    source.write_text("{broken")
    assert run([*given, str(source)]) == 2
    message = f"marsinfer: error: {source} has no row that was answered (bad_json 1)\n"
    assert capfd.readouterr().err.endswith(message)
    assert run([*given, "-"]) == 2
    assert capfd.readouterr().err == (
        "marsinfer: error: bench batch reads its input more than once: give a file instead of -\n"
    )


def test_what_no_interval_covers_is_idle():
    busy = [(50, 60), (0, 12), (10, 30), (15, 20), (95, 300)]  # overlapping, one inside another, out of order
    assert idle_share(busy, (10, 110)) == pytest.approx(1 - (20 + 10 + 15) / 100)
    assert idle_share([(0, 1000)], (10, 110)) == 0
    assert idle_share([(0, 9), (111, 120)], (10, 110)) == 1


def test_models_are_loaded_in_the_numbers_that_all_variants_compute_in():
    def wanted(*variants):
        return precision_of(parse_variants(",".join(variants), None))

    assert wanted("dense", "mars") == IN_FULL
    assert wanted("dense:fp8", "mars:fp8") == LinearPrecision(linears="fp8")
    assert wanted("dense:mixed") == LinearPrecision(linears="mixed")
    assert wanted("dense:fp8", "mars") == wanted("dense:fp8", "mars:mixed") == IN_FULL


@pytest.mark.parametrize("command", ["ttft", "decode"])
def test_variants_that_all_compute_in_fp8(command, monkeypatch, capfd):
    """Nothing else is held, and stock transformers is left out, which would need it."""
    monkeypatch.setattr("pipeline.families.configuration.fp8_available", lambda device: None)
    shape = ["--model", "random:tiny", "--dtype", "bfloat16", "--lengths", "100"]
    flags = [*shape, "--methods", "dense:fp8", "--repeats", "1", "--json"]
    stock = ["--baselines", "none"] if command == "ttft" else ["--documents", "2", "--new-tokens", "3"]
    held = []
    real = UnloadedModel.load
    monkeypatch.setattr(UnloadedModel, "load", lambda self, *of: held.append(of[0]) or real(self, *of))
    assert run(["bench", command, *flags, *stock]) == 0
    assert held == [LinearPrecision(linears="fp8")]
    (result,) = json.loads(capfd.readouterr().out)["results"]
    assert result["variant"] == "dense:fp8"
