"""Settings for a model on documents, tested on other documents of the user's. What `calibrate` runs."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from pipeline.calibration.bounds import Bounds, Supply
from pipeline.calibration.ladder import Calibration
from pipeline.calibration.phases import Phases
from pipeline.errors import GateInconclusive, MarsError, ending
from pipeline.evaluate.cases import Sides, in_all, split
from pipeline.evaluate.check_rows import read_rows
from pipeline.evaluate.workbench import Deadline, Workbench, failures_named
from pipeline.interrupts import nothing_to_lose
from pipeline.model.loading import Model, open_model
from pipeline.model.variant import check_draft
from pipeline.notebooks import notebook_bar
from pipeline.settings.calibrate_settings import CalibrateConfig
from pipeline.settings.keywords import StrPath, called_with, inputs_of
from pipeline.settings.model_settings import WeightsSettings
from pipeline.setup.auto import keep_profile
from pipeline.setup.intake import make_prompts
from pipeline.setup.objects import with_objects
from pipeline.setup.profile import Profile, write_profile
from pipeline.suites.samples import NEEDLES


def calibrate(
    input: StrPath | Sequence[StrPath] = (),
    *,
    model: StrPath | Model = WeightsSettings.model,
    progress: Callable[[str, float], None] | None = None,
    note: Callable[[str], None] = lambda text: None,
    check: Callable[[], None] = lambda: None,
    **options: Any,
) -> Calibration:
    """Find the fastest settings that lose no more than `max_drop`; what `marsinfer calibrate` runs.

    `input` is a file, glob, folder or URL, or several; `model` a name or a model that `load_model` returned.
    `options` are the other fields of `CalibrateConfig`, which are the command's flags: `out` names the
    profile to write (profile.toml), `minutes` the longest time. `progress` is called with what is being done
    and the seconds left (without it, a notebook shows them), `note` with what a user should know, `check`
    between prefills: it may raise to end all.

    Returns what was found; its `profile` is None where nothing passed, which is no error.

    Raises ConfigError, InputError or ModelError before any row is run, and GateInconclusive where so few
    documents cannot pass.
    """
    bar = notebook_bar() if progress is None else None
    if bar is not None:
        progress = bar.minutes
    options = called_with("calibrate", CalibrateConfig, options, note) | {"input": inputs_of(input)}
    return run_calibrate(
        CalibrateConfig(**with_objects(options, model, None)),
        model=None if isinstance(model, str | os.PathLike) else model,
        progress=ending(progress or (lambda text, left_s: None)),
        note=ending(note),
        check=ending(check),
    )


def run_calibrate(
    config: CalibrateConfig,
    *,
    model: Model | None = None,
    clock: Deadline | None = None,
    progress: Callable[[str, float], None] = lambda text, left_s: None,
    note: Callable[[str], None] = lambda text: None,
    check: Callable[[], None] = lambda: None,
) -> Calibration:
    """Find settings within the bounds, and write the profile if some pass on the documents held out.

    `model` stands for the one that `config` names, `clock` for `config.minutes` from now. `progress` is
    called with what is being done and the seconds left, `check` before every prefill and between the steps
    of generated answers: it may raise to end all. Raises MarsError, of which GateInconclusive, before the
    weights are loaded, says that there are too few documents for anything to pass. That nothing passes is no
    error but a result without a profile.
    """
    clock = clock or Deadline(config.minutes * 60)
    model = model or open_model(config)
    check_draft(model, ())
    with TemporaryDirectory(prefix="marsinfer-") as folder:
        with model.in_use():
            found = _calibrated(config, model, Path(folder), clock, progress, note, check)
        if found.profile is not None:
            write_profile(config.profile_file, found.profile)
            _keep(found.profile, note)
    return found


def _calibrated(
    config: CalibrateConfig,
    model: Model,
    folder: Path,
    clock: Deadline,
    progress: Callable[[str, float], None],
    note: Callable[[str], None],
    check: Callable[[], None],
) -> Calibration:
    def tell(text: str) -> None:
        progress(text, max(0.0, clock.left))

    tell("reading and tokenizing")
    for text in model.notes:
        note(text)
    found = read_rows(config, make_prompts(config, model, config.max_new_tokens))
    for text in found.told:
        note(text)
    sides = split(found.rows, str(config.seed))
    bounds = Bounds.of(config)
    _check_supplies(bounds, sides, note)
    tell("loading the model")
    check()
    with nothing_to_lose():
        bench = Workbench.of(model.load(), check)
    run = Phases(config, bench, bounds, sides, folder, clock.rest(), tell, note)
    with failures_named(lambda: f"{bench.running} fails"):
        return run.calibrate(found.data_hash, clock)


def _check_supplies(bounds: Bounds, sides: Sides, note: Callable[[str], None]) -> None:
    """Say what it takes to pass. Raises GateInconclusive where no setting could."""
    for supply in bounds.supplies(sides.held_out, (*sides.search, *sides.held_out)):
        if supply.is_short:
            raise GateInconclusive(f"{supply}; {_remedy(supply)}")
        note(str(supply))


def _remedy(supply: Supply) -> str:
    is_needles = supply.gate.startswith(NEEDLES)
    larger = f"a larger {'--needle-drop' if is_needles else '--max-drop'}"
    if supply.needed is None:
        return f"give {larger}"
    if is_needles:
        return f"give --needle-count {in_all(supply.needed)}, or {larger}"
    return f"give {in_all(supply.needed):,} documents in all, of which some are searched on, or {larger}"


def _keep(profile: Profile, note: Callable[[str], None]) -> None:
    """Where runs with --method auto find it."""
    try:
        kept = keep_profile(profile)
    except MarsError as error:
        note(f"--method auto will not find the profile: {error}")
        return
    note(f"--method auto takes this profile from now on, from {kept}")
