import gzip
import hashlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.errors import ConfigError, InputError
from pipeline.settings.parse import SuiteName, parse_suite
from pipeline.suites.by_name import load_suite
from pipeline.suites.leval import load_leval
from pipeline.suites.longbench import DATASETS, load_longbench
from pipeline.suites.metrics import METRICS, score
from pipeline.suites.samples import Sample, document_key, first_in_turn, part_of, searched_keys, take


def write(path: Path, *rows: object) -> Path:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def leval_row(evaluation: str, *pairs: tuple[str, object], text: str = "A document.", **more: object) -> dict:
    instructions, outputs = zip(*pairs, strict=True)
    return {
        "input": text,
        "instructions": list(instructions),
        "outputs": list(outputs),
        "evaluation": evaluation,
        **more,
    }


def longbench_row(dataset: str, **more: object) -> dict:
    row = {"input": "What?", "context": "A document.", "answers": ["that"], "all_classes": None}
    return {**row, "dataset": dataset, "length": 2, "language": "en", "_id": "c0ffee", **more}


def sample(task: str, document: str, number: int) -> Sample:
    return Sample(
        id=f"{task}/{number}",
        task=task,
        text=document,
        question="?",
        references=("yes",),
        metric="contains",
        document_key=document_key(document),
    )


def test_leval_one_sample_an_instruction(tmp_path: Path) -> None:
    first = leval_row("f1", ("Who?", "Bob"), ("When? ", ["1999", " in 1999", "1999"]), source="mine")
    write(tmp_path / "my_qa.jsonl", first, "", leval_row("f1", ("Where?", "Rome"), text="Another."))
    (who, when, where), left_out = load_leval(tmp_path)
    assert left_out == []
    assert [who.id, when.id, where.id] == ["my_qa/1/1", "my_qa/1/2", "my_qa/3/1"]
    assert (who.task, who.text, who.metric, who.references) == ("my_qa", "A document.", "token_f1", ("Bob",))
    assert who.question.splitlines()[0] == "Who?"
    assert len(who.question.splitlines()) == 2
    assert when.references == ("1999", "in 1999")
    assert who.document_key == when.document_key == document_key("A document.") != where.document_key
    assert who.facets == {"line": 1, "evaluation": "f1", "source": "mine"}


@pytest.mark.parametrize(
    ("task", "evaluation", "output", "metric", "reference", "hint"),
    [
        ("coursera", "exam", "AC", "choice_match", "AC", "letters of all"),
        ("quality", "exam", "(B) They fled.", "choice_match", "B", "the letter of"),
        ("tpo", "exam", "D", "choice_match", "D", "the letter of"),
        ("sci_fi", "exam", "True [fact: False]", "choice_match", "True", "True or False"),
        ("gsm100", "exam", "70000", "number_match", "70000", "number only"),
        ("topic_retrieval_longchat", "exam", "Art in society", "contains", "Art in society", "topic only"),
        ("legal_contract_qa", "f1", "Within 30 days.", "token_f1", "Within 30 days.", "quoted exactly"),
        ("news_summ", "rouge", "word " * 87, "rouge_l", ("word " * 87).strip(), "about 90 words"),
        ("other_exam", "exam", "(A) x", "choice_match", "A", "the letter of"),
        ("other_exam", "exam", "ABD", "choice_match", "ABD", "letters of all"),
        ("other_exam", "exam", "False", "choice_match", "False", "True or False"),
        ("other_exam", "exam", "$1,000", "number_match", "$1,000", "number only"),
        ("other_exam", "exam", "[1, 2]", "contains", "[1, 2]", "briefly"),
    ],
)
def test_leval_forms(
    tmp_path: Path, task: str, evaluation: str, output: str, metric: str, reference: str, hint: str
) -> None:
    write(tmp_path / f"{task}.jsonl", leval_row(evaluation, ("Well?", output)))
    ((found,), _) = load_leval(tmp_path)
    assert (found.metric, found.references) == (metric, (reference,))
    assert hint in found.question.splitlines()[-1]
    assert found.facets.get("output", reference) == output.strip()
    assert score(metric, output, found.references) == pytest.approx(1.0)


def test_leval_steps_are_not_asked_for(tmp_path: Path) -> None:
    write(tmp_path / "gsm100.jsonl", leval_row("exam", ("Question: 1 + 1?\nLet's think step by step\n", "2")))
    ((found,), _) = load_leval(tmp_path)
    assert found.question.splitlines()[0] == "Question: 1 + 1?"
    assert "step by step" not in found.question


