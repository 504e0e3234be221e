import pytest

from pipeline.suites.picks import (
    choice_match,
    class_match,
    count_score,
    items_of,
    number_match,
    picked_letters,
    recall,
    retrieval_score,
)


@pytest.mark.parametrize(
    ("text", "letters"),
    [
        ("C", "C"),
        ("c", ""),
        ("CA", "AC"),
        ("ACD.", "ACD"),
        ("(B) the second", "B"),
        ("B. the second", "B"),
        ("B) one\nC) two", "B"),
        ("**B**", "B"),
        ("A, B and C", "ABC"),
        ("A and C", "AC"),
        ("A is right", "A"),
        ("A man went", ""),
        ("Both B and D", "BD"),
        ("The answer is C.", "C"),
        ("A good question: the answer to Question 1 is B", "B"),
        ("The correct options are A, C, and D.", "ACD"),
        ("The correct answer is: (D) They left", "D"),
        ("I think (A) and (C)", "AC"),
        ("(B) A contract is signed", "B"),
        ("The answer is C. A Midsummer Night", "C"),
        ("A. C.\nBoth", "AC"),
        ("None of them", ""),
        ("", ""),
    ],
)
def test_picked_letters(text: str, letters: str) -> None:
    assert picked_letters(text) == letters


@pytest.mark.parametrize(
    ("prediction", "reference", "expected"),
    [
        ("(C)", "C", 1.0),
        ("C, A", "AC", 1.0),
        ("A", "AC", 0.0),
        ("ABC", "AC", 0.0),
        ("B", "(B) it is true", 1.0),
        ("true", "(B) it is true", 0.0),
        ("none", "none", 0.0),
        ("True.", "True [fact: False]", 1.0),
        ("It is false [fact: True]", "False [fact: True]", 1.0),
        ("[fact: True]", "True", 0.0),
        ("The statement is false; it is true elsewhere", "True", 0.0),
    ],
)
def test_choice_match(prediction: str, reference: str, expected: float) -> None:
    assert choice_match(prediction, reference) == expected


@pytest.mark.parametrize(
    ("prediction", "reference", "expected"),
    [
        ("4 + 5 = 9 eggs.", "9", 1.0),
        ("It is $70,000.00.", "70000", 1.0),
        ("70000", "70,000", 1.0),
        ("9, or 10", "9", 0.0),
        ("pages 3-4", "4", 1.0),
        ("-4", "4", 0.0),
        ("\N{MINUS SIGN}4", "-4", 1.0),
        (".5", "0.50", 1.0),
        ("1.5e-3", "0.0015", 1.0),
        ("nine", "9", 0.0),
        ("nine", "nine", 0.0),
    ],
)
def test_number_match(prediction: str, reference: str, expected: float) -> None:
    assert number_match(prediction, reference) == expected


@pytest.mark.parametrize(
    ("prediction", "expected"),
    [
        ("ABC, DEF", 1.0),
        ("They are def and abc.", 1.0),
        ("ABC", 0.5),
        ("ABC, DEF, XYZ", 1.0),  # what else is said does not count
        ("XYZ", 0.0),
        ("ABC, ABC", 0.5),
        ("", 0.0),
    ],
)
def test_recall(prediction: str, expected: float) -> None:
    assert recall(prediction, "ABC, DEF") == expected


def test_recall_of_a_reference_without_items() -> None:
    assert items_of(" ABC,, D E ,") == ["ABC", "D E"]
    assert recall("anything", " , ") == 0.0


@pytest.mark.parametrize(
    ("prediction", "expected"),
    [
        ("Other location", 1.0),  # `location` is a part of it
        ("Other location or City", 0.5),
        ("Other location\nType: City", 1.0),
        ("location", 0.0),
        ("", 0.0),
    ],
)
def test_class_match(prediction: str, expected: float) -> None:
    classes = ("City", "location", "Other location")
    assert class_match(prediction, "Other location", classes) == expected


@pytest.mark.parametrize(
    ("prediction", "expected"), [("Paragraph 7", 1.0), ("7", 1.0), ("7 or 17", 0.5), ("17", 0.0), ("", 0.0)]
)
def test_retrieval_and_count(prediction: str, expected: float) -> None:
    assert retrieval_score(prediction, "Paragraph 7") == expected
    assert retrieval_score(prediction, "段落7") == expected
    assert count_score(prediction, "7") == expected
