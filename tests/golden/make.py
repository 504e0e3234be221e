"""Write the golden files anew, in tests/: python -m golden.make interface

Only when the interface is meant to change: what changed is then to be read in the difference of the files.

The files in `before/` are never made anew, as they are a record of what version 0.1.0 wrote, with which later
versions must go on. `python -m golden.make before` made them, and refuses where they are.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from golden import BEFORE, HERE
from golden.calls import exit_codes
from golden.outputs import columns, make_outputs, metadata
from golden.record import make_record
from golden.surface import flags, help_texts, versions


def write_interface() -> None:
    """Everything but `before/`."""
    write_json("made_with.json", versions())
    write_json("flags.json", flags())
    write_help()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name).resolve()
        write_json("exit_codes.json", exit_codes(folder))
        runs = folder / "runs"
        runs.mkdir()
        printed = make_outputs(runs)
        write_json("columns.json", columns(runs))
        write_json("metadata.json", metadata(runs, printed))


def write_help() -> None:
    """One file a command; those of commands that are gone go."""
    folder = HERE / "help"
    folder.mkdir(exist_ok=True)
    for path in folder.iterdir():
        path.unlink()
    for name, text in help_texts().items():
        (folder / name).write_text(text, encoding="utf-8")


def write_before() -> None:
    """The record, once."""
    if BEFORE.exists():
        raise SystemExit(f"{BEFORE} is a record of version 0.1.0, and is not made anew")
    make_record(BEFORE)


def write_json(name: str, content: Any) -> None:
    text = json.dumps(content, indent=1, ensure_ascii=False)
    (HERE / name).write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Write the golden files.")
    parser.add_argument("what", choices=["interface", "before"])
    {"interface": write_interface, "before": write_before}[parser.parse_args().what]()
