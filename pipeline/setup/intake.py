"""Rows on their way to the model: known ones left out, the others tokenized, bad ones marked."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from functools import partial
from typing import TYPE_CHECKING, Any

from pipeline.errors import ConfigError, InputError
from pipeline.inputs.columns import LONGEST, Columns, Keep, parse_keep_columns
from pipeline.inputs.readers import Reader
from pipeline.inputs.requests import REQUEST_ID
from pipeline.inputs.source import Source, open_source, source_of
from pipeline.outputs.answers import LATER_NAMES, QUESTION_NAME
from pipeline.outputs.batch_lines import is_lines, with_response
from pipeline.outputs.beginnings import QUESTIONS_KEY, UNASKED_KEY
from pipeline.outputs.own_columns import left_out
from pipeline.outputs.standing import begun_with
from pipeline.prompts.builder import PromptBuilder
from pipeline.prompts.chat import chat_source
from pipeline.prompts.mapreduce import COMBINE, COMBINE_AS_TEXT
from pipeline.prompts.splitting import SplitDocument, Splitter
from pipeline.prompts.templates import FileTemplate
from pipeline.prompts.within import Within, tokenizer_faults
from pipeline.records import EncodedDocument, Record, RowError
from pipeline.settings.data_settings import DataSettings
from pipeline.settings.prompt_settings import PromptSettings, SplitSettings
from pipeline.settings.questions import AskedQuestion, refuse_columns
from pipeline.settings.run_settings import BatchConfig
from pipeline.setup.asking import (
    NO_QUESTION,
    TEXT,
    Data,
    Settled,
    Types,
    as_before,
    as_begun,
    columns_decided,
    settled,
    with_lengths,
)
from pipeline.setup.validity import AnswerForm
from pipeline.texts.words import counted
from pipeline.values.json_answers import schema_in

if TYPE_CHECKING:
    from pipeline.model.loading import Model

COLUMNS = "columns"  # of the settings that decide: which were decided
LATER = "later_columns"  # of them: those of the output that earlier versions did not have
Item = EncodedDocument | SplitDocument | RowError

# of failures, what kind tells that the row has the text, or both; of rows of all other kinds neither is known
OF_MESSAGES = ("missing_messages", "bad_messages", "unsupported")
OF_TEXTS = ("missing_text", "empty_document", "bad_text_type", *OF_MESSAGES)
OF_QUESTIONS = ("missing_question", "bad_question_type")
OF_PROMPTS = ("over_long", "template", "missing_field")
DOCUMENT_ALONE = "{{ document }}"  # a template


@dataclass(frozen=True, kw_only=True)
class Intake:
    """The input of a run, opened, with settings that leave nothing open about it."""

    config: BatchConfig
    source: Source
    begun: Any  # the settings that decide, as the run that is resumed began with them; None if none is
    columns: dict[str, Any] | None  # what was decided, for the run that resumes this one
    form: AnswerForm  # of what the answers are to be
    notes: tuple[str, ...] = ()

    @property
    def is_old(self) -> bool:
        """Whether the run that is resumed is of the version before, which decided nothing by the input."""
        return self.begun is not None and COLUMNS not in self.begun


def open_rows(config: BatchConfig, given: Reader | None = None) -> Intake:
    """The input of a run, checked and opened, and what its settings leave open decided by it.

    `given` reads rows that are in no file; they stand for those of `config.input`.
    """
    begun = begun_with(config.output) if config.resume else None
    if begun is not None and QUESTIONS_KEY in begun and config.questions is None:
        raise ConfigError(f"{config.output} was begun with --questions: give its FILE again")
    keep = None if config.keep_columns is None else parse_keep_columns(config.keep_columns)
    is_form = config.holds_by_masks
    asked = [replace(each, is_form=is_form) for each in config.asked_questions()]
    typed = config.json_schema if config.expand else None
    form = AnswerForm.of(config, asked, None if typed is None else schema_in(typed, "--json-schema"))
    source, settled = open_columns(
        config,
        keep,
        config.format_name,
        begun,
        wanted=config.columns,
        several=config.n > 1,
        asked=asked,
        added=form.added | config.logprob_columns | config.step_columns,
        given=given,
    )
    if form.layout.schemas and settled.requests and is_lines(config.format_name):
        raise ConfigError(
            "--expand: JSON lines in the Batch API's form have no columns; name a .parquet or .arrow output"
        )
    if settled.settings.messages_column is not None and config.prompt_template is not None:
        raise ConfigError("--messages-column and --prompt-template exclude each other: messages say it all")
    if not (settled.settings.is_asked or settled.requests) and config.prompt_template is None:
        raise ConfigError(NO_QUESTION)
    return Intake(
        config=with_lengths(settled.settings),
        source=source,
        begun=begun,
        columns=columns_decided(settled) if begun is None or COLUMNS in begun else None,
        form=form,
        notes=(*source.notes, *settled.notes),
    )


def open_columns(
    data: Data,
    keep: Keep | None,
    output: str = "",
    begun: Any = None,
    *,
    wanted: Sequence[str] | None = None,
    several: bool = False,
    asked: Sequence[AskedQuestion] = (),
    added: frozenset[str] = frozenset(),
    asks: bool = True,
    given: Reader | None = None,
) -> tuple[Source, Settled]:
    """Rows of `data` and its settings, its columns and question decided by those of the first file.

    `keep`, `asked` and `added` as in `Columns`; `wanted` are the answer's columns that are chosen, None for
    all, and `several` says whether prompts get several answers. Raises ConfigError for a question that has
    the name of a column which is copied. A run that resumes another, with the settings `begun`, goes on with
    its columns. Where the rows are not asked anything, `asks` is false. `given` stands for the files of
    `data.input`.
    """
    found: list[Settled[Data]] = []

    def columns(types: Types | None) -> Columns:
        found.append(_settled(data, types, begun, asks=asks))
        chosen = wanted
        if wanted is not None and found[-1].requests and is_lines(output):
            chosen = with_response(wanted, several=several)
        gone = left_out(chosen, several=several)
        made = _columns(found[-1], keep, predates=_predates(begun), left_out=gone)
        if keep is None:
            refuse_columns(asked, [name for name in types or () if name not in made.roles])
        return replace(made, asked=tuple(asked), added=added)

    if given is None:
        source = open_source(data.input, columns, output)
    else:
        source = source_of([given], columns, output, [])
    return source, found[-1]


def _settled(data: Data, types: Types | None, begun: Any, *, asks: bool) -> Settled[Data]:
    if begun is not None:
        if COLUMNS not in begun:
            return as_before(data)
        return as_begun(data, begun[COLUMNS], asks_summary=UNASKED_KEY in begun)
    template = data.template_text() if isinstance(data, PromptSettings) else None
    template_asks = None if template is None else FileTemplate(template).asks
    return settled(data, types, template_asks=template_asks if asks else False)


def _predates(begun: Any) -> frozenset[str]:
    """Columns of answers that came after a run was begun with these settings."""
    if begun is None:
        return frozenset()
    question = () if COLUMNS in begun else (QUESTION_NAME,)
    return frozenset((*question, *LATER_NAMES)) - frozenset(begun.get(LATER, ()))


def _columns(
    settled: Settled[Any], keep: Keep | None, *, predates: frozenset[str], left_out: frozenset[str]
) -> Columns:
    """The columns of the input by what they are for."""
    data = settled.settings
    return Columns(
        text=data.text_column or TEXT,
        messages=data.messages_column,
        requests=settled.requests,
        question=data.question_column,
        questions=data.questions_column,
        fixed_question=data.question_to_all,
        id=REQUEST_ID if settled.requests else data.id_column,
        task=data.task_column,
        fields=_template_columns(data),
        keep=keep,
        takes_ids=settled.takes_ids,
        asks_summary=settled.asks_summary,
        predates=predates,
        left_out=left_out,
        longest_line=data.longest_line or LONGEST,
    )


def _template_columns(data: DataSettings) -> tuple[str, ...]:
    """The columns of a row that the templates of a run write, each once."""
    texts = [data.template_text()] if isinstance(data, PromptSettings) else []
    if isinstance(data, SplitSettings):
        # which is usual for summaries
        splits = data.on_overlong == "split" or (data.on_overlong is None and data.summarise is not None)
        texts += [data.combine_text()] if splits else []
    names = [name for text in texts if text is not None for name in FileTemplate(text).columns]
    return tuple(dict.fromkeys(names))


def make_prompts(
    settings: PromptSettings,
    model: Model,
    max_new_tokens: int,
    *,
    longest: int | None = None,
    now: datetime | None = None,
    parts_reasoning: bool = True,
    of_requests: bool = False,
    context: int | None = None,
) -> PromptBuilder:
    """The prompts for a model, with the answer of at most `longest` tokens, or as many as the model takes.

    That is its `context`, the trained one unless a method reads more.
    `now` is the moment whose date a chat template prints, the present where it is None. Without
    `parts_reasoning` all that the model writes is its answer. Prompts `of_requests` may be whole ones, for
    which the model needs no chat template.
    """
    context = context or model.shape.context
    template = settings.template_text()
    if template is None and of_requests and not chat_source(model.tokenizer):
        template = DOCUMENT_ALONE
    return PromptBuilder(
        model.tokenizer,
        context=context if longest is None else min(longest, context),
        max_new_tokens=max_new_tokens,
        system=settings.system,
        template=template,
        template_args=settings.template_args,
        on_overlong=settings.on_overlong,
        vocab=model.shape.vocab,
        now=now or datetime.now(),
        parts_reasoning=parts_reasoning,
    )


def make_splitter(config: SplitSettings, prompts: PromptBuilder, *, formed: bool = False) -> Splitter | None:
    """How a run with such prompts cuts over-long documents, if it does; `formed` as in `Splitter`."""
    if config.on_overlong != "split":
        return None
    template, body = config.combine_text(), None
    if template is None and chat_source(prompts.tokenizer):
        body = COMBINE
    elif template is None:
        template = COMBINE_AS_TEXT
    try:
        arguments = prompts.template_args if template is None else {}
        combine = replace(prompts, template=template, template_args=arguments, body=body)
    except ConfigError as error:
        raise ConfigError(f"the prompt that combines answers (--combine-template): {error}") from error
    return Splitter(prompts=prompts, combine=combine, overlap=config.split_overlap, formed=formed)


def item_prompts(item: Item) -> list[EncodedDocument]:
    """The prompts of an item that are known before any is answered; a failure has none."""
    if isinstance(item, EncodedDocument):
        return [item]
    return item.prompts if isinstance(item, SplitDocument) else []


def item_tokens(item: Item) -> int:
    """Prompt tokens of an item; a failure has none to work on."""
    return sum(prompt.prompt_tokens for prompt in item_prompts(item))


def encode_rows(
    records: Iterable[Record],
    prompts: PromptBuilder | Splitter,
    on_overlong: str,
    timeout_s: float | None = None,
) -> Iterator[Item]:
    """Tokenize what was read; a row that cannot be encoded, or not in time, becomes a failure in place."""
    within = Within(timeout_s)

    def encode(record: Record) -> Item:
        if isinstance(record, RowError):
            return record
        try:
            with tokenizer_faults():
                return within.run(partial(prompts.encode, record))
        except RowError as error:
            skipped = error.kind == "over_long" and on_overlong == "skip"
            return error.at(record.source, status="skipped" if skipped else "error")

    return map(encode, records)


class SoughtColumns:
    """The columns of text, question and templates, until a row of the input has shown that they are there."""

    def __init__(self, data: DataSettings, *, answered: bool = False) -> None:
        """`answered` says that earlier runs have answered rows, which had them."""
        self._text = data.messages_column or data.text_column
        asked = self._text, data.question_column, data.questions_column
        columns = () if answered else (*asked, *_template_columns(data))
        self._left = [name for name in columns if name is not None]
        self._read = 0

    def look(self, window: Sequence[Item]) -> None:
        """Look at the next rows. Raises InputError where none has a column, nor had before.

        It names the column, those there are, and the flag.
        """
        self._read += sum(not item.source.question_index for item in window)
        for name in tuple(self._left):
            lacking = [item for item in window if isinstance(item, RowError) and item.lacks == name]
            if any(_has(item, name, is_text=name == self._text) for item in window):
                self._left.remove(name)
            elif lacking:
                read = counted(self._read, "row")
                raise InputError(
                    f"no row has {name!r} of the {read} read so far, and none is answered; {lacking[0]}"
                )


def _has(item: Item, name: str, *, is_text: bool) -> bool:
    if not isinstance(item, RowError):
        return True
    if item.lacks == name:
        return False
    if (item.kind in OF_QUESTIONS and item.lacks is None) or item.kind in OF_PROMPTS:
        return True
    of_text = item.kind in OF_TEXTS and item.lacks is None
    return is_text and (of_text or item.kind in OF_QUESTIONS)
