"""What one side of a check, dense or the method, made of each row: running it, and as plain values."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from math import inf
from typing import Any, Self

import numpy as np

from pipeline.engines.answering import rules_of, sampling_of, texts_of
from pipeline.evaluate.check_rows import CheckRow
from pipeline.evaluate.predicting import Forced, GeneratedAnswer, generate
from pipeline.evaluate.workbench import TOP, CaseScore, Workbench, failures_named
from pipeline.generation.generated import StopRules
from pipeline.generation.sampling import Sampling
from pipeline.model.variant import Variant
from pipeline.records import EncodedDocument
from pipeline.settings.check_settings import CheckConfig

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
    def from_dict(cls, values: Mapping[str, Any], *, is_dense: bool) -> Self:
        """Raises KeyError, TypeError or ValueError for other values than those of `as_dict`.

        Dense's hold what was forced, a method's how far that agrees with dense. Before `parts_found` was
        stored, no right answer had parts.
        """
        answer = tuple(values["answer"])
        result = cls(
            row_hash=values["row_hash"],
            score=CaseScore(**{name: values[name] for name in _SCORE if name in values}),
            answer=answer,
            generated=values["generated"],
            forced=_forced(values, len(answer)) if values["choices"] else None,
        )
        if (result.forced is None) if is_dense else (result.score.agreed is None):
            raise ValueError("a result of the other side")
        _check_score(result.score, len(answer))
        return result


def _check_score(score: CaseScore, tokens: int) -> None:
    """ValueError or TypeError for numbers that cannot be of an answer of so many tokens, or of any."""
    counts = [count for count in (score.correct, score.agreed, score.parted_at) if count is not None]
    shares = [score.kept_ratio, score.ffn_ratio, score.attention_ratio, score.flops_ratio, score.kv_ratio]
    if not tokens == score.tokens > 0 or not all(0 <= count <= tokens for count in counts):
        raise ValueError(f"counts that are not of {tokens} tokens")
    if not all(0 <= number < inf for number in (score.ttft_ms, *shares)) or not score.nll >= 0:
        raise ValueError("a time, a share or a loss that is below 0, or no number")
    if score.parts_found is not None and not 0 <= score.parts_found <= 1:
        raise ValueError("a share that is not between 0 and 1")


def _forced(values: Mapping[str, Any], count: int) -> Forced:
    return Forced(
        logprobs=np.array(values["logprobs"], np.float32).reshape(count),
        choices=np.array(values["choices"], np.int64).reshape(count),
        probes=np.array(values["probes"], np.int64).reshape(count, -1),
        probed=np.array(values["probed"], np.float32).reshape(count, -1),
    )


@dataclass(frozen=True, kw_only=True)
class Side:
    """One way to run the model over the rows of a check."""

    bench: Workbench
    variant: Variant
    config: CheckConfig

    def run(
        self, rows: Sequence[CheckRow], dense: Mapping[str, RowResult] | None = None
    ) -> Iterator[RowResult]:
        """Results in the order of `rows`. `dense` are those of the dense side, which itself has none.

        What is forced is the right answer, or where there is none dense's own. Raises MarsError, with the
        row, for one that fails.
        """
        for place, row in enumerate(rows):
            yield self._result(row, None if dense is None else dense[row.sample.id], warms_up=place == 0)

    def _result(self, row: CheckRow, dense: RowResult | None, *, warms_up: bool) -> RowResult:
        document, named = row.document, self.variant.name
        place = f"{document.source.place}, {document.prompt_tokens:,} tokens,"
        with failures_named(lambda: f"{place} fails under {named}"):
            if warms_up and self.bench.model.device.type == "cuda":
                # loads kernels before the first row's time to first token is taken
                self._generate(document, StopRules(max_new_tokens=1))
            answer = row.reference if dense is None else dense.answer
            generated, generates = None, self.config.generate
            if generates or not answer:
                rules = rules_of(self.config, self.bench.model)
                # what is forced is greedy
                own = self._generate(document, rules, sampling_of(self.config) if generates else None)
                answer = answer or tuple(own.not_empty)
                if generates:
                    _, generated = texts_of(own.tokens, document.reasoning, rules, self.bench.model)
            compared = None if dense is None else dense.forced
            found = self.bench.run(self.variant, replace(row, reference=answer), dense=compared, top=TOP)
        return RowResult(
            row_hash=row.row_hash,
            score=found.score,
            answer=answer,
            generated=generated,
            forced=found.forced if dense is None else None,
        )

    def _generate(
        self, document: EncodedDocument, rules: StopRules, sampling: Sampling | None = None
    ) -> GeneratedAnswer:
        model = self.bench.model
        return generate(model, self.variant.use(model), document, rules, self.bench.check, sampling)
