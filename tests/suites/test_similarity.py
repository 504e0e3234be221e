import sys

import pytest

from pipeline.errors import ConfigError
from pipeline.suites import similarity
from pipeline.suites.similarity import character_rouge_l, code_line_similarity, edit_similarity, rouge_l


@pytest.mark.parametrize(
    ("prediction", "reference", "expected"),
    [
        ("The cats sat.", "the cat sat", 1.0),  # stemmed
        ("a b c d", "a c", 2 / 3),  # 2 of 4 and 2 of 2
        ("c a", "a c", 0.5),  # in order only
        ("x", "y", 0.0),
        ("", "y", 0.0),
    ],
)
def test_rouge_l(prediction: str, reference: str, expected: float) -> None:
    assert rouge_l(prediction, reference) == pytest.approx(expected)


def test_character_rouge_l_goes_by_characters() -> None:
    assert character_rouge_l("会议开始了。", "会议开始") == pytest.approx(2 * 4 / (5 + 4))
    assert rouge_l("会议开始了。", "会议开始") == 0.0  # ASCII words only


def test_edit_similarity() -> None:
    assert edit_similarity("abcd", "abcd") == 1.0
    assert edit_similarity("ab", "ax") == pytest.approx(0.5)  # b goes and x comes: 2 of 4 characters
    assert edit_similarity("ab", "xy") == 0.0


@pytest.mark.parametrize(
    "prediction",
    [
        "return x + 1",
        "    return x + 1\n    raise",
        "\n```python\n# the next line\n// or so\nreturn x + 1\n```",
    ],
)
def test_code_line_similarity_takes_the_first_line_of_code(prediction: str) -> None:
    assert code_line_similarity(prediction, "    return x + 1") == 1.0


def test_code_line_similarity_without_code() -> None:
    assert code_line_similarity("# nothing", "return") == 0.0


@pytest.mark.parametrize(
    ("metric", "package", "module"),
    [
        (rouge_l, "rouge-score", "rouge_score.rouge_scorer"),
        (character_rouge_l, "rouge-score", "rouge_score.rouge_scorer"),
        (edit_similarity, "rapidfuzz", "rapidfuzz"),
    ],
)
def test_a_missing_package_is_named(
    monkeypatch: pytest.MonkeyPatch, metric, package: str, module: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    similarity._rouge.cache_clear()
    with pytest.raises(ConfigError) as caught:
        metric("a", "b")
    assert str(caught.value) == (
        f"the metric {metric.__name__} needs {package}: pip install 'marsinfer[quality]'"
    )
