"""Answers rows about the same document together: it is prefilled once, and its rows follow in chunks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from pipeline.engines.group_packs import GroupPack, Numbered
from pipeline.model.shared import Beginnings, prefill_beginnings, prefill_behind
from pipeline.pruning.dense import Dense
from pipeline.records import Answer, Answered, EncodedDocument, Row, Spans

if TYPE_CHECKING:
    from pipeline.engines.local import LocalEngine

REHEARSED_TOKENS = 16  # of a question


@dataclass(frozen=True, kw_only=True)
class Shared:
    """What rows have in common with others, and what it took; lists have a value a row."""

    method: str  # by which the rows are answered
    ms: float
    flops: list[int]
    group_rows: list[int]
    pack_tokens: int  # that were prefilled together, behind what is shared


def answer_groups(engine: LocalEngine, pack: GroupPack) -> Iterator[Answered]:
    """Answers of a pack's rows, chunk by chunk.

    Documents that cannot be prefilled together are halved; rows whose document cannot be shared at all, or
    that run out of memory beside it, are answered on their own.
    """
    beginnings = [group.rows[0].input_ids[: group.shared_tokens] for group in pack.groups]
    started = engine.now()
    prefix = engine.attempt(
        lambda check: prefill_beginnings(
            engine.model.adapter,
            engine.model.attention,
            pack.way.method,
            beginnings,
            pack.way.layers,
            check,
        ),
        pack.groups[0].rows[0],
    )
    alone: list[EncodedDocument] = []
    if isinstance(prefix, Beginnings):
        ended = engine.now()
        engine.times.add_shared(started, ended)
        part = _GroupRun(engine, pack, prefix, ended - started, alone)
        for chunk in engine.group_packer.chunks(pack):
            yield from part.answer(chunk)
        del part, prefix  # its keys and values, before other packs need the memory
    elif len(pack.groups) > 1:
        half = len(pack.groups) // 2
        for groups in (pack.groups[:half], pack.groups[half:]):
            yield from answer_groups(engine, GroupPack(groups=groups))
        return
    else:
        alone += pack.groups[0].rows
    for rows in engine.packer.packs(alone):
        yield Answered(rows, engine.answer(rows))


def rehearse_group(engine: LocalEngine, ids: np.ndarray, check: Callable[[], None]) -> None:
    """Prefill two rows about a throw-away document: the second forward pass has kernels of its own."""
    adapter, attention, dense = engine.model.adapter, engine.model.attention, Dense()
    end = len(ids) - min(REHEARSED_TOKENS, len(ids) - 1)
    spans = Spans(document=(0, end), question=(end, len(ids)))
    row = EncodedDocument(source=Row(row=0, id="", place=""), input_ids=ids, spans=spans)
    layers = adapter.shape.layers
    shared = prefill_beginnings(adapter, attention, dense, [ids[:end]], layers, check)
    prefill_behind(adapter, attention, dense, shared, [row, row], [0, 0], 1, check)


class _GroupRun:
    """The rows of one pack, behind documents that have been prefilled."""

    def __init__(
        self,
        engine: LocalEngine,
        pack: GroupPack,
        prefix: Beginnings,
        shared_s: float,
        alone: list[EncodedDocument],
    ) -> None:
        """`alone` takes the rows that are to be answered on their own."""
        self._engine, self._pack, self._prefix, self._alone = engine, pack, prefix, alone
        self._shared_s = shared_s
        self._flops = prefix.flops(engine.model.adapter)

    def answer(self, chunk: Sequence[Numbered]) -> Iterator[Answered]:
        """Answers to a chunk; one that fails is halved until the culprit stands alone."""
        rows = [row for _, row in chunk]
        # a row takes as long as what it shares and what it does not
        answers = self._engine.attempt(partial(self._answer, chunk), rows[0], self._shared_s)
        if isinstance(answers, list):
            yield Answered(rows, answers)
        elif len(chunk) > 1:
            half = len(chunk) // 2
            yield from self.answer(chunk[:half])
            yield from self.answer(chunk[half:])
        elif answers.kind == "out_of_memory":
            self._alone += rows
        else:
            yield Answered(rows, [self._engine.failed(rows[0], answers)])

    def _answer(self, chunk: Sequence[Numbered], check: Callable[[], None]) -> list[Answer]:
        engine, way = self._engine, self._pack.way
        rows, numbers = [row for _, row in chunk], [number for number, _ in chunk]
        started = engine.now()
        prefilled = prefill_behind(
            engine.model.adapter,
            engine.model.attention,
            way.method,
            self._prefix,
            rows,
            numbers,
            engine.rules.max_new_tokens,
            check,
        )
        shared = Shared(
            method=way.method.name,
            ms=self._shared_s * 1e3,
            flops=[self._flops[number] for number in numbers],
            group_rows=[len(self._pack.groups[number].rows) for number in numbers],
            pack_tokens=engine.group_packer.running_tokens(self._pack, chunk),
        )
        return engine.generate(rows, prefilled, started, engine.rules, check, shared)
