"""Questions with known answers over documents: what one is, and dividing and thinning them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from math import isnan
from typing import Any, Literal, TypeVar

from pipeline.errors import ConfigError

# of the documents of a calibration, how many are searched on
MOST_SEARCHED = 48
FEW_SEARCHED = 16  # enough where documents are scarce, as those held out have to show that nothing is lost
SEARCH_SHARE, PLENTY_SHARE = 0.4, 1 / 12  # up to so few, and beyond

Side = Literal["search", "held-out"]  # of a calibration
NEEDLES = "needles-"  # the beginning of the tasks that are gates of their own
T = TypeVar("T")
K = TypeVar("K", bound=Hashable)


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """One question over one document, and how an answer to it is scored."""

    id: str  # unique in its suite
    task: str
    text: str  # the document
    question: str  # ends with a line on the form of the answer, which the references have
    references: tuple[str, ...]  # at least one, none empty; the first is the one to be teacher-forced
    metric: str  # a name in `pipeline.suites.metrics.METRICS`
    choices: tuple[str, ...] = ()  # all that could be answered, for the metrics that ask
    document_key: str  # SHA-256, in hex, of the document
    side: Side | None = None  # from whose documents a needle's haystack is made, where they are divided
    fields: Mapping[str, str] = field(default_factory=dict)  # columns that the prompt template writes
    facets: Mapping[str, str | int | float] = field(
        default_factory=dict
    )  # what results may be grouped by, and the like


def references_of(value: Any) -> tuple[str, ...]:
    """What a cell says is right: one text or number, or several of a list, which JSON lines bring as JSON.

    None of what has no text: nothing, white space, and NaN, which stands for a number that is not there.
    """
    if isinstance(value, str) and value.lstrip().startswith("["):
        with suppress(ValueError):
            value = json.loads(value)
    given = value if isinstance(value, list) else [value]
    known = [
        one for one in given if isinstance(one, str | int) or (isinstance(one, float) and not isnan(one))
    ]
    texts = [str(one).strip() for one in known]
    return tuple(dict.fromkeys(text for text in texts if text))


def is_unicode(text: str) -> bool:
    """Whether a tokenizer can take it: JSON can escape half of a surrogate pair, which is no character."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def document_key(text: str) -> str:
    """SHA-256, in hex, of a document's text."""
    return sha256(text).hex()


def part_of(key: str, parts: int) -> int:
    """In which of so many parts, from 0, a document is: by its key, whatever other documents there are."""
    return int.from_bytes(sha256(f"\0{key}")[:8]) * parts >> 64


def searched_keys(keys: Iterable[str], salt: str) -> set[str]:
    """Of the keys of documents, those to search on, as many as `searched_count` says, by a salted hash.

    All others are held out.
    """
    ordered = sorted({*keys}, key=lambda key: sha256(f"{salt}\0{key}"))
    return set(ordered[: searched_count(len(ordered))])


def searched_count(documents: int) -> int:
    """Of so many documents, or needles of a kind, how many a calibration searches on; at least one."""
    enough = max(FEW_SEARCHED, min(MOST_SEARCHED, int(PLENTY_SHARE * documents)))
    return max(1, min(enough, round(SEARCH_SHARE * documents)))


def take(samples: Sequence[Sample], limit_per_task: int | None, seed: int = 0) -> list[Sample]:
    """At most `limit_per_task` samples of each task, in their order, from as many documents as can be.

    Which ones depends on their ids and `seed` alone; those of a lower limit are among those of a higher one.
    """
    if limit_per_task is None:
        return list(samples)
    if limit_per_task < 1:
        raise ConfigError(f"{limit_per_task} samples a task: must be at least 1")
    hashes = [sha256(f"{seed}\0{sample.id}") for sample in samples]
    chosen: list[int] = []
    for documents in _by_document(samples, sorted(range(len(samples)), key=hashes.__getitem__)).values():
        turns = [(turn, hashes[index], index) for own in documents.values() for turn, index in enumerate(own)]
        chosen += [index for _, _, index in sorted(turns)[:limit_per_task]]
    return [samples[index] for index in sorted(chosen)]


def first_in_turn(samples: Sequence[Sample], limit: int | None) -> list[Sample]:
    """At most `limit` samples, in their order: the first of each task, as evenly as there are any.

    Of a task they are from as many documents as can be: the first about each, then the second, and so on.
    """
    tasks = _by_document(samples, range(len(samples)))
    by_task = {task: in_turn(documents, None) for task, documents in tasks.items()}
    return [samples[index] for index in sorted(in_turn(by_task, limit))]


def _by_document(samples: Sequence[Sample], order: Iterable[int]) -> dict[str, dict[str, list[int]]]:
    """Of each task, the places of the samples about each document, as they come in the order."""
    tasks = grouped(order, lambda index: samples[index].task)
    return {task: grouped(own, lambda index: samples[index].document_key) for task, own in tasks.items()}


def grouped(items: Iterable[T], key: Callable[[T], K]) -> dict[K, list[T]]:
    """Items by their key, in the order in which they come."""
    groups: dict[K, list[T]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return groups


def parted(found: Iterable[T | str]) -> tuple[list[T], list[str]]:
    """What can be used, and in place of all else the texts that say why it cannot."""
    usable: list[T] = []
    reasons: list[str] = []
    for each in found:
        reasons.append(each) if isinstance(each, str) else usable.append(each)
    return usable, reasons


def in_turn(groups: Mapping[str, Sequence[T]], count: int | None) -> list[T]:
    """The first of each group, then the second of each that has one, and so on up to so many."""
    longest = max(map(len, groups.values()), default=0)
    return [own[turn] for turn in range(longest) for own in groups.values() if turn < len(own)][:count]


def sha256(text: str) -> bytes:
    """The digest of a text, by which rows and documents are put in an order that says nothing of them."""
    return hashlib.sha256(text.encode(errors="surrogatepass")).digest()
