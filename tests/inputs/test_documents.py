"""Folders of PDF, DOCX and HTML, written through libraries: texts, pages, tables, and bad files."""

import io
import json
import os
import time

import docx
import pyarrow.parquet as pq
import pypdf
import pytest
from PIL import Image
from reportlab.lib.pagesizes import A4
from reportlab.lib.utils import ImageReader
from reportlab.pdfgen import canvas

from pipeline.errors import ConfigError
from pipeline.inputs import documents
from pipeline.inputs.columns import Columns
from pipeline.inputs.source import open_source

TABLE = [["Party", "Share", "Since"], ["Acme", "60 %", "2019"], ["Bell", "40 %", "2021"]]
AS_LINES = "Party | Share | Since\nAcme | 60 % | 2019\nBell | 40 % | 2021"


SCAN = "scan"  # for a page that is an image alone


def pdf(*pages):
    """A PDF of pages, each of lines of text, of the rows of a table, or a scan."""
    sink = io.BytesIO()
    drawn = canvas.Canvas(sink, pagesize=A4)
    for lines in pages:
        if lines == SCAN:
            drawn.drawImage(ImageReader(Image.new("L", (8, 8))), 0, 0, *A4)
            lines = []
        for n, line in enumerate(lines):
            for m, cell in enumerate([line] if isinstance(line, str) else line):
                drawn.drawString(72 + 150 * m, 750 - 20 * n, cell)
        drawn.showPage()
    drawn.save()
    return sink.getvalue()


def word():
    made = docx.Document()
    made.add_heading("Contract", 1)
    made.add_paragraph("Between two parties.")
    table = made.add_table(rows=3, cols=3)
    for row, cells in enumerate(TABLE):
        for column, cell in enumerate(cells):
            table.cell(row, column).text = cell
    made.add_paragraph("The end.")
    sink = io.BytesIO()
    made.save(sink)
    return sink.getvalue()


def html():
    rows = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in TABLE)
    return (
        "<html><head><title>no</title><style>p {}</style></head><body><h1>Contract</h1><script>no()</script>"
        f"<p>Between\n   two <b>parties</b>,<br>and &eacute;.</p><table>{rows}</table>"
        "<pre>a\n  b</pre></body></html>"
    ).encode()


@pytest.fixture
def read(tmp_path):
    def read(name, content, **columns):
        (tmp_path / name).write_bytes(content)
        (record,) = open_source([tmp_path / name], Columns(**columns))
        return record

    return read


def test_pages_are_numbered_and_counted(read):
    record = read("a.pdf", pdf(["First page."], SCAN, ["Third page.", "Its end."], []))
    assert record.text.split("\n\n") == [
        "[page 1]\nFirst page.",
        "[page 2: no text]",
        "[page 3]\nThird page.\nIts end.",
        "[page 4: blank]",
    ]
    assert record.source.id == "a.pdf"
    assert record.source.passthrough.to_pylist() == [{"pages": 4, "pages_without_text": 1}]


DRAWINGS = {
    "an image": (lambda page: page.drawImage(ImageReader(Image.new("L", (8, 8))), 0, 0), 1),
    "an inline image": (lambda page: page.drawInlineImage(Image.new("L", (8, 8)), 0, 0), 1),
    "a line": (lambda page: page.line(0, 0, 99, 99), 1),
    "a filled shape": (lambda page: page.circle(99, 99, 9, stroke=0, fill=1), 1),
    "an image in a form": (lambda page: form(page, lambda: page.line(0, 0, 9, 9)), 1),
    "an empty form": (lambda page: form(page, lambda: None), 0),
    "white space": (lambda page: page.drawString(9, 9, "   "), 0),
    "a state that is set": (lambda page: page.setLineWidth(3), 0),
    "a path that clips": (lambda page: page.clipPath(page.beginPath(), stroke=0), 0),
}


