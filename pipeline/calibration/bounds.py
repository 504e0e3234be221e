"""What a setting may lose: one bound on right tokens over all rows, and one on each kind of needles found."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from pipeline.evaluate.check_rows import CheckRow
from pipeline.evaluate.drops import Drop, Judgement, Paired, Verdict, fewest_documents, smallest_bound
from pipeline.evaluate.workbench import CaseScore, has_pruned
from pipeline.settings.calibrate_settings import CalibrateConfig
from pipeline.settings.parse import Bound, parse_drop
from pipeline.suites.samples import NEEDLES, grouped
from pipeline.texts.words import counted


@dataclass(frozen=True, kw_only=True)
class Verified:
    """One gate's drop with its interval, and what that says about its bound."""

    gate: str
    drop: Drop
    judgement: Judgement

    @property
    def verdict(self) -> Verdict:
        return self.judgement.verdict


class Supply(NamedTuple):
    """How many documents a gate has, and how many it takes to pass where none loses anything."""

    gate: str
    bound: Bound
    documents: int
    needed: int | None  # None: no number of documents passes this bound

    @property
    def is_short(self) -> bool:
        """Whether the gate cannot pass, whatever is lost."""
        return self.needed is None or self.documents < self.needed

    def __str__(self) -> str:
        if self.needed is None:
            return f"{self.gate}: no number of documents shows a drop within {self.bound}"
        needed, unit = counted(self.needed, "document"), self.bound.unit
        told = (
            f"{self.gate}: to show a drop within {self.bound} takes at least {needed} held out, and more if "
            f"any of them loses; there are {self.documents:,}"
        )
        if self.is_short and self.documents:
            told += f", which can show one within {smallest_bound(self.documents):.1f}{unit} at best"
        return told


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """The main bound, and that of each kind of needles. A document's score is the mean over its rows."""

    main: Bound
    needles: Bound
    main_name: str  # the score of the rows: token accuracy, or agreement with dense

    @classmethod
    def of(cls, config: CalibrateConfig) -> Bounds:
        """Those that a calibration is given."""
        return cls(
            main=parse_drop(str(config.max_drop)),
            needles=parse_drop(config.needle_drop, "--needle-drop"),
            main_name="token accuracy" if config.has_references else "agreement",
        )

    def bound_of(self, gate: str) -> Bound:
        """A gate's bound, by its name."""
        return self.needles if gate.startswith(NEEDLES) else self.main

    def gate_of(self, task: str) -> str:
        """The gate that rows of a task belong to."""
        return task if task.startswith(NEEDLES) else self.main_name

    def main_drop(self, dense: Sequence[CaseScore], scores: Sequence[CaseScore]) -> float:
        """The drop of the main gate, in its unit; 0 where no row belongs to it."""
        paired = self._paired(dense, scores).get(self.main_name)
        if paired is None:
            return 0.0
        drop = 100 * float(paired.worse_D.mean())
        return drop / (float(paired.dense_D.mean()) or 1.0) if paired.relative else drop

    def verify(
        self, dense: Sequence[CaseScore], scores: Sequence[CaseScore], *, differs: bool = False
    ) -> tuple[Verified, ...]:
        """Every gate with its interval and its verdict.

        A gate of whose rows nothing was pruned does not pass, unless what was run `differs` from dense even
        so, and was to prune nothing.
        """
        own = grouped(scores, lambda score: self.gate_of(score.task))
        return tuple(
            Verified(
                gate=gate,
                drop=paired.drop(),
                judgement=paired.judge(self.bound_of(gate).value).of_pruned(differs or has_pruned(own[gate])),
            )
            for gate, paired in self._paired(dense, scores).items()
        )

    def supplies(self, held_out: Iterable[CheckRow], rows: Iterable[CheckRow]) -> list[Supply]:
        """Of the gate of each of the rows: what those that are held out supply it with."""
        found: dict[str, set[str]] = {self.gate_of(row.task): set() for row in rows}
        for row in held_out:
            found[self.gate_of(row.task)].add(row.sample.document_key)
        return [
            Supply(gate, bound := self.bound_of(gate), len(own), fewest_documents(bound.value))
            for gate, own in found.items()
        ]

    def _paired(self, dense: Sequence[CaseScore], scores: Sequence[CaseScore]) -> dict[str, Paired]:
        parts = grouped(zip(dense, scores, strict=True), lambda pair: self.gate_of(pair[1].task))
        return {
            gate: Paired.of(
                [score_of(base) for base, _ in pairs],
                [score_of(score) for _, score in pairs],
                documents=[score.document_key for _, score in pairs],
                relative=self.bound_of(gate).relative,
            )
            for gate, pairs in parts.items()
        }


def score_of(score: CaseScore) -> float:
    """From 0 to 1: whether a needle is found, or the share of a right answer's tokens that are predicted."""
    return float(score.found) if score.task.startswith(NEEDLES) else score.correct / score.tokens
