"""Disks that are full and folders that go: exit code 8, one line, and no row lost."""

import os
import resource
import shutil
import subprocess
import sys

import pytest

from faults.job import ALONE, TOGETHER, check_refusal, check_rows, read

pytestmark = pytest.mark.slow

ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}
KIB = 1 << 10
FILE_SIZES = [0, 2, 8, 16, 40, 10_000]  # KiB


def check_stopped(job, code):
    """A run on a full disk says so, and publishes nothing."""
    assert code == 8, job.told
    check_refusal(job.told)
    assert not job.output.exists()


def test_files_that_may_not_grow(make_job):
    """The limit on the size of a file, at which journal, index and output fail in their turn."""
    job = make_job(*ALONE)
    expected = job.undisturbed()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    codes = []
    for size in FILE_SIZES:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size * KIB, hard))
        try:
            codes.append(job.run("--resume"))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        if codes[-1]:
            check_stopped(job, codes[-1])
        check_rows(job.resume(), expected)
        job.output.unlink()
    assert codes == [8] * (len(FILE_SIZES) - 1) + [0]


def test_a_process_whose_files_may_not_grow_ends_in_good_order(make_job):
    """The signal that comes with that limit, SIGXFSZ, must not end the process."""
    job = make_job(*ALONE)
    expected = job.undisturbed()
    done = subprocess.run(
        [sys.executable, "-m", "marsinfer_cli", *job.words()],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (40 * KIB, 40 * KIB)),
        stderr=subprocess.PIPE,
        encoding="utf-8",
        env=ONE_THREAD,
    )
    job.told = done.stderr.splitlines()
    check_stopped(job, done.returncode)
    assert "File too large" in job.told[0]
    check_rows(job.resume(), expected)


class Disk:
    """A small file system in memory."""

    def __init__(self, folder):
        self.folder = folder

    def make(self, *options):
        """A new one, in the place of the one before; returns its folder."""
        self.remove()
        self._mount(*options)
        return self.folder

    def grow(self):
        """The same one, with more space than a job needs."""
        self._mount("remount", "size=10m", "nr_inodes=100")

    def remove(self):
        if self.folder.is_mount():
            subprocess.run(["umount", "--lazy", str(self.folder)], check=True)

    def _mount(self, *options):
        words = ["mount", "-t", "tmpfs", "-o", ",".join(options), "tmpfs", str(self.folder)]
        subprocess.run(words, check=True, capture_output=True)


@pytest.fixture
def disk(tmp_path):
    disk = Disk(tmp_path / "disk")
    disk.folder.mkdir()
    try:
        disk.make("size=4k")
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("this user may not mount a disk")
    yield disk
    disk.remove()


def run_on_ever_larger_disks(job, disk, options):
    """Until the job fits, each time resumed with more space; what the runs told that did not fit."""
    expected, told = job.undisturbed(), []
    for smaller in options:
        job.output = disk.make(*smaller) / "out.parquet"
        code = job.run()
        if code:
            check_stopped(job, code)
            told += job.told
            disk.grow()
        check_rows(job.resume(), expected)
        job.output.unlink()
        assert os.listdir(job.output.parent) == []
        if code == 0:
            return told
    raise AssertionError("the job never fitted")


@pytest.mark.parametrize(("flags", "step"), [(ALONE, 24), (TOGETHER, 8)], ids=["alone", "together"])
def test_a_full_disk(make_job, disk, flags, step):
    sizes = ([f"size={size}k"] for size in range(8, 1000, step))
    told = run_on_ever_larger_disks(make_job(*flags, rows=12), disk, sizes)
    for what in (".out.parquet.journal cannot be used: ", "out.parquet cannot be written: "):
        assert any(what in line for line in told), what


def test_a_disk_on_which_no_more_files_fit(make_job, disk):
    counts = (["size=10m", f"nr_inodes={count}"] for count in range(1, 20))
    told = run_on_ever_larger_disks(make_job(*TOGETHER), disk, counts)
    for what in ("lock cannot be locked", "journal cannot be made", "out.parquet cannot be written"):
        assert any(what in line for line in told), what


@pytest.mark.parametrize("pack", [1, 12, 24])
@pytest.mark.parametrize("what", ["folder", "journal"])
def test_a_folder_that_is_removed_in_a_run(make_job, accident, tmp_path, what, pack):
    job = make_job(*ALONE)
    expected = job.undisturbed()
    job.output = tmp_path / "out" / "out.parquet"
    job.output.parent.mkdir()
    accident("remove", pack=pack, path=str(job.output.parent if what == "folder" else job.journal))
    check_stopped(job, job.run())
    assert "is gone" in job.told[0]
    accident(None)
    job.output.parent.mkdir(exist_ok=True)
    check_rows(job.resume(), expected)


def test_an_old_output_stays_when_the_disk_is_full(make_job, disk):
    job = make_job(*ALONE)
    expected = job.undisturbed()
    job.output = disk.make(f"size={job.whole.stat().st_size // KIB + 60}k") / "out.parquet"
    shutil.copy(job.whole, job.output)
    assert job.run("--overwrite") == 8
    check_refusal(job.told)
    assert job.output.read_bytes() == job.whole.read_bytes()
    disk.grow()
    check_rows(job.resume(), expected)
    assert [row["ttft_ms"] for row in read(job.output)] != [row["ttft_ms"] for row in expected]
