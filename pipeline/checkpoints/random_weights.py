"""Models of published dimensions, whose weights are random: for speed, which does not depend on their values.

Their answers are noise. They need no file: the weights are drawn where they are used, the same in every
process, and a token is a byte of the text, so that a text's length is its number of tokens.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any, Self

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

from pipeline.checkpoints.building import with_random_weights
from pipeline.errors import ModelError

PREFIX = "random:"  # of such a model's name, before that of its shape
SEED = 0
TURN_BEGINS, TURN_ENDS = "<|im_start|>", "<|im_end|>"  # ChatML's marks
CHAT_TEMPLATE = (
    "{% for m in messages %}"
    + TURN_BEGINS
    + "{{ m['role'] }}\n{{ m['content'] }}"
    + TURN_ENDS
    + "\n{% endfor %}"
    "{% if add_generation_prompt %}" + TURN_BEGINS + "assistant\n{% endif %}"
)
# family and published dimensions, by the configuration names of transformers; those of `tiny` are ours
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
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
    "tiny": (
        "qwen2",
        {
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 28,  # as deep as the large ones: the methods' settings by depth fit
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": 512,
            "max_position_embeddings": 131072,
        },
    ),
}


@dataclass(frozen=True, kw_only=True)
class RandomWeights:
    """The source of a model of one of the `SHAPES`."""

    name: str  # as the user wrote it, PREFIX included

    @classmethod
    def named(cls, name: str) -> Self:
        """Raises ModelError where no shape has this name."""
        if name.removeprefix(PREFIX) not in SHAPES:
            raise ModelError(f"model {name!r}: there is no such shape; shapes: {', '.join(SHAPES)}")
        return cls(name=name)

    def config(self) -> PreTrainedConfig:
        family, settings = self._shape
        # the answer's end is the tokenizer's: the families' own defaults would be bytes of it
        return AutoConfig.for_model(family, **settings, bos_token_id=None, eos_token_id=None)

    def tokenizer(self) -> PreTrainedTokenizerFast:
        return byte_tokenizer()

    def check(self, config: PreTrainedConfig) -> list[str]:
        return []

    def fingerprint(self, config: PreTrainedConfig) -> str:
        """Of what the weights are drawn from; drawn on the CPU and on a GPU they are not the same."""
        return "random:" + hashlib.sha256(json.dumps([*self._shape, SEED]).encode()).hexdigest()

    def weights(self, config: PreTrainedConfig, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
        return with_random_weights(config, device=device, dtype=dtype, seed=SEED)

    @property
    def _shape(self) -> tuple[str, dict[str, Any]]:
        return SHAPES[self.name.removeprefix(PREFIX)]


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, ChatML's two marks, and its chat template; ids beyond them decode to nothing."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={letter: n for n, letter in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=TURN_ENDS)
    tokenizer.add_special_tokens({"additional_special_tokens": [TURN_BEGINS]})
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer
