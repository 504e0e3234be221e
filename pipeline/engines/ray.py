"""The Ray engine: rows are answered by workers on as many GPUs and machines as there are.

Ray makes the workers, places them, makes them again after a death, and moves rows and answers. The rows are
read, known ones left out and the others tokenized in this process, as by the local engine: only one that sees
all rows, in their order, can number them, and tell ids that come twice and rows that are done. From here each
worker is given a block when it has none, and sends back its answers as they come.

Ray Data would read in many places, and of a block that kills its worker it knows two things to do: to give it
up, or to try for ever. Here it runs again, in parts, until the row to blame is known: that is an error row.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError

from pipeline.engines.blocks import BATCHES_A_BLOCK, Backlog, Block, Opened, moved
from pipeline.engines.clock import EngineTimes
from pipeline.engines.ray_cluster import RayCluster, got
from pipeline.engines.ray_worker import Started, Told
from pipeline.errors import KEPT, MarsError
from pipeline.records import Answer, RowError
from pipeline.setup.intake import Item
from pipeline.setup.preparation import Preparation
from pipeline.texts.words import counted

LOOK_UP_S = 0.1  # while workers have nothing to tell
PATIENCE_S = 0.02  # for rows to be read, while workers may have something to tell
MOST_FAILED_STARTS = 3  # of one worker in a row
RAISED_AT_START = "error raised in its creation task"  # in Ray's words


@dataclass(kw_only=True, eq=False)
class _Seat:
    """A worker, and what it is doing: starting, answering a block, or neither."""

    number: int
    actor: Any
    starting: Any = None  # a reference to what `start` returns
    stream: Any = None  # of what it tells about its block
    block: Block | None = None
    node: str = ""
    life: int = 0
    failed_starts: int = 0

    @property
    def awaited(self) -> Any:
        """What is to come of it; None where it is idle."""
        return self.starting if self.stream is None else self.stream


class RayEngine:
    """The engine of several workers; its `note` is told of those that die."""

    patience_s: float | None = PATIENCE_S

    def __init__(self, run: Preparation, cluster: RayCluster, note: Callable[[str], None]) -> None:
        self._run, self._cluster, self._note = run, cluster, note
        self._seats: list[_Seat] = []
        self._backlog = Backlog()
        self._block_tokens = 1
        self._times: dict[tuple[int, int], EngineTimes] = {}  # by worker and which of its lives
        self._said: set[str] = set()

    @property
    def times(self) -> EngineTimes:
        return EngineTimes.together(self._times.values())

    @property
    def workers(self) -> int | None:
        return sum(seat.starting is None for seat in self._seats)

    def answers(self, windows: Iterable[Sequence[Item] | None]) -> Generator[list[Answer], None, None]:
        try:
            yield from self._answers(windows)
        except RayError:
            self._cluster.check(at_once=True)  # which says so where Ray itself is gone
            raise

    def _answers(self, windows: Iterable[Sequence[Item] | None]) -> Iterator[list[Answer]]:
        incoming = iter(windows)
        is_more = True
        while is_more or self._backlog or any(seat.block for seat in self._seats):
            self._cluster.check()
            while is_more and self._backlog.wants_more(len(self._seats) or 1, self._block_tokens):
                try:
                    items = next(incoming)
                except StopIteration:
                    is_more = False
                    break
                if items is None:
                    break
                yield from self._open(items)
            self._hand_out()
            yield from self._collect()
        self._cluster.close()

    def _open(self, items: Sequence[Item]) -> Iterator[list[Answer]]:
        """Take in a window; if no row of it is to be answered, its failures are all of it."""
        window = Opened.of(items, together=self._run.config.group != "off")
        if not window.units:
            yield self._failed(window.finish(0))
            return
        self._backlog.add(window)
        if not self._seats:
            self._start()

    def _start(self) -> None:
        """Start the workers; the first ready one begins."""
        cluster = self._cluster
        actors = cluster.make_workers(self._run)
        self._seats = [_Seat(number=number, actor=actor) for number, actor in enumerate(actors)]
        for seat in self._seats:
            seat.starting = cluster.start(seat.actor)
        wanted, (_, room) = len(actors), cluster.places()
        gpus = cluster.gpus_per_worker * self._run.config.tensor_parallel
        where = "on this machine" if self._run.config.ray_address is None else "in the cluster"
        self._note(f"Ray starts {counted(wanted, 'worker')} {where}, {counted(gpus, 'GPU')} each")
        if wanted > room:
            self._note(f"there is room for {room:,} of {wanted:,} workers: the run begins without the others")

    def _hand_out(self) -> None:
        """Give every idle worker a block."""
        for seat in self._seats:
            if not self._backlog:
                return
            if seat.awaited is None:
                seat.block = self._backlog.take(len(self._seats), self._block_tokens)
                now = time.perf_counter()
                units = [[moved(item, -now) for item in unit] for unit in seat.block.sent()]
                told = seat.actor.answer.options(num_returns="streaming")
                seat.stream = told.remote(units, apart=seat.block.apart)

    def _collect(self) -> Iterator[list[Answer]]:
        """What workers have to tell, waiting a little where that is nothing."""
        awaited = {id(seat.awaited): seat for seat in self._seats if seat.awaited is not None}
        references = [seat.awaited for seat in awaited.values()]
        if not references:
            return
        ray.wait(references, timeout=LOOK_UP_S)
        for reference in ray.wait(references, num_returns=len(references), timeout=0)[0]:
            seat = awaited[id(reference)]
            try:
                if seat.stream is None:
                    self._started(seat, got(seat.starting))
                else:
                    yield from self._told(seat, got(next(seat.stream)))
            except RayTaskError as error:  # a fault of ours, which would come again
                if seat.stream is not None:
                    raise
                raise MarsError(f"a worker cannot start: {_raised(error)}; {KEPT}") from error
            except RayError as error:
                yield from self._died(seat, error)

    def _started(self, seat: _Seat, started: Started) -> None:
        seat.starting, seat.node, seat.failed_starts = None, started.node, 0
        self._block_tokens = BATCHES_A_BLOCK * started.batch_tokens

    def _told(self, seat: _Seat, told: Told) -> Iterator[list[Answer]]:
        block = seat.block
        assert block is not None
        now = time.perf_counter()
        self._times[seat.number, seat.life] = told.times.mirrored(now)
        for text in told.notes:
            self._say(text)
        answers = block.take(told.answers)
        yield answers
        yield from self._finish(block, len(answers))
        if told.is_last:
            assert not block.open, "a worker left out rows"
            seat.stream = seat.block = None

    def _died(self, seat: _Seat, error: RayError) -> Iterator[list[Answer]]:
        """Start the worker again; rows that it was given and has not answered go to whoever is free."""
        seat.life += 1
        block, seat.block, seat.stream = seat.block, None, None
        if block is None:
            seat.failed_starts += 1
        seat.starting = self._cluster.start(seat.actor)
        what = f"a worker{' on ' + seat.node if seat.node else ''} died ({_cause(error)})"
        if block is not None:
            blocks, culprit = block.left()
            rows = len(block.open)
            self._backlog.put_back(blocks)
            self._note(f"{what}; it left {counted(rows, 'row')} unanswered")
            if culprit is not None:
                yield self._failed([self._blamed(culprit, error)])
                yield from self._finish(block, 1)
        elif seat.failed_starts == MOST_FAILED_STARTS:
            self._seats.remove(seat)
            self._note(f"{what} {MOST_FAILED_STARTS} times while it started, and is left out")
            if not self._seats:
                raise MarsError(
                    f"no worker is left: {what}; {KEPT}; "
                    "its messages are under /tmp/ray/session_latest/logs of its machine"
                )

    def _finish(self, block: Block, rows: int) -> Iterator[list[Answer]]:
        if failures := block.window.finish(rows):
            yield self._failed(failures)

    def _failed(self, failures: Sequence[RowError]) -> list[Answer]:
        return [Answer.from_failure(failure, self._run.method.name) for failure in failures]

    def _blamed(self, item: Item, error: RayError) -> RowError:
        message = f"{item.source.place}: two workers died while they answered it ({_cause(error)})"
        return RowError(
            source=item.source,
            kind="worker_died",
            message=message,
            document_tokens=item.document_tokens,
            prompt_tokens=item.prompt_tokens,
        )

    def _say(self, text: str) -> None:
        """Pass on a note once; other workers say the same with other numbers."""
        gist = re.sub(r"[\d.,]+", "", text.partition(";")[0])
        if gist not in self._said:
            self._said.add(gist)
            self._note(text)


def _raised(error: RayError) -> str:
    """The last line of a traceback of Ray's, which is what was raised."""
    return _line(error, -1)


def _line(error: RayError, place: int) -> str:
    """One of the lines of what an error says, made short; of one that says nothing its type."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return lines[place] if len(lines[place]) <= 160 else f"{lines[place][:157]}..."


def _cause(error: RayError) -> str:
    """In a few words; what Ray says may be a page."""
    if RAISED_AT_START in str(error):
        return f"its start raised {_raised(error)}"
    if isinstance(error, RayActorError):
        return "its process or its machine is gone"
    return _line(error, 0)
