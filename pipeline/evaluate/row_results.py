"""What one side of a check, dense or the method, made of each row: running it, and as plain values."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Self

import numpy as np

from pipeline.engines.answering import answer_text
from pipeline.errors import MarsError, is_failure
from pipeline.evaluate.check_rows import CheckRow
from pipeline.evaluate.forced import Forced
from pipeline.evaluate.generate import generate
from pipeline.evaluate.scores import Case, CaseScore, evaluate
from pipeline.model.decode import StopRules
from pipeline.model.loading import LoadedModel
from pipeline.model.sampling import Sampling
from pipeline.model.variant import Variant
from pipeline.records import EncodedDocument

_FORCED = ("logprobs", "choices", "probes", "probed")
_SCORE = tuple(field.name for field in fields(CaseScore))


@dataclass(frozen=True, kw_only=True)
class RowResult:
    """One row under one side."""

    row_hash: str
    score: CaseScore
    answer: tuple[int, ...]  # the tokens that were forced
    generated: str | None = None
    forced: Forced | None = None  # of dense, with which the method's are compared

    @property
    def id(self) -> str:
        return self.score.id

    def as_dict(self) -> dict[str, Any]:
        """Numbers, texts and flat lists of numbers only; `from_dict` undoes it without loss."""
        forced = {name: [] if self.forced is None else getattr(self.forced, name) for name in _FORCED}
        lists = {name: np.asarray(values).ravel().tolist() for name, values in forced.items()}
        plain = {"row_hash": self.row_hash, "answer": list(self.answer), "generated": self.generated}
        return {**asdict(self.score), **plain, **lists}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Raises KeyError, TypeError or ValueError for other values than those of `as_dict`.

        Before `parts_found` was stored, no right answer had parts.
        """
        answer = tuple(values["answer"])
        return cls(
            row_hash=values["row_hash"],
            score=CaseScore(**{name: values[name] for name in _SCORE if name in values}),
            answer=answer,
            generated=values["generated"],
            forced=_forced(values, len(answer)) if values["choices"] else None,
        )


def _forced(values: Mapping[str, Any], count: int) -> Forced:
    return Forced(
        logprobs=np.array(values["logprobs"], np.float32),
        choices=np.array(values["choices"], np.int64),
        probes=np.array(values["probes"], np.int64).reshape(count, -1),
        probed=np.array(values["probed"], np.float32).reshape(count, -1),
    )


@dataclass(frozen=True, kw_only=True)
class Side:
    """One way to run the model over the rows of a check."""

    model: LoadedModel
    variant: Variant
    rules: StopRules
    generates: bool  # answers to be scored against references
    sampling: Sampling = field(default_factory=Sampling)  # of these answers; what is forced is greedy
    check: Callable[[], None] = lambda: None

    def run(
        self, rows: Sequence[CheckRow], dense: Mapping[str, RowResult] | None = None
    ) -> Iterator[RowResult]:
        """Results in the order of `rows`. `dense` are those of the dense side, which itself has none.

        What is forced is the right answer, or where there is none dense's own. Raises MarsError, with the
        row, for one that fails.
        """
        if not rows:
            return
        asked = _Asked(rows[0])
        known = None if dense is None else [_forced_of(dense[row.sample.id]) for row in rows]
        try:
            self._warm_up(rows[0].document)
            cases = self._cases(rows, dense, asked)
            for score, forced in evaluate(self.model, self.variant, cases, dense=known, check=self.check):
                yield RowResult(
                    row_hash=asked.row.row_hash,
                    score=score,
                    answer=asked.answer,
                    generated=asked.generated,
                    forced=forced if dense is None else None,
                )
        except MarsError:
            raise
        except BaseException as error:  # whatever it is, the row must be named
            if not is_failure(error):
                raise
            document = asked.row.document
            raise MarsError(
                f"{document.source.place}, {document.prompt_tokens:,} tokens, fails under "
                f"{self.variant.name}: {type(error).__name__}: {error}"
            ) from error

    def _cases(
        self, rows: Sequence[CheckRow], dense: Mapping[str, RowResult] | None, asked: _Asked
    ) -> Iterator[Case]:
        """A case for each row, made when it is its turn; `asked` then tells of it."""
        for row in rows:
            asked.row, asked.generated = row, None
            asked.answer = row.reference if dense is None else dense[row.sample.id].answer
            if self.generates or not asked.answer:
                method = self.variant.use(self.model)
                sampling = self.sampling if self.generates else None
                (own,) = generate(self.model, method, [row.document], self.rules, self.check, sampling)
                asked.answer = asked.answer or tuple(own.not_empty)
                if self.generates:
                    asked.generated = answer_text(own.tokens, self.rules, self.model)
            yield Case(
                id=row.sample.id,
                task=row.sample.task,
                document_key=row.sample.document_key,
                document=row.document,
                answer=asked.answer,
                parts=row.parts,
            )

    def _warm_up(self, document: EncodedDocument) -> None:
        """On a GPU, load kernels before the first row's time to first token is taken."""
        if self.model.device.type == "cuda":
            method, rules = self.variant.use(self.model), StopRules(max_new_tokens=1)
            generate(self.model, method, [document], rules, self.check)


@dataclass
class _Asked:
    """The row that is being run."""

    row: CheckRow
    answer: tuple[int, ...] = ()
    generated: str | None = None


def _forced_of(result: RowResult) -> Forced:
    assert result.forced is not None, "not a result of dense"
    return result.forced
