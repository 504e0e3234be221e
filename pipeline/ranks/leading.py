"""The rank that leads: it has the others repeat what it does with the model, and sees when one of them fails.

A function under `on_every_rank` runs on all ranks, with the same arguments. The first of them is something
that every rank has, an `OnEachRank` object, and so is what the function makes of such objects: later calls
may name it. What a function is to decide from data it takes from the first rank (`Ranks.from_first_`).
"""

from __future__ import annotations

import inspect
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import fields, is_dataclass
from functools import wraps
from multiprocessing.connection import Connection, Pipe, wait
from pathlib import Path
from typing import Any, NamedTuple, ParamSpec, TypeVar

from pipeline.errors import KEPT, MarsError, RankFailed, first_line
from pipeline.ranks.calls import packed
from pipeline.ranks.collectives import Ranks

GO, STOP, CLOSE = b"go", b"stop", b"close"
LOADED, FAILED = "loaded", "failed"  # what followers report
CLOSING_S = 10.0  # that a follower has to end by itself
NEWS_S = 5.0  # until the death of another rank, which may be the cause of an error here, is known

P = ParamSpec("P")
T = TypeVar("T")


class OnEachRank:
    """Something of which every rank has its own; `lead` is None where there is one rank, and on followers."""

    lead: Lead | None = None


def on_every_rank(function: Callable[P, T]) -> Callable[P, T]:
    """Have all ranks run a function of a module, or a method, whose first argument is an `OnEachRank`.

    An argument `check` may raise on the first rank, which gives the call up on all of them, there.
    """
    return _repeated(function, at_the_end=False)


def at_the_end(function: Callable[P, T]) -> Callable[P, T]:
    """As `on_every_rank`, of what only gives something back: this rank does so if others have failed, too."""
    return _repeated(function, at_the_end=True)


def _repeated(function: Callable[P, T], *, at_the_end: bool) -> Callable[P, T]:
    @wraps(function)
    def everywhere(*args: P.args, **kwargs: P.kwargs) -> T:
        lead: Lead | None = args[0].lead  # type: ignore[attr-defined]
        if lead is None or lead.is_inside or (at_the_end and lead.is_over):
            return function(*args, **kwargs)
        return lead.call(everywhere, function, args, kwargs)

    return everywhere


class Everywhere(NamedTuple):
    """What a rank has once it has loaded its share of a model."""

    objects: tuple[object, ...]
    # object and attribute, of which each call takes the value that the first rank has
    settings: tuple[tuple[int, str], ...]


def made_in(result: object) -> Iterator[OnEachRank]:
    """What a call has made that later ones may name, in the same order on each rank."""
    if isinstance(result, OnEachRank):
        yield result
    parts: Sequence[object] = ()
    if isinstance(result, list | tuple):
        parts = result
    elif is_dataclass(result) and not isinstance(result, type):
        parts = [getattr(result, each.name) for each in fields(result)]
    yield from (part for part in parts if isinstance(part, OnEachRank))


