"""Generating the answers of a prefilled pack, all documents together, a token a step."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from pipeline.kernels.attention import AttentionBackend
from pipeline.kernels.segments import on_device
from pipeline.model.adapters import DecoderAdapter
from pipeline.model.cache import NextSlots, RaggedCache
from pipeline.model.graphs import DecodeStats, StepOutput, StepRunner, recorder_for
from pipeline.model.prefill import Prefilled
from pipeline.model.sampling import Sampler, Sampling, finite_tokens, most_likely


@dataclass(frozen=True, kw_only=True)
class StopRules:
    """When an answer ends."""

    max_new_tokens: int
    token_ids: frozenset[int] = frozenset()  # never part of the answer
    texts: tuple[str, ...] = ()
    decode_text: Callable[[Sequence[int]], str] | None = None  # needed with `texts`

    def reason(self, tokens: Sequence[int]) -> str | None:
        """Why the answer ends with its newest token: `stop`, `stop_text`, `length`, or None."""
        if tokens[-1] in self.token_ids:
            return "stop"
        if self.texts and self._text_found(tokens):
            return "stop_text"
        return "length" if len(tokens) >= self.max_new_tokens else None

    def _text_found(self, tokens: Sequence[int]) -> bool:
        assert self.decode_text is not None
        # a token is at least a byte: no stop text can reach further back than this
        reach = max(len(text.encode()) for text in self.texts) + 4
        tail = self.decode_text(tokens[-reach:])
        return any(text in tail for text in self.texts)


@dataclass(kw_only=True)
class Generated:
    """One document's answer in tokens, without the stop token."""

    tokens: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    finished_at: float = 0.0  # time.perf_counter()


@torch.inference_mode()
def decode(
    adapter: DecoderAdapter,
    attention: AttentionBackend,
    prefilled: Prefilled,
    first_tokens: Sequence[int],
    sampler: Sampler,
    rules: StopRules,
    check: Callable[[], None] = lambda: None,
    *,
    graphs: bool = True,
    stats: DecodeStats | None = None,
) -> list[Generated]:
    """Go on from each document's first token until its stop rule.

    Finished documents leave the batch, at once or, where steps are replayed as CUDA graphs (which `graphs`
    allows), when it pays. `check` is called before every step, and may raise to give the pack up.
    """
    assert rules.max_new_tokens <= prefilled.cache.new_tokens + 1, "the cache has no room for the answers"
    answers = [Generated() for _ in prefilled.lengths]
    batch = DecodeBatch(adapter, attention, prefilled.cache)
    recorder = recorder_for(adapter.device, attention, prefilled.cache) if graphs else None
    runner = StepRunner(batch.step, recorder, attention, stats or DecodeStats())
    rows, live = list(range(len(answers))), list(range(len(answers)))  # documents; rows of those that go on
    tokens = list(first_tokens)
    try:
        while True:
            for row, token in zip(live, tokens, strict=True):
                _take(answers[rows[row]], token, rules)
            finished = [row for row in live if answers[rows[row]].finish_reason is not None]
            live = [row for row in live if answers[rows[row]].finish_reason is None]
            if not live:
                return answers
            check()
            steps_left = rules.max_new_tokens - min(len(answers[rows[row]].tokens) for row in live)
            if batch.is_empty or runner.shrinks(len(live), len(rows), steps_left):
                runner.restart()
                prefilled.cache.keep(live)
                rows, live = [rows[row] for row in live], list(range(len(live)))
                batch.fill(
                    [answers[b].tokens[-1] for b in rows],
                    # counting the prompt as it was, not the tokens that a method left in the cache
                    [prefilled.next_positions[b] + len(answers[b].tokens) - 1 for b in rows],
                )
            elif finished:
                batch.park(finished)
            # no name for the output: a graph's memory is free only when nothing holds its tensors
            tokens = _draw(runner.run(steps_left), sampler, rows, live, batch)
            batch.count()
    finally:
        runner.close()


