"""How well an answer agrees with a reference: scores from 0 (no agreement) to 1, and `METRICS`, all by name.

Those of this file compare normalised tokens, so case, punctuation, articles and line breaks do not count.
`exact_match` and `token_f1` are those of SQuAD (Rajpurkar et al. 2016, arXiv:1606.05250, and its script
`evaluate-v1.1.py`; the empty cases are those of `evaluate-v2.0.py`). `contains` suits models that answer in
whole sentences, whose precision, and so whose F1, is low however right the answer is.

Only a metric that computes the same as a benchmark's has its name, as LongBench's `retrieval_score` and
`count_score` do. Even those scores are not comparable with published ones, as the prompts are others.
"""

from __future__ import annotations

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache

from pipeline.errors import ConfigError, did_you_mean
from pipeline.suites import picks, similarity

_ARTICLES = re.compile(r"\b(?:a|an|the)\b")


def normalize(text: str) -> str:
    """Lower-case `text`, drop its punctuation and English articles, and fold its whitespace.

    On ASCII this is SQuAD's normalisation. Punctuation outside ASCII, such as curly quotes, is dropped as
    well, as MLQA does (Lewis et al. 2020, arXiv:1910.07475). Punctuation is deleted rather than replaced by
    a space: `30-day` becomes `30day`.
    """
    lowered = text.lower()
    punctuation = {ord(char): None for char in set(lowered) if _is_punctuation(char)}
    return " ".join(_ARTICLES.sub(" ", lowered.translate(punctuation)).split())


def exact_match(prediction: str, reference: str) -> float:
    """1.0 if both normalise to the same text, else 0.0."""
    return float(normalize(prediction) == normalize(reference))


def token_f1(prediction: str, reference: str) -> float:
    """Harmonic mean of the precision and the recall of the normalised tokens, repeated tokens included.

    From 0.0, no token shared, to 1.0, the same tokens in any order. Where one side has no tokens, the score
    is 1.0 if the other has none either, else 0.0.
    """
    return _f1(normalize(prediction).split(), normalize(reference).split())


def character_f1(prediction: str, reference: str) -> float:
    """`token_f1` over characters but white space: for languages that put no space between words."""
    return _f1(list("".join(normalize(prediction).split())), list("".join(normalize(reference).split())))


def contains(prediction: str, reference: str) -> float:
    """1.0 if the normalised tokens of the reference occur in those of the prediction, side by side, else 0.0.

    Whole tokens are compared: `30 days` is not in `130 days`. A reference without tokens is found only in a
    prediction without tokens; otherwise it would be found in every prediction.
    """
    predicted, expected = normalize(prediction).split(), normalize(reference).split()
    if not expected:
        return float(not predicted)
    starts = range(len(predicted) - len(expected) + 1)
    return float(any(predicted[start : start + len(expected)] == expected for start in starts))


@cache
def _is_punctuation(char: str) -> bool:
    return char in string.punctuation or unicodedata.category(char).startswith("P")


def _f1(predicted: Sequence[str], expected: Sequence[str]) -> float:
    if not predicted or not expected:
        return float(predicted == expected)
    shared = (Counter(predicted) & Counter(expected)).total()
    return 2 * shared / (len(predicted) + len(expected))


METRICS: dict[str, Callable[..., float]] = {
    metric.__name__: metric
    for metric in (
        exact_match,
        token_f1,
        character_f1,
        contains,
        similarity.rouge_l,
        similarity.character_rouge_l,
        similarity.edit_similarity,
        similarity.code_line_similarity,
        picks.choice_match,
        picks.number_match,
        picks.recall,
        picks.class_match,
        picks.retrieval_score,
        picks.count_score,
    )
}
WITH_CHOICES = frozenset({"class_match"})  # they take all that could be answered, too


def score(metric: str, prediction: str, references: Sequence[str], choices: Sequence[str] = ()) -> float:
    """The best agreement of `prediction` with any of `references`, at least one, by the metric of that name.

    `choices` is all that could be answered, for the metrics in `WITH_CHOICES`. Raises `ConfigError` for an
    unknown metric, and for one whose package is not installed.
    """
    if metric not in METRICS:
        raise ConfigError(f"unknown metric {metric!r}{did_you_mean(metric, METRICS)}")
    if not references:
        raise ValueError("no references")
    more = (choices,) if metric in WITH_CHOICES else ()
    return max(METRICS[metric](prediction, reference, *more) for reference in references)


def parts_of(metric: str, reference: str) -> list[str]:
    """What of a reference counts one by one, in its order: the items of a list, else the whole of it."""
    return picks.items_of(reference) if metric == picks.recall.__name__ else [reference]
