"""Rows that are answered in parts: each part alone, then their answers combined, until one is left.

A combination takes neighbouring answers, as many as its prompt has room for, and at least two, so that each
step leaves fewer; where no two fit, the row has failed. Where the row's answer is to have a form, the last
step alone has it: parts are answered freely, and if one answer is left, a step of its own gives it the form.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from itertools import pairwise
from typing import Any

from pipeline.prompts.splitting import SplitDocument, Splitter, groups_that_fit
from pipeline.prompts.within import tokenizer_faults
from pipeline.records import Answer, Answered, Document, EncodedDocument, PartAnswer, Row, RowError

# what a row takes over from the last of its answers
OF_LAST = ("answer", "reasoning", "finish_reason", "mean_logprob", "min_logprob", "choice_logprobs")

# the user's message where the model has a chat template, and what takes the place of both where it has none
COMBINE = """\
{% if question %}
A long document was read in parts, and the same question was answered from each part alone. These are the
answers, in the order of the document. A part may hold nothing that bears on the question.
{% else %}
A long document was worked on in parts, each alone. These are the results, in the order of the document.
{% endif %}

{{ document }}

{% if question %}
Give one answer to the question, from all of these together and in the form that it asks for. Leave out what
found nothing, and do not mention the parts.

{{ question }}
{% else %}
Make one result for the whole document of them, in the same form. Do not mention the parts.
{% endif %}
"""
COMBINE_AS_TEXT = "{% if system %}\n{{ system }}\n\n{% endif %}\n" + COMBINE + "\nAnswer:"


class Reduction:
    """The split rows of a run: `add` them, hand out `prompts` and `take` answers until there are no more."""

    def __init__(self, splitter: Splitter | None, method: str) -> None:
        self._splitter, self._method = splitter, method
        self._owners: dict[int, tuple[_SplitRow, _Step]] = {}  # by id of the prompt, which the step holds
        self._next: list[EncodedDocument] = []

    def add(self, document: SplitDocument) -> None:
        """Take in a row that is to be answered in parts."""
        assert self._splitter is not None, "a document was split without a splitter"
        row = _SplitRow(document, self._splitter, self._method)
        self._register(row, row.steps)

    def prompts(self) -> list[EncodedDocument]:
        """Prompts that are to be answered next, each given once."""
        prompts, self._next = self._next, []
        return prompts

    def take(self, answered: Answered) -> Answer | None:
        """The row that is complete with this answer, be it to a row that was not split; None if none is."""
        if id(answered.document) not in self._owners:
            return answered.answer
        row, step = self._owners.pop(id(answered.document))
        step.answer, step.started = answered.answer, answered.started
        row.waiting -= 1
        if row.waiting:
            return None
        steps = row.combinations()
        if not steps:
            return row.as_answer()
        self._register(row, steps)
        return None

    def _register(self, row: _SplitRow, steps: Sequence[_Step]) -> None:
        for step in steps:
            if step.prompt is not None:
                self._owners[id(step.prompt)] = row, step
                row.waiting += 1
                self._next.append(step.prompt)


@dataclass(kw_only=True, eq=False)
class _Step:
    """A prompt of a split row and, once there is one, its answer."""

    depth: int
    start: int  # as in PartAnswer
    end: int
    parts: range  # of the document, from 0, that its answer speaks of
    prompt: EncodedDocument | None  # None: a part of white space
    answer: Answer | None = None
    started: float = 0.0  # when the prefill of its pack began, by time.perf_counter()

    @property
    def text(self) -> str:
        return "" if self.answer is None else (self.answer.answer or "").strip()

    def titled(self) -> str:
        """The answer under the numbers of its parts, from 1."""
        first, last = self.parts.start + 1, self.parts.stop
        return f"Part {first}:\n{self.text}" if first == last else f"Parts {first} to {last}:\n{self.text}"


class _SplitRow:
    """One split row: all of its steps so far, and of these the ones whose answers are to be combined next."""

    def __init__(self, document: SplitDocument, splitter: Splitter, method: str) -> None:
        self._document, self._splitter, self._method = document, splitter, method
        self._error: RowError | None = None
        self.steps = [
            _Step(depth=0, start=part.start, end=part.end, parts=range(n, n + 1), prompt=part.encoded)
            for n, part in enumerate(document.parts)
        ]
        self._level = self.steps
        self._tokenize_ms = document.tokenize_ms
        self.waiting = 0  # prompts that were handed out and have no answer yet

    def combinations(self) -> list[_Step]:
        """The steps that follow now that all are answered; none where the row is done or has failed."""
        if any(answer.status != "ok" for answer in self.answers):
            return []
        said = [step for step in self._level if step.text]
        if len(said) < 2:  # where nothing was said, the last answer, which says nothing
            said = said or [step for step in self._level if step.answer is not None][-1:]
            if self._is_last(said[0]):
                self._level = said
                return []
        began = time.perf_counter()
        try:
            with tokenizer_faults():
                self._level = self._combined(said)
        except RowError as error:
            self._error = error
            return []
        finally:
            self._tokenize_ms += (time.perf_counter() - began) * 1e3
        new = [step for step in self._level if step.answer is None]
        self.steps += new
        return new

    def _is_last(self, step: _Step) -> bool:
        """Whether an answer may be the row's: in the form that this is to have, if it is to have one."""
        formed = self._splitter.formed or self._document.source.params.response_format is not None
        return not formed or (step.prompt is not None and step.prompt.is_final)

    def _combined(self, said: list[_Step]) -> list[_Step]:
        """The next level: prompts of neighbours, and whatever has none beside it that fits."""
        if len(said) == 1:
            return [self._combination(said, is_final=True)]
        combine = self._splitter.combine
        sizes = [len(combine.token_starts(f"{step.titled()}\n\n")) for step in said]
        room = combine.room(self._asking)
        while True:
            groups = groups_that_fit(sizes, room)
            if len(groups) == len(said):
                raise self._no_progress(said, min(map(sum, pairwise(sizes))))
            try:
                is_final = len(groups) == 1
                return [self._combination([said[i] for i in group], is_final=is_final) for group in groups]
            except RowError as error:
                if not error.excess_tokens:
                    raise
                # joined they have more tokens than alone
                room -= error.excess_tokens

    def _combination(self, steps: list[_Step], *, is_final: bool) -> _Step:
        if len(steps) == 1 and not is_final:
            return steps[0]
        parts = range(steps[0].parts.start, steps[-1].parts.stop)
        place = f"{self._document.source.place}, answers of parts {parts.start + 1} to {parts.stop} combined"
        document = Document(
            source=replace(self._asking, place=place),
            text="\n\n".join(step.titled() for step in steps),
        )
        return _Step(
            depth=max(step.depth for step in steps) + 1,
            start=parts.start,
            end=parts.stop,
            parts=parts,
            prompt=replace(self._splitter.combine.encode(document), is_final=is_final),
        )

    @property
    def answers(self) -> list[Answer]:
        """So far, of all steps in their order."""
        return [step.answer for step in self.steps if step.answer is not None]

    @property
    def _asking(self) -> Row:
        return self._splitter.combining(self._document.source)

    def _no_progress(self, said: list[_Step], least_tokens: int) -> RowError:
        combine = self._splitter.combine
        return RowError(
            "no_progress",
            f"{len(said)} answers are left to combine, and no two fit into one prompt: the shortest have"
            f" {least_tokens:,} tokens, and there is room for {combine.room(self._asking):,};"
            " lower --max-new-tokens, or shorten the question or the --combine-template",
        )

    def as_answer(self) -> Answer:
        """The row of the output."""
        answer = Answer.begin(self._document.source, self._method)
        _add_statistics(answer, self.answers)
        answer.document_tokens, answer.truncated_tokens = self._document.document_tokens, 0
        answer.tokenize_ms = self._tokenize_ms
        answer.guard = next((each.guard for each in self.answers if each.guard is not None), None)
        answer.parts = [_part(step) for step in self.steps]
        failed = next((each for each in self.answers if each.status != "ok"), None)
        if failed is not None:
            answer.status = "error"
            answer.error_type, answer.error_message = failed.error_type, failed.error_message
        elif self._error is not None:
            answer.fail(self._error.at(self._document.source))
        else:
            (last,) = self._level
            assert last.answer is not None
            for name in OF_LAST:
                setattr(answer, name, getattr(last.answer, name))
            answer.ttft_ms = _ttft_ms(self.steps, last)
        return answer