GOOD = leval_row("f1", ("Who?", "Bob"))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{", "not JSON: Expecting property name"),
        ("[1]", "not a JSON object"),
        (
            {key: GOOD[key] for key in GOOD if key != "input"},
            "there is no field 'input', which must be a text",
        ),
        ({**GOOD, "input": 3}, "the field 'input' is not a text"),
        ({**GOOD, "input": " "}, "the field 'input' is empty"),
        ({**GOOD, "instructions": 1}, "the fields 'instructions' and 'outputs' are not both lists"),
        ({**GOOD, "instructions": [1]}, "instruction 1: it is not a text, or empty"),
        ({**GOOD, "instructions": [" "]}, "instruction 1: it is not a text, or empty"),
        ({**GOOD, "outputs": []}, "the field 'outputs' is not as long as 'instructions'"),
        ({**GOOD, "outputs": [None]}, "instruction 1: the field 'outputs' is not a list of texts"),
        ({**GOOD, "outputs": [" "]}, "instruction 1: its output is empty"),
        ({**GOOD, "outputs": [[]]}, "instruction 1: its output is empty"),
        (
            {**GOOD, "evaluation": "rougue"},
            r"unknown evaluation 'rougue' \(did you mean 'rouge'\?\); known are",
        ),
    ],
)
def test_leval_rows_that_are_left_out(tmp_path: Path, row: object, message: str) -> None:
    path = write(tmp_path / "odd.jsonl", GOOD, row)
    samples, (left_out,) = load_leval(tmp_path)
    assert [found.id for found in samples] == ["odd/1/1"]
    assert re.match(f"{re.escape(str(path))} line 2: {message}", left_out)
    assert "\n" not in left_out


