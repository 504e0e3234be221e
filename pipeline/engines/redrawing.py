"""Answers held against a JSON schema, and those that are not valid drawn again."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace

from pipeline.engines.blocks import Key, key_of, with_prompts
from pipeline.records import Answer, EncodedDocument, Row, RowError, SamplingParams
from pipeline.settings.answer_settings import COLDEST, SamplingSettings
from pipeline.setup.intake import Item
from pipeline.setup.validity import Validity

RETRY_TEMPERATURE = 0.7  # of a row that was greedy at first: greedy again, its answer would be the same


class Redrawing:
    """The rows of a run whose answers are held against a schema.

    A row whose answer is not valid runs again, whole, while it has tries left.
    """

    def __init__(self, validity: Validity | None, sampling: SamplingSettings) -> None:
        """Without `validity` every answer is a row's last."""
        self._validity, self._sampling = validity, sampling
        self._items: dict[Key, Item] = {}  # that have no last answer yet
        self._tries: dict[Key, int] = {}
        self._again: list[Item] = []

    def expect(self, items: Sequence[Item]) -> None:
        """Learn which rows a window has."""
        if self._validity is not None:
            self._items |= {key_of(item.source): item for item in items if not isinstance(item, RowError)}

    def take(self, answer: Answer | None) -> Answer | None:
        """The answer, with what its schema says of it, if it is the row's last."""
        if self._validity is None or answer is None:
            return answer
        key = key_of(answer)
        item, tries = self._items[key], self._tries.pop(key, 0) + 1
        if answer.status == "ok":
            answer.valid = self._validity.of(item.source, answer.answer)
            answer.tries = None if answer.valid is None else tries
            if answer.valid is False and tries <= self._validity.retries:
                self._tries[key] = tries
                self._again.append(self._drawn_again(item, tries))
                return None
        del self._items[key]
        return answer

    def items(self) -> list[Item]:
        """What is to be answered again, each item given once."""
        items, self._again = self._again, []
        return items

    def _drawn_again(self, item: Item, tries: int) -> Item:
        """The row, to be drawn otherwise than in so many tries before."""
        params = self._params(item.source, tries)

        def changed(prompt: EncodedDocument) -> EncodedDocument:
            return replace(prompt, source=replace(prompt.source, params=params))

        return replace(with_prompts(item, changed), source=replace(item.source, params=params))

    def _params(self, row: Row, tries: int) -> SamplingParams:
        """The row's own, with a seed that is another one for each row and try."""
        own, run = row.params, self._sampling
        temperature = run.temperature if own.temperature is None else own.temperature
        seed = run.seed if own.seed is None else own.seed
        number = row.draw_number if own.seed is None else 0
        digest = hashlib.blake2b(f"{seed}:{number}:{tries}".encode(), digest_size=7).digest()
        if temperature < COLDEST:
            temperature = RETRY_TEMPERATURE
        return replace(own, temperature=temperature, seed=int.from_bytes(digest))
