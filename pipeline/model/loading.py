"""From a model's name to a model ready to prefill: on which device, in which dtype, by which attention."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from threading import Lock
from typing import Any

import huggingface_hub
import torch
import transformers
from transformers import PreTrainedConfig, PreTrainedModel

from pipeline.checkpoints.building import as_model_error, bytes_needed, with_weights
from pipeline.checkpoints.device_memory import NO_REMEDIES, Memory, Remedies, fits
from pipeline.checkpoints.drafts import TokenReader, check_draft_reads
from pipeline.checkpoints.files import AdaptedModel, ModelFiles, ModelSource, locate
from pipeline.errors import ConfigError
from pipeline.families.configuration import check_config, check_fp8, shape_of, with_rope_scaling
from pipeline.families.decoder import Decoder
from pipeline.families.projection import IN_FULL, LinearPrecision
from pipeline.families.sharding import can_be_divided, check_devices, check_divides, own_shape, sizes_of
from pipeline.kernels.attention import AttentionBackend, choose_attention
from pipeline.kernels.devices import free_memory, pick_device, pick_dtype, use_device
from pipeline.pruning.shape import ModelShape
from pipeline.ranks.collectives import Ranks
from pipeline.ranks.leading import Everywhere, Lead, on_every_rank
from pipeline.ranks.shares import Share
from pipeline.settings.keywords import StrPath, called_with
from pipeline.settings.model_settings import ModelSettings, WeightsSettings


class _OnDevice:
    """What a model, loaded or not, says of itself and its device."""

    shape: ModelShape
    own: ModelShape  # of the part that this process has of it, where several have one each
    device: torch.device
    dtype: torch.dtype

    def device_name(self) -> str:
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "CPU"

    def check_fp8(self) -> None:
        """Raise ConfigError, with the reason, where linear layers cannot be computed in fp8."""
        check_fp8(self.device, self.dtype, self.own)  # whose widths may not be those of the whole


@dataclass(kw_only=True)
class LoadedModel(_OnDevice):
    """A model on its device, with what produced it; make one with `load_model`.

    `shape` has its dimensions, of which `context` is the longest sequence in tokens, prompt and answer
    together; `device` and `dtype` are torch's, `attention` is the backend that its prefills use.
    """

    decoder: Decoder
    tokenizer: Any
    attention: AttentionBackend
    generation_config: Any
    name: str
    fingerprint: str  # as its source tells it: of files, of a revision on the hub, or of a random draw
    draft: LoadedModel | None = None  # that reads prompts first, for methods that want it
    commit: str | None = None  # on the hub, of its files; None where they are from elsewhere
    rope_scaling: str | None = None  # as given to `load_model`
    attention_refused: dict[str, str] = field(default_factory=dict)  # faster backend: why not
    notes: tuple[str, ...] = ()  # what a user should know of its files
    _in_use: Lock = field(default_factory=Lock, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        self.shape, self.device, self.dtype = self.decoder.shape, self.decoder.device, self.decoder.dtype
        self.own = self.decoder.own

    @property
    def decoders(self) -> list[Decoder]:
        """Its own, and that of its draft."""
        return [self.decoder] if self.draft is None else [self.decoder, self.draft.decoder]

    @property
    def attention_name(self) -> str:
        return self.attention.name

    def memory(self, precision: LinearPrecision = IN_FULL) -> None:
        """None: there is nothing to be loaded any more."""

    def load(self, precision: LinearPrecision = IN_FULL, remedies: Remedies = NO_REMEDIES) -> LoadedModel:
        """Itself: who has a model, loaded or not, need not ask which."""
        return self

    @property
    def lead(self) -> Lead | None:
        """This process as the first of several that have a part of the model each, until `close`."""
        return self.decoder.lead

    def close(self) -> None:
        """End the other processes that have parts of the model; without them it cannot be used any more."""
        if self.lead is not None:
            self.lead.close()

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Keep the model to one run at a time, whose precision and graphs it has meanwhile.

        Raises ConfigError where another run has not ended, be it in this thread.
        """
        if not self._in_use.acquire(blocking=False):
            raise ConfigError(
                f"the model {self.name} is answering other rows: end or close those first, or load it twice"
            )
        try:
            yield
        finally:
            self._in_use.release()


