"""Scores that need a package of the extra `quality`: ROUGE-L, and edit similarity of texts and of code."""

from __future__ import annotations

import unicodedata
from functools import cache
from typing import TYPE_CHECKING

from pipeline.errors import ConfigError

if TYPE_CHECKING:
    from rouge_score.rouge_scorer import RougeScorer

_NO_CODE = ("`", "#", "//")  # fences and comments


def rouge_l(prediction: str, reference: str) -> float:
    """F-measure of the longest common subsequence of words (Lin 2004), stemmed as English words.

    Only ASCII letters and digits make words. The `rouge_score` of LongBench and L-Eval is another: of
    unstemmed words, by another package. Raises `ConfigError` where the package rouge-score is missing.
    """
    return float(_rouge(by_character=False).score(reference, prediction)["rougeL"].fmeasure)


def character_rouge_l(prediction: str, reference: str) -> float:
    """`rouge_l` over letters and digits one by one, for languages that put no space between words.

    LongBench's `rouge_zh_score` goes by the words of a Chinese segmenter instead.
    """
    return float(_rouge(by_character=True).score(reference, prediction)["rougeL"].fmeasure)


def edit_similarity(prediction: str, reference: str) -> float:
    """1 less the share of both texts' characters that insertions and deletions must change.

    Raises `ConfigError` where the package rapidfuzz is missing.
    """
    try:
        from rapidfuzz import fuzz
    except ImportError as error:
        raise _missing("edit_similarity", "rapidfuzz") from error
    return float(fuzz.ratio(prediction, reference)) / 100


def code_line_similarity(prediction: str, reference: str) -> float:
    """`edit_similarity` of the reference, a line of code, and the prediction's first line of code.

    A line with a backtick, `#` or `//` counts as fence or comment. LongBench's `code_sim_score` (Bai et al.
    2023, arXiv:2308.14508) takes the first line without them too, but counts indentation, which a chat model
    seldom keeps, may take an empty line, and rounds to hundredths.
    """
    lines = (line.strip() for line in prediction.splitlines())
    code = next((line for line in lines if line and not any(sign in line for sign in _NO_CODE)), "")
    return edit_similarity(code, reference.strip())


class _Characters:
    def tokenize(self, text: str) -> list[str]:
        return [char for char in text.lower() if unicodedata.category(char)[0] in "LN"]


@cache
def _rouge(*, by_character: bool) -> RougeScorer:
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise _missing("character_rouge_l" if by_character else "rouge_l", "rouge-score") from error
    return RougeScorer(["rougeL"], use_stemmer=True, tokenizer=_Characters() if by_character else None)


def _missing(metric: str, package: str) -> ConfigError:
    return ConfigError(f"the metric {metric} needs {package}: pip install 'marsinfer[quality]'")
