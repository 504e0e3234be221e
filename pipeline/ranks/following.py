"""A rank that follows: it loads its share of the model, and repeats the calls of the rank that leads.

It writes to nothing but the leading rank, leaves signals to it, and ends with it.
"""

from __future__ import annotations

import os
import pickle
import signal
import sys
import threading
from multiprocessing.connection import Connection
from typing import Any

import torch

from pipeline.errors import MarsError, first_line
from pipeline.ranks.calls import unpacked
from pipeline.ranks.collectives import Ranks
from pipeline.ranks.leading import (
    CLOSE,
    FAILED,
    GO,
    LOADED,
    STOP,
    Everywhere,
    connection,
    made_in,
)


class _GivenUp(Exception):
    """The first rank has given the call up."""


class _Repeater:
    """What this rank has, by the numbers that the first one gives it."""

    def __init__(self, ranks: Ranks, everywhere: Everywhere, commands: Connection) -> None:
        self._ranks, self._everywhere, self._commands = ranks, everywhere, commands
        self._twins: dict[int, Any] = {}
        self._numbers: dict[int, int] = {}  # by id
        self._made = 0
        for each in everywhere.objects:
            self._register(each)

    def run(self) -> None:
        """Repeat calls until there are no more."""
        while (message := self._commands.recv_bytes()) != CLOSE:
            self._repeat(message)

    def _repeat(self, message: bytes) -> None:
        gone, told, function, args, kwargs = unpacked(message, self._twins, self._check, self._ranks.device)
        for number in gone:
            del self._numbers[id(self._twins.pop(number))]
        for (n, name), value in zip(self._everywhere.settings, told, strict=True):
            setattr(self._everywhere.objects[n], name, value)
        try:
            result = function(*args, **kwargs)
        except _GivenUp:
            return
        for each in made_in(result):
            self._register(each)

    def _register(self, each: object) -> None:
        if id(each) not in self._numbers:
            self._twins[self._made], self._numbers[id(each)] = each, self._made
            self._made += 1

    def _check(self) -> None:
        if self._commands.recv_bytes() == STOP:
            raise _GivenUp


def follow(commands: Connection, reports: Connection) -> None:
    rank, count, device, store, load, args = pickle.loads(commands.recv_bytes())
    ranks = Ranks(rank=rank, count=count, device=torch.device(device))
    if ranks.device.type == "cuda":
        torch.cuda.set_device(ranks.device)
    everywhere = load(ranks, *args)
    reports.send((LOADED, None))
    if commands.recv_bytes() != GO:
        return
    ranks.connect(store)
    _Repeater(ranks, everywhere, commands).run()


def main() -> None:
    """Run as a program, whose arguments are the numbers of its ends of two pipes."""
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    commands, reports = (connection(int(number)) for number in sys.argv[1:])
    threading.Thread(target=_end_with, args=(reports,), daemon=True).start()
    code = 0
    try:
        follow(commands, reports)
    except EOFError:  # the first rank has ended
        pass
    except Exception as error:  # noqa: BLE001 - the first rank tells of it
        code = 1
        told = error if isinstance(error, MarsError) else f"{type(error).__name__}: {first_line(error)}"
        reports.send((FAILED, told))
    os._exit(code)  # whatever waits for other ranks


def _end_with(reports: Connection) -> None:
    """End when the first rank does, in whatever this one is."""
    try:
        reports.recv()
    except (EOFError, OSError):
        os._exit(1)


if __name__ == "__main__":
    main()
