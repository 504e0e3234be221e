"""What a deadline means, by when a run began."""

from __future__ import annotations

import time
from datetime import datetime

import pytest

from pipeline.errors import ConfigError
from pipeline.settings.moments import deadline_after, moment_told, parse_deadline


@pytest.fixture(autouse=True)
def in_berlin(monkeypatch):
    with monkeypatch.context() as patched:
        patched.setenv("TZ", "Europe/Berlin")
        time.tzset()
        yield
    time.tzset()


@pytest.mark.parametrize(
    ("text", "began", "moment"),
    [
        ("8h", "2026-11-27T22:00+01:00", "2026-11-28T06:00+01:00"),
        ("90m", "2026-11-27T22:00+01:00", "2026-11-27T23:30+01:00"),
        (" 1H30m ", "2026-11-27T22:00+01:00", "2026-11-27T23:30+01:00"),
        ("1.5d", "2026-11-27T22:00+01:00", "2026-11-29T10:00+01:00"),
        ("45s", "2026-11-27T21:00+00:00", "2026-11-27T22:00:45+01:00"),
        ("06:00", "2026-11-27T22:00+01:00", "2026-11-28T06:00+01:00"),
        ("6:00", "2026-11-27T05:59+01:00", "2026-11-27T06:00+01:00"),
        ("06:00:30", "2026-11-27T06:00+01:00", "2026-11-27T06:00:30+01:00"),
        ("06:00", "2026-11-27T06:00+01:00", "2026-11-28T06:00+01:00"),
        ("06:00", "2026-11-26T23:30+00:00", "2026-11-27T06:00+01:00"),  # where it is Friday already
        ("06:00", "2026-03-28T22:00+01:00", "2026-03-29T06:00+02:00"),  # the night in which summer begins
        ("2026-11-28T06:00", "2026-11-27T22:00+01:00", "2026-11-28T06:00+01:00"),
        ("2026-11-28 06:00", "2026-11-27T22:00+01:00", "2026-11-28T06:00+01:00"),
        ("2026-11-28T06:00Z", "2026-11-27T22:00+01:00", "2026-11-28T07:00+01:00"),
        ("2020-01-01T00:00", "2026-11-27T22:00+01:00", "2020-01-01T00:00+01:00"),
    ],
)
def test_a_deadline_is_a_moment(text, began, moment):
    assert deadline_after(text, datetime.fromisoformat(began)) == datetime.fromisoformat(moment)


@pytest.mark.parametrize("text", ["8", "8x", "h", "-8h", "2026-11-28", "tomorrow", "6:0", "1e3h", "8h 30"])
def test_what_is_no_deadline(text):
    with pytest.raises(ConfigError) as caught:
        parse_deadline(text)
    assert str(caught.value).startswith(f"--deadline {text!r}: give how long, such as 8h or 90m, a time of ")


@pytest.mark.parametrize(
    "text", ["25:00", "12:60", "12:00:61", "2026-13-28T06:00", "2026-11-28T06:00+99:00", "99999999999d"]
)
def test_a_moment_that_no_clock_shows(text):
    with pytest.raises(ConfigError) as caught:
        parse_deadline(text)
    assert str(caught.value).startswith(f"--deadline {text!r}: ")


def test_a_moment_that_no_calendar_has():
    with pytest.raises(ConfigError) as caught:
        deadline_after("99999999d", datetime.fromisoformat("2026-11-27T22:00+01:00"))
    assert str(caught.value).startswith("--deadline '99999999d' is a moment that no calendar has: ")


def test_a_moment_in_words():
    assert moment_told(datetime.fromisoformat("2026-11-28T05:00+00:00")) == "2026-11-28 06:00"
    assert moment_told(datetime.fromisoformat("2026-11-28T06:00:07+01:00")) == "2026-11-28 06:00:07"
