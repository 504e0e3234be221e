"""What a journal survives: torn and damaged files, a full disk, a folder that goes."""

import errno
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from journal_runs import (
    answer,
    ask,
    finish,
    ids,
    killed,
    numbered,
    refusal,
    start,
    work,
)

from pipeline.errors import ConfigError, StorageError
from pipeline.outputs.chunks import HEADER, MAGIC, pack_chunk, scan_part
from pipeline.outputs.journal import journal_folder


def test_the_last_chunk_torn_anywhere_costs_that_chunk_only(tmp_path):
    path = tmp_path / "out.parquet"
    killed(path, numbered(3))
    (part,) = journal_folder(path).glob("part-*")
    whole = part.stat().st_size
    killed(path, numbered(6))
    second = part.with_name("part-0002")
    part.write_bytes(part.read_bytes() + second.read_bytes())
    second.unlink()
    content = part.read_bytes()
    cuts = [*range(whole, whole + 30), *range(whole + 30, len(content), 97), len(content) - 1]
    for cut in cuts:
        part.write_bytes(content[:cut])
        with start(path) as journal:
            assert journal.done_at_start == {"ok": 3}
            assert journal.notes == []
        assert part.read_bytes() == content[:cut]
    part.write_bytes(content)
    with start(path) as journal:
        assert journal.done_at_start == {"ok": 6}


def damaged(path, flip):
    """A stopped run of three batches of two rows, in one part, of whose second a byte is flipped."""
    with start(path, resume=False) as journal:
        for first in (0, 2, 4):
            work(journal, numbered(6)[first : first + 2])
    (part,) = journal_folder(path).glob("part-*")
    content = bytearray(part.read_bytes())
    second, third = content.index(MAGIC, 1), content.rindex(MAGIC)
    position = second + flip if flip >= 0 else third + flip
    content[position] ^= 0x10
    part.write_bytes(content)
    return part, bytes(content)


@pytest.mark.parametrize("flip", [0, 9, 15, 17, HEADER.size, 900, -30])
def test_what_stands_behind_a_damaged_batch_is_read(tmp_path, flip):
    path = tmp_path / "out.parquet"
    part, content = damaged(path, flip)
    with start(path) as journal:
        assert journal.done_at_start == {"ok": 4}
        assert journal.notes == [
            "the journal is damaged: 2 finished rows cannot be read and will be answered again; all else is "
            "kept, and the damaged file is now .out.parquet.journal/part-0001.damaged"
        ]
    assert part.with_name("part-0001.damaged").read_bytes() == content
    with start(path) as journal:
        assert (journal.done_at_start, journal.notes) == ({"ok": 4}, [])
    assert finish(path, numbered(6)) == ["id 2", "id 3"]
    assert ids(path) == numbered(6)


def test_no_memory_to_read_a_journal_is_no_damage(tmp_path, monkeypatch):
    path = tmp_path / "out.parquet"
    killed(path, numbered(3))
    (part,) = journal_folder(path).glob("part-*")
    content = part.read_bytes()

    def fail(source):
        raise pa.ArrowMemoryError("malloc of size 99 failed")

    with monkeypatch.context() as patch:
        patch.setattr(pa.ipc, "open_stream", fail)
        assert "Cannot allocate memory; the journal is intact" in refusal(path, StorageError)
    assert part.read_bytes() == content
    assert finish(path, numbered(3)) == []


def test_an_absurd_length_is_not_believed(tmp_path):
    path = tmp_path / "out.parquet"
    killed(path, numbered(3))
    (part,) = journal_folder(path).glob("part-*")
    content = part.read_bytes()
    part.write_bytes(content[:8] + b"\xff" * 8 + content[16:])
    with start(path) as journal:
        assert journal.done_at_start == {}


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"other": 1}', b"\xff", None])
def test_a_part_stands_without_the_settings(tmp_path, content):
    path = tmp_path / "out.parquet"
    killed(path, numbered(3))
    settings = journal_folder(path) / "settings.json"
    settings.unlink() if content is None else settings.write_bytes(content)
    assert "begun with other settings" in refusal(path, settings={"model": "another"})
    assert finish(path, numbered(3)) == []


def test_parts_of_before_need_their_settings(tmp_path):
    path = tmp_path / "out.parquet"
    killed(path, numbered(3))
    (part,) = journal_folder(path).glob("part-*")
    (chunk,) = scan_part(part)
    part.write_bytes(pack_chunk(chunk.table.replace_schema_metadata()))
    settings = journal_folder(path) / "settings.json"
    settings.unlink()
    assert refusal(path, StorageError) == (
        f"{settings} is damaged, and the parts beside it, of an earlier version, do not repeat what it said; "
        "--overwrite starts over"
    )
    assert finish(path, numbered(3), resume=False, overwrite=True) == ["id 0", "id 1", "id 2"]


