"""A file of the name `pipeline` beside the user's data is not run in place of ours."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

HOME = str(Path(__file__).resolve().parents[2])


@pytest.mark.slow
@pytest.mark.parametrize("places", [HOME, f":{HOME}"])
def test_the_working_folder_is_no_place_of_modules(places, tmp_path):
    other = tmp_path / "pipeline.py"
    other.write_text("raise RuntimeError('it ran')")
    done = subprocess.run(
        [sys.executable, "-m", "marsinfer_cli", "--version"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": places},
        capture_output=True,
        text=True,
    )
    if places == HOME:
        assert (done.returncode, done.stderr) == (0, "")
    else:  # an empty part, which is the working folder
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.startswith(f"marsinfer: error: {other} is in the way of marsinfer's own package ")
        assert len(done.stderr.splitlines()) == 1


@pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed")
def test_workers_of_ray_do_not_look_there_either():
    from pipeline.engines.ray_cluster import _Places

    places = _Places([HOME])
    places.extend(["/the/working/folder"])
    assert places == [HOME]
