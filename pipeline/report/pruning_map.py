"""One row's pruning as a page: its text, each token shaded by what the layers did with it."""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Sequence
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
from pipeline.pruning.tiers import GONE, IN_FP8, IN_FULL, SKIPPED, LayerStates, unpack_layers
from pipeline.report.figures import milliseconds
from pipeline.report.output_reading import Run
from pipeline.report.page import render
from pipeline.texts.words import percent_of

MOST_BYTES = 2_900_000  # of the page
FACTS = ("id", "row", "status", "error_type", "error_message", "method", "answer", "document_tokens")
COLUMNS = (*FACTS, "prompt_tokens", "ttft_ms", "kept_ratio", "ffn_ratio", "ffn_fp8_tokens", *SELECTION_NAMES)


@dataclass(frozen=True, kw_only=True)
class PruningMap:
    """What one row's prefill did; `layers` in the order in which they ran."""

    facts: dict[str, Any]
    pieces: list[str] = field(repr=False)  # of each token
    layers: list[LayerStates] = field(repr=False)
    document: tuple[int, int]
    question: tuple[int, int]

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


def find_row(run: Run, wanted: str) -> PruningMap:
    """The row of this id or, if none has it, of this number. ConfigError where its selection is not known."""
    if "selection" not in run.columns:
        raise ConfigError(f"{run.given} holds no selection of tokens: run batch with --save-selection")
    lacks = lacking_told(run.columns, COLUMNS)
    if lacks is not None:
        raise ConfigError(f"{run.given}: {lacks}, which --row shows")
    facts = _find(run, "id", wanted)
    if facts is None and wanted.isdecimal():
        facts = _find(run, "row", int(wanted))
    if facts is None:
        raise ConfigError(f"{run.given} has no row of the id {wanted!r}, nor of that number")
    if facts["selection"] is None or facts["prompt_text"] is None:
        why = (
            f"{facts['error_type']}: {facts['error_message']}" if facts["error_type"] else "it was not stored"
        )
        raise ConfigError(f"{run.given} has no selection of tokens for row {facts['row']}: {why}")
    return _map_of(run, facts)


def _find(run: Run, column: str, value: str | int) -> dict[str, Any] | None:
    """The first row with that value; its other columns are read only from the table that has it."""
    for number, table in enumerate(run.tables([column])):
        place = pc.index(table[column], pa.scalar(value, table[column].type)).as_py()
        if place >= 0:
            whole = next(table for n, table in enumerate(run.tables(COLUMNS)) if n == number)
            return whole.slice(place, 1).to_pylist()[0]
    return None


def _map_of(run: Run, facts: dict[str, Any]) -> PruningMap:
    text, lengths = facts["prompt_text"], facts["prompt_token_chars"]
    pieces = [text[start:stop] for start, stop in pairwise(accumulate(lengths, initial=0))]
    try:
        layers = unpack_layers(facts["selection"], len(pieces))
    except ValueError as error:
        raise ConfigError(f"{run.given}, row {facts['row']}: {error}") from error
    spans = facts["prompt_spans"]
    return PruningMap(
        facts=facts, pieces=pieces, layers=layers, document=tuple(spans[:2]), question=tuple(spans[2:])
    )


def map_page(run: Run, pruning: PruningMap) -> str:
    """The page, of `MOST_BYTES` at most: a prompt that is too long is shown as far as it fits."""
    shown = len(pruning.pieces)
    while True:
        page = _page(run, pruning, shown)
        if (size := len(page.encode())) <= MOST_BYTES:
            return page
        shown = int(shown * MOST_BYTES / size * 0.95)


def _page(run: Run, pruning: PruningMap, shown: int) -> str:
    states = np.stack([layer.states[:shown] for layer in pruning.layers])
    spans = {"document": pruning.document, "question": pruning.question}
    about = {"tokens": shown, "names": pruning.names(), "counts": pruning.counts(), **spans}
    return render(
        "map.html.j2",
        script="map.js",
        run=run,
        facts=pruning.facts,
        figures=list(_figures(pruning)),
        question=pruning.question_text.strip(),
        shown=shown,
        total=len(pruning.pieces),
        last=len(pruning.layers),
        about=about,
        pieces=_packed(json.dumps(pruning.pieces[:shown]).encode()),
        states=_packed(_two_bits(states)),
        has_fp8=bool((states == IN_FP8).any()),
        has_left=bool((states == GONE).any()),
    )


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
