"""One row's pruning as a page: its text, each token shaded by what the layers did with it."""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, groupby, pairwise
from operator import itemgetter
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.errors import ConfigError
from pipeline.outputs.answers import lacking_told
from pipeline.outputs.own_columns import SELECTION_NAMES
from pipeline.pruning.registry import METHODS, make_method
from pipeline.pruning.tiers import GONE, IN_FP8, IN_FULL, SKIPPED, LayerStates, unpack_layers
from pipeline.records import Spans
from pipeline.report.figures import DECIDING, about_run, milliseconds
from pipeline.report.output_reading import Run
from pipeline.report.page import render
from pipeline.texts.words import percent_of

MOST_BYTES = 2_900_000  # of the page
UNPRUNED = "Nothing was pruned here: up to the last layer, every layer computed every token."
FACTS = ("id", "row", "status", "error_type", "error_message", "method", "answer", "document_tokens")
KEYS = ("id", "row")
MOST_DIGITS = 18  # that an int64 holds, whichever they are
COLUMNS = (*FACTS, "prompt_tokens", "ttft_ms", "kept_ratio", "ffn_ratio", "ffn_fp8_tokens", *SELECTION_NAMES)


@dataclass(frozen=True, kw_only=True)
class PruningMap:
    """What one row's prefill did; `layers` in the order in which they ran."""

    facts: dict[str, Any]
    pieces: list[str] = field(repr=False)  # of each token
    layers: list[LayerStates] = field(repr=False)
    document: tuple[int, int]
    question: tuple[int, int]
    always_kept: list[tuple[int, int]]  # token ranges that the row's method keeps whatever they say

    @property
    def is_pruned(self) -> bool:
        """Whether any layer but the last, of which nothing reads more than the last token, left any out."""
        return any(not (layer.states >= IN_FP8).all() for layer in self.layers[:-1])

    @property
    def question_text(self) -> str:
        return "".join(self.pieces[slice(*self.question)])

    def names(self) -> list[str]:
        """Of each layer; of one that ran in two passes, with the pass."""
        twice = any(layer.number for layer in self.layers)
        return [f"pass {x.number + 1}, layer {x.layer}" if twice else f"layer {x.layer}" for x in self.layers]

    def counts(self) -> list[tuple[int, ...]]:
        """Of each layer, tokens with the FFN in full, in fp8, skipped, and that had left before."""
        return [
            tuple(int((layer.states == state).sum()) for state in (IN_FULL, IN_FP8, SKIPPED, GONE))
            for layer in self.layers
        ]


def has_selection(run: Run) -> bool:
    """Whether rows of a run may have a map."""
    return "selection" in run.columns


def find_row(run: Run, wanted: str) -> PruningMap:
    """The row of this id or, if none has it, of this number. ConfigError where its selection is not known."""
    if not has_selection(run):
        raise ConfigError(f"{run.given} holds no selection of tokens: run batch with --save-selection")
    lacks = lacking_told(run.columns, COLUMNS)
    if lacks is not None:
        raise ConfigError(f"{run.given}: {lacks}, which --row shows")
    facts = _find(run, "id", wanted)
    if facts is None and wanted.isdecimal() and len(wanted) <= MOST_DIGITS:
        facts = _find(run, "row", int(wanted))
    if facts is None:
        raise ConfigError(f"{run.given} has no row of the id {wanted!r}, nor of that number")
    if facts["selection"] is None or facts["prompt_text"] is None:
        why = (
            f"{facts['error_type']}: {facts['error_message']}" if facts["error_type"] else "it was not stored"
        )
        raise ConfigError(f"{run.given} has no selection of tokens for row {facts['row']}: {why}")
    return _map_of(run, facts)


def maps_of(run: Run, wanted: Collection[tuple[str, int]]) -> Iterator[PruningMap]:
    """The maps of rows, by id and number, in the output's order; of those whose selection can be read."""
    keys = (zip(*(column.to_pylist() for column in table.columns), strict=True) for table in run.tables(KEYS))
    tables = {number for number, rows in enumerate(keys) if not set(rows).isdisjoint(wanted)}
    for table in run.tables(COLUMNS, tables):
        rows = zip(*(table[name].to_pylist() for name in KEYS), strict=True)
        for place in [n for n, key in enumerate(rows) if key in wanted]:
            (facts,) = table.slice(place, 1).to_pylist()
            if facts["selection"] is None or facts["prompt_text"] is None:
                continue
            try:
                found = _map_of(run, facts)
            except ConfigError:  # which `find_row` raises for who asks for that row
                continue
            yield found


