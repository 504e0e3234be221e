"""What a run needs before it needs weights: rows, prompts, and all that decides an answer."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from pipeline.checkpoints.device_memory import Remedies
from pipeline.checkpoints.names import COMMIT_PREFIX
from pipeline.errors import ConfigError
from pipeline.inputs.reading import Reading
from pipeline.inputs.sorting import by_document
from pipeline.inputs.source import Source
from pipeline.outputs.answers import LATER_NAMES, REASONING_NAME, output_schema
from pipeline.outputs.batch_lines import REQUESTS_KEY
from pipeline.outputs.beginnings import QUESTIONS_KEY, UNASKED_KEY
from pipeline.outputs.layout import LAYOUT_KEY, RowLayout
from pipeline.prompts.builder import PromptBuilder
from pipeline.prompts.chat import parse_moment
from pipeline.prompts.splitting import SplitDocument, Splitter
from pipeline.prompts.tokenizing import stop_token_ids
from pipeline.pruning.base import PruningMethod
from pipeline.pruning.capabilities import check_memories, exit_maps_of, longest_sequence, uses_fp8
from pipeline.pruning.dense import Dense
from pipeline.pruning.registry import make_method, told
from pipeline.records import Record, ResponseFormat, RowError
from pipeline.settings.method_settings import AUTO
from pipeline.settings.model_settings import ModelSettings, WeightsSettings
from pipeline.settings.parse import parse_lookup
from pipeline.settings.run_settings import BatchConfig
from pipeline.setup.auto import GROUPS, Chosen, choose
from pipeline.setup.guard import Guard
from pipeline.setup.intake import (
    LATER,
    Intake,
    Item,
    encode_rows,
    item_prompts,
    make_prompts,
    make_splitter,
    open_rows,
)
from pipeline.setup.profile import check_profile, length_note, load_profile
from pipeline.setup.remedies import remedies_of
from pipeline.setup.validity import Validity
from pipeline.structured.binding import BoundForms
from pipeline.structured.grammars import check_format, json_schema_format
from pipeline.texts.versions import timestamp, versions

if TYPE_CHECKING:
    from pipeline.families.projection import LinearPrecision
    from pipeline.model.loading import Model, UnloadedModel

REASONING_TOKENS = 2048  # below which an answer may never come


@dataclass(frozen=True, kw_only=True)
class Setup(Chosen):
    """All that answering takes but weights: settings, model, method and prompts that fit each other."""

    model: Model
    prompts: PromptBuilder
    exit_maps: str | None = None  # the digest of those that the method names
    splitter: Splitter | None = None  # of over-long documents, under --on-overlong split
    response_format: ResponseFormat | None = None  # that all answers are to have
    validity: Validity | None = None  # where answers are held against a JSON schema

    @property
    def precision(self) -> LinearPrecision:
        """How the model's linear layers are computed."""
        from pipeline.families.projection import LinearPrecision

        return LinearPrecision(linears=self.config.linear_dtype, ffn=uses_fp8(self.method))

    @cached_property
    def remedies(self) -> Remedies:
        """What would make it need less memory of its device."""
        return remedies_of(self.config, self.method, self.model)


@dataclass(frozen=True, kw_only=True)
class Preparation(Setup):
    """A run whose settings fit its input too, of which no weights are loaded yet."""

    intake: Intake

    @property
    def source(self) -> Source:
        return self.intake.source

    @property
    def layout(self) -> RowLayout:
        """How rows of the output stand in it."""
        return self.intake.form.layout

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
        if self.profile is None or self.guard is not None:  # which tells it in the row
            return None
        return length_note(self.profile, prompt_tokens)

    def decides(self) -> dict[str, Any]:
        """The settings of which each can change an answer: a run may be resumed only under the same.

        Rows that are answered together may be answered by dense in place of a pruning method.

        Packs, device and attention backend are not among them: they change the last bits of sums, no more.
        What may stay on the device is, as a document's active blocks depend on it.
        """
        config, method, splitter, columns = self.config, self.method, self.splitter, self.intake.columns
        moment, asked = moment_of(self.prompts, splitter), self.source.columns.asked
        validity = None if self.validity is None else self.validity.decides()
        later = [name for name in LATER_NAMES if name not in self.source.columns.predates]
        return {
            "model": {
                "fingerprint": self.model.fingerprint,
                "dtype": str(self.model.dtype),
                "linear_dtype": config.linear_dtype,
                **({} if config.kv_dtype == AUTO else {"kv_dtype": config.kv_dtype}),
                "attention_dtype": "auto",  # which was a setting once, so that outputs of then go on
                "rope_scaling": self.model.rope_scaling,
                **({} if self.model.draft is None else {"draft": self.model.draft.fingerprint}),
            },
            "method": told(method),
            **({} if self.exit_maps is None else {"exit_maps": self.exit_maps}),
            **({} if columns is None else {"columns": columns}),
            **({UNASKED_KEY: True} if self.source.columns.asks_summary else {}),
            **({LATER: later} if later else {}),
            **({QUESTIONS_KEY: [each.name for each in asked]} if asked else {}),
            **({"validity": validity} if validity else {}),
            "template_sha256": self.prompts.template_hash,
            **({"template_args": config.template_args} if config.template_arg else {}),
            **({} if moment is None else {"date": moment}),
            "on_overlong": config.on_overlong,
            "split": None
            if splitter is None
            else {"overlap": splitter.overlap, "combine_sha256": splitter.combine.template_hash},
            "max_new_tokens": config.max_new_tokens,
            "sampling": config.sampling_that_decides,
            **({} if config.n == 1 else {"n": config.n}),
            "stop": list(config.stop),
            **({} if self.response_format is None else {"response_format": [*self.response_format]}),
            **({"logprobs": True} if config.logprobs else {}),
            "kv_memory": config.kv_memory,
            "guard": None if self.guard is None else self.guard.as_dict(),
            "group": None if method.name == "dense" else GROUPS[config.group],
        }

    def schema(self) -> pa.Schema:
        """The output's columns, and in its metadata how it was made."""
        model = self.model
        about = {
            "config": self.config.resolved(),
            "settings_that_decide": self.decides(),
            **({REQUESTS_KEY: True} if self.source.columns.requests else {}),
            "model": model.name,
            **({} if self.layout.is_usual else {LAYOUT_KEY: self.layout.as_dict()}),
            "device": model.device_name(),
            "attention": {"backend": model.attention_name, "refused": model.attention_refused},
            "versions": versions(),
            "started": timestamp(),
        }
        return output_schema(
            self.source.schema,
            {"marsinfer": json.dumps(about)},
            save_selection=self.config.save_selection,
            lacks=self.source.columns.lacks,
            added=self.source.columns.added,
        )


