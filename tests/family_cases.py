"""Small models of every family, and what stock transformers makes of them."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from conftest import FAMILY_SETTINGS, SIZES, document, sharpened

from pipeline.checkpoints.building import random_model
from pipeline.families.decoder import Decoder

CPU = torch.device("cpu")
WINDOW = 24
SHORT = 50  # tokens of a document and its answer that keep the short frequencies of LongRoPE
ALTERNATING = ["sliding_attention", "full_attention"] * 2
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 48}
OSS = {"num_local_experts": 6, "num_experts_per_tok": 2, "head_dim": 32}
QWEN_WINDOWS = {"use_sliding_window": True, "sliding_window": WINDOW}
# family, and settings beside SIZES
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    **{family: (family, settings) for family, settings in FAMILY_SETTINGS.items()},
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "mistral-windows": ("mistral", {"sliding_window": WINDOW}),
    "qwen2-windows": ("qwen2", {**QWEN_WINDOWS, "max_window_layers": 2}),
    "qwen3-windows": ("qwen3", {"head_dim": 32, **QWEN_WINDOWS, "max_window_layers": 1}),
    "qwen3_moe": ("qwen3_moe", {"head_dim": 32, **EXPERTS, "norm_topk_prob": True}),
    "qwen3_moe-shares-of-all": ("qwen3_moe", {"head_dim": 16, **EXPERTS, "norm_topk_prob": False}),
    "qwen3_moe-windows": ("qwen3_moe", {"head_dim": 16, **EXPERTS, **QWEN_WINDOWS}),
    "gemma3_text": (
        "gemma3_text",
        {
            "head_dim": 32,
            "query_pre_attn_scalar": 20,
            "sliding_window": WINDOW,
            "layer_types": ALTERNATING,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e5},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
        },
    ),
    "gemma3_text-whole": ("gemma3_text", {"head_dim": 32, "sliding_window": 512, "attention_bias": True}),
    "mixtral": ("mixtral", {"num_local_experts": 6, "num_experts_per_tok": 2}),
    "mixtral-windows": ("mixtral", {"num_local_experts": 6, "sliding_window": WINDOW}),
    "gpt_oss": (
        "gpt_oss",
        {
            **OSS,
            "layer_types": ["full_attention"] * 4,
            "attention_bias": False,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
        },
    ),
    "gpt_oss-windows": (
        "gpt_oss",
        {
            **OSS,
            "sliding_window": WINDOW,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1e4,
                "factor": 4.0,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "truncate": False,
                "original_max_position_embeddings": 128,
            },
        },
    ),
    "granite": (
        "granite",
        {
            "attention_multiplier": 0.1,
            "embedding_multiplier": 6.0,
            "residual_multiplier": 0.3,
            "logits_scaling": 0.5,
        },
    ),
    "olmo2": ("olmo2", {}),
    "olmo3-windows": (
        "olmo3",
        {
            "sliding_window": WINDOW,
            "layer_types": ALTERNATING,
            "rope_parameters": {
                "full_attention": {
                    "rope_type": "yarn",
                    "rope_theta": 1e4,
                    "factor": 4.0,
                    "original_max_position_embeddings": 128,
                },
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
        },
    ),
    "smollm3": ("smollm3", {"no_rope_layer_interval": 2}),
    "smollm3-windows": (
        "smollm3",
        {"no_rope_layers": [1, 0, 0, 1], "use_sliding_window": True, "sliding_window": WINDOW},
    ),
    "ministral3": (
        "ministral3",
        {
            "head_dim": 32,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1e4,
                "factor": 16.0,
                "original_max_position_embeddings": 32,
                "llama_4_scaling_beta": 0.4,
                "mscale": 1.0,
                "mscale_all_dim": 1.0,
            },
        },
    ),
    "phi3": ("phi3", {}),
    "phi3-long": (
        "phi3",
        {
            "original_max_position_embeddings": SHORT,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 1e4,
                "partial_rotary_factor": 0.75,
                "short_factor": [1.0, 1.1, 1.3, 1.2, 1.5, 1.6],
                "long_factor": [1.5, 2.0, 3.0, 4.0, 6.0, 9.0],
                "original_max_position_embeddings": SHORT,
            },
        },
    ),
    "phi3-windows": (
        "phi3",
        {
            "sliding_window": WINDOW,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e4,
                "partial_rotary_factor": 0.75,
            },
        },
    ),
}
SLIDING = [name for name in CASES if name.endswith("-windows") or name in ("gemma3_text",)]
WHOLE = [name for name in CASES if name not in SLIDING]
LENGTHS = (60, 9, 133)  # two of them longer than the windows


def model_of(name: str, dtype: torch.dtype = torch.float32, device: torch.device = CPU) -> Decoder:
    """Norms and biases differ from what changes nothing."""
    family, settings = CASES[name]
    model = random_model(family, {**SIZES, **settings}, device=device, dtype=dtype)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator).to(device, dtype))
    return Decoder(sharpened(model))


def documents():
    return [document(length, seed=seed) for seed, length in enumerate(LENGTHS)]


def tokens_of(doc):
    return torch.from_numpy(doc.input_ids)[None]


@torch.inference_mode()
def stock_logits(decoder: Decoder) -> torch.Tensor:
    """(B, vocabulary) of each document alone, at its last token."""
    return torch.stack([decoder.model(tokens_of(doc)).logits[0, -1].float() for doc in documents()])


@cache
@torch.inference_mode()
def stock_answers(name: str, new_tokens: int) -> list[list[int]]:
    """Greedy tokens of each document alone."""
    model, options = model_of(name).model, {"max_new_tokens": new_tokens, "do_sample": False}
    answers = [model.generate(tokens_of(doc), **options)[0] for doc in documents()]
    return [answer[length:].tolist() for answer, length in zip(answers, LENGTHS, strict=True)]
