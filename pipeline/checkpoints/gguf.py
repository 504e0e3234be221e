"""Models in GGUF files, whole or in parts: their configuration, tokenizer and weights.

Every part's header is read once. The configuration and the weights are made here: transformers, given a GGUF
file, drops its RoPE scaling, and fills with random numbers what it lacks.
"""

from __future__ import annotations

import hashlib
import math
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, GenerationConfig, PreTrainedConfig

from pipeline.checkpoints.building import as_model_error
from pipeline.checkpoints.gguf_families import GGUF_FAMILIES, GgufFamily
from pipeline.checkpoints.gguf_header import GgufError, GgufHeader, read_header
from pipeline.checkpoints.gguf_tensors import Found, GgufWeights, check_tensors, found_tensors, values
from pipeline.checkpoints.gguf_tokenizers import gguf_tokenizer
from pipeline.errors import ModelError
from pipeline.families.configuration import check_config

PART = re.compile(r"(?P<stem>.+)-(?P<part>\d{5})-of-(?P<parts>\d{5})\.gguf")
# by what transformers calls them
SIZES = {
    "max_position_embeddings": "context_length",
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
}
ENDS = ("eos", "eot", "eom")
TOKENS = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}
# settings that are read beside those, in gguf_families.py and gguf_rope.py too
READ = {
    *("attention.head_count_kv", "attention.key_length", "attention.value_length", "attention.scale"),
    *("attention.sliding_window", "attention.sliding_window_pattern"),
    *("rope.dimension_count", "rope.freq_base", "rope.scale_linear"),
}
# those that these architectures do not take, or that only describe
HARMLESS = {
    *("vocab_size", "tensor_data_layout", "attention.layer_norm_epsilon", "expert_used_count"),
    *("feed_forward_length", "expert_feed_forward_length", "expert_weights_norm"),
}
PREFIXES = ("rope.scaling.", "vision.", "mm.")  # of the first gguf_rope.py decides, of the others tensors do
# values that change nothing, where 0 is not the only one
NEUTRAL = {
    "expert_weights_scale": (0, 1),
    "expert_gating_func": (
        0,
        1,
        3,
    ),  # softmax of all, or of those that are chosen, which then sums to one too
    "expert_group_count": (0, 1),
    "expert_group_used_count": (0, 1),
    "interleave_moe_layer_step": (0, 1),
    "logit_scale": (0, 1),
    "residual_scale": (0, 1),
    "embedding_scale": (0, 1),
    "attention.causal": (True,),
}


