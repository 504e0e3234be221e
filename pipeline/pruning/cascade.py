"""Cascading KV cache: of each head the last tokens densely, and those before ever more sparsely."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from pipeline.errors import ConfigError
from pipeline.kernels.scoring import SCORES_AT_ONCE
from pipeline.pruning.base import Plan
from pipeline.pruning.limits import setting
from pipeline.pruning.memories.cascade_memory import CascadeMemory, CascadeSizes
from pipeline.pruning.memories.key_memory import MemoryNeeds
from pipeline.pruning.operations import LayerWork, Passes, dense_work
from pipeline.pruning.shape import ModelShape
from pipeline.pruning.unrotated import UnrotatedMethod

MOST_TOKENS = 32768
FLOAT_BYTES = 4


@dataclass(frozen=True, kw_only=True)
class CascadePlan(Plan):
    """Buffers that keep their size, with keys before RoPE and with it, and what attention each received."""

    most: int  # tokens that a layer holds of a document

    def kv_bytes(self, itemsize: int, new_tokens: int = 0) -> int:
        of_token = self.shape.kv_bytes_per_token(itemsize) * 3 // 2 + FLOAT_BYTES * self.shape.heads
        return self.shape.layers * of_token * sum(min(self.most, n + new_tokens) for n in self.lengths)


@dataclass(frozen=True, kw_only=True)
class Cascade(UnrotatedMethod):
    """Last tokens kept densely, those before ever more sparsely: time linear, memory flat, any length.

    Source: Cascading KV cache (arXiv 2406.17808), written from its description. Each key/value head of each
    layer holds the prompt's first `sink` tokens and `tokens` others, in `caches` of the same size. Of the
    tokens that leave a cache the next one takes every second, for which its oldest leaves; another takes the
    place of the newest if it has received more attention. What leaves the last is gone. The prompt is read
    in chunks, each of which attends to what is held and to itself. Keys are held before RoPE, and numbered
    from 0 by age, so that no position exceeds what is held: a prompt may be longer than the model's context.

    The attention that a token receives is an exponential mean over queries, in which each counts `decay`
    times as much as the next; of the query heads that share keys it is the largest.

    Chosen by us: the answer's tokens are chunks too, which enter the caches when they are full, so that a
    token of the answer attends to all of it that has not entered. By default `tokens` are 32,768, or as many
    as the model's context has room for beside a chunk. Nothing is lost before the first two caches are full.
    """

    name: ClassVar[str] = "cascade"
    source: ClassVar[str] = "arXiv 2406.17808"

    tokens: int | None = setting(
        None, "tokens that are held beside the first; by default 32768, within the context", low=1, whole=True
    )
    caches: int = setting(4, "caches among which they are divided", low=1, high=16, whole=True)
    sink: int = setting(64, "first tokens, which stay", low=0, whole=True)
    chunk: int = setting(1024, "tokens that are read together", low=1, whole=True)
    decay: float = setting(0.9999, "what a query counts, of the one after it", low=0.5, high=1)

    def sizes(self, shape: ModelShape) -> CascadeSizes:
        """What each layer of a model holds; raises ConfigError where its context has no room for that."""
        left = shape.context - self.sink - self.chunk
        tokens = min(MOST_TOKENS, left) if self.tokens is None else self.tokens
        slots = tokens // self.caches
        if slots < 1 or slots * self.caches > left:
            raise ConfigError(
                f"tokens={max(0, tokens)} in caches={self.caches} with sink={self.sink} and "
                f"chunk={self.chunk} do not fit the model's context of {shape.context:,} tokens"
            )
        return CascadeSizes(sink=self.sink, caches=self.caches, slots=slots, chunk=self.chunk)

    def plan(self, shape: ModelShape, lengths: Sequence[int]) -> Plan:
        self.check_depth(shape)
        most = self.sizes(shape).most
        held = (sum(min(most, length) for length in lengths),) * shape.layers
        return CascadePlan(shape=shape, lengths=tuple(lengths), cache_tokens=held, most=most)

    def chunk_tokens(self, most: int) -> int:
        return min(self.chunk, most)

    def memory(self, needs: MemoryNeeds) -> CascadeMemory:
        return CascadeMemory(needs, self.sizes(needs.shape), decay=self.decay)

    def attention_bytes(self, shape: ModelShape, itemsize: int, length: int, chunk: int) -> int:
        most, width = min(self.sizes(shape).most, length), shape.head_dim
        scored = min(SCORES_AT_ONCE, shape.heads * min(chunk, self.chunk) * most) * 3 * FLOAT_BYTES
        # keys in float32, on the way to their positions
        turning = most * shape.kv_heads * width * 5 * FLOAT_BYTES
        return scored + turning + 4 * most * width * itemsize

    def expected_passes(self, shape: ModelShape, length: int) -> Passes:
        sizes = self.sizes(shape)
        pairs = 0
        for start in range(0, length, self.chunk):
            queries = min(self.chunk, length - start)
            end = sizes.held(start) + queries
            pairs += queries * (2 * end - queries + 1) // 2
        *layers, last = dense_work(shape, length)
        work = LayerWork(length, length, pairs=pairs, estimated_pairs=pairs)
        return [[*[work] * len(layers), work._replace(ffn_tokens=last.ffn_tokens)]]
