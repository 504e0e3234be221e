"""What a run comes to: counts, times and shares, read once and kept in a few numbers a row."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.report.layer_shares import LAYER_COLUMNS, LayerShares, add_layers
from pipeline.report.output_reading import Run
from pipeline.setup.guard import kind_of
from pipeline.texts.words import percent_of

PHASES = {"queue_ms": "queue", "tokenize_ms": "tokenize", "prefill_ms": "prefill", "decode_ms": "decode"}
WEIGHED = {
    "kept_ratio": "tokens kept",
    "ffn_ratio": "FFN passed",
    "attention_ratio": "attention",
    "flops_ratio": "operations",
}
SUMMED = ("prompt_tokens", "new_tokens", "truncated_tokens", "kv_bytes")
TIMED = ("ttft_ms", "document_tokens", "pack_documents", *PHASES)
TIMES = pa.schema(
    [("method", pa.dictionary(pa.int32(), pa.string())), *((name, pa.float32()) for name in TIMED)]
)
FIRST_ERRORS = 3
COLUMNS = tuple(
    dict.fromkeys(
        [
            *("id", "row", "status", "error_type", "error_message", "method", "guard"),
            *(*TIMED, *SUMMED, *WEIGHED, *LAYER_COLUMNS),
        ]
    )
)


@dataclass(kw_only=True)
class ErrorKind:
    """Rows of one `error_type`: how many, and (row, id, message) of the first."""

    count: int = 0
    first: list[tuple[int, str, str]] = field(default_factory=list)


@dataclass(kw_only=True)
class Figures:
    """One run in numbers: four bytes for each answered row and time, and what does not grow with the rows."""

    run: Run
    status: Counter[str] = field(default_factory=Counter)
    errors: dict[str, ErrorKind] = field(default_factory=dict)
    methods: Counter[str] = field(default_factory=Counter)
    guarded: Counter[str] = field(default_factory=Counter)  # rows that a guard had run dense, by its reason
    sums: Counter[str] = field(default_factory=Counter)
    longest: int = 0
    layers: LayerShares | None = None
    _prefilled_tokens: int = 0  # of prompts whose prefill was timed
    _timed: list[pa.Table] = field(default_factory=lambda: [TIMES.empty_table()])
    _weighed: dict[str, float] = field(default_factory=lambda: defaultdict(float))  # shares times tokens
    _weights: dict[str, float] = field(default_factory=lambda: defaultdict(float))  # tokens of those shares

    @property
    def rows(self) -> int:
        return self.status.total()

    @property
    def answered(self) -> int:
        return self.status["ok"]

    def times(self, name: str, method: str | None = None) -> np.ndarray:
        """(n,) a time in ms, or count, of each answered row, of all methods or one; NaN where unknown."""
        answered = pa.concat_tables(self._timed)
        if method is not None:
            answered = answered.filter(pc.equal(answered["method"], method))
        return answered[name].to_numpy()

    def percentile(self, name: str, percent: float) -> float | None:
        values = self.times(name)
        values = values[np.isfinite(values)]
        return float(np.percentile(values, percent)) if len(values) else None

    def share(self, name: str) -> float | None:
        """Mean of a ratio over the rows that have one, weighed by prompt tokens."""
        tokens = self._weights[name]
        return self._weighed[name] / tokens if tokens else None

    def prefill_rate(self) -> float | None:
        """Prompt tokens a second of prefill, all rows of a pack together."""
        of_rows = self.times("prefill_ms") / np.maximum(self.times("pack_documents"), 1)
        seconds = float(np.nansum(of_rows.astype(np.float64))) / 1e3
        return self._prefilled_tokens / seconds if seconds else None

    def packed_share(self) -> float:
        """Share of the answered rows that were not alone in their pack."""
        packs = self.times("pack_documents")
        return float((packs > 1).mean()) if len(packs) else 0.0

    def add(self, table: pa.Table) -> None:
        """Count the rows of a table with the columns `COLUMNS`."""
        status = table["status"].to_pylist()
        self.status.update(str(value) for value in status)
        self.guarded.update(kind_of(reason) for reason in table["guard"].to_pylist() if reason is not None)
        self._add_errors(table, [n for n, value in enumerate(status) if value != "ok"])
        table = table.filter(pa.array([value == "ok" for value in status], pa.bool_()))
        if table.num_rows == 0:
            return
        methods = [value or "-" for value in table["method"].to_pylist()]
        self.methods.update(methods)
        times = [table[name].cast(pa.float32(), safe=False) for name in TIMED]
        self._timed.append(pa.table([pa.array(methods, TIMES.types[0]), *times], TIMES))
        tokens = _numbers(table, "prompt_tokens")
        self.longest = max(self.longest, int(np.nan_to_num(tokens).max(initial=0)))
        self._prefilled_tokens += int(np.nansum(tokens[np.isfinite(_numbers(table, "prefill_ms"))]))
        for name in SUMMED:
            self.sums[name] += int(np.nansum(_numbers(table, name)))
        for name in WEIGHED:
            shares = _numbers(table, name)
            known = np.isfinite(shares) & np.isfinite(tokens)
            self._weighed[name] += float((shares * tokens)[known].sum())
            self._weights[name] += float(tokens[known].sum())
        self.layers = add_layers(self.layers, table)

    def _add_errors(self, table: pa.Table, places: list[int]) -> None:
        for place in places:
            kind = self.errors.setdefault(str(table["error_type"][place].as_py()), ErrorKind())
            kind.count += 1
            if len(kind.first) < FIRST_ERRORS:
                row, id, message = (table[name][place].as_py() for name in ("row", "id", "error_message"))
                told = (message or "").removeprefix(f"{id}: ")  # of a document whose file is its id
                kind.first.append((row, id, told))


def _numbers(table: pa.Table, name: str) -> np.ndarray:
    return table[name].to_numpy(zero_copy_only=False).astype(np.float64)


def figures_of(run: Run) -> Figures:
    """Read a run's rows once."""
    figures = Figures(run=run)
    for table in run.tables(COLUMNS):
        figures.add(table)
    return figures


