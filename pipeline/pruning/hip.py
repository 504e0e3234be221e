"""HiP: each block of 64 queries attends to the keys that it finds by halving, whatever the length."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from pipeline.errors import ConfigError
from pipeline.pruning.limits import setting
from pipeline.pruning.memories.hip_choice import QUERY_BLOCK, blocks_at_once, most_chunks, stages_of
from pipeline.pruning.memories.hip_memory import HipLayer, HipMemory, attended_pairs
from pipeline.pruning.memories.key_memory import MemoryNeeds
from pipeline.pruning.operations import LayerWork, Passes, dense_work
from pipeline.pruning.shape import ModelShape
from pipeline.pruning.unrotated import UnrotatedMethod

KEEP = 2048
KEEP_MORE = 4096
FIRST_LAYERS = 4  # which keep more, as the last one does
FLOAT_BYTES = 4
PLACE_BYTES = 8
CHUNKS = (8, 16, 32, 64)


@dataclass(frozen=True, kw_only=True)
class Hip(UnrotatedMethod):
    """Each block of 64 queries attends to a few keys, found by halving; reads beyond the model's context.

    Source: HiP and InfiniteHiP (arXiv 2406.09827, 2502.08910), written from their description. Each head of a
    block of queries reads the first `sink` keys, the last `window` before the block, and of those between
    them `keys`, which it finds in three stages: of chunks of 256 keys it takes those with the best keys,
    32,768 of them; of chunks of 32 8,192 keys; and of chunks of `chunk` those to keep. A chunk's best key is
    looked for by halving the chunk, where the key in the middle of a half stands for it; in the first two
    stages four queries are averaged.

    Prompts below `dense_below` attend to everything, and so do a prompt's `last` queries and the answer,
    while prompt and answer fit into the model's context. Beyond it queries number the keys that they read
    from 0, each at the end of its own, so that no position is one that the model was not trained on. Then the
    last queries choose, too, as there are no positions for all keys, and every `refresh`-th token of the
    answer chooses for those that follow. Keys are judged as if each stood `window` + 1 before the query.

    Chosen by us: chunks of 64 by default, where the paper has 8, so that the block-sparse kernel serves. With
    64 those of the second stage are of 64, too. `sink` and `window` are whole blocks of 64, and the
    window counts from the beginning of a query's block. Keys stay on the device.
    """

    name: ClassVar[str] = "hip"
    source: ClassVar[str] = "arXiv 2406.09827, arXiv 2502.08910"

    keys: int | tuple[int, ...] | None = setting(
        None,
        "keys beside sink and window; by default 4096 in the first four layers and the last, 2048 elsewhere",
        low=QUERY_BLOCK,
        whole=True,
        per_layer=True,
    )
    chunk: int = setting(64, "keys that are kept together: 8, 16, 32 or 64", low=8, high=64, whole=True)
    sink: int = setting(256, "first keys that all read, in blocks of 64", low=0, whole=True)
    window: int = setting(1024, "last keys that all read, in blocks of 64", low=0, whole=True)
    dense_below: int = setting(8192, "prompt tokens below which all is read", low=0, whole=True)
    last: int = setting(64, "last queries of a prompt that read all", low=0, whole=True)
    refresh: int = setting(8, "tokens of the answer that read what one of them chose", low=1, whole=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.chunk not in CHUNKS:
            raise ConfigError(f"chunk={self.chunk} must be one of {', '.join(map(str, CHUNKS))}")
        for name in ("sink", "window"):
            if getattr(self, name) % QUERY_BLOCK:
                raise ConfigError(f"{name}={getattr(self, name)} must be a multiple of {QUERY_BLOCK}")

    def layers_of(self, depth: int) -> tuple[HipLayer, ...]:
        """How each layer of a model chooses."""
        kept = self.keys
        if kept is None:
            more = (*range(FIRST_LAYERS), depth - 1)
            kept = tuple(KEEP_MORE if layer in more else KEEP for layer in range(depth))
        of_each = kept if isinstance(kept, tuple) else (kept,) * depth
        return tuple(
            HipLayer(stages_of(self.chunk, number), sink=self.sink, window=self.window) for number in of_each
        )

    def most_read(self, shape: ModelShape) -> int:
        """Keys that a query reads at most, which are numbered one after the other."""
        return max(layer.most_read for layer in self.layers_of(shape.layers)) + self.refresh

    def longest(self, shape: ModelShape) -> int:
        return super().longest(shape) if self.most_read(shape) <= shape.context else shape.context

    def needs_last_layer(self, shape: ModelShape) -> bool:
        return False

    def chunk_tokens(self, most: int) -> int:
        return max(QUERY_BLOCK, most // QUERY_BLOCK * QUERY_BLOCK)

    def memory(self, needs: MemoryNeeds) -> HipMemory:
        longest, total = self.longest(needs.shape), needs.length + needs.new_tokens
        if total > longest:
            raise ConfigError(
                f"method {self.name} reads {longest:,} tokens, prompt and answer, and these are {total:,}: "
                f"what is longer than the context of {needs.shape.context:,} takes a context with room for "
                f"the {self.most_read(needs.shape):,} keys that a query reads"
            )
        layers = self.layers_of(needs.shape.layers)
        return HipMemory(needs, layers, dense_below=self.dense_below, last=self.last, refresh=self.refresh)

    def attention_bytes(self, shape: ModelShape, itemsize: int, length: int, chunk: int) -> int:
        layers, heads, width = self.layers_of(shape.layers), shape.heads, shape.head_dim
        blocks = -(-chunk // QUERY_BLOCK)
        of_queries = QUERY_BLOCK * FLOAT_BYTES
        chunks = max(most_chunks(layer.stages, length) for layer in layers)
        choosing = min(blocks, blocks_at_once(heads, chunks, width)) * chunks
        choosing *= width * itemsize + of_queries + 6 * PLACE_BYTES
        read = min(length, max(layer.most_read for layer in layers))
        reading = min(blocks, blocks_at_once(heads, read, width)) * read
        # of keys and values, and in float32 on the way to their positions
        reading *= 2 * width * itemsize + 3 * width * FLOAT_BYTES + 2 * of_queries + PLACE_BYTES
        tables = min(length, shape.context) * 4 * width * itemsize
        return heads * max(choosing, reading) + tables

    def expected_passes(self, shape: ModelShape, length: int) -> Passes:
        layers = dense_work(shape, length)
        if length < self.dense_below:
            return [layers]
        last = min(self.last, length) if length <= shape.context else 0
        return [
            [
                self._expected(layer, work, length, last)
                for layer, work in zip(self.layers_of(shape.layers), layers, strict=True)
            ]
        ]

    def _expected(self, layer: HipLayer, work: LayerWork, length: int, last: int) -> LayerWork:
        if work.last_only:
            return work
        chosen = attended_pairs(layer, length - last)
        return work._replace(pairs=chosen + last * length - last * (last - 1) // 2)
