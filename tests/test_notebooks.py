"""The Python of examples/, with a tiny model and cut texts: notebooks in a kernel, and the guide's code."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest

from pipeline import notebooks
from pipeline.summary import Summary

CHECKOUT = Path(__file__).parents[1]
GUIDE = (CHECKOUT / "examples" / "guides" / "python.md").read_text(encoding="utf-8")
CODE = re.findall(r"```python\n(.+?)```", GUIDE, re.DOTALL)
NOTEBOOKS = sorted((CHECKOUT / "examples" / "notebooks").glob("*.ipynb"))
TEXT_CHARACTERS = 300  # a token each, of the tiny model


@pytest.fixture
def short_texts(tmp_path, monkeypatch, model_folder):
    """A folder with the rows of the examples, cut, as the current one of kernels."""
    whole = CHECKOUT / "examples" / "licenses.jsonl"
    rows = [json.loads(line) for line in whole.read_text(encoding="utf-8").splitlines()]
    (tmp_path / "examples").mkdir()
    lines = [json.dumps({**row, "text": row["text"][:TEXT_CHARACTERS]}) + "\n" for row in rows]
    (tmp_path / "examples" / "licenses.jsonl").write_text("".join(lines), encoding="utf-8")
    monkeypatch.setenv("MODEL", str(model_folder))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(CHECKOUT), os.environ.get("PYTHONPATH", "")]))
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_and_shows_its_progress(path, short_texts):
    nbclient = pytest.importorskip("nbclient")
    for package in ("ipykernel", "polars"):
        pytest.importorskip(package)
    import nbformat

    notebook = nbformat.read(path, as_version=4)
    client = nbclient.NotebookClient(notebook, resources={"metadata": {"path": str(short_texts)}})
    client.execute()  # raises for a cell that does
    shown = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    pages = [str(output["data"].get("text/html", "")) for output in shown if "data" in output]
    assert [page for page in pages if page.startswith("<progress value='8' max='8'></progress> 8/8 rows, ")]
    tables = [page for page in pages if page.startswith("<table><caption>")]
    assert ["<th>rows</th><td>8</td>" in table for table in tables] == [True, True]
    texts = [str(output["data"].get("text/plain", "")) for output in shown if "data" in output]
    assert [text for text in texts if text.startswith("<CheckResult ")]


@pytest.fixture
def run_code(short_texts, model_folder, monkeypatch):
    """Runs code of the guide, with the tiny model in place of its own; returns the names that it sets."""
    pytest.importorskip("polars")
    monkeypatch.chdir(short_texts)

    def run_code(code):
        for named, tiny in (("smollm2-135m", str(model_folder)), ('"start_layer": 20', '"start_layer": 1')):
            code = code.replace(named, tiny)
        names: dict[str, Any] = {}
        exec(compile(code, "python.md", "exec"), names)
        return names

    return run_code


def test_a_frame_in_and_a_frame_out_take_five_lines(run_code):
    assert len(CODE[0].strip().splitlines()) == 5
    names = run_code(CODE[0])
    assert type(names["frame"]) is type(names["rows"])
    assert names["frame"].select("id", "status").rows() == [(id, "ok") for id in names["rows"]["id"]]


@pytest.mark.parametrize("number", range(1, len(CODE)))
def test_the_other_code_of_the_guide_runs(number, run_code, capsys):
    run_code(CODE[number])
    assert re.search(r"(2|8) rows \(\1 ok\)", capsys.readouterr().out)  # the summary, printed


class Display:
    """IPython's, as far as a bar uses it."""

    def __init__(self):
        self.shown = []

    def __call__(self, value, *, display_id):
        assert display_id
        self.update(value)
        return self

    def update(self, value):
        self.shown.append(value._repr_html_())


def test_a_bar_shows_phases_rows_and_the_end(monkeypatch):
    monkeypatch.setattr(notebooks, "EVERY_S", 1e9)
    display = Display()
    bar = notebooks.NotebookBar(display)
    bar.phase("loading <the> model")
    summary = Summary(method="dense", output="out.parquet")
    summary.count("ok", prompt_tokens=1000)
    bar(summary)
    assert display.shown == ["loading &lt;the&gt; model"]  # nothing new so soon
    summary.finish()
    bar(summary)
    assert display.shown[1].startswith("<progress value='1' max='1'></progress> 1/1 rows, 1,000 tokens, ")


def test_outside_of_a_notebook_nothing_is_shown():
    assert notebooks.notebook_bar() is None
    heard = []
    progress, phase = notebooks.listeners(heard.append, None)
    progress("tally")
    phase("loading")
    assert heard == ["tally"]


def test_a_summary_as_a_page_shows_what_came_from_elsewhere_as_text():
    summary = Summary(method="dense", output="<b>out")
    summary.count("error", "bad_json", message="row 1: <script>\x1b[31m")
    page = summary._repr_html_()
    assert "<caption>dense: &lt;b&gt;out</caption>" in page
    assert (
        "<tr><th>first bad_json</th><td>row 1: &lt;script&gt;\N{REPLACEMENT CHARACTER}[31m</td></tr>" in page
    )
