"""Profiles: settings that were found to hold for a model on documents, and of what that was found.

A profile is a TOML file: `[profile]` says where it comes from, with a table `[[profile.ladder]]` for each of
the settings that were to be tested, in their order; `[batch]` holds settings under the names of flags,
`[batch.settings]` the method's own.

Format 1 was written of what a bootstrapped interval let pass, or was accepted although it did not.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import ConfigError
from pipeline.pruning.registry import make_method
from pipeline.settings.method_settings import AUTO, MethodSettings
from pipeline.settings.option import settings_of
from pipeline.settings.sources import merge, read_toml, refuse_code, renewed
from pipeline.setup.profile_tables import check_tables, gates_of, refuse_unproven
from pipeline.storage.whole_file import writing
from pipeline.texts.toml import toml_of

if TYPE_CHECKING:
    from pipeline.model.loading import Model
    from pipeline.pruning.base import PruningMethod

FORMAT = 2
BEFORE = 1  # which is still read
EXIT_MAPS, MAPS_SUFFIX = "exit_maps", ".exit-maps.safetensors"  # a method's setting, and its file's name
FAR_BEYOND = 1.5  # times the longest prompt that was calibrated on
BATCH_KEYS = tuple(
    each.name.replace("_", "-") for each in settings_of(MethodSettings) if each.about.in_profile
)
_REQUIRED = ("model", "fingerprint", "device", "dtype")


@dataclass(frozen=True, kw_only=True)
class Profile:
    """What a profile file holds."""

    about: Mapping[str, Any]  # the table [profile]
    batch: Mapping[str, Any]  # fields of a batch configuration: method, settings, linear and attention dtype

    def is_of(self, config: MethodSettings, method: PruningMethod) -> bool:
        """Whether a run with this configuration does what was verified, and nothing stands above it."""
        same_precision = config.linear_dtype == self.batch.get("linear_dtype", "auto")
        return same_precision and method == make_method(self.batch["method"], self.batch["settings"])

    @property
    def is_proven(self) -> bool:
        """Whether every gate passed, as gates are today; no profile is read of which one did not."""
        return self.about["format"] == FORMAT and bool(gates_of(self.about))

    @property
    def speed_up(self) -> float:
        """Dense's time to the first token over that of these settings, as measured."""
        measured = self.about.get("measured")
        return float(measured.get("speed_up", 1.0)) if isinstance(measured, Mapping) else 1.0

    @property
    def exit_maps(self) -> str | None:
        """The file of the maps that the method's settings name."""
        named = self.batch.get("settings", {}).get(EXIT_MAPS)
        return None if named == "none" else named

    @property
    def longest(self) -> int | None:
        """Prompt tokens of the longest case."""
        return self.about.get("lengths", {}).get("max")


def write_profile(path: Path, profile: Profile) -> None:
    """Whole or not at all, and beside it a copy of the exit maps that it names. Raises StorageError."""
    batch = {name.replace("_", "-"): value for name, value in profile.batch.items()}
    maps = profile.exit_maps
    if maps is not None:
        beside = path.with_name(path.stem + MAPS_SUFFIX)
        if not (beside.exists() and beside.samefile(maps)):
            with writing(beside) as file, open(maps, "rb") as held:
                shutil.copyfileobj(held, file)
        batch["settings"] = {**batch["settings"], EXIT_MAPS: beside.name}
    with writing(path) as file:
        file.write(toml_of({"profile": dict(profile.about), "batch": batch}).encode())


def with_profile(values: Mapping[str, Any]) -> dict[str, Any]:
    """Settings, with those of the profile that they name, if any, where they say nothing."""
    path = values.get("profile")
    if path is None:
        return dict(values)
    named = {name: value for name, value in values.items() if (name, value) != ("method", AUTO)}
    return merge(load_profile(path).batch, named)


