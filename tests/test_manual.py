"""The manual against the program: flags, columns, exit codes, what `marsinfer methods` prints, and its links.

The manual is the README and the guides. The links and the versions of the other papers are checked too.
"""

from __future__ import annotations

import ast
import importlib
import os
import re
import subprocess
import sys
import tomllib
from collections import Counter
from dataclasses import fields
from pathlib import Path
from typing import Annotated, get_args

import pytest
import typer
import yaml
from commands import OF_TYPER, commands, in_guide, method_settings, options, reference, settings_in_guide

from pipeline import errors
from pipeline.records import Answer, ErrorType

FLAG = r"--[a-z][a-z-]*"
CHECKOUT = Path(__file__).parents[1]
GUIDES = sorted(CHECKOUT.glob("examples/guides/*.md"))
GUIDE_OF_OUTPUTS = (CHECKOUT / "examples/guides/output.md").read_text(encoding="utf-8")
README = (CHECKOUT / "README.md").read_text(encoding="utf-8")
MANUAL = "\n".join([README, *(path.read_text(encoding="utf-8") for path in GUIDES)])
PAPERS = sorted([*CHECKOUT.glob("*.md"), *CHECKOUT.glob("examples/**/*.md")])


@pytest.mark.parametrize("command", ["batch", "check", "calibrate", "report", "doctor"])
def test_every_flag_is_explained(command):
    flags = [flag for option in options(commands()[command]) for flag in option.opts]
    prose = MANUAL.replace(in_guide(), "")
    words = set(re.findall(FLAG, prose))
    assert sorted(flag for flag in flags if flag not in words) == []


def test_all_flags_of_all_commands_are_listed_with_their_defaults():
    assert in_guide() == reference(), "python tests/commands.py lists them anew"


def test_all_settings_of_all_methods_are_listed():
    assert settings_in_guide() == method_settings(), "python tests/commands.py lists them anew"


def test_what_is_hidden_is_not_listed_and_a_cell_shows_its_text(monkeypatch):
    app = typer.Typer()

    @app.command()
    def plain(
        shown: Annotated[
            str, typer.Option(help="One of a|b, <none> or *.md; `a|*`.", rich_help_panel="Panel")
        ] = "a|b",
        old: Annotated[str, typer.Option(hidden=True)] = "",
    ) -> None:
        """What it does.

        More of it.
        """

    @app.command(hidden=True)
    def aside() -> None:
        """Nobody is told."""

    monkeypatch.setattr("commands.app", app)
    assert list(commands()) == ["plain"]
    assert reference() == (
        "## marsinfer plain\n\n```text\nmarsinfer plain\n```\n\nWhat it does.\n\n**Panel**\n\n"
        "| flag | default | what it does |\n|---|---|---|\n"
        "| `--shown` | a\\|b | One of a\\|b, &lt;none> or \\*.md; `a\\|*`. |\n"
    )


def test_every_flag_that_is_mentioned_exists():
    flags = {
        flag
        for each in commands().values()
        for option in options(each)
        for flag in (*option.opts, *option.secondary_opts)
    }
    foreign = {"--no-deps", "--extra-index-url"}  # pip's
    foreign |= {"--head", "--port", "--address", "--disable-usage-stats", "--object-store-memory"}  # Ray's
    mentioned = set(re.findall(FLAG, MANUAL)) - foreign
    assert sorted(mentioned - flags - {"--version", *OF_TYPER}) == []


def test_every_column_is_explained():
    columns = [field.name for field in fields(Answer) if field.name != "passthrough"]
    assert [name for name in columns if f"`{name}`" not in MANUAL] == []


def test_every_exit_code_of_an_error_is_in_the_table():
    codes = {kind.exit_code for kind in vars(errors).values() if hasattr(kind, "exit_code")}
    guide = (CHECKOUT / "examples/guides/exit-codes.md").read_text(encoding="utf-8")
    cells = re.findall(r"^\| ([\d, ]+) \|", guide, re.MULTILINE)
    table = {int(code) for cell in cells for code in cell.split(",")}
    assert {0, 3, 129, 130, 143} | codes == table


