"""--help, --version and shell completion: complete, quick, and with examples that work."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from importlib.metadata import version

import pytest
from commands import commands, default_of, options

from marsinfer_cli.app import run
from marsinfer_cli.examples import EXAMPLES
from pipeline.checkpoints.names import local_models
from pipeline.pruning.registry import method_names

HEAVY = ("torch", "transformers", "pyarrow", "numpy")


@pytest.mark.parametrize(
    "words", [["--help"], ["batch", "--help"], ["doctor", "--help"], ["bench", "--help"]]
)
def test_help_imports_nothing_heavy(words):
    code = (
        f"import sys; from marsinfer_cli.app import run; run({words}); "
        f"sys.exit(str([name for name in {HEAVY} if name in sys.modules]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8", check=False)
    assert done.stderr == "[]\n"
    assert "Usage: marsinfer" in done.stdout


@pytest.mark.parametrize("words", commands())
def test_every_flag_says_what_it_changes_where_it_belongs_and_its_default(words):
    for option in options(commands()[words]):
        assert option.help, option.opts
        assert option.help.endswith("."), option.opts
        assert option.rich_help_panel, option.opts
        default = default_of(option)
        assert default is None or default not in ("", "None"), option.opts
        # Typer 0.27 takes a placeholder that is spelled as the flag for the flag's own name
        assert (option.metavar or "").lower() != option.name, option.opts


@pytest.mark.parametrize("words", commands())
def test_every_help_ends_with_an_example_that_parses(words, capfd):
    assert run([*words.split(), "--help"]) == 0
    example = shlex.split(EXAMPLES[words].partition(" > ")[0])
    printed = " ".join(capfd.readouterr().out.split())
    assert printed.endswith(f"Example: {EXAMPLES[words]}")
    assert example[: 1 + len(words.split())] == ["marsinfer", *words.split()]
    context = commands()[words].make_context("marsinfer", example[1 + len(words.split()) :])
    given = [name for name in context.params if context.get_parameter_source(name).name == "COMMANDLINE"]
    assert given


def test_the_version_is_that_of_the_package(capfd):
    assert run(["--version"]) == 0
    assert capfd.readouterr().out == version("marsinfer") + "\n"


def completed(line, **environment):
    """What bash is offered for the last word of a line."""
    words = line.split(" ")
    asked = {"_MARSINFER_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(len(words) - 1)}
    command = [sys.executable, "-m", "marsinfer_cli"]
    done = subprocess.run(
        command, env={**os.environ, **asked, **environment}, capture_output=True, encoding="utf-8", check=True
    )
    return done.stdout.split()


@pytest.mark.slow
def test_methods_and_flags_are_completed():
    assert completed("marsinfer batch --method ") == method_names()
    assert completed("marsinfer methods mar") == ["mars", "marsinfer"]
    assert completed("marsinfer check --attention f") == ["fa3", "flash"]
    assert completed("marsinfer batch --on-overlong trunc") == [
        "truncate-left",
        "truncate-right",
        "truncate-middle",
    ]
    assert completed("marsinfer batch --row-t") == ["--row-timeout"]


def test_models_that_are_here_are_completed(tmp_path):
    (tmp_path / "hub" / "models--Qwen--Qwen2.5-1.5B").mkdir(parents=True)
    (tmp_path / "hub" / "datasets--Qwen--none").mkdir()
    assert local_models({"HF_HOME": str(tmp_path)}) == ["smollm2-135m", "Qwen/Qwen2.5-1.5B"]
    assert local_models({"HF_HUB_CACHE": str(tmp_path / "none")}) == ["smollm2-135m"]
    assert completed("marsinfer batch --model Q", HF_HOME=str(tmp_path)) == ["Qwen/Qwen2.5-1.5B"]
    assert completed("marsinfer batch --model ./my-mod") == []  # and bash goes on with files


def test_completion_is_there_to_be_installed():
    done = subprocess.run(
        [sys.executable, "-m", "marsinfer_cli"],
        # asks for the script by itself: --show-completion looks for the shell among the parent processes
        env={**os.environ, "_MARSINFER_COMPLETE": "source_bash"},
        capture_output=True,
        encoding="utf-8",
        check=True,
    )
    assert "complete -o default -F _marsinfer_completion marsinfer" in done.stdout