class _Process:
    """The process of another rank."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.commands, commands = Pipe()
        self.reports, reports = Pipe()
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115
        self.process = subprocess.Popen(
            [sys.executable, "-m", "pipeline.ranks.following", str(commands.fileno()), str(reports.fileno())],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,  # which may be the first rank's output
            stderr=self._errors,
            pass_fds=(commands.fileno(), reports.fileno()),
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            process_group=0,  # a Ctrl-C is for the first rank, which ends the others
        )
        commands.close()
        reports.close()

    def report(self) -> tuple[str, Any]:
        """What it has to say, its last words if it has died."""
        try:
            kind, told = self.reports.recv()
            return str(kind), told
        except (EOFError, OSError):
            return FAILED, self._death()

    def _death(self) -> str:
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(CLOSING_S)
        code = self.process.poll()
        if code is not None and code < 0:
            return f"it was killed by {signal.Signals(-code).name}"
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        return f"it ended with exit code {code}" + (f" ({lines[-1]})" if lines else "")

    def end(self, wait_s: float) -> None:
        with suppress(OSError):
            self.reports.close()
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(wait_s)
        self.process.kill()
        self.process.wait()
        self.commands.close()
        self._errors.close()


class Lead:
    """This process as the first of several ranks; `close` ends the others."""

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks
        self.is_inside = False  # a call that all ranks run
        self.failure: str | None = None
        self._known = threading.Event()  # that there is a failure
        self._ended = False
        self._everywhere = Everywhere((), ())
        self._numbers: dict[int, int] = {}  # of what every rank has, by id
        self._made = 0
        self._gone: deque[int] = deque()
        self._signatures: dict[Callable[..., Any], inspect.Signature] = {}
        self._store = tempfile.mkdtemp(prefix="marsinfer-ranks-")
        self._followers = [_Process(rank) for rank in range(1, ranks.count)]

    @property
    def is_over(self) -> bool:
        return self._ended or self.failure is not None

    def have_loaded(self, load: Callable[..., Everywhere], devices: Sequence[str], *args: object) -> None:
        """Let followers begin to load their shares by `load(ranks, *args)`, each on its device."""
        for follower, device in zip(self._followers, devices, strict=True):
            begin = (follower.rank, self.ranks.count, device, self._file, load, args)
            self._tell(follower, pickle.dumps(begin))

    def begin(self, everywhere: Everywhere) -> None:
        """Wait until all ranks have loaded. Raises the MarsError of one that has not."""
        for follower in self._followers:
            kind, told = follower.report()
            if kind == FAILED:
                self.close(0.0)
                if isinstance(told, MarsError):
                    raise type(told)(f"rank {follower.rank}: {told}")
                raise RankFailed(f"rank {follower.rank} did not start: {told}")
        for follower in self._followers:
            self._tell(follower, GO)
        self.ranks.connect(self._file)
        self._everywhere = everywhere
        for each in everywhere.objects:
            self._register(each)
        threading.Thread(target=self._watch, name="ranks", daemon=True).start()

    def call(
        self, named: Callable[..., T], function: Callable[..., T], args: Sequence[Any], kwargs: dict[str, Any]
    ) -> T:
        """Run a function here and on all followers, which know it by the name of `named`."""
        self.raise_if_failed()
        if function not in self._signatures:
            self._signatures[function] = inspect.signature(function)
        bound = self._signatures[function].bind(*args, **kwargs)
        look = bound.arguments.get("check")
        given_up = False

        def check() -> None:
            nonlocal given_up
            try:
                assert look is not None
                look()
            except BaseException:
                given_up = True
                self._tell_all(STOP)
                raise
            self._tell_all(GO)

        if look is not None:
            bound.arguments["check"] = check
        told = [getattr(self._everywhere.objects[n], name) for n, name in self._everywhere.settings]
        gone = [self._gone.popleft() for _ in range(len(self._gone))]
        self._tell_all(packed((gone, told, named, bound.args, bound.kwargs), self._number, check))
        self.is_inside = True
        try:
            result = function(*bound.args, **bound.kwargs)
        except BaseException as error:
            if not given_up:
                self._fail(error)
            raise
        finally:
            self.is_inside = False
        self.raise_if_failed()
        for each in made_in(result):
            self._register(each)
        return result

    def raise_if_failed(self) -> None:
        """Raise RankFailed if a rank has failed: nothing that has been computed since can be trusted."""
        if self.failure is not None:
            raise RankFailed(f"{self.failure}; {KEPT}")

    def close(self, wait_s: float = CLOSING_S) -> None:
        """End the followers; may be called again."""
        if self._ended:
            return
        self._ended = True
        for follower in self._followers:
            with suppress(OSError):
                follower.commands.send_bytes(CLOSE)
        for follower in self._followers:
            follower.end(wait_s)
        self.ranks.abort()
        for path in Path(self._store).iterdir():
            path.unlink(missing_ok=True)
        Path(self._store).rmdir()

    @property
    def _file(self) -> str:
        return str(Path(self._store) / "store")

    def _number(self, obj: object) -> int | None:
        return self._numbers.get(id(obj))

    def _register(self, each: object) -> None:
        if id(each) in self._numbers:
            return
        if isinstance(each, OnEachRank):
            each.lead = self
        number, key = self._made, id(each)
        self._numbers[key] = number
        self._made += 1
        numbers, gone = self._numbers, self._gone

        def forget() -> None:
            del numbers[key]
            gone.append(number)

        weakref.finalize(each, forget).atexit = False

    def _tell_all(self, message: bytes) -> None:
        for follower in self._followers:
            self._tell(follower, message)

    def _tell(self, follower: _Process, message: bytes) -> None:
        try:
            follower.commands.send_bytes(message)
        except OSError as error:
            self._fail(error)

    def _fail(self, error: BaseException) -> None:
        """Raise what is to be said of an error in the middle of a call: the ranks are no longer in step."""
        if isinstance(error, RankFailed):
            return
        if not isinstance(error, Exception):  # a wish to stop
            self.failure = self.failure or "the run was stopped within a step"
            return
        if not self._known.wait(NEWS_S):
            self.failure = f"rank 0 failed: {type(error).__name__}: {first_line(error)}"
        raise RankFailed(f"{self.failure}; {KEPT}") from error

    def _watch(self) -> None:
        """Wait for a report of any follower, which there is none of but failures."""
        ready = wait([follower.reports for follower in self._followers])
        if self._ended:
            return
        follower = next(each for each in self._followers if each.reports in ready)
        _, told = follower.report()
        if self._ended:
            return
        self.failure = f"rank {follower.rank} of {self.ranks.count} failed: {told}"
        self._known.set()
        for each in self._followers:
            each.process.kill()
        if self.ranks.device.type == "cuda":  # by gloo the connections of those that were killed are closed
            self.ranks.abort()


def connection(descriptor: int) -> Connection:
    """The end of a pipe that this process was given."""
    return Connection(descriptor)