def _ttft_ms(steps: Sequence[_Step], last: _Step) -> float:
    """From the first prefill of the row to the first token of the answer that became the row's."""
    assert last.answer is not None
    began = min(step.started for step in steps if step.answer is not None)
    return (last.started - began) * 1e3 + (last.answer.ttft_ms or 0.0)


def _part(step: _Step) -> PartAnswer:
    values: dict[str, Any] = {"depth": step.depth, "start": step.start, "end": step.end}
    if step.answer is not None:
        values = {field.name: getattr(step.answer, field.name, None) for field in fields(PartAnswer)} | values
    return PartAnswer(**values)


def _add_statistics(answer: Answer, sent: Sequence[Answer]) -> None:
    """Sums over the answers to a row's prompts; shares are means over their prompt tokens, or new ones."""
    answer.prompt_tokens = sum(each.prompt_tokens or 0 for each in sent)
    ok = [each for each in sent if each.status == "ok"]
    if not ok:
        return
    answer.new_tokens = sum(each.new_tokens or 0 for each in ok)
    for name in ("draft_tokens", "accepted_tokens"):
        counts = [count for each in ok if (count := getattr(each, name)) is not None]
        setattr(answer, name, sum(counts) if counts else None)
    answer.queue_ms = next(each.queue_ms for each in ok)
    for name in ("kept_tokens", "ffn_tokens", "ffn_fp8_tokens"):
        lists = [value for each in ok if (value := getattr(each, name)) is not None]
        setattr(answer, name, [sum(layer) for layer in zip(*lists, strict=True)] if lists else None)
    tokens = sum(each.prompt_tokens or 0 for each in ok)
    for name in ("kept_ratio", "ffn_ratio", "attention_ratio", "flops_ratio"):
        work = sum((getattr(each, name) or 0.0) * (each.prompt_tokens or 0) for each in ok)
        setattr(answer, name, work / tokens)
    decoded = [(share, each.new_tokens or 0) for each in ok if (share := each.skipped_ffn_ratio) is not None]
    if decoded:  # of decode steps, which are about as many as new tokens
        weights = sum(new_tokens for _, new_tokens in decoded)
        answer.skipped_ffn_ratio = sum(share * new_tokens for share, new_tokens in decoded) / max(1, weights)
    answer.kv_bytes = sum(each.kv_bytes or 0 for each in ok)
    packs: dict[tuple[float | None, float | None], list[Answer]] = {}
    for each in ok:  # answers of one pack share its times, to the last bit
        packs.setdefault((each.prefill_ms, each.ttft_ms), []).append(each)
    answer.prefill_ms = sum(each[0].prefill_ms or 0.0 for each in packs.values())
    answer.decode_ms = sum(max(one.decode_ms or 0.0 for one in each) for each in packs.values())
    answer.kv_host_bytes = sum(each[0].kv_host_bytes or 0 for each in packs.values())
    answer.kv_swapped_bytes = sum(each[0].kv_swapped_bytes or 0 for each in packs.values())
