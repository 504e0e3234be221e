"""Models of published dimensions, whose weights are random: for speed, which does not depend on their values.

Their answers are noise. They need no file: the weights are drawn where they are used, the same in every
process, and a token is a byte of the text, so that a text's length is its number of tokens.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, GenerationConfig, PreTrainedConfig, PreTrainedTokenizerFast

from pipeline.checkpoints.building import RandomDraw
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
DIMENSIONS = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "vocab_size", "max_position_embeddings"),
)
# family and published dimensions; those of `tiny` are ours, as deep as the large ones: the methods' settings
# by depth fit
PUBLISHED = {
    "qwen2-7b": ("qwen2", 3584, 18944, 28, 28, 4, 152064, 131072),
    "llama-3.1-8b": ("llama", 4096, 14336, 32, 32, 8, 128256, 131072),
    "qwen2.5-1.5b": ("qwen2", 1536, 8960, 28, 12, 2, 151936, 131072),
    "qwen3-8b": ("qwen3", 4096, 12288, 36, 32, 8, 151936, 40960),
    "qwen1.5-32b": ("qwen2", 5120, 27392, 64, 40, 8, 152064, 32768),
    "llama-3.1-70b": ("llama", 8192, 28672, 80, 64, 8, 128256, 131072),
    "mistral-7b": ("mistral", 4096, 14336, 32, 32, 8, 32000, 32768),  # version 0.1, which has a window
    "gemma3-12b": ("gemma3_text", 3840, 15360, 48, 16, 8, 262208, 131072),
    "qwen3-30b-a3b": ("qwen3_moe", 2048, 6144, 48, 32, 4, 151936, 40960),
    "gpt-oss-20b": ("gpt_oss", 2880, 2880, 24, 64, 8, 201088, 131072),
    "tiny": ("qwen2", 64, 128, 28, 4, 2, 512, 131072),
}
# what else they are published with, where it is not their family's default
BESIDE: dict[str, dict[str, Any]] = {
    "qwen3-8b": {"head_dim": 128},
    "mistral-7b": {"sliding_window": 4096},
    "gemma3-12b": {"head_dim": 256, "query_pre_attn_scalar": 256, "sliding_window": 1024},
    "qwen3-30b-a3b": {
        "head_dim": 128,
        "moe_intermediate_size": 768,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
    },
    "gpt-oss-20b": {
        "head_dim": 64,
        "sliding_window": 128,
        "num_local_experts": 32,
        "num_experts_per_tok": 4,
        "attention_bias": True,
    },
}
# family, and settings by the configuration names of transformers
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    name: (family, dict(zip(DIMENSIONS, sizes, strict=True)) | BESIDE.get(name, {}))
    for name, (family, *sizes) in PUBLISHED.items()
}


@dataclass(frozen=True, kw_only=True)
class RandomWeights:
    """The source of a model of one of the `SHAPES`."""

    name: str  # as the user wrote it, PREFIX included

    def __post_init__(self) -> None:
        """Raises ModelError where no shape has this name."""
        if self.name.removeprefix(PREFIX) not in SHAPES:
            raise ModelError(f"model {self.name!r}: there is no such shape; shapes: {', '.join(SHAPES)}")

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

    def weights(self, config: PreTrainedConfig, device: torch.device) -> RandomDraw:
        return RandomDraw(config, device, SEED)

    def generation_config(self) -> GenerationConfig | None:
        return None

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
