"""Two runs of one output: the second is told who is there, and what a dead one left is no obstacle."""

import fcntl
import subprocess
import sys

import pytest

from faults.job import ALONE, check_refusal, check_rows, read

pytestmark = pytest.mark.slow

HOLD = """
import sys
from pipeline.outputs.lock import OutputLock
with OutputLock(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""
GARBAGE = [b"", b"\x00" * 300, b'{"pid": 1']


@pytest.fixture
def lock_file(tmp_path):
    return tmp_path / ".out.parquet.lock"


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the lock of the output."""
    words = [sys.executable, "-c", HOLD, str(tmp_path / "out.parquet")]
    process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"held\n"
    yield process
    process.kill()
    process.communicate()


def test_a_lock_held_by_a_live_process_is_respected_and_a_dead_one_is_taken_over(make_job, holder, lock_file):
    job = make_job(*ALONE, rows=6)
    expected = job.undisturbed()
    assert job.run("--resume") == 7
    check_refusal(job.told)
    assert f"is being written by process {holder.pid} on " in job.told[0]
    assert not job.output.exists()
    holder.kill()
    holder.wait()
    assert lock_file.exists()
    check_rows(job.resume(), expected)
    assert not lock_file.exists()


@pytest.mark.parametrize("content", GARBAGE)
def test_a_lock_file_of_garbage(make_job, lock_file, content):
    job = make_job(*ALONE, rows=2)
    lock_file.write_bytes(content)
    with lock_file.open("rb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert job.run() == 7
        check_refusal(job.told)
        assert "is being written by another process" in job.told[0]
    assert job.run() == 0
    assert [row["status"] for row in read(job.output)] == ["ok"] * 2
    assert not lock_file.exists()


@pytest.mark.parametrize("content", [b"\xff\xfe", b"[]", b"precious"])
def test_a_file_that_is_no_lock_is_left_alone(make_job, lock_file, content):
    job = make_job(*ALONE, rows=2)
    lock_file.write_bytes(content)
    assert job.run() == 2
    check_refusal(job.told)
    assert lock_file.read_bytes() == content
