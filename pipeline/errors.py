"""Errors a user can act on, each kind with the exit code the command ends with."""

from collections.abc import Callable, Iterable
from difflib import get_close_matches
from typing import ParamSpec, TypeVar

from pipeline.texts.redaction import without_secrets

P = ParamSpec("P")
T = TypeVar("T")

KEPT = "finished rows are kept, and --resume continues"  # ends messages of runs that write answers
KEPT_TO_MEND = "finished rows are kept: mend the cause, then --resume --retry-errors"  # of too many errors
NO_JOURNAL = "rows that ended before are written, and nothing is kept to resume"  # where - is the output
HANDED_OUT = "answers before it have come, and nothing is kept to resume"  # where rows are in memory
NOTHING_KEPT = "no row was finished, and there is nothing to resume"  # instead, where that is so

_IS_WISH = "marsinfer_is_wish"  # attribute of what a caller's function raised


class MarsError(Exception):
    """Base of every error with a message meant for the user: cause, place and remedy in one line.

    `exit_code` is what the command ends with. The kinds: ConfigError, InputError and ModelError (2),
    NoneAnswered and RowsFailed (3), TooManyErrors (4), GateFailed (5), GateInconclusive (6), LockedError (7),
    StorageError (8), DeadlineReached (9), and Interrupted (128 plus the signal's number); 1 is left for what
    is none of them. A single bad row raises nothing: it becomes a row of the output whose status is `error`.
    """

    exit_code = 1

    def __init__(self, *told: object) -> None:
        super().__init__(*(without_secrets(each) if isinstance(each, str) else each for each in told))


class ConfigError(MarsError):
    """A flag or setting that cannot work."""

    exit_code = 2


class InputError(MarsError):
    """Input that cannot be read at all (a single bad row is a `records.RowError`, not this)."""

    exit_code = 2


class ModelError(MarsError):
    """A model that is unknown, unsupported, unsafe or unreadable."""

    exit_code = 2


class NoneAnswered(MarsError):
    """The output holds rows, and not one of them has an answer."""

    exit_code = 3


class RowsFailed(MarsError):
    """The output holds rows that failed, which the command line was told to take for a failure."""

    exit_code = 3


class GateFailed(MarsError):
    """A method is worse than dense by more than it may be."""

    exit_code = 5


class GateInconclusive(MarsError):
    """Too few rows to tell whether a method is worse than dense by more than it may be."""

    exit_code = 6


class LockedError(MarsError):
    """Another run is writing the same output."""

    exit_code = 7


class StorageError(MarsError):
    """The output cannot be written: the disk is full, or its folder is gone."""

    exit_code = 8


class TooManyErrors(MarsError):
    """A run that was clearly broken stopped itself; what is finished is kept."""

    exit_code = 4


class DeadlineReached(MarsError):
    """The moment came at which a run was to end; what is finished is kept."""

    exit_code = 9


class RankFailed(MarsError):
    """One of the processes that have a model's parts has failed; what is finished is kept."""


class Interrupted(MarsError):
    """A signal ended the run; what is finished is kept. `exit_code` is 128 plus the signal's number."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def keeps_nothing(error: MarsError, told: str) -> None:
    """Have an error that promises rows to go on from say `told` instead."""
    text = str(error)
    for promise in (KEPT, KEPT_TO_MEND):
        text = text.replace(promise, told)
    error.args = (text,)


def is_failure(error: BaseException) -> bool:
    """Whether something went wrong, as against a wish to stop; a panic of Rust code is no `Exception`."""
    if getattr(error, _IS_WISH, False):
        return False
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


def ending(hook: Callable[P, T]) -> Callable[P, T]:
    """A caller's function, of which whatever it raises is a wish to stop, and no fault of the row at work."""

    def ends(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return hook(*args, **kwargs)
        except Exception as error:
            setattr(error, _IS_WISH, True)
            raise

    return ends


def first_line(error: BaseException) -> str:
    """What an error says, in one line; of one that says nothing its type.

    A first line that ends with a colon announces the next one, which is told too.
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    return " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """A hint to append to the message about an unknown `word`; empty where none of the known is like it."""
    close = get_close_matches(word, list(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""
