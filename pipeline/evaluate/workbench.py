"""Where variants of one model are run on cases: how they predict right answers, and how fast they are."""

from __future__ import annotations

import statistics
import sysconfig
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pipeline.errors import ConfigError, MarsError, is_failure
from pipeline.evaluate.check_rows import CheckRow
from pipeline.evaluate.predicting import Forced, divergence, score_answer
from pipeline.kernels.sparse import shortest
from pipeline.model.loading import LoadedModel
from pipeline.model.variant import Variant, prepare
from pipeline.pruning.dense import Dense
from pipeline.pruning.operations import Passes, leave_nothing_out, shares_of_dense

DENSE = Variant(Dense.name, Dense())
PACKAGE = Path(__file__).parents[1]
LOW = tuple(Variant(linears, Dense(), linears) for linears in ("mixed", "fp8"))  # dense in low precision
TOP = 64  # likeliest tokens of dense at each place, by which a divergence is measured
TIMED = 10  # cases, each twice: the first run may compile kernels, or be disturbed, so the shorter counts


class Deadline:
    """So many seconds from now."""

    def __init__(self, seconds: float, now: Callable[[], float] = time.monotonic) -> None:
        self.seconds = seconds
        self._now = now
        self._began = now()

    @property
    def passed(self) -> float:
        return self._now() - self._began

    @property
    def left(self) -> float:
        return self.seconds - self.passed

    def rest(self) -> Deadline:
        """The seconds that are left, beginning now."""
        return Deadline(max(0.0, self.left), self._now)

    def before(self, share: float) -> Callable[[], bool]:
        """A question to ask again and again: whether less than this share of the time has passed."""
        return lambda: self.passed < share * self.seconds


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


def has_pruned(scores: Iterable[CaseScore]) -> bool:
    """Whether anything was left out of any of these cases that dense computes.

    Tokens that stop where nobody reads them any more, as `mars` has them by default, are nothing left out.
    """
    return not all(leave_nothing_out(each.ffn_ratio, each.attention_ratio, each.kv_ratio) for each in scores)


class Evaluated(NamedTuple):
    """One case under one method."""

    score: CaseScore
    forced: Forced
    passes: Passes


@dataclass(frozen=True, kw_only=True)
class Trial:
    """What a variant made of cases: of the first ones alone where time ran out."""

    variant: Variant
    scores: tuple[CaseScore, ...]
    dense_ttft_ms: float  # mean over the cases that both were timed on, in turns; 0 if there is none
    ttft_ms: float  # likewise
    complete: bool

    @property
    def speed_up(self) -> float:
        """Over dense on the cases that were timed."""
        return self.dense_ttft_ms / self.ttft_ms if self.ttft_ms else 1.0

    @property
    def divergence(self) -> float:
        """KL from dense in nats a token, mean over the cases that were compared with dense."""
        return statistics.fmean([score.divergence or 0.0 for score in self.scores] or [0.0])


