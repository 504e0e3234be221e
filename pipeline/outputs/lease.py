"""One run at a time writes an output in object storage: a lock that must be refreshed to stay held.

Each holder makes one object more, `.NAME.lock-000001` and so on, by the one thing that object storage does
for only one of many: to create an object if it is not there. Who holds the newest holds the lock. A run whose
lock was taken over, because it gave no sign of life, learns so before it writes again.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
import uuid
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Self

import psutil

from pipeline.errors import ConfigError, LockedError, MarsError
from pipeline.storage.causes import told
from pipeline.storage.remote import RemotePath

LEASE_S = 600.0  # without a sign of life for this long, a lock may be taken over
REFRESH_S = 60.0
LEAVE_AFTER_S = 5.0  # a refresh that hangs is left behind when the run ends

_held: set[str] = set()  # tokens of this process, whose lock may outlive its holder where storage failed

_UNSAID = {"machine": "", "born": 0.0, "refreshed": 0.0, "token": ""}

ATTEMPTS = 10  # to get ahead of others that come and go


def now() -> float:
    """Seconds that also count while the machine sleeps."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else time.monotonic()


@dataclass(frozen=True, kw_only=True, slots=True)
class Holder:
    """What a lock says of who made it; times are seconds since 1970, by the holder's clock."""

    pid: int = field(default_factory=os.getpid)  # first: lock files are known by it
    host: str = field(default_factory=socket.gethostname)
    started: str = field(default_factory=lambda: time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()))
    machine: str = field(default_factory=lambda: _machine())
    born: float = field(default_factory=lambda: _born(os.getpid()) or 0.0)
    refreshed: float = field(default_factory=time.time)
    token: str = field(default_factory=lambda: uuid.uuid4().hex)

    @classmethod
    def parse(cls, data: bytes) -> Holder | None:
        """None if it is nothing that a holder would write; lock files of earlier versions say less."""
        try:
            told = json.loads(data)
        except (ValueError, RecursionError):
            return None
        if not isinstance(told, dict) or {*_UNSAID, *told} != {field.name for field in fields(cls)}:
            return None
        return cls(**{**_UNSAID, **told})

    def dump(self) -> bytes:
        return json.dumps(asdict(self)).encode()

    def is_alive(self) -> bool:
        """Known for a process of this machine; by its last sign of life for any other."""
        if (self.machine, self.pid) == (_machine(), os.getpid()):
            return self.token in _held
        if self.machine == _machine():
            born = _born(self.pid)
            return born is not None and abs(born - self.born) < 2  # the system's clock may be adjusted
        return time.time() - self.refreshed < LEASE_S

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host} (since {self.started})"


class LeaseLock:
    """A context manager; `check` raises a `LockedError` once another run has taken the lock over."""

    def __init__(self, output: RemotePath) -> None:
        self._output = output
        self._prefix = f".{output.name}.lock-"
        self._holder = Holder()
        self._number = 0
        self._refreshed = 0.0
        self._is_lost = False
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._keep_refreshing, name="lease", daemon=True)

    def __enter__(self) -> Self:
        _held.add(self._holder.token)
        no_bucket = f"{self._output} cannot be written", "; make the bucket first"
        try:
            with told(f"{self._output} cannot be locked"), told(*no_bucket, ConfigError, FileNotFoundError):
                self._acquire()
        except BaseException:
            _held.discard(self._holder.token)
            raise
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        self._thread.join(LEAVE_AFTER_S)
        _held.discard(self._holder.token)
        with suppress(OSError, MarsError):  # what stays of the lock lapses
            self.check()
            self._remove_up_to(self._number)

    def check(self) -> None:
        """Ask storage whether the lock is still held; to be called before anything is written."""
        with told(f"{self._output}: its lock cannot be read"):
            newest = self._newest()
        if self._is_lost or newest != self._number or self._has_lapsed():
            self._is_lost = True
            raise LockedError(f"{self._output} was taken over by {self._taker(newest)}; this run has ended")

    def refuse_held(self) -> None:
        """A `LockedError` if a run holds the lock; an OSError where that cannot be found out."""
        newest = self._newest()
        if newest:
            self._refuse_alive(newest)

    def _acquire(self) -> None:
        for _ in range(ATTEMPTS):
            newest = self._newest()
            if newest and self._refuse_alive(newest):
                continue
            self._holder = replace(self._holder, refreshed=time.time())
            self._refreshed = now()
            if self._object(newest + 1).create(self._holder.dump()):
                self._number = newest + 1
                self._refuse_unconditional()
                if self._newest() == self._number:
                    self._remove_up_to(newest)
                    return
                self._object(self._number).unlink()  # others came and went since the first look
        raise LockedError(f"{self._output} is being locked by several others; try again")

    def _refuse_alive(self, number: int) -> bool:
        """A `LockedError` if the holder lives; says whether the lock has gone meanwhile."""
        try:
            holder = Holder.parse(self._object(number).read_bytes())
        except FileNotFoundError:
            return True
        if holder is not None and holder.is_alive():
            lapses = f" (if it is gone, its lock lapses in {LEASE_S / 60:.0f} minutes)"
            raise LockedError(
                f"{self._output} is being written by {holder}; wait for it, or name another output"
                f"{'' if holder.machine == _machine() else lapses}"
            )
        return False

    def _refuse_unconditional(self) -> None:
        """Some storage takes the condition and ignores it: there a second creation succeeds as well."""
        other = replace(self._holder, token=uuid.uuid4().hex)
        if self._object(self._number).create(other.dump()):
            self._object(self._number).unlink()
            raise ConfigError(
                f"{self._output} cannot be locked: its storage does not heed If-None-Match; "
                "write to a local file and copy it"
            )

    def _newest(self) -> int:
        """0 if there is none."""
        numbers = (path.name.removeprefix(self._prefix) for path in self._output.siblings(self._prefix))
        return max((int(number) for number in numbers if number.isdecimal()), default=0)

    def _object(self, number: int) -> RemotePath:
        return self._output.beside(f"{self._prefix}{number:06}")

    def _remove_up_to(self, number: int) -> None:
        for path in self._output.siblings(self._prefix):
            if int(path.name.removeprefix(self._prefix)) <= number:
                path.unlink()

    def _taker(self, number: int) -> str:
        with suppress(OSError):
            holder = Holder.parse(self._object(number).read_bytes())
            if number > self._number and holder is not None:
                return str(holder)
        return "another run, or could be"

    def _has_lapsed(self) -> bool:
        return now() - self._refreshed > LEASE_S

    def _keep_refreshing(self) -> None:
        while not self._ended.wait(REFRESH_S) and not self._is_lost:
            with suppress(OSError):  # `check` counts for how long
                self._refresh()

    def _refresh(self) -> None:
        began = now()
        if self._has_lapsed() or self._newest() != self._number:
            self._is_lost = True
            return
        self._object(self._number).write_bytes(replace(self._holder, refreshed=time.time()).dump())
        if self._has_lapsed():  # while writing: another may have come and gone
            self._is_lost = True
            self._object(self._number).unlink()
            return
        self._refreshed = began


def _machine() -> str:
    """Within it, a process is told by its number and birth; a container is a machine of its own."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            return f"{file.read().strip()}/{os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return f"{socket.gethostname()}/{uuid.getnode()}"


def _born(pid: int) -> float | None:
    try:
        return psutil.Process(pid).create_time()
    except psutil.Error:
        return None
