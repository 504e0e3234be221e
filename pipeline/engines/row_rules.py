"""Where the answers of rows end, and what they are drawn by: as the run has it, but for what a row says."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import Any

from pipeline.model.decode import StopRules
from pipeline.model.sampling import RowDraws, Sampling
from pipeline.model.stopping import StopTexts
from pipeline.records import Row

MOST_STOPS = 64  # different lists of stop texts that are held


@dataclass(frozen=True, kw_only=True, eq=False)
class RowRules:
    """The run's rules and sampling, and those of its rows; `tokenizer` is the model's."""

    rules: StopRules
    sampling: Sampling
    tokenizer: Any
    n: int = 1  # answers to a prompt
    _texts: dict[tuple[str, ...], StopTexts] = field(default_factory=dict)

    def new_tokens(self, row: Row) -> int:
        """How many tokens a row's answer may have."""
        own = row.params.max_new_tokens
        return self.rules.max_new_tokens if own is None else own

    def of(self, row: Row) -> StopRules:
        """Where a row's answer ends."""
        own = row.params
        if own.max_new_tokens is None and own.stop is None:
            return self.rules
        texts = self.rules.texts if own.stop is None else self._stops(own.stop)
        return replace(self.rules, max_new_tokens=self.new_tokens(row), texts=texts)

    def draws(self, row: Row) -> list[RowDraws | None]:
        """What the tokens of each of a row's answers are chosen by; None: by the largest logits alone.

        Under a seed of its own a row draws the same wherever it stands in the input.
        """
        own = row.params
        given = {each.name: getattr(own, each.name) for each in fields(Sampling)}
        sampling = replace(self.sampling, **{name: each for name, each in given.items() if each is not None})
        number = row.draw_number if own.seed is None else 0
        return [sampling.draws(number, self.new_tokens(row), answer) for answer in range(self.n)]

    def _stops(self, texts: tuple[str, ...]) -> StopTexts | None:
        if not texts:
            return None
        if texts not in self._texts:
            if len(self._texts) >= MOST_STOPS:
                self._texts.clear()
            self._texts[texts] = StopTexts(texts=texts, tokenizer=self.tokenizer)
        return self._texts[texts]
