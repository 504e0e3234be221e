"""Scores of answers that pick: options by letter, true or false, numbers, classes, paragraphs, lists."""

from __future__ import annotations

import re
from collections.abc import Sequence
from decimal import Decimal

_FACT = re.compile(r"\[\s*fact\b", re.IGNORECASE)
_TRUTH = re.compile(r"\b(true|false)\b", re.IGNORECASE)
_MARKUP = re.compile(r"[*_`]+")
_JOINT = r"\s*(?:,\s*and\b|,|;|&|/|\band\b)\s*"  # what may stand between two letters of one answer
_LETTER = r"\(?[A-H]\b[).:]?"
_GOES_ON = r"(?:and|are|because|is|only|or)\b"  # behind a letter that picks
_ARTICLE = rf"A[ \t]+(?!{_GOES_ON})[a-z]"  # as in `A man`, which picks nothing
_OWN_TEXT = rf"[A-H](?:[ \t]+(?!{_GOES_ON})\w\w|-\w)"  # as in `B. A man` or `B. E-mail`, what an option says
_NEXT = rf"(?:{_JOINT}(?!{_ARTICLE})|\s*(?!{_OWN_TEXT})){_LETTER}"
_LETTERS = rf"(?:[A-H]{{2,8}}\b|{_LETTER}(?:{_NEXT})*)"
_LEADING = re.compile(rf"(?!{_ARTICLE}){_LETTERS}")
_ANNOUNCED = re.compile(
    r"\b(?i:answers?|options?|choices?)\b[^.\n]{0,40}?(?:\b(?:is|are)\b:?|:)\s*"
    rf"(?:options? )?(?!{_ARTICLE})({_LETTERS})"
)
_BRACKETED = re.compile(r"\(([A-H])\)")
_ALONE = re.compile(rf"\b(?!{_ARTICLE})([A-H])\b")
_POWER = r"(?:[eE][-+]?\d{1,3}\b)?"
_NUMBER = re.compile(
    rf"(?<![\w.])[-\u2212]?(?:\d{{1,3}}(?:,\d{{3}})+|\d+)(?:\.\d+)?{_POWER}|(?<![\w.])[-\u2212]?\.\d+{_POWER}"
)
_DIGITS = re.compile(r"\d+")


def choice_match(prediction: str, reference: str) -> float:
    """1.0 if the prediction picks all the options that the reference picks and no other, else 0.0.

    The exam tasks of L-Eval (An et al. 2023, arXiv:2307.11088). A reference is letters from A to H, as `C`,
    `AB` or `(B) its text`, or it is `True` or `False`, as far as `[fact ...]`: what the document says, not
    what is so. A prediction's letters are those it begins with, else those behind `the answer is`, else all
    that stand in brackets, else all that stand alone; its truth is the first `true` or `false` in it.
    """
    if told := _TRUTH.match(reference.strip()):
        return float(_truth(prediction) == told.group().lower())
    return float(picked_letters(prediction) == picked_letters(reference) != "")


def picked_letters(text: str) -> str:
    """The option letters that an answer picks, each once and sorted; empty where it picks none."""
    text = _MARKUP.sub("", text).strip()
    if leading := _LEADING.match(text):
        return _letters(leading.group())
    if announced := _ANNOUNCED.search(text):
        return _letters(announced.group(1))
    return "".join(sorted(set(_BRACKETED.findall(text) or _ALONE.findall(text))))


def number_match(prediction: str, reference: str) -> float:
    """1.0 if the last number in the prediction equals the last in the reference, else 0.0.

    Commas between thousands do not count, nor do zeros behind the decimal point. Without a number in the
    reference no prediction matches.
    """
    expected = last_number(reference)
    return float(expected is not None and last_number(prediction) == expected)


def last_number(text: str) -> Decimal | None:
    found = _NUMBER.findall(text)
    return Decimal(found[-1].replace(",", "").replace("\u2212", "-")) if found else None


def recall(prediction: str, reference: str) -> float:
    """Of the items of the reference, which commas separate, the share that stands in the prediction.

    This is how RULER scores the answers to its needles (Hsieh et al. 2024, arXiv:2404.06654): case and order
    do not count, nor does whatever else the prediction says.
    """
    expected, text = items_of(reference), prediction.lower()
    return sum(item.lower() in text for item in expected) / len(expected) if expected else 0.0


def items_of(reference: str) -> list[str]:
    """The items of a reference that is a list, as `recall` counts them."""
    return [item for each in reference.split(",") if (item := each.strip())]


def class_match(prediction: str, reference: str, choices: Sequence[str] = ()) -> float:
    """1 over the number of classes named in the prediction if the reference is one of them, else 0.0.

    A class whose name is part of the reference's does not count, and only the prediction's first line is
    read, as few-shot examples invite more. LongBench's `classification_score` (Bai et al. 2023,
    arXiv:2308.14508) is meant to do the same, but passes over every second such class, and reads the first
    line as empty where it holds white space alone.
    """
    answer = next(iter(prediction.lstrip().splitlines()), "")
    classes = {*choices, reference}
    named = [name for name in classes if name in answer and (name == reference or name not in reference)]
    return 1 / len(named) if reference in named else 0.0


def retrieval_score(prediction: str, reference: str) -> float:
    """Of the numbers in the prediction, the share that is the reference's, which reads as `Paragraph 7`.

    As LongBench scores `passage_retrieval_en` and `passage_retrieval_zh` (Bai et al. 2023,
    arXiv:2308.14508).
    """
    expected = _DIGITS.findall(reference)
    return _share(_DIGITS.findall(prediction), expected[:1])


def count_score(prediction: str, reference: str) -> float:
    """Of the prediction's numbers, the share that is the reference; as LongBench scores `passage_count`."""
    return _share(_DIGITS.findall(prediction), [reference.strip()])


def _share(found: list[str], expected: Sequence[str]) -> float:
    return sum(number in expected for number in found) / len(found) if found else 0.0


def _truth(text: str) -> str | None:
    found = _TRUTH.search(_FACT.split(text)[0])
    return found.group().lower() if found else None


def _letters(text: str) -> str:
    """Each option letter once and sorted; words such as `and` are in lower case."""
    return "".join(sorted(set(text) & set("ABCDEFGH")))
