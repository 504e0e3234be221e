"""Needles: made-up facts hidden in the user's own documents, and questions that only they answer.

The kinds are those of RULER (Hsieh et al. 2024, arXiv:2404.06654), in other words and other haystacks, and
scored by recall as there. The haystack of `common-words` is no document but a list of words.
"""

from __future__ import annotations

import itertools
import math
import random
import string
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from pipeline.errors import ConfigError
from pipeline.settings.row_settings import NEEDLE_KINDS, check_needle_kind
from pipeline.suites.haystack import Pool, TokenCounter
from pipeline.suites.picks import recall
from pipeline.suites.samples import Sample, Side, document_key

FRAME_TOKENS = 300  # kept free of the length: chat template, question and answer
DISTRACTORS = 40  # other keys of `multi-key`
VALUES = 4  # of the one key of `multi-value`
QUERIES = 4  # keys that `multi-query` asks for
HOPS = 4  # of each chain of `tracking`
CHAINS = 3  # one of which is asked for
COMMON = 5  # words asked for by `common-words`
FREQUENCY = 10  # of a common word in a long list, over that of any other

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
_WORDS = (*_FIRST, *_SECOND)  # of the lists of `common-words`
_KEYS = tuple(f"{first}-{second}" for first in _FIRST for second in _SECOND)


@dataclass(frozen=True, slots=True)
class _Puzzle:
    """Sentences to hide, in the order in which they stand in the document, and what is asked about them."""

    asked: tuple[str, ...]
    others: tuple[tuple[str, ...], ...]  # each a series that keeps its order
    question: str
    answer: tuple[str, ...]  # items, in the order that the question asks for


@dataclass(frozen=True, slots=True)
class _Made:
    """A haystack with needles in it."""

    text: str
    tokens: int
    question: str
    answer: tuple[str, ...]
    depth: float | None = None  # from 0 to 1, of one needle asked for


def make_needles(
    texts: Sequence[str],
    *,
    kinds: Sequence[str] | None = None,
    lengths: Sequence[int],
    count: int,
    seed: int,
    count_tokens: TokenCounter,
    side: Side | None = None,
) -> list[Sample]:
    """`count` samples of each kind, `lengths` in turn; the task is `needles-KIND`.

    `kinds` are all that there are unless given. `lengths` are tokens of a whole prompt: haystack and needles
    have at most `FRAME_TOKENS` less, as counted by `count_tokens`, sentence by sentence. `side` says whose
    documents `texts` are, where a calibration divides them; its samples have other ids and are other draws
    than those of the other side.

    Given `texts`, samples are independent of each other. Each draws its own haystack, needles and depth by
    a generator seeded with `seed`, its side, kind and number, so that the same arguments give the same
    samples. Of long texts only as many are used as a good variety needs.

    A sample has the facets `kind`, `length`, `tokens` of the document, and `depth` except for
    `common-words`. The depth, uniform from 0 to 1, is that of one needle asked for. Of several that stand in
    a certain order that is the first at depth 0 and the last at depth 1, and the others lie at random on its
    two sides.

    Raises `ConfigError` for an unknown kind and for a length without room for the needles, and `InputError`
    for texts with nothing in them.
    """
    kinds = NEEDLE_KINDS if kinds is None else kinds
    _check(kinds, lengths, count)
    drawn = f"{seed}" if side is None else f"{seed}/{side}"
    pool = Pool.of(texts, _POOL_CHARACTERS * max(lengths), count_tokens, random.Random(f"{drawn}/pool"))
    samples = []
    for kind in dict.fromkeys(kinds):
        for number in range(count):
            length = lengths[number % len(lengths)]
            made = _KINDS[kind](pool, length, random.Random(f"{drawn}/{kind}/{number}"))
            samples.append(_sample(made, kind, length, number, side))
    return samples


def _sample(made: _Made, kind: str, length: int, number: int, side: Side | None) -> Sample:
    facets: dict[str, str | int | float] = {"kind": kind, "length": length, "tokens": made.tokens}
    if made.depth is not None:
        facets["depth"] = round(made.depth, 4)
    return Sample(
        id="/".join([f"needles-{kind}", *([] if side is None else [side]), f"{length}", f"{number + 1}"]),
        task=f"needles-{kind}",
        text=made.text,
        question=made.question,
        references=(", ".join(made.answer),),
        metric=recall.__name__,
        document_key=document_key(made.text),
        side=side,
        facets=facets,
    )


def _check(kinds: Sequence[str], lengths: Sequence[int], count: int) -> None:
    for kind in kinds:
        check_needle_kind(kind)
    if not kinds or not lengths:
        raise ConfigError("needles need at least one kind and one length")
    if min(lengths) <= FRAME_TOKENS:
        raise ConfigError(f"needles of {min(lengths):,} tokens: must be more than {FRAME_TOKENS}")
    if count < 1:
        raise ConfigError(f"{count} needles of a kind: must be at least 1")


