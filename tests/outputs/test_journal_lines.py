"""A published JSONL output is gone on with by what stands in the file beside it."""

import base64
import itertools
import json
import os

import pyarrow as pa
import pytest
from journal_runs import (
    SETTINGS,
    answer,
    ask,
    dying_after,
    finish,
    ids,
    killed,
    numbered,
    read,
    refusal,
    start,
    work,
)

from pipeline.errors import ConfigError, StorageError
from pipeline.outputs import published
from pipeline.outputs.journal import journal_folder
from pipeline.outputs.writing import check_output

FAITHFUL = pa.schema(
    [
        ("text", pa.large_string()),
        ("whole", pa.uint64()),
        ("half", pa.float16()),
        ("single", pa.float32()),
        ("double", pa.float64()),
        ("flag", pa.bool_()),
        ("nothing", pa.null()),
        ("category", pa.dictionary(pa.int8(), pa.string())),
        ("labels", pa.list_(pa.dictionary(pa.int8(), pa.string()))),
        ("pair", pa.list_(pa.int32(), 2)),
        ("nested", pa.struct([("a", pa.large_list(pa.int16())), ("b", pa.string())])),
    ]
)


def faithful(row):
    return {
        "text": f'"quoted"\n\u2028 naïve {row}',
        "whole": 2**64 - 1 - row,
        "half": 0.5,
        "single": 0.1,
        "double": 1e-300 * row,
        "flag": row % 2 == 0,
        "nothing": None,
        "category": f"value {row}",
        "labels": [f"label {row}", None],
        "pair": [row, -row],
        "nested": {"a": [row, None], "b": None},
    }


def append(journal, rows, schema=FAITHFUL, values=faithful):
    for row in rows:
        copied = pa.RecordBatch.from_pylist([values(row)], schema=schema)
        if not ask(journal, row, passthrough=copied):
            message = None if row % 2 else "in row\nthat failed"
            journal.append([answer(row, error_message=message, passthrough=copied)])


@pytest.fixture
def path(tmp_path):
    return tmp_path / "out.jsonl"


@pytest.fixture
def sidecar(tmp_path):
    return tmp_path / "out.jsonl.run.json"


@pytest.mark.slow
@pytest.mark.parametrize("group_bytes", [1, 4 << 20])
def test_all_that_json_gives_back_is_taken_over(path, tmp_path, monkeypatch, group_bytes):
    monkeypatch.setattr(published, "LINES_GROUP_ROWS", 40)
    monkeypatch.setattr(published, "LINES_GROUP_BYTES", group_bytes)
    whole = tmp_path / "whole.jsonl"
    for output, counts in ((path, (150, 300)), (whole, (300,))):
        for count in counts:
            with start(output, passthrough=FAITHFUL) as journal:
                append(journal, range(count))
                assert journal.passed_over == (150 if (output, count) == (path, 300) else 0)
                assert journal.publish()
    assert ids(path) == numbered(300)
    assert path.read_bytes() == whole.read_bytes()


def test_the_sidecar_says_how_the_output_was_made(path, sidecar):
    finish(path, numbered(2), passthrough=pa.schema([("category", pa.dictionary(pa.int8(), pa.string()))]))
    content = json.loads(sidecar.read_text())
    assert content["marsinfer"]["settings_that_decide"] == json.loads(json.dumps(SETTINGS))
    assert content["bytes"] == [path.stat().st_size]
    assert (content["columns"]["row"], content["columns"]["category"]) == ("int64", "string")
    assert pa.ipc.read_schema(pa.py_buffer(base64.b64decode(content["arrow_schema"]))).names[0] == "id"


def test_other_settings_are_refused_by_name(path):
    finish(path, numbered(2))
    assert refusal(path, settings={**SETTINGS, "model": "big"}) == (
        f'{path} was begun with other settings: model was "tiny" and is now "big"; --overwrite starts over'
    )


@pytest.mark.parametrize(
    "kind",
    [
        pa.timestamp("us"),
        pa.binary(),
        pa.decimal128(5, 2),
        pa.map_(pa.string(), pa.int32()),
        pa.list_(pa.date32()),
        pa.struct([("a", pa.int8()), ("a", pa.int8())]),
        pa.dictionary(pa.int8(), pa.date32()),
        pa.uuid(),
    ],
    ids=str,
)
def test_a_type_that_json_does_not_give_back_is_refused_by_name(path, kind):
    odd = pa.schema([("odd", kind)])
    finish(path, numbered(2), passthrough=odd)
    assert refusal(path, passthrough=odd) == (
        f"{path} holds 'odd' as {kind}, which JSON does not give back; --overwrite starts over"
    )


