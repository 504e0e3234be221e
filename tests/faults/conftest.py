"""Jobs to be disturbed."""

import json

import pytest

from faults.job import Job


@pytest.fixture
def make_job(model_folder, tmp_path):
    def make(*flags, rows=24):
        return Job(model_folder, tmp_path, rows=rows, flags=flags)

    return make


@pytest.fixture
def accident(monkeypatch):
    """Ask the method for an accident, in the n-th pack or with a prompt of so many tokens; None: for none."""

    def ask(kind, **when):
        if kind is None:
            monkeypatch.delenv("ACCIDENT")
        else:
            monkeypatch.setenv("ACCIDENT", json.dumps({"kind": kind, **when}))

    return ask
