"""Peak memory of a run over many short rows, everything real but the model's forward pass.

    python tests/memory_run.py 10000 1000000
    python tests/memory_run.py --columns answer,stats 10000 1000000
    python tests/memory_run.py --rows requests --output .jsonl 10000 1000000
    python tests/memory_run.py --ray 1000 100000

One process a count; prints rows, seconds and peak resident megabytes. --columns is batch's. --rows says what
they are: texts, or requests of OpenAI's Batch API, of which one in a hundred is refused. With --ray these are
of the process that reads and writes, in a run with two workers; their model is real, but has one small layer.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from conftest import SIZES, byte_tokenizer, random_model


def stub_answers(engine, jobs):
    """What the engine would return of a pack, without having run the model."""
    from pipeline.engines.answering import row_of
    from pipeline.records import Answered

    layers = engine.model.decoder.shape.layers
    answered = []
    for job in jobs:
        document, row = job.document, row_of(job.document, job.method.name)
        row.answer, row.finish_reason, row.new_tokens = "stub", "length", 4
        row.kept_tokens = row.ffn_tokens = [document.prompt_tokens] * layers
        row.prefill_ms = row.ttft_ms = row.decode_ms = row.queue_ms = 1.0
        answered.append(Answered(document, row))
    return answered


def text(row):
    return {"text": f"document {row} of many", "note": row}


def request(row):
    said = [{"role": "user", "content": f"document {row} of many\n\nwhat?"}]
    body = {"model": "stub", "messages": said, "max_tokens": 4, "n": 2 if is_refused(row) else 1}
    return {"custom_id": str(row), "method": "POST", "url": "/v1/chat/completions", "body": body}


def is_refused(row):
    return row % 100 == 99


ROWS = {"texts": text, "requests": request}


def run(count: int, *, in_workers: bool, columns: str | None, rows: str, output: str) -> None:
    import torch

    from pipeline import run_batch
    from pipeline.engines.local import LocalEngine

    options = (
        {"engine": "ray", "workers": "2", "gpus_per_worker": 0, "max_new_tokens": 1} if in_workers else {}
    )
    if columns is not None:
        options["columns"] = tuple(columns.split(","))
    if rows == "texts":
        options["question"] = "what?"
    if not in_workers:
        LocalEngine._admit = stub_answers
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        settings = {**SIZES, "vocab_size": 320, "max_position_embeddings": 1024}
        if in_workers:
            settings |= {"num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 32}
        random_model("qwen2", settings, device=torch.device("cpu"), dtype=torch.float32).save_pretrained(
            folder
        )
        byte_tokenizer().save_pretrained(folder)
        with (folder / "in.jsonl").open("w") as lines:
            for row in range(count):
                lines.write(json.dumps(ROWS[rows](row)) + "\n")
        began = time.perf_counter()
        summary = run_batch(
            str(folder / "in.jsonl"),
            str(folder / f"out{output}"),
            model=str(folder),
            **options,
        )
        refused = sum(map(is_refused, range(count))) if rows == "requests" else 0
        assert summary.status["ok"] == count - refused
        seconds = time.perf_counter() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"{count:>9,} rows  {seconds:8.1f} s  {peak:8.1f} MB", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("counts", type=int, nargs="+")
    parser.add_argument("--ray", action="store_true")
    parser.add_argument("--columns")
    parser.add_argument("--rows", choices=ROWS, default="texts")
    parser.add_argument("--output", default=".parquet", help="what the output's name ends with")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        run(
            given.counts[0],
            in_workers=given.ray,
            columns=given.columns,
            rows=given.rows,
            output=given.output,
        )
        return
    flags = ["--ray"] if given.ray else []
    flags += ["--rows", given.rows, "--output", given.output]
    flags += ["--columns", given.columns] if given.columns else []
    for count in given.counts:
        subprocess.run([sys.executable, __file__, *flags, "--one", str(count)], check=True)


if __name__ == "__main__":
    main()
