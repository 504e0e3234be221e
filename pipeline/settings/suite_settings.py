"""Questions with right answers: the user's own, and suites of them."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.errors import ConfigError, did_you_mean
from pipeline.settings.kinds import COUNTS, WORDS
from pipeline.settings.option import READING, SUITES, Settings, option
from pipeline.settings.parse import NEEDLES, SuiteName, parse_shard, parse_suite

NEEDLE_KINDS = ("single", "multi-key", "multi-value", "multi-query", "tracking", "common-words")


def check_needle_kind(kind: str, flag: str = "--needle-kinds") -> None:
    """Raise `ConfigError` for a kind that there is not."""
    if kind not in NEEDLE_KINDS:
        raise ConfigError(
            f"unknown kind of needles {kind!r}{did_you_mean(kind, NEEDLE_KINDS)}; "
            f"known are {', '.join(NEEDLE_KINDS)}"
        )


@dataclass(frozen=True, kw_only=True)
class SuiteSettings(Settings):
    """What is held against right answers, or else against dense's own."""

    reference_column: str | None = option(
        None,
        help="Column of the right answer, or of a list of them.",
        shown_default="dense's answers count as right",
        panel=READING,
    )
    limit_per_task: int | None = option(
        None,
        metavar="N",
        help="N rows of each task, of as many documents as can be.",
        shown_default="all rows",
        least=1,
        panel=READING,
    )
    document_shard: str | None = option(
        None,
        metavar="I/N",
        help="Of N parts of the documents, by the hash of their text, the I-th alone: to search on one, "
        "and measure on another.",
        shown_default="all documents",
        check=parse_shard,
        panel=READING,
    )
    suite: tuple[str, ...] = option(
        (),
        metavar="NAME[:DIR]",
        help="leval:DIR, longbench:DIR, or needles, hidden in INPUT's documents, without INPUT in the "
        "suites'; repeatable.",
        shown_default="none",
        panel=SUITES,
    )
    tasks: tuple[str, ...] = option(
        (),
        metavar="T[,T...]",
        help="Tasks to take.",
        shown_default="all",
        kind=WORDS,
        panel=SUITES,
    )
    needle_kinds: tuple[str, ...] = option(
        NEEDLE_KINDS,
        metavar="K[,K...]",
        help=f"Of {', '.join(NEEDLE_KINDS)}.",
        shown_default="all",
        kind=WORDS,
        check=check_needle_kind,
        panel=SUITES,
    )
    needle_lengths: tuple[int, ...] | None = option(
        None,
        metavar="N[,N...]",
        help="Prompt lengths in tokens.",
        shown_default="of 8k,16k,30k those that the context holds",
        kind=COUNTS,
        panel=SUITES,
    )
    needle_count: int = option(20, help="Needles of each kind.", least=1, panel=SUITES)

    @property
    def suite_names(self) -> list[SuiteName]:
        """The suites, each with its folder. Raises ConfigError."""
        return [parse_suite(text) for text in self.suite]

    @property
    def row_suites(self) -> tuple[str, ...]:
        """The suites that are rows, and no needles."""
        return tuple(name for name in self.suite if name != NEEDLES)

    @property
    def has_needles(self) -> bool:
        return NEEDLES in self.suite

    @property
    def has_references(self) -> bool:
        """Whether there are right answers besides dense's."""
        return self.reference_column is not None or bool(self.suite)
