"""Mars: block-sparse attention in every layer, local in late ones, the last for the prompt's end alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from pipeline.errors import ConfigError
from pipeline.pruning.base import KEEP_ALL, Plan, PruningMethod, Selection
from pipeline.pruning.limits import setting
from pipeline.pruning.operations import LayerWork, Passes, whole_layers, within_windows
from pipeline.pruning.shape import ModelShape
from pipeline.pruning.view import LayerView, Range
from pipeline.records import Spans

LOCAL_DEPTH = 2 / 3


@dataclass(frozen=True, kw_only=True)
class Mars(PruningMethod):
    """Block-sparse attention in every layer, local in late ones; the last ones for the prompt's end alone.

    Source: this project. Block-sparse attention judges blocks by the means of their keys, as FlashPrefill
    does (arXiv 2603.06199), and takes what any 16 queries beside each other need for their attention. Keys
    and values from the hidden states of an earlier layer are SwiftKV's (arXiv 2410.03960), here untrained.

    In documents of 4,096 tokens or more, on a GPU, and where heads have at most 256 dimensions, each head's
    blocks of queries attend to the blocks of keys that are to reach `sparse_attention` of their attention.
    From layer `local_from` on they attend to themselves, the block before and the first one, the attention
    sink: what a document's tokens have to tell each other is told by then, and the prompt's last 129 to 256
    tokens still read everything.

    After layer `last_full` only the prompt's last tokens go on, from the question on, if it stands behind the
    document, at least `window` and at most `most`. Of the others later layers compute keys and values, from
    the hidden states that they stopped with, so that the question still reads all of them. Keys and values
    of the layer after `last_full` are exact, so with the last layer but one, the default, nothing is lost by
    stopping. Those of the layers behind it are far nearer to what they would be by linear maps, which
    `calibrate` fits on text by ridge regression: `exit_maps` is their file.

    Layers whose attention has a sliding window keep it, whole: they are left out of the choice of blocks.

    No token is chosen by its importance: on the small models measured that cost more than it saved.
    """

    name: ClassVar[str] = "mars"
    source: ClassVar[str] = "this project; arXiv 2603.06199, arXiv 2410.03960"
    reads_layers: ClassVar[bool] = False

    sparse_attention: float | tuple[float, ...] | None = setting(
        0.85,
        "attention mass that block-sparse attention is to reach, in long documents",
        low=0,
        high=1,
        per_layer=True,
    )
    local_from: int | None = setting(
        None,
        "first layer whose block-sparse attention is local; by default at two thirds of the depth, "
        "unless sparse_attention has a value a layer",
        low=0,
        whole=True,
    )
    last_full: int | None = setting(
        None, "last layer that computes all tokens, from 0; by default the last but one", is_layer=True
    )
    exit_maps: str | None = setting(
        None, "file of maps from the state that tokens stop with to keys and values of later layers"
    )
    window: int = setting(64, "fewest last tokens that go on", low=1, whole=True)
    most: int = setting(256, "most of them, where the question is longer", low=1, whole=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.most < self.window:
            raise ConfigError(f"most={self.most} is less than window={self.window}")

    @classmethod
    def suits(cls, shape: ModelShape) -> bool:
        return True

    def last_full_layer(self, depth: int) -> int:
        """The last layer that computes all tokens, in a model of `depth` layers."""
        return max(0, depth - 2) if self.last_full is None else self.last_full

    def attention_masses(self, layers: int) -> tuple[float | None, ...]:
        first = self.local_from
        if first is None:
            first = layers if isinstance(self.sparse_attention, tuple) else round(LOCAL_DEPTH * layers)
        masses = super().attention_masses(layers)
        return tuple(mass if mass is None or layer < first else 0.0 for layer, mass in enumerate(masses))

    def plan(self, shape: ModelShape, lengths: Sequence[int]) -> Plan:
        if (self.local_from or 0) > shape.layers:
            raise ConfigError(
                f"local_from={self.local_from}, and the model has layers 0 to {shape.layers - 1}; "
                f"with {shape.layers} none is local"
            )
        return super().plan(shape, lengths)

    def needs_last_layer(self, shape: ModelShape) -> bool:
        return False  # who stops there has given its keys and values, and is read by nobody

    def shared_layers(self, shape: ModelShape) -> int:
        return self.last_full_layer(shape.layers)

    def expected_passes(self, shape: ModelShape, length: int) -> Passes:
        whole, live = self.last_full_layer(shape.layers) + 1, min(self.window, length)
        exited = length - live
        pairs = length * (length + 1) // 2 - exited * (exited + 1) // 2
        late = LayerWork(live, live, pairs=pairs, kv_only=exited)
        layers = whole_layers(whole, length) + [late] * (shape.layers - whole)
        return [self.to_the_end(shape, within_windows(shape, layers, length))]

    def window_of(self, length: int, spans: Spans) -> int:
        """How many tokens at the end of a prompt of `length` go on."""
        start, stop = spans.question
        asked = length - start if stop > start >= spans.document[1] else 0
        return min(length, max(self.window, min(asked, self.most)))

    def protected(self, length: int, spans: Spans) -> tuple[Range, ...]:
        return ((length - self.window_of(length, spans), length),)

    def begin(self, plan: Plan) -> int:
        return self.last_full_layer(plan.shape.layers)

    def select(self, layer: int, view: LayerView, state: Any) -> Selection:
        if layer != state:
            return KEEP_ALL
        windows = [self.window_of(n, spans) for n, spans in zip(view.lengths, view.spans, strict=True)]
        return Selection(
            live=view.segments.ends(windows),
            ffn=view.all_indices,
            live_lengths=tuple(windows),
            early_exit=True,
        )
