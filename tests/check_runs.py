"""`marsinfer check` over a few rows of a tiny model."""

from __future__ import annotations

import json

from marsinfer_cli.app import run

ROWS = [
    {
        "doc": f"row-{number}",
        "body": f"{word} fish swim past the {word} reef. " * (4 + number),
        "ask": f"how many {word} fish?",
        "right": f"about {number}",
        "kind": "odd" if number % 2 else "even",
    }
    for number, word in enumerate(["red", "blue", "green", "old", "new", "big", "sad", "glad"])
]
ASK = ["--question-column", "ask", "--id-column", "doc"]
REFERENCES = [*ASK, "--reference-column", "right"]


def write_rows(path):
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def check_with(model):
    """The command with this model; it returns the exit code."""
    flags = ["--model", str(model), "--text-column", "body", "--max-new-tokens", "8", "--quiet"]

    def check(*arguments):
        return run(["check", *map(str, arguments), *flags])

    return check


def refusal_of(check, capfd):
    """What a check that must end with 2 says, in its one line."""

    def refusal(*arguments):
        assert check(*arguments) == 2
        printed = capfd.readouterr()
        assert printed.out == ""
        assert len(printed.err.splitlines()) == 1, printed.err
        return printed.err.removeprefix("marsinfer: error: ").rstrip()

    return refusal
