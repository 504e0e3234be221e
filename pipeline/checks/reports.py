"""What a check tells: sentences, JSON, JUnit XML and Markdown."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from pipeline.checks.gates import ALL, SHARES, UNITS, CheckResult, Gate, Measure
from pipeline.errors import GateFailed, GateInconclusive
from pipeline.evaluate.drops import hundredths
from pipeline.outputs.replacing import JUNIT_NAME, is_baseline, is_junit, is_result, refuse_foreign_file
from pipeline.settings.check_settings import CheckConfig
from pipeline.storage.whole_file import failures_told, writing
from pipeline.suites.by_name import NOT_COMPARABLE
from pipeline.texts.shown import in_markdown, in_xml, markdown_table
from pipeline.texts.words import counted

_AGAINST = {"dense": "dense", "accepted": "its accepted scores"}
MOST_LEFT_OUT = 20  # messages that JSON repeats; the notes of the run told all


def raise_verdict(result: CheckResult) -> None:
    """GateFailed or GateInconclusive, unless the check passed."""
    if result.verdict != "pass":
        kind = GateFailed if result.verdict == "fail" else GateInconclusive
        raise kind(verdict_text(result))


def verdict_text(result: CheckResult) -> str:
    """One sentence: the gates that made the verdict."""
    gates = [gate for gate in result.gates if gate.decides and gate.verdict == result.verdict]
    sentences = [gate_text(result, gate) for gate in gates]
    return "; ".join(sentences[:3]) + (f"; and {len(gates) - 3} more tasks" if len(gates) > 3 else "")


def gate_text(result: CheckResult, gate: Gate) -> str:
    config, drop = result.config, gate.drop
    of_task = "" if gate.task == ALL or len(result.gates) == 1 else f" of {gate.task}"
    changed = "rose" if config.gate_metric == "nll" else "dropped"
    bound = f"--max-drop {config.bound}"
    fell = f"{config.gate_metric}{of_task} {changed} by {amount(gate, drop.drop)} ({interval(result, gate)})"
    if gate.judgement.reason is not None:
        return f"{fell}, but {gate.judgement.reason}"
    if gate.verdict == "fail":
        return f"{fell}, more than {bound} allows"
    if gate.verdict == "pass":
        return f"{fell}, within {bound}"
    needed = gate.judgement.documents_needed
    more = "more documents are needed" if needed is None else f"about {needed:,} documents like these would"
    return (
        f"{fell}: {counted(drop.rows, 'row')} of {counted(drop.documents, 'document')} cannot tell whether "
        f"that is within {bound}; {more}"
    )


def amount(gate: Gate, value: float) -> str:
    """`1.2 points`, or `1.2%` of dense's."""
    return f"{hundredths(value)}{'%' if gate.drop.relative else ' points'}"


def interval(result: CheckResult, gate: Gate) -> str:
    """The drop's, or of which rows it alone is told."""
    drop = gate.drop
    if result.config.scope == "rows":
        since = "since they were accepted" if result.against == "accepted" else "against dense"
        return f"these rows alone, {since}"
    return f"{drop.interval} at {drop.confidence:.0%}"


def measure_text(measure: Measure, value: float | None) -> str:
    if value is None:
        return "-"
    unit = UNITS.get(measure.name)
    if unit is None:
        return f"{value:.1%}"
    return f"{value:.0f} {unit}" if unit == "tokens" else f"{round(value, 4) + 0:.4f} {unit}"


def speed_text(result: CheckResult) -> str:
    """One line: times, and what was kept."""
    speed = result.speed
    dense, method = speed["dense_ttft_p50_ms"], speed["method_ttft_p50_ms"]
    kept = ", ".join(f"{label} {speed[name]:.1%}" for name, label in SHARES.items())
    times = (
        f"{method:,.1f} ms" if dense is None else f"{dense:,.1f} ms dense, {method:,.1f} ms {result.method}"
    )
    gained = (
        " (no speed-up is told: an earlier run timed a part of the rows)"
        if dense is None
        else f", {speed['speed_up']:.3f} times as fast"
    )
    return f"TTFT p50 {times}{gained}; kept of dense: {kept}"


