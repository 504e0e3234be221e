"""Command lines, and with which exit code and message each ends."""

from __future__ import annotations

import io
import json
import re
import shlex
import shutil
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest

from golden import BEFORE
from golden.surface import plain_surroundings
from marsinfer_cli.app import run

TINY = "--model random:tiny --device cpu --dtype float32"
ASK = "--question-column question --id-column id"
IN_OUT = "marsinfer batch in.jsonl out.parquet"
SECONDS = re.compile(r"(?<= rows in )[\d,.]+ (s|min|h)\b")
WARM_UP = re.compile(r"^marsinfer: note: (warmed up in|the warm-up was given up after) .*\n", re.MULTILINE)

# of what Typer cannot parse, in its words, which change with its version
OF_TYPER = (
    f"{IN_OUT} --no-such-flag",
    f"{IN_OUT} --max-new-tokens x",
    f"{IN_OUT} --max-new-tokens",
    f"{IN_OUT} --question q --show-prompt 0",
    "marsinfer nosuch",
    "marsinfer report",
    "marsinfer bench ttft --documents 0",
)
CALLS = (
    *OF_TYPER,
    "marsinfer --version",
    "marsinfer bench",
    # what is missing, or excludes each other
    "marsinfer batch --question q",
    "marsinfer batch in.jsonl --question q",
    "marsinfer batch in.jsonl --config unknown.toml --question q",
    "marsinfer batch in.jsonl --config gone.toml --question q",
    f"{IN_OUT} {TINY} --max-new-tokens 2 --quiet",
    f"{IN_OUT} --question q --question-column question",
    f"{IN_OUT} --question q --resume --overwrite",
    f"{IN_OUT} --question q --retry-errors",
    f"{IN_OUT} --question q --dry-run --show-prompt 1",
    f"{IN_OUT} --question q --sparse-attention 0.9 --set sparse_attention=0.8",
    f"{IN_OUT} --question q --workers 2",
    f"{IN_OUT} --question q --combine-template x.jinja",
    # values that cannot be
    f"{IN_OUT} --question q --max-new-tokens 0",
    f"{IN_OUT} --question q --top-p 0",
    f"{IN_OUT} --question q --limit 0",
    f"{IN_OUT} --question q --method marsinfr",
    f"{IN_OUT} --question q --set eta",
    f"{IN_OUT} --question q --set etta=1",
    f"{IN_OUT} --question q --on-overlong cut",
    f"{IN_OUT} --question q --max-errors few",
    f"{IN_OUT} --question q --pack-tokens lots",
    f"{IN_OUT} --question q --kv-memory 1XB",
    f"{IN_OUT} --question q --rope-scaling yarn",
    f"{IN_OUT} --question q --shard 0/4",
    f"{IN_OUT} --question q --columns answr",
    f"{IN_OUT} --question q --deadline 8",
    f"{IN_OUT} --question q --log-format xml",
    f"{IN_OUT} --question q --profile gone.toml",
    f"{IN_OUT} --question q --model smollm3",
    f"{IN_OUT} --question q --model random:huge",
    f"{IN_OUT} --question q --device tpu {TINY.partition(' --device')[0]}",
    f"MARSINFER_SEED=one {IN_OUT} --question q",
    f"MARSINFER_RESUME=yes {IN_OUT} --question q",
    f"MARSINFER_MAX_NEW_TOKEN=1 {IN_OUT} --question q",
    f"MARSINFER_OUTPUT=x {IN_OUT} --question q",
    # files
    "marsinfer batch in.jsonl there.parquet --question q",
    "marsinfer batch in.jsonl gone/out.parquet --question q",
    "marsinfer batch in.jsonl out.csv --question q",
    "marsinfer batch in.jsonl - --question q --resume",
    "marsinfer batch in.jsonl - --question q --json",
    "marsinfer batch gone.jsonl out.parquet --question q",
    f"{IN_OUT} --question-column query {TINY} --quiet",
    # runs
    f"{IN_OUT} {ASK} {TINY} --max-new-tokens 2 --quiet",
    f"{IN_OUT} {ASK} {TINY} --max-new-tokens 2 --quiet --dry-run",
    f"MARSINFER_MAX_NEW_TOKENS=2 {IN_OUT} {ASK} {TINY} --quiet --resume",
    f"marsinfer batch bad.jsonl out.parquet {ASK} {TINY} --max-new-tokens 2 --quiet",
    f"marsinfer batch bad.jsonl out.parquet {ASK} {TINY} --max-new-tokens 2 --quiet --fail-on-error",
    f"marsinfer batch bad.jsonl out.parquet {ASK} {TINY} --max-new-tokens 2 --quiet --max-errors 0",
    f"{IN_OUT} {ASK} {TINY} --max-new-tokens 2 --quiet --deadline 2020-01-01T00:00",
    f"marsinfer batch requests.jsonl out.jsonl {TINY} --max-new-tokens 2 --quiet",
    f"marsinfer batch refused.jsonl out.jsonl {TINY} --max-new-tokens 2 --quiet",
    # the other commands
    "marsinfer merge out.parquet gone.parquet",
    "marsinfer check",
    "marsinfer check in.jsonl",
    f"marsinfer check in.jsonl {ASK} --resume",
    f"marsinfer check in.jsonl {ASK} --overwrite-baseline",
    f"marsinfer check in.jsonl {ASK} --generate",
    f"marsinfer check in.jsonl {ASK} {TINY} --max-new-tokens 2 --quiet --max-drop 1",
    f"marsinfer check in.jsonl {ASK} --profile profile.toml --method dense",
    f"marsinfer check in.jsonl {ASK} --junit gone/x.xml",
    f"marsinfer check in.jsonl {ASK} {TINY} --method dense --max-new-tokens 2 --max-drop 0pt --quiet",
    f"marsinfer calibrate in.jsonl {ASK} --out there.toml",
    f"marsinfer calibrate in.jsonl {ASK} --objective memory",
    f"marsinfer calibrate in.jsonl {ASK} {TINY} --max-new-tokens 2 --minutes 0.000001 --quiet",
    "marsinfer report gone.parquet",
    "marsinfer report gone.parquet --open",
    "marsinfer methods mar",
    "marsinfer bench ttft --lengths 8q",
    "marsinfer bench decode --lengths 0",
)