def _hidden(
    puzzle_of: Callable[[random.Random, frozenset[str]], _Puzzle], pool: Pool, length: int, rng: random.Random
) -> _Made:
    """A puzzle's sentences at random depths of a random haystack."""
    puzzle = puzzle_of(rng, pool.words)
    series = (puzzle.asked, *puzzle.others)
    needles = [f" {needle}" for each in series for needle in each]
    needle_tokens = sum(pool.count_tokens(needles))
    hay = pool.draw(length - FRAME_TOKENS - needle_tokens, rng)
    if len(hay) < 2:
        least = FRAME_TOKENS + needle_tokens + 2 * max(pool.tokens)
        raise ConfigError(
            f"needles of {length:,} tokens: no room for {len(needles)} needles, a question and two sentences;"
            f" take lengths of {least:,} or more"
        )
    depth = rng.random()
    depths = [_depths(len(puzzle.asked), depth, rng)]
    depths += [sorted(rng.random() for _ in each) for each in puzzle.others]
    tokens = [pool.tokens[index] for index in hay]
    pieces = _mixed(
        [pool.sentences[index] for index in hay], tokens, needles, list(itertools.chain.from_iterable(depths))
    )
    return _Made(
        text="".join(pieces).strip(),
        tokens=sum(tokens) + needle_tokens,
        question=puzzle.question,
        answer=puzzle.answer,
        depth=depth,
    )


def _mixed(
    sentences: Sequence[str], tokens: Sequence[int], needles: Sequence[str], depths: Sequence[float]
) -> list[str]:
    """Sentences of so many tokens each, with each needle where the sentences before it have its depth."""
    ends = list(itertools.accumulate(tokens))
    before: dict[int, list[str]] = {}  # needles by the sentence they stand before
    for needle, depth in zip(needles, depths, strict=True):
        before.setdefault(_boundary(ends, depth), []).append(needle)
    pieces = []
    for place, sentence in enumerate(sentences):
        pieces += [*before.get(place, []), sentence]
    return pieces + before.get(len(sentences), [])


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


def _codes(asked: int, distractors: int, rng: random.Random, words: frozenset[str]) -> _Puzzle:
    """The codes of so many keys, in sentences of their own among those of other keys."""
    count = asked + distractors
    keys, values = _keys(rng, words, count), _numbers(rng, words, count, digits=7)
    told = [(f"The access code of {key} is {value}.",) for key, value in zip(keys, values, strict=True)]
    *first, last = keys[:asked]
    question = f"What is the access code of {last}? Answer with the number only."
    if first:
        question = (
            f"What are the access codes of {', '.join(first)} and {last}? Answer with the {asked} numbers"
            " only, in this order, separated by commas."
        )
    return _Puzzle(asked=told[0], others=tuple(told[1:]), question=question, answer=tuple(values[:asked]))


def _multi_value(rng: random.Random, words: frozenset[str]) -> _Puzzle:
    (key,), values = _keys(rng, words, 1), _numbers(rng, words, VALUES, digits=7)
    return _Puzzle(
        asked=tuple(f"One of the access codes of {key} is {value}." for value in values),
        others=(),
        question=f"The document gives {VALUES} access codes of {key}. What are they? Answer with the {VALUES}"
        " numbers only, in the order in which they stand in the document, separated by commas.",
        answer=tuple(values),
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
        answer=tuple(chains[0]),
    )


def _chain(names: Sequence[str], value: str) -> tuple[str, ...]:
    copies = (f"Variable {name} = variable {copied}." for copied, name in itertools.pairwise(names))
    return f"Variable {names[0]} = {value}.", *copies


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


def _common_words(pool: Pool, length: int, rng: random.Random) -> _Made:
    """A shuffled list of words, of which some stand there `FREQUENCY` times as often as the others.

    All common words stand there equally often, at least twice. In a list too short for all others, those
    that are there stand there once.
    """
    tokens = dict(zip(_WORDS, pool.count_tokens([f" {word}" for word in _WORDS]), strict=True))
    # of every common word once, and of as many others as that makes
    entries_a_time = COMMON + (len(_WORDS) - COMMON) / FREQUENCY
    tokens_a_time = entries_a_time * sum(tokens.values()) / len(tokens)
    room = length - FRAME_TOKENS
    times = int(room / tokens_a_time)
    if times < 2:
        raise ConfigError(
            f"needles of {length:,} tokens: no room for a list with common words and a question;"
            f" take lengths of {FRAME_TOKENS + math.ceil(2 * tokens_a_time):,} or more"
        )
    words = rng.sample(_WORDS, len(_WORDS))
    common, others = words[:COMMON], itertools.cycle(words[COMMON:])
    entries = times * common
    left = room - sum(tokens[word] for word in entries)
    while (left := left - tokens[word := next(others)]) >= 0:
        entries.append(word)
    rng.shuffle(entries)
    return _Made(
        text=" ".join(entries),
        tokens=sum(tokens[word] for word in entries),
        question=f"The document is a list of words. Which {COMMON} words stand in it most often? Answer with"
        " these words only, in alphabetical order, separated by commas.",
        answer=tuple(sorted(common)),
    )


# of all of `NEEDLE_KINDS`
_KINDS: dict[str, Callable[[Pool, int, random.Random], _Made]] = {
    "single": partial(_hidden, partial(_codes, 1, 0)),
    "multi-key": partial(_hidden, partial(_codes, 1, DISTRACTORS)),
    "multi-value": partial(_hidden, _multi_value),
    "multi-query": partial(_hidden, partial(_codes, QUERIES, 0)),
    "tracking": partial(_hidden, _tracking),
    "common-words": _common_words,
}
