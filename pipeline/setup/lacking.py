"""An input of which no row has the column of the text, or of the question: no run, not rows of errors."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from pipeline.errors import InputError
from pipeline.records import RowFailure
from pipeline.settings.data_settings import DataSettings
from pipeline.setup.intake import Item
from pipeline.texts.words import counted

# of failures, what kind tells that the row has the text, or both; of rows of all other kinds neither is known
OF_TEXTS = ("missing_text", "empty_document", "bad_text_type")
OF_QUESTIONS = ("missing_question", "bad_question_type")
OF_PROMPTS = ("over_long", "template")


def refuse_lacking(
    windows: Iterable[list[Item]], data: DataSettings, *, answered: bool = False
) -> Iterator[list[Item]]:
    """The same windows, until one comes in which no row has the text, or the question, and none had before.

    Raises InputError then, which names the column, those there are, and the flag. `answered` says that
    earlier runs have answered rows.
    """
    columns = () if answered else (data.text_column, data.question_column, data.questions_column)
    sought = [name for name in columns if name is not None]
    read = 0
    for window in windows:
        read += len(window)
        for name in tuple(sought):
            lacking = [item for item in window if isinstance(item, RowFailure) and item.lacks == name]
            if any(_has(item, name, data) for item in window):
                sought.remove(name)
            elif lacking:
                raise InputError(
                    f"no row has {name!r} of the {counted(read, 'row')} read so far, and none is answered; "
                    f"{lacking[0].message}"
                )
        yield window


def _has(item: Item, name: str, data: DataSettings) -> bool:
    if not isinstance(item, RowFailure):
        return True
    if (item.kind in OF_QUESTIONS and item.lacks is None) or item.kind in OF_PROMPTS:
        return True
    of_text = item.kind in OF_TEXTS and item.lacks is None
    return name == data.text_column and (of_text or item.kind in OF_QUESTIONS)
