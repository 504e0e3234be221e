"""Models that reason before they answer: the reasoning has a column of its own, and is never an answer."""

from __future__ import annotations

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from chains import BEGINNING, CLOSES, END, OPENS, save_chain

from marsinfer_cli.app import run
from pipeline import run_batch
from pipeline.settings.data_settings import ANSWER_TOKENS

pytestmark = pytest.mark.slow

METHOD = ("--method", "marsinfer", "--set", "start_layer=1", "--set", "window=1")
OFF = ("--template-arg", "enable_thinking=false")


@pytest.fixture(scope="module")
def thinking(tmp_path_factory):
    return save_chain(tmp_path_factory.mktemp("thinking") / "m")


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    chain = (OPENS, "a", "b", "c", CLOSES, "ĊĊ", "d", "e", "f", END)
    return save_chain(tmp_path_factory.mktemp("begun") / "m", chain, BEGINNING)


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "in.jsonl"
    path.write_text("".join(json.dumps({"id": str(n), "text": f"fish {n}"}) + "\n" for n in range(2)))
    return path


@pytest.fixture
def batch(rows, tmp_path):
    def call(model, *flags, out="out.parquet"):
        words = ["--model", model, "--question", "what?", "--id-column", "id", "--method", "dense"]
        return run(["batch", *map(str, [*words, *flags, rows, tmp_path / out])])

    return call


@pytest.fixture
def answered(batch, tmp_path):
    """What a run says of each row, all of which are alike: reasoning, answer, why it ended and its tokens."""

    def call(model, *flags):
        assert batch(model, *flags, "--overwrite") == 0
        table = pq.read_table(tmp_path / "out.parquet").to_pylist()
        names = ("reasoning", "answer", "finish_reason", "new_tokens")
        (found,) = {tuple(row[name] for name in names) for row in table}
        return found

    return call


def test_reasoning_stands_apart(answered, thinking, begun):
    assert answered(thinking) == ("abc", "def", "stop", 9)
    assert answered(begun) == ("abc", "def", "stop", 8)


def test_reasoning_can_be_turned_off(answered, thinking):
    assert answered(thinking, *OFF) == (None, "def", "stop", 3)


def test_a_row_that_runs_alone(answered, begun):
    assert answered(begun, "--pack-tokens", 1, "--kv-memory", "1GiB", "--method", "sliminfer")[:2] == (
        "abc",
        "def",
    )


@pytest.mark.parametrize(
    ("stop", "expected"),
    [
        ("b", ("def", "stop", 9)),
        ("e", ("d", "stop", 8)),
        ("\n", ("def", "stop", 9)),
        (CLOSES, ("def", "stop", 9)),
    ],
)
def test_texts_that_end_an_answer_count_behind_the_reasoning(answered, thinking, stop, expected):
    assert answered(thinking, "--stop", stop) == ("abc", *expected)


def test_an_answer_that_never_came_is_told(answered, batch, thinking, begun, capfd):
    assert answered(thinking, "--max-new-tokens", 3) == ("ab", "", "length", 3)
    told = capfd.readouterr().err
    assert (
        "no answer, or none from a part, in 2 of 2 rows: the model reasoned until it had no tokens left"
        in told
    )
    assert answered(begun, "--max-new-tokens", 2, "--stop", "b") == ("ab", "", "length", 2)
    capfd.readouterr()
    assert batch(thinking, "--max-new-tokens", 3, "--overwrite", "--json") == 0
    assert json.loads(capfd.readouterr().out)["unanswered_rows"] == 2
    assert batch(thinking, "--max-new-tokens", 6, "--overwrite", "--json") == 0
    printed = capfd.readouterr()
    assert json.loads(printed.out)["unanswered_rows"] == 2  # white space is no answer
    assert batch(thinking, "--max-new-tokens", 7, "--overwrite", "--json") == 0
    assert json.loads(capfd.readouterr().out)["unanswered_rows"] == 0


def test_few_tokens_for_a_model_that_reasons_are_told_before(batch, thinking, begun, tmp_path, capfd):
    long = save_chain(tmp_path / "long", context=4096)
    few = f"the model reasons before it answers, and {ANSWER_TOKENS} new tokens are for both, "
    switch = "raise --max-new-tokens, or give --template-arg enable_thinking=false"
    for model, flags, notes in (
        (thinking, (), [few, switch]),
        (begun, (), [few]),
        (thinking, OFF, []),
        (long, ("--max-new-tokens", 2048), []),
    ):
        assert batch(model, *flags, "--dry-run") == 0
        printed = capfd.readouterr()
        told = " ".join(f"{printed.out} {printed.err}".split())
        assert [note for note in (few, switch) if note in told] == notes, flags


def test_other_arguments_are_refused_on_resume(batch, thinking, capfd):
    assert batch(thinking) == 0
    capfd.readouterr()
    assert batch(thinking, *OFF, "--resume") == 2
    assert "template_args.enable_thinking was not set and is now false" in capfd.readouterr().err
    assert batch(thinking, "--resume") == 0


