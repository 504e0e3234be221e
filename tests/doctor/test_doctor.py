"""`marsinfer doctor`: exit codes, the JSON of bug reports, and probes that fail in every way there is."""

from __future__ import annotations

import json
import os
import re
import tomllib
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace

import pytest

from marsinfer_cli.app import run
from pipeline.bench.attention_speed import CANDIDATES
from pipeline.doctor import examine as examination
from pipeline.doctor import packages, selftest
from pipeline.doctor.examine import examine
from pipeline.doctor.findings import Probe
from pipeline.pruning.registry import METHODS, method_names

PYPROJECT = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))[
    "project"
]

PROBED = """
import os, sys, time, types
from pipeline.doctor.findings import Finding

def fine():
    print("libraries print on stdout what they like")
    return Finding(status="ok", text="fine", facts={"process": os.getpid()})

def fails():
    raise LookupError("nothing there\\nand a second line")

def aborts():
    print("about to fall", file=sys.stderr, flush=True)
    os.abort()

def leaves():
    sys.exit(0)

def hangs():
    time.sleep(600)

def spoils_the_gpu():
    def synchronize():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
    cuda = types.SimpleNamespace(is_initialized=lambda: True, synchronize=synchronize)
    sys.modules["torch"] = types.SimpleNamespace(cuda=cuda)
    return Finding(status="absent", text="refused")
"""


@pytest.fixture
def probed(tmp_path, monkeypatch):
    """Probes by the names of the functions above."""
    (tmp_path / "probed.py").write_text(PROBED)
    monkeypatch.syspath_prepend(tmp_path)
    return lambda *names: [Probe(group="test", name=name, where=f"probed:{name}") for name in names]


@pytest.fixture(scope="module")
def whole():
    """One run of everything."""
    return examine()


@pytest.mark.slow
def test_nothing_is_broken_here_and_everything_was_looked_at(whole):
    assert [(probe.name, finding.text) for probe, finding in whole.broken] == []
    names = {group: [p.name for p, _ in whole.findings if p.group == group] for group in examination.GROUPS}
    assert list(dict.fromkeys(p.group for p, _ in whole.findings)) == list(examination.GROUPS)
    assert names["attention backends"] == list(CANDIDATES)
    assert names["self-test"] == method_names()
    assert all(finding.text and "\n" not in finding.text for _, finding in whole.findings)


@pytest.mark.slow
def test_the_self_test_prunes_and_equals_dense(whole):
    facts = {probe.name: finding.facts for probe, finding in whole.findings if probe.group == "self-test"}
    assert all(each["off"] <= each["tolerance"] for each in facts.values())
    shares = [min(each["ffn_share"], each["pairs_share"]) for name, each in facts.items() if name != "dense"]
    assert all(0.1 < share < 0.95 for share in shares)


@pytest.mark.slow
def test_the_keys_of_the_json_are_those_that_bug_reports_are_read_by(whole):
    told = json.loads(json.dumps(whole.as_dict()))
    assert set(told) == {"format", "ok", "checks"}
    assert (told["format"], told["ok"]) == (1, True)
    assert all(set(check) == {"group", "name", "status", "text", "facts"} for check in told["checks"])
    assert {check["status"] for check in told["checks"]} <= {"ok", "absent", "note", "broken"}
    facts = {(check["group"], check["name"]): check["facts"] for check in told["checks"]}
    assert set(facts["versions", "torch"]) == {"version"}
    assert set(facts["versions", "python"]) == {"version", "executable", "platform"}
    assert {"driver", "torch_cuda", "count"} <= set(facts["machine", "gpu"])
    memory = {"memory_total_bytes", "memory_available_bytes", "cores", "threads"}
    assert set(facts["machine", "memory"]) == memory
    assert set(facts["machine", "disk"]) == {"path", "total_bytes", "free_bytes"}
    assert set(facts["precisions", "float32"]) == {"off", "tolerance"}


@pytest.mark.slow
def test_the_command_shows_what_was_found(whole, monkeypatch, capfd):
    monkeypatch.setattr(examination, "examine", lambda **_: whole)
    assert run(["doctor", "--quiet"]) == 0
    printed = capfd.readouterr()
    assert printed.err == ""
    assert re.search(r"^ {2}float32 +ok +within 0.0001 of transformers", printed.out, re.MULTILINE)
    assert printed.out.endswith("Nothing is broken.\n")
    assert run(["doctor", "--json", "--quiet"]) == 0
    assert json.loads(capfd.readouterr().out) == json.loads(json.dumps(whole.as_dict()))


def test_a_log_has_whole_paths_and_no_padding(monkeypatch, capfd):
    path = "/a/" + "long/" * 60 + "path"
    said = [("versions", "rich", "ok", "15.0"), ("machine", "disk", "absent", path)]
    findings = [
        (SimpleNamespace(group=group, name=name), SimpleNamespace(status=status, text=text))
        for group, name, status, text in said
    ]
    result = SimpleNamespace(findings=findings, broken=[])
    monkeypatch.setattr(examination, "examine", lambda **_: result)
    assert run(["doctor", "--quiet"]) == 0
    assert capfd.readouterr().out == (
        f"versions\n  rich  ok      15.0\n\nmachine\n  disk  -       {path}\n\nNothing is broken.\n"
    )


