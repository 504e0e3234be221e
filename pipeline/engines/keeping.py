"""What --save-selection adds to answers: who was computed in each layer, and the prompt's text by token."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
import torch

from pipeline.model.loading import LoadedModel
from pipeline.model.prefill import Prefilled
from pipeline.model.work import Work
from pipeline.prompts.pieces import token_pieces
from pipeline.pruning.tiers import FFN, FP8, pack_layer
from pipeline.records import Answer, EncodedDocument


def keep_selection(
    rows: Sequence[Answer], documents: Sequence[EncodedDocument], prefilled: Prefilled, model: LoadedModel
) -> None:
    """Fill in a pack's rows from a prefill that was asked for its marks; copies them to the host."""
    everywhere = model.adapter.linears_in_fp8
    passes = [_marks_by_document(work, everywhere) for work in prefilled.passes]
    decode = partial(model.tokenizer.backend_tokenizer.decode, skip_special_tokens=False)
    for b, (row, document) in enumerate(zip(rows, documents, strict=True)):
        row.selection = [
            pack_layer(layer[b], restarts=last_of_pass and layers is not passes[-1])
            for layers in passes
            for layer, last_of_pass in zip(layers, _is_last(len(layers)), strict=True)
        ]
        pieces = token_pieces(decode, document.input_ids.tolist())
        row.prompt_text = "".join(pieces)
        row.prompt_token_chars = [len(piece) for piece in pieces]
        row.prompt_spans = [*document.spans.document, *document.spans.question]


def _is_last(count: int) -> list[bool]:
    return [False] * (count - 1) + [True]


def _marks_by_document(work: Work, fp8_everywhere: bool) -> list[list[np.ndarray]]:
    """Of each layer and document, the marks of the tokens that entered; one copy to the host."""
    assert work.marks is not None, "the prefill was not asked for marks"
    marks = torch.cat(work.marks).cpu().numpy()
    lengths = [length for layer in work.kept for length in layer]
    parts = iter(np.split(marks, np.cumsum(lengths)[:-1]))
    return [[_with_default(next(parts), fp8_everywhere) for _ in layer] for layer in work.kept]


def _with_default(marks: np.ndarray, fp8_everywhere: bool) -> np.ndarray:
    """Where a method does not say which tokens are in fp8, all are that pass, if the linear layers are."""
    if not fp8_everywhere or (marks & FP8).any():
        return marks
    return np.where(marks & FFN, marks | FP8, marks)
