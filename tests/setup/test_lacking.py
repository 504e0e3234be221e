"""When an input is refused because no row of it has the text, or the question."""

from __future__ import annotations

import pytest
from conftest import document

from pipeline.errors import InputError
from pipeline.records import Row, RowError
from pipeline.settings.data_settings import DataSettings
from pipeline.setup.intake import SoughtColumns

DATA = DataSettings(input=("in.jsonl",), text_column="text", question_column="ask")


def failure(kind, lacks=None):
    return RowError(source=Row(row=0, id="a", place="line 1"), kind=kind, message="line 1: why", lacks=lacks)


OK = document(20)
NO_TEXT = failure("missing_text", "text")
NO_QUESTION = failure("missing_question", "ask")
EMPTY, BROKEN = failure("empty_document"), failure("bad_json")


@pytest.mark.parametrize(
    ("windows", "refused"),
    [
        (
            [[NO_TEXT, NO_TEXT]],
            "no row has 'text' of the 2 rows read so far, and none is answered; line 1: why",
        ),
        ([[BROKEN], [BROKEN, NO_TEXT]], "no row has 'text' of the 3 rows"),
        ([[NO_TEXT]], "no row has 'text' of the 1 row read"),
        ([[NO_QUESTION, NO_TEXT, EMPTY]], "no row has 'ask' of the 3 rows"),
        ([[NO_TEXT, OK]], None),
        ([[OK], [NO_TEXT, NO_QUESTION]], None),
        ([[EMPTY], [NO_TEXT]], None),  # it had the column
        ([[failure("missing_question")], [NO_QUESTION]], None),
        ([[failure("over_long"), NO_QUESTION]], None),
        ([[BROKEN]], None),
    ],
)
def test_rows_without_a_column_are_counted_as_they_come(windows, refused):
    taken = []

    def take():
        sought = SoughtColumns(DATA)
        for window in windows:
            sought.look(window)
            taken.append(window)

    if refused is None:
        take()
        assert taken == windows
    else:
        with pytest.raises(InputError, match=refused):
            take()
        assert taken == windows[:-1]


def test_rows_that_earlier_runs_answered_had_the_column():
    SoughtColumns(DATA, answered=True).look([NO_TEXT])  # which raises otherwise
    with pytest.raises(InputError):
        SoughtColumns(DATA).look([NO_TEXT])
