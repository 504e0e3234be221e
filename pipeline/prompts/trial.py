"""A trial of a template in a process of its own, which may take some time and memory and no more.

Templates come with models and from others. Jinja's sandbox keeps them from files and code, and not from loops
within loops, texts times a billion or powers of powers, which nothing in this process could end.
"""

from __future__ import annotations

import os
import signal
import warnings
from collections.abc import Callable, Iterable

from jinja2 import TemplateError

CPU_S = 10  # which no load of the machine shortens
MEMORY_BYTES = 2**30  # on top of what this process has
MOST_CHARACTERS = 20_000_000  # of what a template writes around texts
LONG_TEXT = "word \n" * 50_000  # of as many lines as a document may have

VERDICTS: dict[str, str | None] = {}  # by key, what is wrong with each template that was tried
_ENDED, _MEMORY, _LENGTH = 0, 3, 4  # exit codes of the trial
_SAYS = {
    _MEMORY: f"it takes more than {MEMORY_BYTES >> 30} GiB of memory",
    _LENGTH: f"it writes more than {MOST_CHARACTERS:,} characters",
}


def check_ends(key: str, texts: Callable[[], Iterable[str]]) -> None:
    """Raise TemplateError where what a template writes, `texts`, cannot be had with reasonable means.

    `key` stands for the template and the texts: of what was tried once, the verdict is known. Errors that the
    template raises are left to whoever renders it.
    """
    if key not in VERDICTS:
        VERDICTS[key] = _verdict(texts)
    fault = VERDICTS[key]
    if fault is not None:
        raise TemplateError(fault)


def _verdict(texts: Callable[[], Iterable[str]]) -> str | None:
    if not hasattr(os, "fork"):
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of threads, none of which the trial needs
        child = os.fork()
    if child == 0:
        _try(texts)
    try:
        _, status = os.waitpid(child, 0)
    except BaseException:  # a signal
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        raise
    code = os.waitstatus_to_exitcode(status)
    if code == -signal.SIGXCPU or code == -signal.SIGKILL:
        return f"it takes more than {CPU_S} s"
    return None if code == _ENDED else _SAYS.get(code, "it brings down the process that renders it")


def _try(texts: Callable[[], Iterable[str]]) -> None:
    """Render, and leave the process, whatever comes."""
    code = 1
    try:
        os.setpgid(0, 0)  # a Ctrl-C is for the run, and no fault of the template
        _limit()
        length = sum(map(len, texts()))
        code = _LENGTH if length > MOST_CHARACTERS else _ENDED
    except MemoryError:
        code = _MEMORY
    except Exception:  # noqa: BLE001 - told where the template is rendered
        code = _ENDED
    finally:
        os._exit(code)


def _limit() -> None:
    import faulthandler
    import resource

    import psutil

    faulthandler.disable()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    used_s = int(sum(os.times()[:2])) + 1
    hard_s = resource.getrlimit(resource.RLIMIT_CPU)[1]
    limit_s = used_s + CPU_S if hard_s == resource.RLIM_INFINITY else min(hard_s, used_s + CPU_S)
    resource.setrlimit(resource.RLIMIT_CPU, (limit_s, hard_s))
    hard_bytes = resource.getrlimit(resource.RLIMIT_AS)[1]
    bytes_ = psutil.Process().memory_info().vms + MEMORY_BYTES
    if hard_bytes == resource.RLIM_INFINITY or bytes_ < hard_bytes:
        resource.setrlimit(resource.RLIMIT_AS, (bytes_, hard_bytes))