def test_an_installed_package_that_cannot_be_imported_is_broken(tmp_path, monkeypatch, capfd):
    for name, module, code in (
        ("flash_attn", "flash_attn", "raise ImportError('undefined symbol: _ZN3c10')"),
        ("fa3_fwd", "fa3_fwd_interface", "import os; os.abort()"),
    ):
        (tmp_path / f"{name}-9.9.dist-info").mkdir()
        metadata = f"Metadata-Version: 2.1\nName: {name.replace('_', '-')}\nVersion: 9.9\n"
        (tmp_path / f"{name}-9.9.dist-info" / "METADATA").write_text(metadata)
        (tmp_path / f"{module}.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    of_packages = tuple(
        probe for probe in examination.all_probes() if probe.name in ("fa3-fwd", "flash-attn", "rich")
    )
    of_packages = tuple(probe for probe in of_packages if probe.group == examination.VERSIONS)
    monkeypatch.setattr(examination, "all_probes", lambda: of_packages)
    assert run(["doctor", "--json"]) == 1
    printed = capfd.readouterr()
    assert printed.err == (
        "marsinfer: error: broken here: fa3-fwd (versions), flash-attn (versions); the report says how\n"
    )
    told = json.loads(printed.out)
    assert told["ok"] is False
    found = {check["name"]: (check["status"], check["text"]) for check in told["checks"]}
    assert found["rich"][0] == "ok"
    assert found["fa3-fwd"] == ("broken", "its process was ended by SIGABRT")
    assert found["flash-attn"] == (
        "broken",
        "9.9 is installed, but cannot be imported: ImportError: undefined symbol: _ZN3c10",
    )


@pytest.fixture
def hurried(monkeypatch):
    """Gives the probe that hangs up at once, and all others time, however busy the machine is."""
    begun = []

    class Said(Connection):
        def poll(self, timeout):
            return super().poll(0.1 if (timeout, *begun[-1:]) == (2, "hangs") else 300)

    def pipe(duplex):
        said, saying = Pipe(duplex)
        return Said(os.dup(said.fileno()), writable=False), saying

    monkeypatch.setattr(examination, "Pipe", pipe)
    return lambda probes: examine(probes, progress=lambda probe: begun.append(probe.name), timeout_s=2)


def test_probes_that_fail_are_findings_and_the_others_run(probed, hurried):
    result = hurried(probed("fails", "fine", "aborts", "leaves", "fine", "hangs", "fine"))
    assert [(finding.status, finding.text) for _, finding in result.findings] == [
        ("broken", "LookupError: nothing there"),
        ("ok", "fine"),
        ("broken", "its process was ended by SIGABRT: about to fall"),
        ("broken", "its process ended with exit code 0"),
        ("ok", "fine"),
        ("broken", "took longer than 2 s, and was stopped"),
        ("ok", "fine"),
    ]
    assert [probe.name for probe, _ in result.broken] == ["fails", "aborts", "leaves", "hangs"]


def test_a_gpu_left_unusable_is_told_once_and_the_others_get_another_process(probed):
    spoilt, after, last = (f for _, f in examine(probed("spoils_the_gpu", "fine", "fine")).findings)
    assert (spoilt.status, spoilt.text) == (
        "broken",
        "refused; it left the GPU unusable: "
        "RuntimeError: CUDA error: an illegal memory access was encountered",
    )
    assert after.status == "ok"
    assert after.facts["process"] == last.facts["process"] != os.getpid()


BAD = """
from dataclasses import dataclass
from typing import ClassVar
from pipeline.pruning.base import PruningMethod, Selection

@dataclass(frozen=True, kw_only=True)
class Skips(PruningMethod):
    name: ClassVar[str] = "skips"
    def select(self, layer, view, state):
        return Selection(ffn=view.all_indices[-1:])

@dataclass(frozen=True, kw_only=True)
class Keeps(PruningMethod):
    name: ClassVar[str] = "keeps"
    def select(self, layer, view, state):
        return Selection(ffn=view.all_indices)

@dataclass(frozen=True, kw_only=True)
class Spoils(PruningMethod):
    name: ClassVar[str] = "spoils"
    def select(self, layer, view, state):
        view.hidden.fill_(float("nan"))
        return Selection(ffn=view.all_indices[:0])
"""


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("Skips", "with full settings it is off dense by"),
        ("Keeps", "a prefill that should be pruned is not"),
        ("Spoils", "a pruned prefill gives logits that are not finite"),
    ],
)
def test_a_method_that_computes_something_else_is_broken(name, fault, tmp_path, monkeypatch):
    (tmp_path / "bad.py").write_text(BAD)
    monkeypatch.setitem(METHODS, "bad", f"{tmp_path / 'bad.py'}:{name}")
    finding = selftest.method("bad")
    assert finding.status == "broken"
    assert fault in finding.text


def test_the_tables_of_packages_are_those_of_the_project():
    def names(lines):
        return {re.match(r"[\w-]+", line)[0] for line in lines}

    assert set(packages.REQUIRED) == names(PYPROJECT["dependencies"])
    extras = {
        extra: names(lines) for extra, lines in PYPROJECT["optional-dependencies"].items() if extra != "test"
    }
    listed = {name: package.extra for name, package in packages.OPTIONAL.items() if package.extra}
    assert listed == {name: extra for extra, of_extra in extras.items() for name in of_extra}


def test_a_package_that_is_missing_says_what_it_would_give(monkeypatch):
    monkeypatch.setitem(packages.OPTIONAL, "no-such", packages.Optional("no_such", "quality", "rhymes"))
    finding = packages.package("no-such")
    assert (finding.status, finding.text) == (
        "absent",
        "not installed; it gives rhymes (pip install '.[quality]')",
    )
    assert packages.package("none-such").status == "broken"  # what is not optional is required
