"""Outputs of earlier runs among the input: left out of folders and patterns, read where they are named."""

import json

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from columns_told import columns_told

from pipeline.checks.baseline import write_baseline
from pipeline.errors import ConfigError, InputError
from pipeline.inputs.columns import Columns
from pipeline.inputs.source import open_source
from pipeline.outputs import replacing
from pipeline.outputs.answers import answers_table, output_schema
from pipeline.outputs.sidecar import Written, sidecar_path, write_sidecar
from pipeline.outputs.writing import check_output, output_writer
from pipeline.records import Answer

METADATA = {"marsinfer": json.dumps({"settings_that_decide": {}})}
SCHEMA = output_schema(pa.schema([("text", pa.string())]), METADATA)
NAMES = ("out.parquet", "out.arrow", "out.arrows", "out.jsonl")


def write_output(path, schema=SCHEMA):
    """An output of one row, with what a run leaves beside it."""
    with output_writer(path, schema) as writer:
        writer.write_table(answers_table([Answer(id="a", row=0)], schema))
    if path.suffix == ".jsonl":
        write_sidecar(path, Written(path.stat().st_size, schema), path.with_name("partial"))
    return path


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "x.jsonl").write_text('{"text": "x", "n": 1}\n')
    return folder


def ids(*inputs):
    return [record.source.id for record in open_source(inputs, Columns())]


def note(*paths):
    return f"not read, as marsinfer wrote it: {', '.join(map(str, paths))}; to read one, name it"


@pytest.mark.parametrize("name", NAMES)
def test_an_output_is_left_out_and_changes_nothing_else(folder, name):
    (folder / "before").mkdir()
    output = write_output(folder / "before" / name.replace("out", "x"))
    for given in (folder, f"{folder}/*", f"{folder}/**/*"):
        source = open_source([given], Columns())
        assert [record.source.id for record in source] == ["x.jsonl:0"]
        assert source.notes == [note(output)]
        assert columns_told(given) == {"text": "string", "n": "int64"}


@pytest.mark.parametrize("name", NAMES)
def test_an_output_that_is_named_is_read(folder, name):
    output = write_output(folder / name)
    assert ids(output) == [f"{name}:0"]
    assert sorted(ids(output, folder)) == sorted(ids(folder, output)) == sorted([f"{name}:0", "x.jsonl:0"])


def test_outputs_lacking_the_text_column_are_no_obstacle(folder):
    outputs = [
        write_output(folder / f"{i}.parquet", output_schema(pa.schema([]), METADATA)) for i in range(2)
    ]
    source = open_source([folder], Columns())
    assert (len(list(source)), source.notes) == (1, [note(*outputs)])


def test_the_baseline_of_a_check_is_left_out(folder):
    write_baseline(folder / "base.parquet", [], [], {}, {})
    assert open_source([folder], Columns()).notes == [note(folder / "base.parquet")]


def test_outputs_beside_text_documents_are_no_mixture(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    output = write_output(tmp_path / "out.parquet")
    write_output(tmp_path / "out.jsonl")
    assert ids(tmp_path) == ["a.txt"]
    assert open_source([tmp_path], Columns()).notes[-1] == note(output)


def test_a_table_made_of_an_output_is_read(folder):
    table = pq.read_table(write_output(folder / "out.parquet"))
    pq.write_table(table.select(["text", "answer"]), folder / "made.parquet")
    assert b"marsinfer" in pq.read_schema(folder / "made.parquet").metadata
    assert ids(folder) == ["made.parquet:0", "x.jsonl:0"]


def test_a_file_beside_lines_that_says_something_else_is_no_sign(folder):
    sidecar_path(folder / "x.jsonl").write_text('{"run": 1}')
    assert ids(folder) == ["x.jsonl:0"]


@pytest.mark.parametrize("name", NAMES)
def test_where_there_is_nothing_else_a_folder_is_empty_and_a_pattern_wrong(tmp_path, name):
    output = write_output(tmp_path / name)
    assert ids(tmp_path) == []
    with pytest.raises(InputError) as caught:
        ids(f"{tmp_path}/{name[:3]}*")
    told = f"nothing matches but what marsinfer wrote: {output}; to read one, name it"
    assert str(caught.value) == told


@pytest.mark.parametrize("pattern", ["", "/*", "/*.jsonl"])
def test_outputs_in_storage_elsewhere_are_left_out(folder, pattern):
    for name in ("out.parquet", "out.jsonl"):
        write_output(folder / name)
    memory = fsspec.filesystem("memory")
    for path in folder.iterdir():
        memory.pipe_file(f"/own/{path.name}", path.read_bytes())
    try:
        source = open_source([f"memory://own{pattern}"], Columns())
        assert [record.source.id for record in source] == ["x.jsonl:0"]
        outputs = [["memory:///own/out.jsonl"], ["memory:///own/out.parquet"]]
        assert source.notes == [note(*paths) for paths in outputs[: 1 if "jsonl" in pattern else 2]]
    finally:
        memory.rm("/own", recursive=True)


def test_an_output_does_not_replace_the_baseline_of_a_check(tmp_path):
    path = tmp_path / "base.parquet"
    write_baseline(path, [], [], {}, {})
    before = path.read_bytes()
    with pytest.raises(ConfigError, match="name another output"):
        check_output(path, [], True)
    assert path.read_bytes() == before
    replacing.refuse_foreign_file("--baseline", path, replacing.is_baseline)


def test_a_baseline_does_not_replace_an_output(tmp_path):
    path = write_output(tmp_path / "out.parquet")
    with pytest.raises(ConfigError, match="name another file"):
        replacing.refuse_foreign_file("--baseline", path, replacing.is_baseline)
    check_output(path, [], True)
