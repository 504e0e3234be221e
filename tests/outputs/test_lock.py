"""One run at a time writes an output."""

import json
import os
import signal
import subprocess
import sys
import threading

import pytest

from pipeline.errors import ConfigError, LockedError, StorageError
from pipeline.outputs.lock import OutputLock

HOLD = """
import sys
from pipeline.outputs.lock import OutputLock
with OutputLock(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def hold():
    """Start a process that holds the lock until its input ends."""
    started = []

    def start(path):
        process = subprocess.Popen(
            [sys.executable, "-c", HOLD, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        started.append(process)
        assert process.stdout.readline() == b"held\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def refusal(path):
    with pytest.raises(LockedError) as caught, OutputLock(path):
        pytest.fail("the lock is held")
    return str(caught.value)


def test_the_holder_is_named(tmp_path, hold):
    path = tmp_path / "out.parquet"
    process = hold(path)
    told = json.loads((tmp_path / ".out.parquet.lock").read_text())
    assert told["pid"] == process.pid
    assert refusal(path) == (
        f"{path} is being written by process {process.pid} on {told['host']} (since {told['started']}); "
        "wait for it, or name another output"
    )
    assert LockedError.exit_code == 7


def test_a_released_lock_leaves_nothing(tmp_path, hold):
    path = tmp_path / "out.parquet"
    process = hold(path)
    process.communicate()
    assert process.returncode == 0
    with OutputLock(path):
        assert os.listdir(tmp_path) == [".out.parquet.lock"]
    assert os.listdir(tmp_path) == []


def test_the_lock_of_a_killed_process_is_free(tmp_path, hold):
    path = tmp_path / "out.parquet"
    process = hold(path)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert os.listdir(tmp_path) == [".out.parquet.lock"]
    with OutputLock(path):
        assert json.loads((tmp_path / ".out.parquet.lock").read_text())["pid"] == os.getpid()
    assert os.listdir(tmp_path) == []


@pytest.mark.slow
@pytest.mark.parametrize("garbage", [b"", b'{"pid": 1', b"\x00" * 40, b'{"pid": "x"}'])
def test_what_a_crash_leaves_in_the_file_does_not_matter(tmp_path, hold, garbage):
    path = tmp_path / "out.parquet"
    lock = tmp_path / ".out.parquet.lock"
    lock.write_bytes(garbage)
    with OutputLock(path):
        assert json.loads(lock.read_text())["pid"] == os.getpid()
    hold(path)
    lock.write_bytes(garbage)
    assert refusal(path) == (
        f"{path} is being written by another process; wait for it, or name another output"
    )


@pytest.mark.parametrize("kind", ["link", "dangling link", "hard link", "file", "folder", "pipe"])
def test_what_no_run_has_made_is_refused_and_left_alone(tmp_path, kind):
    victim, lock = tmp_path / "victim", tmp_path / ".out.parquet.lock"
    if kind != "dangling link":
        victim.write_text("" if kind == "hard link" else "precious")
    make = {
        "hard link": lambda: lock.hardlink_to(victim),
        "file": lambda: lock.write_text("precious"),
        "folder": lock.mkdir,
        "pipe": lambda: os.mkfifo(lock),
    }
    make.get(kind, lambda: lock.symlink_to(victim))()
    before = os.lstat(lock)
    with pytest.raises(ConfigError, match=f"{lock} is in the way"), OutputLock(tmp_path / "out.parquet"):
        pytest.fail("it is held")
    assert os.lstat(lock).st_mtime_ns == before.st_mtime_ns
    assert victim.exists() == (kind != "dangling link")


def test_an_error_inside_releases(tmp_path):
    path = tmp_path / "out.parquet"
    with pytest.raises(KeyboardInterrupt), OutputLock(path):
        raise KeyboardInterrupt
    assert os.listdir(tmp_path) == []


def test_links_to_one_output_share_the_lock(tmp_path):
    (tmp_path / "store").mkdir()
    link = tmp_path / "out.parquet"
    link.symlink_to(tmp_path / "store" / "real.parquet")
    with OutputLock(tmp_path / "store" / "real.parquet"):
        assert refusal(link).startswith(f"{link} is being written by process {os.getpid()} on ")


def test_outputs_of_other_names_are_free(tmp_path):
    with OutputLock(tmp_path / "a.parquet"), OutputLock(tmp_path / "b.parquet"):
        assert sorted(os.listdir(tmp_path)) == [".a.parquet.lock", ".b.parquet.lock"]


def test_a_folder_that_is_not_there_is_told(tmp_path):
    with pytest.raises(StorageError) as caught, OutputLock(tmp_path / "gone" / "out.parquet"):
        pytest.fail("there is nothing to lock")
    assert str(caught.value) == (
        f"{tmp_path}/gone/.out.parquet.lock cannot be locked: No such file or directory; "
        "choose a writable folder on a local disk"
    )


def test_never_two_holders_while_the_file_comes_and_goes(tmp_path):
    path = tmp_path / "out.parquet"
    inside, most, taken = [], [], []

    def contend():
        for _ in range(300):
            try:
                with OutputLock(path):
                    inside.append(1)
                    most.append(len(inside))
                    inside.pop()
            except LockedError:
                taken.append(1)

    threads = [threading.Thread(target=contend) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert max(most) == 1
    assert len(most) + len(taken) == 1200
    assert os.listdir(tmp_path) == []
