"""Prompts of random tokens, whose speed is that of any other of their length."""

from __future__ import annotations

import numpy as np

from pipeline.model.loading import LoadedModel
from pipeline.records import EncodedDocument, Row, Spans


def random_document(model: LoadedModel, length: int, row: int = 0) -> EncodedDocument:
    """`length` tokens, the same for the same row."""
    ids = np.random.default_rng(row).integers(0, model.shape.vocab, length)
    spans = Spans(document=(0, length), question=(length, length))
    return EncodedDocument(source=Row(row=row, id=str(row), place="random"), input_ids=ids, spans=spans)
