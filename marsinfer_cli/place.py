"""Where our own modules come from; imported before any other of them.

A file of the name `pipeline` in the working folder, or in one of PYTHONPATH, would be run in place of ours.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path

HOME = Path(__file__).resolve().parents[1]


def leave_out_working_folder() -> None:
    """Of `python -m`, which puts the working folder first among the places of modules."""
    if not sys.flags.safe_path and Path(sys.path[0]).resolve() != HOME:
        del sys.path[0]


def refuse_other_pipeline() -> None:
    """End the process, in one line, where another `pipeline` hides the package beside this one."""
    found = find_spec("pipeline")
    origin = None if found is None else found.origin
    if origin is None or Path(origin).resolve().parents[1] == HOME:
        return
    sys.stderr.write(
        f"marsinfer: error: {origin} is in the way of marsinfer's own package 'pipeline': rename it, or take "
        "its folder out of PYTHONPATH, an empty part of which is the working folder\n"
    )
    raise SystemExit(2)
