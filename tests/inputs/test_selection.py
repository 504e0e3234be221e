"""Shards, samples and limits: which rows they take, and that they keep their numbers."""

from __future__ import annotations

import os
import threading
from collections import Counter

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.errors import ConfigError
from pipeline.inputs.columns import Columns
from pipeline.inputs.reading import select_rows, selected_rows
from pipeline.inputs.source import open_source
from pipeline.records import Document, Row
from pipeline.settings.run_settings import BatchConfig


def config(**options):
    return BatchConfig(input=("in.jsonl",), output="out.jsonl", question="what?", **options)


class Rows:
    """A source that can be read again, and counts how often a row was taken from it."""

    def __init__(self, count):
        self.count, self.taken = count, 0

    def __iter__(self):
        for row in range(self.count):
            self.taken += 1
            yield Document(source=Row(row=row, id=str(row), place=f"row {row}"), text="x")


def numbers(source, total, **options):
    return [record.source.row for record in select_rows(source, config(**options), total)]


def test_without_a_wish_every_row_comes():
    assert numbers(Rows(5), None) == [0, 1, 2, 3, 4]


def test_shards_share_the_rows_out():
    parts = [numbers(Rows(10), 10, shard=f"{part}/3") for part in (1, 2, 3)]
    assert parts == [[0, 3, 6, 9], [1, 4, 7], [2, 5, 8]]


@pytest.mark.parametrize("total", [1000, None])
@pytest.mark.parametrize("wanted", [1, 7, 999])
def test_a_sample_has_exactly_its_size_and_its_order(total, wanted):
    drawn = numbers(Rows(1000), total, sample=wanted)
    assert len(drawn) == wanted
    assert drawn == sorted(set(drawn))
    assert drawn == numbers(Rows(1000), 1000, sample=wanted)


def test_a_sample_larger_than_the_input_is_the_input():
    assert numbers(Rows(5), 5, sample=9) == [0, 1, 2, 3, 4]


def test_the_seed_decides_the_sample_and_every_row_has_its_chance():
    times = Counter(row for seed in range(400) for row in numbers(Rows(20), 20, sample=5, seed=seed))
    assert len(times) == 20
    assert all(65 < count < 135 for count in times.values())  # 100 expected, 4 standard deviations


def test_shard_then_sample_then_limit():
    sampled = numbers(Rows(100), None, shard="2/4", sample=10)
    assert len(sampled) == 10
    assert {row % 4 for row in sampled} == {1}
    assert numbers(Rows(100), 100, shard="2/4", sample=10, limit=3) == sampled[:3]


def test_a_limit_reads_no_row_too_many():
    source = Rows(1000)
    assert numbers(source, 1000, limit=3) == [0, 1, 2]
    assert source.taken == 3


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, 10),
        ({"limit": 3}, 3),
        ({"sample": 20}, 10),
        ({"shard": "3/3"}, 3),
        ({"shard": "1/3", "sample": 2, "limit": 9}, 2),
    ],
)
def test_the_number_of_rows_is_known_before(options, expected):
    assert selected_rows(config(**options), 10) == expected
    assert len(numbers(Rows(10), 10, **options)) == expected


def test_of_an_input_of_unknown_length_nothing_is_promised():
    assert selected_rows(config(sample=2), None) is None


def test_files_blank_lines_and_errors_included(tmp_path):
    path = tmp_path / "in.jsonl"
    path.write_text('{"text": "a"}\n\n{broken\n{"text": "b"}\n')
    assert numbers(open_source([path], Columns()), None, sample=3) == [0, 2, 3]
    table = tmp_path / "in.parquet"
    pq.write_table(pa.table({"text": ["x"] * 50}), table, row_group_size=7)
    source = open_source([table], Columns())
    assert len(numbers(source, source.total_rows, sample=20)) == 20


def test_a_sample_needs_an_input_that_can_be_read_twice(tmp_path):
    with pytest.raises(ConfigError, match="--sample counts the rows first, and the input can be read only"):
        numbers(iter(Rows(5)), None, sample=2)
    pipe = tmp_path / "pipe.jsonl"
    os.mkfifo(pipe)
    writer = threading.Thread(target=lambda: pipe.write_text('{"text": "a"}\n'), daemon=True)
    source = open_source([pipe], Columns())
    with pytest.raises(ConfigError, match=r"pipe\.jsonl can be read only once: save it to a file, or use"):
        numbers(source, None, sample=1)
    writer.start()
    assert numbers(source, None, limit=1) == [0]