def load_profile(path: str) -> Profile:
    """Raises ConfigError, with the file's name, for one that cannot be read or is none.

    Likewise, with the gate's name, for one of which a gate did not pass, and for one with tables that are
    none.
    """
    table = read_toml(f"--profile {path}", path)
    about, batch = table.get("profile"), table.get("batch")
    if not isinstance(about, dict) or not isinstance(batch, dict):
        raise ConfigError(f"--profile {path} has no tables [profile] and [batch]; calibrate makes one")
    if about.get("format") not in (BEFORE, FORMAT):
        raise ConfigError(
            f"--profile {path} is of format {about.get('format')}, and this version reads {BEFORE} and "
            f"{FORMAT}: calibrate again"
        )
    missing = [name for name in _REQUIRED if not isinstance(about.get(name), str)]
    if missing:
        raise ConfigError(f"--profile {path} does not say {', '.join(missing)}: calibrate again")
    check_tables(path, about)
    refuse_unproven(path, about)
    return Profile(about=about, batch=_batch(path, batch))


def _batch(path: str, table: Mapping[str, Any]) -> dict[str, Any]:
    unknown = [key for key in table if key not in (*BATCH_KEYS, "attention-dtype")]
    if unknown or not isinstance(table.get("method"), str):
        what = f"unknown key {unknown[0]!r}" if unknown else "no method"
        raise ConfigError(f"--profile {path}: {what} in [batch]; a profile holds {', '.join(BATCH_KEYS)}")
    if not isinstance(table.get("settings", {}), dict):
        raise ConfigError(f"--profile {path}: settings in [batch] must be a table, [batch.settings]")
    settings = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in table.get("settings", {}).items()
    }
    maps = settings.get(EXIT_MAPS)
    if maps is not None and not isinstance(maps, str):
        raise ConfigError(f"--profile {path}: {EXIT_MAPS} must name a file, not be {maps!r}")
    if maps is not None and maps != "none":  # they lie beside the profile
        settings[EXIT_MAPS] = str(Path(path).parent / maps)
    values = {key.replace("-", "_"): value for key, value in table.items()} | {"settings": settings}
    refuse_code(f"--profile {path}", values)
    try:
        return renewed(MethodSettings, values, lambda note: None)
    except ConfigError as error:
        raise ConfigError(f"--profile {path}: {error}") from error


def check_profile(path: str, profile: Profile, model: Model) -> list[str]:
    """Notes for a run with `model`. Raises ConfigError if the profile, or its exit maps, are of another."""
    about = profile.about
    if about["fingerprint"] != model.fingerprint:
        raise ConfigError(
            f"--profile {path} was calibrated for {about['model']} ({about['fingerprint'][:12]}), not for "
            f"{model.name} ({model.fingerprint[:12]}): calibrate this model, or leave the profile out"
        )
    if not has_its_maps(profile):
        raise ConfigError(
            f"--profile {path} was calibrated with other exit maps than {profile.exit_maps} holds: move both "
            "together, or calibrate again"
        )
    notes = []
    if about["format"] == BEFORE:
        notes.append(
            "the profile is of format 1, which was held to a weaker gate than profiles are today: calibrate "
            "again"
        )
    if about["device"] != model.device_name():
        notes.append(
            f"the profile was calibrated on {about['device']}, and this is {model.device_name()}: "
            "its speed-up and its drop were measured there"
        )
    dtype = str(model.dtype).removeprefix("torch.")
    if about["dtype"] != dtype:
        notes.append(f"the profile was calibrated in {about['dtype']}, and this run is in {dtype}")
    then = about.get("rope_scaling")
    if model.rope_scaling != then:
        notes.append(
            f"the profile was calibrated without --rope-scaling {model.rope_scaling}"
            if then is None
            else f"the profile was calibrated with --rope-scaling {then}, and this run has "
            + (model.rope_scaling or "none")
        )
    return notes


def has_its_maps(profile: Profile) -> bool:
    """Whether the exit maps that a profile names, where they are there, are those that it was tested with.

    Profiles of before do not tell which those are.
    """
    from pipeline.families.exit_maps import MapsHeader

    maps, digest = profile.exit_maps, profile.about.get(EXIT_MAPS)
    return maps is None or digest is None or not Path(maps).is_file() or MapsHeader.of(maps).digest == digest


def length_note(profile: Profile, prompt_tokens: int) -> str | None:
    """What to say where a prompt is far longer than all that the profile was calibrated on."""
    longest = profile.longest
    if longest is None or prompt_tokens <= FAR_BEYOND * longest:
        return None
    return (
        f"a prompt of {prompt_tokens:,} tokens is far beyond the {longest:,} that the profile was "
        "calibrated on: what it loses there was not measured"
    )
