"""Answers in the form of OpenAI's Batch API: one JSON object a row, with a response of the API in it.

Rows without an answer stand in a file of their own beside the output. What the API has no place for, a row's
number and hash and its statistics, stands in each object under `marsinfer`; from it a resumed run reads the
rows back.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa

from pipeline.outputs.beginnings import about as about_run
from pipeline.outputs.own_columns import ANSWERS, OWN_NAMES, STATS
from pipeline.records import ErrorType
from pipeline.storage.remote import Place, RemotePath

AnyPlace = TypeVar("AnyPlace", Path, RemotePath, Place)

URL = "url"  # of a request to where it is sent: copied to the output
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
OWN = "marsinfer"
REQUESTS_KEY = "requests"  # of an output's metadata: whether its rows are requests
LINES = ".jsonl"
ERRORS = ".errors"  # what the name of the file of failed rows has before its extension

TEXTS = ("answer", "finish_reason", "error_message")  # columns without which there is no response
COUNTS = ("prompt_tokens", "new_tokens")  # likewise, be they in the struct of statistics
# columns that stand in the response, and nowhere else
TOLD_THERE = ("id", "answer", "reasoning", "error_message")

# by the kind of error: what is not the request's fault
SERVER_ERRORS: frozenset[ErrorType] = frozenset(
    {
        *("internal", "no_progress", "not_finite", "out_of_memory", "timeout", "tokenizer"),
        *("kv_memory", "unreadable", "worker_died"),
    }
)
# of OpenAI's; all other kinds stand for themselves
CODES: dict[ErrorType, str] = {"over_long": "context_length_exceeded"}


def is_of_requests(schema: pa.Schema) -> bool:
    """Whether an output of this schema has requests for rows, by its metadata."""
    return bool(about_run(schema).get(REQUESTS_KEY))


def is_lines(output: str) -> bool:
    """Whether an output, by its name, is JSON lines: of requests they have the form of the Batch API."""
    return os.path.splitext(output)[1].lower() == LINES


def is_batch_form(output: Path, schema: pa.Schema) -> bool:
    """Whether an output of this schema has the form of the Batch API."""
    return is_lines(output.name) and is_of_requests(schema)


def with_response(columns: Iterable[str], *, several: bool = False) -> list[str]:
    """These columns of answers, and those that a response takes, to prompts with `several` answers or one."""
    wanted = list(columns)
    return [*wanted, *TEXTS, *((ANSWERS,) if several else ()), *(() if STATS in wanted else COUNTS)]


def errors_path(output: AnyPlace) -> AnyPlace:
    """Where the rows without an answer are: beside the file itself, if the output is a link."""
    if isinstance(output, RemotePath):
        stem, extension = os.path.splitext(output.name)
        return output.beside(f"{stem}{ERRORS}{extension}")
    target = Path(os.path.realpath(output))
    return target.with_name(f"{target.stem}{ERRORS}{target.suffix}")


def output_of(errors: str) -> str | None:
    """The name of the output beside which a file of this name may hold failed rows; None beside none."""
    stem, extension = os.path.splitext(errors)
    is_errors = extension.lower() == LINES and stem.endswith(ERRORS)
    return f"{stem.removesuffix(ERRORS)}{extension}" if is_errors else None


class Responses:
    """Makes the lines of an output: answers by the model, and at the time, that its metadata says."""

    def __init__(self, schema: pa.Schema) -> None:
        about = about_run(schema)
        self._model, self._created = str(about.get("model", "")), _seconds(about.get("started"))

    def of(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """The object of a row with these columns, but for what stands in it under `marsinfer`."""
        number = row["row_hash"]
        status, body = (200, self._completion(row)) if row["status"] == "ok" else _refusal(row)
        return {
            "id": f"batch_req_{number}",
            "custom_id": row["id"],
            "response": {"status_code": status, "request_id": f"req_{number}", "body": body},
            "error": None,
        }

    def _completion(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """A chat completion or a text completion, as was asked for, with a choice for each answer."""
        is_text = row.get(URL) == COMPLETIONS
        counts = {**(row.get(STATS) or {}), **row}
        asked, made = (counts[name] or 0 for name in COUNTS)
        return {
            "id": f"{'cmpl' if is_text else 'chatcmpl'}-{row['row_hash']}",
            "object": "text_completion" if is_text else "chat.completion",
            "created": self._created,
            "model": self._model,
            "choices": [_choice(n, each, is_text) for n, each in enumerate(row.get(ANSWERS) or [row])],
            "usage": {"prompt_tokens": asked, "completion_tokens": made, "total_tokens": asked + made},
        }


def _choice(index: int, answer: Mapping[str, Any], is_text: bool) -> dict[str, Any]:
    reason = "length" if answer["finish_reason"] == "length" else "stop"
    told = {"text": answer["answer"]} if is_text else {"message": _message(answer)}
    return {"index": index, **told, "logprobs": None, "finish_reason": reason}


def _message(answer: Mapping[str, Any]) -> dict[str, Any]:
    """The assistant's message of a chat completion."""
    message = {"role": "assistant", "content": answer["answer"], "refusal": None}
    reasoning = answer.get("reasoning")
    return message if reasoning is None else {**message, "reasoning_content": reasoning}


def told_there(line: Mapping[str, Any]) -> dict[str, Any]:
    """The columns of a row that stand in the response alone. Raises LookupError, TypeError for no line."""
    body, told = line["response"]["body"], dict.fromkeys(TOLD_THERE)
    told["id"] = line["custom_id"]
    if "error" in body:
        told["error_message"] = body["error"]["message"]
    else:
        choice = body["choices"][0]
        message = choice.get("message", {})
        told["answer"] = choice["text"] if "text" in choice else message["content"]
        told["reasoning"] = message.get("reasoning_content")
    return told


def names_told(line: Mapping[str, Any]) -> list[str]:
    """All columns that a line tells, those of answers in their order."""
    found = {*line[OWN], *TOLD_THERE}
    return [
        *(name for name in OWN_NAMES if name in found),
        *(name for name in line[OWN] if name not in OWN_NAMES),
    ]


def _refusal(row: Mapping[str, Any]) -> tuple[int, dict[str, Any]]:
    """The status, and the body, of a row without an answer."""
    kind = row["error_type"]
    is_ours = kind in SERVER_ERRORS
    error = {
        "message": row["error_message"],
        "type": "server_error" if is_ours else "invalid_request_error",
        "param": None,
        "code": CODES.get(kind, kind),
    }
    return (500 if is_ours else 400), {"error": error}


def _seconds(moment: object) -> int:
    """Since 1970, of a moment as metadata tell it; 0 where they do not."""
    try:
        return int(datetime.fromisoformat(str(moment)).timestamp())
    except ValueError:
        return 0
