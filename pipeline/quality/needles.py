"""Needles: made-up facts hidden in the user's own documents, and questions that only they answer.

The kinds are those of RULER (Hsieh et al. 2024, arXiv:2404.06654), in other words and other haystacks.
"""

from __future__ import annotations

import itertools
import random
import string
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from pipeline.errors import ConfigError
from pipeline.quality.haystack import Pool, TokenCounter
from pipeline.quality.samples import Sample, document_key
from pipeline.settings.suite import NEEDLE_KINDS, check_needle_kind

FRAME_TOKENS = 300  # kept free of the length: chat template, question and answer
DISTRACTORS = 40  # other keys of `multi-key`
VALUES = 4  # of the one key of `multi-value`
HOPS = 4  # of each chain of `tracking`
CHAINS = 3  # one of which is asked for

_POOL_CHARACTERS = 256  # of documents that are read, for each token of the longest haystack
_FIRST = (
    "amber", "brass", "cobalt", "copper", "coral", "crimson", "ebony", "emerald", "golden", "granite",
    "indigo", "ivory", "jade", "marble", "onyx", "opal", "pearl", "ruby", "scarlet", "silver", "topaz",
    "violet",
)  # fmt: skip
_SECOND = (
    "badger", "beetle", "bison", "condor", "crane", "dolphin", "falcon", "ferret", "gecko", "heron", "jackal",
    "lynx", "magpie", "marten", "osprey", "otter", "panther", "raven", "salmon", "sparrow", "stork", "walrus",
)  # fmt: skip
_KEYS = tuple(f"{first}-{second}" for first in _FIRST for second in _SECOND)


@dataclass(frozen=True, slots=True)
class _Puzzle:
    """Sentences to hide, in the order in which they stand in the document, and what is asked about them."""

    asked: tuple[str, ...]
    others: tuple[tuple[str, ...], ...]  # each a series that keeps its order
    question: str
    reference: str
    metric: str
    choices: tuple[str, ...] = ()


def make_needles(
    texts: Sequence[str],
    *,
    kinds: Sequence[str] | None = None,
    lengths: Sequence[int],
    count: int,
    seed: int,
    count_tokens: TokenCounter,
) -> list[Sample]:
    """`count` samples of each kind, spread evenly over `lengths` and depths; the task is `needles-KIND`.

    `kinds` are all that there are unless given. `lengths` are tokens of a whole prompt: haystack and needles
    have at most `FRAME_TOKENS` less, as counted by `count_tokens`, sentence by sentence. Each haystack begins
    at another sentence of `texts`; behind their last sentence comes the first. Of long texts only as many are
    used as a good variety needs.

    A sample has the facets `kind`, `length`, `depth`, and `tokens` of the document. The depth, from 0 to 1,
    is that of one needle asked for. Of several that is the first at depth 0 and the last at depth 1, and the
    others lie at random on its two sides. The same arguments give the same samples.

    Raises `ConfigError` for an unknown kind and for a length without room for the needles, and `InputError`
    for texts with nothing in them.
    """
    kinds = NEEDLE_KINDS if kinds is None else kinds
    _check(kinds, lengths, count)
    pool = Pool.of(texts, _POOL_CHARACTERS * max(lengths), count_tokens, random.Random(f"{seed}/pool"))
    samples = []
    for kind in dict.fromkeys(kinds):
        starts = _starts(pool, random.Random(f"{seed}/{kind}"))
        for number, (length, depth) in enumerate(_spread(lengths, count)):
            rng = random.Random(f"{seed}/{kind}/{number}")
            puzzle = _KINDS[kind](rng, pool.words)
            text, tokens = _hide(puzzle, pool, next(starts), length, depth, rng, count_tokens)
            samples.append(
                Sample(
                    id=f"needles-{kind}/{length}/{number + 1}",
                    task=f"needles-{kind}",
                    text=text,
                    question=puzzle.question,
                    references=(puzzle.reference,),
                    metric=puzzle.metric,
                    choices=puzzle.choices,
                    document_key=document_key(text),
                    facets={"kind": kind, "length": length, "depth": round(depth, 4), "tokens": tokens},
                )
            )
    return samples


def _check(kinds: Sequence[str], lengths: Sequence[int], count: int) -> None:
    for kind in kinds:
        check_needle_kind(kind)
    if not kinds or not lengths:
        raise ConfigError("needles need at least one kind and one length")
    if min(lengths) <= FRAME_TOKENS:
        raise ConfigError(f"needles of {min(lengths):,} tokens: must be more than {FRAME_TOKENS}")
    if count < 1:
        raise ConfigError(f"{count} needles of a kind: must be at least 1")


def _spread(lengths: Sequence[int], count: int) -> Iterator[tuple[int, float]]:
    """Lengths in turn, and for each of them depths from 0 to 1; 0.5 for one alone."""
    for number in range(count):
        turn, place = divmod(number, len(lengths))
        of_length = (count - place + len(lengths) - 1) // len(lengths)
        yield lengths[place], turn / (of_length - 1) if of_length > 1 else 0.5


def _starts(pool: Pool, rng: random.Random) -> Iterator[int]:
    """Each sentence once in random order, then again."""
    return itertools.cycle(rng.sample(range(len(pool.sentences)), len(pool.sentences)))


