"""What a check asks: rows of the user's data and samples of suites, as prompts with their right answers."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.errors import ConfigError, InputError, RowError, did_you_mean
from pipeline.intake import open_columns
from pipeline.io import Source
from pipeline.quality.haystack import token_counter
from pipeline.quality.needles import make_needles
from pipeline.quality.samples import Sample, document_key, first_in_turn, part_of, take
from pipeline.quality.suites import load_suite
from pipeline.reading import each_question
from pipeline.records import Document, EncodedDocument, Row, RowFailure
from pipeline.redaction import bare, hidden
from pipeline.selection import select_rows
from pipeline.settings.parse import parse_shard
from pipeline.settings.rows import RowSettings

if TYPE_CHECKING:
    from pipeline.prompts import PromptBuilder

NEEDLE_LENGTHS = (8192, 16384, 30720)  # those that the context holds
METRIC = "token_f1"  # of the user's own references
HAYSTACK_CHARACTERS = 64 << 20  # of the user's documents, enough variety for any needles


@dataclass(frozen=True, kw_only=True)
class CheckRow:
    """A sample, its prompt, and its right answer in tokens; no tokens where there is no right answer."""

    sample: Sample
    document: EncodedDocument
    reference: tuple[int, ...]
    reference_cut: int  # tokens of the reference beyond --max-new-tokens
    row_hash: str  # of the prompt's tokens and the right answers


@dataclass(frozen=True, kw_only=True)
class CheckRows:
    """All rows of a check, and why others were left out."""

    rows: tuple[CheckRow, ...]
    left_out: tuple[str, ...]
    notes: tuple[str, ...] = ()  # of what was decided by the columns of the input

    @property
    def data_hash(self) -> str:
        """SHA-256, in hex, of all rows."""
        return data_hash(self.rows)


def data_hash(rows: Sequence[CheckRow]) -> str:
    """SHA-256, in hex, of these rows."""
    return hashlib.sha256("\n".join(row.row_hash for row in rows).encode()).hexdigest()


def read_rows(config: RowSettings, prompts: PromptBuilder) -> CheckRows:
    """Read and tokenize everything. Raises InputError if more than half of it has to be left out."""
    samples: list[Sample] = []
    failed: list[str] = []
    documents, notes = _open(config)
    if documents is not None and config.asks_rows:
        for record in _renamed(_records(config, documents), takes_ids=documents.columns.takes_ids):
            found = _sample(config, record)
            failed.append(found) if isinstance(found, str) else samples.append(found)
    sources = [samples, *(load_suite(suite) for suite in config.suite_names if suite.folder is not None)]
    _check_tasks(config, list(chain.from_iterable(sources)))
    sources = [[each for each in own if _takes(config, each.document_key)] for own in sources]
    needles: list[Sample] = []
    if config.has_needles:
        haystacks = _haystacks(config, documents, list(chain.from_iterable(sources)))
        needles = _needles(config, haystacks, prompts)
    asked = [first_in_turn(_asked(config, own), config.limit) for own in sources]
    samples = take([*chain.from_iterable(asked), *needles], config.limit_per_task, config.seed)
    _refuse_twins(samples)
    rows: list[CheckRow] = []
    for number, sample in enumerate(samples):
        row = _encode(config, number, sample, prompts)
        failed.append(row) if isinstance(row, str) else rows.append(row)
    count = len(rows) + len(failed)
    if not count:
        raise InputError(f"{', '.join(map(hidden, config.input))} has no rows")
    if len(failed) > len(rows):
        raise InputError(f"{len(failed):,} of {count:,} rows cannot be checked: {failed[0]}")
    return CheckRows(rows=tuple(rows), left_out=tuple(failed), notes=notes)


def _open(config: RowSettings) -> tuple[Source | None, tuple[str, ...]]:
    """The input, if there is one, and what to say of its columns."""
    if not config.input:
        return None, ()
    if config.has_needles and "-" in config.input:
        raise ConfigError("--suite needles reads INPUT twice: save the standard input to a file")
    kept = dict.fromkeys(_kept(config))
    source, settled = open_columns(replace(config, task_column=None), kept, asks=config.asks_rows)
    return source, settled.notes


def _renamed(records: Iterable[Document | RowFailure], *, takes_ids: bool) -> Iterator[Document | RowFailure]:
    """With the row's number behind an id that comes again, where nobody named the column of ids."""
    seen: set[str] = set()
    for record in records:
        row = record.source
        if takes_ids and row.id in seen:
            record = replace(record, source=replace(row, id=f"{row.id}#{row.row}"))
        seen.add(record.source.id)
        yield record


def _records(config: RowSettings, source: Source) -> Iterator[Document | RowFailure]:
    """The rows of the input that are asked for, a record for each question."""
    return chain.from_iterable(map(each_question, select_rows(source, config, source.total_rows)))


def _takes(config: RowSettings, key: str) -> bool:
    """Whether the document with this key is in the shard of documents."""
    if config.document_shard is None:
        return True
    part, parts = parse_shard(config.document_shard, "--document-shard")
    return part_of(key, parts) == part - 1


def _kept(config: RowSettings) -> list[str]:
    """The columns that are read beside text, question and id."""
    names = (config.reference_column, config.task_column)
    return list(dict.fromkeys(name for name in names if name is not None))


