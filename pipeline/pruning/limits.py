"""What a method's settings may be: `marsinfer methods` shows it, and a value outside of it is refused."""

from __future__ import annotations

from dataclasses import Field, dataclass, field
from typing import Any

from pipeline.errors import ConfigError
from pipeline.texts.toml import LARGEST

LIMITS = "limits"  # of a field's metadata


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a method's setting may be: what is outside of it would do nothing, or cannot be."""

    low: float | None = None
    high: float | None = None
    whole: bool = False  # a count, or a number of a layer
    is_layer: bool = False  # numbers from 0, below the model's depth
    per_layer: bool = False  # a tuple has one value for each of the model's layers


def setting(
    default: Any,
    help: str,
    *,
    low: float | None = None,
    high: float | None = None,
    whole: bool = False,
    is_layer: bool = False,
    per_layer: bool = False,
) -> Any:
    """A dataclass field of a method, with the words `marsinfer methods` explains it by, and its `Limits`."""
    limits = Limits(
        low=0 if is_layer else low,
        high=high,
        whole=whole or is_layer,
        is_layer=is_layer,
        per_layer=per_layer,
    )
    return field(default=default, metadata={"help": help, LIMITS: limits})


def limits_of(parameter: Field[Any]) -> Limits:
    """The limits of a method's setting; a field that was not declared by `setting` has none."""
    found: Limits = parameter.metadata.get(LIMITS, Limits())
    return found


def at_layer(value: Any, layer: int) -> Any:
    """A setting's value at a layer: one for all layers, or a tuple with one a layer."""
    return value[layer] if isinstance(value, tuple) else value


def several(value: Any) -> tuple[Any, ...]:
    """The values of a setting that takes one or more."""
    return value if isinstance(value, tuple) else (value,)


def check_limits(name: str, value: Any, limits: Limits) -> None:
    """Raise ConfigError unless each value is as the limits say; None passes, and any value without limits."""
    low, high = limits.low, limits.high
    if low is None and high is None and not limits.whole:
        return
    for number in several(value):
        if number is None:
            continue
        if not isinstance(number, int | float) or isinstance(number, bool) or not abs(number) <= LARGEST:
            raise ConfigError(f"{name} must be a number, not {number!r}")
        if (low is not None and number < low) or (high is not None and number > high):
            bounds = f"at least {low}" if high is None else f"between {low} and {high}"
            raise ConfigError(f"{name}={number} is out of range: it must be {bounds}")
        if limits.whole and not isinstance(number, int):
            raise ConfigError(f"{name}={number} is a count: give a whole number")


def check_pool(width: int) -> None:
    """Raise ConfigError unless scores can be averaged over so many neighbours."""
    if width % 2 == 0:
        raise ConfigError(f"pool={width} must be odd, so that a score keeps its place")
