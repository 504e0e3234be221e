"""What a check asks: rows of the user's data and samples of suites, as prompts with their right answers."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING

import numpy as np

from pipeline.errors import ConfigError, GateInconclusive, InputError, did_you_mean
from pipeline.evaluate.input_rows import in_document_shard, input_samples, open_documents, read_documents
from pipeline.evaluate.same_documents import counted_as, same_documents, told_same
from pipeline.inputs.source import Source
from pipeline.records import Document, EncodedDocument, Row, RowError
from pipeline.settings.option import settings_of
from pipeline.settings.row_settings import NEEDLE_KINDS, RowSettings
from pipeline.suites.by_name import load_suite
from pipeline.suites.haystack import token_counter
from pipeline.suites.metrics import parts_of
from pipeline.suites.needles import make_needles
from pipeline.suites.samples import (
    NEEDLES,
    Sample,
    Side,
    document_key,
    first_in_turn,
    is_unicode,
    parted,
    searched_count,
    searched_keys,
    take,
)
from pipeline.texts.redaction import hidden

if TYPE_CHECKING:
    from pipeline.prompts.builder import PromptBuilder

NEEDLE_LENGTHS = (8192, 16384, 30720)  # those that the context holds
HAYSTACK_CHARACTERS = 64 << 20  # of the user's documents, enough variety for any needles


@dataclass(frozen=True, kw_only=True)
class CheckRow:
    """A sample, its prompt, and its right answer in tokens.

    Without a right answer there are no tokens; `make_cases` takes dense's own instead.
    """

    sample: Sample
    document: EncodedDocument
    reference: tuple[int, ...]
    reference_cut: int  # tokens of the reference beyond --max-new-tokens
    parts: tuple[tuple[int, int], ...] = ()  # ranges of its tokens that are found or not one by one
    row_hash: str  # of the prompt's tokens and the right answers

    @property
    def task(self) -> str:
        return self.sample.task


@dataclass(frozen=True, kw_only=True)
class CheckRows:
    """All rows of a check, and why others were left out."""

    rows: tuple[CheckRow, ...]
    left_out: tuple[str, ...]
    notes: tuple[str, ...] = ()  # of what was decided by the columns of the input

    @property
    def told(self) -> tuple[str, ...]:
        """All that a command says of them, a note each."""
        return *self.notes, *(f"left out: {message}" for message in self.left_out)

    @property
    def data_hash(self) -> str:
        """SHA-256, in hex, of all rows."""
        return hashlib.sha256("\n".join(row.row_hash for row in self.rows).encode()).hexdigest()


def read_rows(config: RowSettings, prompts: PromptBuilder) -> CheckRows:
    """Read and tokenize everything, the needles last.

    Raises InputError if more than half of the input or of a suite has to be left out, or all rows of a task
    that is a gate of its own; StorageError if a file of the input is out of reach, or was changed meanwhile.
    """
    documents, notes = open_documents(config)
    named: dict[str, None] = {}  # the tasks of the input, of which a row may have no reference
    of_input, unread = input_samples(config, documents, named)
    suites = [load_suite(suite) for suite in config.suite_names if suite.folder is not None]
    of_suites = [
        [each for each in own.samples if in_document_shard(config, each.document_key)] for own in suites
    ]
    sources = [of_input, *of_suites]
    named |= dict.fromkeys(sample.task for sample in chain.from_iterable(of_suites))
    _check_tasks(config, named)
    wanted = [[each for each in own if not config.tasks or each.task in config.tasks] for own in sources]
    asked = [first_in_turn(own, config.limit) for own in wanted]
    samples = take(list(chain.from_iterable(asked)), config.limit_per_task, config.seed)
    rows, unfit = parted(_encode(config, *numbered, prompts) for numbered in enumerate(samples))
    failed = unread + unfit
    _refuse_most(rows, failed)
    same = same_documents((row.sample, row.document) for row in rows)
    if config.has_needles:
        haystacks = _haystacks(config, documents, list(chain.from_iterable(sources)))
        needles = _needles(config, haystacks, same, prompts)
        of_needles = enumerate(needles, start=len(samples))
        hidden_in, unfit = parted(_encode(config, *numbered, prompts) for numbered in of_needles)
        _refuse_most(hidden_in, unfit)
        samples, rows, failed = samples + needles, rows + hidden_in, failed + unfit
    _refuse_twins(samples)
    if not rows:
        of = f"part {config.document_shard} of " if config.document_shard else ""
        raise InputError(f"{of}{', '.join(map(hidden, config.input or config.suite))} has no rows")
    lost = named.keys() - {sample.task for sample in chain.from_iterable(sources)}
    _refuse_lost_tasks(config, {*lost, *(sample.task for sample in samples)}, rows, failed)
    left_out = [message for suite in suites for message in suite.left_out]
    if config.has_references and prompts.is_to_reason:
        remedy = f"; {prompts.without_reasoning} has it answer at once" if prompts.without_reasoning else ""
        told = f"right answers are measured where the model would reason before its own{remedy}"
        notes = (*notes, told)
    counted = tuple(replace(row, sample=counted_as(row.sample, same)) for row in rows)
    return CheckRows(rows=counted, left_out=(*left_out, *failed), notes=(*notes, *told_same(same)))


def _refuse_most(rows: Sequence[CheckRow], failed: Sequence[str]) -> None:
    if len(failed) > len(rows):
        count = len(rows) + len(failed)
        raise InputError(f"{len(failed):,} of {count:,} rows cannot be checked: {failed[0]}")


def _refuse_lost_tasks(
    config: RowSettings, tasks: set[str], rows: Sequence[CheckRow], failed: Sequence[str]
) -> None:
    """InputError where one of the tasks is to be a gate, or was asked for, and none of its rows is left."""
    for task in sorted(tasks - {row.task for row in rows}):
        if config.tasks_are_gates or task.startswith(NEEDLES) or task in config.tasks:
            first = f"the first of {len(failed):,} left out: {failed[0]}"
            raise InputError(f"no row of the task {task!r} can be checked; {first}")


def _check_tasks(config: RowSettings, known: Collection[str]) -> None:
    """Raises ConfigError if a task that is asked for is none of these."""
    unknown = next((task for task in config.tasks if task not in known), None)
    if unknown is None:
        return
    if unknown in {f"{NEEDLES}{kind}" for kind in NEEDLE_KINDS}:
        raise ConfigError(f"--tasks names {unknown!r}; kinds of needles are chosen by --needle-kinds")
    bounds = {"document_shard"} | ({"shard", "sample", "limit"} if config.asks_rows else set())
    narrowing = [each for each in settings_of(type(config)) if each.name in bounds]
    given = [
        f"{each.flag} {value}" for each in narrowing if (value := getattr(config, each.name)) != each.default
    ]
    where = f"with {', '.join(given)} there are" if given else "there are"
    raise ConfigError(
        f"--tasks names {unknown!r}{did_you_mean(unknown, known)}; {where} {', '.join(known) or 'none'}"
    )


def _haystacks(config: RowSettings, documents: Source | None, samples: Sequence[Sample]) -> dict[str, str]:
    """Documents to hide needles in by their keys: those of the input, or without one the suites'."""
    if documents is not None:
        records = (row.text for row in read_documents(config, documents) if isinstance(row, Document))
        found: Iterable[tuple[str, str]] = ((document_key(text), text) for text in records)
    else:
        found = ((sample.document_key, sample.text) for sample in samples)
    texts: dict[str, str] = {}
    left = HAYSTACK_CHARACTERS
    for key, text in found:
        if left <= 0:
            break
        if key not in texts and in_document_shard(config, key):
            texts[key] = text[:left]
            left -= len(text)
    if not texts:
        raise InputError("there is no document to hide needles in")
    return texts


