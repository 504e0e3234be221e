"""What faults do: to a place before a run, and what mends it afterwards, or to the process while it runs."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, redirect_stderr
from functools import partial
from pathlib import Path

import pytest
from forked import Say

from faults.disturbed import INPUTS, Disturbed, at_append, at_publish
from pipeline.outputs.lock import lock_output

Strike = Callable[[Disturbed], AbstractContextManager[None]]
FOR_EVER = ExitStack()  # what is done to a process that will not be mended


def nothing(job: Disturbed) -> AbstractContextManager[None]:
    return nullcontext()


@contextmanager
def replaced(job: Disturbed, name: str, data: bytes | None) -> Iterator[None]:
    """Another content for a file, or none."""
    before = job.read(name)
    job.put(name, data)
    yield
    job.put(name, before)


@contextmanager
def in_place_of(job: Disturbed, name: str) -> Iterator[Path]:
    """The path of something that is moved away meanwhile, for what stands there in its place."""
    path = Path(job.place.root, name)
    aside = path.with_name(f"aside{name}")
    if path.exists():
        path.rename(aside)
    yield path
    path.unlink()
    if aside.exists():
        aside.rename(path)


@contextmanager
def named(job: Disturbed, inputs: list[str], output: str) -> Iterator[None]:
    """Other words on the command line."""
    before = job.inputs, job.output
    job.inputs, job.output = inputs, output
    yield
    job.inputs, job.output = before


def output_among_inputs(job: Disturbed) -> AbstractContextManager[None]:
    return named(job, [*job.inputs, job.output], job.output)


def input_and_output_swapped(job: Disturbed) -> AbstractContextManager[None]:
    return named(job, [job.output], f"{job.place.root}/{job.place.input('a')}")


def output_replaced(job: Disturbed) -> AbstractContextManager[None]:
    return replaced(job, job.place.output, b"precious")


def failed_rows_replaced(job: Disturbed) -> AbstractContextManager[None]:
    return replaced(job, job.place.published[-1], b"precious")


@contextmanager
def failed_rows_gone(job: Disturbed) -> Iterator[None]:
    """Whoever has seen to them has deleted their file, which nobody mends."""
    assert job.read(job.place.published[-1])
    job.put(job.place.published[-1], None)
    yield


def sidecar_replaced(job: Disturbed) -> AbstractContextManager[None]:
    return replaced(job, f"{job.place.output}.run.json", b"precious")


def input_missing(job: Disturbed) -> AbstractContextManager[None]:
    return replaced(job, job.place.input("a"), None)


def input_empty(job: Disturbed) -> AbstractContextManager[None]:
    return replaced(job, job.place.input("a"), job.place.pack([]))


def input_damaged(job: Disturbed) -> AbstractContextManager[None]:
    name = job.place.input("a")
    return replaced(job, name, job.place.damaged(job.place.read(name)))


def input_cut(job: Disturbed) -> AbstractContextManager[None]:
    data = job.place.read(job.place.input("a"))
    return replaced(job, job.place.input("a"), data[: len(data) * 6 // 10])


def texts_missing(job: Disturbed) -> AbstractContextManager[None]:
    first, *others = INPUTS["b"]
    return replaced(
        job, job.place.input("b"), job.place.pack([first, *({**row, "text": None} for row in others)])
    )


def input_out_of_reach(job: Disturbed) -> AbstractContextManager[None]:
    return job.place.unreadable(job.place.input("a"))


@contextmanager
def chunk_damaged(job: Disturbed) -> Iterator[None]:
    name, start, end = job.chunks()[2]
    data = bytearray(job.place.read(name))
    data[(start + end) // 2] ^= 0xFF
    job.place.write(name, bytes(data))
    yield


@contextmanager
def chunk_torn(job: Disturbed) -> Iterator[None]:
    name, start, end = job.chunks()[-1]
    job.place.write(name, job.place.read(name)[: (start + end) // 2])
    yield


@contextmanager
def journal_file(job: Disturbed, names: list[str], content: bytes | None) -> Iterator[None]:
    """Files of the journal have another content, or are gone, which nobody mends."""
    for name in names:
        job.put(f"{job.place.journal}/{name}", content)
    yield


def output_cut(job: Disturbed) -> AbstractContextManager[None]:
    data = job.place.read(job.place.output)
    return replaced(job, job.place.output, data[: len(data) // 2])


@contextmanager
def dropped_rows_of_garbage(job: Disturbed) -> Iterator[None]:
    with replaced(job, job.place.dropped, b"garbage"):
        yield
        assert job.place.read(job.place.dropped) == b"garbage"


@contextmanager
def lock_torn(job: Disturbed) -> Iterator[None]:
    job.place.write(job.place.lock, b'{"pid": 1')
    yield


@contextmanager
def locked(job: Disturbed) -> Iterator[None]:
    with lock_output(job.output):
        yield


def lock_foreign(job: Disturbed) -> AbstractContextManager[None]:
    return replaced(job, job.place.lock, b"precious")


@contextmanager
def lock_linked(job: Disturbed) -> Iterator[None]:
    with in_place_of(job, job.place.lock) as path:
        path.symlink_to(Path(job.place.root, job.place.input("a")))
        yield


@contextmanager
def journal_linked(job: Disturbed) -> Iterator[None]:
    with in_place_of(job, job.place.journal) as path:
        path.symlink_to(Path(job.place.root, "in"))
        yield


@contextmanager
def journal_foreign(job: Disturbed) -> Iterator[None]:
    with in_place_of(job, job.place.journal) as path:
        path.write_bytes(b"precious")
        yield


def journal_with_another_s_file(job: Disturbed) -> AbstractContextManager[None]:
    return replaced(job, f"{job.place.journal}/notes.txt", b"precious")


@contextmanager
def signalled(job: Disturbed, number: signal.Signals) -> Iterator[None]:
    """The signal comes, to a process that does not ignore it, as tests may that run under nohup."""
    before = signal.signal(number, signal.default_int_handler)
    with at_append(1, partial(os.kill, os.getpid(), number)):
        yield
    signal.signal(number, before)


def die_after_a_row(say: Say) -> None:
    """Kill the process once a row is saved."""
    FOR_EVER.enter_context(at_append(1, partial(os.kill, os.getpid(), signal.SIGKILL)))


def die_while_writing(say: Say) -> None:
    """Kill the process once the first rows of its output are written."""
    from pipeline.outputs.writing import AnswerWriter

    write = AnswerWriter.write_table

    def written(self, table):
        write(self, table)
        os.kill(os.getpid(), signal.SIGKILL)

    AnswerWriter.write_table = written


@contextmanager
def stderr_closed(job: Disturbed) -> Iterator[None]:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as broken, redirect_stderr(broken):
        yield


@contextmanager
def accident(job: Disturbed, kind: str) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCIDENT", json.dumps({"kind": kind, "pack": 2}))
        yield


def away_at_first(job: Disturbed) -> AbstractContextManager[None]:
    return job.place.away()


@contextmanager
def away_after_a_row(job: Disturbed) -> Iterator[None]:
    with ExitStack() as until_the_end, at_append(1, lambda: until_the_end.enter_context(job.place.away())):
        yield


@contextmanager
def away_when_publishing(job: Disturbed) -> Iterator[None]:
    with ExitStack() as until_the_end, at_publish(lambda: until_the_end.enter_context(job.place.away())):
        yield
