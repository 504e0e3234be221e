"""A table of contracts, made of the typed columns that `questions.toml` and `--expand` give an output.

Run it with the name of the output, and perhaps that of a Parquet file to write.
"""

from __future__ import annotations

import sys

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

# columns of the table: the question, and the field of what its answer says
COLUMNS = {
    "law": ("law", "governing_law"),
    "arbitration": ("law", "arbitration"),
    "begins": ("term", "begins"),
    "months": ("term", "months"),
    "amount": ("payment", "amount"),
    "currency": ("payment", "currency"),
    "per": ("payment", "per"),
}


def contracts(path: str) -> pa.Table:
    """A row a contract; what an answer says is null where it is not valid under the question's schema."""
    output = pq.read_table(path)
    table = {"contract": output["id"], "parties": pc.list_value_length(said(output["parties"]))}
    for name, (question, field) in COLUMNS.items():
        table[name] = pc.struct_field(said(output[question]), field)
    return pa.table(table)


def said(answers: pa.ChunkedArray) -> pa.ChunkedArray:
    """What the answers to a question say, as values of its schema's types."""
    values = pc.struct_field(answers, "value")
    is_valid = pc.fill_null(pc.struct_field(answers, "valid"), False)
    return pc.if_else(is_valid, values, pa.nulls(len(values), values.type))


def main(output: str, written: str | None = None) -> None:
    table = contracts(output)
    print(*table.column_names, sep="\t")
    for row in table.to_pylist():
        print(*("-" if value is None else value for value in row.values()), sep="\t")
    if written is not None:
        pq.write_table(table, written)


if __name__ == "__main__":
    main(*sys.argv[1:])
