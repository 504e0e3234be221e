"""Where a job's inputs and output are: a folder on disk, or a bucket of object storage."""

from __future__ import annotations

import io
import json
import resource
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.storage.causes import NetworkError
from pipeline.storage.remote import RemotePath

Rows = list[dict[str, Any]]
SCHEMA = pa.schema([("id", pa.string()), ("text", pa.string()), ("n", pa.int64())])
TEXT = SCHEMA.get_field_index("text")
REFUSED = 2  # the number of a request that asks for more than an answer
GROUP_ROWS = 2  # of a Parquet file, so that damage leaves other rows of it readable


class Place(ABC):
    """Files by their names, which are paths below the place; `suffix` is that of inputs and output.

    Of what its rows are, the command line says the words `asked`.
    """

    suffix: str
    root: str  # for the command line
    lock: str  # the name of a run's lock
    asked: tuple[str, ...] = ("--question", "what?", "--id-column", "id")

    @abstractmethod
    def names(self) -> list[str]:
        """Of all files, sorted."""

    @abstractmethod
    def read(self, name: str) -> bytes: ...

    @abstractmethod
    def write(self, name: str, data: bytes) -> None: ...

    @abstractmethod
    def remove(self, name: str) -> None: ...

    @abstractmethod
    def unreadable(self, name: str) -> Any:
        """A context in which the file is there and cannot be opened."""

    @abstractmethod
    def away(self) -> Any:
        """A context in which nothing can be stored; entered in the middle of a run, too."""

    @property
    def output(self) -> str:
        return f"out{self.suffix}"

    @property
    def journal(self) -> str:
        return f".{self.output}.journal"

    @property
    def dropped(self) -> str:
        return f".{self.output}.dropped.parquet"

    @property
    def published(self) -> list[str]:
        """What a run that comes to its end may leave for its output."""
        return [self.output, *([f"{self.output}.run.json"] if self.suffix == ".jsonl" else [])]

    def input(self, name: str) -> str:
        return f"in/{name}{self.suffix}"

    def contents(self) -> dict[str, bytes]:
        return {name: self.read(name) for name in self.names()}

    def parts(self) -> list[str]:
        """What the journal's answers are in."""
        return [name for name in self.names() if name.startswith(f"{self.journal}/part-")]

    def pack(self, rows: Rows) -> bytes:
        """The content of an input."""
        if self.suffix == ".jsonl":
            return "".join(json.dumps(row) + "\n" for row in rows).encode()
        sink = io.BytesIO()
        table = pa.Table.from_pylist(rows, SCHEMA)
        pq.write_table(table, sink, row_group_size=GROUP_ROWS, compression="zstd")
        return sink.getvalue()

    def unpack(self, name: str) -> Rows:
        """The rows of an output, or of those beside it."""
        data = self.read(name)
        if name.endswith(".jsonl"):
            return [json.loads(line) for line in data.splitlines()]
        return self.flat(pq.read_table(io.BytesIO(data)).to_pylist())

    def flat(self, rows: Rows) -> Rows:
        """Rows of an output or of its journal, with statistics as columns."""
        return rows

    def damaged(self, data: bytes) -> bytes:
        """An input whose second row, in Parquet with the others of its row group, is hurt."""
        if self.suffix == ".jsonl":
            at = data.index(b"row 1: ") - 10
        else:
            at = pq.read_metadata(io.BytesIO(data)).row_group(0).column(TEXT).data_page_offset
        return data[:at] + bytes(byte ^ 0xA5 for byte in data[at : at + 30]) + data[at + 30 :]


class Folder(Place):
    """A folder on disk."""

    def __init__(self, path: Path, suffix: str) -> None:
        self.path, self.root, self.suffix = path, str(path), suffix
        self.lock = f".{self.output}.lock"

    def names(self) -> list[str]:
        files = (path for path in self.path.rglob("*") if path.is_file())
        return sorted(str(path.relative_to(self.path)) for path in files)

    def read(self, name: str) -> bytes:
        return (self.path / name).read_bytes()

    def write(self, name: str, data: bytes) -> None:
        (self.path / name).parent.mkdir(parents=True, exist_ok=True)
        (self.path / name).write_bytes(data)

    def remove(self, name: str) -> None:
        (self.path / name).unlink()

    @contextmanager
    def unreadable(self, name: str) -> Iterator[None]:
        real = Path.open

        def opened(path: Path, *mode: Any, **named: Any) -> Any:
            if path == self.path / name:
                raise PermissionError(13, "Permission denied")
            return real(path, *mode, **named)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Path, "open", opened)
            yield

    @contextmanager
    def away(self) -> Iterator[None]:
        """No file may grow, as on a disk that is full."""
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


class Chosen(Folder):
    """A folder whose output has some columns alone."""

    asked = (*Folder.asked, "--columns", "answer,stats")

    def flat(self, rows: Rows) -> Rows:
        return [{**row, **row["stats"]} for row in rows]


class Requests(Folder):
    """A folder of batch files, of which one row is refused, and then stands in a file of its own."""

    asked = ()
    errors = "out.errors.jsonl"

    def __init__(self, path: Path) -> None:
        super().__init__(path, ".jsonl")

    @property
    def published(self) -> list[str]:
        return [*super().published, self.errors]

    def pack(self, rows: Rows) -> bytes:
        return super().pack(list(map(_request, rows)))

    def unpack(self, name: str) -> Rows:
        if name != self.output:
            return super().unpack(name)
        names = [each for each in (name, self.errors) if each in self.names()]
        return sorted(
            (_told(line) for each in names for line in super(Requests, self).unpack(each)),
            key=lambda row: row["row"],
        )


def _request(row: dict[str, Any]) -> dict[str, Any]:
    body = {"messages": [{"role": "user", "content": row["text"]}], "n": 2 if row["n"] == REFUSED else 1}
    address = {"method": "POST", "url": "/v1/chat/completions"}
    return {"custom_id": row["id"], **address, "body": body, "n": row["n"]}


def _told(line: dict[str, Any]) -> dict[str, Any]:
    """The columns of a line of the Batch API."""
    body = line["response"]["body"]
    answer = body["choices"][0]["message"]["content"] if "choices" in body else None
    return {"id": line["custom_id"], "answer": answer, **line["marsinfer"]}


class Bucket(Place):
    """A bucket of Parquet files."""

    suffix = ".parquet"

    def __init__(self, url: str, server: Any) -> None:
        import s3fs

        self.root, self._server = url, server
        self.lock = f".{self.output}.lock-000007"
        self._fs = s3fs.S3FileSystem(use_listings_cache=False)

    def names(self) -> list[str]:
        start = self.root.removeprefix("s3://") + "/"
        return sorted(key.removeprefix(start) for key in self._fs.find(start))

    def read(self, name: str) -> bytes:
        return self._fs.cat_file(f"{self.root}/{name}")

    def write(self, name: str, data: bytes) -> None:
        self._fs.pipe_file(f"{self.root}/{name}", data)

    def remove(self, name: str) -> None:
        self._fs.rm_file(f"{self.root}/{name}")

    @contextmanager
    def unreadable(self, name: str) -> Iterator[None]:
        real = RemotePath.open

        def opened(path: RemotePath, *mode: Any) -> Any:
            if path.shown == f"{self.root}/{name}":
                raise NetworkError(5, "Service Unavailable")
            return real(path, *mode)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(RemotePath, "open", opened)
            yield

    @contextmanager
    def away(self) -> Iterator[None]:
        """The server does not answer."""
        self._server.stop()
        try:
            yield
        finally:
            self._server.start()