def _needles(
    config: RowSettings, haystacks: Mapping[str, str], same: Mapping[str, str], prompts: PromptBuilder
) -> list[Sample]:
    """Needles in these documents; where there are two sides, of each in those on its side alone.

    `same` is of the documents that rows ask about.
    """
    make = partial(
        make_needles,
        kinds=config.needle_kinds,
        lengths=_needle_lengths(config, prompts),
        seed=config.seed,
        count_tokens=token_counter(prompts.tokenizer),
    )
    if not config.has_sides:
        return make(list(haystacks.values()), count=config.needle_count)
    searched = searched_keys(same.values(), str(config.seed))
    searched |= searched_keys(haystacks.keys() - same.keys(), str(config.seed))
    to_search = searched_count(config.needle_count)
    counts: dict[Side, int] = {"search": to_search, "held-out": config.needle_count - to_search}
    needles: list[Sample] = []
    for side, count in counts.items():
        of_side = side == "search"
        texts = [text for key, text in haystacks.items() if (same.get(key, key) in searched) == of_side]
        if not texts:
            raise GateInconclusive(
                "needles of the two sides are hidden in different documents, and there is none on the side "
                f"{side!r}: give more documents"
            )
        if count:
            needles += make(texts, count=count, side=side)
    return needles


def _needle_lengths(config: RowSettings, prompts: PromptBuilder) -> Sequence[int]:
    longest = prompts.limit
    lengths = config.needle_lengths
    if lengths is None:
        return tuple(length for length in NEEDLE_LENGTHS if length <= longest) or (longest,)
    if max(lengths) > longest:
        raise ConfigError(
            f"--needle-lengths: {max(lengths):,} tokens exceed {longest:,}, the context of "
            f"{prompts.context:,} less --max-new-tokens {prompts.max_new_tokens:,}"
        )
    return lengths


