import pytest

from pipeline.errors import ConfigError
from pipeline.suites.metrics import (
    METRICS,
    character_f1,
    contains,
    exact_match,
    normalize,
    parts_of,
    score,
    token_f1,
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", ""),
        (" \t\n", ""),
        ("The", ""),
        ("A cat, an owl; THE end!", "cat owl end"),
        ("within  thirty\n (30)\tdays.", "within thirty 30 days"),
        ("theory another a.m.", "theory another am"),
        ("30-day", "30day"),
        ("$5 <b>", "5 b"),
        ("“Ty Coon”…", "ty coon"),
        ("Überprüfung der Straße", "überprüfung der straße"),
        ("１０日。", "１０日"),
        ("a\N{NO-BREAK SPACE}word", "word"),
    ],
)
def test_normalize(text: str, expected: str) -> None:
    assert normalize(text) == expected


@pytest.mark.parametrize("text", ["The 30-day term.", "…“a”", "Ω, the END"])
def test_normalizing_twice_changes_nothing(text: str) -> None:
    assert normalize(normalize(text)) == normalize(text)


@pytest.mark.parametrize(
    ("prediction", "reference", "expected"),
    [
        ("The 30 days.", "30 Days", 1.0),
        ("It is 30 days", "30 days", 0.0),
        ("days 30", "30 days", 0.0),
        ("", "", 1.0),
        ("", "30 days", 0.0),
        ("the", "", 1.0),
    ],
)
def test_exact_match(prediction: str, reference: str, expected: float) -> None:
    assert exact_match(prediction, reference) == expected


@pytest.mark.parametrize(
    ("prediction", "reference", "expected"),
    [
        ("30 days", "30 days", 1.0),
        ("days, 30", "30 days", 1.0),
        # 2 of the 4 predicted tokens (it is 30 days), 2 of the 2 expected: 2 * (0.5 * 1) / 1.5
        ("It is 30 days", "30 days", 2 / 3),
        # 1 of 3 and 1 of 2: 2 * (1/3 * 1/2) / (5/6)
        ("within 60 days", "30 days", 0.4),
        # a repeated token counts once where the reference has it once: 1 of 3 and 1 of 1
        ("yes yes yes", "yes", 0.5),
        ("no", "yes", 0.0),
        ("", "", 1.0),
        ("the", "", 1.0),
        ("", "30 days", 0.0),
        ("30 days", "", 0.0),
    ],
)
def test_token_f1(prediction: str, reference: str, expected: float) -> None:
    assert token_f1(prediction, reference) == pytest.approx(expected)
    assert token_f1(reference, prediction) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("prediction", "reference", "expected"),
    [
        ("You have 30 days.", "30 days", 1.0),
        ("The term is 30 (the) days", "30 days", 1.0),
        ("30 days", "30 days", 1.0),
        ("130 days", "30 days", 0.0),
        ("30 business days", "30 days", 0.0),
        ("days 30", "30 days", 0.0),
        ("30", "30 days", 0.0),
        ("Signed: “ty coon”, President", "Ty Coon", 1.0),
        ("", "", 1.0),
        ("anything", "", 0.0),
        ("anything", "the", 0.0),
        ("", "30 days", 0.0),
    ],
)
def test_contains(prediction: str, reference: str, expected: float) -> None:
    assert contains(prediction, reference) == expected


@pytest.mark.parametrize(
    ("prediction", "reference", "expected"),
    [
        ("北京。", "北京", 1.0),
        ("在北京", "北京", 0.8),  # 2 of 3 and 2 of 2
        ("上海", "北京", 0.0),
        ("", "北京", 0.0),
    ],
)
def test_character_f1(prediction: str, reference: str, expected: float) -> None:
    assert character_f1(prediction, reference) == pytest.approx(expected)


@pytest.mark.parametrize("name", METRICS)
def test_every_metric_gives_its_own_reference_full_marks(name: str) -> None:
    reference = {"choice_match": "AC", "retrieval_score": "Paragraph 7", "recall": "12, 34"}.get(name, "3412")
    assert score(name, reference, (reference,), ("56", reference)) == pytest.approx(1.0)
    assert score(name, "", (reference,), ("56", reference)) == 0.0


def test_the_best_reference_counts() -> None:
    assert score("exact_match", "the cat", ("dog", "Cat.")) == 1.0
    assert score("token_f1", "cat", ("big cat", "no")) == pytest.approx(2 / 3)


def test_unknown_metrics_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"unknown metric 'rouge_k' \(did you mean 'rouge_l'\?\)"):
        score("rouge_k", "a", ("a",))
    with pytest.raises(ValueError, match="no references"):
        score("rouge_l", "a", ())


def test_the_parts_of_a_reference() -> None:
    assert parts_of("recall", "12, 34, 56") == ["12", "34", "56"]
    assert parts_of("token_f1", "12, 34, 56") == ["12, 34, 56"]


def test_no_metric_has_the_name_of_another_benchmarks() -> None:
    others = {"qa_f1_score", "rouge_score", "rouge_zh_score", "classification_score", "code_sim_score"}
    assert others.isdisjoint(METRICS)
    # these two compute what LongBench's do
    assert METRICS["retrieval_score"]("Paragraph 3, not 4", "Paragraph 3") == 0.5
    assert METRICS["count_score"]("3 of 30", "3") == 0.5
