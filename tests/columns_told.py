"""What an input says of its columns before it is opened, for the tests of it."""

from pipeline.inputs.finding import find_files
from pipeline.inputs.source import first_columns, open_readers


def columns_told(*inputs):
    return first_columns(open_readers(find_files(inputs)[0], []))
