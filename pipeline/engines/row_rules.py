"""Where the answers of rows end, their form, and what they are drawn by: as the run has it, or a row says."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import Any, Self

from pipeline.errors import ConfigError
from pipeline.generation.generated import StopRules
from pipeline.generation.guide import Guide
from pipeline.generation.sampling import RowDraws, Sampling
from pipeline.generation.stopping import StopTexts
from pipeline.model.loading import LoadedModel
from pipeline.pruning.capabilities import StepSkips
from pipeline.records import EncodedDocument, ResponseFormat, Row, RowError
from pipeline.structured.binding import BoundForms

MOST_STOPS = 64  # different lists of stop texts that are held


@dataclass(frozen=True, kw_only=True, eq=False)
class RowRules:
    """The run's rules, sampling and form, and those of its rows; `tokenizer` is the model's.

    `forms` is bound to it, and None where no row may have a form.
    """

    rules: StopRules
    sampling: Sampling
    tokenizer: Any
    n: int = 1  # answers to a prompt
    response_format: ResponseFormat | None = None
    forms: BoundForms | None = None
    logprobs: bool = False  # whether it is to be told how likely tokens were
    skips: StepSkips | None = None  # what of decode steps is left out
    _texts: dict[tuple[str, ...], StopTexts] = field(default_factory=dict)

    @classmethod
    def of_model(
        cls,
        model: LoadedModel,
        rules: StopRules,
        sampling: Sampling,
        response_format: ResponseFormat | None = None,
        *,
        logprobs: bool = False,
        n: int = 1,
    ) -> Self:
        """Of a run with this model."""
        return cls(
            rules=rules,
            sampling=sampling,
            tokenizer=model.tokenizer,
            response_format=response_format,
            forms=BoundForms(model.tokenizer, model.shape.vocab, rules.token_ids),
            logprobs=logprobs,
            n=n,
        )

    def new_tokens(self, row: Row) -> int:
        """How many tokens a row's answer may have."""
        own = row.params.max_new_tokens
        return self.rules.max_new_tokens if own is None else own

    def of(self, row: Row) -> StopRules:
        """Where a row's answer ends."""
        own = row.params
        if own.max_new_tokens is None and own.stop is None and own.response_format is None:
            return self.rules
        texts = self.rules.texts if own.stop is None else self._stops(own.stop)
        if own.response_format or self.response_format:  # which a text that ends the answer would cut
            texts = None
        return replace(self.rules, max_new_tokens=self.new_tokens(row), texts=texts)

    def draws(self, row: Row) -> list[RowDraws | None]:
        """What the tokens of each of a row's answers are chosen by; None: by the largest logits alone.

        Under a seed of its own a row draws the same wherever it stands in the input.
        """
        own = row.params
        given = {each.name: getattr(own, each.name) for each in fields(Sampling)}
        sampling = replace(self.sampling, **{name: each for name, each in given.items() if each is not None})
        number = row.draw_number if own.seed is None else 0
        return [sampling.draws(number, self.new_tokens(row), answer) for answer in range(self.n)]

    def guide(self, document: EncodedDocument) -> Guide | None:
        """What holds a row's answer to its form; None where it has none, and of an answer that is combined.

        Raises RowError, of the kind `unsupported`, for a form that the model cannot write.
        """
        form = document.source.params.response_format or self.response_format
        if form is None or self.forms is None or not document.is_final:
            return None
        try:
            matcher = self.forms.matcher(form, after=int(document.input_ids[-1]))
        except ConfigError as error:
            raise RowError("unsupported", f"the answer's form cannot be used: {error}") from error
        return Guide(
            matcher=matcher,
            tokenizer=self.tokenizer,
            stops_W=self.forms.stops_W,
            reasoning=document.reasoning,
            opener=self.forms.opener,
        )

    @property
    def scored(self) -> int | None:
        """How many tokens beside those of answers are to be scored in a step, at most; None: none at all."""
        if not self.logprobs:
            return None
        form = self.response_format
        return 0 if form is None or self.forms is None else self.forms.most_asked(form)

    @property
    def mask_words(self) -> int | None:
        """Of the masks by which all rows are decoded; None where they are decoded without."""
        return None if self.response_format is None or self.forms is None else self.forms.words

    def _stops(self, texts: tuple[str, ...]) -> StopTexts | None:
        if not texts:
            return None
        if texts not in self._texts:
            if len(self._texts) >= MOST_STOPS:
                self._texts.clear()
            self._texts[texts] = StopTexts(texts=texts, tokenizer=self.tokenizer)
        return self._texts[texts]