def test_a_failed_append_is_told_and_the_journal_stays_good(tmp_path):
    """A real failure of the operating system: files may not grow beyond 100 kB."""
    path = tmp_path / "out.parquet"
    journal = start(path)
    work(journal, numbered(3))
    (part,) = journal_folder(path).glob("part-*")
    whole = part.stat().st_size
    big = answer(3, answer="x" * 200_000)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        ask(journal, 3)
        with pytest.raises(StorageError) as caught:
            journal.append([big])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert str(caught.value) == (
        f"{journal_folder(path)} cannot be used: File too large; the journal is intact, "
        "and --resume continues once that is put right"
    )
    assert part.stat().st_size == whole
    journal.append([big])
    journal.close()
    assert finish(path, numbered(5)) == ["id 4"]


def test_a_failed_sync_loses_that_append_only(tmp_path, monkeypatch):
    path = tmp_path / "out.parquet"
    journal = start(path)
    work(journal, numbered(3))

    def fail(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        with pytest.raises(StorageError, match="No space left on device"):
            journal.append([answer(3)])
    assert finish(path, numbered(4)) == ["id 3"]


def test_a_journal_that_is_gone_is_told(tmp_path):
    path = tmp_path / "out.parquet"
    journal = start(path)
    work(journal, numbered(3))
    shutil.rmtree(journal_folder(path))
    with pytest.raises(StorageError) as caught:
        journal.append([answer(3)])
    assert str(caught.value) == f"{journal_folder(path)} is gone, and the answers in it; run again"
    journal.close()


APPEND_FOR_EVER = """
import sys
from itertools import count
from pathlib import Path
from journal_runs import answer, ask, start
journal = start(Path(sys.argv[1]))
for row in count():
    ask(journal, row)
    journal.append([answer(row)])
    print(row, flush=True)
"""


def test_a_killed_process_loses_nothing_that_was_appended(tmp_path):
    path = tmp_path / "out.parquet"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    process = subprocess.Popen(
        [sys.executable, "-c", APPEND_FOR_EVER, str(path)], stdout=subprocess.PIPE, env=environment
    )
    for _ in range(50):
        process.stdout.readline()
    process.kill()
    told, _ = process.communicate()
    appended = 50 + told.count(b"\n")
    with start(path) as journal:
        assert journal.done_at_start["ok"] in (appended, appended + 1)
        assert [ask(journal, row) for row in range(appended)] == [True] * appended


@pytest.mark.parametrize("extension", [".parquet", ".arrow", ".arrows"])
def test_a_damaged_output_is_told(tmp_path, extension):
    path = tmp_path / f"out{extension}"
    finish(path, numbered(200))
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    told = refusal(path)
    assert told.startswith(f"{path} cannot be read: ")
    assert told.endswith("; --overwrite starts over")


def test_damage_in_a_column_that_is_only_copied_is_told_when_publishing(tmp_path):
    path = tmp_path / "out.parquet"
    finish(path, numbered(200))
    group = pq.read_metadata(path).row_group(0)
    (column,) = [
        group.column(i) for i in range(group.num_columns) if group.column(i).path_in_schema == "answer"
    ]
    content = bytearray(path.read_bytes())
    content[column.data_page_offset + column.total_compressed_size // 2] ^= 0xFF
    path.write_bytes(content)
    with start(path) as journal:
        assert work(journal, numbered(199)) == []
        with pytest.raises(ConfigError, match=r"cannot be read: .*; --overwrite starts over"):
            journal.publish()
    assert path.read_bytes() == content


def bad_sectors(monkeypatch, file, *sectors):
    """Reading any of these sectors of a file fails, as it does on a disk that is worn."""
    real, bad = os.pread, file.stat().st_ino

    def pread(descriptor, length, offset):
        is_hit = any(offset < 4096 * (sector + 1) and 4096 * sector < offset + length for sector in sectors)
        if is_hit and os.fstat(descriptor).st_ino == bad:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(descriptor, length, offset)

    monkeypatch.setattr(os, "pread", pread)


@pytest.mark.parametrize("sector", [0, 1, 3])
def test_a_bad_sector_costs_its_own_chunk(tmp_path, monkeypatch, sector):
    path = tmp_path / "out.parquet"
    with start(path) as journal:
        for row in range(8):
            assert not ask(journal, row)
            journal.append([answer(row, answer="x" * 9000)])
    (part,) = journal_folder(path).glob("part-*")
    chunks = list(scan_part(part))
    hit = [
        f"id {row}"
        for row, chunk in enumerate(chunks)
        if chunk.offset < 4096 * (sector + 1) and 4096 * sector < chunk.end
    ]
    assert len(hit) in (1, 2)
    bad_sectors(monkeypatch, part, sector)
    with start(path) as journal:
        (note,) = journal.notes
        assert note.startswith("the journal is damaged: ")
        assert work(journal, numbered(8)) == hit
        journal.publish()
    assert ids(path) == numbered(8)


def test_a_part_that_cannot_be_read_anywhere_is_not_taken_for_damaged(tmp_path, monkeypatch):
    path = tmp_path / "out.parquet"
    killed(path, numbered(3))
    (part,) = journal_folder(path).glob("part-*")
    with monkeypatch.context() as patch:
        bad_sectors(patch, part, *range(100))
        assert "Input/output error; the journal is intact" in refusal(path, StorageError)
    assert [part.name for part in journal_folder(path).glob("part-*")] == ["part-0001"]
    assert finish(path, numbered(3)) == []