def test_arguments_go_with_the_chat_template(batch, thinking, tmp_path, capfd):
    (tmp_path / "p.jinja").write_text("{{ document }}")
    for flags, said in (
        ((*OFF, "--prompt-template", tmp_path / "p.jinja"), "--template-arg and --prompt-template exclude"),
        (("--template-arg", "thinking=1"), "the model's chat template does not use it (did you mean"),
        (("--template-arg", "thinking"), "write it as NAME=VALUE"),
    ):
        assert batch(thinking, *flags) == 2
        (line,) = capfd.readouterr().err.splitlines()
        assert said in line


READERS = {
    "out.parquet": lambda path: pq.read_table(path).to_pylist(),
    "out.jsonl": lambda path: [json.loads(line) for line in path.read_text().splitlines()],
    "out.arrows": lambda path: pa.ipc.open_stream(path).read_all().to_pylist(),
}


@pytest.mark.parametrize("out", READERS)
def test_an_input_may_have_such_a_column(thinking, tmp_path, out):
    path = tmp_path / "in.parquet"
    pq.write_table(pa.table({"text": ["fish"], "reasoning": ["mine"]}), path)
    run_batch(path, tmp_path / out, model=str(thinking), question="what?", method="dense")
    (row,) = READERS[out](tmp_path / out)
    assert (row["reasoning"], row["reasoning_input"]) == ("abc", "mine")


def as_older(path):
    """The output as a version wrote it that did not part reasoning from answers, and copied such a column."""
    table = pq.read_table(path)
    about = json.loads(table.schema.metadata[b"marsinfer"])
    assert "reasoning" in about["settings_that_decide"].pop("later_columns")
    later = ("reasoning", "draft_tokens", "accepted_tokens")
    names = [name for name in table.column_names if name not in later]
    table = table.select(names)
    if "reasoning_input" in names:
        table = table.rename_columns([name.removesuffix("_input") for name in names])
    pq.write_table(table.replace_schema_metadata({"marsinfer": json.dumps(about)}), path)
    return table.schema.names


@pytest.mark.parametrize("copied", [{}, {"reasoning": "mine"}], ids=["no such column", "a copied one"])
def test_an_output_of_an_older_version_goes_on_as_it_began(thinking, tmp_path, copied):
    inputs, out = tmp_path / "in.parquet", tmp_path / "out.parquet"
    all_rows = [{"id": id, "text": "fish", **copied} for id in ("1", "2")]
    options = {"model": str(thinking), "question": "what?", "method": "dense", "id_column": "id"}
    pq.write_table(pa.Table.from_pylist(all_rows[:1]), inputs)
    run_batch(inputs, out, **options)
    names = as_older(out)
    pq.write_table(pa.Table.from_pylist(all_rows), inputs)
    summary = run_batch(inputs, out, resume=True, **options)
    assert summary.documents == 1
    table = pq.read_table(out)
    assert table.schema.names == names
    assert table["answer"].to_pylist() == ["def", "<think>abc</think>\n\ndef"]
    assert [row.get("reasoning") for row in table.to_pylist()] == [copied.get("reasoning")] * 2


def test_parts_are_combined_by_their_answers(thinking, tmp_path):
    path = tmp_path / "in.jsonl"
    path.write_text(json.dumps({"text": "Fish swim. " * 150}))
    run_batch(
        path,
        tmp_path / "out.parquet",
        model=str(thinking),
        question="what?",
        method="dense",
        on_overlong="split",
        max_new_tokens=16,
    )
    (row,) = pq.read_table(tmp_path / "out.parquet").to_pylist()
    assert (row["reasoning"], row["answer"]) == ("abc", "def")
    assert {part["answer"] for part in row["parts"]} == {"def"}
    assert len(row["parts"]) > 2


def test_a_part_that_never_came_to_an_answer_is_told(thinking, tmp_path):
    path = tmp_path / "in.jsonl"
    path.write_text(json.dumps({"text": "Fish swim. " * 150}))
    options = {"model": str(thinking), "question": "what?", "method": "dense", "on_overlong": "split"}
    summary = run_batch(path, tmp_path / "out.parquet", max_new_tokens=3, **options)
    assert (summary.status["ok"], summary.unanswered_rows) == (1, 1)


def test_a_check_scores_the_answer_alone(thinking, tmp_path, capfd):
    path = tmp_path / "in.jsonl"
    rows = [{"id": str(n), "text": f"fish {n} " * 40, "right": "def"} for n in range(4)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["--model", thinking, "--question", "what?", "--reference-column", "right", "--generate"]
    words += ["--metric", "exact-match", "--out", tmp_path / "result.json", "--quiet", "--scope", "rows"]
    assert run(["check", *map(str, [*words, *METHOD, path])]) == 0
    result = json.loads((tmp_path / "result.json").read_text())
    told = "right answers are measured where the model would reason before its own; --template-arg"
    assert told in capfd.readouterr().err + json.dumps(result)
    assert '"def"' in json.dumps(result)
    assert "abc" not in json.dumps(result)
