"""The folder of a journal: the names of what is in it, and how it goes without taking what is not ours."""

from __future__ import annotations

import os
import re
import shutil
import stat
from collections.abc import Sequence
from pathlib import Path

from pipeline.outputs.chunks import Damage
from pipeline.storage.whole_file import in_the_way
from pipeline.texts.words import counted

INDEX_FILE = "index.sqlite"
# in the folder, so that what a killed run left of them goes with the journal
PARTIAL_OUTPUT = "output.partial"
PARTIAL_SIDECAR = "sidecar.partial"
PARTIAL_DROPPED = "dropped.partial"
COPIES_FILE = "copies.partial"

DAMAGED = ".damaged"
_PART = re.compile(rf"part-(\d{{4,}})(?:{re.escape(DAMAGED)})?")
# .nfs: what a network's file system keeps of a file that was removed while it was open
_OURS = re.compile(
    rf"{_PART.pattern}|settings\.json(\.partial)?|index\.sqlite(-\w+)?|(output|sidecar|dropped|copies)\.partial|\.nfs\w+"
)


def journal_folder(output: str | Path) -> Path:
    """Where the journal of an output is; outputs that are links to one file share it."""
    target = Path(os.path.realpath(output))
    return target.with_name(f".{target.name}.journal")


def parts_of(folder: Path) -> dict[int, Path]:
    """The parts of a journal by their numbers, damaged ones too."""
    if not folder.is_dir():
        return {}
    return {part_number(path): path for path in folder.iterdir() if _PART.fullmatch(path.name)}


def journal_parts(folder: Path) -> list[Path]:
    """The parts of a journal, the oldest first, for one who only reads."""
    return [path for _, path in sorted(parts_of(folder).items())]


def part_number(part: Path) -> int:
    found = _PART.fullmatch(part.name)
    assert found is not None
    return int(found[1])


def part_name(number: int) -> str:
    return f"part-{number:04}"


def part_path(folder: Path, number: int) -> Path:
    """Where a part is, whether or not it was found to be damaged."""
    path = folder / part_name(number)
    return path if path.exists() else path.with_name(f"{path.name}{DAMAGED}")


def set_aside(part: Path) -> Path:
    """Name a damaged part so, whose whole chunks are read all the same; returns the name it has now."""
    if part.name.endswith(DAMAGED):
        return part
    return part.rename(part.with_name(f"{part.name}{DAMAGED}"))


def damage_told(damages: Sequence[Damage]) -> str:
    """What to say of a journal in which damage was found."""
    rows = sum(damage.rows or 0 for damage in damages)
    unknown = sum(damage.end - damage.offset for damage in damages if damage.rows is None)
    lost = [counted(rows, "finished row")] if rows else []
    lost += [f"what stood in {counted(unknown, 'byte')}"] if unknown else []
    return f"the journal is damaged: {' and '.join(lost)} cannot be read"


def refuse_foreign_folder(folder: Path) -> None:
    """A `ConfigError` if what has a journal's name is a link, a file, or holds what no run puts there."""
    try:
        found = os.lstat(folder)
    except FileNotFoundError:
        return
    if not stat.S_ISDIR(found.st_mode) or not all(_OURS.fullmatch(name) for name in os.listdir(folder)):
        raise in_the_way(folder, "it is no journal of marsinfer, or holds other files too")


def clear_discarded(folder: Path) -> None:
    """Remove what a killed run left of a journal that it was removing; a `ConfigError` if it is not ours."""
    for path in (folder, discarded(folder)):
        refuse_foreign_folder(path)
    shutil.rmtree(discarded(folder), ignore_errors=True)


def discard(folder: Path) -> None:
    """Remove a journal: renamed first, as one that is half removed would look like one that is damaged.

    What somebody else has put into it meanwhile stays, in the folder of its new name.
    """
    left = discarded(folder)
    refuse_foreign_folder(left)
    shutil.rmtree(left, ignore_errors=True)
    folder.rename(left)
    for name in filter(_OURS.fullmatch, os.listdir(left)):
        (left / name).unlink(missing_ok=True)
    if not os.listdir(left):
        left.rmdir()


def discarded(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}-discarded")
