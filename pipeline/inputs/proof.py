"""That the output can hold what will be copied to it, proven by writing a row before any is answered."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa

from pipeline.errors import ConfigError
from pipeline.inputs.passthrough import PassColumn
from pipeline.outputs.answers import QUESTION_NAME, answers_table, output_schema
from pipeline.outputs.chunks import pack_chunk
from pipeline.outputs.formats import SINKS, Published
from pipeline.records import Answer
from pipeline.storage.causes import READ_ERRORS, cause
from pipeline.values.converting import converts
from pipeline.values.dictionaries import TWINS, has_twins

OTHER_FORMATS = (".arrows", ".arrow", ".parquet", ".jsonl")
MOST_NAMED = 5


def check_held(output: str, columns: Sequence[PassColumn]) -> None:
    """Refuse columns that an output of this name, by its extension, cannot hold.

    The message names the first of them, its type, and what helps, which is tried too. An extension that is
    not known is told elsewhere.
    """
    suffix = Path(output).suffix.lower()
    if suffix not in SINKS or _fault(suffix, columns) is None:
        return
    for column in columns:
        fault = _fault(suffix, [column])
        if fault is not None:
            raise ConfigError(
                f"column {column.field.name!r} is {column.field.type}, which {suffix} cannot hold ({fault}); "
                f"{_remedy(suffix, column, columns)}"
            )
    raise ConfigError(f"{output} cannot be written as {suffix}: {_fault(suffix, columns)}")


def _fault(suffix: str, columns: Sequence[PassColumn]) -> str | None:
    """Why such columns cannot be kept in a journal, written and read back; None if a row of nulls can."""
    if suffix == ".jsonl" and any(has_twins(column.field.type) for column in columns):
        return TWINS
    copied = pa.schema([column.field for column in columns])
    schema = output_schema(copied, {}, holds_question=QUESTION_NAME not in copied.names)
    content = io.BytesIO()
    try:
        table = answers_table([Answer(id="", row=0)], schema)
        pack_chunk(table)
        sink = SINKS[suffix](content, schema)
        sink.write(table)
        sink.finish()
        if suffix != ".jsonl":
            written = Published(Path(f"output{suffix}"), pa.py_buffer(content.getvalue()))
            for group in written:
                written.read(group)
    except (TypeError, *READ_ERRORS) as error:
        return cause(error)
    return None


def _remedy(suffix: str, column: PassColumn, columns: Sequence[PassColumn]) -> str:
    """All that helps: another format, text, or going without."""
    able = [other for other in OTHER_FORMATS if other != suffix and _fault(other, columns) is None]
    remedies = [f"name an output with {able[0]}"] if able else []
    names = [other.source for other in columns if other is not column and other.source is not None]
    others = names[:MOST_NAMED]
    if column.source is not None and converts(column.field.type, pa.large_string()):
        as_text = ",".join([f"{column.source}:string", *others])
        remedies.append(f"keep it as text, as in --keep-columns {as_text}")
    if others:
        remedies.append(f"leave it out, as in --keep-columns {','.join(others)}")
    return ", or ".join(remedies)
