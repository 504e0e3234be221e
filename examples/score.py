"""Score answers: python examples/score.py REFERENCES.jsonl OUTPUT.parquet [OUTPUT.parquet ...]

References are JSON lines with `id` and `reference`; outputs are Parquet files written by `marsinfer batch`,
or folders of them, whose rows count as those of one output. A row whose status is not `ok` scores 0. TTFT and
both ratios are over the answered rows; the ratios are means weighted by prompt tokens.
"""

import json
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table
from rich.text import Text

from pipeline.suites.metrics import contains, token_f1

COLUMNS = ["id", "status", "answer", "method", "prompt_tokens", "ttft_ms", "ffn_ratio", "flops_ratio"]
ANSWER_CHARACTERS = 60
USAGE = "usage: python examples/score.py REFERENCES.jsonl OUTPUT.parquet [OUTPUT.parquet ...]"


def main(arguments: list[str]) -> int:
    try:
        if len(arguments) < 2:
            raise ValueError(USAGE)
        references = read_references(Path(arguments[0]))
        outputs = [read_output(Path(path), references) for path in arguments[1:]]
    except (OSError, ValueError, pa.ArrowException) as error:
        print(f"score: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    names = name_outputs(outputs, arguments[1:])
    summaries = [summarize(rows, references) for rows in outputs]
    scores = Table("method", *(Column(head, justify="right") for head in summaries[0]), title="Scores")
    for name, summary in zip(names, summaries, strict=True):
        scores.add_row(Text(name), *summary.values())
    answers = Table("id", "reference", *map(escape, names), title="Answers")
    for key, reference in references.items():
        answers.add_row(Text(key), Text(clip(reference)), *(Text(clip(said(rows[key]))) for rows in outputs))
    console = Console()
    if not console.is_terminal:  # a log has no width of its own, and 80 characters would cut the numbers
        console.width = max(console.width, 120)
    console.print(scores, answers)
    return 0


def read_references(path: Path) -> dict[str, str]:
    references: dict[str, str] = {}
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                key, reference = str(row["id"]), str(row["reference"])
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{path} line {number}: not an object with `id` and `reference`") from error
            if key in references:
                raise ValueError(f"{path} line {number}: the id {key!r} stands there twice")
            references[key] = reference
    if not references:
        raise ValueError(f"{path}: no references")
    return references


def read_output(path: Path, references: dict[str, str]) -> dict[str, dict]:
    """The row of each referenced id; rows of other ids are left out."""
    files = sorted(path.glob("*.parquet")) if path.is_dir() else [path]
    rows = [row for file in files for row in read_rows(file)]
    found = Counter(str(row["id"]) for row in rows)
    if missing := [key for key in references if not found[key]]:
        raise ValueError(f"{path}: no row with the id {', '.join(missing)}")
    if repeated := [key for key in references if found[key] > 1]:
        raise ValueError(f"{path}: more than one row with the id {', '.join(repeated)}")
    return {str(row["id"]): row for row in rows if str(row["id"]) in references}


def read_rows(path: Path) -> list[dict]:
    """The columns that scores are made of."""
    with pq.ParquetFile(path) as file:
        if absent := [name for name in COLUMNS if name not in file.schema_arrow.names]:
            raise ValueError(f"{path}: no column {', '.join(absent)}; is it an output of `marsinfer batch`?")
        return file.read(columns=COLUMNS).to_pylist()


def name_outputs(outputs: list[dict[str, dict]], paths: list[str]) -> list[str]:
    """The method of each output, with its path where two outputs have the same method."""
    methods = [next((row["method"] for row in rows.values() if row["method"]), "unknown") for rows in outputs]
    return [f"{m} ({p})" if methods.count(m) > 1 else m for m, p in zip(methods, paths, strict=True)]


def summarize(rows: dict[str, dict], references: dict[str, str]) -> dict[str, str]:
    answered = {key: row for key, row in rows.items() if row["status"] == "ok"}
    pairs = [(row["answer"] or "", references[key]) for key, row in answered.items()]
    ttft_ms = [row["ttft_ms"] for row in answered.values() if row["ttft_ms"] is not None]
    ffn_ratio, flops_ratio = (weighted_mean(answered, column) for column in ("ffn_ratio", "flops_ratio"))
    return {
        "rows": str(len(rows)),
        "errors": str(len(rows) - len(answered)),
        "contains": f"{sum(contains(*pair) for pair in pairs) / len(rows):.3f}",
        "token F1": f"{sum(token_f1(*pair) for pair in pairs) / len(rows):.3f}",
        "TTFT p50 ms": f"{np.percentile(ttft_ms, 50):.1f}" if ttft_ms else "-",
        "TTFT p95 ms": f"{np.percentile(ttft_ms, 95):.1f}" if ttft_ms else "-",
        "FFN skipped": "-" if ffn_ratio is None else f"{1 - ffn_ratio:.1%}",
        "FLOPs ratio": "-" if flops_ratio is None else f"{flops_ratio:.3f}",
    }


def weighted_mean(rows: dict[str, dict], column: str) -> float | None:
    known = [row for row in rows.values() if row[column] is not None and row["prompt_tokens"]]
    tokens = sum(row["prompt_tokens"] for row in known)
    return sum(row[column] * row["prompt_tokens"] for row in known) / tokens if known else None


def said(row: dict) -> str:
    return row["answer"] or "" if row["status"] == "ok" else f"({row['status']})"


def clip(text: str) -> str:
    words = " ".join(text.split())
    return words if len(words) <= ANSWER_CHARACTERS else words[: ANSWER_CHARACTERS - 1] + "…"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
