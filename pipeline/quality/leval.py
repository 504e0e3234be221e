"""L-Eval's files (An et al. 2023, arXiv:2307.11088): a document, instructions and their outputs a line."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import InputError, did_you_mean
from pipeline.quality.samples import Sample, document_key, jsonl_files, read_objects, text_of, texts_of

_LETTER = "Answer with the letter of the right option only."
_LETTERS = (
    "More than one option may be right. Answer with the letters of all right options only, in alphabetical"
    " order, written together."
)
_TRUTH = "Answer with True or False only."
_NUMBER = "Answer with the final number only, without any steps."
_NAME = "Answer with the name of the topic only."
_SHORT = "Answer with a short phrase only, in the words of the document where possible."
_SENTENCES = "Answer in one to three sentences, without an introduction."
_CLAUSE = "Answer with the words of the contract only, quoted exactly."
_SUMMARY = "Answer with the text itself only, in about {words} words."

_STEPS = re.compile(r"\s*Let's think step by step\.?\s*$", re.IGNORECASE)
_LETTERS_FORM = re.compile(r"[A-H]{1,8}")
_OPTION_FORM = re.compile(r"\(([A-H])\)\s")
_TRUTH_FORM = re.compile(r"(True|False)\b\s*(?:\[|$)", re.IGNORECASE)
_NUMBER_FORM = re.compile(r"\$?-?[\d,]*\.?\d+%?")


@dataclass(frozen=True, slots=True)
class _Form:
    """How answers of a task are asked for and scored."""

    metric: str
    hint: str


EVALUATIONS = {
    "exam": _Form("contains", "Answer as briefly as you can."),  # where the output's form tells no better
    "f1": _Form("token_f1", _SHORT),
    "rouge": _Form("rouge_l", _SUMMARY),
    "LLM": _Form("token_f1", _SENTENCES),
    "human": _Form("token_f1", _SENTENCES),
}
_TASKS = {
    "coursera": _Form("choice_match", _LETTERS),
    "financial_qa": _Form("token_f1", _SENTENCES),
    "gsm100": _Form("number_match", _NUMBER),
    "legal_contract_qa": _Form("token_f1", _CLAUSE),
    "multidoc_qa": _Form("token_f1", _SENTENCES),
    "quality": _Form("choice_match", _LETTER),
    "sci_fi": _Form("choice_match", _TRUTH),
    "topic_retrieval_longchat": _Form("contains", _NAME),
    "tpo": _Form("choice_match", _LETTER),
}


def load_leval(folder: str | Path) -> list[Sample]:
    """One sample for each instruction in the files `*.jsonl` of `folder`, in the order of names and lines.

    A row has the fields `input` (the document), `instructions` and `outputs` (lists as long as each other; an
    output may be a list of its own, of which any is right) and `evaluation`, a key of `EVALUATIONS`. The task
    is the file's name without its ending.

    Each question ends with a line on the form of its answer, into which references are brought: `(B) text`
    becomes `B`, `True [fact: False]` becomes `True`, and what stood there before is the facet `output`. The
    sentence of `gsm100` that asks for steps is left out, as answers are compared with the bare number. A
    summary is asked for with the length of its reference, in words, as L-Eval does. Raises `InputError`, with
    file and line, for a row that is otherwise.
    """
    samples: list[Sample] = []
    for path in jsonl_files(folder):
        for place, number, row in read_objects(path):
            samples += _row(path.stem, number, row, place)
    if not samples:
        raise InputError(f"{folder}: no rows in its *.jsonl files")
    return samples


def _row(task: str, number: int, row: dict[str, Any], place: str) -> list[Sample]:
    text = text_of(row, "input", place)
    instructions, outputs = texts_of(row, "instructions", place), row.get("outputs")
    evaluation = text_of(row, "evaluation", place)
    if evaluation not in EVALUATIONS:
        hint = did_you_mean(evaluation, EVALUATIONS)
        known = ", ".join(EVALUATIONS)
        raise InputError(f"{place}: unknown evaluation {evaluation!r}{hint}; known are {known}")
    if not isinstance(outputs, list) or len(outputs) != len(instructions):
        raise InputError(f"{place}: the field 'outputs' is not a list as long as 'instructions'")
    key = document_key(text)
    samples = []
    for place_in_row, (instruction, output) in enumerate(zip(instructions, outputs, strict=True), start=1):
        texts = [given.strip() for given in texts_of({"outputs": output}, "outputs", place)]
        if not instruction.strip() or not texts or not all(texts):
            raise InputError(f"{place}: instruction {place_in_row} or its output is empty")
        form = _form(task, evaluation, texts[0])
        references = tuple(dict.fromkeys(_reference(form, output) for output in texts))
        facets: dict[str, str | int | float] = {"line": number, "evaluation": evaluation}
        if isinstance(source := row.get("source"), str):
            facets["source"] = source
        if references != tuple(texts):
            facets["output"] = texts[0]
        samples.append(
            Sample(
                id=f"{task}/{number}/{place_in_row}",
                task=task,
                text=text,
                question=_question(form, instruction, references[0]),
                references=references,
                metric=form.metric,
                document_key=key,
                facets=facets,
            )
        )
    return samples


def _form(task: str, evaluation: str, output: str) -> _Form:
    if task in _TASKS:
        return _TASKS[task]
    if evaluation != "exam":
        return EVALUATIONS[evaluation]
    if _OPTION_FORM.match(output) or (_LETTERS_FORM.fullmatch(output) and len(output) == 1):
        return _Form("choice_match", _LETTER)
    if _LETTERS_FORM.fullmatch(output):
        return _Form("choice_match", _LETTERS)
    if _TRUTH_FORM.match(output):
        return _Form("choice_match", _TRUTH)
    return _Form("number_match", _NUMBER) if _NUMBER_FORM.fullmatch(output) else EVALUATIONS["exam"]


def _reference(form: _Form, output: str) -> str:
    """The output in the form that the hint asks for; as it is where it has another."""
    if form.metric != "choice_match":
        return output
    if form.hint == _TRUTH:
        found = _TRUTH_FORM.match(output)
        return found.group(1).capitalize() if found else output
    found = _OPTION_FORM.match(f"{output} ")
    return found.group(1) if found else output


def _question(form: _Form, instruction: str, reference: str) -> str:
    asked = instruction.strip()
    if form.hint == _NUMBER:
        asked = _STEPS.sub("", asked)
    words = max(10, round(len(reference.split()), -1))
    return f"{asked}\n{form.hint.format(words=words)}"
