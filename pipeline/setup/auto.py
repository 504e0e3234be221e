"""The method of a run that names none: one that was shown to lose nothing on this model, or else dense.

Profiles are looked for in the user's configuration folder, where calibrate keeps them, and among those that
the package brings.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import ConfigError, MarsError
from pipeline.pruning.registry import METHODS, make_method
from pipeline.settings.method_settings import AUTO, MethodSettings
from pipeline.settings.run_settings import BatchConfig
from pipeline.setup.guard import Guard
from pipeline.setup.profile import Profile, has_its_maps, load_profile, write_profile
from pipeline.texts.redaction import hidden

if TYPE_CHECKING:
    from pipeline.model.loading import Model
    from pipeline.pruning.base import PruningMethod
    from pipeline.settings.check_settings import CheckConfig

# under which words they are stored: "auto" meant what "any" does today, and outputs of then go on
GROUPS = {"any": "auto", "auto": "method", "off": "off"}
GROUPED = {stored: group for group, stored in GROUPS.items()}
MEASURED_TOKENS = 24_000  # of the prompts in the README's table of what mars gains
# what a device's name says beside its kind: memory, and the form of the board
_FORM = re.compile(r"[ -](?:\d+GB|HBM\d\w*|PCIe|SXM\d*|NVL)\b", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """A run's method by name, with all that goes with it, and what a user should know of it."""

    config: BatchConfig
    method: PruningMethod
    profile: Profile | None = None
    guard: Guard | None = None  # of what the profile does not speak for
    notes: tuple[str, ...] = ()


def choose(config: BatchConfig, model: Model, begun: Mapping[str, Any] | None) -> Chosen:
    """The method of a configuration that says auto, which of a run that goes on is its own.

    `begun` are the settings that such a run began with.
    Raises ConfigError where that is a method of the user's own, which must be named.
    """
    if begun is not None:
        return _as_begun(config, begun)
    found = None if _is_unproven(config) else _found(config, model)
    if found is None:
        return Chosen(
            config=replace(config, method="dense"),
            method=make_method("dense"),
            notes=(_told_of_dense(config, model),),
        )
    path, profile = found
    # no method was asked for by name, so that dense may answer rows where it is cheaper
    group = "any" if config.group == "auto" else config.group
    config = replace(config, **profile.batch, profile=str(path), group=group)
    return Chosen(
        config=config,
        method=make_method(config.method, config.settings),
        profile=profile,
        guard=None if config.guard == "off" else Guard.of(profile),
        notes=(_told_of_profile(path, profile),),
    )


def proven(config: CheckConfig, model: Model) -> CheckConfig:
    """The same with the method that `choose` would take. Raises ConfigError where that is dense."""
    found = _found(config, model)
    if found is None:
        raise ConfigError(
            f"no method is named, and there is no proven profile of {model.name} on "
            f"{device_class(model.device_name())}: --method says what is held against dense"
        )
    path, profile = found
    return replace(config, **profile.batch, profile=str(path))


def _as_begun(config: BatchConfig, begun: Mapping[str, Any]) -> Chosen:
    name, settings = begun["method"]["name"], begun["method"]["settings"]
    if name not in METHODS:
        raise ConfigError(f"{config.output} was begun with the method {name!r}: name it with --method")
    parameters = {key: tuple(value) if isinstance(value, list) else value for key, value in settings.items()}
    linear = begun["model"]["linear_dtype"] if config.linear_dtype == AUTO else config.linear_dtype
    group = GROUPED.get(begun["group"], config.group) if config.group == "auto" else config.group
    config = replace(config, method=name, settings=parameters, linear_dtype=linear, group=group)
    guard = begun["guard"] and config.guard != "off"
    return Chosen(
        config=config,
        method=make_method(name, parameters),
        guard=Guard.from_dict(begun["guard"]) if guard else None,
        notes=() if name == "dense" else (f"--method auto: {name}, as the run began",),
    )


def profile_folder() -> Path:
    """Where a user's profiles are kept."""
    home = os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config"
    return Path(home) / "marsinfer" / "profiles"


