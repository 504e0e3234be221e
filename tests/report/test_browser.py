"""The pages in a real browser, where there is one: no complaint, no request, both themes, all widths."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess

import pytest
from report_outputs import EVIL, answered, failed, selected, write

from marsinfer_cli.app import run

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")

QUIET = ("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--virtual-time-budget=5000")


def chromium(page, *flags, profile):
    """Standard output of a visit, and what the page's console said."""
    command = [
        CHROMIUM,
        *QUIET,
        f"--user-data-dir={profile}",
        "--enable-logging=stderr",
        *flags,
        page.as_uri(),
    ]
    done = subprocess.run(
        command, capture_output=True, encoding="utf-8", errors="replace", timeout=900, check=True
    )
    return done.stdout, re.findall(r"CONSOLE.*", done.stderr)


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """A report, a comparison and a pruning map of rows that would like to be more than text."""
    folder = tmp_path_factory.mktemp("pages")
    rows = [selected(n, tokens=60 + n, answer=EVIL, id=f"<i>{n}") for n in range(40)]
    first = write(folder / "first.parquet", [*rows, failed(90, message=EVIL)], save_selection=True)
    second = write(folder / "second.parquet", [answered(n, method="dense", id=f"<i>{n}") for n in range(40)])
    calls = {
        "report": [first],
        "comparison": [first, second],
        "map": [first, "--row", "<i>3"],
    }
    for name, words in calls.items():
        assert run(["report", *map(str, words), "--html", str(folder / f"{name}.html")]) == 0
    return folder


@pytest.mark.parametrize("name", ["report", "comparison", "map"])
def test_a_page_loads_without_a_complaint(pages, tmp_path, name):
    dom, console = chromium(pages / f"{name}.html", "--dump-dom", profile=tmp_path)
    assert console == []
    assert "alert(1)" in dom
    assert "onerror=" not in re.sub(r"&lt;.*?&gt;", "", dom)
    if name == "map":
        assert 'data-ready="yes"' in dom


def test_a_request_would_be_refused_and_noticed(pages, tmp_path):
    page = tmp_path / "page.html"
    text = (pages / "report.html").read_text()
    page.write_text(text.replace("</body>", '<img src="http://127.0.0.1:9/x.png"><script>1</script></body>'))
    _, console = chromium(page, "--dump-dom", profile=tmp_path / "profile")
    assert len([line for line in console if "Content Security Policy" in line]) == 2


@pytest.mark.parametrize("name", ["report", "comparison", "map"])
@pytest.mark.parametrize("width", [390, 1280])
def test_a_page_follows_the_theme_and_fits_the_screen(pages, tmp_path, name, width):
    from matplotlib.image import imread

    brightness = []
    for theme in (1, 0):
        picture = tmp_path / f"{theme}.png"
        flags = [f"--blink-settings=preferredColorScheme={theme}", f"--window-size={width},1600"]
        chromium(
            pages / f"{name}.html", *flags, f"--screenshot={picture}", profile=tmp_path / f"profile-{theme}"
        )
        pixels = imread(picture)[..., :3]
        assert pixels.shape[1] == width
        assert pixels.std() > 0.02, "there is nothing to be seen"
        brightness.append(float(pixels.mean()))
    assert brightness[0] > 0.75
    assert brightness[1] < 0.3


