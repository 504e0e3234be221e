"""`marsinfer methods`: what it lists, and what it tells of one method."""

from __future__ import annotations

import json

from marsinfer_cli.app import run


def test_methods_lists_parameters_defaults_and_sources(capfd):
    assert run(["methods", "--json"]) == 0
    listed = {method["name"]: method for method in json.loads(capfd.readouterr().out)}
    eta = next(setting for setting in listed["marsinfer"]["parameters"] if setting["name"] == "eta")
    assert eta == {"name": "eta", "default": 0.95, "help": "attention mass that the kept tokens reach"}
    assert "fL8Zp8o6RL" in listed["marsinfer"]["source"]
    assert [setting["name"] for setting in listed["dense"]["parameters"]] == ["sparse_attention"]
    assert run(["methods"]) == 0
    listed = capfd.readouterr().out
    assert "marsinfer" in listed
    assert "start_layer" not in listed
    assert run(["methods", "sliminfer"]) == 0
    told = capfd.readouterr().out
    assert "8192,4096,2048" in told
    assert "Our choices" in told
    assert run(["methods", "slim"]) == 2
    assert "did you mean 'sliminfer'" in capfd.readouterr().err


BARE = """
from dataclasses import dataclass
from typing import ClassVar
from pipeline.pruning.base import PruningMethod

@dataclass(frozen=True, kw_only=True)
class Bare(PruningMethod):
    name: ClassVar[str] = "bare"
    def select(self, layer, view, state): ...
"""


def test_a_method_that_says_little_of_itself_leaves_no_gap(tmp_path, capfd):
    (tmp_path / "bare.py").write_text(BARE)
    for name, told in (
        (f"{tmp_path / 'bare.py'}:Bare", "bare: its class has no docstring\n\n┏"),
        (
            "dense",
            "dense: Every token passes every layer. (the unpruned model)\n\nNo pruning: the control that",
        ),
        (
            "examples/custom_method.py:KeyNorm",
            "key-norm: FFN skipped by tokens whose keys are long. (arXiv 2406.11430)\n\nA pruning method of ",
        ),
    ):
        assert run(["methods", name]) == 0
        printed = capfd.readouterr().out
        assert printed.startswith(told)
        assert "\n\n\n" not in printed
