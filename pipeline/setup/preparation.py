"""What a run needs before it needs weights: rows, prompts, and all that decides an answer."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from pipeline.errors import ConfigError
from pipeline.inputs.reading import Reading
from pipeline.inputs.sorting import by_document
from pipeline.inputs.source import Source
from pipeline.outputs.answers import output_schema
from pipeline.pruning.capabilities import uses_fp8
from pipeline.pruning.registry import make_method
from pipeline.records import Record
from pipeline.settings.method_settings import AUTO
from pipeline.settings.model_settings import ModelSettings, WeightsSettings
from pipeline.settings.run_settings import BatchConfig
from pipeline.setup.auto import Chosen, choose
from pipeline.setup.intake import Intake, Item, encode_rows, make_prompts, make_splitter
from pipeline.setup.provenance import deciding_settings, describe_run, moment_of

if TYPE_CHECKING:
    import pyarrow as pa

    from pipeline.model.loading import Model, UnloadedModel
    from pipeline.prompts.builder import PromptBuilder
    from pipeline.prompts.splitting import Splitter
    from pipeline.pruning.base import PruningMethod
    from pipeline.setup.guard import Guard
    from pipeline.setup.profile import Profile


@dataclass(frozen=True, kw_only=True)
class Setup:
    """All that answering takes but weights: settings, model, method and prompts that fit each other."""

    config: BatchConfig
    model: Model
    method: PruningMethod
    prompts: PromptBuilder
    splitter: Splitter | None = None  # of over-long documents, under --on-overlong split
    profile: Profile | None = None
    guard: Guard | None = None  # of what the profile does not speak for
    notes: tuple[str, ...] = ()  # what a user should know of it


@dataclass(frozen=True, kw_only=True)
class Preparation(Setup):
    """A run whose settings fit its input too, of which no weights are loaded yet."""

    intake: Intake

    @property
    def source(self) -> Source:
        return self.intake.source

    def rows(self) -> Reading:
        """The rows that the run takes of its input, a record for each question."""
        return Reading(self.source, self.config)

    def encode(self, rows: Iterable[Record]) -> Iterator[Item]:
        """Rows as prompts, in the order in which they are answered; those that cannot be are failures."""
        ordered = by_document(rows) if self.config.sort_by_document else rows
        config = self.config
        return encode_rows(ordered, self.splitter or self.prompts, config.on_overlong, config.row_timeout)

    def length_note(self, prompt_tokens: int) -> str | None:
        """What to say of a prompt of such a length, for which the profile says little."""
        from pipeline.setup.profile import length_note

        if self.profile is None or self.guard is not None:  # which tells it in the row
            return None
        return length_note(self.profile, prompt_tokens)

    def decides(self) -> dict[str, Any]:
        return deciding_settings(
            self.config,
            self.model,
            self.method,
            self.prompts,
            self.splitter,
            self.guard,
            self.intake.columns,
        )

    def schema(self) -> pa.Schema:
        """The output's columns, and in its metadata how it was made."""
        metadata = json.dumps(describe_run(self.config, self.model, self.decides()))
        keeps = self.config.save_selection
        return output_schema(
            self.source.schema,
            {"marsinfer": metadata},
            save_selection=keeps,
            holds_question=self.source.columns.holds_question,
        )


def prepare(intake: Intake, model: str | Model, method: PruningMethod | None = None) -> Preparation:
    """All that a run needs but weights; `method` stands for the one that the settings name.

    Raises ConfigError or ModelError for what cannot work, before any row or weight is read.
    """
    config = intake.config
    if isinstance(model, str):
        model = open_for_run(config)
    elif config.rope_scaling is not None:
        raise ConfigError("rope_scaling goes with a model's name: give it to load_model")
    chosen = _chosen(intake, model, method)
    config, method = chosen.config, chosen.method
    prompts, splitter = _prompts(config, model, intake.begun)
    plan = method.plan(model.shape, (1,))  # settings that do not fit the model's depth
    if config.kv_memory is not None and plan.rescoring is None:
        raise ConfigError(f"--kv-memory needs a method that can offload keys and values, not {method.name}")
    if config.linear_dtype != "auto" or uses_fp8(method):
        model.check_fp8()
    return Preparation(
        config=config,
        intake=intake,
        model=model,
        method=method,
        prompts=prompts,
        splitter=splitter,
        profile=chosen.profile,
        guard=chosen.guard,
        notes=(*intake.notes, *model.notes, *_demonstration(config), *chosen.notes),
    )


def _chosen(intake: Intake, model: Model, method: PruningMethod | None) -> Chosen:
    """The run's method, and what guards it."""
    config = intake.config
    if method is None and config.method == AUTO:
        return choose(config, model, intake.begun)
    if intake.is_old and config.group == "auto":  # which then meant what any does
        config = replace(config, group="any")
    method = method or make_method(config.method, config.settings)
    profile, guard, notes = _profiled(config, model, method)
    return Chosen(config=config, method=method, profile=profile, guard=guard, notes=notes)


def _demonstration(config: BatchConfig) -> tuple[str, ...]:
    """What to say where nobody chose the model."""
    if config.model != WeightsSettings.model:
        return ()
    return (f"{config.model} is a model for demonstration, and often wrong: --model names a larger one",)


def _prompts(
    config: BatchConfig, model: Model, begun: Mapping[str, Any] | None
) -> tuple[PromptBuilder, Splitter | None]:
    """The run's prompts, which print the date of the run that it resumes, if they print any."""
    from pipeline.prompts.chat import parse_moment

    prompts = make_prompts(config, model, config.max_new_tokens)
    splitter = make_splitter(config, prompts)
    then = (begun or {}).get("date")
    if then is None or not moment_of(prompts, splitter):
        return prompts, splitter
    prompts = make_prompts(config, model, config.max_new_tokens, now=parse_moment(then))
    return prompts, make_splitter(config, prompts)


def open_for_run(config: BatchConfig, **elsewhere: str) -> UnloadedModel:
    """The model of a run; `elsewhere` are the dtype and device that stand above the configuration's."""
    from pipeline.model.loading import open_model

    return open_model(ModelSettings.of(config, **elsewhere))


def _profiled(
    config: BatchConfig, model: Model, method: PruningMethod
) -> tuple[Profile | None, Guard | None, tuple[str, ...]]:
    """The run's profile, what guards documents that it does not speak for, and what to say of it."""
    from pipeline.pruning.dense import Dense
    from pipeline.setup.guard import Guard
    from pipeline.setup.profile import check_profile, load_profile

    if config.profile is None:
        return None, None, ()
    profile = load_profile(config.profile)
    notes = check_profile(config.profile, profile, model)
    if config.guard == "off" or isinstance(method, Dense):
        return profile, None, tuple(notes)
    if not profile.is_of(config, method):
        notes.append("other settings stand above the profile's, which was not verified with them: no guard")
        return profile, None, tuple(notes)
    return profile, Guard.of(profile), tuple(notes)
