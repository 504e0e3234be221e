"""What flows through the pipeline: rows, their tokens, and their answers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, field, replace
from enum import Enum
from typing import TYPE_CHECKING, Any, Literal, NamedTuple
from zlib import crc32

from pipeline.texts.redaction import without_secrets

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa


WHOLE = "whole"  # for a role: the text is the whole prompt, to which no template is applied


class Turn(NamedTuple):
    """One message of a row that has messages, or its prompt."""

    role: str
    texts: tuple[str, ...]  # names of what it is joined of: document, question, row.NAME of a field
    between: str  # what joins them


class ResponseFormat(NamedTuple):
    """The form that an answer must have, whatever the model would rather write."""

    kind: Literal["json_schema", "regex", "choices"]
    text: str  # the schema or the list of choices as JSON, or the regular expression


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingParams:
    """What a row itself says of its answer; None where it leaves it to the run."""

    max_new_tokens: int | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    stop: tuple[str, ...] | None = None
    response_format: ResponseFormat | None = None
    schema: str | None = None  # of JSON that the answer is to be valid under, as JSON


AS_THE_RUN = SamplingParams()


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """Where a record came from, and what is copied to the output untouched."""

    row: int  # 0-based, over the whole input; blank JSONL lines count
    id: str
    place: str  # for messages: "contracts.jsonl line 17"
    # one row of a table, or the other keys of a row that is a mapping
    passthrough: pa.RecordBatch | Mapping[str, Any] | None = None
    task: str | None = None  # what kind it is of, where rows tell
    question: str | None = None  # that is asked about the document
    fields: Mapping[str, str] = field(default_factory=dict)  # columns that the prompt template writes
    turns: tuple[Turn, ...] = ()  # of a row that has messages
    params: SamplingParams = AS_THE_RUN
    model: str | None = None  # which the row asks for: the run's answers it
    row_hash: str | None = None  # of id, text, question, fields and params: a resumed run knows it by that
    question_index: int | None = None  # from 0, of a row that asks several
    question_name: str | None = None  # of a question with a column of its own: the end of `id`, behind #

    @property
    def draw_number(self) -> int:
        """What tells the row's random draws from those of others, in its lowest 32 bits."""
        if self.question_name is not None:  # wherever it stands among others
            return self.row + crc32(self.question_name.encode())
        return self.row + (0 if self.question_index is None else (self.question_index + 1) * 0x9E3779B1)

    def called(self, id: str) -> Row:
        """The same row under another id; that of one of several questions goes on with its name or index."""
        return replace(self, id=id + self._of_question)

    @property
    def document_id(self) -> str:
        """The id without the name or index of the row's question, if it has one of several."""
        return self.id.removesuffix(self._of_question)

    @property
    def _of_question(self) -> str:
        named = self.question_index if self.question_name is None else self.question_name
        return "" if named is None else f"#{named}"


NO_ROW = Row(row=-1, id="", place="")


# every word that `error_type` may hold; the guide of outputs says what each means
ErrorType = Literal[
    "bad_csv",
    "bad_json",
    "bad_messages",
    "bad_question_type",
    "bad_request",
    "bad_text",
    "bad_text_type",
    "bad_utf8",
    "bad_value",
    "duplicate_id",
    "empty_document",
    "encrypted",
    "host_memory",
    "incomplete",
    "internal",
    "kv_memory",
    "long_line",
    "missing_field",
    "missing_id",
    "missing_messages",
    "missing_question",
    "missing_text",
    "no_progress",
    "no_text",
    "not_an_object",
    "not_finite",
    "out_of_memory",
    "over_long",
    "template",
    "timeout",
    "tokenizer",
    "unasked_question",
    "unreadable",
    "unsupported",
    "worker_died",
]


@dataclass(eq=False)
class RowError(Exception):
    """Why one row is not answered: raised where that is found, and then, of its `source`, in the row's place.

    `kind` is the stable word written to the output's `error_type`, `status` is `error` or `skipped`.
    """

    kind: ErrorType
    message: str
    source: Row = NO_ROW  # until it is known
    _: KW_ONLY
    status: str = "error"
    document_tokens: int | None = None
    prompt_tokens: int | None = None
    excess_tokens: int = 0  # of a prompt that is too long: above the limit
    lacks: str | None = None  # the column that the row does not have
    is_fault: bool = False  # it stands for rows that could not be read, of which nothing is known

    def __post_init__(self) -> None:
        self.message = without_secrets(self.message)
        self.args = (self.kind, self.message)  # with which it is unpickled

    def __str__(self) -> str:
        return self.message

    def at(self, source: Row, **details: Any) -> RowError:
        """The same of this row, whose place the message then begins with."""
        return replace(self, message=f"{source.place}: {self}", source=source, **details)


@dataclass(frozen=True, kw_only=True, slots=True)
class Document:
    """One row that was read."""

    source: Row
    text: str
    questions: tuple[str | RowError, ...] | None = None  # where a row asks several; or what ails one

    @property
    def question(self) -> str | None:
        return self.source.question


Record = Document | RowError


@dataclass(frozen=True, kw_only=True, slots=True)
class Spans:
    """Half-open token ranges of a prompt; tokens in neither are the instruction (template and system)."""

    document: tuple[int, int]
    question: tuple[int, int]


OPENS, CLOSES = "<think>", "</think>"  # what stands around the reasoning of models that think first


class Reasoning(Enum):
    """What a prompt says of reasoning that may stand before the answer."""

    BEGUN = "begun"  # it ends with the mark that opens it
    POSSIBLE = "possible"  # the model is one that may reason, and nothing is begun
    UNEXPECTED = "unexpected"  # it was closed, or no such model: there is one only if it is opened


