"""The journal of a check: JSON lines, each durable before the next row runs, so that it can go on.

The first line holds what decides the results. A torn last line, which a killed process leaves, is ignored.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

from pipeline.errors import ConfigError
from pipeline.evaluate.check_rows import CheckRow
from pipeline.evaluate.row_results import RowResult
from pipeline.outputs.beginnings import check_settings, plain
from pipeline.storage.whole_file import failures_told, in_the_way, open_new

VERSION = 1
_SETTINGS = "settings_that_decide"
_FIRST = b'{"version"'  # of what a check writes
_SUFFIX = ".journal"
_SIDES = ("dense", "method")
_START_OVER = "leave out --resume to start over"


class CheckJournal:
    """Finished rows of both sides, beside the result; to be closed."""

    def __init__(self, path: Path, decides: Mapping[str, Any], *, resume: bool) -> None:
        """With `resume` go on with what is there, damaged lines left out.

        Raises ConfigError if it was begun with other settings, or is no file of ours.
        """
        self.path = path
        self.damaged = 0  # lines that could not be read
        self._found: dict[str, dict[str, RowResult]] = {side: {} for side in _SIDES}
        settings = plain(decides)
        _refuse_foreign(path)
        end = self._read(settings) if resume and path.exists() else 0
        with failures_told(path):
            self._file = _opened(path, anew=not end)
            self._file.seek(end)
            self._file.truncate()  # of a torn last line nothing stays
            if not end:
                self._append({"version": VERSION, _SETTINGS: settings})

    @property
    def resumed(self) -> int:
        """How many results were found."""
        return sum(map(len, self._found.values()))

    def found(self, side: str, rows: Sequence[CheckRow]) -> dict[str, RowResult]:
        """Those of `rows`, by id, that were finished before and have not changed since."""
        results = self._found[side]
        return {
            row.sample.id: results[row.sample.id]
            for row in rows
            if row.sample.id in results and results[row.sample.id].row_hash == row.row_hash
        }

    def add(self, side: str, result: RowResult) -> None:
        """Keep one more result, durably."""
        with failures_told(self.path):
            self._append({"side": side, **result.as_dict()})

    def remove(self) -> None:
        """What it holds is in the result now."""
        self.close()
        with suppress(OSError):
            self.path.unlink()

    def close(self) -> None:
        self._file.close()

    def _append(self, content: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(content).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def _read(self, settings: Any) -> int:
        """Take in all whole lines; where they end, in bytes. 0 if not even the first is whole."""
        with failures_told(self.path):
            lines = self.path.read_bytes().splitlines(keepends=True)
        if lines and not lines[-1].endswith(b"\n"):
            lines.pop()
        if lines:
            check_settings(self.path, self._settings(lines[0]), settings, _START_OVER)
        for line in lines[1:]:
            try:
                content = json.loads(line)
                side = content["side"]
                result = RowResult.from_dict(content, is_dense=side == _SIDES[0])
                self._found[side][result.id] = result
            except (ValueError, LookupError, TypeError):
                self.damaged += 1
        return sum(map(len, lines))

    def _settings(self, line: bytes) -> Any:
        try:
            content = json.loads(line)
            if content["version"] == VERSION:
                return content[_SETTINGS]
        except (ValueError, LookupError, TypeError) as error:
            raise ConfigError(f"{self.path} line 1 is damaged; {_START_OVER}") from error
        raise ConfigError(f"{self.path} is of another version of marsinfer; {_START_OVER}")


def _refuse_foreign(path: Path) -> None:
    """A ConfigError for a link, and for whatever else no check has begun, which would be overwritten."""
    is_ours = not path.exists() or (path.is_file() and _begins_as_ours(path))
    if path.is_symlink() or not is_ours:
        raise in_the_way(path)


def _begins_as_ours(path: Path) -> bool:
    with path.open("rb") as file:
        first = file.read(len(_FIRST))
    return _FIRST.startswith(first.strip(b"\0"))  # a killed check may have left less


def _opened(path: Path, *, anew: bool) -> BinaryIO:
    if not anew:
        return os.fdopen(os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC), "r+b")
    path.unlink(missing_ok=True)
    return open_new(path, like=path.with_name(path.name.removeprefix(".").removesuffix(_SUFFIX)))


def journal_settings(path: Path) -> dict[str, Any]:
    """With which settings it was begun; none where it is not there, or damaged, which opening it tells."""
    try:
        with path.open("rb") as file:
            return dict(json.loads(file.readline())[_SETTINGS])
    except (OSError, ValueError, LookupError, TypeError):
        return {}


def journal_path(result: Path) -> Path:
    """Beside the file of the result."""
    return result.with_name(f".{result.name}{_SUFFIX}")
