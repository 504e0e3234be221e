"""What the tables of a profile may hold: a file that was edited or damaged is refused before it is used."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from pipeline.errors import ConfigError
from pipeline.settings.parse import parse_drop

_ROUNDED = 1e-3  # of the ends of intervals, as a profile tells them


def check_tables(path: str, about: Mapping[str, Any]) -> None:
    """Raise ConfigError for a table `[profile]` with what cannot be; what lacks is no fault."""
    for name, value, wanted, fits in _told(about):
        if not fits(value):
            raise ConfigError(f"--profile {path}: {name} must be {wanted}, not {value!r}: calibrate again")


def gates_of(about: Mapping[str, Any]) -> Mapping[str, Any]:
    """By their names; none where they are not told as `calibrate` tells them."""
    measured = about.get("measured")
    gates = measured.get("gates") if isinstance(measured, Mapping) else None
    told = isinstance(gates, Mapping) and all(isinstance(gate, Mapping) for gate in gates.values())
    return gates if told and gates is not None else {}


def refuse_unproven(path: str, about: Mapping[str, Any]) -> None:
    """Raise ConfigError, with its name, for a gate that did not pass, by its verdict or numbers."""
    for name, gate in gates_of(about).items():
        bound, high = gate.get("bound"), gate.get("high")
        if gate.get("verdict") != "pass":
            raise ConfigError(
                f"--profile {path} did not pass its gate {name} (bound {bound}: {gate.get('verdict')}): "
                "calibrate again"
            )
        if high is not None and bound is not None and not _is_within(high, bound):
            raise ConfigError(
                f"--profile {path} says that it passed its gate {name}, whose drop is up to {high}, with a "
                f"bound of {bound}: calibrate again"
            )


def _is_within(high: Any, bound: Any) -> bool:
    return _is_number(high) and high <= parse_drop(str(bound), "bound").value + _ROUNDED


_Told = tuple[str, Any, str, Callable[[Any], bool]]  # name, value, what it must be, whether it is


def _told(about: Mapping[str, Any]) -> Iterator[_Told]:
    """What is there of all that a run reads."""
    measured, lengths, guard = (about.get(name, {}) for name in ("measured", "lengths", "guard"))
    if isinstance(measured, Mapping) and "speed_up" in measured:
        yield "measured.speed_up", measured["speed_up"], "a number above 0", _is_above_0
    yield "lengths", lengths, "a table", _is_table
    if "max" in lengths:
        yield "lengths.max", lengths["max"], "a whole number from 1", _is_count
    yield "guard", guard, "a table", _is_table
    yield "guard.tasks", guard.get("tasks", []), "a list of texts", _are_texts
    shares = guard.get("shares", {name: each for name, each in guard.items() if name != "tasks"})
    yield "guard.shares", shares, "a table", _is_table
    for name, each in shares.items():
        yield f"guard.shares.{name}", each, "a table of shares by prompt tokens", _are_shares


def _is_table(value: Any) -> bool:
    return isinstance(value, Mapping)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_above_0(value: Any) -> bool:
    return _is_number(value) and value > 0


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _are_texts(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(isinstance(each, str) for each in value)


def _are_shares(value: Any) -> bool:
    return isinstance(value, Mapping) and all(
        str(tokens).isdecimal() and int(tokens) >= 1 and _is_number(share) and share >= 0
        for tokens, share in value.items()
    )
