"""The script examples/score.py: once as a user runs it, else within this process."""

import json
import os
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

SCRIPT = Path(__file__).parents[2] / "examples" / "score.py"
LONG_ANSWER = "word " * 30

DENSE = [
    {
        "id": "a",
        "answer": "30 days.",
        "prompt_tokens": 100,
        "ttft_ms": 10.0,
        "ffn_ratio": 1.0,
        "flops_ratio": 1.0,
    },
    {
        "id": "b",
        "answer": LONG_ANSWER,
        "prompt_tokens": 300,
        "ttft_ms": 20.0,
        "ffn_ratio": 1.0,
        "flops_ratio": 1.0,
    },
    {
        "id": "c",
        "answer": "It is Ty Coon",
        "prompt_tokens": 50,
        "ttft_ms": 30.0,
        "ffn_ratio": 1.0,
        "flops_ratio": 1.0,
    },
    {
        "id": "d",
        "answer": "NOTICE",
        "prompt_tokens": 50,
        "ttft_ms": 40.0,
        "ffn_ratio": 1.0,
        "flops_ratio": 1.0,
    },
]
PRUNED = [
    {
        "id": "a",
        "answer": "30 days",
        "prompt_tokens": 100,
        "ttft_ms": 10.0,
        "ffn_ratio": 0.8,
        "flops_ratio": 0.9,
    },
    {
        "id": "b",
        "answer": "no idea",
        "prompt_tokens": 300,
        "ttft_ms": 20.0,
        "ffn_ratio": 0.4,
        "flops_ratio": 0.5,
    },
    {"id": "c", "answer": "Ty Coon", "status": "error", "ttft_ms": 900.0, "ffn_ratio": 0.0},
    {"id": "d", "status": "skipped"},
    {"id": "unreferenced", "answer": "30 days", "prompt_tokens": 900, "ttft_ms": 900.0, "ffn_ratio": 0.0},
]
REFERENCES = {"a": "30 days", "b": "January 2004", "c": "Ty Coon", "d": "NOTICE"}

SCHEMA = pa.schema(
    {
        "id": pa.large_string(),
        "status": pa.string(),
        "answer": pa.large_string(),
        "method": pa.string(),
        "prompt_tokens": pa.int64(),
        "ttft_ms": pa.float64(),
        "ffn_ratio": pa.float64(),
        "flops_ratio": pa.float64(),
    }
)


@pytest.fixture
def references(tmp_path: Path) -> Path:
    path = tmp_path / "references.jsonl"
    lines = [json.dumps({"id": key, "reference": reference}) for key, reference in REFERENCES.items()]
    path.write_text("\n\n".join(lines) + "\n", encoding="utf-8")
    return path


def write_output(path: Path, method: str, rows: list[dict]) -> Path:
    filled = [{"status": "ok", "method": method} | row for row in rows]
    pq.write_table(pa.Table.from_pylist(filled, schema=SCHEMA), path)
    return path


class Done(NamedTuple):
    """How the script ended."""

    returncode: int
    stdout: str
    stderr: str


Score = Callable[..., Done]


@pytest.fixture
def score(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Score:
    monkeypatch.setenv("COLUMNS", "300")

    def score(*arguments: object) -> Done:
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(SCRIPT), run_name="__main__")
        return Done(ended.value.code, *capsys.readouterr())

    return score


def in_a_process(*arguments: object) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"COLUMNS": "300", "PYTHONIOENCODING": "utf-8"}
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, encoding="utf-8", env=environment, check=False)


def cells(printed: str, first: str) -> list[list[str]]:
    """The cells of each table row that starts with `first`."""
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in printed.splitlines()]
    return [row[1:] for row in rows if row and row[0] == first]


