"""The language model in a checkpoint of a model that sees images too, which is all that is used of it."""

from __future__ import annotations

import copy
from collections.abc import Collection

from transformers import PreTrainedConfig

SEEING = ("gemma3", "mistral3")  # by `model_type`
STORED_UNDER = "language_model."  # what the names of the language model's tensors begin with


def text_part(config: PreTrainedConfig) -> PreTrainedConfig:
    """The configuration of the language model; that itself of a model that sees nothing."""
    if config.model_type not in SEEING:
        return config
    text = copy.deepcopy(config.get_text_config())
    text.stored_under = STORED_UNDER
    # what the whole says of its files and of its head goes for the part
    text._commit_hash = getattr(config, "_commit_hash", None)
    text.tie_word_embeddings = config.tie_word_embeddings
    if getattr(config, "quantization_config", None) is not None:
        text.quantization_config = config.quantization_config
    return text


def untie_own_head(config: PreTrainedConfig, names: Collection[str]) -> None:
    """Let a head that is stored be one of its own, whatever the whole's configuration leaves unsaid."""
    if f"{stored_under(config)}lm_head.weight" in names:
        config.tie_word_embeddings = False


def stored_under(config: PreTrainedConfig) -> str:
    """What the names of a checkpoint's tensors begin with, before those of the model."""
    return getattr(config, "stored_under", "")
