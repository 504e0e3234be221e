"""What folders and patterns give: hidden names, links, saved datasets, folders that match."""

import json

import fsspec
import pyarrow as pa
import pytest

from pipeline.errors import InputError
from pipeline.inputs.columns import Columns
from pipeline.inputs.source import open_source

LINE = '{"text": "%s"}\n'


def write(folder, *names):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(LINE % name)


def texts(*inputs):
    return [record.text for record in open_source(inputs, Columns())]


def notes(*inputs):
    return open_source(inputs, Columns()).notes


def refusal(*inputs):
    with pytest.raises(InputError) as caught:
        open_source(inputs, Columns())
    return str(caught.value)


@pytest.fixture
def in_memory(tmp_path):
    """Copies a local folder to storage elsewhere; the fixture gives its URL."""

    def copied():
        memory = fsspec.filesystem("memory")
        for path in sorted(tmp_path.rglob("*")):
            if path.is_file():
                memory.pipe_file(f"{tmp_path}/{path.relative_to(tmp_path)}", path.read_bytes())
        return f"memory://{tmp_path}"

    yield copied
    memory = fsspec.filesystem("memory")
    if memory.exists(str(tmp_path)):
        memory.rm(str(tmp_path), recursive=True)


SPARK = ("a.jsonl", "_SUCCESS", "_temporary/0/b.jsonl", "_old.jsonl", ".c.jsonl", "_k=1/d.jsonl")


@pytest.mark.parametrize("pattern", ["", "/*", "/**/*"])
def test_names_with_an_underscore_are_no_data_but_partitions_are(tmp_path, in_memory, pattern):
    write(tmp_path, *SPARK)
    for folder in (tmp_path, in_memory()):
        given = f"{folder}{pattern}"
        assert sorted(texts(given)) == ["_k=1/d.jsonl", "a.jsonl"]
        assert notes(given) == [
            f"not read, as names that begin with _ stand for no data: {folder}/_old.jsonl"
        ]


def test_what_is_named_is_read_whatever_its_name(tmp_path, in_memory):
    write(tmp_path, *SPARK)
    for folder in (tmp_path, in_memory()):
        assert texts(f"{folder}/_old.jsonl", f"{folder}/.c.jsonl") == ["_old.jsonl", ".c.jsonl"]
        assert texts(f"{folder}/_temporary") == ["_temporary/0/b.jsonl"]
        assert texts(f"{folder}/_*.jsonl") == ["_old.jsonl"]
        assert texts(f"{folder}/_temporary/*/*") == ["_temporary/0/b.jsonl"]


def test_a_pattern_reads_the_folders_that_it_matches(tmp_path, in_memory):
    write(tmp_path, "in/b.jsonl", "in/a/z.jsonl", "in/c/d/e.jsonl", "in/logs/x.log")
    for folder in (tmp_path, in_memory()):
        expected = ["in/a/z.jsonl", "in/b.jsonl", "in/c/d/e.jsonl"]
        assert texts(f"{folder}/in/*") == texts(f"{folder}/in/**/*") == texts(f"{folder}/i*") == expected
    assert notes(f"{tmp_path}/in/*") == [f"not read, of a kind that is not known: {tmp_path}/in/logs/x.log"]


def test_a_pattern_of_unreadable_folders_is_refused(tmp_path):
    write(tmp_path, "logs/x.log")
    assert refusal(f"{tmp_path}/l*").startswith(f"{tmp_path}/l* holds no file that can be read; ")


def test_empty_files_and_folders_have_no_rows(tmp_path, in_memory):
    names = ("a.parquet", "b.arrow", "c.arrows", "d.jsonl", "e.jsonl.gz", "f.jsonl.zst")
    for name in names:
        (tmp_path / name).touch()
    (tmp_path / "day").mkdir()
    write(tmp_path, "g.jsonl")
    for folder in (tmp_path, in_memory()):
        source = open_source([folder, f"{folder}/a.parquet"], Columns())
        assert [record.text for record in source] == ["g.jsonl"]
        assert source.fraction_read == 1.0
        first = ", ".join(f"{folder}/{name}" for name in names[:3])
        assert source.notes[1] == f"of no bytes, and so of no rows: {first} and 3 more"
    source = open_source([tmp_path / "day", f"{tmp_path}/da*"], Columns(keep={"year": None}))
    assert (list(source), source.total_rows) == ([], 0)
    assert source.notes == [f"{tmp_path}/day holds no files: no rows come from it"] * 2


def test_linked_folders_are_read_once_and_loops_end(tmp_path):
    write(tmp_path, "in/b/a.jsonl", "elsewhere/c.jsonl")
    for name, target in (("a", "b"), ("b/up", ".."), ("z", "../elsewhere")):
        (tmp_path / "in" / name).symlink_to(target)
    assert texts(tmp_path / "in") == ["in/b/a.jsonl", "elsewhere/c.jsonl"]
    folder = tmp_path / "in"
    assert sorted(notes(folder)) == [
        f"{folder}/a is the same folder as {folder}/b, and is read once",
        f"{folder}/b/up is the same folder as {folder}, and is read once",
    ]
    assert texts(f"{folder}/*/*.jsonl") == ["in/b/a.jsonl", "elsewhere/c.jsonl"]


@pytest.mark.parametrize("target", ["../gone.jsonl", "b.jsonl"])
@pytest.mark.parametrize("given", ["in", "in/*", "in/b.jsonl"])
def test_a_broken_link_is_named(tmp_path, given, target):
    write(tmp_path, "in/a.jsonl")
    (tmp_path / "in" / "b.jsonl").symlink_to(target)
    assert refusal(f"{tmp_path}/{given}") == (
        f"{tmp_path}/in/b.jsonl is a link to {target}, which cannot be reached; mend the link or remove it"
    )


def save_dataset(folder, *names):
    """As `datasets` does, with what it leaves beside."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in (*names, "cache-1.arrow"):
        with pa.ipc.new_stream(str(folder / name), pa.schema({"text": pa.string()})) as writer:
            writer.write_table(pa.table({"text": [name]}))
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names]}))
    (folder / "dataset_info.json").write_text("{}")
    (folder / "README.md").write_text("about")


@pytest.mark.parametrize("pattern", ["", "/*.arrow"])
def test_a_saved_dataset_is_read_by_its_list_of_files(tmp_path, in_memory, pattern):
    save_dataset(tmp_path / "set", "data-0.arrow", "data-1.arrow")
    for folder in (tmp_path, in_memory()):
        given = f"{folder}/set{pattern}"
        assert texts(given) == ["data-0.arrow", "data-1.arrow"]
        told = f"not read, as the saved dataset around it does not name it: {folder}/set/cache-1.arrow"
        assert notes(given) == [told]


def test_a_saved_dictionary_of_datasets_is_read_split_by_split(tmp_path, in_memory):
    for split in ("train", "test", "old"):
        save_dataset(tmp_path / split, f"{split}.arrow")
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    for folder in (tmp_path, in_memory()):
        assert texts(folder) == ["test.arrow", "train.arrow"]


def test_a_saved_dataset_without_one_of_its_files_is_refused(tmp_path):
    save_dataset(tmp_path, "data-0.arrow", "data-1.arrow")
    (tmp_path / "data-1.arrow").unlink()
    assert refusal(tmp_path) == (
        f"{tmp_path} is a saved dataset and lacks its part data-1.arrow; save it again"
    )


def test_another_state_json_says_nothing(tmp_path):
    write(tmp_path, "a.jsonl")
    (tmp_path / "state.json").write_text('{"epoch": 1}')
    assert texts(tmp_path) == ["a.jsonl"]
