"""What a calibration tells: rows of its tables, and sentences."""

from __future__ import annotations

from pipeline.calibration.bounds import Verified
from pipeline.calibration.ladder import Calibration, RungResult
from pipeline.calibration.sensitivity import MASSES
from pipeline.errors import GateFailed
from pipeline.evaluate.drops import NOTHING_PRUNED, hundredths
from pipeline.suites.samples import NEEDLES
from pipeline.texts.words import counted

LADDER_HEADS = ("rung", "expected", "drop held out", "interval", "predicted", "times as fast", "verdict")


def ladder_rows(result: Calibration) -> list[tuple[str, ...]]:
    """Cells under `LADDER_HEADS`: the main gate's drop, expected and measured, and the speed, likewise."""
    unit = result.bounds.main.unit
    tested = {id(each.rung): each for each in result.tested}
    rows: list[tuple[str, ...]] = []
    for rung in result.ladder:
        found = tested.get(id(rung))
        measured = ("-", "-", "-", "not tested") if found is None else _measured(found, result)
        drop, interval, speed_up, verdict = measured
        expected, predicted = f"{hundredths(rung.expected_drop)}{unit}", f"{rung.speed_up:.2f}"
        rows.append((rung.name, expected, drop, interval, predicted, speed_up, verdict))
    return rows


def _measured(tested: RungResult, result: Calibration) -> tuple[str, str, str, str]:
    main = next((gate for gate in tested.gates if gate.gate == result.bounds.main_name), None)
    if main is None:
        return "-", "-", "-", tested.verdict
    drop, unit = main.drop, result.bounds.main.unit
    failed = [gate.gate for gate in tested.gates if gate.verdict == tested.verdict != "pass"]
    return (
        f"{hundredths(drop.drop)}{unit}",
        drop.interval,
        f"{tested.speed_up:.2f}",
        ": ".join([tested.verdict, ", ".join(failed)] if failed else [tested.verdict]),
    )


def _masses(result: Calibration) -> list[float]:
    found = {probe.mass for probe in result.probes}
    return sorted(found & set(MASSES), reverse=True)


def layer_heads(result: Calibration) -> list[str]:
    return ["layer", *(f"{mass:g}, {what}" for mass in _masses(result) for what in ("nats", "pairs"))]


def layer_rows(result: Calibration) -> list[tuple[str, ...]]:
    """Cells under `layer_heads`: divergence from dense with each mass, and the share of pairs attended."""
    found = {(probe.layer, probe.mass): probe for probe in result.probes}
    rows = []
    for layer in sorted({layer for layer, _ in found}):
        cells = [str(layer)]
        for mass in _masses(result):
            probe = found.get((layer, mass))
            cells += ["-", "-"] if probe is None else [f"{probe.divergence:.4f}", f"{probe.attended:.0%}"]
        rows.append(tuple(cells))
    return rows


def lines(result: Calibration) -> list[str]:
    """What there is to say below the tables."""
    found = [
        f"searched on {counted(result.searched, 'row')}: {counted(len(result.ladder), 'rung')}, of which "
        f"{len(result.tested):,} tested on {counted(result.held_out, 'row')} of other documents, up to the "
        f"first that did not pass; {result.seconds / 60:.1f} min"
    ]
    chosen = result.chosen
    if chosen is not None:
        found += [gate_text(gate, result) for gate in chosen.gates]
        found.append(
            f"{result.config.out}: {chosen.rung.name}, {chosen.speed_up:.2f} times as fast as dense "
            f"({chosen.trial.ttft_ms:,.1f} ms to the first token instead of "
            f"{chosen.trial.dense_ttft_ms:,.1f} ms)"
        )
        found += [
            f"nothing was pruned of rows of the task {task!r}: with this profile they run dense"
            for task in chosen.unshown_tasks
            if result.config.tells_tasks_apart
        ]
        found += [
            f"{each.rung.name} did not pass, because of {gate.gate}: {_reason(gate)}"
            for each in result.tested
            for gate in each.gates
            if gate.verdict == each.verdict and gate.judgement.reason is not None
        ]
    return found


def gate_text(gate: Verified, result: Calibration) -> str:
    bound = result.bounds.bound_of(gate.gate)
    drop = gate.drop
    return (
        f"{gate.gate} dropped by {hundredths(drop.drop)}{bound.unit} ({drop.interval} "
        f"at {drop.confidence:.0%}) over {counted(drop.rows, 'row')} of "
        f"{counted(drop.documents, 'document')} held out, bound {bound}: {gate.verdict}"
    )


def raise_unless_held(result: Calibration) -> None:
    """GateFailed, with what became of the first rung, if there is no profile."""
    if result.profile is None:
        raise GateFailed(f"nothing holds, so no profile is written: {_why_nothing(result)}")


def _why_nothing(result: Calibration) -> str:
    if not result.ladder:
        return (
            f"nothing is expected to be faster than dense and to lose no more than {result.bounds.main}; "
            "more --minutes search more"
        )
    if any(each.passes for each in result.tested):
        return "what passed is no faster than dense where it was timed in turns with it"
    first = result.tested[0]
    if not first.trial.complete:
        return f"no time was left to test {first.rung.name}; give more --minutes"
    gate = first.worst_gate
    needed, more = gate.judgement.documents_needed, ""
    if gate.judgement.reason is not None:
        more = f"; {_reason(gate)}"
    elif needed is not None:
        more = f"; about {needed:,} documents would tell"
    return f"the first rung, {first.rung.name}, did not pass: {gate_text(gate, result)}{more}"


def _reason(gate: Verified) -> str:
    """Why a gate cannot tell, and what would help."""
    reason = gate.judgement.reason or ""
    if reason == NOTHING_PRUNED and gate.gate.startswith(NEEDLES):
        return f"{reason}; give longer --needle-lengths"
    return reason
