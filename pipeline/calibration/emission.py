"""The profile of the rung that is chosen: its settings, and how all rungs were tested."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, fields
from typing import Any

from pipeline.calibration.bounds import Bounds, Verified
from pipeline.calibration.ladder import Rung, RungResult
from pipeline.evaluate.check_rows import CheckRow
from pipeline.evaluate.workbench import sparse_from
from pipeline.families.exit_maps import MapsHeader
from pipeline.kernels.sparse import first_choosing
from pipeline.model.loading import LoadedModel
from pipeline.pruning.base import PruningMethod
from pipeline.pruning.capabilities import exit_maps_of
from pipeline.pruning.shape import ModelShape
from pipeline.settings.calibrate_settings import CalibrateConfig
from pipeline.setup.guard import spoken_for
from pipeline.setup.profile import EXIT_MAPS, FORMAT, Profile
from pipeline.suites.samples import NEEDLES
from pipeline.texts.versions import timestamp, versions


def make_profile(
    config: CalibrateConfig,
    model: LoadedModel,
    chosen: RungResult,
    tested: Sequence[RungResult],
    ladder: Sequence[Rung],
    cases: Sequence[CheckRow],
    data_hash: str,
) -> Profile:
    """`tested` are the first rungs of the `ladder`; `cases` are those held out, which they were tested on."""
    variant, bounds = chosen.rung.variant, Bounds.of(config)
    lengths = [case.document.prompt_tokens for case in cases]
    about: dict[str, Any] = {
        "format": FORMAT,
        "model": model.name,
        "fingerprint": model.fingerprint,
        "device": model.device_name(),
        "dtype": str(model.dtype).removeprefix("torch."),
        "date": timestamp(),
        "data_sha256": data_hash,
        "objective": "ttft",
        **({} if model.rope_scaling is None else {"rope_scaling": model.rope_scaling}),
        **_exit_maps(variant.method, model.shape),
        "shape": _told(model.shape),
        "lengths": {"min": min(lengths), "p50": int(statistics.median(lengths)), "max": max(lengths)},
        "measured": {
            "dense_ttft_ms": round(chosen.trial.dense_ttft_ms, 3),
            "ttft_ms": round(chosen.trial.ttft_ms, 3),
            "speed_up": round(chosen.speed_up, 4),
            "gates": _gates(chosen, bounds),
        },
        "ladder": [
            *(_tested(each, bounds) for each in tested),
            *({"rung": rung.name, "verdict": "not tested"} for rung in ladder[len(tested) :]),
        ],
        "guard": spoken_for(
            _tasks(config, chosen), chosen.trial.scores, sparse_from=sparse_from_of(model, variant.method)
        ),
        "versions": versions(),
    }
    batch = {
        "method": variant.method.name,
        "linear_dtype": variant.linears,
        "settings": asdict(variant.method),
    }
    return Profile(about=about, batch=batch)


def _tasks(config: CalibrateConfig, chosen: RungResult) -> list[str]:
    """The tasks that were told apart and whose rows have shown something; needles are none of a user's."""
    if not config.tells_tasks_apart:
        return []
    return [task for task in chosen.shown_tasks if not task.startswith(NEEDLES)]


def _exit_maps(method: PruningMethod, shape: ModelShape) -> dict[str, str]:
    """The digest of the maps that a method was tested with, if it has any."""
    wanted = exit_maps_of(method, shape)
    return {} if wanted is None else {EXIT_MAPS: MapsHeader.of(wanted[0]).digest}


def _told(shape: ModelShape) -> dict[str, Any]:
    """The dimensions of a model, and what else its layers have."""
    return {
        each.name: getattr(shape, each.name)
        for each in fields(shape)
        if getattr(shape, each.name) != each.default
    }


def sparse_from_of(model: LoadedModel, method: PruningMethod) -> int | None:
    """Prompt tokens from which on attention chooses blocks on the model's device; None: it never does."""
    chooses = first_choosing(method.masses_in(model.shape)) is not None
    return sparse_from(model) if chooses else None


def _tested(tested: RungResult, bounds: Bounds) -> dict[str, Any]:
    return {
        "rung": tested.rung.name,
        "verdict": tested.verdict,
        "speed_up": round(tested.speed_up, 4),
        "gates": _gates(tested, bounds),
    }


def _gates(tested: RungResult, bounds: Bounds) -> dict[str, dict[str, Any]]:
    return {gate.gate.replace(" ", "-"): _gate(gate, bounds) for gate in tested.gates}


def _gate(gate: Verified, bounds: Bounds) -> dict[str, Any]:
    drop = gate.drop
    return {
        "bound": str(bounds.bound_of(gate.gate)),
        "verdict": gate.verdict,
        "dense": round(drop.dense, 6),
        "method": round(drop.method, 6),
        "drop": round(drop.drop, 4),
        "low": round(drop.low, 4),
        "high": round(drop.high, 4),
        "rows": drop.rows,
        "documents": drop.documents,
    }
