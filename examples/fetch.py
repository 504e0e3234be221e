"""Real documents for the examples, fetched when this runs, and compared with their checksums.

    python examples/fetch.py contracts demo/cuad.parquet    510 contracts of CUAD, 18 MB
    python examples/fetch.py books demo/books               three books, 0.8 MB

What is there already is kept. It ends with 1 and one line if something cannot be fetched or has changed.

CUAD: the Contract Understanding Atticus Dataset v1, The Atticus Project, CC BY 4.0 (arXiv 2103.06268).
The books are in the public domain.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import sys
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen

import pyarrow as pa
import pyarrow.parquet as pq

TIMEOUT_S = 60


@dataclass(frozen=True)
class Source:
    url: str
    size: int  # bytes
    sha256: str

    @property
    def name(self) -> str:
        return self.url.rpartition("/")[2]


class FetchError(Exception):
    """A source cannot be fetched, or is not what it was."""


CUAD = "https://raw.githubusercontent.com/TheAtticusProject/cuad/67faa0e6023b04fcaae6cc09497ab00e5d63a2a2"
BROTLI = "https://raw.githubusercontent.com/google/brotli/v1.2.0/tests/testdata"

SOURCES: Mapping[str, tuple[Source, ...]] = {
    "contracts": (
        Source(
            f"{CUAD}/data.zip",
            18_309_308,
            "f8161d18bea4e9c05e78fa6dda61c19c846fb8087ea969c172753bc2f45b999a",
        ),
    ),
    "books": (
        Source(  # Alice's Adventures in Wonderland
            f"{BROTLI}/alice29.txt",
            152_089,
            "7467306ee0feed4971260f3c87421154a05be571d944e9cb021a5713700c38f0",
        ),
        Source(  # As You Like It
            f"{BROTLI}/asyoulik.txt",
            125_179,
            "eaa3526fe53859f34ecdf255712f9ecf0b2c903451d4755b2edaa2e2599cb0fc",
        ),
        Source(  # Paradise Lost
            f"{BROTLI}/plrabn12.txt",
            481_861,
            "07e2e0b461af78c7c647cb53dab39de560198e16f799b4516eccf0fbd69f764c",
        ),
    ),
}


def fetch(source: Source) -> bytes:
    """What a source holds; FetchError if it cannot be had, or differs from what was published."""
    try:
        with urlopen(source.url, timeout=TIMEOUT_S) as answer:
            content = answer.read(source.size + 1)
    except (OSError, HTTPException) as error:
        cause = error.reason if type(error) is URLError else error
        raise FetchError(f"cannot fetch {source.url}: {cause}") from error
    found = hashlib.sha256(content).hexdigest()
    if found != source.sha256:
        raise FetchError(
            f"{source.url} is not the file that was published: its first {len(content):,} bytes have the "
            f"SHA-256 {found}, {source.size:,} bytes with {source.sha256} were expected"
        )
    return content


def write(path: Path, content: bytes) -> None:
    """Whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.part")
    unfinished.write_bytes(content)
    os.replace(unfinished, path)


def write_books(sources: tuple[Source, ...], folder: Path) -> None:
    for source in sources:
        if not (path := folder / source.name).exists():
            write(path, fetch(source).decode("utf-8", errors="replace").encode())


def write_contracts(sources: tuple[Source, ...], table: Path) -> None:
    if not table.exists():
        (source,) = sources
        with zipfile.ZipFile(io.BytesIO(fetch(source))) as archive:
            found = json.loads(archive.read("CUADv1.json"))
        rows = pa.Table.from_pylist(list(contracts(found)))
        written = io.BytesIO()
        pq.write_table(rows, written)
        write(table, written.getvalue())


def contracts(found: Mapping[str, Any]) -> Iterator[dict[str, str | None]]:
    """A row a contract, with the clause that experts marked as the one on the governing law."""
    for contract in found["data"]:
        marked = [
            answer["text"]
            for paragraph in contract["paragraphs"]
            for asked in paragraph["qas"]
            if asked["id"].endswith("__Governing Law")
            for answer in asked["answers"]
        ]
        yield {
            "id": contract["title"],
            "text": "\n".join(paragraph["context"] for paragraph in contract["paragraphs"]),
            "law_clause": " ".join(marked) or None,
        }


WRITERS: Mapping[str, Callable[[tuple[Source, ...], Path], None]] = {
    "contracts": write_contracts,
    "books": write_books,
}


def main(words: list[str], sources: Mapping[str, tuple[Source, ...]] = SOURCES) -> int:
    if len(words) != 2 or words[0] not in WRITERS:
        print(f"usage: fetch.py {'|'.join(WRITERS)} PATH", file=sys.stderr)
        return 2
    kind, path = words[0], Path(words[1])
    try:
        WRITERS[kind](sources[kind], path)
    except (FetchError, OSError) as error:
        print(f"fetch.py: {error}", file=sys.stderr)
        return 1
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