@dataclass(frozen=True, kw_only=True, slots=True)
class EncodedDocument:
    """A prompt ready for the model."""

    source: Row
    input_ids: np.ndarray  # (T,) int64
    spans: Spans
    truncated_tokens: int = 0
    tokenize_ms: float = 0.0
    ready_at: float = 0.0  # time.perf_counter() when tokenization ended
    reasoning: Reasoning | None = None  # None: whatever the model writes is the answer
    is_final: bool = True  # its answer is the row's, and no other is made of it

    @property
    def prompt_tokens(self) -> int:
        return len(self.input_ids)

    @property
    def document_tokens(self) -> int:
        return self.spans.document[1] - self.spans.document[0]


@dataclass(frozen=True, kw_only=True, slots=True)
class PartAnswer:
    """One step of a row that was answered in parts: a part of its document, or several answers combined."""

    depth: int  # 0: a part of the document; then combinations of answers of the depths before
    start: int  # of a part the characters of the document, of a combination the parts that went into it,
    end: int  # both counted from 0 and half-open
    prompt_tokens: int | None = None
    new_tokens: int | None = None
    answer: str | None = None
    prefill_ms: float | None = None
    ttft_ms: float | None = None
    decode_ms: float | None = None
    kept_ratio: float | None = None
    ffn_ratio: float | None = None
    attention_ratio: float | None = None
    flops_ratio: float | None = None
    finish_reason: str | None = None
    status: str = "skipped"  # ok or error; skipped: a part of white space alone, which is not sent
    error_type: str | None = None
    error_message: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class OneOfSeveral:
    """One of the answers that a prompt was given."""

    answer: str
    reasoning: str | None
    finish_reason: str | None
    new_tokens: int


@dataclass(frozen=True, kw_only=True, slots=True)
class ChoiceLogprob:
    """How likely one of the choices is."""

    choice: str
    logprob: float | None  # natural logarithm; None: not known, see `ChoiceMatcher.logprobs`


@dataclass(kw_only=True, slots=True)
class Answer:
    """One row of the output; the fields up to `passthrough` are its columns, in this order."""

    id: str
    row: int
    question_index: int | None = None
    question: str | None = None
    status: str = "ok"
    answer: str | None = None
    answers: list[OneOfSeveral] | None = None  # all, where there are to be several
    reasoning: str | None = None
    finish_reason: str | None = None
    valid: bool | None = None  # under the JSON schema that the answer is held against; None without one
    tries: int | None = None  # answers that were drawn until one was valid
    error_type: str | None = None
    error_message: str | None = None
    # only with --logprobs, the last of them only with --choices too
    mean_logprob: float | None = None
    min_logprob: float | None = None
    choice_logprobs: list[ChoiceLogprob] | None = None
    skipped_ffn_ratio: float | None = None  # only where a method leaves parts of decode steps out
    document_tokens: int | None = None
    prompt_tokens: int | None = None
    truncated_tokens: int | None = None
    new_tokens: int | None = None
    draft_tokens: int | None = None
    accepted_tokens: int | None = None
    queue_ms: float | None = None
    tokenize_ms: float | None = None
    prefill_ms: float | None = None
    ttft_ms: float | None = None
    decode_ms: float | None = None
    pack_documents: int | None = None
    pack_tokens: int | None = None
    shared_ms: float | None = None
    group_rows: int | None = None
    method: str | None = None
    kept_tokens: list[int] | None = None
    ffn_tokens: list[int] | None = None
    ffn_fp8_tokens: list[int] | None = None
    kept_ratio: float | None = None
    ffn_ratio: float | None = None
    attention_ratio: float | None = None
    flops_ratio: float | None = None
    kv_bytes: int | None = None
    kv_host_bytes: int | None = None
    kv_swapped_bytes: int | None = None
    parts: list[PartAnswer] | None = None
    guard: str | None = None
    row_hash: str | None = None
    # from here on only with --save-selection
    selection: list[bytes] | None = field(default=None, repr=False)  # as tiers.py packs it
    prompt_text: str | None = field(default=None, repr=False)
    prompt_token_chars: list[int] | None = field(default=None, repr=False)
    prompt_spans: list[int] | None = None
    passthrough: pa.RecordBatch | Mapping[str, Any] | None = field(default=None, repr=False)

    @classmethod
    def begin(cls, source: Row, method: str) -> Answer:
        """An answer that says only whose it is."""
        return cls(
            id=source.id,
            row=source.row,
            question_index=source.question_index,
            question=source.question,
            method=method,
            row_hash=source.row_hash,
            passthrough=source.passthrough,
        )

    def fail(self, error: RowError) -> None:
        """Say that there is no answer, and why."""
        self.status, self.error_type, self.error_message = error.status, error.kind, error.message

    @property
    def finish_reasons(self) -> list[str | None]:
        """Of each of its answers."""
        return [each.finish_reason for each in self.answers or (self,)]

    @property
    def is_unanswered(self) -> bool:
        """Whether the model reasoned, for an answer here or in a part, until it had no tokens left for it."""
        if any(each.reasoning is not None and not each.answer for each in self.answers or (self,)):
            return True
        return any(part.finish_reason == "length" and not part.answer for part in self.parts or ())

    @classmethod
    def from_failure(cls, failure: RowError, method: str) -> Answer:
        answer = cls.begin(failure.source, method)
        answer.fail(failure)
        answer.document_tokens, answer.prompt_tokens = failure.document_tokens, failure.prompt_tokens
        return answer


class Answered(NamedTuple):
    """A document, and its answer or its error row."""

    document: EncodedDocument
    answer: Answer
    # when its prefill began, that of what it shares with others included, by time.perf_counter(); of an error
    # row perhaps 0
    started: float = 0.0
