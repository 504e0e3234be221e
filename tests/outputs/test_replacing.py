"""Files that commands write replace files of the same kind, and none that they did not write."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.bench.plot import check_plot, save_picture
from pipeline.checks.baseline import write_baseline
from pipeline.checks.reports import junit, refuse_foreign_files
from pipeline.errors import ConfigError
from pipeline.outputs import replacing
from pipeline.outputs.replacing import refuse_foreign_file
from pipeline.report.page import check_page, render, write_page
from pipeline.settings.calibrate_settings import CalibrateConfig
from pipeline.setup.profile import Profile, write_profile

FOREIGN = {
    "json": json.dumps({"verdict": "pass", "settings": {}}),
    "xml": '<testsuites name="pytest tests"><!-- marsinfer check --></testsuites>',
    "html": "<!doctype html><p>On marsinfer, by hand",
    "toml": '[profile]\nname = "mine"\n',
    "png": "\x89PNG  marsinfer",
    "svg": "<svg><dc:title>mine</dc:title>marsinfer</svg>",
    "pdf": "%PDF-1.4 /Creator (me) /Title (marsinfer)",
    "parquet": "PAR1",
}


def page(path):
    write_page(str(path), render("base.html.j2"))


def picture(path):
    pytest.importorskip("matplotlib")
    save_picture(str(path), "nothing drawn", lambda axes: None)


def result(path):
    path.write_text(json.dumps({"verdict": "pass", "gates": [], "about": {}, "settings": {}, "rows": []}))


def junit_file(path):
    junit(SimpleNamespace(gates=[], method="mars", against="dense", about={"started": "now"})).write(path)


def profile(path):
    write_profile(path, Profile(about={"format": 1, "model": "tiny"}, batch={"method": "mars"}))


def baseline(path):
    write_baseline(path, [], [], {}, {})


def gate_file(name):
    def check(path):
        files = {"result_file": None, "junit": None, "baseline": None, "overwrite_baseline": True}
        refuse_foreign_files(SimpleNamespace(**{**files, name: path}))

    return check


def calibrating(path):
    CalibrateConfig(input=("in.jsonl",), question_column="question", out=str(path), overwrite=True)


KINDS = {
    "json": (result, gate_file("result_file")),
    "xml": (junit_file, gate_file("junit")),
    "html": (page, lambda path: check_page(str(path), [])),
    "toml": (profile, calibrating),
    "png": (picture, lambda path: check_plot(str(path))),
    "svg": (picture, lambda path: check_plot(str(path))),
    "pdf": (picture, lambda path: check_plot(str(path))),
    "parquet": (baseline, gate_file("baseline")),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_of_file_replaces_its_own_and_no_other(tmp_path, kind):
    path = tmp_path / f"file.{kind}"
    write, check = KINDS[kind]
    check(path)
    write(path)
    check(path)
    path.write_bytes(b"")
    check(path)
    for content in FOREIGN.values():
        path.write_text(content)
        with pytest.raises(ConfigError) as refused:
            check(path)
        assert str(refused.value).endswith(
            f" {path} exists, and marsinfer did not write it: name another file"
        )
        assert path.read_text() == content


def test_a_table_is_no_baseline_for_having_a_name_of_ours(tmp_path):
    path = tmp_path / "file.parquet"
    pq.write_table(pa.table({"id": ["a"], "text": ["precious"]}), path)
    with pytest.raises(ConfigError):
        refuse_foreign_file("--baseline", path, replacing.is_baseline)
