"""The journal of an output in object storage, which knows no appending, syncing or renaming.

The journal works in a local scratch folder, as beside a local output, and all that makes it durable is put
into objects of the same names: its settings, and every chunk of a part as one object. The output is written
in the scratch folder too, and uploaded whole. A journal is removed object by object: one named `removed` says
until the end that what is left counts for nothing.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, closing, contextmanager, suppress
from dataclasses import asdict, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa

from pipeline.errors import KEPT, ConfigError, LockedError, MarsError, StorageError
from pipeline.outputs.batch_lines import errors_path
from pipeline.outputs.beginnings import START_OVER, STATE_FILE, Beginning
from pipeline.outputs.chunks import Damage
from pipeline.outputs.dropped import dropped_path
from pipeline.outputs.journal import Journal
from pipeline.outputs.own import has_errors
from pipeline.outputs.parts import DAMAGED, journal_folder, journal_parts
from pipeline.outputs.rowindex import Order
from pipeline.outputs.sidecar import needs_sidecar, sidecar_path
from pipeline.outputs.writing import refuse_existing
from pipeline.records import Answer
from pipeline.storage.causes import told
from pipeline.storage.remote import RemotePath, output_place

AT_ONCE = 16  # objects read or removed side by side

REMOVED = "removed"

_CHUNK = re.compile(rf"(part-\d{{4,}})-(\d{{12,}})(?:{re.escape(DAMAGED)})?")


def open_journal(
    output: str | Path,
    schema: pa.Schema,
    settings: Mapping[str, Any],
    *,
    check: Callable[[], None] = lambda: None,
    **flags: bool,
) -> Journal:
    """A `Journal`, wherever the output is; `check` raises if the output's lock is no longer held."""
    place = output_place(output)
    if isinstance(place, RemotePath):
        return MirroredJournal(place, schema, settings, check, **flags)
    return Journal(place, schema, settings, **flags)


class MirroredJournal(Journal):
    """A journal whose answers are durable once they are in object storage."""

    def __init__(
        self,
        output: RemotePath,
        schema: pa.Schema,
        settings: Mapping[str, Any],
        check: Callable[[], None],
        *,
        resume: bool,
        overwrite: bool = False,
        **flags: bool,
    ) -> None:
        mirror = Mirror(output, check)
        try:
            if resume:
                mirror.fetch()
            else:
                mirror.refuse_leftovers(overwrite)
            with mirror.named_as_given():
                super().__init__(mirror.file, schema, settings, resume=resume, overwrite=overwrite, **flags)
            self._mirror = mirror
            mirror.begin(self._beginning)
            mirror.set_aside(self._parts.damages)
        except BaseException:
            mirror.close()
            raise

    def _kept(self, part: str) -> str:
        return f"damaged objects {self._folder.name}/{part}-* have names that end in {DAMAGED} now"

    def append(self, answers: Sequence[Answer]) -> None:
        super().append(answers)
        self._mirror.put_chunks()

    def publish(
        self,
        order: Order = "input",
        check: Callable[[], None] = lambda: None,
        files: Sequence[tuple[str, int]] | None = None,
    ) -> bool:
        self._mirror.refuse_existing(self._beginning.replaces)
        with self._mirror.named_as_given():
            return super().publish(order, check, files)

    def _finish(self, stale: bool) -> None:
        if stale:
            # If the run is killed right after the upload, the next one may publish again.
            self._mirror.put_settings(replace(self._beginning, replaces=True))
            self._mirror.upload()
        self._mirror.forget()
        if stale and self._dropped.tidy():
            self._mirror.put_dropped()

    def discard(self) -> None:
        super().discard()
        self._mirror.forget()

    def close(self) -> None:
        super().close()
        if hasattr(self, "_mirror"):  # else it could not be opened
            self._mirror.close()


