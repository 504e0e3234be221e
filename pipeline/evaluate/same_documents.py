"""Which rows are about one document, though its texts are not equal."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

from pipeline.records import EncodedDocument
from pipeline.suites.samples import Sample, sha256
from pipeline.texts.words import counted

Prompt = tuple[Sample, EncodedDocument]


def same_documents(prompts: Iterable[Prompt]) -> dict[str, str]:
    """For the key of each prompt's document the key of the one that it counts as, which may be its own.

    Two are one if their texts differ in white space alone, or if their prompts have the same tokens of them:
    what differed was cut, so the model sees one document, however many rows there are.
    """
    known: dict[str, str] = {}

    def first(key: str) -> str:
        while (other := known.setdefault(key, key)) != key:
            key = other
        return key

    keys: list[str] = []
    for sample, prompt in prompts:
        own = sample.document_key
        keys.append(own)
        for alias in _aliases(sample, prompt):
            one, other = sorted((first(own), first(alias)))
            known[other] = one
    return {key: first(key) for key in keys}


def counted_as(sample: Sample, same: Mapping[str, str]) -> Sample:
    """The sample with the key of the document that its own counts as."""
    return replace(sample, document_key=same.get(sample.document_key, sample.document_key))


def told_same(same: Mapping[str, str]) -> list[str]:
    """What to say of texts that count as one document, if there are any."""
    documents = len({*same.values()})
    if documents == len(same):
        return []
    return [
        f"{len(same):,} texts count as {counted(documents, 'document')}: some differ in white space alone, "
        "or only where they were cut"
    ]


def _aliases(sample: Sample, prompt: EncodedDocument) -> Iterator[str]:
    """Names that samples share only if they are about one document; all are sorted behind keys, in hex."""
    yield f"text {sha256(' '.join(sample.text.split())).hex()}"
    start, end = prompt.spans.document
    if start < end:  # a template may write other columns in its place
        yield f"tokens {hashlib.sha256(prompt.input_ids[start:end].tobytes()).hexdigest()}"
