"""What is refused as an output before any work."""

import json
import os

import pyarrow as pa
import pytest

from pipeline.errors import ConfigError, StorageError
from pipeline.outputs.answers import answers_table, output_schema
from pipeline.outputs.beginnings import SETTINGS_KEY
from pipeline.outputs.sidecar import write_sidecar
from pipeline.outputs.writing import check_output, output_writer
from pipeline.records import Answer

NOTHING = pa.schema([])


@pytest.mark.parametrize("name", ["out.csv", "out", "out.parquet.gz"])
def test_unknown_extensions_are_refused(tmp_path, name):
    path = tmp_path / name
    for attempt in (lambda: output_writer(path, NOTHING).__enter__(), lambda: check_output(path, (), False)):
        with pytest.raises(ConfigError) as caught:
            attempt()
        assert str(caught.value) == (
            f"{path} has an extension that is not known; "
            "outputs are .parquet, .arrow, .feather, .ipc, .arrows, .jsonl"
        )


def refusal(path, inputs=(), overwrite=False, error=ConfigError):
    with pytest.raises(error) as caught:
        check_output(path, inputs, overwrite)
    return str(caught.value)


def test_a_good_output_passes(tmp_path):
    check_output(tmp_path / "out.parquet", [tmp_path / "in.parquet"], False)
    (tmp_path / "out.parquet").touch()
    check_output(tmp_path / "out.parquet", [tmp_path / "in.parquet"], True)
    assert os.listdir(tmp_path) == ["out.parquet"]


@pytest.mark.parametrize("content", ["precious", "7", '{"version": 1}'])
def test_a_file_of_the_user_beside_an_output_is_not_replaced(tmp_path, content):
    sidecar = tmp_path / "out.jsonl.run.json"
    sidecar.write_text(content)
    for overwrite in (False, True):
        assert refusal(tmp_path / "out.jsonl", overwrite=overwrite) == (
            f"{sidecar}, which out.jsonl needs, exists, and marsinfer did not write it: name another output"
        )
    sidecar.write_text("")
    check_output(tmp_path / "out.jsonl", (), True)


@pytest.mark.parametrize("name", ["out.parquet", "out.arrow", "out.arrows", "out.jsonl"])
def test_only_what_a_run_wrote_may_be_replaced(tmp_path, name):
    path = tmp_path / name
    schema = output_schema(NOTHING, {"marsinfer": json.dumps({SETTINGS_KEY: {}})})

    def before(written):
        if "jsonl" in name:
            write_sidecar(path, written, tmp_path / "partial")

    with output_writer(path, schema, before=before) as writer:
        writer.write_table(answers_table([Answer(id="a", row=0)], schema))
    assert refusal(path) == f"{path} exists; --overwrite replaces it"
    check_output(path, (), True)
    path.write_bytes(b"precious")
    if path.suffix == ".jsonl":  # what lies beside it is of a run all the same
        assert refusal(path, overwrite=True) == (
            f"{path} was changed since marsinfer wrote it: name another output"
        )
    for each in tmp_path.glob("*.run.json"):
        each.unlink()
    for overwrite in (False, True):
        assert refusal(path, overwrite=overwrite) == (
            f"{path} exists, and marsinfer did not write it: name another output"
        )


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("link", ["same", "symbolic", "hard"])
def test_an_input_is_never_the_output(tmp_path, link, overwrite):
    given = tmp_path / "in.parquet"
    given.write_text("precious")
    path = given if link == "same" else tmp_path / "out.parquet"
    if link == "symbolic":
        path.symlink_to(given)
    elif link == "hard":
        path.hardlink_to(given)
    expected = f"{path} is also an input ({given}); name another output"
    assert refusal(path, [tmp_path / "gone.parquet", given], overwrite) == expected


def test_folders_are_checked(tmp_path):
    (tmp_path / "out.parquet").mkdir()
    assert refusal(tmp_path / "out.parquet") == f"{tmp_path}/out.parquet is a folder; name a file in it"
    assert refusal(tmp_path / "no" / "out.parquet") == (
        f"{tmp_path}/no/out.parquet cannot be written: there is no folder {tmp_path}/no; make it first"
    )


def test_a_folder_that_is_not_writable_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda *args: False)
    why = f"{tmp_path} is not writable; choose a folder that is writable"
    expected = f"{tmp_path}/out.parquet cannot be written: {why}"
    assert refusal(tmp_path / "out.parquet", error=StorageError) == expected
