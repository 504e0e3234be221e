"""What is measured against dense and may be lost, and the files of the result."""

from __future__ import annotations

from typing import ClassVar

from pipeline.errors import ConfigError
from pipeline.settings.kinds import NUMBER, SWITCH, TEXT
from pipeline.settings.option import ANSWERS, FILES, GATE, RUN, SOUGHT, Renamed, Settings, option
from pipeline.settings.parse import NEEDLES, parse_drop

# of a gate's metric: the name of its measure; the first four need no generated answer
FORCED_METRICS = ("token-accuracy", "nll", "found", "agreement")
GENERATED_METRICS = ("score", "exact-match", "token-f1", "rouge-l", "edit-similarity", "choice")
METRICS = FORCED_METRICS + GENERATED_METRICS


class DropSettings(Settings, panel=GATE):
    """The bound of a gate, and where the result goes."""

    max_drop: str | None = option(
        None,
        metavar="Npt|N%",
        help="Largest drop below dense: 1pt is 0.01 of the score, 1% a hundredth of dense's; "
        "nll takes %, of its rise.",
        shown_default="2pt, 2% for nll",
        check=parse_drop,
    )
    out: str | None = option(
        None,
        metavar="FILE",
        help="The result: check's as JSON (- prints it; finished rows are kept beside the file), "
        "calibrate's profile as TOML.",
        in_environment=False,
        panel=FILES,
    )


class ResumeSettings(Settings, panel=RUN):
    """Going on with what was stopped."""

    resume: bool = option(False, help="Go on with a run that was stopped, or with a published output.")


class OverwriteSettings(Settings, panel=RUN):
    """Replacing what is there."""

    overwrite: bool = option(False, help="Replace an output that exists.")


class GateSettings(DropSettings, ResumeSettings, panel=FILES):
    """What `marsinfer check` decides by, and writes."""

    renamed: ClassVar[tuple[Renamed, ...]] = (
        Renamed(
            name="json",
            kind=TEXT,
            now="--out FILE",
            values=lambda path: {"out": path},
            metavar="FILE",
        ),
    )

    scope: str = option(
        "documents",
        help="documents: what documents like these lose, of which enough are needed to tell; rows: these "
        "rows alone, against the scores in --baseline that were accepted last, or else dense's: a few will "
        "do, for CI.",
        choices=("documents", "rows"),
        panel=GATE,
    )
    generate: bool = option(
        False, help="Also generate answers, and score them against the references.", panel=ANSWERS
    )
    metric: str | None = option(
        None,
        help="token-accuracy: share of a reference's tokens that are predicted (the default with "
        "references); nll: nats a token; found: the share of a reference's parts of which all tokens are "
        "predicted, where a reference that is no list is one part (the default of needles alone); "
        "agreement: share of the tokens at which dense chooses the same (the default without "
        "references); with --generate score (each row's own), exact-match, token-f1, rouge-l, "
        "edit-similarity, choice. All are means over documents.",
        shown_default="by the rows",
        choices=METRICS,
        panel=GATE,
    )
    per_task: bool = option(
        False, help="Each task is a gate of its own; all of them have to pass.", panel=GATE
    )
    baseline: str | None = option(
        None,
        metavar="FILE",
        help="Parquet file of dense's results, and of the method's that were accepted: made if it is not "
        "there, else dense's are used instead of running.",
    )
    overwrite_baseline: bool = option(
        False, help="Make the baseline anew, and accept what the method scores now."
    )
    junit: str | None = option(None, metavar="FILE", help="Gates as JUnit XML.")
    markdown: str | None = option(None, metavar="FILE", help="Tables as Markdown, added to the end of FILE.")


def _no_mass(mass: float) -> dict[str, object]:
    raise ConfigError(f"--mass {mass:g} is gone: calibrate probes the masses that its profiles use")


def _no_inconclusive(wanted: bool) -> dict[str, object]:
    if wanted:
        raise ConfigError(
            "--accept-inconclusive is gone: a profile holds only what was shown to be within the bounds; "
            "give more documents, or a larger --max-drop"
        )
    return {}


def _objective(name: str) -> dict[str, object]:
    if name != "ttft":
        raise ConfigError(f"--objective {name!r}: TTFT is all that calibrate can make least")
    return {}


class SoughtSettings(DropSettings, OverwriteSettings, panel=SOUGHT):
    """What `marsinfer calibrate` looks for."""

    renamed: ClassVar[tuple[Renamed, ...]] = (
        Renamed(
            name="needles",
            kind=SWITCH,
            now="--suite needles",
            values=lambda wanted: {"suite": (NEEDLES,)} if wanted else {},
        ),
        Renamed(
            name="objective",
            kind=TEXT,
            now="left out: TTFT is what is made least",
            values=_objective,
            metavar="ttft",
        ),
        Renamed(name="mass", kind=NUMBER, now="left out", values=_no_mass, metavar="M"),
        Renamed(name="accept_inconclusive", kind=SWITCH, now="left out", values=_no_inconclusive),
    )

    needle_drop: str = option(
        "2pt",
        metavar="Npt|N%",
        help="With --suite needles: largest drop of the share of each kind that is found.",
        check=parse_drop,
    )
    minutes: float = option(
        10.0,
        help="Longest time in all; more time, more rows and more rungs.",
        least=0,
        most=24 * 60,
        above_least=True,
    )
