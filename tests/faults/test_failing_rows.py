"""What goes wrong with a pack or a row costs that row at most."""

import re

import pytest

from faults.job import TOGETHER, check_rows, read
from pipeline.engines import table
from pipeline.engines.table import Running
from pipeline.generation.decode_loop import DecodeLoop
from pipeline.prompts.tokenizing import Codec

pytestmark = pytest.mark.slow

CULPRIT = 17
FAILURES = [
    ("out_of_memory", "out_of_memory"),
    ("host_out_of_memory", "out_of_memory"),
    ("runtime_error", "internal"),
]


def packs_changed(rows, expected):
    """The rows that were not in the pack that they are in when nothing happens."""
    return [a for a, b in zip(rows, expected, strict=True) if a["pack_tokens"] != b["pack_tokens"]]


def culprit_tokens(expected):
    """By which the culprit is known in a pack: no other prompt is as long."""
    lengths = [row["prompt_tokens"] for row in expected]
    assert lengths.count(lengths[CULPRIT]) == 1
    return lengths[CULPRIT]


@pytest.mark.parametrize("kind", [kind for kind, _ in FAILURES])
def test_a_pack_that_fails_once_is_halved_and_all_rows_are_answered(make_job, accident, kind):
    job = make_job(*TOGETHER)
    expected = job.undisturbed()
    accident(kind, pack=3)
    assert job.run() == 0
    rows = read(job.output)
    check_rows(rows, expected)
    size = expected[packs_changed(rows, expected)[0]["row"]]["pack_documents"]
    halves = [row["pack_documents"] for row in packs_changed(rows, expected)]
    assert sorted(halves) == [size // 2] * (size // 2) + [size - size // 2] * (size - size // 2)


@pytest.mark.parametrize(("kind", "told"), FAILURES)
def test_a_row_that_always_fails_is_the_only_error(make_job, accident, kind, told):
    job = make_job(*TOGETHER)
    expected = job.undisturbed()
    accident(kind, tokens=culprit_tokens(expected))
    assert job.run() == 0
    rows = read(job.output)
    check_rows(rows, expected, {CULPRIT: told})
    mates = len(packs_changed(rows, expected))
    assert 1 < mates == expected[CULPRIT]["pack_documents"]  # the other packs were as ever
    if told == "out_of_memory":
        need = rf"{expected[CULPRIT]['prompt_tokens']} tokens need about \d+\.\d GB on cpu and \d+\.\d GB"
        assert re.search(need, rows[CULPRIT]["error_message"])
        assert rows[CULPRIT]["error_message"].endswith("or use --dtype bfloat16 or a smaller model")


def test_a_row_whose_decoding_fails_is_the_only_error(make_job, monkeypatch):
    job = make_job(*TOGETHER)
    expected = job.undisturbed()
    culprit, real = culprit_tokens(expected), table.decode

    def decode(decoder, attention, prefilled, *rest, **more):
        if culprit in prefilled.lengths:
            raise RuntimeError("an illegal memory access was encountered")
        return real(decoder, attention, prefilled, *rest, **more)

    step = DecodeLoop.step

    def step_together(self):
        if any(
            culprit == each.row.job.document.prompt_tokens for each in self.rows if isinstance(each, Running)
        ):
            raise RuntimeError("an illegal memory access was encountered")
        return step(self)

    monkeypatch.setattr(table, "decode", decode)
    monkeypatch.setattr(DecodeLoop, "step", step_together)
    assert job.run() == 0
    check_rows(read(job.output), expected, {CULPRIT: "internal"})


class PanicException(BaseException):
    """As the tokenizer's Rust raises it."""


@pytest.mark.parametrize(
    "error", [ValueError("no"), RecursionError("deep"), PanicException("unwrap on None")]
)
def test_a_row_whose_tokenizer_fails_is_the_only_error(make_job, monkeypatch, error):
    job = make_job(*TOGETHER)
    expected = job.undisturbed()
    real = Codec.prompt

    def prompt(self, layout, segments):
        if any(text.startswith(f"row {CULPRIT}: ") for _, text in segments):
            raise error
        return real(self, layout, segments)

    monkeypatch.setattr(Codec, "prompt", prompt)
    assert job.run() == 0
    rows = read(job.output)
    check_rows(rows, expected, {CULPRIT: "tokenizer"})
    assert str(error) in rows[CULPRIT]["error_message"]
