"""Random inputs through whole runs: a refusal in one line, or as many rows as the input has; never a crash.

    MARSINFER_FUZZ=2000 python -m pytest tests/test_fuzz.py

The examples are the same every time, but for constants that Hypothesis finds in the modules that are loaded,
which differ between this file alone and a whole run. One that fails is printed as a `Case(...)`, which
`@example` takes.
"""

from __future__ import annotations

import faulthandler
import io
import json
import os
import signal
import tempfile
from collections import Counter
from contextlib import contextmanager, redirect_stderr
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fuzz_inputs import BOM, ODD_VALUES, any_files, arrow, case, damaged_tables, json_lines, odd_tables
from hypothesis import HealthCheck, example, given, settings

from marsinfer_cli.app import run

pytestmark = pytest.mark.slow

EXAMPLES = int(os.environ.get("MARSINFER_FUZZ", "200"))
MEMORY = "/dev/shm"
LONGEST_S = 20  # of the processor's time, which does not pass faster on a busy machine


def fuzz(share):
    """Settings of a test that takes a share of all examples."""
    return settings(
        max_examples=max(1, round(EXAMPLES * share)),
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.large_base_example],
    )


@pytest.fixture(scope="module")
def check(model_folder, tmp_path_factory):
    # in memory if there is such a place, as waiting for a disk would take most of the time
    folder = MEMORY if os.access(MEMORY, os.W_OK) else tmp_path_factory.mktemp("fuzz")
    common = ["--model", str(model_folder), "--max-new-tokens", "1", "--pack-tokens", "2k", "--quiet"]

    codes = Counter()

    def check(case):
        with tempfile.TemporaryDirectory(dir=folder) as place:
            source, output = Path(place, case.name), Path(place, f"out{case.output}")
            source.write_bytes(case.data)
            code, told = outcome(["batch", str(source), str(output), *common, *case.flags])
            if code in (0, 3):  # 3: no row of it has an answer
                assert len(told) == (code == 3), told
                check_rows(output, case.rows, footer_rows(source))
            else:
                assert code == 2
                assert len(told) == 1, told
                assert told[0].startswith("marsinfer: error: ")
                told += [path.name for path in Path(place).iterdir() if path != source]
                assert len(told) == 1, told  # what fails so would fail again: no work was done before
            codes[code] += 1

    yield check
    assert codes[0]


def outcome(words):
    """The exit code of a run, and what it told, without notes."""
    with time_limit(), redirect_stderr(io.StringIO()) as printed:
        code = run(words)
    # JSON that is nested too deep leaves too little of the stack for Python to clean up quietly
    noise = (": note: ", "Exception ignored in sys.unraisablehook", "RecursionError: ")
    return code, [line for line in printed.getvalue().splitlines() if not any(each in line for each in noise)]


class TookTooLong(BaseException):
    """No `Exception`, lest it become the error of a row."""


@contextmanager
def time_limit():
    def stop(number, frame):
        raise TookTooLong

    before = signal.signal(signal.SIGPROF, stop)
    faulthandler.dump_traceback_later(30 * LONGEST_S, exit=True)  # for what waits, or no signal can interrupt
    signal.setitimer(signal.ITIMER_PROF, LONGEST_S)
    try:
        yield
    except TookTooLong:
        raise AssertionError(f"took longer than {LONGEST_S} s") from None
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        faulthandler.cancel_dump_traceback_later()
        signal.signal(signal.SIGPROF, before)


def footer_rows(source):
    """The rows of a Parquet file as its footer says, whatever befell it; none of a file of no bytes."""
    if source.suffix != ".parquet":
        return None
    return pq.read_metadata(source).num_rows if source.stat().st_size else 0


def check_rows(output, expected, of_footer):
    table = read(output)
    numbers = table.column("row").to_pylist()
    kinds = table.column("error_type").to_pylist()
    assert numbers == sorted(set(numbers))
    assert expected is None or len(numbers) == expected
    if of_footer is not None:  # a row that says so stands for all rows that cannot be read
        after = [*numbers[1:], of_footer][: len(numbers)]
        assert numbers[:1] == [0][:of_footer]
        for number, kind, following in zip(numbers, kinds, after, strict=True):
            assert following == number + 1 or (kind == "unreadable" and following > number)
    for status, kind in zip(table.column("status").to_pylist(), kinds, strict=True):
        assert (status == "ok" and kind is None) or (status in ("error", "skipped") and kind)


def read(output):
    if output.suffix == ".jsonl":
        # not `splitlines`, which takes U+2028, U+0085 and others for ends of lines, as they stand within JSON
        rows = [json.loads(line) for line in output.read_text(encoding="utf-8").split("\n") if line]
        names = ("row", "status", "error_type")
        return pa.table({name: [row[name] for row in rows] for name in names})
    if output.suffix == ".parquet":
        table = pq.read_table(output)
    else:
        opened = pa.ipc.open_stream if output.suffix == ".arrows" else pa.ipc.open_file
        table = opened(output.read_bytes()).read_all()
    table.validate(full=True)
    return table


SMALL_DECIMAL = pa.table({"text": ["a", "b", "c"], "x": ODD_VALUES["small decimal"]})  # that Parquet lacks


@fuzz(0.4)
@given(case=damaged_tables())
def test_damaged_tables(check, case):
    check(case)


@fuzz(0.3)
@given(case=odd_tables())
@example(case("in.arrows", arrow(SMALL_DECIMAL, pa.ipc.new_stream), ("--question", "what?"), 3, ".arrow"))
def test_tables_of_odd_types(check, case):
    check(case)


@fuzz(0.25)
@given(case=json_lines())
@example(case("in.jsonl", b'{"text": "a"}\n' + BOM, ("--question", "what?"), 1, ".parquet"))
@example(case("in.jsonl", '{"text": "a", "x": "\u2028\x85"}'.encode(), ("--question", "what?"), 1, ".jsonl"))
def test_json_lines(check, case):
    check(case)


@fuzz(0.05)
@given(case=any_files)
def test_any_bytes_under_any_name(check, case):
    check(case)
