"""Which files an input names, in which order, and what is refused or noted."""

import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.errors import ConfigError, InputError
from pipeline.inputs.columns import Columns
from pipeline.inputs.source import open_source
from pipeline.storage.remote import output_place, place_of

KNOWN = (
    ".parquet, .pq, .jsonl, .ndjson, .json, .csv, .tsv, .arrow, .arrows, .feather, .ipc, .txt, .md, "
    ".pdf, .docx, .html, .htm; "
    "JSON lines and CSV also with .gz or .zst"
)


def texts(*inputs):
    return [record.text for record in open_source(inputs, Columns())]


def ids(*inputs):
    return [record.source.id for record in open_source(inputs, Columns())]


def refusal(*inputs):
    with pytest.raises(InputError) as caught:
        open_source(inputs, Columns())
    return str(caught.value)


def write_jsonl(path, *values):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f'{{"text": "{value}"}}\n' for value in values))


def write_parquet(path, *values):
    pq.write_table(pa.table({"text": list(values)}), path)


def test_a_folder_is_read_whole_sorted_and_without_hidden_files(tmp_path):
    write_jsonl(tmp_path / "b.jsonl", "b")
    write_jsonl(tmp_path / "a" / "z.jsonl", "az")
    write_jsonl(tmp_path / "c" / "a.ndjson", "ca")
    write_jsonl(tmp_path / ".hidden.jsonl", "no")
    write_jsonl(tmp_path / ".cache" / "x.jsonl", "no")
    assert texts(tmp_path) == ["az", "b", "ca"]


