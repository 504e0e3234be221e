"""Which rows are read, which of their columns, and what is asked of them."""

from __future__ import annotations

from itertools import combinations

from pipeline.errors import ConfigError
from pipeline.settings.kinds import BYTES
from pipeline.settings.option import ANSWERS, READING, Settings, option
from pipeline.settings.parse import parse_shard
from pipeline.settings.questions import AskedQuestion, read_questions

# what the model is asked for, by the word of --summarise
SUMMARIES = {
    "short": "Summarise this document in a few sentences.",
    "page": "Summarise this document on one page: what it is about, its main points, and what follows from "
    "them.",
    "detailed": "Summarise this document in detail, section by section, with the names, figures and dates "
    "that matter.",
}
SUMMARY_TOKENS = 512  # longest summary, and longest part of one, unless --max-new-tokens says otherwise
ANSWER_TOKENS = 128  # longest answer to a question

# of these settings one at most is given
ASKED = ("question", "question_column", "questions_column", "questions", "summarise")


class SeedSettings(Settings, panel=ANSWERS):
    """Of all that is drawn."""

    seed: int = option(
        0, help="Seed of all draws: answers (with each row's number), rows, needles, intervals.", least=0
    )


class TextSettings(Settings, panel=READING):
    """Where a document's text is, and one question to all of them."""

    text_column: str | None = option(
        None,
        help="Column of the document.",
        shown_default="text, or else the only one of document, content, contents, body",
    )
    question: str | None = option(None, help="One question for all rows.")


class DataSettings(TextSettings, SeedSettings, panel=READING):
    """Rows of documents and what is asked of them.

    `input` are files, globs, folders or URLs; `shard` is text such as 2/8; `sample` and `limit` are rows.
    """

    input: tuple[str, ...] = option(
        (),
        metavar="INPUT...",
        help="Files, globs, folders or URLs of Parquet, JSONL or CSV (.gz, .zst), Arrow, or "
        "documents (.txt, .md, .pdf, .docx, .html); "
        "- is JSONL from stdin.",
        in_environment=False,
        panel=None,
    )
    messages_column: str | None = option(
        None,
        help="Column of chat messages (role and content), in the place of document and question.",
        shown_default="messages, where there is no document",
    )
    question_column: str | None = option(
        None, help="Column of the question.", shown_default="question, if there is one"
    )
    questions_column: str | None = option(
        None, help="Column of a list of questions, each of which gets an answer row."
    )
    questions: str | None = option(
        None,
        metavar="FILE",
        help="JSON, JSONL or TOML of questions (name, question, perhaps schema, max_new_tokens) that each "
        "document is asked; the output of batch has a row a document, and a column a question.",
    )
    summarise: str | None = option(
        None,
        metavar="[=short|page|detailed]",
        help="Ask for a summary, in a few sentences (short), on one page, or section by section.",
        choices=tuple(SUMMARIES),
        bare="short",
        shown_default="short, where no question is found",
    )
    id_column: str | None = option(
        None, help="Column of the id.", shown_default="id, if there is one, or else file and row number"
    )
    task_column: str | None = option(
        None, help="Column of the kind of task, which profiles and the tables of check tell apart."
    )
    longest_line: int | None = option(
        None,
        metavar="BYTES",
        help="Longest line of JSONL, row of CSV or text document, decompressed, e.g. 4GiB; a longer one is "
        "an error row.",
        shown_default="1GiB",
        kind=BYTES,
        least=1,
    )
    shard: str | None = option(
        None,
        metavar="I/N",
        help="Every N-th row, from the I-th on.",
        shown_default="all rows",
        check=parse_shard,
    )
    sample: int | None = option(
        None, metavar="N", help="N rows drawn with --seed (of the shard).", shown_default="all rows", least=1
    )
    limit: int | None = option(
        None,
        metavar="N",
        help="First N rows (of shard and sample); of a suite, tasks and documents in turn.",
        shown_default="all rows",
        least=1,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for first, second in combinations(ASKED, 2):
            if getattr(self, first) is not None and getattr(self, second) is not None:
                flags = (f"--{name.replace('_', '-')}" for name in (first, second))
                raise ConfigError(f"{' and '.join(flags)} exclude each other")

        for name in ("text_column", *ASKED):
            if self.messages_column is not None and getattr(self, name) is not None:
                flag = f"--{name.replace('_', '-')}"
                raise ConfigError(f"--messages-column and {flag} exclude each other: messages say it all")

    @property
    def is_asked(self) -> bool:
        """Whether questions are named, for all rows, in a column or in messages, or a summary asked for."""
        return any(getattr(self, name) is not None for name in (*ASKED, "messages_column"))

    def asked_questions(self) -> tuple[AskedQuestion, ...]:
        """The questions with names, read from their file. Raises ConfigError."""
        return () if self.questions is None else read_questions(self.questions)

    @property
    def question_to_all(self) -> str | None:
        """The question that all rows have in common, if they have one."""
        return self.question if self.summarise is None else SUMMARIES[self.summarise]