def _forms(intake: Intake) -> dict[str, ResponseFormat]:
    """The forms that answers are to have, those of all and of questions, by what gives them."""
    form, forms = intake.config.response_format(), {}
    if form is not None:
        forms[intake.config.form_flag or ""] = form
    for asked in intake.source.columns.asked:
        if asked.is_form and asked.schema is not None:
            place = f"--questions {intake.config.questions}: the schema of {asked.name!r}"
            forms[place] = json_schema_format(dict(asked.schema))
    return forms


def prepare(intake: Intake, model: str | Model, method: PruningMethod | None = None) -> Preparation:
    """All that a run needs but weights; `method` stands for the one that the settings name.

    Raises ConfigError or ModelError for what cannot work, before any row or weight is read.
    """
    from pipeline.model.variant import check_draft

    config = intake.config
    form, forms = config.response_format(), _forms(intake)
    for place, each in forms.items():
        check_format(each, place)
    if isinstance(model, str):
        model = open_for_run(config)
    else:
        _check_given(config, model)
    _check_commit(config, model, intake.begun)
    chosen = _chosen(intake, model, method)
    config, method = chosen.config, chosen.method
    config.check_divided(method.name)
    check_draft(model, [method])
    date = (intake.begun or {}).get("date")  # which prompts of a run that goes on print, if they print any
    now = None if date is None else parse_moment(date)
    prompts = make_prompts(
        config,
        model,
        config.max_new_tokens,
        now=now,
        parts_reasoning=REASONING_NAME not in intake.source.columns.predates,
        of_requests=intake.source.columns.requests,
        context=longest_sequence(method, model.shape),
    )
    stops = stop_token_ids(model.tokenizer, None)
    if forms and stops:  # without any, what ends answers is not known before the weights are read
        bound = BoundForms(model.tokenizer, model.shape.vocab, stops)
        for place, each in forms.items():
            bound.check(each, place, config.max_new_tokens)
    splitter = make_splitter(config, prompts, formed=form is not None)
    plan = method.plan(model.shape, (1,))  # settings that do not fit the model's depth
    exit_maps = _exit_maps(config, method, model)
    refused = {
        "--kv-memory": config.kv_memory is not None,
        "--kv-dtype fp8": config.kv_dtype == "fp8",
        "--linear-dtype mixed": config.linear_dtype == "mixed",
        "--group any": config.group == "any",
        "--n": config.n > 1,
        f"--lookup {config.lookup}": bool(parse_lookup(config.lookup)),
    }
    check_memories(method, refused)
    if config.kv_memory is not None and plan.rescoring is None:
        raise ConfigError(f"--kv-memory needs a method that can offload keys and values, not {method.name}")
    if config.kv_dtype != AUTO and config.kv_memory is not None:
        raise ConfigError(
            "--kv-dtype fp8 and --kv-memory exclude each other: offloaded blocks are in --dtype"
        )
    if config.linear_dtype != AUTO or config.kv_dtype != AUTO or uses_fp8(method):
        model.check_fp8()
    notes = [*intake.notes, *model.notes]
    if config.model == WeightsSettings.model:  # which nobody chose
        notes.append(
            f"{config.model} is a model for demonstration, and often wrong: --model names a larger one"
        )
    if prompts.is_to_reason and config.max_new_tokens < REASONING_TOKENS:
        other = f", or give {prompts.without_reasoning}" if prompts.without_reasoning else ""
        notes.append(
            f"the model reasons before it answers, and {config.max_new_tokens:,} new tokens are for both, "
            f"while reasoning often takes thousands: raise --max-new-tokens{other}"
        )
    return Preparation(
        config=config,
        intake=intake,
        model=model,
        method=method,
        prompts=prompts,
        exit_maps=exit_maps,
        splitter=splitter,
        response_format=form,
        validity=intake.form.validity,
        profile=chosen.profile,
        guard=chosen.guard,
        notes=(*notes, *chosen.notes),
    )


