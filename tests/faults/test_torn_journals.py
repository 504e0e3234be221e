"""Whatever a crash left of the journal's end, the run goes on, and answers only what was lost."""

import os
import random
import shutil

import pytest

from faults.job import A_FEW, ALONE, check_rows, read
from pipeline.outputs.chunks import HEADER, MAGIC, scan_part

pytestmark = pytest.mark.slow

TEARS = int(os.environ.get("MARSINFER_TEARS", "12"))


def stopped(job, accident):
    """Stop a run at about two thirds; the content of its one part, and where the chunks end in it."""
    accident("sigterm", pack=16 if job.flags == ALONE else 4)
    assert job.run() == 143, job.told
    accident(None)
    (part,) = job.journal.glob("part-*")
    return part, part.read_bytes(), [(chunk.end, chunk.table.num_rows) for chunk in scan_part(part)]


def garbage(draws, content):
    """What a file system may leave behind the end: nothing, zeros, noise, other chunks or half of one."""
    start = draws.randrange(len(content))
    return draws.choice(
        [
            b"",
            bytes(draws.randrange(1, 9000)),
            draws.randbytes(draws.randrange(1, 9000)),
            content,
            content[: draws.randrange(1, len(content))],
            content[start : start + draws.randrange(1, 9000)],
            HEADER.pack(MAGIC, 2**63, 0) + bytes(99),
            HEADER.pack(MAGIC, 0, 0),
        ]
    )


@pytest.mark.parametrize("flags", [ALONE, A_FEW], ids=["alone", "together"])
def test_a_torn_end_costs_what_it_held_and_nothing_else(make_job, accident, tmp_path, flags):
    job = make_job(*flags)
    expected = job.undisturbed()
    part, content, chunks = stopped(job, accident)
    before = {row["ttft_ms"] for row in rows_of(part)}
    assert len(before) > 0
    kept = tmp_path / "kept"
    shutil.copytree(job.journal, kept)
    draws = random.Random(0)
    for _ in range(TEARS):
        cut = draws.randrange(len(content) + 1)
        shutil.copytree(kept, job.journal, dirs_exist_ok=True)
        part.write_bytes(content[:cut] + garbage(draws, content))
        rows = job.resume()
        check_rows(rows, expected)
        whole = sum(count for end, count in chunks if end <= cut)
        assert sum(row["ttft_ms"] in before for row in rows) >= whole
        job.output.unlink()


def rows_of(part):
    return [row for chunk in scan_part(part) for row in chunk.table.to_pylist()]


@pytest.mark.parametrize("name", ["index.sqlite", "output.partial", "settings.json.partial"])
def test_what_else_is_in_the_folder_may_be_garbage(make_job, accident, name):
    job = make_job(*ALONE)
    expected = job.undisturbed()
    stopped(job, accident)
    (job.journal / name).write_bytes(random.Random(0).randbytes(5000))
    check_rows(job.resume(), expected)
    assert read(job.output)
    assert not job.journal.exists()
