"""One job, whose every run is a whole one: files, reader, tokenizer, packs, journal and output are real."""

import io
import json
import random
from contextlib import redirect_stderr
from pathlib import Path

import pyarrow.parquet as pq

from marsinfer_cli.app import run

METHOD = f"{Path(__file__).with_name('faulty_method.py')}:Faulty"
SETTINGS = ["start_layer=1", "window=8", "prefix=8", "eta=0.8"]
ALONE = ("--pack-tokens", "1")  # answers do not depend on what other rows are in a pack
TOGETHER = ("--pack-tokens", "2k")
A_FEW = (*TOGETHER, "--in-flight", "6")  # some rows have ended before the last ones are prefilled


class Job:
    """Rows in `in.jsonl`, answers to `out.parquet`; what a run prints on stderr is in `told`."""

    def __init__(self, model, folder, undisturbed, *, rows, flags):
        self.model, self.flags, self.rows = model, flags, rows
        self.whole = undisturbed / f"{rows}{''.join(flags)}.parquet"
        self.source, self.output = folder / "in.jsonl", folder / "out.parquet"
        self.told = []
        words = random.Random(0)
        with self.source.open("w") as lines:
            for row in range(rows):
                text = " ".join(words.choices(["red", "fish", "blue", "sea"], k=words.randint(20, 120)))
                lines.write(json.dumps({"id": f"doc-{row}", "text": f"row {row}: {text}", "n": row}) + "\n")

    def words(self, *flags, output=None):
        settings = [word for setting in SETTINGS for word in ("--set", setting)]
        files = [str(self.source), str(output or self.output)]
        asked = ["--question", "what?", "--id-column", "id", "--max-new-tokens", "4", "--quiet"]
        return [
            "batch",
            "--model",
            str(self.model),
            "--method",
            METHOD,
            *settings,
            *asked,
            *self.flags,
            *flags,
            *files,
        ]

    def run(self, *flags, output=None):
        """The exit code."""
        with redirect_stderr(io.StringIO()) as printed:
            code = run(self.words(*flags, output=output))
        self.told = printed.getvalue().splitlines()
        return code

    def resume(self):
        """Go on until the end, which nothing disturbs; all rows of the output."""
        assert self.run("--resume") == 0, self.told
        return read(self.output)

    def undisturbed(self):
        """The rows of a run of its own, left alone, which is the same one for all jobs that are alike."""
        if not self.whole.exists():
            assert self.run(output=self.whole) == 0, self.told
        return read(self.whole)

    @property
    def journal(self):
        return self.output.with_name(f".{self.output.name}.journal")


def read(path):
    return pq.read_table(path).to_pylist()


def check_rows(rows, expected, failed=None):
    """Every row once and in order: those in `failed` with that error, all others with the expected answer."""
    failed = failed or {}
    assert [(row["row"], row["id"]) for row in rows] == [(row["row"], row["id"]) for row in expected]
    for row, other in zip(rows, expected, strict=True):
        if row["row"] in failed:
            assert (row["status"], row["error_type"], row["answer"]) == ("error", failed[row["row"]], None)
            assert f"line {row['row'] + 1}: " in row["error_message"]
        else:
            same = ("status", "answer", "new_tokens", "ffn_tokens", "row_hash", "extra")
            assert [row[name] for name in same] == [other[name] for name in same]


def check_refusal(told):
    """One clear line, and no traceback."""
    assert len(told) == 1, told
    assert told[0].startswith("marsinfer: error: ")
    assert "Traceback" not in told[0]
