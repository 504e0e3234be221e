"""Where variants of one model are run on cases, timed in turns with dense."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from pipeline.errors import ConfigError
from pipeline.evaluate.forced import Forced
from pipeline.evaluate.scores import Case, CaseScore, Evaluated, evaluate_case
from pipeline.model.loading import LoadedModel
from pipeline.model.variant import Variant, prepare
from pipeline.pruning.dense import Dense

DENSE = Variant(Dense.name, Dense())
LOW = tuple(Variant(linears, Dense(), linears) for linears in ("mixed", "fp8"))  # dense in low precision
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
    fp8: bool  # whether its device can compute linear layers in fp8
    check: Callable[[], None] = lambda: None  # called before every run, and may raise to end all
    running: str = "the first run"  # for messages: the variant and the row

    @classmethod
    def of(cls, model: LoadedModel, check: Callable[[], None] = lambda: None) -> Workbench:
        """Quantise what can be; the model's own precision is kept beside it."""
        return cls(model=model, fp8=_can(model, LOW), check=check)

    def run(self, variant: Variant, case: Case, *, dense: Forced | None = None, top: int = 0) -> Evaluated:
        """One case, prefilled alone.

        `dense` is to be diverged from, which has been run with some `top` tokens.
        """
        self.check()
        document = case.document
        self.running = f"{variant.name} on {document.source.place}, {document.prompt_tokens:,} tokens,"
        return evaluate_case(self.model, variant.use(self.model), case, dense=dense, top=top)

    def try_out(
        self,
        variant: Variant,
        cases: Sequence[Case],
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


def timed_places(cases: Sequence[Case]) -> list[int]:
    """The places of up to `TIMED` cases that are spread evenly over all lengths, the shortest first."""
    by_length = sorted(range(len(cases)), key=lambda place: cases[place].document.prompt_tokens)
    count = min(TIMED, len(cases))
    return [by_length[(2 * n + 1) * len(cases) // (2 * count)] for n in range(count)]


def _can(model: LoadedModel, variants: Iterable[Variant]) -> bool:
    try:
        prepare(model, variants)
    except ConfigError:
        return False
    return True
