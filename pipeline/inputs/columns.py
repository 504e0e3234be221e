"""Which input columns are the text, the question and the id, and which are copied to the output."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from urllib.parse import unquote

import pyarrow as pa

from pipeline.errors import ConfigError, InputError, did_you_mean
from pipeline.inputs.requests import REQUEST_KEYS
from pipeline.outputs.own_columns import ADDED_NAMES, ANSWERS, OWN_NAMES, STATS, left_out
from pipeline.settings.questions import AskedQuestion
from pipeline.storage.causes import some

Keep = Mapping[str, str | None]  # names of columns, with the names of types that they are to have

LONGEST = 2**30  # bytes of a line; what pyarrow and JSON can hold of one text is not much more
Partitions = Mapping[str, str | None]  # columns that stand in the names of folders, by Hive and Spark
PARTITION_TYPE = pa.large_string()
NULL = "__HIVE_DEFAULT_PARTITION__"

SHORT_TYPES = {"string": pa.large_string(), "int": pa.int64(), "float": pa.float64(), "bool": pa.bool_()}
SOME_TYPES = "string, int, float, bool, int32, float32, date32, timestamp[us], binary"


@dataclass(frozen=True, kw_only=True)
class Columns:
    """Columns of Parquet and Arrow input, keys of JSONL input; text documents have none.

    `keep` of None copies every other column, and of JSONL the other keys as JSON in one column `extra`;
    an empty `keep` copies nothing.
    """

    text: str = "text"
    messages: str | None = None  # of a chat, in the place of text and question
    requests: bool = False  # of OpenAI's Batch API: rows are those, in the place of all of these
    question: str | None = None
    questions: str | None = None  # a list of questions, of which each gets an answer
    asked: tuple[AskedQuestion, ...] = ()  # with names, which all documents are asked
    fixed_question: str | None = None
    id: str | None = None
    task: str | None = None  # a kind of task; also copied, if it is among what is copied
    fields: tuple[str, ...] = ()  # which the prompt template writes; also copied, likewise
    takes_ids: bool = False  # from `id`, which nobody named: a row without one has its place for an id
    asks_summary: bool = False  # as no question was found: a row that has one was meant to be asked
    predates: frozenset[str] = frozenset()  # columns of answers that came after the output was begun
    left_out: frozenset[str] = left_out(None)  # columns of answers that nobody wants in the output
    added: frozenset[str] = frozenset()  # those that the output has only because a setting adds them
    keep: Keep | None = None
    longest_line: int = LONGEST  # of JSON lines, in bytes

    def __post_init__(self) -> None:
        if sum(given is not None for given in (self.question, self.questions, self.fixed_question)) > 1:
            raise ConfigError(
                "a question column, a column of questions and one question for all rows exclude each other; "
                "give one of them"
            )
        if self.text in (self.question, self.questions):
            raise ConfigError(f"the question column is the text column, {self.text!r}")
        for type_name in (self.keep or {}).values():
            if type_name is not None:
                type_named(type_name)

    @property
    def lacks(self) -> frozenset[str]:
        """The columns of answers that the output does not have."""
        return self.predates | self.left_out

    @property
    def names_of_answers(self) -> frozenset[str]:
        """What no copied column is called: all names of answers' columns, whichever are wanted.

        The struct of statistics, the list of several answers and what settings add must be wanted: to copy a
        column of their names was possible before. Questions with names have columns too.
        """
        unwanted = (self.left_out & {STATS, ANSWERS}) | (frozenset(ADDED_NAMES) - self.added)
        own = frozenset(OWN_NAMES) - self.predates - unwanted
        return own | self.added | {each.name for each in self.asked}

    @property
    def roles(self) -> tuple[str, ...]:
        """The columns that are read for themselves, each once."""
        if self.requests:
            return REQUEST_KEYS
        names = (self.messages or self.text, self.question, self.questions, self.id)
        return tuple(dict.fromkeys(name for name in names if name is not None))

    @property
    def read(self) -> tuple[str, ...]:
        """The columns that are looked at."""
        task = () if self.task is None else (self.task,)
        return tuple(dict.fromkeys((*self.roles, *task, *self.fields)))


def lacking_field(label: str, name: str, names: Collection[str]) -> InputError:
    """What to say of a file without a column that the prompt template writes."""
    return InputError(
        f"{label} has no column {name!r}{did_you_mean(name, names)}; it has: {some(names)} "
        "(--prompt-template writes it)"
    )


def parse_keep_columns(spec: str) -> Keep:
    """Parse `a:int,b:string,c`; a column without a type keeps its own (JSONL: string)."""
    keep: dict[str, str | None] = {}
    for part in spec.split(",") if spec.strip() else ():
        name, type_name = _parse_one(part.strip(), spec)
        if name in keep:
            raise ConfigError(f"kept column {name!r} is named twice")
        if type_name is not None:
            type_named(type_name)
        keep[name] = type_name
    return keep


def type_named(name: str) -> pa.DataType:
    """The Arrow type of a name; plain `string` is the large kind, `int` and `float` are the 64-bit ones."""
    if name in SHORT_TYPES:
        return SHORT_TYPES[name]
    try:
        return pa.type_for_alias(name)
    except ValueError:
        raise ConfigError(f"{name!r} is not a column type; types are, for example, {SOME_TYPES}") from None


def _parse_one(part: str, spec: str) -> tuple[str, str | None]:
    name, colon, type_name = part.rpartition(":") if ":" in part else (part, "", "")
    name, type_name = name.strip(), type_name.strip()
    if not name or (colon and not type_name):
        raise ConfigError(
            f"kept columns {spec!r} cannot be parsed at {part!r}; write name or name:type, comma-separated"
        )
    return name, type_name or None


def partitions_of(folders: Sequence[str]) -> dict[str, str | None]:
    """The columns that the names of folders say, `year=2024/`, outermost first; other names say none."""
    found: dict[str, str | None] = {}
    for folder in folders:
        key, equals, value = folder.partition("=")
        if key and equals:
            found[unquote(key)] = None if value == NULL else unquote(value)
    return found


def with_fields(schema: pa.Schema, partitions: Partitions) -> pa.Schema:
    """The schema with a text column for each key that it lacks."""
    for key in partitions:
        if key not in schema.names:
            schema = schema.append(pa.field(key, PARTITION_TYPE))
    return schema


def with_arrays(batch: pa.RecordBatch, partitions: Partitions) -> pa.RecordBatch:
    """The batch with a column of one value for each key that it lacks."""
    for key, value in partitions.items():
        if key not in batch.schema.names:
            batch = batch.append_column(
                pa.field(key, PARTITION_TYPE), pa.repeat(pa.scalar(value, PARTITION_TYPE), batch.num_rows)
            )
    return batch