def _find(run: Run, column: str, value: str | int) -> dict[str, Any] | None:
    """The first row with that value, of those that did not fail if one did not.

    Its other columns are read only from the table that has it.
    """
    found = None
    for number, table in enumerate(run.tables([column, "error_type"])):
        alike = pc.equal(table[column], pa.scalar(value, table[column].type))
        well = pc.index(pc.and_(alike, pc.is_null(table["error_type"])), True).as_py()
        if well >= 0:
            found = number, well
            break
        place = pc.index(alike, True).as_py()
        if found is None and place >= 0:
            found = number, place
    if found is None:
        return None
    number, place = found
    (whole,) = run.tables(COLUMNS, {number})
    return whole.slice(place, 1).to_pylist()[0]


def _map_of(run: Run, facts: dict[str, Any]) -> PruningMap:
    text, lengths = facts["prompt_text"], facts["prompt_token_chars"]
    pieces = [text[start:stop] for start, stop in pairwise(accumulate(lengths, initial=0))]
    try:
        layers = unpack_layers(facts["selection"], len(pieces))
    except ValueError as error:
        raise ConfigError(f"{run.given}, row {facts['row']}: {error}") from error
    first, last, asked, end = facts["prompt_spans"]
    spans = Spans(document=(first, last), question=(asked, end))
    return PruningMap(
        facts=facts,
        pieces=pieces,
        layers=layers,
        document=spans.document,
        question=spans.question,
        always_kept=_always_kept(run, facts["method"], len(pieces), spans),
    )


def _always_kept(run: Run, method: str | None, tokens: int, spans: Spans) -> list[tuple[int, int]]:
    """What the run's method, with its settings, keeps of such a prompt; nothing where that is not known.

    A method of the user's own is not loaded: a report runs no code that an output names.
    """
    told = run.metadata.get(DECIDING, {}).get("method", {})
    if method not in METHODS or told.get("name") != method:
        return []
    settings = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in (told.get("settings") or {}).items()
    }
    try:
        ranges = make_method(method, settings).protected(tokens, spans)
    except (ConfigError, TypeError):  # settings of another version
        return []
    inside = [(max(0, start), min(tokens, stop)) for start, stop in ranges]
    return [(start, stop) for start, stop in inside if start < stop]


def map_page(run: Run, pruning: PruningMap) -> str:
    """The page, of `MOST_BYTES` at most: a prompt that is too long is shown as far as it fits."""
    shown = len(pruning.pieces)
    while True:
        page = _page(run, pruning, shown)
        if (size := len(page.encode())) <= MOST_BYTES:
            return page
        shown = int(shown * MOST_BYTES / size * 0.95)


def _page(run: Run, pruning: PruningMap, shown: int) -> str:
    return render(
        "map.html.j2",
        scripts=("map.js",),
        run=run,
        facts=pruning.facts,
        figures=list(_figures(pruning)),
        about_run=about_run(run.metadata),
        question=pruning.question_text.strip(),
        map=map_data(pruning, shown),
        unpruned=UNPRUNED,
    )


def map_data(pruning: PruningMap, shown: int | None = None) -> dict[str, Any]:
    """What the script of a page draws a map from, of all tokens or the first `shown`."""
    pieces = pruning.pieces[:shown]
    states = np.stack([layer.states[:shown] for layer in pruning.layers])
    return {
        "tokens": len(pieces),
        "total": len(pruning.pieces),
        "names": pruning.names(),
        "counts": pruning.counts(),
        "document": pruning.document,
        "question": pruning.question,
        "always": pruning.always_kept,
        "pruned": pruning.is_pruned,
        "fp8": bool((states == IN_FP8).any()),
        "pieces": _packed(json.dumps(pieces).encode()),
        "states": _packed(_two_bits(states)),
    }


def _figures(pruning: PruningMap) -> list[tuple[str, str]]:
    facts = pruning.facts
    return [
        ("method", str(facts["method"])),
        ("document tokens", f"{facts['document_tokens']:,}"),
        ("prompt tokens", f"{facts['prompt_tokens']:,}"),
        ("TTFT", milliseconds(facts["ttft_ms"])),
        ("tokens kept", percent_of(facts["kept_ratio"])),
        ("FFN passed", percent_of(facts["ffn_ratio"])),
    ]


def _two_bits(states_LT: np.ndarray) -> bytes:
    """Four tokens a byte, the first in the lowest bits, each layer padded to whole bytes."""
    bits_LT2 = np.stack([states_LT & 1, states_LT >> 1], axis=-1)
    return np.packbits(bits_LT2.reshape(len(states_LT), -1), axis=1, bitorder="little").tobytes()


def _packed(content: bytes) -> str:
    return base64.b64encode(zlib.compress(content, 9)).decode()


def layer_rows(pruning: PruningMap) -> Sequence[tuple[str, ...]]:
    """For a terminal: of each run of equal layers, what became of the tokens."""
    rows: list[tuple[str, ...]] = []
    for counts, equal in groupby(zip(pruning.names(), pruning.counts(), strict=True), key=itemgetter(1)):
        first, *others = (name for name, _ in equal)
        last = f" to {others[-1].rpartition(' ')[2]}" if others else ""
        rows.append((first + last, *(f"{count:,}" for count in counts)))
    return rows
