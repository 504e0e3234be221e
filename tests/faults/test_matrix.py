"""Every fault, wherever the files are and whatever was done before: what it strikes ends as if it had not.

`make faults` runs all cells of the matrix, `make test` one for each fault.
"""

from __future__ import annotations

from functools import partial

import pytest

from faults.disturbed import Disturbed
from faults.faults import ALL, FAULTS, IN_A_ROW, PLACES
from faults.places import Bucket, Chosen, Folder, Requests

pytestmark = pytest.mark.slow

EACH = {fault.name: fault for fault in FAULTS}
FOLDERS = {
    "parquet": partial(Folder, suffix=".parquet"),
    "jsonl": partial(Folder, suffix=".jsonl"),
    "columns": partial(Chosen, suffix=".parquet"),
    "requests": Requests,
}


def cells():
    """All of the matrix, or one of each fault, in turn from one place and state to the next."""
    for number, fault in enumerate(FAULTS):
        found = fault.cells()
        for place, state in found if ALL else [found[number % len(found)]]:
            yield pytest.param(fault, place, state, id=f"{fault.name}-{place}-{state}")


@pytest.fixture(scope="session")
def prepared():
    """The files of places in which a state was brought about, and rows of runs that nothing disturbed."""
    return {}


@pytest.fixture
def make_job(request, model_folder, tmp_path, prepared):
    def make(place, state):
        if place == "s3":
            where = Bucket(request.getfixturevalue("bucket"), request.getfixturevalue("s3_server"))
        else:
            where = FOLDERS[place](tmp_path / "place")
        job = Disturbed(where, model_folder, tmp_path)
        if (place, state) not in prepared:
            job.begin(state)
            prepared[place, state] = where.contents()
        for name, data in prepared[place, state].items():
            where.write(name, data)
        return job

    return make


@pytest.fixture
def expected(make_job, prepared):
    """The rows of a run that nothing disturbs."""

    def expected(place):
        if place not in prepared:
            job = make_job(place, "fresh")
            job.run(0)
            prepared[place] = job.place.unpack(job.place.output)
            for name in job.place.names():
                job.place.remove(name)
        return prepared[place]

    return expected


def strike(job, fault, place, state):
    with fault.strike(job):
        for _ in range(1 + fault.lasts):
            around = fault.around(job)
            job.run(
                fault.code_in(place, state),
                *fault.flags,
                told=fault.told,
                around=around,
                prepare=fault.prepare,
            )


@pytest.mark.parametrize(("fault", "place", "state"), list(cells()))
def test_a_fault(make_job, expected, fault, place, state):
    rows = expected(place)
    job = make_job(place, state)
    before = job.durable()
    strike(job, fault, place, state)
    job.finish(rows, before, fault.loses)


@pytest.mark.parametrize(
    ("first", "second", "place"),
    [
        (*pair, place)
        for number, pair in enumerate(IN_A_ROW)
        for place in (PLACES if ALL else [PLACES[number % len(PLACES)]])
    ],
)
def test_two_faults_in_a_row(make_job, expected, first, second, place):
    rows = expected(place)
    job = make_job(place, "fresh")
    strike(job, EACH[first], place, "fresh")
    done = job.durable()
    assert done
    strike(job, EACH[second], place, "resumed")
    job.finish(rows, done)
