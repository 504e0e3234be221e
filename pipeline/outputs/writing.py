"""Writing answers: nothing stands under the output's name until all of it does."""

from __future__ import annotations

import errno
import io
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

import pyarrow as pa

from pipeline.errors import ConfigError, StorageError
from pipeline.outputs.batch_lines import ERRORS, errors_path
from pipeline.outputs.formats import BatchSink, Sink, sink_type
from pipeline.outputs.own import foreign_errors, foreign_sidecar, has_errors, may_be_replaced, was_ours
from pipeline.outputs.published import Published
from pipeline.outputs.sidecar import Written, needs_sidecar
from pipeline.storage.causes import cause, told
from pipeline.storage.remote import Place, RemotePath, output_place
from pipeline.storage.stdin import Once
from pipeline.storage.whole_file import open_new, partial_path, sync_folder

_REMEDIES = {
    errno.ENOSPC: "free space there and run again",
    errno.EDQUOT: "free space within your quota and run again",
    errno.EFBIG: "raise the limit on file sizes (ulimit -f) and run again",
    errno.ENOENT: "its folder is gone; make it again and run again",
    errno.EACCES: "make its folder writable and run again",
    errno.EROFS: "choose a folder that is writable",
}
_OTHER_REMEDY = "check the disk and run again"


def check_output(
    path: str | Path, inputs: Iterable[str | Place | Once], overwrite: bool, *, of_requests: bool = False
) -> None:
    """Refuse, before any work, an output that could not be written or would destroy something.

    Where rows are requests, JSON lines have a second file beside them.
    """
    place = output_place(path)
    sink_type(place)
    folder = Path(os.path.realpath(place)).parent if isinstance(place, Path) else None
    if isinstance(place, Path) and place.is_dir():
        raise ConfigError(f"{place} is a folder; name a file in it")
    if folder is not None and not folder.is_dir():
        raise ConfigError(f"{place} cannot be written: there is no folder {folder}; make it first")
    for file in inputs:
        if _is_same(place, file):
            named = f" ({file})" if isinstance(place, Path) else ""
            raise ConfigError(f"{place} is also an input{named}; name another output")
    with told(f"{place} cannot be written"):
        refuse_foreign_output(place)
        if of_requests and needs_sidecar(place):
            _refuse_foreign_errors(place)
        refuse_existing(place, overwrite)
    if folder is not None and not os.access(folder, os.W_OK | os.X_OK):
        raise StorageError(f"{place} cannot be written: {folder} is not writable; {_REMEDIES[errno.EROFS]}")


def _is_same(place: Place, other: str | Place | Once) -> bool:
    if isinstance(place, RemotePath):
        return isinstance(other, RemotePath) and other.address == place.address
    if not isinstance(other, str | Path):
        return False
    try:
        return os.path.samefile(place, other)
    except OSError:  # one of them is not there
        return False


def refuse_existing(path: Place, overwrite: bool) -> None:
    """A `ConfigError` if something has the output's name and may not be replaced."""
    if not overwrite and path.exists():
        raise ConfigError(f"{path} exists; --overwrite replaces it")


def refuse_foreign_output(path: Place) -> None:
    """A `ConfigError` for what no run has written, under the output's name or that of the file beside it."""
    if path.exists() and not may_be_replaced(path):
        what = (
            "was changed since marsinfer wrote it"
            if was_ours(path)
            else "exists, and marsinfer did not write it"
        )
        raise ConfigError(f"{path} {what}: name another output")
    sidecar = foreign_sidecar(path)
    if sidecar is not None:
        raise ConfigError(
            f"{sidecar}, which {path.name} needs, exists, and marsinfer did not write it: name another output"
        )


def _refuse_foreign_errors(path: Place) -> None:
    """A `ConfigError` for what no run has written, under the name of the file of rows without an answer."""
    errors = foreign_errors(path)
    if errors is not None:
        raise ConfigError(
            f"{errors}, which is to hold the rows without an answer, exists, and marsinfer did not write it: "
            "name another output"
        )