@dataclass(kw_only=True)
class Workbench:
    """A model prepared for all variants that its device can run."""

    model: LoadedModel
    fp8: bool = False  # whether its device can compute linear layers in fp8
    check: Callable[[], None] = lambda: None  # called before every run, and may raise to end all
    running: str = "the first run"  # for messages: the variant and the row

    @classmethod
    def of(cls, model: LoadedModel, check: Callable[[], None] = lambda: None) -> Workbench:
        """Quantise what can be; the model's own precision is kept beside it."""
        try:
            prepare(model, LOW)
        except ConfigError:
            return cls(model=model, check=check)
        return cls(model=model, fp8=True, check=check)

    def run(
        self, variant: Variant, case: CheckRow, *, dense: Forced | None = None, top: int = 0
    ) -> Evaluated:
        """One case, prefilled alone, so that it has a TTFT of its own and its score depends on no other.

        It is compared with what dense makes of it, if that is known, from a run with some `top`: as many
        likeliest tokens are kept to be compared with.
        """
        self.check()
        document = case.document
        self.running = f"{variant.name} on {document.source.place}, {document.prompt_tokens:,} tokens,"
        probes = None if dense is None else dense.probes
        forced, prefilled, ttft_ms = score_answer(
            self.model,
            variant.use(self.model),
            document,
            case.reference,
            top=top,
            probes=probes,
            kv=variant.kv,
        )
        (passes,) = prefilled.by_document()
        stored = sum(tokens for (tokens,) in prefilled.cache.prompt_tokens())
        ratios = shares_of_dense(self.model.shape, passes, document.prompt_tokens, sum(prefilled.draft_flops))
        kv_ratio = stored / (self.model.shape.layers * document.prompt_tokens)
        score = _score(case, forced, ttft_ms, {**ratios, "kv_ratio": kv_ratio})
        if dense is not None:
            differs = forced.choices != dense.choices
            score = replace(
                score,
                agreed=int(np.sum(~differs)),
                parted_at=int(np.argmax(differs)) if differs.any() else None,
                divergence=divergence(dense, forced),
            )
        return Evaluated(score, forced, passes)

    def try_out(
        self,
        variant: Variant,
        cases: Sequence[CheckRow],
        *,
        dense: Sequence[Forced] | None = None,
        within: Callable[[], bool],
    ) -> Trial:
        """A variant on cases while `within` says that there is time; `dense` are what to diverge from.

        On cases of all lengths it is timed in turns with dense. The speed-up is that of their sum, so that
        each counts by the time that it takes.
        """
        scores: list[CaseScore] = []
        dense_ms: list[float] = []
        own_ms: list[float] = []
        timed_at = timed_places(cases)
        for place, case in enumerate(cases):
            if not within():
                break
            known = None if dense is None else dense[place]
            scores.append(self.run(variant, case, dense=known).score)
            if place in timed_at:
                dense_first = self.run(DENSE, case).score.ttft_ms
                own_again = self.run(variant, case).score.ttft_ms
                dense_ms.append(min(dense_first, self.run(DENSE, case).score.ttft_ms))
                own_ms.append(min(scores[-1].ttft_ms, own_again))
        return Trial(
            variant=variant,
            scores=tuple(scores),
            dense_ttft_ms=statistics.fmean(dense_ms or [0.0]),
            ttft_ms=statistics.fmean(own_ms or [0.0]),
            complete=len(scores) == len(cases),
        )


@contextmanager
def failures_named(describe: Callable[[], str]) -> Iterator[None]:
    """Whatever fails and is no MarsError yet becomes one that begins with what was running.

    Where a method of the user's own fails, the line of its file is told.
    """
    try:
        yield
    except MarsError:
        raise
    except BaseException as error:
        if not is_failure(error):
            raise
        told = f"{describe()}: {type(error).__name__}: {error}{_own_line(error)}"
        raise MarsError(told) from error


def _own_line(error: BaseException) -> str:
    """Where an error has passed through code that is neither the program's nor a library's; else nothing."""
    frames = traceback.extract_tb(error.__traceback__)
    others = (str(PACKAGE), *sysconfig.get_paths().values())
    own = [frame for frame in frames if not frame.filename.startswith(others)]
    return f" ({own[-1].filename}, line {own[-1].lineno})" if own else ""


def sparse_from(model: LoadedModel) -> int | None:
    """Prompt tokens from which on attention can be block-sparse on the model's device; None: it never is."""
    shape = model.shape
    return shortest(shape.heads * shape.head_dim, model.device, model.attention.sparse_from)


def timed_places(cases: Sequence[CheckRow]) -> list[int]:
    """The places of up to `TIMED` cases that are spread evenly over all lengths, the shortest first."""
    by_length = sorted(range(len(cases)), key=lambda place: cases[place].document.prompt_tokens)
    count = min(TIMED, len(cases))
    return [by_length[(2 * n + 1) * len(cases) // (2 * count)] for n in range(count)]


def _score(case: CheckRow, forced: Forced, ttft_ms: float, ratios: dict[str, Any]) -> CaseScore:
    """Of a case whose answer has at least one token; `ratios` are the score's own, by name."""
    hits = forced.choices == case.reference
    found = [hits[start:end].all() for start, end in case.parts]
    return CaseScore(
        id=case.sample.id,
        task=case.task,
        document_key=case.sample.document_key,
        prompt_tokens=case.document.prompt_tokens,
        tokens=len(case.reference),
        correct=int(np.sum(hits)),
        nll=float(-forced.logprobs.astype(np.float64).sum()),
        ttft_ms=ttft_ms,
        parts_found=float(np.mean(found)) if found else None,
        **ratios,
    )
