"""LongBench's published files (Bai et al. 2023, arXiv:2308.14508): document, input and answers a line."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import InputError, did_you_mean
from pipeline.suites.samples import Sample, document_key
from pipeline.suites.suite_files import Loaded, Place, load_files, text_of, texts_of


@dataclass(frozen=True, slots=True)
class _Dataset:
    """The metric of a dataset, and what is asked about a document; `{input}` is the row's own input."""

    metric: str
    question: str


_PHRASE = "Answer with the shortest phrase that answers it only, without explanation."
_PASSAGES = _Dataset(
    "token_f1", f"Answer a question from the passages above.\n\nQuestion: {{input}}\n{_PHRASE}"
)
_CODE = "Answer with the next line of code only, without a comment or a fence."

DATASETS = {
    "narrativeqa": _Dataset(
        "token_f1", f"Answer a question about the story.\n\nQuestion: {{input}}\n{_PHRASE}"
    ),
    "qasper": _Dataset(
        "token_f1",
        "Answer a question about the article.\n\nQuestion: {input}\n"
        "Answer with a short phrase or sentence only, with yes or no where that is asked, and with"
        " unanswerable where the article does not tell.",
    ),
    "multifieldqa_en": _Dataset(
        "token_f1",
        "Answer a question about the text.\n\nQuestion: {input}\n"
        "Answer with a short phrase or sentence only.",
    ),
    "hotpotqa": _PASSAGES,
    "2wikimqa": _PASSAGES,
    "musique": _PASSAGES,
    "triviaqa": _Dataset(
        "token_f1",
        "The examples above show how to answer. Now answer this one.\n\n{input}\n"
        "Answer with the name or phrase only.",
    ),
    "multifieldqa_zh": _Dataset("character_f1", "根据上文回答问题。\n\n问题: {input}\n只写简短的答案。"),
    "dureader": _Dataset("character_rouge_l", "根据以上文章回答问题。\n\n问题: {input}\n只写答案。"),
    "vcsum": _Dataset("character_rouge_l", "为以上会议记录写一段总结。\n只写总结。"),
    "gov_report": _Dataset(
        "rouge_l", "Summarize the government report on one page.\nWrite the summary only."
    ),
    "qmsum": _Dataset(
        "rouge_l",
        "Answer a query about the meeting.\n\nQuery: {input}\n"
        "Answer in a few sentences, without an introduction.",
    ),
    "multi_news": _Dataset(
        "rouge_l", "Summarize all of the news above in one text on one page.\nWrite the summary only."
    ),
    "samsum": _Dataset(
        "rouge_l",
        "The examples above show how a dialogue is summarized. Now summarize this one.\n\n{input}\n"
        "Write the summary only, in one to three sentences.",
    ),
    "trec": _Dataset(
        "class_match",
        "The examples above show the type of a question. Name the type of this one.\n\n{input}\n"
        "Answer with the type only, as it is written in the examples.",
    ),
    "lsht": _Dataset(
        "class_match", "以上例子给出新闻的类别。判断下面这条新闻的类别。\n\n{input}\n只写类别。"
    ),
    "passage_retrieval_en": _Dataset(
        "retrieval_score",
        "Which of the paragraphs above does this abstract describe?\n\nAbstract: {input}\n"
        "Answer with its number only, in the form: Paragraph 1",
    ),
    "passage_retrieval_zh": _Dataset(
        "retrieval_score", "下面的摘要出自以上哪一个段落。\n\n摘要: {input}\n只写段落的编号 格式为: 段落1"
    ),
    "passage_count": _Dataset(
        "count_score",
        "Some of the paragraphs above are repeated. How many different ones are there?\n"
        "Answer with the number only.",
    ),
    "lcc": _Dataset("code_line_similarity", f"Which line of code comes next?\n{_CODE}"),
    "repobench-p": _Dataset(
        "code_line_similarity",
        "Above are files of a repository. Which line of code comes next in this one?\n\n{input}\n" + _CODE,
    ),
}


def load_longbench(folder: str | Path) -> Loaded:
    """One sample for each line of the files of `folder`, in the order of names and lines.

    A row has the fields `context` (the document), `input` (empty where the dataset asks all documents the
    same), `answers` (any is right), `dataset`, and `all_classes` where classes are asked for; `length`,
    `language` and `_id` may be there. The task is the dataset; a dataset of LongBench-E, such as `qasper_e`,
    is the task of the one that it is drawn from.

    Rows of another form are left out. Raises `InputError` where `load_files` does.
    """
    return load_files(folder, _samples)


def _samples(row: dict[str, Any], place: Place) -> Iterator[Sample]:
    name, document = text_of(row, "dataset"), text_of(row, "context")
    task = name.removesuffix("_e")
    dataset = DATASETS.get(task)
    if dataset is None:
        raise InputError(f"unknown dataset {name!r}{did_you_mean(name, DATASETS)}")
    asked = text_of(row, "input", may_be_empty="{input}" not in dataset.question)
    answers = tuple(dict.fromkeys(texts_of(row, "answers")))
    if not answers:
        raise InputError("the field 'answers' is empty")
    choices = () if row.get("all_classes") is None else tuple(texts_of(row, "all_classes"))
    if dataset.metric == "class_match" and not choices:
        raise InputError(f"the field 'all_classes' must list the classes of {task}")
    facets: dict[str, str | int | float] = {"line": place.line}
    for facet in ("length", "language", "_id"):
        if isinstance(value := row.get(facet), str | int | float):
            facets[facet] = value
    yield Sample(
        id=f"{place.stem}/{place.line}",
        task=task,
        text=document,
        question=dataset.question.format(input=asked.strip()),
        references=answers,
        metric=dataset.metric,
        choices=choices,
        document_key=document_key(document),
        facets=facets,
    )