@dataclass(frozen=True, kw_only=True)
class GgufFiles:
    """A located GGUF model. What cannot be read raises ModelError, in one line that names the model."""

    name: str  # as the user wrote it
    path: Path  # the file, or any of its parts
    ignore_unused_tensors: str | None = None  # a pattern of their names

    def config(self) -> PreTrainedConfig:
        with as_model_error(self.name):
            if self._family not in GGUF_FAMILIES:
                raise ModelError(
                    f"model family {self._family!r} is not supported in GGUF files; families:"
                    f" {', '.join(GGUF_FAMILIES)}"
                )
            config = AutoConfig.for_model(GGUF_FAMILIES[self._family].model_type, **self._settings())
            check_config(config)
            return config

    def check(self, config: PreTrainedConfig) -> list[str]:
        """Raise ModelError for tensors that are not those of this configuration, by their headers alone."""
        with as_model_error(self.name):
            return check_tensors(self.path.name, config, self._tensors, self.ignore_unused_tensors)

    def tokenizer(self) -> Any:
        with as_model_error(self.name):
            return gguf_tokenizer(self._parts[0], self._family)

    def fingerprint(self, config: PreTrainedConfig) -> str:
        """The hash of the file's bytes, or of all parts' in their order."""
        digest = hashlib.sha256()
        with as_model_error(self.name):
            for part in self._parts:
                with part.path.open("rb") as file:
                    # hashlib.file_digest updates what it is told to make
                    hashlib.file_digest(file, lambda: digest)
        return "sha256:" + digest.hexdigest()

    def weights(self, config: PreTrainedConfig, device: torch.device) -> GgufWeights:
        return GgufWeights(config, self._tensors)

    def generation_config(self) -> GenerationConfig | None:
        """With all tokens that the file names as ends: of a text, of a turn and of a message."""
        named = (self._parts[0].settings.get(f"tokenizer.ggml.{end}_token_id") for end in ENDS)
        return GenerationConfig(eos_token_id=[token for token in dict.fromkeys(named) if token is not None])

    @cached_property
    def _parts(self) -> tuple[GgufHeader, ...]:
        parts = tuple(read_header(path) for path in _part_paths(self.path))
        _check_parts(parts)
        return parts

    @cached_property
    def _tensors(self) -> Found:
        return found_tensors(self._parts)

    @property
    def _family(self) -> str:
        settings = self._parts[0].settings
        kind = settings.get("general.type", "model")
        if kind != "model":
            raise GgufError(f"{self.path.name} holds no model, but what its header calls {kind!r}")
        if "general.architecture" not in settings:
            raise GgufError(f"{self.path.name} does not say its general.architecture, so it holds no model")
        return str(settings["general.architecture"])

    def _settings(self) -> dict[str, Any]:
        """The header's settings by the names of transformers."""
        name, settings, file = self._family, self._parts[0].settings, self.path.name
        family = GGUF_FAMILIES[name]
        own = {
            key.removeprefix(f"{name}."): value
            for key, value in settings.items()
            if key.startswith(f"{name}.")
        }
        for key, value in own.items():
            if not _is_known(key, value, family):
                raise GgufError(f"{file} has {name}.{key} {value}, which is not supported")
        wanted = {**SIZES, **family.sizes}
        sizes = {ours: _single(file, settings, f"{name}.{theirs}") for ours, theirs in wanted.items()}
        heads = sizes["num_attention_heads"]
        kv_heads = f"{name}.attention.head_count_kv"
        sizes["num_key_value_heads"] = _single(file, settings, kv_heads) if kv_heads in settings else heads
        head_dim = _head_dim(file, own, sizes["hidden_size"] // heads, rotates_part=family.rotates_part)
        scale = own.get("attention.scale") or head_dim**-0.5
        if not math.isclose(scale, head_dim**-0.5, rel_tol=1e-4):
            raise GgufError(f"{file} has {name}.attention.scale {scale:g}, which is not supported")
        tokens = {ours: settings.get(f"tokenizer.ggml.{theirs}_token_id") for ours, theirs in TOKENS.items()}
        return {
            **sizes,
            **tokens,
            **_window(own, name, family.period, sizes["num_hidden_layers"]),
            **family.unsaid,
            **family.more(own, head_dim),
            "head_dim": head_dim,
            "vocab_size": self._vocabulary(),
            # a converter leaves the output head out where it is the embedding
            "tie_word_embeddings": "output.weight" not in self._tensors,
            "attention_bias": "blk.0.attn_q.bias" in self._tensors,
            "mlp_bias": "blk.0.ffn_gate.bias" in self._tensors,
            "rope_parameters": self._rope(own, head_dim),
        }

    def _vocabulary(self) -> int:
        """Rows of the embedding, of which converters may write more than there are tokens."""
        if "token_embd.weight" not in self._tensors:
            raise GgufError(f"{self.path.name} lacks token_embd.weight, the embedding of its tokens")
        rows = self._tensors["token_embd.weight"].shape[0]
        tokens = self._parts[0].settings.get("tokenizer.ggml.tokens", 0)
        if tokens > rows:
            raise GgufError(f"{self.path.name} is damaged: it has {tokens:,} tokens, and embeds {rows:,}")
        return rows

    def _rope(self, settings: dict[str, Any], head_dim: int) -> dict[str, Any]:
        family = GGUF_FAMILIES[self._family]
        tensors = {name: values(self._tensors[name]) for name in family.rope_tensors if name in self._tensors}
        try:
            return family.ropes(settings, head_dim, tensors)
        except GgufError as error:
            raise GgufError(f"{self.path.name} {error}") from error


def _is_known(key: str, value: Any, family: GgufFamily) -> bool:
    """Whether a setting is read, or has a value that changes nothing."""
    if key in {*READ, *HARMLESS, *SIZES.values(), *family.sizes.values(), *family.reads}:
        return True
    values = value if isinstance(value, list) else [value]
    return key.startswith(PREFIXES) or all(each in NEUTRAL.get(key, (0,)) for each in values)


def _part_paths(path: Path) -> list[Path]:
    """The file, or all parts of which its name says it is one; whichever is named stands for the whole."""
    named = PART.fullmatch(path.name)
    if named is None:
        return [path]
    count = int(named["parts"])
    paths = [path.with_name(f"{named['stem']}-{n:05d}-of-{count:05d}.gguf") for n in range(1, count + 1)]
    missing = [part.name for part in paths if not part.is_file()]
    if missing:
        raise GgufError(
            f"{path.name} is one of {count} parts, and these are not beside it: {', '.join(missing)};"
            " download them too"
        )
    return paths


def _check_parts(parts: tuple[GgufHeader, ...]) -> None:
    """Each part's header must agree with what the files' names say, and together they must be complete."""
    for place, part in enumerate(parts):
        number, count = part.settings.get("split.no", place), part.settings.get("split.count", len(parts))
        if len(parts) == 1 and count > 1:
            raise GgufError(
                f"{part.path.name} is part {number + 1} of {count} under another name; name all parts"
                f" NAME-00001-of-{count:05d}.gguf and so on, or join them with llama-gguf-split --merge"
            )
        if (number, count) != (place, len(parts)):
            raise GgufError(
                f"{part.path.name} is part {number + 1} of {count} by its header; give the parts their"
                " own names again, or download them again"
            )
    held = sum(len(part.tensors) for part in parts)
    promised = parts[0].settings.get("split.tensors.count", held)
    if held != promised:
        raise GgufError(
            f"{parts[0].path.name} promises {promised} tensors, and the parts have {held}; download the"
            " parts again"
        )


def _single(file: str, settings: dict[str, Any], key: str) -> Any:
    """A setting that must be there, and be one number for all layers."""
    if key not in settings:
        raise GgufError(f"{file} lacks the setting {key}; it is damaged, or no model of this family")
    value = settings[key]
    if isinstance(value, list):
        if len(set(value)) != 1:
            raise GgufError(f"{file} has another {key} in each layer, which is not supported")
        value = value[0]
    return value


def _head_dim(file: str, settings: dict[str, Any], usual: int, *, rotates_part: bool) -> int:
    rotated = settings.get("rope.dimension_count")
    size = settings.get("attention.key_length", usual if rotates_part else rotated or usual)
    if settings.get("attention.value_length", size) != size:
        raise GgufError(f"{file} has keys and values of different sizes, which is not supported")
    if rotated not in (None, size) and not rotates_part:
        raise GgufError(f"{file} rotates {rotated} of {size} dimensions of a head, which is not supported")
    return int(size)


def _window(settings: dict[str, Any], family: str, period: int | None, layers: int) -> dict[str, Any]:
    """A sliding attention window, of all layers or of those that the file says or `period` leaves.

    Of Llama, whose layers have none, it caps the context.
    """
    window = settings.get("attention.sliding_window") or 0
    if period is not None:
        pattern = settings.get("attention.sliding_window_pattern", period)
        slides = (
            pattern
            if isinstance(pattern, list)
            else [not pattern or (n + 1) % pattern for n in range(layers)]
        )
        return {"layer_types": ["sliding_attention" if each else "full_attention" for each in slides]}
    if not window:
        return {"sliding_window": None}
    if family == "llama":
        return {"max_position_embeddings": min(settings["context_length"], window)}
    kinds = {"use_sliding_window": True, "max_window_layers": 0} if family.startswith("qwen") else {}
    return {"sliding_window": window, **kinds}
