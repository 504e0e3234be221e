"""The names of an answer's own columns, and which of them an output has. Imports nothing heavy."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import fields

from pipeline.errors import ConfigError, did_you_mean
from pipeline.records import Answer

# by which a resumed run knows rows: every output has them
INDEXED = ("id", "row", "question_index", "status", "error_type", "row_hash")
SELECTION_NAMES = ("selection", "prompt_text", "prompt_token_chars", "prompt_spans")  # when asked for
OF_DOCUMENTS = ("id", "row", "status")  # beside the columns of questions, where a row is a document
LOGPROB_NAMES = ("mean_logprob", "min_logprob")  # where it is told how likely tokens were
CHOICE_LOGPROBS = "choice_logprobs"  # and how likely each choice
VALIDITY_NAMES = ("valid", "tries")  # where answers are held against a JSON schema
SKIPPED_FFNS = "skipped_ffn_ratio"  # where a method leaves parts of decode steps out
VALUE = "value"  # of typed columns, which are made of an answer where it is written
ADDED_NAMES = (
    *LOGPROB_NAMES,
    CHOICE_LOGPROBS,
    SKIPPED_FFNS,
    *VALIDITY_NAMES,
    VALUE,
)  # which only settings add
STATS = "stats"  # the column that holds all statistics as one struct
ANSWERS = "answers"  # which an output has where prompts get several
STATISTICS = (
    *("document_tokens", "prompt_tokens", "truncated_tokens", "new_tokens"),
    *("draft_tokens", "accepted_tokens"),
    *("queue_ms", "tokenize_ms", "prefill_ms", "ttft_ms", "decode_ms"),
    *("pack_documents", "pack_tokens", "shared_ms", "group_rows"),
    *("kept_tokens", "ffn_tokens", "ffn_fp8_tokens"),
    *("kept_ratio", "ffn_ratio", "attention_ratio", "flops_ratio"),
    *("kv_bytes", "kv_host_bytes", "kv_swapped_bytes"),
)


def _ordered() -> tuple[str, ...]:
    names = [field.name for field in fields(Answer) if field.name != "passthrough"]
    names.insert(names.index(STATISTICS[-1]) + 1, STATS)
    return tuple(names)


OWN_NAMES = _ordered()  # all there are, in the order in which an output has them
CHOSEN_FROM = tuple(name for name in OWN_NAMES if name not in (*INDEXED, *SELECTION_NAMES, *ADDED_NAMES))


def check_column(name: str, flag: str = "--columns") -> None:
    """Raise ConfigError for a name that is none of the columns that an output may go without."""
    if name in SELECTION_NAMES:
        raise ConfigError(f"{flag} {name!r}: --save-selection adds it")
    if name in ADDED_NAMES:
        of_likelihood = (*LOGPROB_NAMES, CHOICE_LOGPROBS)
        adds = dict.fromkeys(of_likelihood, "--logprobs")
        adds |= {VALUE: "--expand", SKIPPED_FFNS: "--method ffn-skip"}
        raise ConfigError(f"{flag} {name!r}: {adds.get(name, 'a JSON schema (--validate)')} adds it")
    if name not in (*CHOSEN_FROM, *INDEXED):
        raise ConfigError(
            f"{flag} {name!r} is no column of answers{did_you_mean(name, CHOSEN_FROM)}; they are "
            f"{', '.join(CHOSEN_FROM)}; --keep-columns names those of the input"
        )


def left_out(chosen: Iterable[str] | None, *, several: bool = False) -> frozenset[str]:
    """The columns that an output goes without if these are wanted; None: all but the struct.

    `several` says whether prompts get several answers.
    """
    gone = frozenset({STATS}) if chosen is None else frozenset(CHOSEN_FROM).difference(chosen)
    return gone if several else gone | {ANSWERS}


def own_prefix(names: Sequence[str]) -> list[str]:
    """Of an output's columns the answer's own, which stand first and in their order.

    An output of an earlier version may copy a column of a name that came later: it stands behind.
    """
    own: list[str] = []
    for name in OWN_NAMES:
        if len(own) < len(names) and names[len(own)] == name:
            own.append(name)
    return own
