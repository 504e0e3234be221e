"""A pruning method of your own: tokens with long keys skip the feed-forward network.

    marsinfer batch examples/licenses.jsonl out.parquet --question-column question \\
        --method examples/custom_method.py:KeyNorm --set share=0.6

A scored method writes one score a token, higher means keep; starting layer, share, protected tokens,
gathering, packing and statistics come with the base class. Keys of small norm tend to draw more attention
(Devoto et al., 2024, arXiv 2406.11430), which costs nothing to look up.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from pipeline.pruning.base import ScoredMethod
from pipeline.pruning.view import LayerView, Range
from pipeline.records import Spans


@dataclass(frozen=True, kw_only=True)
class KeyNorm(ScoredMethod):
    """FFN skipped by tokens whose keys are long."""

    name: ClassVar[str] = "key-norm"
    source: ClassVar[str] = "arXiv 2406.11430"

    def protected(self, length: int, spans: Spans) -> tuple[Range, ...]:
        return (spans.question, (0, 4), (length - 1, length))

    def score(self, layer: int, view: LayerView) -> Tensor:
        return -view.keys.float().norm(dim=-1).mean(dim=-1)
