"""What a calibration tells: rows of its tables, and sentences."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pipeline.errors import GateFailed
from pipeline.quality.search import Trial, pareto
from pipeline.quality.sensitivity import ACTIONS, SPARSE_MASSES
from pipeline.words import counted

if TYPE_CHECKING:
    from pipeline.quality.bounds import Verified
    from pipeline.quality.calibration import Calibration
    from pipeline.quality.verification import Verification

FEW = 20  # documents, below which an interval is narrower than it claims
HEADS = ("settings", "drop searched", "TTFT", "times as fast", "drop held out", "interval", "verdict")


def frontier(result: Calibration) -> list[Trial]:
    """All that is as fast and as good as can be, of those within the bounds and of all; fastest first."""
    within = [trial for trial in result.trials if not trial.exceeds]
    chosen = {id(trial): trial for trial in (*pareto(within), *pareto(result.trials))}
    return sorted(chosen.values(), key=lambda trial: trial.ttft_ms)


def frontier_rows(result: Calibration) -> list[tuple[str, ...]]:
    """Cells under `HEADS`; what was not verified has no drop there."""
    verified = {id(each.trial): each for each in result.verifications}
    unit = result.bounds.main.unit
    rows: list[tuple[str, ...]] = [
        ("dense", f"0.00{unit}", f"{result.dense_ttft_ms:,.1f} ms", "1.00", "-", "-", "-")
    ]
    for trial in reversed(frontier(result)):
        verification = verified.get(id(trial))
        rows.append(
            (
                trial.name,
                f"{trial.drop + 0:.2f}{unit}",
                f"{trial.ttft_ms:,.1f} ms",
                f"{trial.speed_up:.2f}",
                *(("-", "-", "-") if verification is None else _verified_cells(verification, unit)),
            )
        )
    return rows


def _verified_cells(verification: Verification, unit: str) -> tuple[str, str, str]:
    main = next((gate for gate in verification.gates if not gate.is_needles), None)
    if main is None:
        return "-", "-", verification.words
    drop = main.drop
    return f"{drop.drop + 0:.2f}{unit}", f"{drop.low + 0:.2f} to {drop.high + 0:.2f}", verification.words


def layer_heads(result: Calibration) -> list[str]:
    actions = _probed(result)
    return ["layer", *(f"{action}, {what}" for action in actions for what in ("nats", "ms saved"))]


def _probed(result: Calibration) -> list[str]:
    found = {row.action for row in result.sensitivities}
    return [action for action in ACTIONS if action in found]


def layer_rows(result: Calibration) -> list[tuple[str, ...]]:
    """Cells under `layer_heads`: rises of the answers' nll with their standard errors, and time saved.

    Of block-sparse attention, which is probed with several masses, with the one probed first.
    """
    found = {
        (row.layer, row.action): (row, saved)
        for row, saved in zip(result.sensitivities, result.saved_ms, strict=True)
        if row.action != "sparse" or row.mass == SPARSE_MASSES[0]
    }
    rows = []
    for layer in sorted({layer for layer, _ in found}):
        cells = [str(layer)]
        for action in _probed(result):
            if (layer, action) not in found:
                cells += ["-", "-"]
                continue
            row, saved = found[layer, action]
            cells += [f"{row.nll_rise + 0:.4f}±{row.nll_error:.4f}", f"{saved:.2f}"]
        rows.append(tuple(cells))
    return rows


def lines(result: Calibration) -> list[str]:
    """What there is to say below the tables."""
    complete = sum(trial.complete for trial in result.trials)
    cost = result.cost
    found = [
        f"searched on {counted(result.searched, 'row')}: {len(result.trials):,} of {result.candidates:,} "
        f"candidates, {len(result.trials) - complete:,} of them given up; verified on "
        f"{counted(result.held_out, 'row')} of other documents; {result.seconds / 60:.1f} min",
        f"cost model: {cost.relative_error:.1%} off in the median, of {cost.observations:,} prefills",
    ]
    chosen = result.chosen
    if chosen is not None:
        found += [f"{gate_text(gate, result)}" for gate in chosen.gates]
        documents = min(gate.drop.clusters for gate in chosen.gates)
        if documents < FEW:
            found.append(
                f"of {counted(documents, 'document')} an interval is narrower than it claims; "
                "calibrate on more"
            )
        found.append(
            f"{result.config.out}: {chosen.trial.name}, {chosen.speed_up:.2f} times as fast as dense "
            f"({chosen.ttft_ms:,.1f} ms to the first token instead of {chosen.dense_ttft_ms:,.1f} ms)"
        )
    return found


def gate_text(gate: Verified, result: Calibration) -> str:
    bound = result.bounds.bound_of(gate.gate)
    drop = gate.drop
    return (
        f"{gate.gate} dropped by {drop.drop + 0:.2f}{bound.unit} ({drop.low + 0:.2f} to {drop.high + 0:.2f} "
        f"at {drop.confidence:.0%}) over {counted(drop.rows, 'row')} of "
        f"{counted(drop.clusters, 'document')} held out, bound {bound}: {gate.judgement.verdict}"
    )


def score_name(result: Calibration) -> str:
    return result.bounds.main_name


def raise_unless_held(result: Calibration) -> None:
    """GateFailed, with what came nearest, if there is no profile."""
    if result.profile is not None:
        return
    tried = [each for each in result.verifications if each.complete]
    if tried:
        nearest = min(tried, key=lambda each: each.excess)
        gate = nearest.worst_gate
        more, unit = "", result.bounds.main.unit
        if nearest.words == "not faster":
            more = f", but no faster than dense ({nearest.speed_up:.2f} times)"
        elif nearest.diverges:
            more = (
                f"; so few rows show little, and by its divergence from dense it should lose "
                f"{nearest.expected_drop:.2f}{unit}"
            )
        elif gate.judgement.rows_needed is not None:
            more = (
                f"; about {gate.judgement.rows_needed:,} rows would tell, or --accept-inconclusive takes it"
            )
        raise GateFailed(
            f"nothing holds, so no profile is written; nearest came {nearest.trial.name}: "
            f"{gate_text(gate, result)}{more}"
        )
    if result.verifications:
        raise GateFailed(
            "nothing holds, so no profile is written: all that was verified lost far more than allowed, or "
            "the time ran out; give more --minutes or a larger --max-drop"
        )
    if result.held_out:
        raise GateFailed(
            "nothing holds, so no profile is written: no time was left to verify any on the "
            f"{counted(result.held_out, 'row')} held out; give more --minutes"
        )
    raise GateFailed(f"nothing holds, so no profile is written: {_nothing_found(result.trials, result)}")


def _nothing_found(trials: Sequence[Trial], result: Calibration) -> str:
    faster = [trial for trial in trials if trial.complete and trial.speed_up > 1]
    if not faster:
        return "no settings that were tried to the end are faster than dense here"
    best = min(faster, key=lambda trial: trial.drop)
    unit = result.bounds.main.unit
    return (
        f"the mildest of the {len(faster):,} settings that are faster than dense, {best.name}, lost "
        f"{best.drop + 0:.2f}{unit} on the {counted(result.searched, 'row')} searched on, or needles"
    )