WIDTH = "document.documentElement.scrollWidth - innerWidth"
OF_MAP = """
  const slider = at("layer"), prompt = at("prompt");
  const classes = () => [...prompt.querySelectorAll("b")].map((span) => span.className.split(" ")[0]);
  const move = (layer) => ((slider.value = layer), slider.dispatchEvent(new Event("input")));
  told.text = prompt.textContent;
  told.overview = new Set(classes()).size;
  told.shown = [...document.querySelectorAll("#legend-all li")].filter((item) => !item.hidden).length;
  told.always = prompt.querySelectorAll(".always").length;
  told.unpruned = !at("unpruned").hidden;
  move(2);
  told.second = classes().join(" ");
  told.said = at("told").textContent;
  move(3);
  told.third = classes().join(" ");
  for (const key of ["ArrowRight", "ArrowRight", "ArrowLeft", "ArrowRight"]) {
    prompt.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true }));
  }
  told.token = at("token").textContent;
  told.cells = at("strip").childElementCount;
  told.chosen = prompt.querySelectorAll(".chosen").length;
"""
OF_ROWS = """
  const heads = () =>
    [...document.querySelectorAll("#rows > article:not([hidden]) h3")].map((head) => head.textContent);
  told.first = heads();
  at("more").click();
  told.all = heads();
  at("order").value = "row 1";
  at("order").dispatchEvent(new Event("change"));
  told.sorted = heads();
  at("search").value = "I>7 answer";
  at("search").dispatchEvent(new Event("input"));
  told.found = heads();
  told.count = at("found").textContent;
  told.more = !at("more").hidden;
"""
OPENED = 'document.querySelector("[data-map]").click();'
PROBE = """
<script>
addEventListener("load", () => {
  const at = (id) => document.getElementById(id);
  const told = { width: WIDTH };
  const tell = () => (document.body.textContent = "TOLD" + JSON.stringify(told) + "DLOT");
  const probe = () => {
    if (READY) return setTimeout(probe, 20);
    LOOK
    tell();
  };
  BEGIN
  probe();
});
</script></body>"""
MAP_READY = "!document.documentElement.dataset.ready"


def probed(page, tmp_path, width=390, *, look="", begin="", ready="false"):
    """What the page says of itself to a script that its policy would not let in."""
    text = re.sub(r"<meta http-equiv=.*?>", "", page.read_text(), count=1)
    changed = tmp_path / "probed.html"
    script = PROBE.replace("WIDTH", WIDTH).replace("READY", ready).replace("LOOK", look)
    changed.write_text(text.replace("</body>", script.replace("BEGIN", begin)))
    dom, _ = chromium(changed, f"--window-size={width},900", "--dump-dom", profile=tmp_path / "profile")
    return json.loads(html.unescape(re.search("TOLD(.*)DLOT", dom, re.DOTALL)[1]))


@pytest.mark.parametrize("name", ["report", "comparison", "map"])
@pytest.mark.parametrize("width", [390, 1280])
def test_nothing_is_wider_than_the_screen(pages, tmp_path, name, width):
    assert probed(pages / f"{name}.html", tmp_path, width)["width"] <= 0


def test_the_map_answers_to_slider_and_keys(pages, tmp_path):
    row = selected(3, tokens=63)
    told = probed(pages / "map.html", tmp_path, look=OF_MAP, ready=MAP_READY)
    assert told["text"] == row.prompt_text
    assert told["overview"] > 1
    second, third = told["second"].split(), told["third"].split()
    assert set(second) == {"full", "skipped"}
    assert [name == "left" for name in third] == [name == "skipped" for name in second]
    assert told["said"] == f"layer 1: {second.count('full')} in full, {second.count('skipped')} skipped"
    assert told["token"].startswith('Token 1, " w1": FFN in full in ')
    assert (told["cells"], told["chosen"]) == (3, 1)
    assert told["shown"] == 3, "all layers, fewest, and left; nothing lies between"
    assert (told["always"], told["unpruned"]) == (63, False), "all that fits into a block of sliminfer"


def test_a_report_opens_the_map_of_a_row(pages, tmp_path):
    told = probed(pages / "report.html", tmp_path, look=OF_MAP, begin=OPENED, ready=MAP_READY)
    assert told["text"] == selected(0, tokens=60).prompt_text
    assert set(told["second"].split()) == {"full", "skipped"}


def test_rows_are_sorted_and_found(pages, tmp_path):
    told = probed(pages / "comparison.html", tmp_path, look=OF_ROWS)
    assert (len(told["first"]), len(told["all"])) == (25, 40)
    assert told["sorted"] == [f"<i>{n}" for n in range(40)]
    assert told["found"] == ["<i>7"]
    assert (told["count"], told["more"]) == ("1 of 1 rows shown", False)