def _exit_maps(config: BatchConfig, method: PruningMethod, model: Model) -> str | None:
    """The digest of the exit maps that a method names. Raises ConfigError for those that cannot be used."""
    from pipeline.families.exit_maps import check_exit_maps

    if exit_maps_of(method, model.shape) is not None and config.tensor_parallel > 1:
        raise ConfigError(
            f"--tensor-parallel {config.tensor_parallel} and --set exit_maps exclude each other: leave one "
            "of them out"
        )
    return check_exit_maps(method, model.shape, model.fingerprint)


def _check_given(config: BatchConfig, model: Model) -> None:
    """Raise ConfigError for settings that a model has been loaded without."""
    from pipeline.model.loading import UnloadedModel

    if isinstance(model, UnloadedModel):  # as workers will have it, by these settings
        return
    for name in ("rope_scaling", "adapter", "draft_model", "tensor_parallel"):
        if getattr(config, name) not in (None, 1):
            raise ConfigError(f"{name} goes with a model's name: give it to load_model")


def _check_commit(config: BatchConfig, model: Model, begun: Any) -> None:
    """Raise ConfigError where a run goes on and its model's branch on the hub has moved since it began."""
    before = str(begun["model"]["fingerprint"]) if begun is not None else ""
    if model.commit is None or not before.startswith(COMMIT_PREFIX):
        return
    commit = before.removeprefix(COMMIT_PREFIX)
    if commit != model.commit:
        raise ConfigError(
            f"{config.output} was begun with commit {commit} of {model.name}, whose revision "
            f"{config.revision or 'main'} is {model.commit[:12]} now: --revision {commit} goes on with it, "
            "--overwrite starts over"
        )


def _chosen(intake: Intake, model: Model, method: PruningMethod | None) -> Chosen:
    """The run's method, and what guards it."""
    config = intake.config
    if method is None and config.method == AUTO:
        return choose(config, model, intake.begun)
    if intake.is_old and config.group == "auto":  # which then meant what any does
        config = replace(config, group="any")
    method = method or make_method(config.method, config.settings)
    if config.profile is None:
        return Chosen(config=config, method=method)
    profile, guard = load_profile(config.profile), None
    notes = check_profile(config.profile, profile, model)
    if config.kv_dtype != AUTO:
        notes.append(f"the profile was verified with keys and values in --dtype, not in {config.kv_dtype}")
    if config.guard != "off" and not isinstance(method, Dense):
        if profile.is_of(config, method):
            guard = Guard.of(profile)
        else:
            notes.append(
                "other settings stand above the profile's, which was not verified with them: no guard"
            )
    return Chosen(config=config, method=method, profile=profile, guard=guard, notes=tuple(notes))


def open_for_run(config: BatchConfig, **elsewhere: str) -> UnloadedModel:
    """The model of a run; `elsewhere` are the dtype and device that stand above the configuration's."""
    from pipeline.model.loading import open_model

    return open_model(ModelSettings.of(config, **elsewhere), config.tensor_parallel)


def moment_of(prompts: PromptBuilder, splitter: Splitter | None = None) -> str | None:
    """The date that the prompts of a run print, if any of them does: it stays, however long the run takes."""
    return prompts.moment or (None if splitter is None else splitter.combine.moment)


def rendered_prompts(config: BatchConfig, count: int) -> Iterator[dict[str, Any]]:
    """The first `count` prompts as the model will see them, and the errors of rows before and between."""
    run = prepare(open_rows(config), config.model)
    for item in run.encode(run.rows()):
        if isinstance(item, RowError):
            yield {"row": item.source.row, "id": item.source.id, "error": item.message}
            continue
        prompts = item_prompts(item)
        for number, prompt in enumerate(prompts, start=1):
            ids = prompt.input_ids.tolist()
            yield {
                "row": item.source.row,
                "id": item.source.id,
                **({"part": number, "parts": len(prompts)} if isinstance(item, SplitDocument) else {}),
                "prompt_tokens": prompt.prompt_tokens,
                "document_tokens": prompt.document_tokens,
                "truncated_tokens": prompt.truncated_tokens,
                "prompt": run.model.tokenizer.decode(ids, clean_up_tokenization_spaces=False),
            }
            count -= 1
            if not count:
                return
