"""Jobs to be disturbed."""

import json

import pytest

from faults.job import Job


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory):
    return tmp_path_factory.mktemp("undisturbed")


@pytest.fixture
def make_job(model_folder, tmp_path, undisturbed):
    def make(*flags, rows=24):
        return Job(model_folder, tmp_path, undisturbed, rows=rows, flags=flags)

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
