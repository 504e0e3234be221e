"""How one way to run a model predicts right answers: what `check` compares and `calibrate` searches by.

Documents are prefilled one at a time, so that each has a TTFT of its own and no score depends on others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from pipeline.engines.memory import Packer
from pipeline.evaluate.forced import Forced, divergence, score_answers
from pipeline.model.loading import LoadedModel
from pipeline.model.variant import Variant
from pipeline.pruning.base import PruningMethod
from pipeline.pruning.operations import (
    Passes,
    attention_ratio,
    dense_flops,
    ffn_ratio,
    kept_ratio,
    passes_flops,
)
from pipeline.records import EncodedDocument

TOP = 64  # likeliest tokens of dense at each place, by which a divergence is measured


@dataclass(frozen=True, kw_only=True)
class Case:
    """A prompt and its right answer in tokens, at least one."""

    id: str
    task: str
    document_key: str  # the same for all questions about one document
    document: EncodedDocument
    answer: tuple[int, ...]
    parts: tuple[tuple[int, int], ...] = ()  # ranges of its tokens that are found or not one by one


@dataclass(frozen=True, kw_only=True)
class CaseScore:
    """What a method made of one case."""

    id: str
    task: str
    document_key: str
    prompt_tokens: int
    tokens: int  # of the right answer
    correct: int  # of these, predicted
    nll: float  # sum over the tokens, in nats
    ttft_ms: float
    kept_ratio: float  # of the prompt, mean over layers
    ffn_ratio: float  # tokens that passed FFNs, over those of a dense prefill
    attention_ratio: float  # query-key pairs of this prefill over those of a dense one
    flops_ratio: float  # operations of this prefill over a dense one's
    kv_ratio: float  # of the keys and values that dense stores
    agreed: int | None = None  # tokens at which it chooses what dense does
    parted_at: int | None = None  # the first token, from 0, at which it does not
    divergence: float | None = None  # KL from dense, mean over the tokens, in nats
    parts_found: float | None = None  # of an answer in parts, the share of which all tokens are predicted

    @property
    def found(self) -> float:
        """From 0 to 1: the share of the right answer's parts of which all tokens are predicted.

        Of an answer that is a whole it is 1 where greedy decoding would begin with it, else 0.
        """
        return float(self.correct == self.tokens) if self.parts_found is None else self.parts_found


def evaluate(
    model: LoadedModel,
    variant: Variant,
    cases: Iterable[Case],
    *,
    dense: Sequence[Forced] | None = None,
    check: Callable[[], None] = lambda: None,
) -> Iterator[tuple[CaseScore, Forced]]:
    """Score every case, in order, under a variant for which the model has been prepared.

    `dense` are the results of an earlier dense run over the same cases, which the scores then compare with;
    without it the results say what a later run needs to be compared. `check` is called before each case, and
    may raise to give up.
    """
    method = variant.use(model)
    # a case that cannot fit, or a setting that does not fit the model's depth, should fail before it runs
    Packer.on(
        model.device,
        method,
        model.shape,
        itemsize=model.dtype.itemsize,
        new_tokens=0,
        pack_tokens=None,
        in_flight=0,
    )
    for place, case in enumerate(cases):
        check()
        known = None if dense is None else dense[place]
        evaluated = evaluate_case(model, method, case, dense=known)
        yield evaluated.score, evaluated.forced


class Evaluated(NamedTuple):
    """One case under one method."""

    score: CaseScore
    forced: Forced
    passes: Passes


def evaluate_case(
    model: LoadedModel, method: PruningMethod, case: Case, *, dense: Forced | None = None, top: int = TOP
) -> Evaluated:
    """Score one case with the model as it is set; `top` likeliest tokens are kept to be compared with."""
    probes = None if dense is None else [dense.probes]
    (forced,), prefilled, ttft_ms = score_answers(
        model, method, [case.document], [case.answer], top=top, probes=probes
    )
    (passes,) = prefilled.by_document()
    stored = sum(tokens for (tokens,) in prefilled.cache.prompt_tokens())
    return Evaluated(_score(model, case, forced, passes, stored, ttft_ms, dense), forced, passes)


def _score(
    model: LoadedModel,
    case: Case,
    forced: Forced,
    passes: Passes,
    stored: int,
    ttft_ms: float,
    dense: Forced | None,
) -> CaseScore:
    shape, length = model.shape, case.document.prompt_tokens
    hits = forced.choices == case.answer
    return CaseScore(
        id=case.id,
        task=case.task,
        document_key=case.document_key,
        prompt_tokens=length,
        tokens=len(case.answer),
        correct=int(np.sum(hits)),
        nll=float(-forced.logprobs.astype(np.float64).sum()),
        ttft_ms=ttft_ms,
        kept_ratio=kept_ratio(shape, passes, length),
        ffn_ratio=ffn_ratio(shape, passes, length),
        attention_ratio=attention_ratio(shape, passes, length),
        flops_ratio=passes_flops(shape, passes) / dense_flops(shape, length),
        kv_ratio=stored / (shape.layers * length),
        agreed=None if dense is None else int(np.sum(forced.choices == dense.choices)),
        parted_at=None if dense is None else _first(forced.choices != dense.choices),
        divergence=None if dense is None else divergence(dense, forced),
        parts_found=_share_found(hits, case.parts),
    )


def _share_found(hits: np.ndarray, parts: Sequence[tuple[int, int]]) -> float | None:
    """Of ranges of tokens, the share of which all are hits; None without any."""
    return float(np.mean([hits[start:end].all() for start, end in parts])) if parts else None


def _first(marks: np.ndarray) -> int | None:
    """The place of the first true one."""
    return int(np.argmax(marks)) if marks.any() else None
