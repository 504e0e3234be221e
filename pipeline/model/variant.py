"""What is measured side by side: a method with its settings, and the precisions of the model."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from pipeline.checkpoints.drafts import FLAG
from pipeline.errors import ConfigError
from pipeline.families.exit_maps import check_exit_maps, exit_maps
from pipeline.families.projection import IN_FULL, LinearPrecision
from pipeline.model.loading import LoadedModel, Model, UnloadedModel, use_linears
from pipeline.pruning.base import PruningMethod
from pipeline.pruning.capabilities import ReadsAhead, check_memories, uses_fp8


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
        """Set the model, which `prepare` has seen, to this variant's precision; returns the method.

        Raises ConfigError where the method names exit maps that are not for this model.
        """
        check_exit_maps(self.method, model.shape, model.fingerprint)
        exit_maps(model.decoder, self.method)
        for decoder in model.decoders:
            decoder.linears = self.linears
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
        for decoder in model.decoders:
            use_linears(decoder, linears, ffn=ffn, keep=True)
    for decoder in model.decoders:
        decoder.linears = "auto"


def check_draft(model: Model, methods: Iterable[PruningMethod]) -> None:
    """Raise ConfigError where a method needs a draft model that is not there, or would be loaded in vain."""
    methods = list(methods)
    readers = [method.name for method in methods if isinstance(method, ReadsAhead)]
    if readers and model.draft is None:
        raise ConfigError(
            f"method {readers[0]} needs a draft model: {FLAG} names a smaller one with the tokenizer of "
            f"{model.name}"
        )
    if isinstance(model, UnloadedModel) and model.draft is not None and not readers:
        others = ", ".join(dict.fromkeys(method.name for method in methods)) or "what is tried here"
        raise ConfigError(f"{FLAG} is for method speculative, and {others} reads no draft: leave it out")
