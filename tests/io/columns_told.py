"""What an input says of its columns before it is opened, for the tests of it."""

from pipeline.io.inputs import find_files
from pipeline.io.peek import first_columns


def columns_told(*inputs):
    return first_columns(find_files(inputs)[0])
