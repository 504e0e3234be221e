"""Runs over a journal, in a few words, for the tests of it."""

import json
import os
import shutil
from contextlib import contextmanager, suppress
from hashlib import blake2b
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.errors import ConfigError
from pipeline.outputs.answers import output_schema
from pipeline.outputs.journal import Journal
from pipeline.records import Answer, Row

EXTENSIONS = [".parquet", ".arrow", ".arrows", ".jsonl"]
SETTINGS = {"model": "tiny", "method": {"name": "marsinfer", "eta": 0.95}, "stop": ("a", "b")}
NOTHING = pa.schema([])
YEAR = pa.schema([("year", pa.int16())])


def schema_of(passthrough=NOTHING, settings=SETTINGS):
    return output_schema(passthrough, {"marsinfer": json.dumps({"settings_that_decide": settings})})


def start(path, *, resume=True, settings=SETTINGS, passthrough=NOTHING, **flags):
    return Journal(path, schema_of(passthrough, settings), settings, resume=resume, **flags)


def source(row, id=None, passthrough=None):
    return Row(row=row, id=id or f"id {row}", place=f"in row {row}", passthrough=passthrough)


def hash_of(id, text="text"):
    return blake2b(repr((id, text)).encode(), digest_size=16).hexdigest()


def answer(row, id=None, text="text", **values):
    id = id or f"id {row}"
    values.setdefault("answer", f"answer to {id}: {text}")
    return Answer(id=id, row=row, row_hash=hash_of(id, text), **values)


def ask(journal, row, id=None, text="text", passthrough=None):
    id = id or f"id {row}"
    return journal.is_done(source(row, id, passthrough), hash_of(id, text))


def work(journal, rows, *, text="text", pack=3, **values):
    """What a run does: ask for every row, answer those that are not done; returns the ids answered."""
    copied = values.get("passthrough")
    new = [(row, id) for row, id in rows if not ask(journal, row, id, text, copied)]
    for i in range(0, len(new), pack):
        journal.append([answer(row, id, text, **values) for row, id in new[i : i + pack]])
    return [id for _, id in new]


def numbered(count, first=0):
    return [(row, f"id {row}") for row in range(first, first + count)]


def killed(path, rows, **flags):
    """A run that appends and then is gone: nothing is closed or published."""
    journal = start(path, **flags)
    work(journal, rows)
    return journal


def read(path):
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in path.open(encoding="utf-8")]
    if path.suffix == ".parquet":
        return pq.read_table(path).to_pylist()
    opened = pa.ipc.open_stream if path.suffix == ".arrows" else pa.ipc.open_file
    return opened(path.read_bytes()).read_all().to_pylist()


def ids(path):
    return [(row["row"], row["id"]) for row in read(path)]


def refusal(path, error=ConfigError, **flags):
    with pytest.raises(error) as caught:
        start(path, **flags)
    return str(caught.value)


def finish(path, rows, order="input", **flags):
    with start(path, **flags) as journal:
        answered = work(journal, rows)
        journal.publish(order)
    return answered


class Killed(BaseException):
    """Nothing that a dead process would do runs after it."""


CHANGES = [(os, "fsync"), (os, "replace"), (Path, "rename"), (Path, "unlink"), (shutil, "rmtree")]


@contextmanager
def dying_after(moment):
    """Ends what runs in it before its `moment`-th change of the file system; `came` says whether it did."""
    changes, death = count(), SimpleNamespace(came=False)

    def dying(real):
        def change(*args, **kwargs):
            if next(changes) >= moment:
                death.came = True
                raise Killed
            return real(*args, **kwargs)

        return change

    with pytest.MonkeyPatch.context() as patch:
        for owner, name in CHANGES:
            patch.setattr(owner, name, dying(getattr(owner, name)))
        with suppress(Killed):
            yield death
