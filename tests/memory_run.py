"""Peak memory of a run over many short rows, everything real but the model's forward pass.

    python tests/memory_run.py 10000 1000000

One process a count; prints rows, seconds and peak resident megabytes.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from conftest import SIZES, byte_tokenizer, random_model


def stub_answers(engine, documents, rules, check):
    """What the engine would return, without having run the model."""
    layers = engine.model.adapter.shape.layers
    rows = []
    for document in documents:
        row = engine._row(document)
        row.answer, row.finish_reason, row.new_tokens = "stub", "length", 4
        row.kept_tokens = row.ffn_tokens = [document.prompt_tokens] * layers
        row.prefill_ms = row.ttft_ms = row.decode_ms = row.queue_ms = 1.0
        rows.append(row)
    return rows


def run(count: int) -> None:
    import torch

    from pipeline import run_batch
    from pipeline.engines.local import LocalEngine

    LocalEngine._answer = stub_answers
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        settings = {**SIZES, "vocab_size": 320, "max_position_embeddings": 1024}
        random_model("qwen2", settings, device=torch.device("cpu"), dtype=torch.float32).save_pretrained(
            folder
        )
        byte_tokenizer().save_pretrained(folder)
        with (folder / "in.jsonl").open("w") as lines:
            for row in range(count):
                lines.write(json.dumps({"text": f"document {row} of many", "note": row}) + "\n")
        began = time.perf_counter()
        summary = run_batch(
            str(folder / "in.jsonl"), str(folder / "out.parquet"), model=str(folder), question="what?"
        )
        assert summary.status["ok"] == count
        seconds = time.perf_counter() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"{count:>9,} rows  {seconds:8.1f} s  {peak:8.1f} MB", flush=True)


if __name__ == "__main__":
    if sys.argv[1] == "--one":
        run(int(sys.argv[2]))
    else:
        for count in sys.argv[1:]:
            subprocess.run([sys.executable, __file__, "--one", count], check=True)