def test_one_question_of_a_row_is_left_out_alone(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", leval_row("f1", ("Who?", "Bob"), ("When?", ""), ("How old?", 7)))
    samples, left_out = load_leval(tmp_path)
    assert [(found.id, found.references) for found in samples] == [("a/1/1", ("Bob",)), ("a/1/3", ("7",))]
    assert left_out == [f"{path} line 1: instruction 2: its output is empty"]


def test_lines_that_are_not_utf8(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(json.dumps(GOOD).encode() + b'\n{"input": "\xff"}\n')
    _, (left_out,) = load_leval(tmp_path)
    assert left_out.endswith("a.jsonl line 2: not valid UTF-8 at byte 11")


@pytest.mark.parametrize("load", [load_leval, load_longbench])
def test_folders_without_rows(tmp_path: Path, load) -> None:
    with pytest.raises(InputError, match="is not there"):
        load(tmp_path / "no")
    with pytest.raises(InputError, match=r"has no \*\.jsonl files"):
        load(tmp_path)
    write(tmp_path / "empty.jsonl")
    with pytest.raises(InputError, match="no rows"):
        load(tmp_path)


@pytest.mark.parametrize("load", [load_leval, load_longbench])
def test_a_file_of_which_nothing_can_be_used_is_an_error(tmp_path: Path, load) -> None:
    write(tmp_path / "a.jsonl", {**GOOD, **longbench_row("qasper")})
    write(tmp_path / "b.jsonl", {"text": "another form"}, "")
    with pytest.raises(InputError, match=r"nothing in b\.jsonl can be used: .*b\.jsonl line 1: there is no"):
        load(tmp_path)
    (tmp_path / "b.jsonl").write_text("\n")
    assert len(load(tmp_path).samples) == 1  # nothing of an empty file is lost


def test_more_left_out_than_taken_is_an_error(tmp_path: Path) -> None:
    odd = longbench_row("qasper", answers=[""])
    write(tmp_path / "a.jsonl", longbench_row("qasper"), odd)
    assert len(load_longbench(tmp_path).left_out) == 1
    write(tmp_path / "a.jsonl", longbench_row("qasper"), odd, odd)
    with pytest.raises(
        InputError, match=r"2 of 3 rows cannot be used: .*line 2: the field 'answers' is empty"
    ):
        load_longbench(tmp_path)


def test_compressed_files(tmp_path: Path) -> None:
    content = "".join(json.dumps(longbench_row("qasper", _id=str(n))) + "\n" for n in range(3))
    path = tmp_path / "qasper_e.jsonl.gz"
    path.write_bytes(gzip.compress(content.encode()))
    samples, left_out = load_longbench(tmp_path)
    assert [found.id for found in samples] == ["qasper_e/1", "qasper_e/2", "qasper_e/3"]
    assert left_out == []
    (tmp_path / "qasper_e.jsonl").write_text(content)
    with pytest.raises(InputError, match=r"both qasper_e\.jsonl and qasper_e\.jsonl\.gz; keep one"):
        load_longbench(tmp_path)


def test_damaged_compressed_files(tmp_path: Path) -> None:
    rows = [longbench_row("qasper", _id=hashlib.sha256(b"%d" % n).hexdigest()) for n in range(2000)]
    content = gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode())
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(content[: len(content) // 2])
    samples, (left_out,) = load_longbench(tmp_path)
    assert 500 < len(samples) < 1500
    assert left_out.startswith(f"{path} line {len(samples) + 1}: cannot be read from here on: ")
    path.write_bytes(b"not gzip")
    with pytest.raises(InputError, match=r"nothing in a\.jsonl\.gz can be used: .* line 1: cannot be"):
        load_longbench(tmp_path)


@pytest.mark.parametrize("suffix", ["", "_e"])
@pytest.mark.parametrize("dataset", DATASETS)
def test_longbench_datasets(tmp_path: Path, dataset: str, suffix: str) -> None:
    answers = [" that ", "", "this"]
    row = longbench_row(f"{dataset}{suffix}", answers=answers, all_classes=["that", "x"])
    write(tmp_path / f"{dataset}_e.jsonl", row)
    ((found,), _) = load_longbench(tmp_path)
    assert (found.id, found.task, found.text) == (f"{dataset}_e/1", dataset, "A document.")
    assert found.references == ("that", "this")
    assert found.choices == ("that", "x")
    assert found.metric in METRICS
    assert ("What?" in found.question) == ("{input}" in DATASETS[dataset].question)
    assert "{" not in found.question
    assert found.facets == {"line": 1, "length": 2, "language": "en", "_id": "c0ffee"}


def test_escapes_of_characters_are_taken(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", longbench_row("qasper", answers=["\N{GRINNING FACE}"]))
    assert "\\ud83d\\ude00" in (tmp_path / "a.jsonl").read_text()
    assert load_longbench(tmp_path).samples[0].references == ("\N{GRINNING FACE}",)


def test_longbench_braces_in_an_input_stay(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", longbench_row("repobench-p", input="def f(): return {x}"))
    assert "return {x}" in load_longbench(tmp_path).samples[0].question


@pytest.mark.parametrize(
    ("answers", "references"), [(3, ("3",)), ([3, 0.5, "3"], ("3", "0.5")), ("x", ("x",))]
)
def test_longbench_answers_that_are_numbers_or_no_list(
    tmp_path: Path, answers: object, references: tuple[str, ...]
) -> None:
    write(tmp_path / "a.jsonl", longbench_row("passage_count", answers=answers))
    ((found,), _) = load_longbench(tmp_path)
    assert found.references == references


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (longbench_row("hotpot"), r"unknown dataset 'hotpot' \(did you mean 'hotpotqa'\?\)"),
        (longbench_row("hotpot_e"), "unknown dataset 'hotpot_e'"),
        (longbench_row("trec"), "the field 'all_classes' must list the classes of trec"),
        (longbench_row("qasper", input=""), "the field 'input' is empty"),
        (longbench_row("qasper", answers=[]), "the field 'answers' is empty"),
        (longbench_row("qasper", answers=[""]), "the field 'answers' is empty"),
        (longbench_row("qasper", answers=None), "the field 'answers' is not a list of texts"),
        (longbench_row("qasper", answers=[["x"]]), "the field 'answers' is not a list of texts"),
        (longbench_row("qasper", context=""), "the field 'context' is empty"),
        (longbench_row("qasper", answers=[float("nan")]), "the field 'answers' is not a list of texts"),
        (longbench_row("qasper", answers=["a \ud83d"]), r"an escape such as \\ud83d stands alone"),
        (longbench_row("qasper", context="a \ud83d"), r"an escape such as \\ud83d stands alone"),
        (longbench_row("qasper", context=3), "the field 'context' is not a text"),
        ("[]", "not a JSON object"),
    ],
)
def test_longbench_rows_that_are_left_out(tmp_path: Path, row: object, message: str) -> None:
    path = write(tmp_path / "odd.jsonl", longbench_row("gov_report", input=""), row)
    samples, (left_out,) = load_longbench(tmp_path)
    assert [found.id for found in samples] == ["odd/1"]
    assert re.match(f"{re.escape(str(path))} line 2: {message}", left_out)


def test_documents_are_parted_evenly_and_by_their_text_alone() -> None:
    keys = [document_key(f"document {number}") for number in range(900)]
    parts = [part_of(key, 3) for key in keys]
    assert set(parts) == {0, 1, 2}
    assert all(250 < parts.count(part) < 350 for part in range(3))
    assert [part_of(key, 3) for key in reversed(keys)] == parts[::-1]
    assert {part_of(key, 1) for key in keys} == {0}
    assert all(part_of(key, 6) // 2 == part for key, part in zip(keys, parts, strict=True))


def test_documents_to_search_on_are_two_fifths_and_at_least_one() -> None:
    keys = [document_key(f"document {number}") for number in range(30)]
    searched = searched_keys(keys, "1")
    assert len(searched) == 12
    assert searched_keys(reversed([*keys, *keys]), "1") == searched != searched_keys(keys, "2")
    assert len(searched_keys(keys[:1], "1")) == len(searched_keys(keys[:2], "1")) == 1
    assert searched_keys([], "1") == set()


def test_take_spreads_over_documents_and_nests() -> None:
    samples = [sample(f"task {n % 2}", f"document {n // 20}", n) for n in range(200)]  # 10 documents
    few, more = take(samples, 10, seed=3), take(samples, 15, seed=3)
    assert [[s.task for s in few].count(f"task {t}") for t in range(2)] == [10, 10]
    assert len({s.document_key for s in few if s.task == "task 0"}) == 10
    assert {s.id for s in few} < {s.id for s in more}
    assert [samples.index(s) for s in few] == sorted(samples.index(s) for s in few)
    assert take(samples, 10, seed=3) == few != take(samples, 10, seed=4)
    assert {s.id for s in take(samples[::-1], 10, seed=3)} == {s.id for s in few}
    assert take(samples, None) == take(samples, 500) == samples
    with pytest.raises(ConfigError, match="0 samples a task"):
        take(samples, 0)


def test_a_limit_takes_tasks_in_turn() -> None:
    samples = [
        sample(task, f"document {n}", n)
        for task, count in (("a", 5), ("b", 1), ("c", 3))
        for n in range(count)
    ]
    assert [s.id for s in first_in_turn(samples, 5)] == ["a/0", "a/1", "b/0", "c/0", "c/1"]
    assert first_in_turn(samples, 100) == first_in_turn(samples, None) == samples


def test_a_limit_takes_documents_in_turn() -> None:
    samples = [sample("a", f"document {n // 3}", n) for n in range(9)]  # three questions about each
    assert [s.id for s in first_in_turn(samples, 3)] == ["a/0", "a/3", "a/6"]
    assert [s.id for s in first_in_turn(samples, 4)] == ["a/0", "a/1", "a/3", "a/6"]


def test_parse_suite(tmp_path: Path) -> None:
    assert parse_suite("needles") == SuiteName("needles")
    assert parse_suite(f"leval:{tmp_path}") == SuiteName("leval", tmp_path)
    assert str(parse_suite(f"longbench:{tmp_path}")) == f"longbench:{tmp_path}"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "needle",
            "unknown suite 'needle' (did you mean 'needles'?); write leval:DIR, longbench:DIR or needles",
        ),
        ("L-Eval:x", "unknown suite 'L-Eval:x' (did you mean 'leval'?)"),
        ("ruler", "unknown suite 'ruler'"),
        ("leval", "suite 'leval': name the folder of its files, as leval:DIR"),
        ("longbench: ", "name the folder of its files, as longbench:DIR"),
        ("leval:/no/such", "/no/such is not there"),
        ("needles:x", "needles takes no folder"),
    ],
)
def test_suites_that_cannot_be(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_suite(text)
    assert message in str(caught.value)


def test_load_suite(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", longbench_row("qasper"))
    assert load_suite(parse_suite(f"longbench:{tmp_path}")) == load_longbench(tmp_path)
    with pytest.raises(InputError, match="there is no field 'evaluation'"):
        load_suite(parse_suite(f"leval:{tmp_path}"))
    with pytest.raises(ValueError, match="needles lies in no folder"):
        load_suite(parse_suite("needles"))


def test_suites_need_no_torch() -> None:
    names = ("suites.by_name", "suites.needles", "evaluate.drops", "suites.metrics")
    modules = ", ".join(f"pipeline.{name}" for name in names)
    code = f"import sys, {modules}; print('torch' in sys.modules)"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == "False"