def _hide(
    puzzle: _Puzzle,
    pool: Pool,
    start: int,
    length: int,
    depth: float,
    rng: random.Random,
    count_tokens: TokenCounter,
) -> tuple[str, int]:
    """The haystack with its needles, and its tokens."""
    needles = [needle for series in (puzzle.asked, *puzzle.others) for needle in series]
    needle_tokens = sum(count_tokens([f" {needle}" for needle in needles]))
    room = length - FRAME_TOKENS - needle_tokens
    hay = pool.cut(start, room)
    if len(hay) < 2:
        around = pool.tokens[start] + pool.tokens[(start + 1) % len(pool.tokens)]
        raise ConfigError(
            f"needles of {length:,} tokens: no room for {len(needles)} needles, a question and two sentences;"
            f" take lengths of {FRAME_TOKENS + needle_tokens + around:,} or more"
        )
    ends = list(itertools.accumulate(pool.tokens[index] for index in hay))
    depths = [_depths(len(puzzle.asked), depth, rng)]
    depths += [sorted(rng.random() for _ in series) for series in puzzle.others]
    before: dict[int, list[str]] = {}  # needles by the sentence they stand before
    placed = zip((puzzle.asked, *puzzle.others), depths, strict=True)
    for series, series_depths in placed:
        for needle, own in zip(series, series_depths, strict=True):
            before.setdefault(_boundary(ends, own), []).append(f" {needle}")
    pieces = []
    for place, index in enumerate(hay):
        pieces += before.get(place, [])
        pieces.append(pool.sentences[index])
    pieces += before.get(len(hay), [])
    return "".join(pieces).strip(), ends[-1] + needle_tokens


def _depths(count: int, depth: float, rng: random.Random) -> list[float]:
    """One needle at `depth`, which in the series stands as deep as that, and the others on its two sides."""
    pivot = round(depth * (count - 1))
    shallower = [rng.random() * depth for _ in range(pivot)]
    deeper = [depth + rng.random() * (1 - depth) for _ in range(count - pivot - 1)]
    return [*sorted(shallower), depth, *sorted(deeper)]


def _boundary(ends: Sequence[int], depth: float) -> int:
    """The number of sentences, from none to all, whose tokens come nearest to `depth` of all tokens."""
    wanted = depth * ends[-1]
    place = bisect_left(ends, wanted)
    start = ends[place - 1] if place else 0
    return place if wanted - start < ends[place] - wanted else place + 1


def _single(rng: random.Random, words: frozenset[str]) -> _Puzzle:
    (key,), (value,) = _keys(rng, words, 1), _numbers(rng, words, 1, digits=7)
    return _code_puzzle(key, value, others=())


def _multi_key(rng: random.Random, words: frozenset[str]) -> _Puzzle:
    keys = _keys(rng, words, 1 + DISTRACTORS)
    values = _numbers(rng, words, len(keys), digits=7)
    others = tuple((_code(key, value),) for key, value in zip(keys[1:], values[1:], strict=True))
    return _code_puzzle(keys[0], values[0], others)


def _multi_value(rng: random.Random, words: frozenset[str]) -> _Puzzle:
    (key,), values = _keys(rng, words, 1), _numbers(rng, words, VALUES, digits=7)
    return _Puzzle(
        asked=tuple(f"One of the access codes of {key} is {value}." for value in values),
        others=(),
        question=f"The document gives {VALUES} access codes of {key}. What are they? Answer with the {VALUES}"
        " numbers only, in the order in which they stand in the document, separated by commas.",
        reference=", ".join(values),
        metric="list_match",
    )


def _tracking(rng: random.Random, words: frozenset[str]) -> _Puzzle:
    names = _names(rng, words, CHAINS * (HOPS + 1))
    values = _numbers(rng, words, CHAINS, digits=5)
    chains = [names[start : start + HOPS + 1] for start in range(0, len(names), HOPS + 1)]
    asked, *others = (_chain(chain, value) for chain, value in zip(chains, values, strict=True))
    return _Puzzle(
        asked=asked,
        others=tuple(others),
        question=f"Which {HOPS + 1} variables have the value {values[0]}, assigned to them or copied from"
        " another variable? Answer with their names only, in the order in which they stand in the document,"
        " separated by commas.",
        reference=", ".join(chains[0]),
        metric="list_match",
        choices=tuple(names),
    )


def _chain(names: Sequence[str], value: str) -> tuple[str, ...]:
    copies = (f"Variable {name} = variable {copied}." for copied, name in itertools.pairwise(names))
    return f"Variable {names[0]} = {value}.", *copies


def _code_puzzle(key: str, value: str, others: tuple[tuple[str, ...], ...]) -> _Puzzle:
    return _Puzzle(
        asked=(_code(key, value),),
        others=others,
        question=f"What is the access code of {key}? Answer with the number only.",
        reference=value,
        metric="contains",
    )


def _code(key: str, value: str) -> str:
    return f"The access code of {key} is {value}."


def _keys(rng: random.Random, words: frozenset[str], count: int) -> list[str]:
    return rng.sample([key for key in _KEYS if key not in words], count)


def _numbers(rng: random.Random, words: frozenset[str], count: int, *, digits: int) -> list[str]:
    return _unused(lambda: str(rng.randrange(10 ** (digits - 1), 10**digits)), words, count)


def _names(rng: random.Random, words: frozenset[str], count: int) -> list[str]:
    return _unused(lambda: "".join(rng.sample(string.ascii_uppercase, 4)), words, count)


def _unused(draw: Callable[[], str], words: frozenset[str], count: int) -> list[str]:
    """Different ones that do not stand in the documents."""
    found: dict[str, None] = {}
    while len(found) < count:
        if (drawn := draw()).lower() not in words:
            found[drawn] = None
    return list(found)


# of all of `NEEDLE_KINDS`
_KINDS: dict[str, Callable[[random.Random, frozenset[str]], _Puzzle]] = {
    "single": _single,
    "multi-key": _multi_key,
    "multi-value": _multi_value,
    "tracking": _tracking,
}