def form(page, draw):
    page.beginForm("inner")
    draw()
    page.endForm()
    page.doForm("inner")


@pytest.mark.parametrize("drawn", DRAWINGS)
def test_a_page_is_blank_or_shows_something(read, drawn):
    draw, without = DRAWINGS[drawn]
    sink = io.BytesIO()
    page = canvas.Canvas(sink, pagesize=A4)
    page.drawString(72, 750, "Text.")
    page.showPage()
    draw(page)
    page.showPage()
    page.save()
    record = read("a.pdf", sink.getvalue())
    assert record.source.passthrough["pages_without_text"].to_pylist() == [without]
    assert record.text.endswith("[page 2: no text]" if without else "[page 2: blank]")


@pytest.mark.parametrize(
    ("name", "made"), [("a.pdf", lambda: pdf(TABLE)), ("a.docx", word), ("a.html", html)]
)
def test_rows_of_tables_are_lines(read, name, made):
    assert AS_LINES in read(name, made()).text


def test_two_columns_of_prose_are_read_as_they_are_written(read):
    text = read("a.pdf", pdf([["left one", "right one"], ["left two", "right two"]])).text
    assert "|" not in text


def test_paragraphs_and_tables_of_word_keep_their_order(read):
    assert read("a.docx", word()).text == f"# Contract\n\nBetween two parties.\n\n{AS_LINES}\n\nThe end."


def test_html_is_what_is_seen(read):
    text = read("a.htm", html()).text
    assert text.startswith("Contract\n\nBetween two parties,\nand é.\n")
    assert text.endswith(f"{AS_LINES}\n\na\n  b")


def encrypted():
    writer = pypdf.PdfWriter(clone_from=io.BytesIO(pdf(["Secret."])))
    writer.encrypt("password", algorithm="RC4-128")
    sink = io.BytesIO()
    writer.write(sink)
    return sink.getvalue()


@pytest.mark.parametrize(
    ("name", "made", "kind", "message"),
    [
        ("a.pdf", encrypted, "encrypted", "a.pdf is encrypted; save it without a password"),
        (
            "a.pdf",
            lambda: pdf(SCAN, []),
            "no_text",
            "a.pdf has no text on any of its 2 pages, as scans have none",
        ),
        ("a.pdf", lambda: pdf([]), "no_text", "a.pdf has no text on any of its 1 pages, and they are blank"),
        ("a.pdf", lambda: b"%PDF-1.7 nothing", "unreadable", "a.pdf cannot be read as PDF: pypdf"),
        ("a.pdf", lambda: pdf(["x" * 50] * 20)[:700], "unreadable", "a.pdf cannot be read as PDF: pypdf"),
        (
            "a.docx",
            lambda: b"PK\x03\x04 nothing",
            "unreadable",
            "a.docx cannot be read as DOCX: zipfile.BadZipFile",
        ),
        ("a.docx", lambda: word()[:3000], "unreadable", "a.docx cannot be read as DOCX: zipfile.BadZipFile"),
        ("a.html", lambda: b"<p> <script>x</script>", "no_text", "a.html has no text"),
    ],
    ids=["encrypted", "scanned", "blank", "no_pdf", "cut_pdf", "no_zip", "cut_docx", "empty_html"],
)
def test_files_without_a_text_are_error_rows(read, name, made, kind, message):
    record = read(name, made())
    assert (record.kind, record.message[: len(message)]) == (kind, message)


def test_what_unpacks_beyond_the_bound_is_passed_over(read):
    record = read("a.docx", word(), longest_line=30_000)
    assert record.kind == "long_line"
    assert read("b.pdf", pdf(["x"]), longest_line=100).kind == "long_line"