@pytest.mark.slow
def test_the_methods_are_as_printed():
    environment = {**os.environ, "COLUMNS": "100"}
    command = [sys.executable, "-m", "marsinfer_cli", "methods"]
    printed = subprocess.run(
        command, env=environment, capture_output=True, encoding="utf-8", check=True
    ).stdout
    shown = MANUAL.partition("```sh\nmarsinfer methods\n```\n\n```text\n")[2].partition("\n```")[0]
    assert [line.strip() for line in shown.splitlines()] == [line.strip() for line in printed.splitlines()]


def test_files_that_are_named_exist():
    contributing = (CHECKOUT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`((?:examples|pipeline|tests|marsinfer_cli)/[\w./]+)`", MANUAL + contributing))
    assert {"examples/results/", "tests/commands.py", "pipeline/pruning/tiers.py"} <= named
    assert [path for path in sorted(named) if "NAME" not in path and not (CHECKOUT / path).exists()] == []


# --- links


def prose_of(text: str) -> str:
    """Without code, whose brackets are no links."""
    text = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    text = re.sub(r"^(    |\t).*$", "", text, flags=re.MULTILINE)
    return re.sub(r"`[^`\n]*`", "code", text)


def anchors(text: str) -> set[str]:
    """Of a file's headings, as code hosts make them: one that comes again is numbered."""
    text = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    slugs = [re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-") for heading in headings]
    before = [slugs[:place].count(slug) for place, slug in enumerate(slugs)]
    return {f"{slug}-{count}" if count else slug for slug, count in zip(slugs, before, strict=True)}


def links(path: Path) -> list[str]:
    targets = re.findall(r"\[[^\]]*\]\(([^)\s]*)\)", prose_of(path.read_text(encoding="utf-8")))
    return [target for target in targets if not re.match(r"[a-z]+:", target)]


@pytest.mark.parametrize("path", PAPERS, ids=lambda path: path.relative_to(CHECKOUT).as_posix())
def test_every_link_leads_to_a_file_and_every_anchor_to_a_heading(path):
    assert [target for target in links(path) if not leads_somewhere(path, target)] == []


def leads_somewhere(path: Path, target: str) -> bool:
    name, _, anchor = target.partition("#")
    there = (path.parent / name).resolve() if name else path
    if not there.is_relative_to(CHECKOUT) or not there.exists():
        return False
    return not anchor or anchor in anchors(there.read_text(encoding="utf-8"))


def test_links_are_found_and_anchors_made_as_code_hosts_do():
    text = "# A `b`: c's d\n\n```\n# no heading\n[no](link)\n```\n\n    [no](link)\n\n"
    text += "`[no](link)` [`x`](y.md#z)\n\n## Same\n\n## Same\n"
    assert anchors(text) == {"a-b-cs-d", "same", "same-1"}
    assert re.findall(r"\[[^\]]*\]\(([^)\s]*)\)", prose_of(text)) == ["y.md#z"]


def test_the_readme_lists_every_guide():
    listed = links(CHECKOUT / "README.md")
    names = [path.relative_to(CHECKOUT).as_posix() for path in GUIDES]
    assert len(names) > 10
    assert [name for name in names if name not in listed] == []


# --- the README's numbers, and its length

sys.path.append(str(CHECKOUT / "examples"))
figures = importlib.import_module("readme_figures")


@pytest.mark.slow
def test_the_readme_and_its_picture_have_the_numbers_of_the_results():
    """In a process of its own, without filled tensors; the picture says what it was drawn from."""
    command = [sys.executable, str(CHECKOUT / "examples" / "readme_figures.py"), "--check"]
    environment = {**os.environ, "PYTHONPATH": str(CHECKOUT)}
    done = subprocess.run(command, env=environment, capture_output=True, encoding="utf-8", check=False)
    assert (done.returncode, done.stderr) == (0, "as the results say\n")
    assert figures.PICTURE.stat().st_size < 60_000


def test_the_readme_is_short_and_has_no_measurement_of_its_own():
    assert len(README.splitlines()) <= 170
    prose, made = re.subn(r"<!-- made by.*?<!-- end", "", README, flags=re.DOTALL)
    assert made == 3
    assert re.findall(r"\d(?: ms| points?| times| minutes)\b|\d%", prose) == ["0%"]  # of what is free


def test_a_number_is_not_quoted_under_another_date_or_card_or_from_a_table_that_is_not_there():
    about = {"file": "peers.md", "heading": "Qwen2-7B shape"}
    rows = figures.quoted(about, ["vLLM bf16", "mars mixed"], "2026-11-26", "H100")
    assert rows["64 x 8,192 x 1"]["mars mixed"] == "7.73"  # not the ratio of the same name
    for columns, date, card in (
        (["vLLM bf16"], "2026-11-25", "H100"),
        (["vLLM bf16"], "2026-11-26", "H200"),
        (["vLLM int4"], "2026-11-26", "H100"),
    ):
        with pytest.raises(ValueError, match=r"nothing says|no table has"):
            figures.quoted(about, columns, date, card)
    with pytest.raises(ValueError, match="no heading"):
        figures.quoted({**about, "heading": "None"}, [], "2026-11-26", "H100")


def test_every_result_is_in_their_index():
    index = CHECKOUT / "examples/results/README.md"
    listed = set(links(index))
    names = {path.name for path in index.parent.iterdir()} - {"README.md"}
    assert {name for name in names if name not in listed} == set()


# --- the other papers


def test_the_changelog_has_a_section_for_this_version_and_one_for_what_comes():
    project = tomllib.loads((CHECKOUT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    headings = re.findall(
        r"^## \[([^\]]+)\]", (CHECKOUT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE
    )
    assert headings[0] == "Unreleased"
    assert project["version"] in headings


def test_the_hooks_run_the_linters_that_are_installed_for_tests():
    text = (CHECKOUT / ".pre-commit-config.yaml").read_text(encoding="utf-8")
    project = tomllib.loads((CHECKOUT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    installed = {re.split(r"\W", each)[0] for each in project["optional-dependencies"]["test"]}
    (repository,) = yaml.safe_load(text)["repos"]
    assert repository["repo"] == "local"  # nothing is downloaded
    words = [hook["entry"].split() for hook in repository["hooks"]]
    assert [" ".join(each[:2]) for each in words] == [
        ".venv/bin/ruff check",
        ".venv/bin/ruff format",
        ".venv/bin/mypy",
    ]
    for hook, (program, *_) in zip(repository["hooks"], words, strict=True):
        assert hook["language"] == "system"
        assert Path(program).name in installed


def test_the_words_of_rows_without_an_answer_are_those_of_the_code():
    section = GUIDE_OF_OUTPUTS.partition("\n## Rows without an answer\n")[2].partition("\n## ")[0]
    cells = re.findall(r"^\| (`.+?`) \| .+ \|$", section, re.MULTILINE)
    listed = [word for cell in cells for word in re.findall(r"`(\w+)`", cell)]
    assert sorted(listed) == sorted((*get_args(ErrorType), "error_type"))  # the head of the table


def test_rows_fail_by_the_declared_words_alone_and_by_each_of_them():
    """Type checking sees to the first, but for documents, which a program that imports nothing reads."""
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in (CHECKOUT / "pipeline").rglob("*.py")]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    declared = set(get_args(ErrorType))
    texts = Counter(node.value for node in nodes if isinstance(node, ast.Constant))
    assert {word for word in declared if texts[word] < 2} == set()  # once where it is declared
    raised = [
        node.args[0].value
        for node in nodes
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "RowError"
        if node.args and isinstance(node.args[0], ast.Constant)
    ]
    answered = [
        value.value
        for node in ast.walk(ast.parse((CHECKOUT / "pipeline/inputs/extracting.py").read_text("utf-8")))
        if isinstance(node, ast.Dict)
        for key, value in zip(node.keys, node.values, strict=True)
        if isinstance(key, ast.Constant) and key.value == "kind" and isinstance(value, ast.Constant)
    ]
    assert "timeout" in raised
    assert "encrypted" in answered
    assert {*raised, *answered} - declared == set()
