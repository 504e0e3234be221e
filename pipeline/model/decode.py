"""Generating the answers of a prefilled pack, all documents together, a token a step."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pipeline.kernels.attention import AttentionBackend
from pipeline.model.adapters import DecoderAdapter
from pipeline.model.cache import RaggedCache
from pipeline.model.prefill import Prefilled
from pipeline.model.sampling import Sampler, Sampling


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
) -> list[Generated]:
    """Go on from each document's first token until its stop rule; finished documents leave the batch.

    `check` is called before every step, and may raise to give the pack up.
    """
    answers = [Generated() for _ in prefilled.lengths]
    active = list(range(len(answers)))
    tokens = list(first_tokens)
    while True:
        for b, token in zip(active, tokens, strict=True):
            _take(answers[b], token, rules)
        left = [place for place, b in enumerate(active) if answers[b].finish_reason is None]
        if not left:
            return answers
        if len(left) < len(active):
            prefilled.cache.keep(left)
            active = [active[place] for place in left]
        check()
        # the position counts the prompt as it was, not the tokens that a method left in the cache
        positions = [prefilled.next_positions[b] + len(answers[b].tokens) - 1 for b in active]
        newest = [answers[b].tokens[-1] for b in active]
        logits_BV = decode_step(adapter, attention, prefilled.cache, newest, positions)
        tokens = sampler.draw(logits_BV, active)


def greedy_answers(
    adapter: DecoderAdapter, attention: AttentionBackend, prefilled: Prefilled, rules: StopRules
) -> list[Generated]:
    """The most likely token at each step, from the prompts' end on."""
    documents = range(len(prefilled.lengths))
    sampler = Sampler(Sampling(), documents)
    first_tokens = sampler.draw(prefilled.logits_BV, documents)
    return decode(adapter, attention, prefilled, first_tokens, sampler, rules)


def decode_step(
    adapter: DecoderAdapter,
    attention: AttentionBackend,
    cache: RaggedCache,
    tokens: Sequence[int],
    positions: Sequence[int],
) -> Tensor:
    """Run one token of each document through the model and into the cache; logits (B, vocabulary)."""
    device = adapter.device
    hidden_BD = adapter.embed(torch.tensor(tokens, device=device))
    rope = adapter.rope(hidden_BD, torch.tensor(positions, device=device))
    places = {id(slots): slots.next_B() for slots in cache.distinct_slots()}
    for layer in range(adapter.shape.layers):
        slots, keys, values = cache.slots[layer], cache.keys[layer], cache.values[layer]
        q_BHd, k_BKd, v_BKd = adapter.qkv(layer, hidden_BD, rope)
        cache.ready(layer)
        keys.index_copy_(0, places[id(slots)], k_BKd)
        values.index_copy_(0, places[id(slots)], v_BKd)
        mixed_BHd = attention.decode(q_BHd, keys, values, slots.starts, [n + 1 for n in slots.used])
        cache.observe(layer, q_BHd)
        hidden_BD += adapter.attention_output(layer, mixed_BHd)
        hidden_BD += adapter.feed_forward(layer, hidden_BD)
    cache.advance()
    return adapter.logits(hidden_BD)


def _take(answer: Generated, token: int, rules: StopRules) -> None:
    answer.tokens.append(token)
    answer.finish_reason = rules.reason(answer.tokens)
    if answer.finish_reason is None:
        return
    answer.finished_at = time.perf_counter()
    if answer.finish_reason == "stop":
        answer.tokens.pop()