def counts_text(result: CheckResult) -> str:
    """One line: rows, and what was cut."""
    counts = result.counts
    parts = [f"{counted(counts['rows'], 'row')} of {counted(counts['documents'], 'document')}"]
    if counts["left_out"]:
        parts.append(f"{counts['left_out']:,} left out")
    if counts["truncated_rows"]:
        tokens = counted(counts["truncated_tokens"], "token")
        parts.append(f"{counted(counts['truncated_rows'], 'document')} cut in the middle by {tokens}")
    if counts["references_cut"]:
        parts.append(
            f"{counted(counts['references_cut'], 'reference')} cut to "
            f"{counted(result.config.max_new_tokens, 'token')}"
        )
    parts.append(f"{counted(counts['forced_tokens'], 'token')} of answers forced")
    if result.config.row_suites:
        parts.append(f"scores {NOT_COMPARABLE}")
    return ", ".join(parts)


def as_dict(result: CheckResult) -> dict[str, Any]:
    """All of a result as JSON can hold it: a number that is infinite is null."""
    content = {
        "verdict": result.verdict,
        "message": verdict_text(result),
        "metric": result.config.gate_metric,
        "max_drop": str(result.config.bound),
        "scope": result.config.scope,
        "against": result.against,
        "gates": [_gate(result, gate) for gate in result.gates],
        "speed": dict(result.speed),
        "counts": dict(result.counts),
        "left_out": list(result.left_out[:MOST_LEFT_OUT]),
        "suites": NOT_COMPARABLE if result.config.row_suites else None,
        "about": dict(result.about),
        "settings": result.config.resolved(),
        "rows": [_row(pair) for pair in result.pairs],
    }
    return _finite(content)


def write_reports(result: CheckResult) -> None:
    """The files that were asked for. Raises StorageError."""
    config = result.config
    if config.result_file is not None:
        with writing(config.result_file) as file:
            file.write(json.dumps(as_dict(result), indent=1, ensure_ascii=False).encode() + b"\n")
    if config.junit is not None:
        with writing(Path(config.junit)) as file:
            junit(result).write(file, encoding="utf-8", xml_declaration=True)
    if config.markdown is not None:
        # added to what is there: a CI's summary is a file to which every step adds
        with failures_told(Path(config.markdown)), Path(config.markdown).open("a", encoding="utf-8") as end:
            end.write(markdown(result))


@contextmanager
def no_older_reports(config: CheckConfig) -> Iterator[None]:
    """Remove the reports of an earlier check if this one ends without any, lest they pass for its own."""
    try:
        yield
    except BaseException:
        for path in (config.result_file, config.junit):
            if path is not None:
                with suppress(OSError):
                    Path(path).unlink(missing_ok=True)
        raise


def refuse_foreign_files(config: CheckConfig) -> None:
    """A ConfigError, before anything is read, for a file that was asked for and is somebody else's."""
    if config.result_file is not None:
        refuse_foreign_file("--out", config.result_file, is_result)
    if config.junit is not None:
        refuse_foreign_file("--junit", Path(config.junit), is_junit)
    if config.baseline is not None and config.overwrite_baseline:
        refuse_foreign_file("--baseline", Path(config.baseline), is_baseline)


def junit(result: CheckResult) -> ElementTree.ElementTree[ElementTree.Element]:
    """A test case for each gate that decides; inconclusive ones are failures, as their exit code says."""
    gates = [gate for gate in result.gates if gate.decides]
    failures = [gate for gate in gates if gate.verdict != "pass"]
    counts = {"tests": str(len(gates)), "failures": str(len(failures)), "errors": "0", "skipped": "0"}
    root = ElementTree.Element("testsuites", {"name": JUNIT_NAME, **counts})
    suite = ElementTree.SubElement(
        root,
        "testsuite",
        {
            "name": in_xml(f"{result.method} against {_AGAINST[result.against]}"),
            "timestamp": result.about["started"],
            **counts,
        },
    )
    for gate in gates:
        name = in_xml(f"{gate.task}: {result.config.gate_metric} within {result.config.bound}")
        case = ElementTree.SubElement(suite, "testcase", {"classname": "marsinfer.check", "name": name})
        text = in_xml(gate_text(result, gate))
        if gate.verdict == "pass":
            ElementTree.SubElement(case, "system-out").text = text
        else:
            ElementTree.SubElement(case, "failure", {"type": gate.verdict, "message": text}).text = text
    return ElementTree.ElementTree(root)