def test_inputs_are_read_in_the_order_given(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", "a")
    write_parquet(tmp_path / "b.parquet", "b")
    assert texts(tmp_path / "b.parquet", str(tmp_path / "a.jsonl")) == ["b", "a"]
    assert open_source([tmp_path / "a.jsonl"], Columns()).files == (tmp_path / "a.jsonl",)


def test_a_glob_may_cross_folders(tmp_path):
    write_jsonl(tmp_path / "y" / "one.jsonl", "1")
    write_jsonl(tmp_path / "x" / "two.jsonl", "2")
    write_jsonl(tmp_path / "x" / "two.ndjson", "no")
    assert texts(f"{tmp_path}/**/*.jsonl") == ["2", "1"]


def test_a_name_with_brackets_is_a_file_before_it_is_a_pattern(tmp_path):
    write_jsonl(tmp_path / "run[1].jsonl", "bracket")
    write_jsonl(tmp_path / "run1.jsonl", "pattern")
    assert texts(tmp_path / "run[1].jsonl") == ["bracket"]


def test_extensions_are_known_in_any_case(tmp_path):
    write_parquet(tmp_path / "A.PARQUET", "upper")
    assert texts(tmp_path) == ["upper"]


def test_a_file_named_twice_is_read_once_and_noted(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", "a")
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "a.jsonl")
    source = open_source([tmp_path / "a.jsonl", f"{tmp_path}/*.jsonl"], Columns())
    assert [record.text for record in source] == ["a"]
    assert source.notes == [
        f"{tmp_path}/a.jsonl is named more than once and is read once",
        f"{tmp_path}/link.jsonl is named more than once and is read once",
    ]


def test_a_folder_of_tables_and_texts_is_refused(tmp_path):
    write_parquet(tmp_path / "a.parquet", "a")
    (tmp_path / "README.md").write_text("about")
    assert refusal(tmp_path) == (
        f"{tmp_path} holds both tables (a.parquet) and text documents (README.md); "
        f"choose with a glob, such as '{tmp_path}/**/*.parquet'"
    )
    assert texts(f"{tmp_path}/**/*.parquet") == ["a"]


def test_files_of_other_kinds_are_noted(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", "a")
    for name in ("c.log", "b.xml"):
        (tmp_path / name).write_text("")
    by_folder, by_glob = (open_source([named], Columns()) for named in (tmp_path, f"{tmp_path}/*"))
    note = f"not read, of a kind that is not known: {tmp_path}/b.xml, {tmp_path}/c.log"
    assert by_folder.notes == by_glob.notes == [note]


@pytest.mark.parametrize("pattern", ["", "/*", "/*.parquet"])
def test_a_folder_or_glob_without_a_readable_file_is_refused(tmp_path, pattern):
    (tmp_path / "a.xml").write_text("")
    given = f"{tmp_path}{pattern}"
    assert refusal(given) == f"{given} holds no file that can be read; known extensions are {KNOWN}"


def test_a_missing_file_is_refused(tmp_path):
    assert refusal(tmp_path / "no.parquet") == f"{tmp_path}/no.parquet does not exist"


def test_no_input_is_refused():
    assert refusal() == "no input was named"


@pytest.mark.parametrize("name", ["a.xml", "a.gz", "a"])
def test_an_unknown_extension_is_refused(tmp_path, name):
    (tmp_path / name).write_text("")
    expected = f"{tmp_path}/{name} has an extension that is not known; known are {KNOWN}"
    assert refusal(tmp_path / name) == expected


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read_is_refused(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", "a")
    (tmp_path / "a.jsonl").chmod(0)
    assert refusal(tmp_path / "a.jsonl") == f"{tmp_path}/a.jsonl cannot be read: Permission denied"


@pytest.mark.parametrize("start", ["file://", "file:", "FILE://localhost", "local://"])
def test_file_urls_are_local_paths(tmp_path, start):
    write_jsonl(tmp_path / "a b%20.jsonl", "a")
    write_jsonl(tmp_path / "c d.jsonl", "c")
    assert texts(f"{start}{tmp_path}/a b%20.jsonl", f"{start}{tmp_path}/c%20d.jsonl") == ["a", "c"]
    assert output_place(f"{start}{tmp_path}/o.parquet") == tmp_path / "o.parquet"


def test_a_tilde_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write_jsonl(tmp_path / "in" / "a.jsonl", "a")
    assert texts("~/in") == texts("~/in/*") == texts("~/in/a.jsonl") == ["a"]
    assert output_place("~/o.parquet") == tmp_path / "o.parquet"
    assert place_of("~no-such-user/a") == Path("~no-such-user/a")


def test_schemes_are_known_in_any_case():
    place = output_place("MEMORY://in/A.jsonl")
    assert (str(place), place.scheme) == ("memory://in/A.jsonl", "memory")
    with pytest.raises(ConfigError, match="http:// cannot lock it"):
        output_place("HTTP://server/o.parquet")


def test_many_files_named_twice_are_one_note(tmp_path):
    for i in range(5):
        write_jsonl(tmp_path / f"{i}.jsonl", str(i))
    first = ", ".join(f"{tmp_path}/{i}.jsonl" for i in range(3))
    expected = [f"named more than once, and read once: {first} and 2 more"]
    assert open_source([tmp_path, tmp_path], Columns()).notes == expected


def test_lines_may_be_named_json(tmp_path):
    write_jsonl(tmp_path / "part-00000.json", "a")
    write_jsonl(tmp_path / "part-00001.json", "b")
    assert texts(tmp_path) == texts(f"{tmp_path}/*.json") == ["a", "b"]
    assert ids(tmp_path / "part-00000.json") == ["part-00000.json:0"]


@pytest.mark.parametrize("pattern", ["", "/*"])
def test_json_beside_other_files_is_no_input_unless_it_is_named(tmp_path, pattern):
    write_jsonl(tmp_path / "a.jsonl", "a")
    write_jsonl(tmp_path / "dataset_info.json", "no")
    write_jsonl(tmp_path / "a.jsonl.run.json", "no")
    source = open_source([f"{tmp_path}{pattern}"], Columns())
    assert [record.text for record in source] == ["a"]
    assert source.notes == [
        f"not read, as .json beside other files need not be rows: {tmp_path}/dataset_info.json; "
        "to read one, name it"
    ]
    assert texts(tmp_path, tmp_path / "dataset_info.json") == ["a", "no"]


def test_default_ids_are_file_name_and_row(tmp_path):
    write_parquet(tmp_path / "a.parquet", "a", "b")
    (tmp_path / "b.jsonl").write_text('{"text": "c"}\n\n{"text": "d"}\n')
    assert ids(tmp_path) == ["a.parquet:0", "a.parquet:1", "b.jsonl:0", "b.jsonl:2"]


def test_ids_of_text_documents_are_their_paths_below_the_folder(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.txt").write_text("a")
    (tmp_path / "b.md").write_text("b")
    assert ids(tmp_path) == ["b.md", "sub/a.txt"]
    assert ids(tmp_path / "sub" / "a.txt") == ["a.txt"]


def test_files_of_one_name_get_ids_from_their_common_parent(tmp_path):
    for year in ("2023", "2024"):
        write_jsonl(tmp_path / "deep" / year / "a.jsonl", year)
    write_jsonl(tmp_path / "deep" / "b.jsonl", "b")
    assert ids(tmp_path) == ["2023/a.jsonl:0", "2024/a.jsonl:0", "b.jsonl:0"]


def test_a_named_pipe_is_read(tmp_path):
    import threading

    pipe = tmp_path / "pipe.jsonl"
    os.mkfifo(pipe)
    source = open_source([pipe], Columns())
    feeder = threading.Thread(target=pipe.write_text, args=('{"text": "piped"}\n',))
    feeder.start()
    assert [record.text for record in source] == ["piped"]
    feeder.join()
    assert source.fraction_read == 1.0
