"""The pruning maps that a report's page holds of its rows, as many as have room."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from pipeline.report.figures import DECIDING
from pipeline.report.output_reading import Run
from pipeline.report.pruning_map import has_selection, map_data, maps_of
from pipeline.report.rows_shown import RunAnswer, ShownRows
from pipeline.setup.guard import DENSE

MOST_BYTES = 1_200_000  # of all maps of a page
MOST_ROWS = 60  # whose maps are looked for
MOST_STATES = 1_500_000  # tokens times layers of one map: larger ones take too long, and too much room


@dataclass(frozen=True, kw_only=True)
class RowMap:
    """The map of one row in one run: its `data`, unless there is no room for it or `pruned` is false."""

    name: str  # in the page
    pruned: bool | None  # None where it was not looked at
    command: str  # that writes a page of it
    data: Mapping[str, Any] | None = None


MapKey = tuple[str, str]  # a run as it was given, and a row's id


def maps_for(rows: ShownRows) -> dict[MapKey, RowMap]:
    """By run and row, of answered rows whose run has stored a selection; the first rows have room first."""
    found = {
        _key(side): RowMap(name=f"map-{place}-{n}", pruned=None, command=_command(side))
        for place, row in enumerate(rows.rows)
        for n, side in enumerate(row.sides)
        if side.failure is None and has_selection(side.run) and not _is_dense(side.run)
    }
    sides = [side for row in rows.rows[:MOST_ROWS] for side in row.sides if _key(side) in found]
    for run in {side.run.given: side.run for side in sides}.values():
        looked_at = {(side.id, side.row) for side in sides if side.run is run}
        lacking = {(run.given, id) for id, _ in looked_at}
        for pruning in maps_of(run, looked_at):
            key = run.given, pruning.facts["id"]
            is_small = len(pruning.layers) * len(pruning.pieces) <= MOST_STATES
            data = map_data(pruning) if pruning.is_pruned and is_small else None
            found[key] = replace(found[key], pruned=pruning.is_pruned, data=data)
            lacking.discard(key)
        for key in lacking:
            del found[key]
    _make_room(found, [key for key in map(_key, sides) if key in found])
    return found


def _make_room(found: dict[MapKey, RowMap], in_order: Iterable[MapKey]) -> None:
    """Leave data out where that of the rows before has filled the page."""
    room = MOST_BYTES
    for key in in_order:
        size = len(json.dumps(found[key].data))
        if size > room:
            found[key] = replace(found[key], data=None)
        else:
            room -= size


def _is_dense(run: Run) -> bool:
    """Whether a run prunes nothing in any row, which needs no map."""
    return bool(run.metadata.get(DECIDING, {}).get("method", {}).get("name") == DENSE)


def _key(side: RunAnswer) -> MapKey:
    return side.run.given, side.id


def _command(side: RunAnswer) -> str:
    return shlex.join(["marsinfer", "report", side.run.given, "--row", side.id, "--html", "map.html"])
