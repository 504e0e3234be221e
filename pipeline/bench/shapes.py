"""Models of published dimensions, whose weights are random."""

from __future__ import annotations

from typing import Any

from pipeline.errors import ConfigError
from pipeline.model.adapters import DecoderAdapter, random_model
from pipeline.model.loading import LoadedModel, attention_for, pick_device, pick_dtype, use_device

# the published dimensions, by the configuration names of transformers
RANDOM_WEIGHTS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2-7b": (
        "qwen2",
        {
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "vocab_size": 152064,
            "max_position_embeddings": 131072,
        },
    ),
    "llama-3.1-8b": (
        "llama",
        {
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "vocab_size": 128256,
            "max_position_embeddings": 131072,
        },
    ),
    "qwen2.5-1.5b": (
        "qwen2",
        {
            "hidden_size": 1536,
            "intermediate_size": 8960,
            "num_hidden_layers": 28,
            "num_attention_heads": 12,
            "num_key_value_heads": 2,
            "vocab_size": 151936,
            "max_position_embeddings": 131072,
        },
    ),
}


def random_loaded_model(name: str, *, dtype: str, device: str, attention: str) -> LoadedModel:
    """A model of a published shape with random weights: for speed, which does not depend on their values."""
    if name not in RANDOM_WEIGHTS:
        raise ConfigError(f"--random-weights {name!r}: choose from {', '.join(RANDOM_WEIGHTS)}")
    family, settings = RANDOM_WEIGHTS[name]
    target = use_device(pick_device(device))
    weights = random_model(family, settings, device=target, dtype=pick_dtype(dtype, target))
    adapter = DecoderAdapter(weights)
    backend, refused = attention_for(attention, target, adapter.dtype, adapter.shape)
    return LoadedModel(
        adapter=adapter,
        tokenizer=None,
        attention=backend,
        generation_config=None,
        name=f"{name} (random weights)",
        fingerprint="random",
        attention_refused=refused,
    )