class Mirror:
    """The objects of one output and its journal, and the scratch folder whose files they are copies of."""

    def __init__(self, output: RemotePath, check: Callable[[], None]) -> None:
        self.output = output
        self._check = check
        with told("there is no scratch space", "; set TMPDIR"):
            self._scratch = Path(os.path.realpath(tempfile.mkdtemp(prefix="marsinfer-")))
        self.file = self._scratch / output.name
        self._folder = journal_folder(self.file)
        self._put_bytes: Counter[str] = Counter()  # of each part
        self._has_begun = False

    @property
    def _has_chunks(self) -> bool:
        return any(self._put_bytes.values())

    def has_journal(self) -> bool:
        """Whether a run that was not published left something."""
        with self._failures_told("cannot be read"):
            return _is_journal(path.name for path in self._objects())

    def fetch(self) -> None:
        """Copy to the scratch folder what a resumed run goes on from."""
        with self._failures_told(f"cannot be fetched to {self._scratch}"), self.named_as_given():
            objects = {path.name: path for path in self._own_objects()}
            if _is_journal(objects):
                self._folder.mkdir()
                if STATE_FILE in objects:
                    objects[STATE_FILE].download(self._folder / STATE_FILE)
                self._fetch_parts(objects)
                if STATE_FILE not in objects and self._is_left_over():
                    shutil.rmtree(self._folder)
                    self._put_bytes.clear()
            self._fetch_sidecar()
            self._fetch(self.output.beside(dropped_path(self.file).name))
            if not self._has_chunks or Beginning.load(self._folder).extends:
                self._fetch(self.output)

    def refuse_leftovers(self, overwrite: bool) -> None:
        """A `ConfigError` if there is something that a run which does not resume would destroy."""
        with self._failures_told("cannot be read"):
            own = self._own_objects()
            if not overwrite and _is_journal(path.name for path in own):
                folder = journal_folder(self.file).name
                raise ConfigError(f"an unfinished run left {folder}; --resume continues it, {START_OVER}")
            if not overwrite:
                self._fetch_sidecar()
        self.refuse_existing(overwrite)

    def refuse_existing(self, overwrite: bool) -> None:
        with self._failures_told("cannot be read"):
            refuse_existing(self.output, overwrite)

    def begin(self, beginning: Beginning) -> None:
        """Make what the scratch folder holds the journal."""
        if not self._has_chunks:
            self.forget()
        self.put_settings(beginning)
        self._has_begun = True

    def put_settings(self, beginning: Beginning) -> None:
        self._put(STATE_FILE, lambda path: path.write_bytes(json.dumps(asdict(beginning)).encode()))

    def put_chunks(self) -> None:
        """Make durable what was appended to the parts."""
        for part in journal_parts(self._folder):
            if part.name.endswith(DAMAGED):  # to which nothing is added
                continue
            start = self._put_bytes[part.name]
            with part.open("rb") as file:
                file.seek(start)
                chunk = file.read()
            if chunk:
                self._put(f"{part.name}-{start:012}", partial(_create, chunk))
                self._put_bytes[part.name] += len(chunk)

    def upload(self) -> None:
        """Put the finished output, and before it what describes it, where they belong."""
        with self._failures_told("cannot be written", "; the journal is intact, and --resume continues"):
            sidecar, errors = sidecar_path(self.file), errors_path(self.file)
            is_stale = has_errors(self.output) and not errors.exists()
            if sidecar.exists():
                self._check()
                self.output.beside(sidecar.name).upload(sidecar)
            if dropped_path(self.file).exists():
                self._put_dropped()
            if errors.exists():
                self._check()
                errors_path(self.output).upload(errors)
            self._check()
            self.output.upload(self.file)
            if is_stale:
                errors_path(self.output).unlink()

    def put_dropped(self) -> None:
        """Make the rows beside the output what the scratch folder has; none, if it has none."""
        with self._failures_told("cannot be written"):
            self._put_dropped()

    def _put_dropped(self) -> None:
        self._check()
        local = dropped_path(self.file)
        place = self.output.beside(local.name)
        if local.exists():
            place.upload(local)
        else:
            place.unlink()

    def set_aside(self, damages: Mapping[str, Sequence[Damage]]) -> None:
        """Give objects other names in which a part, by its name, is damaged; they are read all the same."""
        with self._failures_told("cannot be written"):
            chunks = _chunks_of(self._objects()) if damages else {}
            for part, found in damages.items():
                for start, path in chunks.get(part, {}).items():
                    end = start + max(path.size(), 1)
                    is_damaged = any(damage.offset < end and start < damage.end for damage in found)
                    if is_damaged and not path.name.endswith(DAMAGED):
                        self._check()
                        path.beside(f"{path.name}{DAMAGED}").write_bytes(path.read_bytes())
                        path.unlink()

    def forget(self) -> None:
        """Remove the journal; one that is half removed says so."""
        with self._failures_told("cannot be written"):
            self._check()
            objects = {path.name: path for path in self._objects() if _is_ours(path)}
            if _is_journal(objects):
                objects[REMOVED] = self.output.beside(f"{self._folder.name}/{REMOVED}")
                objects[REMOVED].write_bytes(b"{}")
            marker = objects.pop(REMOVED, None)
            with ThreadPoolExecutor(AT_ONCE) as pool:
                list(pool.map(RemotePath.unlink, objects.values()))
            if marker is not None:
                marker.unlink()
        self._put_bytes.clear()
        self._has_begun = False

    def close(self) -> None:
        """Remove the scratch folder, and of the journal what nobody could resume."""
        if self._has_begun and not self._has_chunks:
            with suppress(MarsError):
                self.forget()
        shutil.rmtree(self._scratch, ignore_errors=True)

    @contextmanager
    def named_as_given(self) -> Iterator[None]:
        """Errors name the output, not its scratch copy, unless it is the scratch space that failed."""
        try:
            yield
        except (ConfigError, StorageError) as error:
            if isinstance(error, StorageError) and isinstance(error.__cause__, OSError):
                raise
            folder = str(self.output).removesuffix(self.output.name).rstrip("/")
            raise type(error)(str(error).replace(str(self._scratch), folder)) from error

    def _fetch_parts(self, objects: Mapping[str, RemotePath]) -> None:
        """Chunks that are not whole come too, and zeros for those that are gone, as reading a part tells."""
        for part, chunks in _chunks_of(objects.values()).items():
            is_set_aside = any(path.name.endswith(DAMAGED) for path in chunks.values())
            with (self._folder / f"{part}{DAMAGED if is_set_aside else ''}").open("wb") as file:
                for start, content in zip(chunks, _read_ahead(chunks.values()), strict=True):
                    file.seek(start)
                    file.write(content)
                self._put_bytes[part] = file.tell()

    def _is_left_over(self) -> bool:
        """Whether parts without settings are what versions before left of a journal that they removed.

        They removed it, its settings first, when the output was there that it could not have replaced.
        """
        said = Beginning.load(self._folder)
        return self.output.exists() and not (said.extends or said.replaces)

    def _fetch_sidecar(self) -> None:
        if needs_sidecar(self.file):
            self._fetch(self.output.beside(sidecar_path(self.file).name))
            if has_errors(self.output):
                self._fetch(errors_path(self.output))

    def _fetch(self, path: RemotePath) -> None:
        if path.exists():
            path.download(self._scratch / path.name)

    def _objects(self) -> list[RemotePath]:
        return self.output.siblings(f"{self._folder.name}/")

    def _own_objects(self) -> list[RemotePath]:
        """Those of the journal; a `ConfigError` if there are others under its name."""
        objects = self._objects()
        for path in objects:
            if not _is_ours(path):
                raise ConfigError(
                    f"{path} is in the way: no run of marsinfer put it there; move it away and run again"
                )
        return objects

    def _put(self, name: str, put: Callable[[RemotePath], None]) -> None:
        with self._failures_told("cannot be written", f"; {KEPT}"):
            self._check()
            put(self.output.beside(f"{self._folder.name}/{name}"))

    def _failures_told(self, what: str, remedy: str = "") -> AbstractContextManager[None]:
        return told(f"{self.output} {what}", remedy)


