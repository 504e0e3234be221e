"""FFN-SkipLLM: feed-forward networks left out of decode steps, of a row that is decoded alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from pipeline.errors import ConfigError
from pipeline.pruning.base import KEEP_ALL, PruningMethod, Selection
from pipeline.pruning.capabilities import StepSkips
from pipeline.pruning.limits import setting
from pipeline.pruning.operations import Passes, dense_work
from pipeline.pruning.shape import ModelShape
from pipeline.pruning.view import LayerView

COLD = 1 / 4  # of the depth, at either end


@dataclass(frozen=True, kw_only=True)
class FfnSkip(PruningMethod):
    """FFNs left out of decode steps where the one before changed little, for rows decoded alone.

    Source: FFN-SkipLLM (arXiv 2404.03865).

    Prefill is dense. In each decode step all layers compute attention, and store keys and values. Where the
    residual stream before and behind a layer's feed-forward network has a cosine of `threshold` or more, the
    networks of the layers that follow are left out, up to the last cold layers. In the next step that is
    measured anew. Cold layers, the first `cold_first` and the last `cold_last`, always run their networks;
    the last of the first ones is measured. All layers do so for the first `warm_up` tokens of the answer.

    Our choices, on which our source is silent: the threshold of 0.95, 25 tokens of warm-up, a quarter of the
    depth at either end cold; and `most`, the networks left out before one runs and is measured again.

    A step in which many rows go on reads a network's weights for any of them, so that nothing would be
    gained: rows are decoded alone (`--in-flight 1`), and their steps are no CUDA graphs, since the host
    decides in each layer.
    """

    name: ClassVar[str] = "ffn-skip"
    source: ClassVar[str] = "arXiv 2404.03865"
    reads_layers: ClassVar[bool] = False

    threshold: float = setting(
        0.95, "cosine of a feed-forward network's input and output from which on others are left out"
    )
    warm_up: int = setting(25, "first tokens of an answer that leave nothing out", low=0, whole=True)
    cold_first: int | None = setting(
        None, "first layers, whose networks always run; by default a quarter", low=1, whole=True
    )
    cold_last: int | None = setting(
        None, "last layers, whose networks always run; by default a quarter", low=0, whole=True
    )
    most: int | None = setting(
        None,
        "networks left out before one is measured again; by default all up to the cold ones",
        low=1,
        whole=True,
    )

    @classmethod
    def suits(cls, shape: ModelShape) -> bool:
        return True

    def step_skips(self, shape: ModelShape) -> StepSkips:
        quarter = max(1, round(COLD * shape.layers))
        first = quarter if self.cold_first is None else self.cold_first
        last = quarter if self.cold_last is None else self.cold_last
        return StepSkips(
            threshold=self.threshold,
            warm_up=self.warm_up,
            layers=range(first, max(first, shape.layers - last)),
            most=shape.layers if self.most is None else self.most,
        )

    def check_depth(self, shape: ModelShape) -> None:
        super().check_depth(shape)
        given = [("cold_first", self.cold_first), ("cold_last", self.cold_last)]
        for name, layers in given:
            if layers is not None and layers > shape.layers:
                raise ConfigError(f"{name}={layers}, and the model has {shape.layers} layers")

    def needs_last_layer(self, shape: ModelShape) -> bool:
        return False

    def expected_passes(self, shape: ModelShape, length: int) -> Passes:
        return [dense_work(shape, length)]

    def select(self, layer: int, view: LayerView, state: Any) -> Selection:
        return KEEP_ALL
