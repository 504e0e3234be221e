"""What --save-selection adds to answers: who was computed in each layer, and the prompt's text by token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch

from pipeline.model.loading import LoadedModel
from pipeline.model.prefill import Prefilled
from pipeline.model.work import Work
from pipeline.pruning.tiers import FFN, FP8, pack_choice, pack_layer
from pipeline.records import Answer, EncodedDocument

MOST_OF_ONE = 8  # tokens that may make one character; a longer wait means that the text itself is broken
_BROKEN = "\N{REPLACEMENT CHARACTER}"


def keep_selection(
    rows: Sequence[Answer], documents: Sequence[EncodedDocument], prefilled: Prefilled, model: LoadedModel
) -> None:
    """Fill in a pack's rows from a prefill that was asked for its marks; copies them to the host."""
    everywhere = model.decoder.linears_in_fp8
    choices = _choices(prefilled)
    passes = [_marks_by_document(work, everywhere) for work in prefilled.passes]
    decode = partial(model.tokenizer.backend_tokenizer.decode, skip_special_tokens=False)
    for b, (row, document) in enumerate(zip(rows, documents, strict=True)):
        row.selection = [
            *choices[b],
            *(
                pack_layer(layer[b], restarts=last_of_pass and layers is not passes[-1])
                for layers in passes
                for layer, last_of_pass in zip(layers, _is_last(len(layers)), strict=True)
            ),
        ]
        pieces = token_pieces(decode, document.input_ids.tolist())
        row.prompt_text = "".join(pieces)
        row.prompt_token_chars = [len(piece) for piece in pieces]
        row.prompt_spans = [*document.spans.document, *document.spans.question]


def _choices(prefilled: Prefilled) -> list[list[bytes]]:
    """Of each document the entry that tells what a draft model has chosen, if one has."""
    reading = prefilled.reading
    if reading is None:
        return [[] for _ in prefilled.lengths]
    chosen_T = torch.zeros(reading.segments.total, dtype=torch.bool, device=reading.chosen_C.device)
    chosen_T[reading.chosen_C] = True
    return [[pack_choice(part.numpy())] for part in chosen_T.cpu().split(reading.segments.lengths)]


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


def token_pieces(decode: Callable[[Sequence[int]], str], ids: Sequence[int]) -> list[str]:
    """The text that each token adds, behind the one before it; joined, they are the decoded text.

    A character of several tokens is the last one's, and the others add nothing. Each token is decoded with
    those since the last whole character, for some tokenizers drop the space of a text's first word.
    """
    pieces = []
    start = done = 0
    for end in range(1, len(ids) + 1):
        before, now = decode(ids[start:done]), decode(ids[start:end])
        if now.endswith(_BROKEN) and end - done < MOST_OF_ONE and end < len(ids):
            pieces.append("")
            continue
        pieces.append(now[len(before) :])
        start, done = done, end
    return pieces
