"""--save-selection: what an output then says of each token agrees with what it says of each layer."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import run_batch
from pipeline.outputs.own_columns import SELECTION_NAMES
from pipeline.pruning.tiers import GONE, IN_FP8, SKIPPED, unpack_layers

pytestmark = pytest.mark.slow

TEXTS = ["one fish, two fish, red fish, blue fish; ein Öl-Fisch 🐟 鱼 " * 7, "red fish " * 31, ""]
METHODS = {
    "dense": {},
    "marsinfer": {"start_layer": 1, "share": 0.4, "window": 8, "prefix": 8},
    "sliminfer": {"layers": (1, 2), "budget": (0.6, 0.3), "block": 16},
    "fastkv": {},
    "frugal": {"layer": 1, "keep": 0.3, "sink": 4, "window": 8, "most": 40},
    "gemfilter": {"layer": 1, "keep": 0.3},
    "mars": {"last_full": 1, "window": 12, "most": 16},
    "speculative": {"keep": 0.3, "chunk": 8, "sink": 4, "window": 8, "most": 40},
}


def answered(model_folder, tmp_path, name="out.parquet", **options):
    source = tmp_path / "in.parquet"
    pq.write_table(pa.table({"text": TEXTS, "selection": ["mine", "yours", "ours"]}), source)
    out = tmp_path / name
    run_batch(
        str(source), str(out), model=str(model_folder), question="how many?", max_new_tokens=2, **options
    )
    return out


@pytest.mark.parametrize("method", METHODS)
def test_a_selection_agrees_with_the_counts_of_its_row(sharp_model_folder, tmp_path, method):
    options = {"draft_model": str(sharp_model_folder)} if method == "speculative" else {}
    options |= {"method": method, "settings": METHODS[method], "save_selection": True}
    out = answered(sharp_model_folder, tmp_path, **options)
    *rows, failed = pq.read_table(out).to_pylist()
    for row, text in zip(rows, TEXTS, strict=False):
        layers = unpack_layers(row["selection"], row["prompt_tokens"])
        entered, passed, in_fp8 = np.zeros((3, 4), int)
        for layer in layers:
            entered[layer.layer] += (layer.states != GONE).sum()
            passed[layer.layer] += (layer.states > SKIPPED).sum()
            in_fp8[layer.layer] += (layer.states == IN_FP8).sum()
        assert entered.tolist() == row["kept_tokens"]
        assert passed.tolist() == row["ffn_tokens"]
        assert in_fp8.tolist() == row["ffn_fp8_tokens"]
        ends = np.cumsum(row["prompt_token_chars"])
        assert len(ends) == row["prompt_tokens"]
        assert ends[-1] == len(row["prompt_text"])
        start, stop = row["prompt_spans"][:2]
        assert row["prompt_text"][ends[start - 1] : ends[stop - 1]] == text
        start, stop = row["prompt_spans"][2:]
        assert row["prompt_text"][ends[start - 1] : ends[stop - 1]] == "how many?"
    if method not in ("dense", "fastkv"):
        assert min(passed) < rows[-1]["prompt_tokens"], "nothing was pruned"
    if method in ("gemfilter", "frugal"):
        assert [(layer.number, layer.layer) for layer in layers] == [
            *((0, n) for n in range(2)),
            *((1, n) for n in range(4)),
        ]
    assert failed["status"] == "error"
    assert [failed[name] for name in SELECTION_NAMES] == [None] * 4


def test_without_the_flag_there_are_no_such_columns(model_folder, tmp_path):
    names = pq.read_schema(answered(model_folder, tmp_path)).names
    assert not set(SELECTION_NAMES) & set(names)
    assert "selection_input" in names


def test_an_arrow_output_holds_a_selection_too(model_folder, tmp_path):
    out = answered(model_folder, tmp_path, "out.arrow", save_selection=True)
    with pa.ipc.open_file(out) as file:
        table = file.read_all()
    assert table["selection"].type == pa.list_(pa.binary())
    assert table["selection_input"].to_pylist() == ["mine", "yours", "ours"]
    assert len(table["selection"][0]) == 4


def test_json_lines_cannot_hold_a_selection(refusal, fish, tmp_path):
    out = tmp_path / "out.jsonl"
    said = refusal(fish, out, "--text-column", "body", "--question", "?", "--save-selection")
    assert said == f"--save-selection writes bytes, which {out} cannot hold: use .parquet"


def test_a_run_goes_on_only_with_the_columns_it_began_with(refusal, call, fish, tmp_path):
    words = [
        fish,
        tmp_path / "out.parquet",
        "--text-column",
        "body",
        "--question",
        "?",
        "--max-new-tokens",
        "1",
    ]
    assert call(*words, "--quiet") == 0
    said = refusal(*words, "--quiet", "--resume", "--save-selection")
    assert "other columns: 'selection' is new" in said
