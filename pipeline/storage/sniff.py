"""What the first bytes of a file say against its name."""

from __future__ import annotations

import re

HEAD_BYTES = 4096

ARROW_FILE = b"ARROW1"  # with a footer, as against a stream
LFS = b"version https://git-lfs.github.com/spec/"

MAGICS = {
    b"PAR1": "Parquet",
    ARROW_FILE: "Arrow",
    b"\xff\xff\xff\xff": "Arrow",
    b"\x1f\x8b": "compressed with gzip",
    b"\x28\xb5\x2f\xfd": "compressed with zstd",
    b"PK\x03\x04": "a ZIP archive or a workbook",
}
LINES = {"jsonl": "plain JSON lines", "csv": "plain CSV"}
CR_ENDS = "ends its lines with carriage returns alone; tr '\\r' '\\n' converts it"

_UTF_16 = re.compile(rb"\xff\xfe|\xfe\xff|[\x21-\x7e]\x00|\x00{1,3}[\x21-\x7e]\x00")
_ARRAY = re.compile(rb"(?:\xef\xbb\xbf)?\s*\[\s*\{")
_SPREAD = re.compile(rb"(?:\xef\xbb\xbf)?\s*\{\s*\n\s*\"")
_CR_ENDS = re.compile(rb"\}[ \t]*\r\s*\{")


def kind_of(head: bytes) -> str | None:
    """What bytes are that are no lines of text; None if they may be such."""
    return next((kind for magic, kind in MAGICS.items() if head.startswith(magic)), None)


def misnamed(head: bytes, format: str, compression: str | None) -> str | None:
    """What is wrong with a file that begins so, and what helps; None if it may be what its name says."""
    if head.startswith(LFS):
        return "is a Git LFS pointer, not the file; git lfs pull fetches that"
    if format not in LINES or compression is not None:
        return None
    kind = kind_of(head)
    if kind is not None:
        return f"is {kind}, not {LINES[format]}, as its name says; rename it"
    if _UTF_16.match(head):
        return "is not UTF-8 but UTF-16 or UTF-32; iconv -f UTF-16 -t UTF-8 converts it"
    return _no_lines_of_json(head) if format == "jsonl" else _no_csv(head)


def _no_csv(head: bytes) -> str | None:
    if b"\r" in head and b"\n" not in head:
        return CR_ENDS
    return None


def _no_lines_of_json(head: bytes) -> str | None:
    if _ARRAY.match(head):
        return "is one JSON array, not a JSON object a line; jq -c '.[]' writes it so"
    if _SPREAD.match(head):
        return "has JSON objects over several lines, not one a line; jq -c . writes it so"
    if b"\n" not in head and _CR_ENDS.search(head):
        return CR_ENDS
    return None
