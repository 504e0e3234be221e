"""What is measured side by side: a method with its settings, and the precisions of the model."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from pipeline.families.projection import IN_FULL, LinearPrecision
from pipeline.model.loading import LoadedModel, use_linears
from pipeline.pruning.base import PruningMethod
from pipeline.pruning.capabilities import check_memories, uses_fp8


class Variant(NamedTuple):
    """One way to run a model."""

    name: str
    method: PruningMethod
    linears: str = "auto"  # of `LINEAR_DTYPES`
    kv: str = "auto"  # of `KV_DTYPES`: keys and values behind the prefill

    @property
    def linears_in_fp8(self) -> bool:
        """Whether all linear layers are, of all tokens; what `mixed` takes through fp8 a prefill counts."""
        return self.linears == "fp8"

    def use(self, model: LoadedModel) -> PruningMethod:
        """Set the model, which `prepare` has seen, to this variant's precision; returns the method."""
        model.decoder.linears = self.linears
        return self.method


def precision_of(variants: Iterable[Variant]) -> LinearPrecision:
    """In which numbers a model is to be loaded for all of these, which `prepare` may add others to.

    Where they agree nothing more is ever held, so that a model fits which would not in full.
    """
    variants = list(variants)
    linears = {variant.linears for variant in variants}
    if len(linears) > 1 or any(uses_fp8(variant.method) for variant in variants):
        return IN_FULL
    return LinearPrecision(linears=linears.pop())


def prepare(model: LoadedModel, variants: Iterable[Variant]) -> None:
    """Make what some variant needs, and keep the rest for the others; raises ConfigError."""
    variants = list(variants)
    for variant in variants:
        refused = {"--linear-dtype mixed": variant.linears == "mixed", "--kv-dtype fp8": variant.kv == "fp8"}
        check_memories(variant.method, refused)
    ffn = any(uses_fp8(variant.method) for variant in variants)
    for linears in dict.fromkeys(variant.linears for variant in variants):
        use_linears(model.decoder, linears, ffn=ffn, keep=True)
    model.decoder.linears = "auto"
