"""The rows of a report's page, read as HTML: what stands beside what, and what its script sorts by."""

from __future__ import annotations

import base64
import json
import re
import zlib
from itertools import pairwise

import pytest
from bs4 import BeautifulSoup
from report_outputs import SETTINGS, answered, copied, failed, selected, write

from marsinfer_cli.app import run
from pipeline.report import row_maps
from pipeline.report.page import TEMPLATES
from pipeline.report.rows_shown import LONGEST_ANSWER
from pipeline.report.word_marks import marked


@pytest.fixture
def page(tmp_path, monkeypatch):
    """The page of outputs with these rows, as a tree; its charts are empty, which saves a second a page."""
    monkeypatch.setattr("pipeline.report.charts.draw", lambda name, fill: "<svg></svg>")

    def of(metadata=None, **outputs):
        paths = []
        for name, rows in outputs.items():
            has_map = any(row.selection is not None for row in rows)
            more = {} if metadata is None else {"metadata": metadata}
            paths.append(write(tmp_path / f"{name}.parquet", rows, save_selection=has_map, **more))
        html = tmp_path / "page.html"
        assert run(["report", *map(str, paths), "--html", str(html)]) == 0
        return BeautifulSoup(html.read_text(), "lxml")

    return of


OF_DIALOG = {"map-dialog", "map-title", "map-question", "map-close"}


def row(n, answer, reference="four years", **values):
    batch = None if reference is None else copied(reference=reference)
    return answered(n, answer=answer, question=f"How long is {n}?", passthrough=batch, **values)


def described(article):
    """Terms of a row's list, such as question and reference, and what is said of each."""
    return {each.dt.text: each.dd.text for each in article.select("dl.asked-for > div")}


def test_question_and_reference_stand_beside_answers_whose_words_are_marked(page):
    tree = page(
        dense=[row(0, "It is four years."), row(1, "same")],
        pruned=[row(0, "It is forty days."), row(1, "same")],
    )
    (article,) = tree.select("#rows > article")
    assert described(article) == {"question": "How long is 0?", "reference": "four years"}
    sides = article.select(".sides > div")
    assert [side.h4.text for side in sides] == ["dense", "pruned"]
    assert [side.p.text for side in sides] == ["It is four years.", "It is forty days."]
    assert [[mark.text for mark in side("mark")] for side in sides] == [["four years."], ["forty days."]]
    about = tree.find(id="of-rows").find_next_sibling("p").text
    assert "1 of 1 of the rows that differ" in about
    assert "Left out: 1 with the same answer in both" in about
    facts = article.select_one(".facts").text
    assert "token F1 0.67 and 0.00" in facts


def test_where_no_row_differs_it_is_said(page):
    tree = page(dense=[row(0, "same")], pruned=[row(0, "same")])
    assert tree.find(id="rows") is None
    assert "No row has different answers." in tree.text
    assert tree.find("script") is None
    assert tree.select("nav a[href='#of-rows']") == []


def test_an_error_stands_beside_an_answer_that_has_no_marks(page):
    tree = page(dense=[row(0, "Four years.")], pruned=[failed(0, message="too <b>long</b>")])
    (article,) = tree.select("#rows > article")
    assert article.select("mark") == []
    assert article.select_one(".failed").text == "error, over_long: too <b>long</b>"
    assert described(article)["reference"] == "four years", "as the run that has answered tells it"


