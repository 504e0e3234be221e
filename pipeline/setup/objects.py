"""Models and methods that a program gives to a function as objects, among its settings."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from pipeline.settings.keywords import StrPath
from pipeline.settings.method_settings import AUTO
from pipeline.setup.profile import with_profile

if TYPE_CHECKING:
    from pipeline.model.loading import Model
    from pipeline.pruning.base import PruningMethod


def with_objects(
    options: Mapping[str, Any], model: StrPath | Model, method: str | PruningMethod | None
) -> dict[str, Any]:
    """`options` and the settings that name a model and a method, each of which may be an object.

    Where no method is given, and `profile` is among the options, its settings are added.
    """
    options = {**options, "model": os.fspath(model) if isinstance(model, str | os.PathLike) else model.name}
    if method is None or method == AUTO:
        return with_profile(options)
    if isinstance(method, str):
        return {**options, "method": method}
    place = f"{type(method).__module__}:{type(method).__qualname__}"
    return {**options, "method": place, "settings": asdict(method)}
