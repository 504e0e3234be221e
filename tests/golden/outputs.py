"""What runs write: columns with their types, and the keys of what files and summaries say of themselves."""

from __future__ import annotations

import io
import json
import shlex
import shutil
import tomllib
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow.parquet as pq
import pytest

from golden import BEFORE
from golden.calls import ASK, TINY
from golden.surface import plain_surroundings
from marsinfer_cli.app import run
from pipeline.calibration.bounds import Verified
from pipeline.calibration.emission import make_profile
from pipeline.calibration.ladder import Rung, RungResult
from pipeline.evaluate.drops import Paired
from pipeline.evaluate.workbench import Trial
from pipeline.model.loading import open_model
from pipeline.model.variant import Variant
from pipeline.pruning.marsinfer import MarsInfer
from pipeline.settings.calibrate_settings import CalibrateConfig
from pipeline.settings.model_settings import ModelSettings
from pipeline.setup.profile import write_profile

RUN = f"{ASK} {TINY} --max-new-tokens 2 --quiet"
CHECK = (
    f"check in.jsonl {RUN} --method marsinfer --set start_layer=0 --set eta=0.3 --set prefix=0 --set window=1"
    " --reference-column answer --task-column task --scope rows --metric nll --max-drop 99%"
)
RUNS = {
    "batch": f"batch in.jsonl out.parquet {RUN} --json",
    "batch with --save-selection": f"batch in.jsonl selection.parquet {RUN} --save-selection",
    "batch to JSONL": f"batch in.jsonl out.jsonl {RUN}",
    "batch --dry-run": f"batch in.jsonl none.parquet {RUN} --dry-run --json",
    "check": f"{CHECK} --out result.json --baseline dense.parquet",
}
JSON_TYPES = {
    type(None): "null",
    bool: "boolean",
    int: "integer",
    float: "number",
    str: "string",
    list: "array",
    dict: "object",
}


def make_outputs(folder: Path) -> dict[str, str]:
    """All `RUNS` in an empty folder; what each printed on stdout."""
    shutil.copy(BEFORE / "in.jsonl", folder)
    with plain_surroundings(), pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        printed = {name: _printed(line) for name, line in RUNS.items()}
        write_a_profile(folder / "profile.toml")
    return printed


def _printed(line: str) -> str:
    printed = io.StringIO()
    with redirect_stdout(printed), redirect_stderr(io.StringIO()):
        assert run(shlex.split(line)) == 0, line
    return printed.getvalue()


def columns(folder: Path) -> dict[str, Any]:
    """Names and types in the order of the file; of JSON lines, the keys with their JSON types."""
    rows = [json.loads(line) for line in (folder / "out.jsonl").open(encoding="utf-8")]
    of_rows = types(rows)
    return {
        "batch": _columns(folder / "out.parquet"),
        "batch with --save-selection": _columns(folder / "selection.parquet"),
        "batch to JSONL": {key: of_rows[f"[].{key}"] for key in rows[0]},
        "baseline of check": _columns(folder / "dense.parquet"),
    }


def _columns(path: Path) -> dict[str, str]:
    return {
        field.name: f"{field.type}{'' if field.nullable else ' not null'}" for field in pq.read_schema(path)
    }


def metadata(folder: Path, printed: dict[str, str]) -> dict[str, Any]:
    """The keys, with the JSON types of their values, of everything but rows that says how it was made."""
    output, baseline = (pq.read_schema(folder / name).metadata for name in ("out.parquet", "dense.parquet"))
    sidecar = json.loads((folder / "out.jsonl.run.json").read_text(encoding="utf-8"))
    return {
        "Arrow metadata `marsinfer` of batch": types(json.loads(output[b"marsinfer"])),
        "out.jsonl.run.json of batch": types({**sidecar, "marsinfer": {}, "columns": {}}),
        "summary of batch --json": types(json.loads(printed["batch"])),
        "batch --dry-run --json": types(json.loads(printed["batch --dry-run"])),
        "check --out": types(json.loads((folder / "result.json").read_text(encoding="utf-8"))),
        "Arrow metadata `marsinfer_baseline` of check": types(json.loads(baseline[b"marsinfer_baseline"])),
        "profile of calibrate": types(tomllib.loads((folder / "profile.toml").read_text(encoding="utf-8"))),
    }


def types(value: Any) -> dict[str, str]:
    """The JSON type of every value by its place: of `{"a": [{"b": 1}]}`, `a` is an array, `a[].b` an integer.

    Several types at one place stand together.
    """
    found: dict[str, set[str]] = {}
    for name, kind in _types(value, ""):
        found.setdefault(name, set()).add(kind)
    return {name: " or ".join(sorted(kinds)) for name, kinds in sorted(found.items())}


def _types(value: Any, name: str) -> Iterator[tuple[str, str]]:
    if name:
        yield name, JSON_TYPES[type(value)]
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _types(inner, f"{name}.{key}".removeprefix("."))
    elif isinstance(value, list):
        for inner in value:
            yield from _types(inner, f"{name}[]")


def write_a_profile(path: Path) -> None:
    """As a calibration would, had it found these settings: to search for some would take a minute."""
    config = CalibrateConfig(
        input=("in.jsonl",), question_column="question", task_column="task", out=str(path), overwrite=True
    )
    paired = Paired.of([1.0] * 300, [1.0] * 299 + [0.5])
    gate = Verified(gate="agreement", drop=paired.drop(), judgement=paired.judge(2.0))
    shares = {"kept_ratio": 1.0, "ffn_ratio": 0.5, "attention_ratio": 1.0, "kv_ratio": 1.0}
    scores: Any = (SimpleNamespace(task="place", prompt_tokens=200, **shares),)
    trial = Trial(
        variant=Variant("marsinfer", MarsInfer(eta=0.9)),
        complete=True,
        dense_ttft_ms=20.0,
        ttft_ms=10.0,
        scores=scores,
    )
    rung = Rung(trial=trial, drop=0.0)
    chosen = RungResult(rung=rung, trial=trial, gates=(gate,))
    case: Any = SimpleNamespace(task="place", document=SimpleNamespace(prompt_tokens=200))
    model: Any = open_model(ModelSettings(model="random:tiny", device="cpu", dtype="float32"))
    write_profile(path, make_profile(config, model, chosen, [chosen], [rung], [case], "0" * 64))