def heads(result: CheckResult) -> tuple[str, ...]:
    """Of the table by task."""
    return ("task", "rows", "documents", result.against, result.method, "drop", "interval", "verdict")


def table_rows(result: CheckResult) -> list[tuple[str, ...]]:
    """Cells of the table by task, under `heads`; the verdict of a gate that does not decide in brackets."""
    return [
        (
            gate.task,
            f"{gate.drop.rows:,}",
            f"{gate.drop.documents:,}",
            f"{gate.drop.dense:.4f}",
            f"{gate.drop.method:.4f}",
            amount(gate, gate.drop.drop).replace(" points", " pt"),
            interval(result, gate),
            gate.verdict if gate.decides else f"({gate.verdict})",
        )
        for gate in result.gates
    ]


def measure_rows(result: CheckResult) -> list[tuple[str, str, str]]:
    """Name, dense's and the method's, over all rows."""
    measures = result.gates[-1].measures
    return [(m.name, measure_text(m, m.dense), measure_text(m, m.method)) for m in measures]


def markdown(result: CheckResult) -> str:
    about = result.about
    lines = [
        f"### {in_markdown(result.method)} against {_AGAINST[result.against]}: {result.verdict}",
        "",
        in_markdown(verdict_text(result)),
        "",
        markdown_table(heads(result), table_rows(result), in_markdown),
        "",
        markdown_table(("measure, all rows", "dense", result.method), measure_rows(result), in_markdown),
        "",
        in_markdown(f"{counts_text(result)}. {speed_text(result)}."),
        "",
        f"Model {in_markdown(about['name'])} on {in_markdown(about['device'])}, "
        f"data `{about['data_sha256'][:12]}`.",
        "",
    ]
    return "\n".join(lines) + "\n"


def _gate(result: CheckResult, gate: Gate) -> dict[str, Any]:
    drop, tells_interval = gate.drop, result.config.scope == "documents"
    return {
        "task": gate.task,
        "verdict": gate.verdict,
        "decides": gate.decides,
        "rows": drop.rows,
        "documents": drop.documents,
        result.against: drop.dense,
        "method": drop.method,
        "unit": "percent of dense" if drop.relative else "points",
        "drop": drop.drop,
        "low": drop.low if tells_interval else None,
        "high": drop.high if tells_interval else None,
        "confidence": drop.confidence if tells_interval else None,
        "bound": gate.judgement.bound,
        "documents_needed": gate.judgement.documents_needed,
        "reason": gate.judgement.reason,
        "measures": {m.name.replace(" ", "_"): {"dense": m.dense, "method": m.method} for m in gate.measures},
    }


def _row(pair: Any) -> dict[str, Any]:
    dense, method = pair.dense.score, pair.method.score
    row = {
        "id": dense.id,
        "task": dense.task,
        "row_sha256": pair.row.row_hash,
        "prompt_tokens": dense.prompt_tokens,
        "truncated_tokens": pair.row.document.truncated_tokens,
        "tokens": dense.tokens,
        "correct": {"dense": dense.correct, "method": method.correct},
        "nll": {"dense": dense.nll, "method": method.nll},
        "ttft_ms": {"dense": dense.ttft_ms, "method": method.ttft_ms},
        "agreed": method.agreed,
        "divergence": method.divergence,
        "parted_at": method.parted_at,
    }
    if pair.dense.generated is not None:
        row["answer"] = {"dense": pair.dense.generated, "method": pair.method.generated}
    return row


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