def greedy_answers(
    adapter: DecoderAdapter,
    attention: AttentionBackend,
    prefilled: Prefilled,
    rules: StopRules,
    check: Callable[[], None] = lambda: None,
    *,
    graphs: bool = True,
    stats: DecodeStats | None = None,
) -> list[Generated]:
    """The most likely token at each step, from the prompts' end on."""
    documents = range(len(prefilled.lengths))
    sampler = Sampler(Sampling(), documents)
    first = sampler.draw(prefilled.logits_BV, documents)
    return decode(adapter, attention, prefilled, first, sampler, rules, check, graphs=graphs, stats=stats)


class DecodeBatch:
    """The documents that take a step together. What `step` works on stays at its place on the device."""

    def __init__(self, adapter: DecoderAdapter, attention: AttentionBackend, cache: RaggedCache) -> None:
        self._adapter, self._attention, self._cache = adapter, attention, cache
        self._next: NextSlots | None = None

    @property
    def is_empty(self) -> bool:
        return self._next is None

    @property
    def next(self) -> NextSlots:
        assert self._next is not None, "an empty batch"
        return self._next

    def fill(self, tokens: Sequence[int], positions: Sequence[int]) -> None:
        """Take the cache's documents, with the newest token of each and its position."""
        self._next = NextSlots(self._cache)
        self.tokens_B = on_device(tokens, self._adapter.device)
        self.positions_B = on_device(positions, self._adapter.device)

    def step(self) -> StepOutput:
        """Run the newest tokens through the model and into the cache, and go on to the most likely ones.

        Reads nothing of the host that changes between steps, if the attention is capturable.
        """
        adapter, cache = self._adapter, self._cache
        hidden_BD = adapter.embed(self.tokens_B)
        rope = adapter.rope(hidden_BD, self.positions_B)
        for layer in range(adapter.shape.layers):
            slots, places_B = self.next.at(layer)
            keys, values = cache.keys[layer], cache.values[layer]
            q_BHd, k_BKd, v_BKd = adapter.qkv(layer, hidden_BD, rope)
            cache.ready(layer)
            keys.index_copy_(0, places_B, k_BKd)
            values.index_copy_(0, places_B, v_BKd)
            mixed_BHd = self._attention.decode(q_BHd, keys, values, slots)
            cache.observe(layer, q_BHd)
            adapter.add_attention_(layer, hidden_BD, mixed_BHd)
            adapter.add_feed_forward_(layer, hidden_BD)
        logits_BV = adapter.logits(hidden_BD)
        greedy_B = most_likely(logits_BV)
        # rows are looked up by their tokens, those of documents that have finished too: -1 would be no row
        torch.clamp(greedy_B, min=0, out=self.tokens_B)
        self.positions_B.add_(1)
        self.next.advance_()
        return StepOutput(logits_BV=logits_BV, greedy_B=greedy_B)

    def count(self) -> None:
        """Let the host's numbers follow a step."""
        self._cache.advance()
        self.next.advance_host()

    def feed(self, rows: Sequence[int], tokens: Sequence[int]) -> None:
        """Go on with other tokens than the most likely ones."""
        device = self._adapter.device
        self.tokens_B.index_copy_(0, on_device(rows, device), on_device(tokens, device))

    def park(self, rows: Sequence[int]) -> None:
        """Leave finished documents where they are, at next to no cost."""
        self.next.park(rows)


def _draw(
    output: StepOutput, sampler: Sampler, rows: Sequence[int], live: Sequence[int], batch: DecodeBatch
) -> list[int]:
    """The tokens of the rows that go on; greedy ones need one copy of B numbers to the host."""
    if sampler.is_greedy:
        tokens = output.greedy_B.tolist()
        return finite_tokens([tokens[row] for row in live])
    logits_BV = output.logits_BV
    if len(live) < len(rows):
        logits_BV = logits_BV.index_select(0, on_device(live, logits_BV.device))
    tokens = sampler.draw(logits_BV, [rows[row] for row in live])
    batch.feed(live, tokens)
    return tokens


def _take(answer: Generated, token: int, rules: StopRules) -> None:
    answer.tokens.append(token)
    answer.finish_reason = rules.reason(answer.tokens)
    if answer.finish_reason is None:
        return
    answer.finished_at = time.perf_counter()
    if answer.finish_reason == "stop":
        answer.tokens.pop()
