"""A job whose runs are disturbed: what each of them must leave as it was, and how the last one must end."""

from __future__ import annotations

import io
import os
import signal
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import (
    AbstractContextManager,
    contextmanager,
    nullcontext,
    redirect_stderr,
    redirect_stdout,
    suppress,
)
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from forked import Forked, Prepare

from faults.job import ALONE, METHOD, SETTINGS
from faults.places import Place, Rows
from marsinfer_cli.app import run
from pipeline.outputs.chunks import Chunk, whole_chunks
from pipeline.outputs.journal import Journal
from pipeline.records import Answer

IN_A_FILE = 4
STOPPED_AFTER = 4  # rows of a run that is to be resumed, which saves one more
STATES = ("fresh", "resumed", "extending")
SAME = ("row", "id", "status", "answer", "new_tokens", "row_hash", "n")


def rows_of(number: int) -> Rows:
    """The rows of an input, the first of which is called `a`."""
    numbers = range(number * IN_A_FILE, (number + 1) * IN_A_FILE)
    # the longer ones, which are answered first, come first
    return [{"id": f"doc-{n}", "text": f"row {n}: " + "red fish " * (20 - n), "n": n} for n in numbers]


INPUTS = {"a": rows_of(0), "b": rows_of(1)}


class Disturbed:
    """Rows in the folder `in` of a place, answered to an output beside it."""

    def __init__(self, place: Place, model: Path, scratch: Path) -> None:
        self.place = place
        self.inputs, self.output = [f"{place.root}/in"], f"{place.root}/{place.output}"
        self.told: list[str] = []
        self._model, self._printed = model, scratch / "printed"
        self._sound: dict[str, float] = {}

    def begin(self, state: str) -> None:
        """Do what is done before a fault strikes: nothing, a part of a run, or a run over one file of two."""
        self.place.write(self.place.input("a"), self.place.pack(INPUTS["a"]))
        if state == "extending":
            self.run(0)
        self.place.write(self.place.input("b"), self.place.pack(INPUTS["b"]))
        if state == "resumed":
            with at_append(STOPPED_AFTER, lambda: os.kill(os.getpid(), signal.SIGTERM)):
                self.run(143)
        self._sound = {}

    def run(
        self,
        code: int,
        *flags: str,
        told: str = "",
        around: AbstractContextManager[None] | None = None,
        prepare: Prepare | None = None,
    ) -> None:
        """Run until it ends with `code` and with `told` in its last line, and check what it left behind.

        `around` is entered while it runs; with `prepare` it is a process of its own (see Forked).
        """
        before, sound = self.place.contents(), self.durable()
        assert self._sound.items() <= sound.items()
        self._sound = sound
        words = self._words(flags or ("--resume",))
        with (
            redirect_stderr(io.StringIO()) as printed,
            redirect_stdout(io.StringIO()),
            around or nullcontext(),
        ):
            found = Forked(words, self._printed, prepare).wait() if prepare else run(words)
        self.told = (self._printed.read_text() if prepare else printed.getvalue()).splitlines()
        assert found == code, self.told
        self._check_told(code, told)
        if code == 2:
            now = self.place.contents()
            lock = f".{self.place.output}.lock"  # that of a dead run goes
            kept = {
                name: data
                for name, data in before.items()
                if not (name.startswith(lock) and data[:1] == b"{")
            }
            assert kept.items() <= now.items()
            assert all(name.startswith(f"{self.place.journal}/") for name in now.keys() - before.keys())
        elif code not in (0, 3):
            for name in (self.place.output, *self.place.published[1:]):
                assert self.read(name) == before.get(name)

    def finish(self, undisturbed: Rows, done: Mapping[str, float], loses: int = 0) -> None:
        """Run to the end, left alone: all rows are there, once, and none that was done is answered again.

        That is none of what could be read before a run, nor, but for `loses` of them, of `done` from before
        all faults.
        """
        self.run(0, "--resume", "--retry-errors")
        rows = self.place.unpack(self.place.output)
        assert [[row[name] for name in SAME] for row in rows] == [
            [row[name] for name in SAME] for row in undisturbed
        ]
        times = {row["id"]: row["ttft_ms"] for row in rows}
        assert self._sound.items() <= times.items()
        assert len(done.items() - times.items()) <= loses
        left = {*self.place.published, *map(self.place.input, INPUTS)}
        if self.read(self.place.dropped) is not None:
            left.add(self.place.dropped)
            assert {row["status"] for row in self.place.unpack(self.place.dropped)} == {"error"}
        assert set(self.place.names()) == left

    def read(self, name: str) -> bytes | None:
        """A file's content; None if there is none."""
        return self.place.read(name) if name in self.place.names() else None

    def put(self, name: str, data: bytes | None) -> None:
        """Give a file this content; None: have none of this name."""
        if data is not None:
            self.place.write(name, data)
        elif name in self.place.names():
            self.place.remove(name)

    def chunks(self) -> list[tuple[str, int, int]]:
        """Those of the journal: the file, and where in it one begins and ends."""
        return [(name, each.offset, each.end) for name in self.place.parts() for each in self._chunks(name)]

    def _chunks(self, part: str) -> list[Chunk]:
        data = self.place.read(part)
        with tempfile.TemporaryFile() as file:
            file.write(data)
            file.flush()
            return list(whole_chunks(file, len(data)))

    def durable(self) -> dict[str, float]:
        """Answered rows that can be read, in the output, the journal or beside them, by id.

        Their time to the first token tells whether one was answered again.
        """
        names = {*self.place.names()}
        rows = [
            row
            for name in (self.place.dropped, self.place.output)
            if name in names
            for row in self._rows(name)
        ]
        for name in self.place.parts():
            rows += [row for each in self._chunks(name) for row in self.place.flat(each.table.to_pylist())]
        return {row["id"]: row["ttft_ms"] for row in rows if row["status"] == "ok"}

    def _rows(self, name: str) -> Rows:
        with suppress(pa.ArrowException, ValueError):
            return self.place.unpack(name)
        return []

    def _words(self, flags: Iterable[str]) -> list[str]:
        method = ["--method", METHOD, *(word for setting in SETTINGS for word in ("--set", setting))]
        asked = [*self.place.asked, "--max-new-tokens", "2", "--quiet", "--json"]
        return [
            "batch",
            "--model",
            str(self._model),
            *method,
            *asked,
            *ALONE,
            *flags,
            *self.inputs,
            self.output,
        ]

    def _check_told(self, code: int, told: str) -> None:
        assert not any("Traceback" in line for line in self.told)
        if code > 0 and code != 3:
            assert self.told[-1].startswith("marsinfer: error: ")
            assert told in self.told[-1]


@contextmanager
def at_append(rows: int, act: Callable[[], object]) -> Iterator[None]:
    """Have a run act once so many rows are saved, before the next ones are."""
    append, saved, acts = Journal.append, 0, [act]

    def appended(self: Journal, answers: Sequence[Answer]) -> None:
        nonlocal saved
        if saved >= rows and acts:
            acts.pop()()
        append(self, answers)
        saved += len(answers)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Journal, "append", appended)
        yield


@contextmanager
def at_publish(act: Callable[[], object]) -> Iterator[None]:
    """Have a run act when all is answered, before the output is written."""
    publish = Journal.publish

    def published(self: Journal, *given: Any) -> bool:
        act()
        return publish(self, *given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Journal, "publish", published)
        yield