def test_what_is_cut_is_counted_and_a_difference_behind_it_told(page):
    long = "word " * (LONGEST_ANSWER // 5)
    tree = page(dense=[row(0, f"{long} one")], pruned=[row(0, f"{long} two, and more")])
    notes = [side.select_one(".quiet").text for side in tree.select(".sides > div")]
    assert notes == [
        "(4 more characters; they differ behind what is shown)",
        "(14 more characters; they differ behind what is shown)",
    ]


def test_rows_of_one_output_begin_with_those_least_like_their_references(page):
    tree = page(pruned=[row(0, "four years"), row(1, "four days"), row(2, ""), failed(3)])
    assert [article.h3.text for article in tree.select("#rows > article")] == ["id 2", "id 1", "id 0"]
    assert "All 3 of the answered rows, those least like their references first" in tree.text
    assert tree.select("#rows > article")[0].select_one(".quiet").text == "(an empty answer)"
    assert tree.select("mark") == []


def test_without_references_they_are_the_first(page):
    tree = page(pruned=[row(n, "x", reference=None) for n in (5, 3, 4)])
    assert [article.h3.text for article in tree.select("#rows > article")] == ["id 5", "id 3", "id 4"]
    assert "the first of them" in tree.text


@pytest.mark.parametrize("both", [False, True])
def test_the_script_finds_what_it_sorts_and_shows(page, both):
    outputs = {"dense": [row(n, f"a {n}") for n in range(3)]}
    if both:
        outputs["pruned"] = [row(n, f"b {n}", ttft_ms=7.0) for n in range(3)]
    tree = page(**outputs)
    script = (TEMPLATES / "rows.js").read_text()
    wanted = set(re.findall(r'at\("([\w-]+)"\)', script)) - OF_DIALOG
    assert len(wanted) >= 6
    assert [name for name in wanted if tree.find(id=name) is None] == []
    articles = tree.select("#rows > article")
    orders = [option["value"].split() for option in tree.select("#order option")]
    assert len(orders) >= 4
    for key, sign in orders:
        assert sign in ("1", "-1")
        assert all(float(article[f"data-{key}"]) >= 0 for article in articles), key
    assert tree.find(id="rows-controls").has_attr("hidden"), "until the script is at work"


def test_the_page_can_be_heard_and_reached_with_keys(page):
    tree = page(dense=[row(0, "a"), failed(1)], pruned=[row(0, "b"), failed(1)])
    ids = [each["id"] for each in tree.select("[id]")]
    assert len(ids) == len(set(ids))
    assert [link["href"][1:] for link in tree.select("nav a") if tree.find(id=link["href"][1:]) is None] == []
    assert len(tree.select("nav a")) == 5
    for control in tree.select("input, select"):
        assert control.find_parent("label") is not None
    for head in tree.select("th"):
        assert head.get("scope") in ("row", "col")
    for table in tree.select(".wide"):
        assert (table["tabindex"], table["role"]) == ("0", "region")
        assert table["aria-label"]
    levels = [int(each.name[1]) for each in tree.find_all(re.compile("^h[1-6]$"))]
    assert levels[0] == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))


def test_model_device_and_date_stand_on_top_once_where_they_are_the_same(page):
    metadata = {"model": "tiny", "device": "CPU", "started": "2026-11-26T12:01:46Z"}
    tree = page(metadata, dense=[row(0, "years")], pruned=[row(0, "b")])
    assert [each.text for each in tree.select("header .about span")] == [
        "model tiny",
        "device CPU",
        "date 2026-11-26 12:01 UTC",
    ]
    assert tree.select_one("header .conclusion").text.startswith("1 row cannot tell")


