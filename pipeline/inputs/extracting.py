"""The text of one PDF, DOCX or HTML file: a program of its own, as a file may be made to hang it.

`python extracting.py FORMAT LONGEST CPU_S MEMORY` reads the file from standard input and writes JSON: `text`,
of at most LONGEST characters, and of PDF `pages` and `pages_without_text`, blank ones not counted; or `kind`
and `fault` for a file that has no text to read. It may take so many seconds of a processor and so many bytes
of memory. What a library raises ends it. It imports nothing of ours, as that would take longer than most
files.
"""

from __future__ import annotations

import io
import json
import re
import sys
import zipfile
from collections.abc import Iterator
from typing import Any

BETWEEN = " | "  # the cells of a table's row
TABLE_CELLS = 3  # a line of fewer, far apart on a page, may be of two columns of prose
TABLE_ROWS = 2
GAP = re.compile(r" {3,}")
KEPT = "\ue000"  # for a while in the place of a space that is not to be taken away
PAINTS = (b"INLINE IMAGE", b"sh", b"S", b"s", b"f", b"F", b"f*", b"B", b"B*", b"b", b"b*")  # in PDF
MOST_NESTED = 8  # forms within forms
UNSEEN = ("script", "style", "noscript", "template", "head", "svg")
BLOCKS = (
    *(
        "p",
        "div",
        "section",
        "article",
        "main",
        "header",
        "footer",
        "aside",
        "nav",
        "ul",
        "ol",
        "li",
        "dl",
        "dt",
    ),
    *(
        "dd",
        "blockquote",
        "pre",
        "figure",
        "form",
        "h1",
        "h2",
        "h3",
        "h4",
        "h5",
        "h6",
        "title",
        "caption",
        "hr",
    ),
)


def of_pdf(content: bytes, longest: int) -> dict[str, Any]:
    """Page by page, each below a line with its number; pages with tables as they are laid out."""
    from pypdf import PdfReader

    reader = PdfReader(io.BytesIO(content))
    if reader.is_encrypted and not reader.decrypt(""):
        return {"kind": "encrypted", "fault": "is encrypted; save it without a password"}
    pages, without, has_text = [], 0, False
    for number, page in enumerate(reader.pages, start=1):
        text = page.extract_text().strip()
        has_text = has_text or bool(text)
        is_blank = not text and not _paints(page)
        without += not text and not is_blank
        instead = "blank" if is_blank else "no text"
        pages.append(
            f"[page {number}]\n{_as_laid_out(page) or text}" if text else f"[page {number}: {instead}]"
        )
        if sum(map(len, pages)) > longest:
            break
    if not has_text:
        scans = "as scans have none; recognise their text first" if without else "and they are blank"
        fault = f"has no text on any of its {len(pages)} pages, {scans}"
        return {"kind": "no_text", "fault": fault, "pages_without_text": without}
    return {"text": "\n\n".join(pages), "pages": len(pages), "pages_without_text": without}


def _paints(page: Any) -> bool:
    """Whether a page shows an image or a drawing."""
    from pypdf.generic import ContentStream

    content = page.get_contents()
    waiting = [] if content is None else [(content, page, 0)]
    while waiting:
        content, owner, depth = waiting.pop()
        objects = _within(_within(owner, "/Resources"), "/XObject")
        for operands, operator in ContentStream(content, page.pdf).operations:
            drawn = _within(objects, operands[0]) if operator == b"Do" and operands else {}
            if operator in PAINTS or drawn.get("/Subtype") == "/Image":
                return True
            if drawn and depth < MOST_NESTED:
                waiting.append((drawn, drawn, depth + 1))
    return False


def _within(holder: Any, name: Any) -> Any:
    """The object of this name in a dictionary of a PDF; an empty one where there is none."""
    found = holder.get(name)
    return {} if found is None else found.get_object()


def _as_laid_out(page: Any) -> str | None:
    """The text of a page with a table, of which the rows are lines; None where it seems to have none."""
    laid_out = page.extract_text(extraction_mode="layout", layout_mode_space_vertically=False)
    lines = [GAP.split(line.strip()) for line in laid_out.splitlines()]
    run = most = 0
    for cells in lines:
        run = run + 1 if len(cells) >= TABLE_CELLS else 0
        most = max(most, run)
    return "\n".join(BETWEEN.join(cells) for cells in lines) if most >= TABLE_ROWS else None


def of_docx(content: bytes, longest: int) -> dict[str, Any]:
    """Paragraphs and tables in their order; headings as in Markdown."""
    from docx import Document

    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        size = sum(entry.file_size for entry in archive.infolist() if entry.filename.endswith(".xml"))
    if size > longest:
        return {"kind": "long_line", "fault": f"unpacks to {size:,} bytes, more than {longest:,}"}
    blocks = Document(io.BytesIO(content)).iter_inner_content()
    return {"text": "\n\n".join(filter(str.strip, map(_block, blocks)))}


def _block(block: Any) -> str:
    if hasattr(block, "rows"):
        return "\n".join(BETWEEN.join(_cells(row)) for row in block.rows)
    style = block.style.name if block.style is not None else ""
    level = re.fullmatch(r"Heading (\d)", style)
    return f"{'#' * int(level[1])} {block.text}" if level and block.text.strip() else block.text


def _cells(row: Any) -> Iterator[str]:
    """The texts of a row's cells, each once, however many columns it goes over."""
    seen = None
    for cell in row.cells:
        if cell._tc is not seen:
            yield " ".join(cell.text.split())
        seen = cell._tc


def of_html(content: bytes, longest: int) -> dict[str, Any]:
    """What a browser would show, a block a line."""
    from bs4 import BeautifulSoup

    soup = BeautifulSoup(content, "lxml")
    for tag in soup(UNSEEN):
        tag.decompose()
    for string in soup.find_all(string=True):
        is_kept = string.find_parent("pre") is not None
        string.replace_with(string.replace(" ", KEPT) if is_kept else re.sub(r"\s+", " ", string))
    for tag in soup("br"):
        tag.replace_with("\n")
    for table in reversed(soup("table")):  # those within others first
        rows = [[cell.get_text(" ", strip=True) for cell in row(["td", "th"])] for row in table("tr")]
        table.replace_with("\n\n" + "\n".join(BETWEEN.join(cells) for cells in rows) + "\n\n")
    for tag in soup(BLOCKS):
        tag.insert_before("\n")
        tag.insert_after("\n")
    text = "\n".join(line.strip() for line in soup.get_text().splitlines())
    return {"text": re.sub(r"\n{3,}", "\n\n", text).strip().replace(KEPT, " ")}


FORMATS = {"pdf": of_pdf, "docx": of_docx, "html": of_html}


def _bound(cpu_s: int, memory: int) -> None:
    """Let the system end this process where it takes more; some systems know no bounds."""
    try:
        import resource
    except ImportError:
        return
    resource.setrlimit(resource.RLIMIT_CPU, (cpu_s, cpu_s + 1))
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))


def main() -> None:
    """Write what is found to standard output."""
    format, longest, cpu_s, memory = sys.argv[1], *map(int, sys.argv[2:])
    _bound(cpu_s, memory)
    found = FORMATS[format](sys.stdin.buffer.read(), longest)
    if len(found.get("text", "")) > longest:
        found = {"kind": "long_line", "fault": f"has more than {longest:,} characters of text"}
    elif "text" in found and not found["text"].strip():
        found = {"kind": "no_text", "fault": "has no text"}
    sys.stdout.write(json.dumps(found))


if __name__ == "__main__":
    main()