def exit_codes(folder: Path) -> dict[str, Any]:
    """Of every call, each made in a folder of its own under `folder`."""
    found = {}
    for number, line in enumerate(CALLS):
        own = folder / str(number)
        own.mkdir()
        found[line] = outcome(line, own)
    return found


def outcome(line: str, folder: Path) -> dict[str, Any]:
    """The exit code, and what stands on stderr; `folder`, which must be empty, is where it runs."""
    prepare(folder)
    words = shlex.split(line)
    environment = dict(word.split("=") for word in words[: words.index("marsinfer")])
    printed = io.StringIO()
    with plain_surroundings(), pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name, value in environment.items():
            patch.setenv(name, value)
        with redirect_stdout(io.StringIO()), redirect_stderr(printed):
            code = run(words[words.index("marsinfer") + 1 :])
    told = SECONDS.sub("TIME", without_warm_up(printed.getvalue())).rstrip()
    return {"exit_code": code, "stderr": told.replace(str(folder.resolve()), "FOLDER")}


def without_warm_up(told: str) -> str:
    """What was printed on stderr, less a note that only a busy machine gives cause for."""
    return WARM_UP.sub("", told)


def prepare(folder: Path) -> None:
    """The files that the calls name."""
    shutil.copy(BEFORE / "in.jsonl", folder)
    good = (BEFORE / "in.jsonl").read_text(encoding="utf-8").splitlines()[0]
    bad = json.dumps({"id": "empty", "text": "", "question": "What does it say?"})
    (folder / "bad.jsonl").write_text(f"{good}\n{bad}\n", encoding="utf-8")
    for name, url in (("requests", "/v1/completions"), ("refused", "/v1/embeddings")):
        request = {"custom_id": "a", "method": "POST", "url": url, "body": {"prompt": "one fish"}}
        (folder / f"{name}.jsonl").write_text(f"{json.dumps(request)}\n", encoding="utf-8")
    for name in ("there.parquet", "there.toml"):
        (folder / name).write_text("precious", encoding="utf-8")
    (folder / "unknown.toml").write_text("max_new_token = 1\n", encoding="utf-8")