def test_a_file_that_takes_too_long_or_too_much_is_an_error_row(read, monkeypatch, tmp_path):
    program = tmp_path / "program.py"
    source = documents.PROGRAM.read_text().replace("sys.stdin.buffer.read()", "b'<p>x'")
    program.write_text(source.replace("    from bs4", "    while True: pass\n    from bs4"))
    monkeypatch.setattr(documents, "PROGRAM", program)
    monkeypatch.setattr(documents, "CPU_S", 1)
    began = time.monotonic()
    assert read("a.html", b"x").message == "a.html takes more than 1 s to read"
    assert time.monotonic() - began < 600
    program.write_text(source.replace("    from bs4", "    bytearray(1 << 40)\n    from bs4"))
    assert read("b.html", b"x").message == "b.html cannot be read as HTML: MemoryError"


def test_a_signal_to_the_runs_group_makes_no_error_row(read, monkeypatch, tmp_path):
    program = tmp_path / "program.py"
    program.write_text("import json, os; print(json.dumps({'text': str(os.getpgrp())}))")
    monkeypatch.setattr(documents, "PROGRAM", program)
    assert int(read("a.html", b"x").text) != os.getpgrp()


def test_without_the_libraries_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "NEEDED", {"pdf": ("no_such_library",)})
    (tmp_path / "a.pdf").write_bytes(pdf(["x"]))
    with pytest.raises(ConfigError, match=r"pip install 'marsinfer\[documents\]'"):
        open_source([tmp_path / "a.pdf"], Columns())


def test_a_folder_is_answered_into_parquet(call, capfd, tmp_path):
    folder, output = tmp_path / "in" / "year=2024", tmp_path / "out.parquet"
    folder.mkdir(parents=True)
    contents = {
        "a.pdf": pdf(["One."], ["Two."]),
        "b.docx": word(),
        "c.html": html(),
        "d.pdf": b"no",
        "e.txt": b"t",
    }
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    assert call(tmp_path / "in", output, "--question", "Who?", "--max-new-tokens", 2) == 0
    rows = pq.read_table(output).to_pylist()
    assert [row["id"] for row in rows] == [f"year=2024/{name}" for name in contents]
    assert [row["status"] for row in rows] == ["ok", "ok", "ok", "error", "ok"]
    assert [row["pages"] for row in rows] == [2, None, None, None, None]
    assert [row["pages_without_text"] for row in rows] == [0, None, None, None, None]
    assert [row["year"] for row in rows][:3] == ["2024"] * 3
    assert "no text" not in capfd.readouterr().err
    assert call(tmp_path / "in" / "*" / "*.docx", tmp_path / "b.parquet", "--question", "Who?") == 0


def test_a_run_tells_how_many_pages_may_be_scans(call, capfd, tmp_path):
    folder, output = tmp_path / "in", tmp_path / "out.parquet"
    folder.mkdir()
    (folder / "a.pdf").write_bytes(pdf(["One."], SCAN, [], SCAN))
    (folder / "b.pdf").write_bytes(pdf(SCAN))
    (folder / "c.pdf").write_bytes(pdf(["Whole."]))
    words = folder, output, "--question", "Who?", "--max-new-tokens", 2
    told = "3 pages of 2 PDF files have no text"
    assert call(*words, "--dry-run") == 0
    assert told in "".join(capfd.readouterr())
    assert call(*words, "--json") == 0
    out, err = capfd.readouterr()
    assert json.loads(out)["pages_without_text"] == 3
    assert told in " ".join(err.split())
    assert call(*words, "--resume") == 0, "documents that are done are read, and told of, again"
    assert told in " ".join(capfd.readouterr().err.split())


def test_pages_without_text_are_those_of_the_last_reading(tmp_path):
    (tmp_path / "a.pdf").write_bytes(pdf(["One."], SCAN))
    source = open_source([tmp_path / "a.pdf"], Columns())
    assert source.scans_told() == []
    for _ in range(2):
        assert len(list(source)) == 1
        assert source.pages_without_text == 1
    assert source.scans_told()[0].startswith("1 page of 1 PDF file has no text")
