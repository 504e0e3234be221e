"""--draft-model: a small model reads for a larger one, from the command line to answers; what is refused."""

from __future__ import annotations

import json

import pyarrow.parquet as pq
import pytest
import torch
from conftest import SIZES, sharpened

from marsinfer_cli.app import run
from pipeline import answer, load_model
from pipeline.checkpoints.building import random_model
from pipeline.checkpoints.random_weights import byte_tokenizer

SMALL = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1}
KEEP = ["keep=0.2", "chunk=8", "look_ahead=2", "sink=4", "window=8", "most=64"]
ASKED = ["--question-column", "ask", "--text-column", "body", "--max-new-tokens", 4]


def draft_folder(folder, *, tokens=(), **sizes):
    settings = {**SIZES, "vocab_size": 300, "max_position_embeddings": 1024, **SMALL, **sizes}
    model = random_model("qwen2", settings, device=torch.device("cpu"), dtype=torch.float32, seed=3)
    sharpened(model).save_pretrained(folder)
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(list(tokens))
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def draft(tmp_path_factory):
    return draft_folder(tmp_path_factory.mktemp("draft"))


@pytest.fixture(scope="module")
def others(tmp_path_factory):
    """Drafts of which each cannot read for the model, or is another one."""
    folder = tmp_path_factory.mktemp("others")
    slides = {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 0}
    return {
        "tokenizer": draft_folder(folder / "tokenizer", tokens=["<more>"]),
        "short": draft_folder(folder / "short", max_position_embeddings=512),
        "sliding": draft_folder(folder / "sliding", **slides),
        "few": draft_folder(folder / "few", vocab_size=258),
        "wider": draft_folder(folder / "wider", intermediate_size=64),
    }


def flags(draft, *settings):
    return ["--method", "speculative", "--draft-model", draft, *(f"--set={each}" for each in settings)]


def test_a_batch_says_what_was_kept(call, fish, draft, others, tmp_path, capfd):
    out, dense, whole = (tmp_path / f"{name}.parquet" for name in ("out", "dense", "whole"))
    assert call(fish, out, *ASKED, *flags(draft, *KEEP), "--save-selection") == 0
    assert call(fish, dense, *ASKED) == 0
    assert call(fish, whole, *ASKED, *flags(draft, "keep=1"), "--kv-dtype", "auto") == 0
    rows, denses, wholes = (pq.read_table(path).to_pylist() for path in (out, dense, whole))
    assert [row["answer"] for row in wholes] == [row["answer"] for row in denses]
    long = rows[1]
    assert (long["method"], long["status"]) == ("speculative", "ok")
    assert len(set(long["kept_tokens"])) == 1
    assert long["kept_tokens"][0] < long["prompt_tokens"] - 100
    assert long["kv_bytes"] < denses[1]["kv_bytes"] / 2
    # the draft, about an eighth of the model, computes the whole prompt
    assert long["kept_ratio"] + 0.02 < long["flops_ratio"] < 1
    assert wholes[1]["flops_ratio"] > 1
    # it goes on with the same draft alone
    assert call(fish, out, *ASKED, *flags(draft, *KEEP), "--save-selection", "--resume") == 0
    capfd.readouterr()
    assert call(fish, out, *ASKED, *flags(others["wider"], *KEEP), "--save-selection", "--resume") == 2
    assert "draft" in capfd.readouterr().err


def test_a_dry_run_counts_the_draft(call, fish, draft, tmp_path, capfd):
    def told(*more):
        assert call(fish, tmp_path / "out.parquet", *ASKED, *more, "--dry-run") == 0
        return capfd.readouterr().out

    assert " of them the draft model's, of " in told(*flags(draft, *KEEP))
    assert "draft" not in told()


def test_what_cannot_be_is_refused_in_one_line(refusal, fish, draft, others, tmp_path, model_folder):
    def said(*more):
        text = refusal(fish, tmp_path / "out.parquet", *ASKED, *more)
        names = {model_folder: "MODEL", draft: "DRAFT"} | {each: name for name, each in others.items()}
        for folder, name in names.items():
            text = text.replace(str(folder), name)
        return text

    assert said("--method", "speculative") == (
        "method speculative needs a draft model: --draft-model names a smaller one with the tokenizer of"
        " MODEL"
    )
    assert said("--draft-model", draft) == (
        "--draft-model is for method speculative, and dense reads no draft: leave it out"
    )
    assert said(*flags(others["tokenizer"])) == (
        "--draft-model tokenizer has another tokenizer than MODEL: 260 tokens, not 259; "
        "take a smaller model of the same family"
    )
    assert said(*flags(others["short"])) == (
        "--draft-model short reads 512 tokens, fewer than the 1,024 of MODEL"
    )
    assert said(*flags(others["few"])) == (
        "--draft-model few knows 258 tokens, and prompts for MODEL may have 259; take a draft whose weights"
        " belong to its tokenizer"
    )
    assert said(*flags(others["sliding"])) == (
        "--draft-model sliding cannot be a draft: some of its layers have sliding windows"
    )
    assert said(*flags(draft), "--kv-memory", "1m") == (
        "--kv-memory needs a method that can offload keys and values, not speculative"
    )
    assert said(*flags(draft), "--tensor-parallel", 2) == (
        "--tensor-parallel 2 and --method speculative exclude each other: choose from dense, marsinfer, mars"
    )


def test_a_loaded_model_answers_by_its_draft_or_without(draft, sharp_model_folder):
    model = load_model(sharp_model_folder, draft_model=draft)
    rows = [{"text": "one fish two fish " * 20, "question": "how many?"}]
    for method, settings in (("speculative", {"keep": 0.2, "most": 64}), ("dense", {})):
        (row,) = answer(rows, model=model, method=method, settings=settings, max_new_tokens=2)
        assert row["status"] == "ok"
        assert (row["kept_tokens"][0] < row["prompt_tokens"]) == (method == "speculative")


@pytest.mark.slow
def test_it_is_measured_beside_others(fish, draft, sharp_model_folder, capfd):
    """The random tokens of bench ttft lie beyond the draft's table of embeddings, which texts never do."""
    model = ["--model", str(sharp_model_folder), "--draft-model", str(draft)]
    spec = ":".join(["speculative", *KEEP])
    asked = ["--text-column", "body", "--question-column", "ask", "--max-new-tokens", "4"]
    assert run(["bench", "accuracy", str(fish), *model, *asked, "--methods", f"{spec},mars", "--json"]) == 0
    dense, speculative, _ = json.loads(capfd.readouterr().out)["results"]
    assert 0 < speculative["shares"]["kept_ratio"] < dense["shares"]["kept_ratio"] == 1
    assert speculative["divergence"] > 0
    timed = ["--lengths", "300", "--baselines", "none", "--repeats", "1", "--new-tokens", "2"]
    assert run(["bench", "ttft", *model, *timed, "--methods", f"dense,{spec}", "--json"]) == 0
    dense, speculative = json.loads(capfd.readouterr().out)["results"]
    assert speculative["kv_ratio"] < 0.8
    assert speculative["floor_ms"] is None
    checked = ["--method", "speculative", *(f"--set={each}" for each in KEEP), "--max-drop", "100pt"]
    assert run(["check", str(fish), *model, *asked, *checked]) in (0, 6)
    assert run(["bench", "accuracy", str(fish), *model, *asked, "--methods", "mars"]) == 2
    assert "--draft-model is for method speculative, and mars reads no draft" in capfd.readouterr().err
