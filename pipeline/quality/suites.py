"""Suites of questions by the name a user gives them: `leval:DIR`, `longbench:DIR` and `needles`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pipeline.errors import ConfigError, did_you_mean
from pipeline.quality.leval import load_leval
from pipeline.quality.longbench import load_longbench
from pipeline.quality.samples import Sample, document_key, part_of, take

__all__ = [
    "Sample",
    "SuiteName",
    "document_key",
    "load_leval",
    "load_longbench",
    "load_suite",
    "parse_suite",
    "part_of",
    "take",
]

NEEDLES = "needles"
LOADERS = {"leval": load_leval, "longbench": load_longbench}
_FORMS = "leval:DIR, longbench:DIR or needles"


@dataclass(frozen=True, slots=True)
class SuiteName:
    """A suite that a user named; `folder` is None for needles, which are hidden in the user's documents."""

    kind: str  # leval, longbench or needles
    folder: Path | None = None

    def __str__(self) -> str:
        return self.kind if self.folder is None else f"{self.kind}:{self.folder}"


def parse_suite(text: str) -> SuiteName:
    """`leval:DIR`, `longbench:DIR` or `needles`. Raises `ConfigError`."""
    kind, colon, folder = text.partition(":")
    if kind == NEEDLES:
        if colon:
            raise ConfigError(
                f"suite {text!r}: needles takes no folder; it hides them in the input's documents"
            )
        return SuiteName(NEEDLES)
    if kind not in LOADERS:
        hint = did_you_mean(kind.lower(), [*LOADERS, NEEDLES])
        raise ConfigError(f"unknown suite {text!r}{hint}; write {_FORMS}")
    if not folder.strip():
        raise ConfigError(f"suite {text!r}: name the folder of its files, as {kind}:DIR")
    path = Path(folder).expanduser()
    if not path.is_dir():
        raise ConfigError(f"suite {text!r}: {path} is {'not a folder' if path.exists() else 'not there'}")
    return SuiteName(kind, path)


def load_suite(suite: SuiteName) -> list[Sample]:
    """The samples of a suite that lies in a folder; those of needles are made by `make_needles`."""
    if suite.folder is None:
        raise ValueError(f"{suite} lies in no folder")
    return LOADERS[suite.kind](suite.folder)
