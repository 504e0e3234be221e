"""A probe and what it finds, as plain data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, Literal

Status = Literal["ok", "absent", "note", "broken"]


@dataclass(frozen=True)
class Finding:
    """What a probe found.

    `status` is `ok`; `absent`, what cannot be had here, which is no fault; `note`, what works otherwise than
    one might expect; or `broken`, what should work and does not.
    """

    status: Status
    text: str  # one line: how it is, or why it is not
    facts: Mapping[str, Any] = field(default_factory=dict)  # the same as JSON values, bytes in `..._bytes`


@dataclass(frozen=True, kw_only=True)
class Probe:
    """One thing to find out, by a function that returns a `Finding`."""

    group: str
    name: str
    where: str  # module:function
    arguments: tuple[str, ...] = ()

    def run(self) -> Finding:
        """Raises whatever the thing that is probed does."""
        module, _, function = self.where.partition(":")
        finding: Finding = getattr(import_module(module), function)(*self.arguments)
        return finding


def one_line(error: BaseException) -> str:
    """An exception's kind and the first line of what it says."""
    said = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {said}" if said else type(error).__name__
