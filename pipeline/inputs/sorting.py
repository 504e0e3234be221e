"""Rows put together by their documents, on disk: those about one document follow each other."""

from __future__ import annotations

import pickle
import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import replace
from hashlib import blake2b

import pyarrow as pa

from pipeline.errors import StorageError
from pipeline.inputs.table_rows import as_stream, lone
from pipeline.records import Document, Record, Row
from pipeline.storage.causes import cause

# A text is kept once, however many rows ask about it; documents are numbered as they first come.
_SETUP = """
PRAGMA journal_mode = OFF;
PRAGMA synchronous = OFF;
PRAGMA cache_size = -8192;
CREATE TABLE documents (number INTEGER PRIMARY KEY, digest BLOB UNIQUE, text BLOB);
CREATE TABLE rows (document INTEGER, place INTEGER, record BLOB, copied BLOB, PRIMARY KEY (document, place))
    WITHOUT ROWID;
"""


def by_document(records: Iterable[Record]) -> Iterator[Record]:
    """All `records`, those with one text behind the first of them; failures keep their place among these.

    They are read to the end before the first comes out, and wait in a file that has no name, where SQLite
    keeps temporary ones (`TMPDIR`): in memory are a few of them. Raises StorageError where there is no room.
    """
    try:
        # an empty name: a database on disk that is gone with this process, however that ends
        with closing(sqlite3.connect("", check_same_thread=False)) as database:
            database.executescript(_SETUP)
            for place, record in enumerate(records):
                database.execute(
                    "INSERT INTO rows VALUES (?, ?, ?, ?)",
                    (_document(database, record), place, *_packed(record)),
                )
            yield from _stored(database)
    except sqlite3.Error as error:
        raise StorageError(
            f"the rows cannot be sorted by document: {cause(error)}; "
            "let TMPDIR name a folder with room for all texts"
        ) from error


def _document(database: sqlite3.Connection, record: Record) -> int | None:
    """The number of a record's document; a failure has one of its own."""
    if not isinstance(record, Document):
        return database.execute("INSERT INTO documents (digest) VALUES (NULL)").lastrowid
    text = record.text.encode()
    digest = blake2b(text, digest_size=16).digest()
    found = database.execute("SELECT number FROM documents WHERE digest = ?", (digest,)).fetchone()
    if found is not None:
        return found[0]
    return database.execute("INSERT INTO documents (digest, text) VALUES (?, ?)", (digest, text)).lastrowid


def _stored(database: sqlite3.Connection) -> Iterator[Record]:
    number, text = None, ""
    for document, packed, copied in database.execute(
        "SELECT document, record, copied FROM rows ORDER BY document, place"
    ):
        record = pickle.loads(packed)
        source = _with_copied(record.source, copied)
        if not isinstance(record, Document):
            yield replace(record, source=source)
            continue
        if document != number:
            query = "SELECT text FROM documents WHERE number = ?"
            number, text = document, database.execute(query, (document,)).fetchone()[0].decode()
        yield replace(record, source=source, text=text)


def _packed(record: Record) -> tuple[bytes, bytes | None]:
    """A record without its text, and what its row copies from the input."""
    copied = record.source.passthrough
    bare = replace(record, source=replace(record.source, passthrough=None))
    if isinstance(bare, Document):
        bare = replace(bare, text="")
    return pickle.dumps(bare), None if copied is None else _row_as_stream(copied)


def _row_as_stream(row: pa.RecordBatch) -> bytes:
    columns = [lone(column) if isinstance(column, pa.DictionaryArray) else column for column in row.columns]
    row = pa.RecordBatch.from_arrays(columns, schema=row.schema)
    return as_stream(row).to_pybytes()


def _with_copied(source: Row, copied: bytes | None) -> Row:
    if copied is None:
        return source
    return replace(source, passthrough=pa.ipc.open_stream(copied).read_next_batch())
