"""The program against what is written down of it in golden/, which `python -m golden.make interface` writes.

What fails here changes for users, or for what they have on disk: if that is not meant, the program is wrong.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from golden import BEFORE, HERE, record
from golden.calls import CALLS, OF_TYPER, outcome
from golden.outputs import columns, make_outputs, metadata
from golden.surface import all_commands, flags, help_texts, plain_surroundings, versions

from pipeline.outputs.chunks import scan_part
from pipeline.outputs.parts import journal_parts
from pipeline.settings.run_settings import BatchConfig
from pipeline.settings.sources import read_config, taken, to_toml
from pipeline.setup.profile import load_profile

ANEW = "if that is meant, `python -m golden.make interface` in tests/ writes it down"


def golden(name: str) -> Any:
    return json.loads((HERE / name).read_text(encoding="utf-8"))


def differences(before: Any, now: Any, place: str = "") -> list[str]:
    """A line for each value that differs, that is gone or that is new."""
    if not (isinstance(before, dict) and isinstance(now, dict)):
        return [] if before == now else [f"{place}: was {before!r} and is now {now!r}"]
    found = [f"{place} {key}: is gone; was {before[key]!r}" for key in before if key not in now]
    found += [f"{place} {key}: is new: {now[key]!r}" for key in now if key not in before]
    for key in before:
        if key in now:
            found += differences(before[key], now[key], f"{place} {key}")
    return found


def check_same(before: Any, now: Any, place: str) -> None:
    found = differences(before, json.loads(json.dumps(now)), place)
    assert not found, "\n".join([*found, ANEW])


needs_same_typer = pytest.mark.skipif(
    versions() != golden("made_with.json"), reason="another version of Typer or rich lays out or words it"
)


def test_the_commands():
    assert sorted(all_commands()) == sorted(golden("flags.json")), ANEW


@pytest.mark.parametrize("words", golden("flags.json"))
def test_flags(words):
    check_same(golden("flags.json")[words], flags().get(words, {}), words)


@needs_same_typer
def test_help():
    now = help_texts()
    before = {path.name: path.read_text(encoding="utf-8") for path in (HERE / "help").iterdir()}
    assert sorted(now) == sorted(before), ANEW
    for name, text in before.items():
        assert now[name].splitlines() == text.splitlines(), f"{name}: {ANEW}"


def test_the_calls():
    assert list(golden("exit_codes.json")) == list(CALLS)


@pytest.mark.parametrize("line", CALLS)
def test_exit_code_and_message(line, tmp_path):
    before, now = golden("exit_codes.json")[line], outcome(line, tmp_path)
    if line in OF_TYPER and versions() != golden("made_with.json"):
        before, now = before["exit_code"], now["exit_code"]
    check_same(before, now, line)


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    """A folder of outputs, and what was printed."""
    folder = tmp_path_factory.mktemp("outputs")
    return folder, make_outputs(folder)


@pytest.mark.parametrize("kind", golden("columns.json"))
def test_columns(outputs, kind):
    before, now = golden("columns.json")[kind], columns(outputs[0])[kind]
    check_same(before, now, kind)
    assert list(before) == list(now), f"{kind}: the order changed; {ANEW}"


@pytest.mark.parametrize("kind", golden("metadata.json"))
def test_metadata(outputs, kind):
    check_same(golden("metadata.json")[kind], metadata(*outputs)[kind], kind)


PRUNED = "--method marsinfer"  # which was the default before


@pytest.fixture
def before(tmp_path, monkeypatch):
    """A copy of what version 0.1.0 has left, as the folder that everything runs in."""
    folder = tmp_path / "before"
    shutil.copytree(BEFORE, folder)
    monkeypatch.chdir(folder)
    with plain_surroundings():
        yield folder


@pytest.mark.parametrize("name", record.BATCH)
def test_an_output_of_before_is_complete(before, name):
    content = Path(name).read_bytes()
    _, told = record.call(f"{record.BATCH[name]} --resume")
    assert told.splitlines() == [
        "marsinfer: note: --method auto: marsinfer, as the run began",
        "marsinfer: note: resuming: 3 rows are done",
        f"marsinfer: note: nothing new: every row was done; {name} stays as it is",
    ]
    assert Path(name).read_bytes() == content


def test_an_output_of_before_takes_new_rows(before):
    rows = pq.read_table("out.parquet").to_pylist()
    with Path("in.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps({**record.INPUT[0], "id": "new"}) + "\n")
    printed, _ = record.call(f"{record.BATCH['out.parquet']} --resume --json")
    assert json.loads(printed)["documents"] == 1
    after = pq.read_table("out.parquet").to_pylist()
    assert after[:3] == rows
    assert (after[3]["id"], after[3]["status"]) == ("new", "ok")


def test_settings_of_before_are_those_of_their_output(before):
    made_with = json.loads(pq.read_schema("many.parquet").metadata[b"marsinfer"])["config"]
    config = BatchConfig(**taken(BatchConfig, read_config("settings.toml"), lambda text: None))
    made_with = taken(BatchConfig, made_with, lambda text: None)  # under the names of today
    assert json.loads(json.dumps(config.resolved())).items() >= made_with.items()
    lines = Path("settings.toml").read_text(encoding="utf-8").splitlines()
    gone = {'attention_dtype = "auto"'}  # of which there is no other any more
    now = [line.split(" = ") for line in to_toml(config).splitlines()]  # with the dashes of flags
    now = {" = ".join([name.replace("-", "_"), *value]) for name, *value in now}
    assert set(lines) - now == gone  # a later version may have more
    _, told = record.call("batch --config settings.toml --resume --quiet")
    assert told.endswith("nothing new: every row was done; many.parquet stays as it is\n")


def test_a_changed_setting_is_refused_with_the_value_of_before(before):
    _, told = record.call(f"{record.BATCH['out.parquet']} --resume --seed 1 {PRUNED} --set eta=0.5", code=2)
    assert told == (
        "marsinfer: error: out.parquet was begun with other settings: method.settings.eta was 0.95 and is "
        "now 0.5, sampling.seed was 0 and is now 1; --overwrite starts over\n"
    )


def test_an_unfinished_run_of_before_goes_on(before):
    (part,) = journal_parts(Path(".unfinished.parquet.journal"))
    finished = [row for chunk in scan_part(part) for row in chunk.table.to_pylist()]
    printed, told = record.call(f"{record.UNFINISHED} --resume --json")
    assert told.endswith(f"marsinfer: note: resuming: {record.DONE_OF_UNFINISHED} rows are done\n")
    assert json.loads(printed)["documents"] == 1
    rows = pq.read_table("unfinished.parquet").to_pylist()
    assert [(row["id"], row["status"]) for row in rows] == [(row["id"], "ok") for row in record.INPUT]
    assert len(finished) == record.DONE_OF_UNFINISHED
    assert [row for row in finished if row not in rows] == []  # with the times that they took then
    assert not part.parent.exists()


@pytest.mark.parametrize(
    ("name", "answered"),
    [("out.parquet", 3), ("out.jsonl", 3), ("unfinished.parquet", record.DONE_OF_UNFINISHED)],
)
def test_report_reads_outputs_of_before(before, name, answered):
    printed, _ = record.call(f"report {name}")
    assert [line.split()[-2] for line in printed.splitlines() if "answered" in line] == [str(answered)]


def test_a_selection_of_before_is_shown(before):
    printed, _ = record.call("report many.parquet --row mill")
    assert printed.startswith("row 1, mill, sliminfer, 195 tokens\nquestion: What did the owner mend?\n")


def test_an_unfinished_check_of_before_goes_on(before):
    lines = Path(".result.json.journal").read_text(encoding="utf-8").splitlines()
    finished = [json.loads(line) for line in lines[1:]]
    _, told = record.call(f"{record.UNFINISHED_CHECK} --resume --scope rows", code=6)  # it prunes nothing
    assert told.startswith(f"marsinfer: note: resuming: {record.DONE_OF_CHECK} results are done\n")
    rows = {row["id"]: row for row in json.loads(Path("result.json").read_text(encoding="utf-8"))["rows"]}
    assert list(rows) == [row["id"] for row in record.INPUT]
    assert len(finished) == record.DONE_OF_CHECK
    for each in finished:  # a time tells whether it ran again
        assert rows[each["id"]]["ttft_ms"][each["side"]] == each["ttft_ms"]
    assert not Path(".result.json.journal").exists()


def test_a_baseline_of_before_stands_for_dense(before):
    content = Path("dense.parquet").read_bytes()
    _, told = record.call(f"{record.BASELINE} --scope rows", code=6)  # its model scores nothing to be lost
    assert told.startswith("marsinfer: note: dense is taken from dense.parquet, of 20")
    assert "there is no room to lose" in told
    assert Path("dense.parquet").read_bytes() == content
    pruning = "--set prefix=0 --set window=1 --set eta=0.3 --set start_layer=0"
    record.call(f"{record.BASELINE} --scope rows --metric nll --max-drop 99% {pruning}")
    assert Counter(pq.read_table("dense.parquet")["side"].to_pylist()) == {"dense": 3, "accepted": 3}


def test_a_profile_of_before_is_used(before):
    profile = load_profile("profile.toml")
    assert profile.about["model"] == "random:tiny"
    _, told = record.call(f"batch in.jsonl new.parquet {record.PLAIN} --profile profile.toml")
    assert "was held to a weaker gate" in told
    metadata = json.loads(pq.read_schema("new.parquet").metadata[b"marsinfer"])
    method = metadata["settings_that_decide"]["method"]
    assert method["name"] == profile.batch["method"]
    none = {"sparse_attention": None}
    assert method["settings"] == json.loads(json.dumps({**profile.batch["settings"], **none}))
    assert metadata["settings_that_decide"]["guard"]["longest"] == profile.longest