def _sample(config: RowSettings, record: Document | RowFailure) -> Sample | str:
    """A row of the data, or why it is left out."""
    if isinstance(record, RowFailure):
        return record.message
    references: tuple[str, ...] = ()
    if config.reference_column is not None:
        references = _references(_cell(config, record.source, config.reference_column))
        if not references:
            return f"{record.source.place}: no reference in column {config.reference_column!r}"
    task = Path(bare(config.input[0])).name.partition(".")[0] if len(config.input) == 1 else ""
    if config.task_column is not None:
        task = str(_cell(config, record.source, config.task_column) or "")
        if not task:
            return f"{record.source.place}: no task in column {config.task_column!r}"
    return Sample(
        id=record.source.id,
        task=task or "data",
        text=record.text,
        question=record.question or "",
        references=references,
        metric=METRIC,
        document_key=document_key(record.text),
        facets={"place": record.source.place},
    )


def _cell(config: RowSettings, source: Row, column: str) -> Any:
    assert source.passthrough is not None
    # by place: a column that has the name of one of batch's output is renamed
    return source.passthrough.column(_kept(config).index(column))[0].as_py()


def _references(value: Any) -> tuple[str, ...]:
    """One right answer, or several of a list, which JSON lines bring as JSON."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            parsed = json.loads(value)
        except ValueError:
            parsed = None
        value = parsed if isinstance(parsed, list) else value
    given = value if isinstance(value, list) else [value]
    texts = [str(one).strip() for one in given if isinstance(one, str | int | float)]
    return tuple(dict.fromkeys(text for text in texts if text))


def _check_tasks(config: RowSettings, samples: Sequence[Sample]) -> None:
    """Raises ConfigError if a task that is asked for is none's."""
    known = dict.fromkeys(sample.task for sample in samples)
    unknown = next((task for task in config.tasks if task not in known), None)
    if unknown is not None:
        raise ConfigError(
            f"--tasks names {unknown!r}{did_you_mean(unknown, known)}; there are {', '.join(known) or 'none'}"
        )


def _asked(config: RowSettings, samples: Sequence[Sample]) -> list[Sample]:
    return [sample for sample in samples if not config.tasks or sample.task in config.tasks]


def _haystacks(config: RowSettings, documents: Source | None, samples: Sequence[Sample]) -> list[str]:
    """Documents to hide needles in: those of the input, or without one the suites', each once."""
    if documents is not None:
        rows = (row for row in _records(config, documents) if isinstance(row, Document))
        found: Iterable[str] = (row.text for row in rows if _takes(config, document_key(row.text)))
    else:
        found = {sample.document_key: sample.text for sample in samples}.values()
    texts, left = [], HAYSTACK_CHARACTERS
    for text in found:
        if left <= 0:
            break
        texts.append(text[:left])
        left -= len(text)
    if not texts:
        raise InputError("there is no document to hide needles in")
    return texts


def _needles(config: RowSettings, texts: Sequence[str], prompts: PromptBuilder) -> list[Sample]:
    longest = prompts.limit
    lengths = config.needle_lengths
    if lengths is None:
        lengths = tuple(length for length in NEEDLE_LENGTHS if length <= longest) or (longest,)
    elif max(lengths) > longest:
        raise ConfigError(
            f"--needle-lengths: {max(lengths):,} tokens exceed {longest:,}, the context of "
            f"{prompts.context:,} less --max-new-tokens {prompts.max_new_tokens:,}"
        )
    return make_needles(
        texts,
        kinds=config.needle_kinds,
        lengths=lengths,
        count=config.needle_count,
        seed=config.seed,
        count_tokens=token_counter(prompts.tokenizer),
    )


def _refuse_twins(samples: Sequence[Sample]) -> None:
    seen: dict[str, Sample] = {}
    for sample in samples:
        other = seen.setdefault(sample.id, sample)
        if other is not sample:
            raise InputError(f"two rows have the id {sample.id!r}: {_place(other)} and {_place(sample)}")


def _place(sample: Sample) -> str:
    return str(sample.facets.get("place", f"{sample.task} {sample.id}"))


def _encode(config: RowSettings, number: int, sample: Sample, prompts: PromptBuilder) -> CheckRow | str:
    source = Row(row=number, id=sample.id, place=_place(sample), question=sample.question or None)
    try:
        document = prompts.encode(Document(source=source, text=sample.text))
    except RowError as error:
        return f"{source.place}: {error}"
    tokens: list[int] = []
    if sample.references:
        # as user text: a reference that says <|im_end|> ends no turn
        encoded = prompts.tokenizer(sample.references[0], add_special_tokens=False, split_special_tokens=True)
        tokens = encoded["input_ids"]
        if not tokens:
            return f"{source.place}: the reference has no tokens"
    return CheckRow(
        sample=sample,
        document=document,
        reference=tuple(tokens[: config.max_new_tokens]),
        reference_cut=max(0, len(tokens) - config.max_new_tokens),
        row_hash=_hash(document, sample),
    )


def _hash(document: EncodedDocument, sample: Sample) -> str:
    digest = hashlib.sha256(document.input_ids.astype(np.int64).tobytes())
    digest.update(json.dumps([sample.task, sample.references, sample.metric, sample.choices]).encode())
    return digest.hexdigest()


def tasks_of(rows: Sequence[CheckRow]) -> Iterator[str]:
    """Each task once, in the order in which they come first."""
    yield from dict.fromkeys(row.sample.task for row in rows)