def test_an_output_is_known_wherever_a_run_that_replaces_it_dies(tmp_path):
    for moment in itertools.count():
        path = tmp_path / str(moment) / "out.jsonl"
        path.parent.mkdir()
        finish(path, numbered(5))
        with dying_after(moment) as death, start(path, resume=False, overwrite=True) as journal:
            work(journal, numbered(8, 3))
            journal.publish()
        check_output(path, (), overwrite=True)
        if not death.came:
            break
    assert moment > 10


def test_an_output_without_its_sidecar_is_refused(path, sidecar):
    finish(path, numbered(2))
    sidecar.unlink()
    assert refusal(path) == (
        f"{path} is complete, and no out.jsonl.run.json says how it was made; --overwrite starts over"
    )
    assert finish(path, numbered(2), resume=False, overwrite=True) == ["id 0", "id 1"]
    assert finish(path, numbered(2)) == []


@pytest.mark.parametrize("content", ["", "{", "[]", "7", '{"version": 1}', '{"version": 1, "bytes": 7}'])
def test_a_file_in_the_sidecars_place_is_not_replaced_unasked(path, sidecar, content):
    sidecar.write_text(content)
    expected = f"{sidecar} is damaged, or not of marsinfer; move it away and run again"
    assert refusal(path) == refusal(path, resume=False) == expected
    assert sidecar.read_text() == content
    finish(path, numbered(2), resume=False, overwrite=True)
    assert finish(path, numbered(3)) == ["id 2"]


def test_an_output_that_was_changed_is_refused(path):
    finish(path, numbered(2))
    size = path.stat().st_size
    with path.open("a") as lines:
        lines.write("{}\n")
    assert refusal(path) == (
        f"{path} has {size + 3:,} bytes, and by out.jsonl.run.json it had {size:,}: one of them was changed; "
        "move it away to start over"
    )


@pytest.mark.parametrize(("old", "new"), [('"row": 1,', '"row":  ,'), ('"row": 1,', '"raw": 1,')])
def test_damage_of_the_same_size_is_told(path, old, new):
    finish(path, numbered(2))
    path.write_text(path.read_text().replace(old, new))
    assert refusal(path).startswith(f"{path} cannot be read: ")
    assert refusal(path).endswith("; --overwrite starts over")


@pytest.mark.parametrize("extends", [False, True])
def test_a_run_killed_between_sidecar_and_output_goes_on(path, monkeypatch, extends):
    if extends:
        finish(path, numbered(3))
    journal = start(path)
    work(journal, numbered(5))
    real = os.replace

    def killed_before_the_output(source, target):
        if target == path:
            raise KeyboardInterrupt
        real(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed_before_the_output)
        with pytest.raises(KeyboardInterrupt):
            journal.publish()
    assert path.exists() == extends
    assert finish(path, numbered(6)) == ["id 5"]
    assert ids(path) == numbered(6)
    assert finish(path, numbered(6)) == []


def test_a_run_that_overwrites_never_goes_on_with_the_old_output(path, monkeypatch):
    finish(path, numbered(3))
    old = path.read_bytes()
    killed(path, numbered(1), resume=False, overwrite=True, settings={"model": "other"})
    assert path.read_bytes() == old
    assert "was begun with other settings" in refusal(path)
    with start(path, settings={"model": "other"}) as journal:
        assert journal.done_at_start.total() == 1
    assert journal_folder(path).is_dir()


def test_a_link_has_its_sidecar_beside_the_file(tmp_path):
    (tmp_path / "far").mkdir()
    link = tmp_path / "out.jsonl"
    link.symlink_to(tmp_path / "far" / "real.jsonl")
    finish(link, numbered(2))
    assert sorted(os.listdir(tmp_path / "far")) == ["real.jsonl", "real.jsonl.run.json"]
    assert finish(tmp_path / "far" / "real.jsonl", numbered(3)) == ["id 2"]
    assert link.is_symlink()
    assert len(read(link)) == 3


def test_other_formats_have_no_sidecar(tmp_path):
    finish(tmp_path / "out.arrow", numbered(2))
    assert os.listdir(tmp_path) == ["out.arrow"]


def test_a_full_disk_at_the_sidecar_keeps_the_journal(path, monkeypatch):
    def full(*names, **like):
        raise OSError(28, os.strerror(28))

    with start(path) as journal:
        work(journal, numbered(3))
        with monkeypatch.context() as patch:
            patch.setattr("pipeline.outputs.sidecar.save_json", full)
            with pytest.raises(StorageError, match="--resume continues"):
                journal.publish()
    assert not path.exists()
    assert finish(path, numbered(3)) == []


def test_a_sidecar_of_another_version_is_refused(path, sidecar):
    finish(path, numbered(1))
    sidecar.write_text(sidecar.read_text().replace('"version": 1', '"version": 2'))
    with pytest.raises(ConfigError, match="another version of marsinfer; --overwrite starts over"):
        start(path)
