"""The only file that touches transformers' internals: its decoder layers, opened up into their parts.

The forward pass of a layer is ours (see prefill.py); the weights and modules are transformers'.
Supported families are an allow-list, each tested against stock transformers on small configurations.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import rms_norm
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from pipeline.errors import ModelError
from pipeline.model.shape import ModelShape

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
ROPE_TYPES = ("default", "linear", "llama3", "yarn")

Rope = tuple[Tensor, Tensor]  # cosines and sines, (T, d) each


def check_config(config: PreTrainedConfig) -> None:
    """Raise ModelError, before any weight is loaded, for a model this file cannot open."""
    family = config.model_type
    if family not in FAMILIES:
        raise ModelError(f"model family {family!r} is not supported; families: {', '.join(FAMILIES)}")
    rope_type = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if rope_type not in ROPE_TYPES:
        # dynamic and LongRoPE choose frequencies by the longest sequence of a call, so a pack's
        # documents would change each other
        raise ModelError(f"RoPE type {rope_type!r} is not supported; types: {', '.join(ROPE_TYPES)}")


def shape_of(config: PreTrainedConfig) -> ModelShape:
    """The model's dimensions; a sliding attention window caps the context, below which it changes nothing."""
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    layer_types = getattr(config, "layer_types", None)
    slides = "sliding_attention" in layer_types if layer_types else True
    window = getattr(config, "sliding_window", None) if slides else None
    return ModelShape(
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        ffn=config.intermediate_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=head_dim,
        vocab=config.vocab_size,
        context=min(config.max_position_embeddings, window or config.max_position_embeddings),
    )


class DecoderAdapter:
    """A loaded model, taken apart. Token tensors are packed: (T, ...), no batch dimension."""

    def __init__(self, model: PreTrainedModel) -> None:
        check_config(model.config)
        self.model = model
        self.shape = shape_of(model.config)
        self._decoder: Any = model.model
        scaling = self._decoder.layers[0].self_attn.scaling
        if abs(scaling - self.shape.head_dim**-0.5) > 1e-6:
            raise ModelError(f"attention scaling {scaling} is not supported (1/sqrt(head size) is)")

    @property
    def device(self) -> torch.device:
        return self._decoder.embed_tokens.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self._decoder.embed_tokens.weight.dtype

    def weight_bytes(self) -> int:
        return sum(p.numel() * p.element_size() for p in self.model.parameters())

    def embed(self, ids_T: Tensor) -> Tensor:
        """(T, D) start of the residual stream."""
        return self._decoder.embed_tokens(ids_T)

    def rope(self, hidden_TD: Tensor, positions_T: Tensor) -> Rope:
        """Rotary embedding of original positions."""
        cos_1Td, sin_1Td = self._decoder.rotary_emb(hidden_TD, positions_T[None])
        return cos_1Td[0], sin_1Td[0]

    def qkv(self, layer: int, hidden_TD: Tensor, rope: Rope) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (T, H, d), keys and values (T, K, d), the first two with RoPE."""
        block = self._decoder.layers[layer]
        attention = block.self_attn
        normed_TD = _norm(block.input_layernorm, hidden_TD)
        split = (-1, self.shape.head_dim)
        q_THd = attention.q_proj(normed_TD).unflatten(-1, split)
        k_TKd = attention.k_proj(normed_TD).unflatten(-1, split)
        v_TKd = attention.v_proj(normed_TD).unflatten(-1, split)
        if hasattr(attention, "q_norm"):
            q_THd, k_TKd = _norm(attention.q_norm, q_THd), _norm(attention.k_norm, k_TKd)
        q_THd, k_TKd = apply_rotary_pos_emb(q_THd, k_TKd, *rope)
        return q_THd, k_TKd, v_TKd

    def attention_output(self, layer: int, mixed_THd: Tensor) -> Tensor:
        """(T, D) to be added to the residual stream."""
        return self._decoder.layers[layer].self_attn.o_proj(mixed_THd.flatten(1))

    def feed_forward(self, layer: int, hidden_TD: Tensor) -> Tensor:
        """(T, D) to be added to the residual stream: norm and gated FFN."""
        block = self._decoder.layers[layer]
        return block.mlp(_norm(block.post_attention_layernorm, hidden_TD))

    def logits(self, hidden_BD: Tensor) -> Tensor:
        """(B, vocabulary) float32."""
        head: Any = self.model.lm_head
        return head(_norm(self._decoder.norm, hidden_BD)).float()


def _norm(module: Any, x: Tensor) -> Tensor:
    """RMSNorm in torch's single fused kernel; the modules' own forward makes six passes over memory."""
    return rms_norm(x, module.weight.shape, module.weight, module.variance_epsilon)


def random_model(
    family: str, settings: dict[str, Any], *, device: torch.device, dtype: torch.dtype, seed: int = 0
) -> PreTrainedModel:
    """A model with random weights, filled on the device without an initial copy on the host."""
    config = AutoConfig.for_model(family, **settings)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model = model.to_empty(device=device).eval()
    generator = torch.Generator(device=device).manual_seed(seed)
    for name, parameter in model.named_parameters():
        with torch.no_grad():
            if parameter.dim() == 1 and not name.endswith("bias"):
                nn.init.ones_(parameter)
            else:
                parameter.normal_(std=0.02, generator=generator)
    # the inverse frequencies are buffers that no checkpoint holds: to_empty left garbage there
    rotary = type(model.model.rotary_emb)(config).to(device)
    model.model.rotary_emb = rotary
    model.tie_weights()
    if not torch.isfinite(rotary.inv_freq).all():
        raise ModelError("random weights: the rotary frequencies are not finite")
    return model
