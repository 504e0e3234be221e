"""The table of faults: what each does, and how the runs must end that it strikes."""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from itertools import product

from forked import Prepare

from faults import strikes
from faults.disturbed import STATES
from faults.strikes import Strike

ALL = os.environ.get("MARSINFER_FAULTS") == "all"  # whether every cell is tried
PLACES = ("parquet", "jsonl", "s3", "columns", "requests")


@dataclass(frozen=True, kw_only=True)
class Fault:
    """What strikes a run, and the one after it too if it lasts; those before and behind are left alone.

    `strike` does it to the place before the run and mends it afterwards, `around` to the process while it
    runs; with `prepare` the run is a process of its own, which that was called in.
    """

    name: str
    strike: Strike = strikes.nothing
    around: Strike = strikes.nothing
    prepare: Prepare | None = None
    flags: tuple[str, ...] = ("--resume",)
    code: int = 0  # of a run that it strikes
    codes: Mapping[str, int] = field(
        default_factory=dict
    )  # in places, or else in states, that have another one
    told: str = ""  # in the last line of a run that ends with another code than 0 and 3
    lasts: bool = True
    loses: int = 0  # rows that were done before, and are answered again
    lacks: Mapping[str, str] = field(default_factory=dict)  # places, states or cells without it, and why

    def cells(self) -> list[tuple[str, str]]:
        """The places and states that have it."""
        cells = product(PLACES, STATES)
        return [cell for cell in cells if not self.lacks.keys() & {*cell, "-".join(cell)}]

    def code_in(self, place: str, state: str) -> int:
        return self.codes.get(place, self.codes.get(state, self.code))


NO_JOURNAL = dict.fromkeys(("fresh", "extending"), "there is no journal yet")
NO_OUTPUT = dict.fromkeys(("fresh", "resumed"), "there is no output yet")
NO_FILES = {"s3": "the scratch folder of an output in storage is new in each run"}
NO_FAILED_ROWS = dict.fromkeys(
    ("parquet", "jsonl", "s3", "columns"), "rows without an answer stand in the output itself"
)
ANSWERED_BEFORE = {"requests-resumed": "one of the rows that lose their text is answered by then"}
NO_LINKS = {"s3": "storage has no links and no folders"}
PARTIALS = ["output.partial", "sidecar.partial", "dropped.partial", "settings.json.partial"]
AGAIN = ("--resume", "--fail-on-error")

