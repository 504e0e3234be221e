"""Which rows are about one document, though its texts are not equal."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from pipeline.suites.samples import sha256
from pipeline.texts.words import counted

if TYPE_CHECKING:
    from pipeline.evaluate.check_rows import CheckRow


def same_documents(rows: Iterable[CheckRow]) -> dict[str, str]:
    """For the key of each row's document the key of the one that it counts as, which may be its own.

    Two are one if their texts differ in white space alone, or if their prompts have the same tokens of them:
    what differed was cut, so the model sees one document, however many rows there are.
    """
    known: dict[str, str] = {}

    def first(key: str) -> str:
        while (other := known.setdefault(key, key)) != key:
            key = other
        return key

    keys: list[str] = []
    for row in rows:
        own = row.sample.document_key
        keys.append(own)
        for alias in _aliases(row):
            one, other = sorted((first(own), first(alias)))
            known[other] = one
    return {key: first(key) for key in keys}


def counted_as(row: CheckRow, same: Mapping[str, str]) -> CheckRow:
    """The row with the key of the document that its own counts as."""
    key = row.sample.document_key
    return replace(row, sample=replace(row.sample, document_key=same.get(key, key)))


def told_same(same: Mapping[str, str]) -> list[str]:
    """What to say of texts that count as one document, if there are any."""
    documents = len({*same.values()})
    if documents == len(same):
        return []
    return [
        f"{len(same):,} texts count as {counted(documents, 'document')}: some differ in white space alone, "
        "or only where they were cut"
    ]


def _aliases(row: CheckRow) -> Iterator[str]:
    """Names that rows share only if they are about one document; all are sorted behind keys, in hex."""
    yield f"text {sha256(' '.join(row.sample.text.split())).hex()}"
    start, end = row.document.spans.document
    if start < end:  # a template may write other columns in its place
        yield f"tokens {hashlib.sha256(row.document.input_ids[start:end].tobytes()).hexdigest()}"