@dataclass(frozen=True, kw_only=True)
class UnloadedModel(_OnDevice):
    """A model without its weights, that says of itself what the loaded one will; `open_model` makes it."""

    settings: ModelSettings  # as given to `open_model`
    ranks: int = 1  # processes among which it is divided
    source: ModelSource
    config: PreTrainedConfig  # as its source has it, without `rope_scaling`
    tokenizer: Any
    shape: ModelShape
    device: torch.device
    dtype: torch.dtype
    wanted_attention: str
    rope_scaling: str | None = None
    notes: tuple[str, ...] = ()  # what a user should know of its files
    draft: UnloadedModel | None = None

    @property
    def name(self) -> str:
        return self.source.name

    def in_use(self) -> AbstractContextManager[None]:
        """Each run loads weights of its own: runs do not disturb each other."""
        return nullcontext()

    @property
    def attention(self) -> AttentionBackend:
        return self._attention[0]

    @property
    def attention_refused(self) -> dict[str, str]:
        return self._attention[1]

    @property
    def commit(self) -> str | None:
        """On the hub, of its files; None where they are from elsewhere."""
        source = self.source.base if isinstance(self.source, AdaptedModel) else self.source
        hub = source.hub if isinstance(source, ModelFiles) else None
        return None if hub is None else hub.commit

    @cached_property
    def own(self) -> ModelShape:  # type: ignore[override]
        return own_shape(self.shape, self._share)

    @property
    def _share(self) -> Share | None:
        """Of the first rank, which is no smaller than another's."""
        return None if self.ranks == 1 else Share(rank=0, count=self.ranks)

    @cached_property
    def fingerprint(self) -> str:
        return self.source.fingerprint(self.config)

    @cached_property
    def _attention(self) -> tuple[AttentionBackend, dict[str, str]]:
        with _quiet():
            return attention_for(self.wanted_attention, self.device, self.dtype, self.own)

    @property
    def attention_name(self) -> str:
        return self.attention.name

    def memory(self, precision: LinearPrecision = IN_FULL) -> Memory:
        """What its weights need, by arithmetic, beside what is free now."""
        free = free_memory(self.device)
        held, most = self._bytes_needed(precision, self._share)
        own = Memory(held=held, most=most, free=free, where=self.device_name(), ranks=self.ranks)
        return own if self.draft is None else own.with_draft(self.draft.memory(precision))

    def ranks_needed(
        self, precision: LinearPrecision, beside: Callable[[ModelShape], int] = lambda own: 0
    ) -> int | None:
        """Among how many GPUs like this device the model must be divided, at least, to fit with something.

        `beside` says how many bytes each needs beside its weights, of the shape of its part; None: however
        many there are, it does not fit.
        """
        if self.device.type != "cuda" or not can_be_divided(self.config):
            return None
        free = free_memory(self.device)
        for count in sizes_of(self.shape, fp8=precision.uses_fp8):
            share = None if count == 1 else Share(rank=0, count=count)
            held, most = self._bytes_needed(precision, share)
            if max(most, held + beside(own_shape(self.shape, share))) <= free:
                return count
        return None

    def _bytes_needed(self, precision: LinearPrecision, share: Share | None) -> tuple[int, int]:
        return bytes_needed(_scaled(self.config, self.rope_scaling), self.dtype, precision, share)

    def load(self, precision: LinearPrecision = IN_FULL, remedies: Remedies = NO_REMEDIES) -> LoadedModel:
        """With linear layers as `precision` wants them.

        Raises ModelError for weights that cannot be read, or do not fit, which names `remedies`.
        """
        if self.ranks == 1:
            return self._loaded(precision, None, remedies)
        ranks = Ranks(rank=0, count=self.ranks, device=self.device)
        lead = Lead(ranks)
        try:
            pinned = {} if self.commit is None else {"revision": self.commit}
            settings = ModelSettings.of(self.settings, draft_model=None, **pinned)
            devices = [f"cuda:{rank}" if self.device.type == "cuda" else "cpu" for rank in range(self.ranks)]
            lead.have_loaded(load_share, devices[1:], settings, self.dtype, precision)
            loaded = self._loaded(precision, ranks, remedies)
            lead.begin(_everywhere(loaded))
        except BaseException:
            lead.close(0.0)
            raise
        return loaded

    def _loaded(
        self, precision: LinearPrecision, ranks: Ranks | None, remedies: Remedies = NO_REMEDIES
    ) -> LoadedModel:
        """All of the model, or one rank's share."""
        use_device(self.device)
        if precision.uses_fp8:
            self.check_fp8()
        enough = partial(self.ranks_needed, precision) if remedies.more_devices else lambda: None
        self.memory(precision).check(self.name, remedies.for_weights(self.dtype.itemsize), enough)
        draft = None if self.draft is None else self.draft.load(precision)
        attention = self.attention  # before the weights: a backend that is not there should fail at once
        with _quiet():
            config = _scaled(self.config, self.rope_scaling)
            with fits(self.name, self.device):
                model = self._model(config, precision, None if ranks is None else ranks.share)
                decoder = Decoder(model, ranks)
                decoder.use_linears(precision.linears, ffn=precision.ffn)
            own = self.source.generation_config()
        return LoadedModel(
            decoder=decoder,
            tokenizer=self.tokenizer,
            attention=attention,
            generation_config=own or model.generation_config,
            name=self.name,
            fingerprint=self.fingerprint,
            draft=draft,
            commit=self.commit,
            rope_scaling=self.rope_scaling,
            attention_refused=self.attention_refused,
            notes=self.notes,
        )

    def _model(
        self, config: PreTrainedConfig, precision: LinearPrecision, share: Share | None
    ) -> PreTrainedModel:
        weights = self.source.weights(config, self.device)
        with as_model_error(self.name):
            return with_weights(
                config, weights, device=self.device, dtype=self.dtype, precision=precision, share=share
            )


