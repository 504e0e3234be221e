"""Runs that are killed at random moments and resumed: every row once, and the answers of a run left alone.

MARSINFER_KILLS=1000 MARSINFER_KILL_ROWS=100 python -m pytest tests/faults/test_kill.py --log-cli-level=info
"""

from __future__ import annotations

import json
import logging
import os
import random
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from forked import Forked
from row_files import read

from faults.job import ALONE, SETTINGS, TOGETHER
from marsinfer_cli.app import run
from pipeline.outputs.chunks import scan_part

pytestmark = pytest.mark.slow

log = logging.getLogger(__name__)

ROWS = int(os.environ.get("MARSINFER_KILL_ROWS", "60"))
KILLS = int(os.environ.get("MARSINFER_KILLS", "20"))  # of all kinds together
# the output, the flags of its run, and the least share of answers that must be those of a run left alone
KINDS = [("out.parquet", ALONE, 1.0), ("out.jsonl", ALONE, 1.0), ("together.parquet", TOGETHER, 0.999)]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    path = tmp_path_factory.mktemp("kill") / "in.jsonl"
    words = random.Random(0)
    with path.open("w") as lines:
        for row in range(ROWS):
            text = " ".join(words.choices(["red", "fish", "blue", "sea"], k=words.randint(20, 120)))
            lines.write(json.dumps({"id": f"doc-{row}", "text": text}) + "\n")
    return path


@dataclass(kw_only=True)
class KilledJob:
    """A job whose runs are killed; once one of them has come to its end, it begins anew."""

    words: list[str]
    output: Path
    expected: list[dict[str, object]]
    least: float
    seconds: float  # of a whole run
    draws: random.Random
    saved: dict[str, float] = field(default_factory=dict)  # ids, and times that tell the answers apart
    ends: int = 0

    @property
    def journal(self) -> Path:
        return self.output.with_name(f".{self.output.name}.journal")

    def kill(self) -> bool:
        """Kill a run that goes on; returns False if it had ended, and all was well."""
        process = Forked(self.words, self.output.with_suffix(".printed"))
        self.wait(process)
        code = process.wait(0)
        process.kill()
        if code is None:
            self.check_saved()
        else:
            assert code == 0, process.printed()
            self.check_end()
        return code is None

    def wait(self, process: Forked) -> None:
        """For any time, or until soon after rows were saved, or until the output is being written."""
        kind = self.draws.choice(["any", "saved", "saved", "writing"])
        before = self.parts_bytes()
        while kind != "any" and process.wait(0.001) is None:
            if kind == "writing" and (self.journal / "output.partial").exists():
                return
            if kind == "saved" and self.parts_bytes() != before:
                break
        process.wait(self.draws.uniform(0, self.seconds / 4 if kind == "saved" else self.seconds))

    def parts_bytes(self) -> int:
        try:
            return sum(part.stat().st_size for part in self.journal.glob("part-*"))
        except FileNotFoundError:  # removed while we looked: the run has ended
            return 0

    def check_saved(self) -> None:
        """What was durable is so still, and no row is there twice."""
        if self.output.exists():
            return
        chunks = (chunk for part in sorted(self.journal.glob("part-*")) for chunk in scan_part(part))
        rows = [(row["id"], row["ttft_ms"]) for chunk in chunks for row in chunk.table.to_pylist()]
        now = dict(rows)
        assert len(now) == len(rows)
        assert self.saved.items() <= now.items()
        self.saved = now

    def check_end(self) -> None:
        """The output is whole, and nothing else is there; then it goes."""
        rows = read(self.output)
        numbers = [(row["id"], row["row"]) for row in rows]
        assert numbers == [(f"doc-{number}", number) for number in range(ROWS)]
        same = sum(a["answer"] == b["answer"] for a, b in zip(rows, self.expected, strict=True))
        assert same >= self.least * ROWS
        assert self.saved.items() <= {row["id"]: row["ttft_ms"] for row in rows}.items()
        assert [path.name for path in self.output.parent.iterdir() if path.name.startswith(".")] == []
        self.output.unlink()
        self.saved, self.ends = {}, self.ends + 1

    def finish(self) -> None:
        """In a process of its own, as a run that is killed."""
        process = Forked(self.words, self.output.with_suffix(".printed"))
        assert process.wait() == 0, process.printed()
        self.check_end()


@pytest.fixture
def make_killed(source, model_folder):
    """A job by the name of its output."""

    def make(name, flags, least):
        method = ["--method", "marsinfer", *(word for setting in SETTINGS for word in ("--set", setting))]
        asked = ["--id-column", "id", "--question", "what?", "--max-new-tokens", "4", "--quiet", "--resume"]
        words = ["batch", "--model", str(model_folder), *method, *asked, *flags, str(source)]
        whole, output = source.with_name(f"whole-{name}"), source.with_name(name)
        began = time.monotonic()
        assert run([*words, str(whole)]) == 0
        return KilledJob(
            words=[*words, str(output)],
            output=output,
            expected=read(whole),
            least=least,
            seconds=time.monotonic() - began,
            draws=random.Random(1),
        )

    return make


@pytest.mark.parametrize("number", range(len(KINDS)), ids=[name for name, *_ in KINDS])
def test_no_row_is_lost_or_answered_twice(make_killed, number):
    job = make_killed(*KINDS[number])
    kills = runs = 0
    while kills < len(range(number, KILLS, len(KINDS))):
        kills += job.kill()
        runs += 1
    job.finish()
    log.info("%d of %d runs were killed; %d times all %d rows came to their end", kills, runs, job.ends, ROWS)