def keep_profile(profile: Profile) -> Path:
    """Put a profile where `choose` finds it; returns where. Raises MarsError where it cannot be written."""
    about = profile.about
    folder = profile_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise MarsError(f"{folder} cannot be made: {error.strerror or error}") from error
    words = f"{Path(about['model']).stem}-{device_class(about['device'])}-{about['fingerprint'][-12:]}"
    path = folder / (re.sub(r"[^\w.-]+", "-", words).lower() + ".toml")
    write_profile(path, profile)
    return path


def _found(config: MethodSettings, model: Model) -> tuple[Path, Profile] | None:
    """The fastest proven profile of a model and its kind of device; precisions that are given stand above."""
    if config.linear_dtype != AUTO:
        return None
    usable = [each for each in _proven_profiles(model) if _can_run(config, *each)]
    return max(usable, key=lambda each: each[1].speed_up, default=None)


def _can_run(config: MethodSettings, path: Path, profile: Profile) -> bool:
    """Whether a run with this configuration can do what a profile says: nobody has asked for it by name."""
    maps, divided = profile.exit_maps, getattr(config, "tensor_parallel", 1) > 1
    try:
        taken = replace(config, **profile.batch, profile=str(path))
        make_method(taken.method, taken.settings)
        if isinstance(taken, BatchConfig):
            taken.check_divided(taken.method)
        has_maps = has_its_maps(profile)
    except ConfigError:  # a method or a setting that this version lacks, say: `--profile` tells
        return False
    return maps is None or (has_maps and not divided and Path(maps).is_file())


def _proven_profiles(model: Model) -> Iterator[tuple[Path, Profile]]:
    """Those of this very model and kind of device; not those of before, which were held to a weaker gate."""
    folder = profile_folder()
    for path in sorted(folder.glob("*.toml")) if folder.is_dir() else ():
        try:
            profile = load_profile(str(path))
        except ConfigError:  # no profile, or none that may be used: `--profile` tells what ails it
            continue
        if profile.is_proven and profile.speed_up > 1 and _is_for(profile, model):
            yield path, profile


def _is_for(profile: Profile, model: Model) -> bool:
    about = profile.about
    return (
        about["fingerprint"] == model.fingerprint
        and device_class(about["device"]) == device_class(model.device_name())
        and about["dtype"] == str(model.dtype).removeprefix("torch.")
        and about.get("rope_scaling") == model.rope_scaling
    )


def device_class(name: str) -> str:
    """A device's name without its memory and the form of its board: `NVIDIA H100` of all of these."""
    return _FORM.sub("", name)


def _told_of_profile(path: Path, profile: Profile) -> str:
    batch = profile.batch
    precision = batch.get("linear_dtype", AUTO)
    parts = f"{batch['method']}{'' if precision == AUTO else f' with --linear-dtype {precision}'}"
    longest = "" if profile.longest is None else f" on prompts of up to {profile.longest:,} tokens"
    return (
        f"--method auto: {parts}, {profile.speed_up:.2f} times as fast as dense to the first token{longest}, "
        f"by {path}; --method dense leaves it aside"
    )


def _is_unproven(config: BatchConfig) -> bool:
    """Whether settings are given that no profile was proven with."""
    return config.linear_dtype != AUTO or config.kv_dtype != AUTO or config.kv_memory is not None


def _told_of_dense(config: BatchConfig, model: Model) -> str:
    if _is_unproven(config):
        return "--method auto: dense, as settings are given that no profile was proven with"
    head = (
        f"--method auto: dense, as no profile of {model.name} on {device_class(model.device_name())} is kept"
    )
    if model.device.type != "cuda":
        return f"{head}; on a GPU, `marsinfer calibrate` finds out what is faster and loses nothing"
    return (
        f"{head}; with mars and --linear-dtype mixed, models that were measured took half of dense's time to "
        f"the first token of prompts over {MEASURED_TOKENS:,} tokens: `marsinfer calibrate "
        f"{hidden(config.input[0])} --model {config.model}` measures yours, and keeps what loses nothing for "
        "auto to take"
    )
