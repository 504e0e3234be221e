"""Settings for a model on documents, tested on other documents of the user's. What `calibrate` runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from pipeline.errors import GateInconclusive, MarsError, is_failure
from pipeline.settings.calibrate_settings import CalibrateConfig
from pipeline.setup.intake import make_prompts

if TYPE_CHECKING:
    from pipeline.calibrate.bounds import Bounds, Supply
    from pipeline.calibrate.calibration import Calibration
    from pipeline.evaluate.cases import Sides
    from pipeline.evaluate.check_rows import CheckRow
    from pipeline.evaluate.workbench import Deadline
    from pipeline.model.loading import Model
    from pipeline.setup.profile import Profile

Progress = Callable[[str, float], None]  # what is being done, and the seconds left


def _nothing(*_: Any) -> None:
    pass


def run_calibrate(
    config: CalibrateConfig,
    *,
    model: Model | None = None,
    clock: Deadline | None = None,
    progress: Progress = _nothing,
    note: Callable[[str], None] = _nothing,
    check: Callable[[], None] = _nothing,
) -> Calibration:
    """Find settings within the bounds, and write the profile if some pass on the documents held out.

    `model` stands for the one that `config` names, `clock` for `config.minutes` from now. `check` is called
    before every prefill and between the steps of generated answers, and may raise to end all. Raises
    MarsError, of which GateInconclusive, before the weights are loaded, says that there are too few documents
    for anything to pass. That nothing passes is no error but a result without a profile.
    """
    from pipeline.calibrate.bounds import Bounds
    from pipeline.calibrate.phases import Phases
    from pipeline.evaluate.cases import split
    from pipeline.evaluate.check_rows import data_hash
    from pipeline.evaluate.workbench import Deadline
    from pipeline.model.loading import open_model
    from pipeline.setup.profile import write_profile

    clock = clock or Deadline(config.minutes * 60)
    tell = _teller(progress, clock)
    tell("reading and tokenizing")
    model = model or open_model(config)
    for text in model.notes:
        note(text)
    rows = _read(config, model, note)
    bounds = Bounds.of(config)
    sides = split(rows, str(config.seed))
    _check_supplies(bounds, sides, note)
    tell("loading the model")
    check()
    run = Phases(config, model, sides, clock, tell, note, check)
    try:
        result = run.calibrate(data_hash(rows))
    except MarsError:
        raise
    except BaseException as error:  # whatever it is, the row must be named
        if not is_failure(error):
            raise
        raise MarsError(f"{run.bench.running} fails: {type(error).__name__}: {error}") from error
    if result.profile is not None:
        write_profile(config.profile_file, result.profile)
        _keep(result.profile, note)
    return result


def _check_supplies(bounds: Bounds, sides: Sides, note: Callable[[str], None]) -> None:
    """Say what it takes to pass. Raises GateInconclusive where no setting could."""
    supplies = bounds.supplies(
        [(row.sample.task, row.sample.document_key) for row in sides.held_out],
        [row.sample.task for row in (*sides.search, *sides.held_out)],
    )
    for supply in supplies:
        if supply.is_short:
            raise GateInconclusive(f"{supply}; {_remedy(supply)}")
        note(str(supply))


def _remedy(supply: Supply) -> str:
    from pipeline.evaluate.cases import in_all
    from pipeline.suites.samples import NEEDLES

    is_needles = supply.gate.startswith(NEEDLES)
    larger = f"a larger {'--needle-drop' if is_needles else '--max-drop'}"
    if supply.needed is None:
        return f"give {larger}"
    if is_needles:
        return f"give --needle-count {in_all(supply.needed)}, or {larger}"
    return f"give {in_all(supply.needed):,} documents in all, of which some are searched on, or {larger}"


def _keep(profile: Profile, note: Callable[[str], None]) -> None:
    """Where runs with --method auto find it."""
    from pipeline.setup.auto import keep_profile

    try:
        kept = keep_profile(profile)
    except MarsError as error:
        note(f"--method auto will not find the profile: {error}")
        return
    note(f"--method auto takes this profile from now on, from {kept}")


def _teller(progress: Progress, clock: Deadline) -> Callable[[str], None]:
    return lambda text: progress(text, max(0.0, clock.left))


def _read(config: CalibrateConfig, model: Model, note: Callable[[str], None]) -> tuple[CheckRow, ...]:
    from pipeline.evaluate.check_rows import read_rows

    found = read_rows(config, make_prompts(config, model, config.max_new_tokens))
    for message in found.left_out:
        note(f"left out: {message}")
    return found.rows
