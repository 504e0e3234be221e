"""What a run needs before it needs weights: rows, prompts, and all that decides an answer."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pipeline.config import BatchConfig
from pipeline.errors import ConfigError
from pipeline.intake import Item, Record, encode_rows, make_prompts
from pipeline.io import Source, output_schema
from pipeline.provenance import deciding_settings, describe_run
from pipeline.selection import select_rows

if TYPE_CHECKING:
    import pyarrow as pa

    from pipeline.model.loading import Model
    from pipeline.profile import Profile
    from pipeline.prompts import PromptBuilder
    from pipeline.pruning.base import PruningMethod


@dataclass(frozen=True, kw_only=True)
class Preparation:
    """A run whose settings fit each other, its input and its model, of which no weights are loaded yet."""

    config: BatchConfig
    source: Source
    model: Model
    method: PruningMethod
    prompts: PromptBuilder
    profile: Profile | None = None
    notes: tuple[str, ...] = ()  # what a user should know of it

    def rows(self) -> Iterator[Record]:
        """The rows that the run takes of its input."""
        return select_rows(self.source, self.config, self.source.total_rows)

    def encode(self, rows: Iterable[Record]) -> Iterator[Item]:
        """Rows as prompts; those that cannot be are failures."""
        return encode_rows(rows, self.prompts, self.config.on_overlong)

    def length_note(self, prompt_tokens: int) -> str | None:
        """What to say of a prompt of such a length, for which the profile says little."""
        from pipeline.profile import length_note

        return None if self.profile is None else length_note(self.profile, prompt_tokens)

    def decides(self) -> dict[str, Any]:
        return deciding_settings(self.config, self.model, self.method, self.prompts)

    def schema(self) -> pa.Schema:
        """The output's columns, and in its metadata how it was made."""
        metadata = json.dumps(describe_run(self.config, self.model, self.decides()))
        keeps = self.config.save_selection
        return output_schema(self.source.schema, {"marsinfer": metadata}, save_selection=keeps)


def prepare(config: BatchConfig, source: Source, model: str | Model, method: PruningMethod) -> Preparation:
    """Raises ConfigError or ModelError for what cannot work, before any row or weight is read."""
    if isinstance(model, str):
        from pipeline.model.loading import open_model

        model = open_model(
            model,
            dtype=config.dtype,
            device=config.device,
            revision=config.revision,
            trust_remote_code=config.trust_remote_code,
            attention=config.attention,
            attention_dtype=config.attention_dtype,
        )
    from pipeline.model.adapters import check_fp8
    from pipeline.profile import check_profile, load_profile

    profile = None if config.profile is None else load_profile(config.profile)
    notes = () if profile is None else tuple(check_profile(str(config.profile), profile, model))
    prompts = make_prompts(config, model.tokenizer, model.shape.context)
    plan = method.plan(model.shape, (1,))  # settings that do not fit the model's depth
    if config.kv_memory is not None and plan.rescoring is None:
        raise ConfigError(f"--kv-memory needs a method that can offload keys and values, not {method.name}")
    if config.linear_dtype == "fp8" or method.ffn_in_fp8:
        check_fp8(model.device, model.dtype, model.shape)
    return Preparation(
        config=config,
        source=source,
        model=model,
        method=method,
        prompts=prompts,
        profile=profile,
        notes=notes,
    )