def _everywhere(model: LoadedModel) -> Everywhere:
    settings = (0, "linears"), (0, "piece_tokens"), (1, "sparse_from")
    return Everywhere((model.decoder, model.attention), settings)


def load_share(
    ranks: Ranks, settings: ModelSettings, dtype: torch.dtype, precision: LinearPrecision
) -> Everywhere:
    """What a process that follows another one has of a model of these settings."""
    of_rank = replace(settings, device=str(ranks.device), dtype=str(dtype).removeprefix("torch."))
    opened = open_model(of_rank)
    return _everywhere(replace(opened, ranks=ranks.count)._loaded(precision, ranks))


@on_every_rank
def use_linears(decoder: Decoder, linears: str, *, ffn: bool, keep: bool) -> None:
    """See `Decoder.use_linears`."""
    decoder.use_linears(linears, ffn=ffn, keep=keep)


Model = UnloadedModel | LoadedModel


def attention_for(
    wanted: str, device: torch.device, dtype: torch.dtype, shape: ModelShape
) -> tuple[AttentionBackend, dict[str, str]]:
    """`choose_attention` for a model of this shape."""
    return choose_attention(
        wanted,
        device=device,
        dtype=dtype,
        heads=shape.heads,
        kv_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        slides=shape.slides,
        sinks=shape.has_sinks,
    )


def load_model(
    model: StrPath = WeightsSettings.model, *, sparse_from: int | None = None, **options: Any
) -> LoadedModel:
    """Load `model`: a hub id, a local folder, a `.gguf` file, `smollm2-135m`, or `random:SHAPE`.

    `options` are the other fields of `ModelSettings`, which are flags of the commands: `dtype` is auto
    (bfloat16 on a GPU, float32 on the CPU), bfloat16, float16 or float32; `device` auto, cpu, cuda or cuda:N;
    `revision` a commit, tag or branch on the hub. `attention` is a backend's name, or auto for the fastest
    that passes a trial on the device; `trust_remote_code` lets a folder run code that it brings.
    `rope_scaling` and `draft_model` are as the flags of these names. `sparse_from` has documents of so many
    tokens attended to in blocks wherever a method asks for it, on a device without kernels by plain torch,
    slowly.

    Raises ModelError for a model that is unknown, unsupported, unsafe (pickled weights, code of its own) or
    too large for the device, ConfigError for an option or a device, dtype or backend that is not there.
    """
    options = called_with("load_model", ModelSettings, {"model": model, **options}, note=lambda text: None)
    loaded = open_model(ModelSettings(**options)).load()
    loaded.attention.sparse_from = sparse_from
    return loaded


def open_model(settings: ModelSettings, tensor_parallel: int = 1) -> UnloadedModel:
    """All of a model but its weights; as `load_model`, but its attention is chosen when it is asked for.

    With `tensor_parallel` above 1 the model that it loads is divided among so many processes and devices, of
    which this process is the first. Raises ConfigError where that cannot be.
    """
    target = pick_device(settings.device)
    if tensor_parallel > 1:
        check_devices(settings.device, target, tensor_parallel)
    torch_dtype = pick_dtype(settings.dtype, target)
    with _quiet():
        source = locate(settings)
        config = source.config()
        check_config(config)
        notes = source.check(config)
        if tensor_parallel > 1:
            check_divides(config, tensor_parallel)
        opened = UnloadedModel(
            settings=settings,
            ranks=tensor_parallel,
            source=source,
            config=config,
            tokenizer=source.tokenizer(),
            shape=shape_of(_scaled(config, settings.rope_scaling)),
            device=target,
            dtype=torch_dtype,
            wanted_attention=settings.attention,
            rope_scaling=settings.rope_scaling,
            notes=tuple(notes),
        )
    return opened if settings.draft_model is None else replace(opened, draft=_draft_of(opened))


def _draft_of(model: UnloadedModel) -> UnloadedModel:
    """The draft model that its settings name. Raises ConfigError for one that cannot read its prompts."""
    own = {"model": model.settings.draft_model, "draft_model": None, "adapter": None, "revision": None}
    draft = open_model(ModelSettings.of(model.settings, **own))
    readers = (TokenReader(each.name, each.tokenizer.get_vocab(), each.shape) for each in (model, draft))
    check_draft_reads(*readers)
    return draft


def _scaled(config: PreTrainedConfig, rope_scaling: str | None) -> PreTrainedConfig:
    return config if rope_scaling is None else with_rope_scaling(config, rope_scaling)


@contextmanager
def _quiet() -> Iterator[None]:
    """The libraries' progress bars, notices and retries would break our own progress line."""
    bars = transformers.utils.logging.is_progress_bar_enabled()
    loggers = (transformers.utils.logging, huggingface_hub.logging)
    levels = [logger.get_verbosity() for logger in loggers]
    transformers.utils.logging.disable_progress_bar()
    for logger in loggers:
        logger.set_verbosity(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.set_verbosity(level)
        if bars:
            transformers.utils.logging.enable_progress_bar()
