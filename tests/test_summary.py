"""How many rows a run expects, which is what its time left is reckoned from."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace

import pytest

from marsinfer_cli.progress import print_summary
from pipeline.engines.clock import EngineTimes
from pipeline.records import Answer
from pipeline.summary import Summary


def reading(total_rows, fraction_read, at_most=None):
    return SimpleNamespace(total=total_rows, fraction_read=fraction_read, most=at_most)


def finished(passed_over=0, done_before=0):
    return SimpleNamespace(passed_over=passed_over, done_at_start=Counter(ok=done_before))


@pytest.mark.parametrize(
    ("total_rows", "fraction_read", "at_most", "expected"),
    [(100, 0.3, None, 100), (None, 0.25, None, 40), (None, 0.25, 12, 12), (None, 1.0, 50, 10)],
)
def test_expected_rows(total_rows, fraction_read, at_most, expected):
    summary = Summary(method="dense", output="out.parquet")
    summary.expect(10, reading(total_rows, fraction_read, at_most), finished())
    assert summary.expected_rows == expected


@pytest.mark.parametrize(
    ("total_rows", "fraction_read", "at_most", "passed_over", "done_before", "expected"),
    [
        (100, 0.7, None, 60, 60, 40),  # the done rows came first
        (100, 0.1, None, 0, 60, 40),  # they are still to come
        (100, 0.5, None, 20, 60, 40),  # some were passed over, some are to come
        (30, 0.3, None, 20, 60, 10),  # all that were read were new or done
        (None, 0.25, None, 40, 60, 140),
        (None, 0.25, 50, 20, 40, 10),
        (None, 1.0, None, 990, 990, 10),
        (5, 1.0, None, 0, 0, 10),  # more were read than the file says there are
    ],
)
def test_rows_that_are_done_are_not_expected(
    total_rows, fraction_read, at_most, passed_over, done_before, expected
):
    summary = Summary(method="dense", output="out.parquet")
    rows, done = reading(total_rows, fraction_read, at_most), finished(passed_over, done_before)
    summary.expect(10, rows, done)
    assert summary.expected_rows == expected


def test_in_the_end_there_is_no_more_to_expect():
    summary = Summary(method="dense", output="out.parquet")
    summary.expect(1, reading(None, 0.5), finished())
    summary.count("ok", prompt_tokens=7)
    summary.finish()
    assert (summary.expected_rows, summary.prompt_tokens) == (1, 7)


DENSE = {"prompt_tokens": 10, "kept_ratio": 0.9, "ffn_ratio": 1.0, "attention_ratio": 1.0, "kv_bytes": 80}


def answer(number, **values):
    told = {"method": "mars", "new_tokens": 2, "finish_reason": "stop", "ttft_ms": 1.0, **DENSE}
    return Answer(id=str(number), row=number, **{**told, **values})


@pytest.mark.parametrize(
    ("values", "unchanged"),
    [
        ({}, 1),
        ({"method": "dense"}, 0),  # by a guard, or in a group
        ({"ffn_ratio": 0.5}, 0),
        ({"attention_ratio": 0.99}, 0),
        ({"kv_bytes": 79}, 0),
        ({"kv_host_bytes": 9}, 0),
        ({"ffn_tokens": [10, 1], "ffn_fp8_tokens": [5, 0]}, 0),
        ({"ffn_tokens": [10, 1], "ffn_fp8_tokens": [10, 1]}, 1),  # the whole model is in fp8
        ({"status": "error"}, 0),
    ],
)
def test_rows_of_which_a_method_left_out_nothing(values, unchanged):
    summary = Summary(method="mars", output="o", kv_bytes_per_token=8)
    summary.add([answer(0, **values)])
    assert summary.unchanged_rows == unchanged
    assert summary.as_dict()["unchanged_rows"] == unchanged


def test_what_a_guard_caught_and_cost():
    summary = Summary(method="mars", output="o")
    reasons = ["task: x", "length: y", "length: z", "flat attention: a: b", None]
    summary.add([answer(n, guard=reason) for n, reason in enumerate(reasons)])
    summary.add([answer(9, guard="task: x", status="error")])
    summary.times.add_prefill(10.0, 14.0)
    summary.times.add_prefill(14.0, 16.5, again=True)
    told = summary.as_dict()
    assert (told["guarded_by_task"], told["guarded_by_length"], told["guarded_by_attention"]) == (2, 2, 1)
    assert (told["prefill_s"], told["second_prefill_s"]) == (6.5, 2.5)
    said = "guard: 5 rows dense (2 task, 2 length, 1 flat attention; prefilled again in 2.5 s)"
    assert said in str(summary).split("; ", 3)[-1]


def test_the_closing_table_has_what_a_guard_caught_and_cost(capfd):
    summary = Summary(method="mars", output="o")
    summary.add([answer(n, guard=reason) for n, reason in enumerate(["task: x", "flat attention: y"])])
    summary.times.add_prefill(14.0, 16.5, again=True)
    print_summary(summary)
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in capfd.readouterr().err.splitlines()]
    assert ["rows that the guard had run dense", "2"] in cells
    assert [row for row in cells if "by " in "".join(row)] == [["by task", "1"], ["by flat attention", "1"]]
    assert ["second prefills, after flat attention", "2.5 s"] in cells


def test_a_guard_that_found_nothing_is_not_mentioned(capfd):
    summary = Summary(method="mars", output="o")
    summary.add([answer(0)])
    print_summary(summary)
    assert "guard" not in str(summary) + capfd.readouterr().err
    assert summary.as_dict()["second_prefill_s"] == summary.as_dict()["guarded_by_attention"] == 0


def test_second_prefills_of_several_engines_are_summed():
    one, other = EngineTimes(), EngineTimes()
    one.add_prefill(1.0, 3.0, again=True)
    other.add_prefill(2.0, 7.0, again=True)
    other.add_prefill(7.0, 8.0)
    both = EngineTimes.together([one, other.mirrored(50.0)])
    assert (both.prefill_s, both.again_s) == (8.0, 7.0)


def test_what_is_said_at_the_end():
    summary = Summary(method="mars", output="o", kv_bytes_per_token=8)
    summary.add([answer(n, ffn_ratio=0.5 if n < 8 else 1.0) for n in range(10)])
    assert summary.remarks() == ["mars changed nothing on 2 of 10 rows: they are too short for it"]
    summary.add([answer(n, ffn_ratio=0.5, finish_reason="length") for n in range(2)])
    assert summary.ended_by_length == 2
    assert summary.remarks()[1].startswith("2 of 12 answers ended by length, ")
    assert "--max-new-tokens" in summary.remarks()[1]


def failed(number, kind, message):
    return Answer(id=str(number), row=number, status="error", error_type=kind, error_message=message)


def test_the_first_message_of_each_kind_is_kept():
    summary = Summary(method="dense", output="o.parquet")
    summary.add([failed(0, "bad_json", "line 1"), failed(1, "over_long", "line\n2")])
    summary.add([failed(2, "over_long", "line 3")])
    assert summary.as_dict()["error_messages"] == {"bad_json": "line 1", "over_long": "line 2"}
    assert summary.commonest_error == "over_long (2 rows): line 2"
    assert str(summary).startswith("dense: o.parquet: 3 rows (3 error); 0 prompt tokens, 0 new tokens; ")
    assert str(summary).endswith("; over_long (2 rows): line 2")
    assert summary.none_answered() is None  # of an output that holds no rows yet
    summary.in_output.update({"error": 3})
    assert summary.none_answered() == "none of 3 rows was answered; over_long (2 rows): line 2"
    summary.in_output.update({"ok": 1})
    assert summary.none_answered() is None


def test_the_time_is_all_of_it_and_that_of_a_row_its_work(clock):
    clock.now = 50.0
    summary = Summary(method="dense", output="o", began=20.0)
    clock.now = 60.0
    summary.start_work()
    summary.times = EngineTimes(load_s=5.0, warm_up_s=3.0)
    summary.add([answer(n, prompt_tokens=30) for n in range(2)])
    summary.expect(6, reading(6, 1.0), finished())
    clock.now = 80.0
    assert summary.seconds_left == pytest.approx(4 * 12 / 2)
    summary.finish()
    clock.now = 99.0
    assert (summary.seconds, summary.working_s, summary.ms_per_row()) == (60.0, 12.0, 6000.0)
    assert summary.tokens_per_second == 5.0
    assert summary.as_dict()["seconds"] == 60.0
