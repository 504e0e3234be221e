"""Suites of questions by the name a user gives them: `leval:DIR`, `longbench:DIR` and `needles`."""

from __future__ import annotations

from pipeline.settings.parse import SuiteName
from pipeline.suites.leval import load_leval
from pipeline.suites.longbench import load_longbench
from pipeline.suites.suite_files import Loaded

NOT_COMPARABLE = "not comparable with published scores"  # those of the suites: other prompts and metrics
LOADERS = {"leval": load_leval, "longbench": load_longbench}  # of all of `SUITES`


def load_suite(suite: SuiteName) -> Loaded:
    """The samples of a suite that lies in a folder, and why rows were left out.

    Needles, which lie in none, are made by `make_needles`. Raises `InputError` where `load_files` does.
    """
    if suite.folder is None:
        raise ValueError(f"{suite} lies in no folder")
    return LOADERS[suite.kind](suite.folder)
