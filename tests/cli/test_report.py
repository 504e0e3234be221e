"""`marsinfer report`: pages, tables, and what it refuses."""

from __future__ import annotations

import json
import re
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
from report_outputs import EVIL, METADATA, answered, copied, failed, schema_of, selected, write

from marsinfer_cli.app import run
from pipeline.outputs.journal import Journal
from pipeline.outputs.sidecar import sidecar_path
from pipeline.pruning.tiers import FFN, LIVE, pack_layer

pytestmark = pytest.mark.slow


@pytest.fixture
def report(capfd):
    """Exit code, stdout and stderr of a call."""

    def call(*words):
        code = run(["report", *map(str, words)])
        printed = capfd.readouterr()
        return code, printed.out, printed.err

    return call


class Page(HTMLParser):
    """Tags, attributes and text of a page."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.texts = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data):
        self.texts.append(data)


def page_of(path):
    text = path.read_text()
    page = Page(text)
    assert len(text.encode()) < 3_000_000
    outside = [
        (name, value)
        for name, value in page.attributes
        if name in ("src", "href", "xlink:href", "srcset", "action", "data")
        and not value.startswith(("#", "data:"))
    ]
    assert outside == []
    assert "@import" not in text
    assert not re.search(r"url\((?!#)", text)
    return page


@pytest.fixture
def evil(tmp_path):
    """An output that would like to be more than text."""
    rows = [answered(n, answer=EVIL if n % 2 else f"{EVIL} {n}", id=f"{EVIL} {n}") for n in range(30)]
    return write(tmp_path / "evil$x$<b>.parquet", [*rows, failed(77, EVIL, EVIL)], {"config": {EVIL: EVIL}})


def test_a_page_of_one_output_escapes_all_that_it_tells(report, evil, tmp_path):
    html = tmp_path / "page.html"
    assert report(evil, "--html", html) == (0, "", "")
    page = page_of(html)
    assert page.tags.count("script") == 1, "our own"
    assert "img" not in page.tags
    assert not any(name.startswith("on") for name, _ in page.attributes)
    assert len({value for name, value in page.attributes if name == "id"}) == sum(
        name == "id" for name, _ in page.attributes
    )
    assert "evil$x$<b>" in page.texts
    assert "</script><script>alert(1)" in "".join(page.texts)
    assert page.tags.count("svg") == 7


@pytest.mark.slow
def test_a_page_of_two_outputs_tells_rows_side_by_side(report, evil, tmp_path):
    other = write(
        tmp_path / "other.jsonl", [answered(n, answer="plain", id=f"{EVIL} {n}") for n in range(20)]
    )
    html = tmp_path / "page.html"
    assert report(evil, other, "--html", html) == (0, "", "")
    page = page_of(html)
    text = "".join(page.texts)
    assert page.tags.count("script") == 1
    assert page.tags.count("article") == 20
    assert "Rows that disagree most" in text
    assert text.count("plain") == 20


def test_a_page_of_three_outputs_overlays_them(report, tmp_path):
    paths = [
        write(tmp_path / f"{name}.parquet", [answered(n, method=name, seed=len(name)) for n in range(40)])
        for name in ("dense", "fastkv", "uniprefill")
    ]
    html = tmp_path / "page.htm"
    assert report(*paths, "--html", html) == (0, "", "")
    page = page_of(html)
    assert page.tags.count("svg") == 4, "no pictures of single runs"
    assert "article" not in page.tags
    assert "No dense run" not in "".join(page.texts)


@pytest.mark.slow
def test_a_dense_run_is_asked_for_where_its_line_is_missing(report, tmp_path):
    html = tmp_path / "page.html"
    assert report(write(tmp_path / "out.parquet", [answered(n) for n in range(9)]), "--html", html)[0] == 0
    assert "No dense run is among these outputs" in html.read_text()


@pytest.mark.parametrize("rows", [[], [failed(3)]])
def test_an_output_without_answers_has_a_page_and_tables(report, tmp_path, rows):
    path = write(tmp_path / "out.parquet", rows)
    assert report(path, "--html", tmp_path / "page.html") == (0, "", "")
    assert "svg" not in page_of(tmp_path / "page.html").tags
    code, out, _ = report(path, path)
    assert code == 0
    assert "Headline figures" in out


def test_tables_in_the_terminal(report, tmp_path):
    first = write(tmp_path / "dense.parquet", [answered(n, answer="one fish") for n in range(9)])
    second = write(
        tmp_path / "slim.parquet", [answered(n, answer=EVIL, ttft_ms=1e4) for n in range(8)] + [failed(8)]
    )
    code, out, err = report(first, second)
    assert (code, err) == (0, "")
    for told in (
        "TTFT p50",
        "10.0 s",
        "slim: 1 row over_long, first:",
        "row 8, id 8: too long",
        "rows in both",
    ):
        assert told in out
    told = "slim answers otherwise than dense, and nothing here tells which is better: 0.0% of the answers"
    assert out.startswith(told)
    assert "\x1b" not in out
    assert "<script>alert(1)" in out
    assert re.search(r"0-2 .* 100.0% .* 100.0%", out), "layers that look the same are one row"


@pytest.mark.slow
def test_an_unfinished_run_has_a_page_that_says_so(report, tmp_path):
    path, html = tmp_path / "out.parquet", tmp_path / "page.html"
    with Journal(path, schema_of(), {"method": {"name": "slim"}}, resume=True) as journal:
        journal.append([answered(n) for n in range(5)])
        assert report(path, "--html", html) == (0, "", "")
        text = html.read_text()
        assert "the run is not finished: these are the rows in .out.parquet.journal" in text
        assert "5 so far" in text
        assert "method.name" in text
        assert "not finished" in report(path)[1]


def test_the_terminal_shows_the_rows_that_differ_with_question_and_reference(report, tmp_path):
    def rows(*answers):
        made = [answered(n, answer=answer, question=f"What is {n}?") for n, answer in enumerate(answers)]
        for answer in made:
            answer.passthrough = copied(reference="one fish")
        return made

    metadata = {**METADATA, "device": "CPU", "started": "2026-11-26T12:01:46Z"}
    first = write(tmp_path / "dense.parquet", rows("one fish", "one fish"), metadata)
    second = write(tmp_path / "slim.parquet", rows("one fish", "red fish"), metadata)
    code, out, err = report(first, second)
    assert (code, err) == (0, "")
    lines = out.splitlines()
    told = "2 rows cannot tell whether slim answers as well as dense: token F1 changed by -25.00"
    assert lines[0].startswith(told)
    assert lines[2] == "model tiny; device CPU; date 2026-11-26 12:01 UTC"
    place = lines.index("  question: What is 1?")
    assert lines[place + 1 :] == [
        "  reference: one fish",
        "  dense: one fish",
        "  slim: red fish",
        "1 row with the same answer in both, or an error in both, left out",
    ]


def test_a_row_of_which_nothing_was_pruned_says_so(report, tmp_path):
    whole = selected(0).selection[:1] * 3
    path = write(tmp_path / "out.parquet", [selected(0, selection=whole)], save_selection=True)
    assert "Nothing was pruned here" in report(path, "--row", "0")[1]
    html = tmp_path / "map.html"
    assert report(path, "--row", "0", "--html", html)[0] == 0
    data = json.loads(re.search('id="only-map">(.*?)</script>', html.read_text())[1])
    assert not data["pruned"]


@pytest.mark.parametrize(("answer", "shown"), [("  ", "(an empty answer)"), (None, "(none is stored)")])
def test_a_map_without_an_answer_says_so(report, tmp_path, answer, shown):
    path = write(tmp_path / "out.parquet", [selected(0, answer=answer)], save_selection=True)
    html = tmp_path / "map.html"
    assert report(path, "--row", "0", "--html", html)[0] == 0
    assert shown in page_of(html).texts


def test_a_row_has_its_pruning_map(report, tmp_path):
    refused = failed(9)
    refused.id = "7"  # which stands aside for the row that has an answer
    rows = [answered(0), refused, selected(1, id="a/b"), selected(2, id="7", answer=EVIL), selected(7)]
    path = write(tmp_path / "out.parquet", rows, save_selection=True)
    html = tmp_path / "map.html"
    assert report(path, "--row", "7", "--html", html) == (0, "", ""), "an id comes before a number"
    page = page_of(html)
    text = "".join(page.texts)
    assert page.tags.count("script") == 2, "the map's data and our own"
    assert EVIL.replace("\x1b", "\ufffd") in text
    assert "row 2, 7" in text
    assert "w42 w43 w44 w45 w46 w47" in text, "the question stands above"
    code, out, _ = report(path, "--row", "1")
    assert code == 0
    assert "row 1, a/b" in out
    assert "always kept by the method's settings: tokens 0 to 49" in out
    assert "Nothing was pruned" not in out
    assert re.search(r"layer 1 .* 0 ", out)


@pytest.mark.slow
def test_a_long_prompt_is_shown_as_far_as_the_page_may_grow(report, tmp_path):
    tokens = 150_000
    random = np.random.default_rng(0)
    layers = [
        pack_layer((LIVE | np.where(random.random(tokens) < 0.5, FFN, 0)).astype(np.uint8)) for _ in range(90)
    ]
    row = selected(0, tokens=tokens, selection=layers)
    path = write(tmp_path / "out.parquet", [row], save_selection=True)
    html = tmp_path / "map.html"
    assert report(path, "--row", "0", "--html", html) == (0, "", "")
    shown = re.search(r"The first ([\d,]+) of 150,000 tokens", html.read_text())
    assert shown
    assert int(shown[1].replace(",", "")) > 50_000
    assert 2_000_000 < html.stat().st_size < 3_000_000


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--row", "nobody"], "has no row of the id 'nobody', nor of that number"),
        (["--row", "9" * 20], f"has no row of the id '{'9' * 20}', nor of that number"),
        (["--row", "9"], "has no selection of tokens for row 9: over_long: too long"),
        (["--row", "0"], "has no selection of tokens for row 0: it was not stored"),
        (["--html", "page.txt"], "--html page.txt: name an .html file"),
        (["--html", "nowhere/page.html"], "--html nowhere/page.html: there is no such folder"),
        (["--open"], "--open shows the page of --html FILE: give that too"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(report, tmp_path, monkeypatch, words, said):
    monkeypatch.chdir(tmp_path)
    path = write(tmp_path / "out.parquet", [answered(0), failed(9)], save_selection=True)
    code, out, err = report(path, *words)
    assert (code, out) == (2, "")
    assert said in err
    assert len(err.splitlines()) == 1


def test_rows_without_a_selection_need_another_run(report, tmp_path):
    path = write(tmp_path / "out.parquet", [answered(0)])
    assert report(path, "--row", "0")[2] == (
        f"marsinfer: error: {path} holds no selection of tokens: run batch with --save-selection\n"
    )
    assert "--row takes one output" in report(path, path, "--row", "0")[2]


def test_a_selection_that_is_damaged_is_refused(report, tmp_path):
    path = write(tmp_path / "out.parquet", [selected(0, selection=[b"no zlib"])], save_selection=True)
    code, _, err = report(path, "--row", "0")
    assert code == 2
    assert "no selection of a layer" in err


@pytest.mark.slow
def test_a_page_is_replaced_but_never_an_input(report, tmp_path):
    path = write(tmp_path / "out.parquet", [answered(0)])
    html = tmp_path / "page.html"
    for _ in range(2):
        assert report(path, "--html", html)[0] == 0
    assert html.read_text().startswith("<!doctype html>")
    link = tmp_path / "link.html"
    link.symlink_to(path)
    before = path.read_bytes()
    code, _, err = report(path, "--html", link)
    assert code == 2
    assert "is also an output to report on" in err
    assert path.read_bytes() == before
    assert sorted(file.name for file in tmp_path.iterdir()) == ["link.html", "out.parquet", "page.html"]


def test_a_page_needs_matplotlib_and_a_map_and_tables_do_not(report, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    path = write(tmp_path / "out.parquet", [selected(0)], save_selection=True)
    html = tmp_path / "page.html"
    code, _, err = report(path, "--html", html)
    assert (code, err) == (2, "marsinfer: error: --html needs matplotlib: pip install 'marsinfer[plot]'\n")
    assert report(path, "--row", "0", "--html", html)[0] == 0
    assert report(path)[0] == 0


@pytest.mark.slow
def test_open_shows_the_page(report, tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr("webbrowser.open", shown.append)
    path = write(tmp_path / "out.parquet", [answered(0)])
    assert report(path, "--html", tmp_path / "page.html", "--open")[0] == 0
    assert shown == [(tmp_path / "page.html").as_uri()]


@pytest.mark.slow
def test_a_sidecar_that_is_damaged_costs_the_configuration_alone(report, tmp_path):
    path = write(tmp_path / "out.jsonl", [answered(0)])
    sidecar_path(path).write_text("{")
    assert report(path, "--html", tmp_path / "page.html")[0] == 0
    assert "does not say how it was made" in (tmp_path / "page.html").read_text()
