"""One run at a time writes an output in object storage, whoever else tries, dies or sleeps."""

import json
import os
import subprocess
import sys
import threading
import time

import pytest
from object_storage import objects, put

from pipeline.errors import ConfigError, LockedError, StorageError
from pipeline.outputs import lease
from pipeline.outputs.lease import Holder, LeaseLock
from pipeline.outputs.lock import lock_output, refuse_locked
from pipeline.storage.remote import RemotePath, place_of

pytestmark = pytest.mark.slow

NAME = ".out.parquet.lock-000001"


@pytest.fixture
def output(bucket):
    return f"{bucket}/out.parquet"


def refusal(output, error=LockedError):
    with pytest.raises(error) as caught, lock_output(output):
        pytest.fail("the lock is held")
    return str(caught.value)


def lock_of(output, number=1, **values):
    """What another run left."""
    holder = Holder(**values)
    put(output.replace("out.parquet", f".out.parquet.lock-{number:06}"), holder.dump())
    return holder


def elsewhere(age):
    return {"machine": "another", "host": "far", "pid": 7, "refreshed": time.time() - age}


def test_the_primitive_lets_only_one_create(bucket):
    paths = [place_of(f"{bucket}/x") for _ in range(8)]
    won = []
    threads = [
        threading.Thread(target=lambda n=n: won.append(n) if paths[n].create(b"%d" % n) else None)
        for n in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [paths[0].read_bytes()] == [b"%d" % n for n in won]
    assert paths[won[0]].create(b"%d" % won[0])  # as if the answer to the first request had been lost


def test_the_holder_is_named_and_nothing_stays(output, bucket):
    with lock_output(output) as lock:
        lock.check()
        assert objects(bucket) == [NAME]
        told = refusal(output)
        started = json.loads(place_of(f"{bucket}/{NAME}").read_bytes())["started"]
        assert told == (
            f"{output} is being written by process {os.getpid()} on {Holder().host} (since {started}); "
            "wait for it, or name another output"
        )
    assert objects(bucket) == []


def test_a_holder_elsewhere_is_believed_for_as_long_as_its_lease(output, bucket, monkeypatch):
    monkeypatch.setattr(lease, "LEASE_S", 6000.0)  # which a slow test does not outlast
    lock_of(output, **elsewhere(lease.LEASE_S - 1000))
    assert refusal(output).endswith(
        "; wait for it, or name another output (if it is gone, its lock lapses in 100 minutes)"
    )
    lock_of(output, **elsewhere(lease.LEASE_S + 1))
    with lock_output(output):
        assert objects(bucket) == [".out.parquet.lock-000002"]
    assert objects(bucket) == []


@pytest.fixture
def neighbour():
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    yield process
    process.communicate()


def test_a_process_of_this_machine_holds_it_however_long_it_slept_but_not_when_it_died(output, neighbour):
    born = lease._born(neighbour.pid)
    lock_of(output, pid=neighbour.pid, born=born, refreshed=0.0)
    assert f"is being written by process {neighbour.pid} on " in refusal(output)
    neighbour.communicate()
    with lock_output(output):
        pass
    lock_of(output, pid=1, born=born)  # a number that another process has now
    with lock_output(output):
        pass


def test_what_an_earlier_run_of_this_process_left_holds_nothing(output, bucket, s3_server):
    with lock_output(output):
        s3_server.stop()
    s3_server.start()
    assert objects(bucket) == [NAME]
    with lock_output(output):
        pass
    assert objects(bucket) == []


@pytest.mark.parametrize("garbage", [b"", b"garbage", b"{}", b"[]", b"\xff"])
def test_garbage_holds_nothing(output, bucket, garbage):
    put(f"{bucket}/{NAME}", garbage)
    with lock_output(output):
        assert objects(bucket) == [".out.parquet.lock-000002"]


def test_only_one_of_many_gets_a_lock_that_lapsed(output, bucket):
    lock_of(output, **elsewhere(lease.LEASE_S + 1))
    place_of(output)  # the client is made once
    held, refused = [], []
    together, done = threading.Barrier(6), threading.Barrier(6)

    def contend():
        together.wait()
        try:
            with lock_output(output) as lock:
                held.append(lock)
                done.wait()
        except LockedError:
            refused.append(1)
            done.wait()

    threads = [threading.Thread(target=contend) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(held), len(refused)) == (1, 5)
    assert objects(bucket) == []


def test_a_lock_that_was_taken_over_ends_the_run_and_is_left_to_its_taker(output, bucket):
    with lock_output(output) as lock:
        taker = lock_of(output, 2, **elsewhere(0))
        with pytest.raises(LockedError) as caught:
            lock.check()
        assert str(caught.value) == f"{output} was taken over by {taker}; this run has ended"
    assert ".out.parquet.lock-000002" in objects(bucket)


def test_a_lock_that_was_not_refreshed_for_its_lease_is_lost(output, monkeypatch):
    with lock_output(output) as lock:
        slept = lease.now() + lease.LEASE_S + 1
        monkeypatch.setattr(lease, "now", lambda: slept)
        with pytest.raises(LockedError):
            lock.check()
        monkeypatch.undo()
        with pytest.raises(LockedError):
            lock.check()


def test_it_is_refreshed(output, bucket, monkeypatch):
    monkeypatch.setattr(lease, "REFRESH_S", 0.05)

    def refreshed():
        return json.loads(place_of(f"{bucket}/{NAME}").read_bytes())["refreshed"]

    with lock_output(output) as lock:
        first, deadline = refreshed(), time.monotonic() + 300
        while refreshed() == first:
            assert time.monotonic() < deadline
        lock.check()
        lock_of(output, 2, **elsewhere(0))
        while not lock._is_lost:
            assert time.monotonic() < deadline
        lock._thread.join(300)
        assert not lock._thread.is_alive()


def test_storage_that_ignores_the_condition_is_refused(output, bucket, monkeypatch):
    def careless(self, data):
        self.write_bytes(data)
        return True

    monkeypatch.setattr(RemotePath, "create", careless)
    assert "does not heed If-None-Match" in refusal(output, ConfigError)
    assert objects(bucket) == []


def test_a_bucket_that_is_not_there_and_storage_that_fails(output, s3_server):
    assert refusal("s3://no-such-bucket/out.parquet", ConfigError) == (
        "s3://no-such-bucket/out.parquet cannot be written: The specified bucket does not exist; "
        "make the bucket first"
    )
    s3_server.stop()
    try:
        told = refusal(output, StorageError)
    finally:
        s3_server.start()
    assert told.startswith(f"{output} cannot be locked: Could not connect to the endpoint")


def test_a_lock_in_memory_works_the_same():
    with LeaseLock(place_of("memory://lease/out.parquet")):
        assert "is being written by" in refusal("memory://lease/out.parquet")
    with lock_output("memory://lease/out.parquet"):
        pass


def test_whether_an_output_is_locked_can_be_asked_without_locking_it(bucket):
    output = f"{bucket}/out.parquet"
    refuse_locked(output)
    assert objects(bucket) == []
    with lock_output(output):
        before = objects(bucket)
        with pytest.raises(LockedError, match="is being written by"):
            refuse_locked(output)
        assert objects(bucket) == before
    refuse_locked(output)
