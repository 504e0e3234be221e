"""Merges that something ends: shards and output stay as they were, and the next merge is a whole one.

`make faults` tries every accident with every kind of output, `make test` one with each of two.
"""

from __future__ import annotations

import os
import signal
from itertools import product

import pytest
from forked import Forked

from faults.disturbed import INPUTS
from faults.faults import ALL
from faults.places import Chosen, Folder, Requests
from faults.strikes import die_while_writing
from marsinfer_cli.app import run
from pipeline.outputs.rowindex import RowIndex

pytestmark = pytest.mark.slow

PLACES = {
    "parquet": lambda path: Folder(path, ".parquet"),
    "jsonl": lambda path: Folder(path, ".jsonl"),
    "columns": lambda path: Chosen(path, ".parquet"),
    "requests": Requests,
}
SHARDS = 2


@pytest.fixture
def merged(model_folder, tmp_path):
    """The place of two shards, and the words that merge them."""

    def merged(kind):
        place = PLACES[kind](tmp_path / "place")
        place.write(place.input("a"), place.pack(INPUTS["a"] + INPUTS["b"]))
        shards = [f"{place.root}/{number}of{SHARDS}{place.suffix}" for number in range(1, SHARDS + 1)]
        asked = ["--model", str(model_folder), "--method", "dense", "--max-new-tokens", "2", "--quiet"]
        for number, shard in enumerate(shards, start=1):
            words = ["batch", *asked, *place.asked, "--shard", f"{number}/{SHARDS}"]
            assert run([*words, f"{place.root}/in", shard]) == 0
        return place, ["merge", f"{place.root}/{place.output}", *shards]

    return merged


def killed(place, words, tmp_path):
    return Forked(words, tmp_path / "printed", die_while_writing).wait()


def stopped(place, words, tmp_path):
    enter = RowIndex.enter

    def entered(self, *given, **named):
        enter(self, *given, **named)
        os.kill(os.getpid(), signal.SIGTERM)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RowIndex, "enter", entered)
        return run(words)


def with_storage_away(place, words, tmp_path):
    with place.away():
        return run(words)


ACCIDENTS = {"killed": (killed, -9), "stopped": (stopped, 143), "storage-away": (with_storage_away, 8)}


CELLS = list(product(PLACES, ACCIDENTS)) if ALL else [("requests", "killed"), ("columns", "storage-away")]


@pytest.mark.parametrize(("kind", "accident"), CELLS)
def test_a_merge_that_ends_early(merged, kind, accident, tmp_path, capfd):
    place, words = merged(kind)
    strike, code = ACCIDENTS[accident]
    for again in (False, True):
        before = {name: data for name, data in place.contents().items() if not name.startswith(".")}
        flags = ["--overwrite"] if again else []
        assert strike(place, [*words, *flags], tmp_path) == code, capfd.readouterr().err
        now = place.contents()
        assert before.items() <= now.items()
        assert run([*words, *flags]) == 0, capfd.readouterr().err
        rows = place.unpack(place.output)
        assert [(row["row"], row["id"]) for row in rows] == [(n, f"doc-{n}") for n in range(8)]
        left = {*before, *place.published}
        assert set(place.names()) <= left
