"""examples/fetch.py against a local server, and the commands of examples/README.md on what it fetches."""

from __future__ import annotations

import hashlib
import importlib
import io
import json
import shlex
import shutil
import socket
import sys
import zipfile
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pyarrow.parquet as pq
import pytest
from served import shell
from shown_commands import blocks

from marsinfer_cli.app import run

CHECKOUT = Path(__file__).parents[1]
sys.path.append(str(CHECKOUT / "examples"))
fetching = importlib.import_module("fetch")

LEASE = "The tenant pays 900 euros a month. The laws of Ireland govern this lease."
CUAD = {
    "data": [
        {
            "title": title,
            "paragraphs": [
                {
                    "context": text,
                    "qas": [
                        {"id": f"{title}__Parties", "answers": [{"text": "The tenant"}]},
                        {"id": f"{title}__Governing Law", "answers": [{"text": law}] if law else []},
                    ],
                }
            ],
        }
        for title, text, law in (
            ("LEASE", LEASE, "The laws of Ireland govern this lease."),
            ("GIFT", "A dog is given away.", None),
        )
    ]
}


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *arguments):
        pass


@pytest.fixture
def world(tmp_path, monkeypatch):
    """{kind: sources} on a local server that holds small files, and another folder as the current one."""
    (tmp_path / "served").mkdir()
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as files:
        files.writestr("CUADv1.json", json.dumps(CUAD))
    held = {
        "data.zip": archive.getvalue(),
        "alice.txt": b"Alice fell. " * 9,
        "eden.txt": b"Of man\xb4s fall. " * 9,
    }
    for name, content in held.items():
        (tmp_path / "served" / name).write_bytes(content)
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(tmp_path / "served")))
    Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    sources = [
        fetching.Source(
            f"http://127.0.0.1:{server.server_port}/{name}", len(content), hashlib.sha256(content).hexdigest()
        )
        for name, content in held.items()
    ]
    yield {"contracts": tuple(sources[:1]), "books": tuple(sources[1:])}
    server.shutdown()
    server.server_close()


def test_contracts_and_books_are_written_once(world, tmp_path, capsys):
    for _ in range(2):  # the second time without a file to be fetched
        assert fetching.main(["contracts", "demo/cuad.parquet"], world) == 0
        assert fetching.main(["books", "demo/books"], world) == 0
        shutil.rmtree(tmp_path / "served", ignore_errors=True)
    assert capsys.readouterr() == ("demo/cuad.parquet\ndemo/books\n" * 2, "")
    assert pq.read_table("demo/cuad.parquet").to_pylist() == [
        {"id": "LEASE", "text": LEASE, "law_clause": "The laws of Ireland govern this lease."},
        {"id": "GIFT", "text": "A dog is given away.", "law_clause": None},
    ]
    assert Path("demo/books/eden.txt").read_text("utf-8") == "Of man\ufffds fall. " * 9
    assert sorted(path.name for path in Path("demo").rglob("*")) == [
        "alice.txt",
        "books",
        "cuad.parquet",
        "eden.txt",
    ]


def test_what_cannot_be_fetched_or_has_changed_is_told_in_one_line_and_not_written(world, tmp_path, capsys):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        closed = f"http://127.0.0.1:{unused.getsockname()[1]}/data.zip"
    for content in (
        b"changed",
        world["contracts"][0].size * b"x",
        world["contracts"][0].size * b"x" + b"more",
    ):
        (tmp_path / "served" / "data.zip").write_bytes(content)
        assert fetching.main(["contracts", "demo/cuad.parquet"], world) == 1
        read = min(len(content), world["contracts"][0].size + 1)
        url = world["contracts"][0].url
        told = (
            f"fetch.py: {url} is not the file that was published: its first {read:,} bytes have the SHA-256 "
        )
        out, error = capsys.readouterr()
        assert (out, error.startswith(told), error.count("\n")) == ("", True, 1)
    for url, cause in (
        (closed, "[Errno 111] Connection refused"),
        (f"{world['books'][0].url}x", "HTTP Error 404"),
    ):
        gone = fetching.Source(url, 1, "")
        assert fetching.main(["contracts", "demo/cuad.parquet"], {"contracts": (gone,)}) == 1
        out, error = capsys.readouterr()
        assert error.startswith(f"fetch.py: cannot fetch {url}: ")
        assert (out, error.partition(f"{url}: ")[2].startswith(cause), error.count("\n")) == ("", True, 1)
    assert not Path("demo").exists()
    assert (fetching.main(["films", "demo"]), fetching.main([])) == (2, 2)
    assert capsys.readouterr().err == "usage: fetch.py contracts|books PATH\n" * 2


@pytest.mark.slow
def test_the_commands_on_fetched_documents_run(world, monkeypatch, sharp_model_folder, capfd):
    monkeypatch.setenv("MARSINFER_MAX_NEW_TOKENS", "16")
    shutil.copytree(CHECKOUT / "examples" / "contracts", "examples/contracts")
    shown = [block.text for block in blocks(CHECKOUT / "examples" / "README.md") if "fetch.py" in block.text]
    lines = [line for text in shown for line in text.splitlines()]
    for line in lines:
        program, *words = shlex.split(line.replace("$MODEL", str(sharp_model_folder)))
        if words[0] == "examples/fetch.py":
            assert fetching.main(words[1:], world) == 0
        elif program == "python":
            done = shell(sys.executable, *words, PYTHONPATH=str(CHECKOUT))
            assert done.returncode == 0, done.stderr
        else:
            assert run(words) == 0, (line, capfd.readouterr())
    told = pq.read_table("demo/cuad-answers.parquet").to_pylist()
    assert [(row["id"], row["law_clause"] is None) for row in told] == [("LEASE", False), ("GIFT", True)]
    assert pq.read_table("demo/summaries.parquet")["status"].to_pylist() == ["ok", "ok"]
    assert len(lines) == 5