def test_scores_of_two_outputs(tmp_path: Path, references: Path) -> None:
    dense = write_output(tmp_path / "dense.parquet", "dense", DENSE)
    pruned = write_output(tmp_path / "pruned.parquet", "marsinfer", PRUNED)

    done = in_a_process(references, dense, pruned)

    assert done.stderr == ""
    assert done.returncode == 0
    # contains: a, c and d of 4; F1: 1, 0, 2 * (2/4 * 1) / 1.5 = 2/3 and 1; p95 is 30 + 0.85 * 10
    assert cells(done.stdout, "dense") == [["4", "0", "0.750", "0.667", "25.0", "38.5", "0.0%", "1.000"]]
    # contains and F1: a of 4; FFN: (100 * 0.8 + 300 * 0.4) / 400 = 0.5; FLOPs: (100 * 0.9 + 300 * 0.5) / 400
    assert cells(done.stdout, "marsinfer") == [["4", "2", "0.250", "0.250", "15.0", "19.5", "50.0%", "0.600"]]
    assert cells(done.stdout, "a") == [["30 days", "30 days.", "30 days"]]
    assert cells(done.stdout, "b") == [["January 2004", LONG_ANSWER[:59] + "…", "no idea"]]
    assert cells(done.stdout, "c") == [["Ty Coon", "It is Ty Coon", "(error)"]]
    assert cells(done.stdout, "d") == [["NOTICE", "NOTICE", "(skipped)"]]


def test_a_folder_of_outputs_is_one_output(tmp_path: Path, references: Path, score: Score) -> None:
    folder = tmp_path / "dense"
    folder.mkdir()
    for number, row in enumerate(DENSE):
        write_output(folder / f"{number}.parquet", "dense", [row])
    whole = score(references, write_output(tmp_path / "dense.parquet", "dense", DENSE))
    assert score(references, folder) == whole
    (folder / "2.parquet").unlink()
    done = score(references, folder)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"score: {folder}: no row with the id c\n")


def test_two_outputs_of_one_method_are_told_apart(tmp_path: Path, references: Path, score: Score) -> None:
    one, two = (write_output(tmp_path / name, "dense", DENSE) for name in ("one.parquet", "two.parquet"))
    done = score(references, one, two)
    assert done.returncode == 0
    assert len(cells(done.stdout, f"dense ({one})")) == len(cells(done.stdout, f"dense ({two})")) == 1


def test_an_output_without_any_answer(tmp_path: Path, references: Path, score: Score) -> None:
    failed = [{"id": key, "status": "error"} for key in REFERENCES]
    done = score(references, write_output(tmp_path / "failed.parquet", "dense", failed))
    assert done.returncode == 0
    assert cells(done.stdout, "dense") == [["4", "4", "0.000", "0.000", "-", "-", "-", "-"]]


def test_a_missing_id_is_refused(tmp_path: Path, references: Path, score: Score) -> None:
    output = write_output(tmp_path / "short.parquet", "dense", DENSE[:2])
    done = score(references, output)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"score: {output}: no row with the id c, d\n"


def test_a_repeated_id_is_refused(tmp_path: Path, references: Path, score: Score) -> None:
    output = write_output(tmp_path / "long.parquet", "dense", [*DENSE, DENSE[0]])
    done = score(references, output)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"score: {output}: more than one row with the id a\n"


def test_a_file_without_the_columns_is_refused(tmp_path: Path, references: Path, score: Score) -> None:
    output = tmp_path / "other.parquet"
    pq.write_table(pa.table({"id": ["a"], "answer": ["30 days"], "status": ["ok"], "ttft_ms": [1.0]}), output)
    done = score(references, output)
    assert (done.returncode, done.stdout) == (2, "")
    columns = "method, prompt_tokens, ffn_ratio, flops_ratio"
    assert done.stderr == f"score: {output}: no column {columns}; is it an output of `marsinfer batch`?\n"


@pytest.mark.parametrize("content", [None, b"", b"not parquet"])
def test_an_unreadable_output_is_one_line(
    tmp_path: Path, references: Path, content: bytes | None, score: Score
) -> None:
    output = tmp_path / "broken.parquet"
    if content is not None:
        output.write_bytes(content)
    done = score(references, output)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("score: ")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("not json", "line 8: not an object with `id` and `reference`"),
        ('{"id": "e"}', "line 8: not an object with `id` and `reference`"),
        ("[1]", "line 8: not an object with `id` and `reference`"),
        ('{"id": "a", "reference": "x"}', "line 8: the id 'a' stands there twice"),
    ],
)
def test_a_bad_reference_is_refused(
    tmp_path: Path, references: Path, line: str, message: str, score: Score
) -> None:
    output = write_output(tmp_path / "dense.parquet", "dense", DENSE)
    with references.open("a", encoding="utf-8") as file:
        file.write(line + "\n")
    done = score(references, output)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"score: {references} {message}\n")


def test_usage(score: Score) -> None:
    done = score()
    assert done.returncode == 2
    assert done.stderr.startswith("score: usage: python examples/score.py")
    assert done.stderr.count("\n") == 1
