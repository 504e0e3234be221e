"""The files in `before/`: how version 0.1.0 was made to write them, and how they are to be gone on with."""

from __future__ import annotations

import io
import json
import random
import shlex
import signal
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest

from golden.calls import ASK, TINY, without_warm_up
from golden.surface import plain_surroundings
from marsinfer_cli.app import run

# what is asked of the same rows in all runs; one row a pack, so that a run can be stopped between two
PLAIN = f"{ASK} {TINY} --max-new-tokens 4 --quiet"
BATCH = {
    "out.parquet": f"batch in.jsonl out.parquet {PLAIN}",
    "out.jsonl": f"batch in.jsonl out.jsonl {PLAIN} --on-overlong split --split-overlap 16",
}
UNFINISHED = f"batch in.jsonl unfinished.parquet {PLAIN} --pack-tokens 1 --in-flight 1"
DONE_OF_UNFINISHED = 2
CHECK = f"check in.jsonl {PLAIN} --reference-column answer --max-drop 100pt --method marsinfer --set eta=0.9"
UNFINISHED_CHECK = f"{CHECK} --out result.json"
DONE_OF_CHECK = 4  # all three of dense, and one of the method
BASELINE = f"{CHECK} --baseline dense.parquet"
# many settings, of every kind of value; their TOML is settings.toml
MANY = (
    f"batch in.jsonl many.parquet {ASK} {TINY} --quiet --verbose --system 'Answer in one word.' "
    "--task-column task --keep-columns task:string --shard 1/1 --sample 3 --limit 3 --on-overlong split "
    "--split-overlap 16 --attention sdpa --rope-scaling yarn:2 --method sliminfer --set layers=8,16,24 "
    "--set budget=0.75,0.5,0.4 --sparse-attention 0.95 --max-new-tokens 6 --temperature 0.7 --top-p 0.9 "
    "--seed 7 --stop '###' --stop '\n\n' --pack-tokens 2k --in-flight 4 --kv-memory 1GiB --group off "
    "--order completion --save-selection --max-errors 50% --row-timeout 600"
)
CALIBRATE = (
    f"calibrate long.jsonl {TINY} --question-column question --task-column task --max-new-tokens 4 "
    "--max-drop 100pt --minutes 1 --out profile.toml --quiet"
)
INPUT = [
    {
        "id": "harbour",
        "text": "The harbour of Lund was closed for the winter. Boats lay on the shore under green covers, "
        "and the lamp at the pier was lit by nobody.",
        "question": "Where did the boats lie?",
        "answer": "on the shore",
        "task": "place",
    },
    {
        "id": "mill",
        "text": "A mill stood above the village. It ground rye on Mondays and wheat on Fridays; on all other "
        "days its owner mended clocks.",
        "question": "What did the owner mend?",
        "answer": "clocks",
        "task": "thing",
    },
    {
        "id": "orchard",
        "text": "Nine pear trees grew behind the school. In a dry summer the children carried water to them, "
        "two pails each, before the first lesson.",
        "question": "How many trees grew there?",
        "answer": "nine",
        "task": "number",
    },
]
WORDS = ["red", "blue", "green", "old", "new", "fish", "reef", "sea"]


def make_record(folder: Path) -> None:
    """Write all files of the record into a folder that must not be there yet."""
    folder.mkdir()
    with plain_surroundings(), pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        _write_rows("in.jsonl", INPUT)
        for line in BATCH.values():
            call(line)
        _, told = call(MANY)
        Path("settings.toml").write_text(told, encoding="utf-8")
        stop_after(DONE_OF_UNFINISHED, UNFINISHED)
        stop_after(DONE_OF_CHECK, UNFINISHED_CHECK)
        call(BASELINE)
        _calibrate()
        # derived from the parts of its journal, and made anew by every run
        Path(".unfinished.parquet.journal", "index.sqlite").unlink()


def call(line: str, code: int = 0) -> tuple[str, str]:
    """What a command line, without the word `marsinfer`, prints on stdout and on stderr."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        found = run(shlex.split(line))
    assert found == code, f"{line}: exit code {found}: {err.getvalue()}"
    return out.getvalue(), without_warm_up(err.getvalue())


def stop_after(rows: int, line: str) -> None:
    """Run a command line as far as so many rows, then as if Ctrl-C were pressed."""
    from marsinfer_cli.progress import BatchProgress

    def stopped(real: Callable[..., None]) -> Callable[..., None]:
        def progress(self: BatchProgress, tally: Any) -> None:
            real(self, tally)
            if tally.documents >= rows:
                signal.raise_signal(signal.SIGINT)

        return progress

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BatchProgress, "__call__", stopped(BatchProgress.__call__))
        call(line, 130)


def _calibrate() -> None:
    """On documents long enough for pruning to be faster, which no test needs again."""
    draw = random.Random(1)
    rows = [
        {
            "text": " ".join(draw.choice(WORDS) for _ in range(150 + 9 * n)),
            "question": f"how many {n}?",
            "task": INPUT[n % 3]["task"],
        }
        for n in range(10)
    ]
    _write_rows("long.jsonl", rows)
    call(CALIBRATE)
    Path("long.jsonl").unlink()


def _write_rows(path: str, rows: list[dict[str, str]]) -> None:
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