FAULTS = [
    # what is asked for
    Fault(name="fewer-rows", flags=("--resume", "--limit", "3")),
    Fault(name="a-share-of-rows", flags=("--resume", "--shard", "2/2")),
    Fault(
        name="other-settings",
        flags=("--resume", "--seed", "9"),
        code=2,
        told="begun with other settings",
        lacks={"fresh": "nothing was begun"},
    ),
    Fault(name="output-among-inputs", strike=strikes.output_among_inputs, code=2),
    Fault(name="input-and-output-swapped", strike=strikes.input_and_output_swapped, code=2),
    Fault(name="foreign-output", strike=strikes.output_replaced, code=2),
    Fault(
        name="foreign-output-overwritten",
        strike=strikes.output_replaced,
        flags=("--overwrite",),
        code=2,
        told="marsinfer",
    ),
    Fault(
        name="foreign-sidecar",
        strike=strikes.sidecar_replaced,
        code=2,
        told="marsinfer did not write it",
        lacks=dict.fromkeys(("parquet", "s3", "columns"), "Parquet needs no file beside it"),
    ),
    Fault(name="foreign-failed-rows", strike=strikes.failed_rows_replaced, code=2, lacks=NO_FAILED_ROWS),
    # the input
    Fault(
        name="input-missing",
        strike=strikes.input_missing,
        codes={"extending": 2},
        told="is missing or empty: a.",
    ),
    Fault(name="input-missing-dropped", strike=strikes.input_missing, flags=("--resume", "--drop-missing")),
    Fault(name="input-empty", strike=strikes.input_empty, codes={"extending": 2}, told="(empty)"),
    Fault(name="input-damaged", strike=strikes.input_damaged, flags=AGAIN, code=3),
    Fault(name="input-cut", strike=strikes.input_cut, flags=AGAIN, code=3),
    Fault(
        name="input-out-of-reach",
        around=strikes.input_out_of_reach,
        code=8,
        told="all other rows were answered",
    ),
    Fault(name="rows-without-text", strike=strikes.texts_missing, flags=AGAIN, code=3, lacks=ANSWERED_BEFORE),
    Fault(
        name="too-many-rows-without-text",
        strike=strikes.texts_missing,
        flags=(*AGAIN, "--max-errors", "2"),
        code=4,
        told="more than --max-errors 2 allows",
        lacks=ANSWERED_BEFORE,
    ),
    # what a crash, a disk or somebody else left
    Fault(name="chunk-damaged", strike=strikes.chunk_damaged, lasts=False, loses=1, lacks=NO_JOURNAL),
    Fault(name="chunk-torn", strike=strikes.chunk_torn, lasts=False, loses=1, lacks=NO_JOURNAL),
    Fault(
        name="settings-gone",
        strike=partial(strikes.journal_file, names=["settings.json"], content=None),
        lasts=False,
        lacks=NO_JOURNAL,
    ),
    Fault(
        name="settings-of-garbage",
        strike=partial(strikes.journal_file, names=["settings.json"], content=b'{"se'),
        lasts=False,
        lacks=NO_JOURNAL,
    ),
    Fault(
        name="index-of-garbage",
        strike=partial(strikes.journal_file, names=["index.sqlite"], content=bytes(99)),
        lasts=False,
        lacks={**NO_JOURNAL, **NO_FILES},
    ),
    Fault(
        name="partials-left",
        strike=partial(strikes.journal_file, names=PARTIALS, content=b"half of"),
        lasts=False,
        lacks={**NO_JOURNAL, **NO_FILES},
    ),
    Fault(name="output-cut", strike=strikes.output_cut, code=2, lacks=NO_OUTPUT),
    Fault(
        name="failed-rows-gone",
        strike=strikes.failed_rows_gone,
        lasts=False,
        lacks={**NO_FAILED_ROWS, **NO_OUTPUT},
    ),
    Fault(name="dropped-rows-of-garbage", strike=strikes.dropped_rows_of_garbage),
    Fault(name="lock-torn", strike=strikes.lock_torn, lasts=False),
    Fault(name="locked", strike=strikes.locked, code=7, told="is being written by"),
    Fault(
        name="lock-foreign",
        strike=strikes.lock_foreign,
        code=2,
        told="is in the way",
        lacks={"s3": "an object that no run wrote is the lock of a dead one"},
    ),
    Fault(
        name="lock-linked",
        strike=strikes.lock_linked,
        code=2,
        told="is in the way, and it is a link",
        lacks=NO_LINKS,
    ),
    Fault(
        name="journal-linked",
        strike=strikes.journal_linked,
        code=2,
        told="is in the way, and it is a link",
        lacks=NO_LINKS,
    ),
    Fault(
        name="journal-foreign", strike=strikes.journal_foreign, code=2, told="is in the way", lacks=NO_LINKS
    ),
    Fault(
        name="journal-with-another-s-file",
        strike=strikes.journal_with_another_s_file,
        code=2,
        told="is in the way",
    ),
    # the process, and storage
    Fault(
        name="sigint",
        around=partial(strikes.signalled, number=signal.SIGINT),
        code=130,
        told="stopped by SIGINT",
        lasts=False,
    ),
    Fault(
        name="sigterm",
        around=partial(strikes.signalled, number=signal.SIGTERM),
        code=143,
        told="stopped by SIGTERM",
        lasts=False,
    ),
    Fault(
        name="sighup",
        around=partial(strikes.signalled, number=signal.SIGHUP),
        code=129,
        told="stopped by SIGHUP",
        lasts=False,
    ),
    Fault(name="killed", prepare=strikes.die_after_a_row, code=-9, lasts=False),
    Fault(name="killed-while-writing", prepare=strikes.die_while_writing, code=-9),
    Fault(name="stderr-closed", around=strikes.stderr_closed),
    Fault(name="out-of-memory", around=partial(strikes.accident, kind="out_of_memory"), lasts=False),
    Fault(
        name="error-of-a-pack", around=partial(strikes.accident, kind="runtime_error"), flags=AGAIN, code=3
    ),
    Fault(name="storage-away", around=strikes.away_at_first, code=8),
    Fault(name="storage-away-after-a-row", around=strikes.away_after_a_row, code=8, lasts=False),
    Fault(name="storage-away-when-publishing", around=strikes.away_when_publishing, code=8),
]

STORAGE = ("storage-away", "storage-away-after-a-row", "storage-away-when-publishing")
# the names of two, of which the second strikes what the first has left; a process that is killed follows none
# that lives on, whose lock it would respect
IN_A_ROW = [
    *product(("killed", "sigterm"), (*STORAGE, "input-cut", "killed")),
    *product(("storage-away-after-a-row",), (*STORAGE, "input-cut")),
    *product(
        ("killed-while-writing",), ("storage-away", "storage-away-when-publishing", "input-cut", "locked")
    ),
]
