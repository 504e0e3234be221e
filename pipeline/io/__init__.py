"""Reading documents from files and writing answers to one; see `open_source` and `AnswerWriter`."""

from pipeline.io.columns import Columns, Keep, parse_keep_columns
from pipeline.io.inputs import find_files
from pipeline.io.source import Source, open_source
from pipeline.io.writing import AnswerWriter, check_output, output_schema

__all__ = [
    "AnswerWriter",
    "Columns",
    "Keep",
    "Source",
    "check_output",
    "find_files",
    "open_source",
    "output_schema",
    "parse_keep_columns",
]
