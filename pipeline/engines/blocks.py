"""Which rows go to which of several workers, and when. No tensors here, and nothing of Ray.

A block is a window's rows, or some of them. Rows about one document stay together, so that a worker finds the
groups that one process would. Blocks are large while there is much to do, and small towards the end, where
whoever is done first takes the next one: no worker is left alone with a large part of the rest.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

from pipeline.engines.grouping import same_documents
from pipeline.engines.packing import WINDOW_DOCUMENTS
from pipeline.prompts.splitting import SplitDocument
from pipeline.records import Answer, EncodedDocument, Row, RowError
from pipeline.setup.intake import Item, item_prompts, item_tokens

# few, so that what a dead worker leaves is soon done again; more than one, so that batches are full
BATCHES_A_BLOCK = 2

Unit = list[Item]  # rows that stay together
Key = tuple[int, int | None]


def key_of(row: Row | Answer) -> Key:
    """What tells a row of the output from all others."""
    return row.row, row.question_index


@dataclass(kw_only=True, eq=False)
class Window:
    """A window's rows that failed before they reached a model, which wait until all others are answered."""

    failures: list[RowError]
    unfinished: int  # rows with prompts

    def finish(self, rows: int) -> list[RowError]:
        """Count rows as answered; the failures once all are, lest their share look too large before."""
        self.unfinished -= rows
        if self.unfinished:
            return []
        failures, self.failures = self.failures, []
        return failures


@dataclass(kw_only=True, eq=False)
class Opened(Window):
    """A window of which blocks are made."""

    units: deque[Unit]  # longest first

    @classmethod
    def of(cls, items: Sequence[Item], *, together: bool) -> Opened:
        """With `together`, rows about the same document are one unit."""
        failures = [item for item in items if isinstance(item, RowError)]
        others: list[Item] = [item for item in items if not isinstance(item, RowError)]
        units = units_of(others) if together else [[item] for item in others]
        units.sort(key=unit_tokens, reverse=True)
        return cls(units=deque(units), failures=failures, unfinished=len(others))


@dataclass(kw_only=True, eq=False)
class Block:
    """Rows of one window that a worker is given at once."""

    window: Opened
    units: list[Unit]
    apart: bool = False  # each unit alone, in this order: one of them may have killed a worker
    open: dict[Key, Row] = field(init=False)  # rows without an answer

    def __post_init__(self) -> None:
        self.open = {key_of(item.source): item.source for unit in self.units for item in unit}

    def sent(self) -> list[Unit]:
        """The units as they are sent: what is copied to the output stays here."""
        return [[without_passthrough(item) for item in unit] for unit in self.units]

    def take(self, answers: Iterable[Answer]) -> list[Answer]:
        """The answers, each with what is copied from its row; those of rows that have one are left out."""
        taken = []
        for answer in answers:
            source = self.open.pop(key_of(answer), None)
            if source is not None:
                answer.passthrough = source.passthrough
                taken.append(answer)
        return taken

    def left(self) -> tuple[list[Block], Item | None]:
        """After the death of its worker: blocks of the rows without an answer, and the row that is to blame.

        After the first death it may be any of them: each unit is to run alone, which tells which one was
        running when a second worker died. If that has several rows, these run alone in their turn.
        """
        units = [[item for item in unit if key_of(item.source) in self.open] for unit in self.units]
        units = [unit for unit in units if unit]
        if not units:
            return [], None
        if not self.apart:
            return [self._of(units, apart=True)], None
        running, others = units[0], units[1:]
        rest = [self._of(others)] if others else []
        if len(running) == 1:
            return rest, running[0]
        return [self._of([[item] for item in running], apart=True), *rest], None

    def _of(self, units: list[Unit], *, apart: bool = False) -> Block:
        return Block(window=self.window, units=units, apart=apart)


class Backlog:
    """Rows that wait for a worker."""

    def __init__(self) -> None:
        self._again: deque[Block] = deque()  # of workers that died
        self._windows: deque[Opened] = deque()
        self._tokens = self._rows = 0

    def __bool__(self) -> bool:
        return bool(self._again or self._windows)

    def wants_more(self, workers: int, block_tokens: int) -> bool:
        """Whether to open another window, so that each of the workers finds a whole block."""
        return self._tokens < workers * block_tokens and self._rows < workers * WINDOW_DOCUMENTS

    def add(self, window: Opened) -> None:
        if window.units:
            self._windows.append(window)
            self._tokens += sum(map(unit_tokens, window.units))
            self._rows += window.unfinished

    def put_back(self, blocks: Iterable[Block]) -> None:
        self._again.extend(blocks)

    def take(self, workers: int, block_tokens: int) -> Block:
        """The next block: half of a worker's share of all that wait, and at most `block_tokens`."""
        if self._again:
            return self._again.popleft()
        share = self._tokens / (2 * workers) if workers > 1 else self._tokens
        window, wanted = self._windows[0], min(block_tokens, share)
        units = [window.units.popleft()]
        tokens = unit_tokens(units[0])
        while window.units and tokens + unit_tokens(window.units[0]) <= wanted:
            units.append(window.units.popleft())
            tokens += unit_tokens(units[-1])
        if not window.units:
            self._windows.popleft()
        self._tokens -= tokens
        self._rows -= sum(map(len, units))
        return Block(window=window, units=units)


def units_of(items: Sequence[Item]) -> list[Unit]:
    """Items whose first prompts are about the same document, put together."""
    by_prompt = {id(item_prompts(item)[0]): item for item in items}
    firsts = (item_prompts(item)[0] for item in items)
    return [[by_prompt[id(prompt)] for prompt in same] for same in same_documents(firsts)]


def unit_tokens(unit: Unit) -> int:
    return sum(map(item_tokens, unit))


def with_prompts(item: Item, change: Callable[[EncodedDocument], EncodedDocument]) -> Item:
    """An item with each of its prompts changed."""
    if isinstance(item, SplitDocument):
        parts = tuple(replace(part, encoded=part.encoded and change(part.encoded)) for part in item.parts)
        return replace(item, parts=parts)
    return change(item) if isinstance(item, EncodedDocument) else item


def without_passthrough(item: Item) -> Item:
    """What a worker needs of a row."""
    bare = with_prompts(item, lambda prompt: replace(prompt, source=replace(prompt.source, passthrough=None)))
    return replace(bare, source=replace(bare.source, passthrough=None))


def moved(item: Item, seconds: float) -> Item:
    """With `ready_at` so many seconds later: an age, in place of a time of the clock of one machine."""
    return with_prompts(item, lambda prompt: replace(prompt, ready_at=prompt.ready_at + seconds))
