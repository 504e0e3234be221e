"""Prompts to be timed: of random tokens, whose speed is that of any other, and of real documents."""

from __future__ import annotations

from itertools import islice

import numpy as np

from pipeline.errors import InputError
from pipeline.inputs.columns import Columns
from pipeline.inputs.source import open_source
from pipeline.model.loading import LoadedModel
from pipeline.records import EncodedDocument, Row, RowError, Spans
from pipeline.settings.bench_settings import TtftConfig
from pipeline.settings.prompt_settings import PromptSettings
from pipeline.setup.asking import Types, text_column
from pipeline.setup.intake import make_prompts


def random_document(model: LoadedModel, length: int, row: int = 0) -> EncodedDocument:
    """`length` tokens, the same for the same row."""
    ids = np.random.default_rng(row).integers(0, model.shape.vocab, length)
    spans = Spans(document=(0, length), question=(length, length))
    return EncodedDocument(source=Row(row=row, id=str(row), place="random"), input_ids=ids, spans=spans)


def real_documents(
    model: LoadedModel, path: str, config: TtftConfig, length: int | None
) -> list[EncodedDocument]:
    """The prompts of the rows that `config` names, with `length` cut in their middle to so many tokens."""
    rows = range(config.row, config.row + config.documents)
    prompts: PromptSettings = config
    if length is not None:
        prompts = PromptSettings.of(config, on_overlong="truncate-middle")
    builder = make_prompts(prompts, model, 0, longest=length)

    def columns(types: Types | None) -> Columns:
        return Columns(text=text_column(config.text_column, types, []), fixed_question=config.question)

    source = open_source([path], columns)
    encoded = []
    for document in islice(source, rows.start, rows.stop):
        if isinstance(document, RowError):
            raise InputError(document.message)
        try:
            encoded.append(builder.encode(document))
        except RowError as error:
            raise InputError(f"{document.source.place}: {error}") from error
    source.refuse_out_of_reach("nothing was measured")
    if len(encoded) < len(rows):
        raise InputError(f"{path} has no row {rows.start + len(encoded)}")
    return encoded