def unpacked(script):
    """The pieces of a map's data, and the states of each layer."""
    data = json.loads(script.string)
    pieces = json.loads(zlib.decompress(base64.b64decode(data["pieces"])))
    packed = zlib.decompress(base64.b64decode(data["states"]))
    width = -(-len(pieces) // 4)
    states = [
        [packed[layer * width + n // 4] >> n % 4 * 2 & 3 for n in range(len(pieces))]
        for layer in range(len(data["names"]))
    ]
    return data, pieces, states


def pruned(n, **values):
    return selected(n, answer=f"answer {n}", **values)


def test_a_row_leads_to_its_map(page):
    tree = page(dense=[row(n, "x", reference=None) for n in range(3)], pruned=[pruned(n) for n in range(3)])
    buttons = tree.select("button[data-map]")
    assert len(buttons) == 3
    for button in buttons:
        article = button.find_parent("article")
        assert button["aria-label"] == f"Pruning map of {article.h3.text} in pruned"
        data, pieces, states = unpacked(tree.find(id=button["data-map"]))
        stored = pruned(int(article["data-row"]))
        assert "".join(pieces) == stored.prompt_text
        assert set(states[0]) == {3}
        assert set(states[1]) == {1, 3}, "those that leave behind layer 1 skip its FFN"
        assert [state == 0 for state in states[2]] == [state == 1 for state in states[1]]
        assert data["pruned"]
    dialog = tree.find("dialog", id="map-dialog")
    assert [name for name in (*OF_DIALOG, "prompt", "layer", "strip") if tree.find(id=name) is None] == []
    assert dialog.find(id="prompt") is not None


def test_maps_without_room_are_a_command_and_an_unpruned_row_says_so(page, monkeypatch):
    monkeypatch.setattr(row_maps, "MOST_BYTES", 1_500)
    whole = pruned(0).selection[:1] * 3
    rows = [pruned(n, id=f"it's {n}", **({"selection": whole} if n == 2 else {})) for n in range(4)]
    tree = page(pruned=rows)
    by_row = {article["data-row"]: article for article in tree.select("#rows > article")}
    has_map = [n for n, article in by_row.items() if article.button]
    assert has_map == ["0", "1"]
    assert "Nothing was pruned here." in by_row["2"].text
    command = by_row["3"].select_one(".sides code").text
    assert re.fullmatch(
        r"""marsinfer report \S+/pruned.parquet --row 'it'"'"'s 3' --html map.html""", command
    )


def test_a_selection_that_cannot_be_read_costs_its_map_alone(page):
    tree = page(pruned=[pruned(0, selection=[b"no zlib"]), pruned(1), pruned(2, selection=None)])
    by_row = {article["data-row"]: article for article in tree.select("#rows > article")}
    assert [by_row[n].button is not None for n in "012"] == [False, True, False]
    assert not any(article.code for article in by_row.values())


ALTERNATING = ["".join(f"{chr(0x4E00 + n)}{letter} " for n in range(500)) for letter in "ab"]


@pytest.mark.parametrize("answers", [["<&" * 750, "&<" * 750], ALTERNATING], ids=["markup", "marks"])
def test_a_page_of_long_answers_has_the_rows_for_which_there_is_room(page, answers):
    first, second = ([row(n, answer, reference=answers[0]) for n in range(150)] for answer in answers)
    tree = page(dense=first, pruned=second)
    shown = len(tree.select("#rows > article"))
    assert 20 < shown < 150
    assert f"{shown} of 150 of the rows that differ" in tree.text
    assert 500_000 < len(str(tree.find(id="rows")).encode()) < 1_300_000


def test_a_dense_run_has_no_maps(page):
    metadata = {"settings_that_decide": {"method": {"name": "dense", "settings": {}}}}
    tree = page(metadata, dense=[pruned(0, method="dense")])
    assert tree.find("dialog") is None
    assert "pruned" not in tree.select_one("#rows").text


def test_what_is_always_kept_is_known_of_the_methods_of_this_program_alone(page):
    def always(settings, method="sliminfer"):
        metadata = {"settings_that_decide": {"method": settings}}
        tree = page(metadata, out=[pruned(0, tokens=150, method=method)])
        return unpacked(tree.select_one("script[type='application/json']"))[0]["always"]

    assert always(SETTINGS["method"]) == [[0, 64], [128, 150]]
    assert always({"name": "sliminfer", "settings": {"block": 16, "budget": [0.5, 0.4]}}) == [
        [0, 16],
        [144, 150],
    ]
    assert always({"name": "sliminfer", "settings": {"of another version": 1}}) == []
    assert always({"name": "uniprefill", "settings": {}}) == [], "another method than the row's"
    own = "tests/no_such_file.py:Mine"
    assert always({"name": own, "settings": {}}, own) == []


@pytest.mark.parametrize(
    ("first", "second", "found"),
    [
        ("the cat sat", "the dog sat", [("the ", False), ("cat", True), (" ", False), ("sat", False)]),
        ("a  b\n", "a b", [("a  b\n", False)]),
        ("", "a", []),
        ("a", "", [("a", True)]),
        ("我爱北京", "我爱南京", [("我爱", False), ("北", True), ("京", False)]),
        (f"{'the ' * 300}end", f"{'the ' * 300}stop", [("the " * 300, False), ("end", True)]),
    ],
)
def test_words_that_differ(first, second, found):
    assert marked(first, second)[0] == found
    assert "".join(text for text, _ in marked(second, first)[0]) == second