def headline(figures: Figures) -> Iterator[tuple[str, str]]:
    """What to know of a run first, as name and value; what is not known is left out."""
    status, sums = figures.status, figures.sums
    yield "method", ", ".join(figures.methods) or "-"
    yield "rows", f"{figures.rows:,}" + ("" if figures.run.finished else " so far")
    yield "answered", _of(status["ok"], figures.rows)
    if status["error"]:
        yield "errors", _of(status["error"], figures.rows)
    if status["skipped"]:
        yield "skipped", _of(status["skipped"], figures.rows)
    if figures.guarded:
        kinds = ", ".join(f"{count:,} {kind}" for kind, count in figures.guarded.most_common())
        yield "dense by the guard", f"{figures.guarded.total():,} ({kinds})"
    yield "prompt tokens", f"{sums['prompt_tokens']:,}"
    yield "longest prompt", f"{figures.longest:,}"
    for percent in (50, 95):
        yield f"TTFT p{percent}", milliseconds(figures.percentile("ttft_ms", percent))
    rate = figures.prefill_rate()
    yield "prefill", "-" if rate is None else f"{rate:,.0f} tokens/s"
    for name, label in WEIGHED.items():
        yield label, percent_of(figures.share(name))
    yield "K/V stored", f"{sums['kv_bytes'] / 1e9:,.3f} GB"
    yield "new tokens", f"{sums['new_tokens']:,}"
    if sums["truncated_tokens"]:
        yield "tokens cut off", f"{sums['truncated_tokens']:,}"


def _of(count: int, total: int) -> str:
    return f"{count:,}" if count == total else f"{count:,} ({count / total:.1%})"


def milliseconds(value: float | None) -> str:
    """A time in the unit in which it is short."""
    if value is None or not np.isfinite(value):
        return "-"
    if value < 1_000:
        return f"{value:,.1f} ms" if value < 100 else f"{value:,.0f} ms"
    return f"{value / 1e3:,.2f} s" if value < 10_000 else f"{value / 1e3:,.1f} s"


def phases(figures: Figures) -> list[tuple[str, float | None, float | None]]:
    """Of each phase, median and 95th percentile in ms, as the rows saw them."""
    return [
        (label, figures.percentile(name, 50), figures.percentile(name, 95)) for name, label in PHASES.items()
    ]


DECIDING = "settings_that_decide"
ABOUT = {"model": "model", "device": "device", "started": "date"}


def about_run(metadata: dict[str, Any]) -> list[tuple[str, str]]:
    """Model, device and date of a run, as names and values; of an unfinished one they may not be known."""
    told = {label: str(metadata[name]) for name, label in ABOUT.items() if metadata.get(name)}
    if "date" in told:
        told["date"] = f"{told['date'][:16].replace('T', ' ')} UTC"
    return list(told.items())


def configuration(metadata: dict[str, Any]) -> list[tuple[str, list[tuple[str, str]]]]:
    """A run's metadata in two parts, as names and values; settings without a value are left out."""
    config = metadata.get("config", {})
    about = {name: value for name, value in metadata.items() if name not in ("config", DECIDING)}
    parts = {
        "configuration": {**config, **about},  # the device that auto has found
        "settings that decide an answer": metadata.get(DECIDING, {}),
    }
    told = {
        name: [pair for pair in _flat(part) if pair[1] not in ("", "None", "[]", "{}")]
        for name, part in parts.items()
    }
    return [(name, pairs) for name, pairs in told.items() if pairs]


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(value, dict) and (value or not name):
        for key, inner in value.items():
            yield from _flat(inner, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list) and value and not any(isinstance(item, dict | list) for item in value):
        yield name, ", ".join(map(str, value))
    else:
        yield name, str(value)