def _is_journal(names: Iterable[str]) -> bool:
    """Whether objects of these names are answers that a run left, and not the rest of a removal."""
    names = set(names)
    return REMOVED not in names and any(map(_CHUNK.fullmatch, names))


def _chunks_of(objects: Iterable[RemotePath]) -> dict[str, dict[int, RemotePath]]:
    """The chunks of each part by where they begin, in order; of two that were being renamed the new one."""
    found: dict[str, dict[int, RemotePath]] = {}
    for path in sorted(objects, key=lambda path: path.name):
        if match := _CHUNK.fullmatch(path.name):
            found.setdefault(match[1], {})[int(match[2])] = path
    return found


def _is_ours(path: RemotePath) -> bool:
    return path.name in (STATE_FILE, REMOVED) or _CHUNK.fullmatch(path.name) is not None


def _create(chunk: bytes, path: RemotePath) -> None:
    if not path.create(chunk):
        raise LockedError(f"another run has written {path}; this run has ended")


def _read_ahead(paths: Iterable[RemotePath]) -> Iterator[bytes]:
    """The contents of all objects in order, a few at a time."""
    paths = iter(paths)
    with ThreadPoolExecutor(AT_ONCE) as pool:
        while some := list(islice(paths, AT_ONCE)):
            yield from pool.map(RemotePath.read_bytes, some)


@contextmanager
def local_copy(output: str | Path) -> Iterator[Path]:
    """A local output itself, or a copy of a remote one, with what a resumed run goes on from beside it."""
    place = output_place(output)
    if not isinstance(place, RemotePath):
        yield place
        return
    with closing(Mirror(place, lambda: None)) as mirror:
        mirror.fetch()
        with mirror.named_as_given():
            yield mirror.file