def _refuse_twins(samples: Sequence[Sample]) -> None:
    seen: dict[str, Sample] = {}
    for sample in samples:
        other = seen.setdefault(sample.id, sample)
        if other is not sample:
            raise InputError(f"two rows have the id {sample.id!r}: {_place(other)} and {_place(sample)}")


def _place(sample: Sample) -> str:
    return str(sample.facets.get("place", f"{sample.task} {sample.id}"))


def _encode(config: RowSettings, number: int, sample: Sample, prompts: PromptBuilder) -> CheckRow | str:
    """A sample as the row of this number, or why it is none."""
    source = Row(
        row=number,
        id=sample.id,
        place=_place(sample),
        question=sample.question or None,
        fields=sample.fields,
    )
    try:
        document = prompts.encode(Document(source=source, text=sample.text))
    except RowError as error:
        return f"{source.place}: {error}"
    tokens: list[int] = []
    parts: tuple[tuple[int, int], ...] = ()
    if sample.references:
        if not is_unicode(sample.references[0]):
            return f"{source.place}: the reference has half of a surrogate pair, which is no character"
        # as user text: a reference that says <|im_end|> ends no turn
        encoded = prompts.tokenizer(
            sample.references[0],
            add_special_tokens=False,
            split_special_tokens=True,
            return_offsets_mapping=True,
        )
        tokens = encoded["input_ids"]
        if not tokens:
            return f"{source.place}: the reference has no tokens"
        parts = _parts(sample, encoded["offset_mapping"][: config.max_new_tokens])
    return CheckRow(
        sample=sample,
        document=document,
        reference=tuple(tokens[: config.max_new_tokens]),
        reference_cut=max(0, len(tokens) - config.max_new_tokens),
        parts=parts,
        row_hash=_hash(document, sample),
    )


def _parts(sample: Sample, offsets: Sequence[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """Ranges of the tokens, at these offsets, in which the items of a reference stand; none of one item."""
    reference = sample.references[0]
    items = parts_of(sample.metric, reference)
    parts: list[tuple[int, int]] = []
    end = 0
    for item in items if len(items) > 1 else ():
        start = reference.index(item, end)
        end = start + len(item)
        inside = [n for n, (first, last) in enumerate(offsets) if first < end and last > start]
        if inside:
            parts.append((inside[0], inside[-1] + 1))
    return tuple(parts)


def _hash(document: EncodedDocument, sample: Sample) -> str:
    digest = hashlib.sha256(document.input_ids.astype(np.int64).tobytes())
    digest.update(json.dumps([sample.task, sample.references, sample.metric, sample.choices]).encode())
    return digest.hexdigest()