def schema_as_written(path: Path, schema: pa.Schema) -> pa.Schema:
    """The schema that reading the output back will show; a `ConfigError` if its format lacks a type."""
    trial = io.BytesIO()
    try:
        sink = sink_type(path)(trial, schema)
        sink.finish()
    except (OSError, pa.ArrowException) as error:
        # Arrow tells a decimal's scale that Parquet lacks by either
        raise _type_refused(path, error) from error
    if needs_sidecar(path):
        return sink.schema
    return Published(path, pa.py_buffer(trial.getvalue())).schema


class AnswerWriter:
    """Writes to an output that is not there yet; its tables must have the `schema` that the file holds."""

    def __init__(self, path: Path, sink: Sink) -> None:
        self._path, self._sink = path, sink
        self.schema = sink.schema

    def write_table(self, table: pa.Table) -> None:
        """Add a table of answers as one group."""
        with _failures_told(self._path):
            self._sink.write(table)


@contextmanager
def output_writer(
    output: str | Path,
    schema: pa.Schema,
    overwrite: bool = False,
    temporary: Path | None = None,
    before: Callable[[Written], None] = lambda written: None,
) -> Iterator[AnswerWriter]:
    """A clean exit publishes the file whole, an exception leaves no trace of it.

    `temporary` names, on the same file system, the file that becomes the output. `before` is called with what
    is written when it is durable, right before it is published. In the form of the Batch API the rows without
    an answer are a second file, published first: a run that is killed between the two has its journal.
    """
    path = Path(output)
    make_sink = sink_type(path)
    # An output that is a symbolic link stays one: what it points to is replaced.
    target = Path(os.path.realpath(path))
    temporary = temporary or partial_path(target)
    refuse_existing(path, overwrite)
    with ExitStack() as leftovers:
        with _failures_told(path):
            handle = _opened(temporary, target, leftovers)
            sink = make_sink(handle, schema)
            leftovers.callback(_quietly, sink.finish)
            errors = temporary.with_name(f"{temporary.name}{ERRORS}")
            if isinstance(sink, BatchSink):
                sink.errors = _opened(errors, target, leftovers)
        yield AnswerWriter(path, sink)
        with _failures_told(path):
            sink.finish()
            errors_size = _sealed(sink.errors) if isinstance(sink, BatchSink) else None
            written = Written(_sealed(handle), sink.file_schema, errors_size)
            refuse_existing(path, overwrite)
            leaves_errors = has_errors(path) and not errors_size
            before(written)
            if errors_size:
                os.replace(errors, errors_path(target))
            os.replace(temporary, target)
            if leaves_errors:
                errors_path(target).unlink()
            sync_folder(target.parent)


def _opened(temporary: Path, target: Path, leftovers: ExitStack) -> BinaryIO:
    """A new file that is to become `target`, or stand beside it; `leftovers` removes what is left of it."""
    handle = open_new(temporary, like=target)
    leftovers.callback(_quietly, temporary.unlink)
    leftovers.callback(_quietly, handle.close)
    return handle


def _sealed(handle: BinaryIO) -> int:
    """Make what was written to a file durable, and close it; returns its bytes."""
    handle.flush()
    os.fsync(handle.fileno())
    size = os.fstat(handle.fileno()).st_size
    handle.close()
    return size


def _quietly(action: Callable[[], object]) -> None:
    """Close or remove what may be gone; after a failed write closing fails again, which is no news."""
    with suppress(OSError, ValueError, pa.ArrowException):
        action()


@contextmanager
def _failures_told(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        remedy = _REMEDIES.get(error.errno or 0, _OTHER_REMEDY)
        raise StorageError(f"{path} cannot be written: {cause(error)}; {remedy}") from error
    except pa.ArrowException as error:
        raise _type_refused(path, error) from error


def _type_refused(path: Path, error: Exception) -> ConfigError:
    return ConfigError(
        f"{path} cannot be written as {path.suffix}: {cause(error)}; "
        "leave that column out with --keep-columns, or choose .arrows"
    )
