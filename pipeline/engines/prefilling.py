"""Prefilling the rows of a pack: on their own, or behind documents that they share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.engines.answering import prefilled_rows
from pipeline.engines.attempts import Check
from pipeline.engines.clock import EngineTimes
from pipeline.engines.grouped import Prefix
from pipeline.engines.jobs import Job, JobPacker
from pipeline.engines.keeping import keep_selection
from pipeline.engines.memory import FIRST_AT_ONCE
from pipeline.engines.row_rules import RowRules
from pipeline.generation.guide import Guide
from pipeline.generation.sampling import RowDraws, first_tokens
from pipeline.generation.token_masks import first_allowed, first_scores
from pipeline.kernels.sparse import first_choosing
from pipeline.model.loading import LoadedModel
from pipeline.model.prefill import Pack, Prefilled, prefill
from pipeline.model.reading_ahead import Draft
from pipeline.records import Answer, EncodedDocument
from pipeline.texts.words import counted


@dataclass(frozen=True, kw_only=True)
class PrefilledPack:
    """Rows that have their first tokens; lists have a value a row. Times are those of time.perf_counter()."""

    jobs: Sequence[Job]
    prefilled: Prefilled
    rows: list[Answer]
    sparse_tokens: list[int]  # how many of each one's first tokens had blocks of attention chosen
    tokens: list[list[int]]  # the first one of each of its answers, or NOT_FINITE
    draws: list[list[RowDraws | None]]  # what each one's tokens are chosen by; None: the largest logits
    guides: list[list[Guide | None]]  # what holds each answer to a form, before its first token
    scores: list[list[Sequence[float]]]  # of the first tokens, as `Generated.take` has them
    started: float
    began: float  # the same, before what the rows share with others
    first_at: float  # when the first tokens were known

    def count(self, times: EngineTimes) -> None:
        """Add its time; a pack that a guard has made holds no other jobs."""
        times.add_prefill(self.started, self.first_at, again=self.jobs[0].runs_again)


@dataclass(frozen=True, kw_only=True)
class Prefiller:
    """How packs of jobs are prefilled in a run."""

    model: LoadedModel
    draft: Draft | None  # that reads prompts first, for methods that want it
    row_rules: RowRules
    save_selection: bool
    now: Callable[[], float]  # the time once the device has done what was queued
    phase: Callable[[str], None] = lambda text: None  # told what is being done

    def run(
        self,
        jobs: Sequence[Job],
        packs: JobPacker,
        check: Check,
        *,
        room: int = 0,
        kv_dtype: torch.dtype | None = None,
        prefix: Prefix | None = None,
    ) -> PrefilledPack:
        """Prefill jobs of one method, behind `prefix` if they have one.

        With `room` for so many new tokens the pack, of one row, is to stay where it is, and its keys and
        values may be offloaded, or be in `kv_dtype`; without, it is to move to the store.
        """
        started = self.now()
        documents = [job.document for job in jobs]
        self.phase(f"prefilling {counted(sum(each.prompt_tokens for each in documents), 'token')}")
        guides = [[self.row_rules.guide(each) for _ in range(self.row_rules.n)] for each in documents]
        shared, shared_s = None, 0.0
        if prefix is None:
            limits = packs.of(jobs[0].method).limits if room else None
            answer_tokens = [self.row_rules.new_tokens(each.source) for each in documents]
            prefilled = prefill(
                self.model.decoder,
                self.model.attention,
                jobs[0].method,
                Pack.of(documents, self.model.device, answer_tokens),
                room,
                check,
                limits,
                marks=self.save_selection,
                kv_dtype=None if limits else kv_dtype,
                draft=self.draft,
            )
        else:
            chunk = [(job.number, job.document) for job in jobs]
            prefilled = prefix.prefill(self.model, chunk, check)
            shared, shared_s = prefix.shared_by(chunk, self.model, packs.groups), prefix.seconds
        # masks are filled while the device works; all answers to a prompt begin alike
        allowed_BV = first_allowed(prefilled.logits_BV, [own[0] for own in guides])
        prefilled_at = self.now()
        draws = [self.row_rules.draws(document.source) for document in documents]
        tokens = _first_of_each(allowed_BV, draws, documents)
        scores: list[list[Sequence[float]]] = [[()] * len(own) for own in draws]
        if self.row_rules.logprobs:
            scores = _scores_of_each(prefilled.logits_BV, tokens, guides)
        first_at, began = self.now(), started - shared_s
        rows = prefilled_rows(documents, jobs[0].method.name, prefilled, self.model, shared)
        for job, row in zip(jobs, rows, strict=True):
            row.guard = job.guard
            row.queue_ms = (began - job.document.ready_at) * 1e3
            row.prefill_ms = (prefilled_at - began) * 1e3
            row.ttft_ms = (first_at - began) * 1e3
        if self.save_selection and prefix is None:
            keep_selection(rows, documents, prefilled, self.model)
        self.phase("decoding")
        return PrefilledPack(
            jobs=jobs,
            prefilled=prefilled,
            rows=rows,
            sparse_tokens=self._sparse_tokens(jobs, prefilled, prefix),
            tokens=tokens,
            draws=draws,
            guides=guides,
            scores=scores,
            started=started,
            began=began,
            first_at=first_at,
        )

    def _sparse_tokens(self, jobs: Sequence[Job], prefilled: Prefilled, prefix: Prefix | None) -> list[int]:
        """How many first tokens of each row had blocks of attention chosen; 0: its attention was whole.

        That is what the first layer saw that chooses blocks: the prompt, or only what is shared with others.
        Where a prefill begins anew before that layer's attention, the second pass tells whether it chose.
        """
        first = first_choosing(jobs[0].method.masses_in(self.model.shape))
        if first is None:
            return [0] * len(jobs)
        passes = [work.estimated[first] for work in prefilled.passes if first < len(work.estimated)]
        lengths = list(prefilled.lengths)
        if prefix is not None and first < prefix.made.layers:
            lengths = [prefix.made.segments.lengths[job.number] for job in jobs]
        chosen = map(any, zip(*passes, strict=True))
        return [tokens if has_chosen else 0 for tokens, has_chosen in zip(lengths, chosen, strict=True)]


def _first_of_each(
    logits_BV: Tensor, draws: Sequence[Sequence[RowDraws | None]], documents: Sequence[EncodedDocument]
) -> list[list[int]]:
    """The first token of each answer to each prompt, which `draws` says by what."""
    if all(len(own) == 1 for own in draws):  # as nearly always: no copy of the logits
        alone = first_tokens(logits_BV, [own[0] for own in draws], [each.input_ids for each in documents])
        return [[token] for token in alone]
    pairs = [(b, each) for b, own in enumerate(draws) for each in own]
    found: list[list[int]] = [[] for _ in draws]
    for start in range(0, len(pairs), FIRST_AT_ONCE):
        chunk = pairs[start : start + FIRST_AT_ONCE]
        of_answer = [b for b, _ in chunk]
        prompts = [documents[b].input_ids for b in of_answer]
        tokens = first_tokens(logits_BV[of_answer], [each for _, each in chunk], prompts)
        for b, token in zip(of_answer, tokens, strict=True):
            found[b].append(token)
    return found


def _scores_of_each(
    logits_BV: Tensor, tokens: Sequence[Sequence[int]], guides: Sequence[Sequence[Guide | None]]
) -> list[list[Sequence[float]]]:
    """What `first_scores` says of the first token of each answer to each prompt."""
    if all(len(own) == 1 for own in tokens):
        alone = first_scores(logits_BV, [own[0] for own in tokens], [own[0] for own in guides])
        return [[scores] for scores in alone]
    return [
        list(first_scores(logits_BV[b : b + 1].expand(len(own), -1), own, guides[b]))
        for b, own in enumerate(tokens)
    ]
