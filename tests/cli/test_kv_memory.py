"""`--kv-memory` from the command line to the columns of the output."""

from __future__ import annotations

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

SLIM = ["--method", "sliminfer"]
for setting in ("layers=1,2,3", "budget=0.7,0.5,0.3", "block=8", "unit=2"):
    SLIM += ["--set", setting]


@pytest.fixture
def documents(tmp_path):
    """Two long documents and three short ones; a token is a byte."""
    path = tmp_path / "in.parquet"
    texts = ["red fish blue fish " * 20, "one", "two", "a fish, a wish " * 25, "three"]
    pq.write_table(pa.table({"text": texts}), path)
    return path


def answered(call, documents, output, *flags, code=0):
    fixed = ["--question", "how many?", "--max-new-tokens", "6", "--quiet", *SLIM]
    assert call(documents, output, *fixed, *flags) == code
    return pq.read_table(output).to_pylist()


def test_long_documents_run_alone_and_short_ones_share_packs(call, documents, tmp_path):
    free = answered(call, documents, tmp_path / "free.parquet")
    assert {row["kv_host_bytes"] for row in free} == {0}
    # a token's K/V take 256 bytes a layer: 12,000 tokens' worth of layers fit, less than a long document has
    bounded = answered(call, documents, tmp_path / "bounded.parquet", "--kv-memory", "250kB")
    assert [row["status"] for row in bounded] == ["ok"] * 5
    for row, unbounded in zip(bounded, free, strict=True):
        is_long = row["prompt_tokens"] > 300
        assert (row["kv_host_bytes"] > 0) == is_long
        assert (row["pack_documents"] == 1) == is_long
        assert row["kv_bytes"] == unbounded["kv_bytes"]
        assert row["kept_tokens"] == unbounded["kept_tokens"]
        if not is_long:
            assert row["answer"] == unbounded["answer"]
            assert row["kv_swapped_bytes"] == 0


def test_a_document_that_cannot_fit_is_an_error_row(call, documents, tmp_path):
    rows = answered(call, documents, tmp_path / "out.parquet", "--kv-memory", "48kB")
    assert [row["status"] for row in rows] == ["error", "ok", "ok", "error", "ok"]
    assert rows[0]["error_type"] == "kv_memory"
    assert "cannot run in 0.00 GB of --kv-memory: at least" in rows[0]["error_message"]


@pytest.mark.slow
def test_a_bound_that_nothing_fits_makes_error_rows(call, documents, tmp_path):
    rows = answered(call, documents, tmp_path / "out.parquet", "--kv-memory", "1", code=3)
    assert {(row["status"], row["error_type"]) for row in rows} == {("error", "kv_memory")}


def test_a_method_that_cannot_offload_is_refused_before_anything_is_read(refusal, documents, tmp_path):
    said = refusal(documents, tmp_path / "out.parquet", "--question", "?", "--kv-memory", "1GiB")
    assert said == "--kv-memory needs a method that can offload keys and values, not dense"


def test_keys_and_values_in_fp8_need_a_gpu_and_are_not_offloaded(refusal, documents, tmp_path):
    flags = [documents, tmp_path / "out.parquet", "--question", "?", "--kv-dtype", "fp8"]
    assert refusal(*flags) == (
        "fp8 cannot be used here: FP8 needs an NVIDIA GPU, and on a CPU would only be slower"
    )
    said = refusal(*flags, "--kv-memory", "1GiB", "--method", "sliminfer")
    assert said == "--kv-dtype fp8 and --kv-memory exclude each other: offloaded blocks are in --dtype"


@pytest.mark.parametrize("size", ["lots", "0", "1XB", "-1"])
def test_a_size_that_is_none_is_refused(refusal, documents, tmp_path, size):
    said = refusal(documents, tmp_path / "out.parquet", "--question", "?", f"--kv-memory={size}")
    assert said == f"--kv-memory {size!r}: give a size such as 1GiB or 800MB"


def test_it_is_a_setting_that_decides(call, refusal, documents, tmp_path, capfd):
    output = tmp_path / "out.parquet"
    answered(call, documents, output, "--kv-memory", "250kB")
    again = ["--question", "how many?", "--max-new-tokens", "6", "--quiet", *SLIM, "--resume"]
    assert call(documents, output, *again, "--kv-memory", "250000") == 0
    capfd.readouterr()
    assert "kv_memory was 250000 and is now null" in refusal(documents, output, *again)


def test_a_dry_run_plans_with_it(call, documents, tmp_path, capfd):
    flags = ["--question", "?", "--max-new-tokens", "6", *SLIM, "--dry-run", "--json", "--quiet"]
    for extra, packs in ((["--kv-memory", "250kB"], 3), ([], 1)):
        assert call(documents, tmp_path / "out.parquet", *flags, *extra) == 0
        packing = json.loads(capfd.readouterr().out)["packing"]
        assert packing["packs"] == packs
        assert not extra or packing["kv_bytes"] <= 250_000
