"""Rows on their way to the model: known ones left out, the others tokenized, bad ones marked."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from datetime import datetime
from typing import TYPE_CHECKING

from pipeline.errors import ConfigError, MarsError, RowError, is_failure
from pipeline.io import Columns, Keep, Source, open_source, parse_keep_columns
from pipeline.records import Document, EncodedDocument, Row, RowFailure
from pipeline.settings.data import DataSettings
from pipeline.settings.prompts import PromptSettings, SplitSettings
from pipeline.settings.run import BatchConfig
from pipeline.splitting import SplitDocument, Splitter

if TYPE_CHECKING:
    from pipeline.io.journal import Journal
    from pipeline.model.loading import Model
    from pipeline.prompts import PromptBuilder

Record = Document | RowFailure
Item = EncodedDocument | SplitDocument | RowFailure


def open_rows(config: BatchConfig) -> Source:
    """The input of a run, checked and opened."""
    keep = parse_keep_columns(config.keep_columns) if config.keep_columns else None
    return open_source(config.input, columns_of(config, keep), config.output)


def columns_of(data: DataSettings, keep: Mapping[str, str | None] | Keep | None) -> Columns:
    """The columns of the input by what they are for; `keep` as in `Columns`."""
    return Columns(
        text=data.text_column,
        question=data.question_column,
        questions=data.questions_column,
        fixed_question=data.question,
        id=data.id_column,
        task=data.task_column,
        keep=keep,
    )


def make_prompts(
    settings: PromptSettings,
    model: Model,
    max_new_tokens: int,
    *,
    longest: int | None = None,
    now: datetime | None = None,
) -> PromptBuilder:
    """The prompts for a model, with the answer of at most `longest` tokens, or as many as the model takes.

    `now` is the moment whose date a chat template prints, the present where it is None.
    """
    from pipeline.prompts import PromptBuilder

    context = model.shape.context
    return PromptBuilder(
        model.tokenizer,
        context=context if longest is None else min(longest, context),
        max_new_tokens=max_new_tokens,
        system=settings.system,
        template=settings.template_text(),
        on_overlong=settings.on_overlong,
        vocab=model.shape.vocab,
        now=now or datetime.now(),
    )


def make_splitter(config: SplitSettings, prompts: PromptBuilder) -> Splitter | None:
    """How a run with such prompts cuts over-long documents, if it does."""
    from pipeline.chat import chat_source
    from pipeline.mapreduce import COMBINE, COMBINE_AS_TEXT

    if config.on_overlong != "split":
        return None
    template, body = config.combine_text(), None
    if template is None and chat_source(prompts.tokenizer):
        body = COMBINE
    elif template is None:
        template = COMBINE_AS_TEXT
    try:
        combine = replace(prompts, template=template, body=body)
    except ConfigError as error:
        raise ConfigError(f"the prompt that combines answers (--combine-template): {error}") from error
    return Splitter(prompts=prompts, combine=combine, overlap=config.split_overlap)


def item_prompts(item: Item) -> list[EncodedDocument]:
    """The prompts of an item that are known before any is answered; a failure has none."""
    if isinstance(item, EncodedDocument):
        return [item]
    return item.prompts if isinstance(item, SplitDocument) else []


def item_tokens(item: Item) -> int:
    """Prompt tokens of an item; a failure has none to work on."""
    return sum(prompt.prompt_tokens for prompt in item_prompts(item))


def new_rows(records: Iterable[Record], journal: Journal) -> Iterator[Record]:
    """Leave out what an earlier run has finished; an id that comes twice becomes a failure."""
    for record in records:
        source = replace(record.source, row_hash=row_hash(record))
        record = replace(record, source=source)
        try:
            if not journal.is_done(source, source.row_hash or ""):
                yield record
        except RowError as error:
            yield _failure(source, error.kind, str(error))


def row_hash(record: Record) -> str:
    """32 hex digits that tell whether a row is still the same: id, text and question, or what ails it."""
    if isinstance(record, Document):
        fields = [record.source.id, record.text, record.question or ""]
    else:
        fields = [record.source.id, record.kind]
    digest = hashlib.blake2b(digest_size=16)
    for field in fields:
        data = field.encode("utf-8", "surrogatepass")
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()


def encode_rows(
    records: Iterable[Record], prompts: PromptBuilder | Splitter, on_overlong: str
) -> Iterator[Item]:
    """Tokenize what was read; a row that cannot be encoded becomes a failure in its place."""
    for record in records:
        if isinstance(record, RowFailure):
            yield record
            continue
        try:
            yield prompts.encode(record)
        except RowError as error:
            yield _encoding_failure(record.source, error, on_overlong)
        except MarsError:
            raise
        except BaseException as error:  # a tokenizer's fault costs its row, not the run
            if not is_failure(error):
                raise
            yield _failure(record.source, "tokenizer", f"{type(error).__name__}: {error}")


def _encoding_failure(source: Row, error: RowError, on_overlong: str) -> RowFailure:
    skipped = error.kind == "over_long" and on_overlong == "skip"
    return replace(
        _failure(source, error.kind, str(error)),
        status="skipped" if skipped else "error",
        document_tokens=getattr(error, "document_tokens", None),
        prompt_tokens=getattr(error, "prompt_tokens", None),
    )


def _failure(source: Row, kind: str, what: str) -> RowFailure:
    return RowFailure(source=source, kind=kind, message=f"{source.place}: {what}")
