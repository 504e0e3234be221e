"""L-Eval's files (An et al. 2023, arXiv:2307.11088): a document, instructions and their outputs a line."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import InputError, did_you_mean
from pipeline.suites.samples import Sample, document_key
from pipeline.suites.suite_files import Loaded, Place, load_files, text_of, texts_of

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


def load_leval(folder: str | Path) -> Loaded:
    """One sample for each instruction in the files of `folder`, in the order of names and lines.

    A row has the fields `input` (the document), `instructions` and `outputs` (lists as long as each other; an
    output may be a list of its own, of which any is right) and `evaluation`, a key of `EVALUATIONS`. The task
    is the file's name without its ending.

    Each question ends with a line on the form of its answer, into which references are brought: `(B) text`
    becomes `B`, `True [fact: False]` becomes `True`, and what stood there before is the facet `output`. The
    sentence of `gsm100` that asks for steps is left out, as answers are compared with the bare number. A
    summary is asked for with the length of its reference, in words, as L-Eval does.

    Rows of another form are left out, and so is an instruction that is empty or has an empty output. Raises
    `InputError` where `load_files` does.
    """
    return load_files(folder, _samples)


def _samples(row: dict[str, Any], place: Place) -> Iterator[Sample | str]:
    document = text_of(row, "input")
    instructions, outputs = row.get("instructions"), row.get("outputs")
    if isinstance(instructions, str):
        instructions = [instructions]
    evaluation = text_of(row, "evaluation")
    if evaluation not in EVALUATIONS:
        hint = did_you_mean(evaluation, EVALUATIONS)
        raise InputError(f"unknown evaluation {evaluation!r}{hint}; known are {', '.join(EVALUATIONS)}")
    if not isinstance(instructions, list) or not isinstance(outputs, list):
        raise InputError("the fields 'instructions' and 'outputs' are not both lists")
    if len(instructions) != len(outputs):
        raise InputError("the field 'outputs' is not as long as 'instructions'")
    facets: dict[str, str | int | float] = {"line": place.line, "evaluation": evaluation}
    if isinstance(source := row.get("source"), str):
        facets["source"] = source
    key = document_key(document)
    for number, (instruction, output) in enumerate(zip(instructions, outputs, strict=True), start=1):
        try:
            right = _right_answers(instruction, output)
        except InputError as error:
            yield f"instruction {number}: {error}"
            continue
        form = _form(place.stem, evaluation, right[0])
        references = tuple(dict.fromkeys(_reference(form, each) for each in right))
        changed = {} if references == tuple(right) else {"output": right[0]}
        yield Sample(
            id=f"{place.stem}/{place.line}/{number}",
            task=place.stem,
            text=document,
            question=_question(form, instruction, references[0]),
            references=references,
            metric=form.metric,
            document_key=key,
            facets={**facets, **changed},
        )


def _right_answers(instruction: Any, output: Any) -> list[str]:
    """At least one; `InputError` for an instruction that cannot be asked."""
    if not isinstance(instruction, str) or not instruction.strip():
        raise InputError("it is not a text, or empty")
    outputs = texts_of({"outputs": output}, "outputs")
    if not outputs:
        raise InputError("its output is empty")
    return outputs


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
