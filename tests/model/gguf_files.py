"""GGUF files for tests: models of transformers as llama.cpp's converter would write them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from conftest import SIZES, document, pack_of, sharpened
from numpy.typing import NDArray
from torch import Tensor
from transformers.convert_slow_tokenizer import bytes_to_unicode

from pipeline.checkpoints.building import random_model
from pipeline.checkpoints.gguf_rope import llama3_divisors
from pipeline.errors import ModelError
from pipeline.families.decoder import Decoder
from pipeline.model.loading import load_model, open_model
from pipeline.model.prefill import prefill
from pipeline.pruning.dense import Dense
from pipeline.settings.model_settings import ModelSettings

CPU = torch.device("cpu")
Tensors = dict[str, NDArray[np.float32]]
TOKENS = [*bytes_to_unicode().values(), "Ġt", "Ġti", "<|im_start|>", "<|im_end|>"]
LEAVES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.qkv_proj": "attn_qkv",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.gate": "ffn_gate_inp",
    "mlp.router": "ffn_gate_inp",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
POST_NORMS = ("gemma3_text", "gpt_oss")  # whose post_attention_layernorm keeps its name
ARCHITECTURES = {"gemma3_text": "gemma3", "gpt_oss": "gpt-oss", "qwen3_moe": "qwen3moe"}
OUTER = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
SCALING = {
    "factor": "factor",
    "original_max_position_embeddings": "original_context_length",
    "attention_factor": "yarn_attn_factor",
    "beta_fast": "yarn_beta_fast",
    "beta_slow": "yarn_beta_slow",
}


def model_of(family: str = "llama", **settings: Any) -> Any:
    sizes = {**SIZES, "vocab_size": 320, "hidden_size": 128, **settings}
    return sharpened(random_model(family, sizes, device=CPU, dtype=torch.float32))


def logits(decoder: Decoder, attention: Any, length: int = 400) -> Tensor:
    return prefill(decoder, attention, Dense(), pack_of(document(length))).logits_BV[0]


def loaded(path: Path) -> Any:
    return load_model(str(path), device="cpu", dtype="float32")


def refusal(path: Path) -> str:
    with pytest.raises(ModelError) as caught:
        open_model(ModelSettings(model=str(path), device="cpu"))
    return str(caught.value).removeprefix(f"model '{path}' cannot be loaded: ")


def architecture_of(model: Any) -> str:
    family = model.config.model_type
    return ARCHITECTURES.get(family, family)


def tensors_of(model: Any) -> Tensors:
    config, tensors = model.config, {}
    for name, parameter in model.named_parameters():
        values = parameter.detach().numpy()
        if name.startswith("model.layers."):
            block, leaf = name.removeprefix("model.layers.").split(".", 1)
            made = {f"blk.{block}.{new}": part for new, part in in_block(config, leaf, values).items()}
        else:
            module, kind = name.rsplit(".", 1)
            made = {f"{OUTER[module]}.{kind}": values}
        for new, part in made.items():
            is_shifted = config.model_type == "gemma3_text" and new.endswith("norm.weight")
            tensors[new] = np.ascontiguousarray(part + 1 if is_shifted else part)
    return {**tensors, **rope_tensors(config)}


def in_block(config: Any, leaf: str, values: NDArray[np.float32]) -> Tensors:
    """A parameter of a block as the converter writes it, which may be several tensors."""
    if ".experts." in leaf:
        return experts_of(config.model_type, leaf.rpartition(".")[2], values)
    if leaf == "self_attn.sinks":
        return {"attn_sinks.weight": values}
    module, kind = leaf.rsplit(".", 1)
    new = LEAVES[module]
    if module == "post_attention_layernorm" and config.model_type in POST_NORMS:
        new = "post_attention_norm"
    if config.model_type == "llama" and new in ("attn_q", "attn_k"):
        heads = config.num_attention_heads if new == "attn_q" else config.num_key_value_heads
        halves = values.reshape(heads, 2, values.shape[0] // heads // 2, *values.shape[1:])
        values = halves.swapaxes(1, 2).reshape(values.shape)
    return {f"{new}.{kind}": values}


def experts_of(family: str, name: str, values: NDArray[np.float32]) -> Tensors:
    """Gate and up apart, and the outputs of a matrix as its rows."""
    kind = "bias" if name.endswith("_bias") else "weight"
    if family == "gpt_oss" and kind == "weight":
        values = values.swapaxes(1, 2)
    if name.startswith("down"):
        return {f"ffn_down_exps.{kind}": values}
    half = values.shape[1] // 2
    by_turns = family == "gpt_oss"
    gate, up = (values[:, ::2], values[:, 1::2]) if by_turns else (values[:, :half], values[:, half:])
    return {f"ffn_gate_exps.{kind}": gate, f"ffn_up_exps.{kind}": up}


def rope_tensors(config: Any) -> Tensors:
    rope = config.rope_parameters
    if rope.get("rope_type") == "longrope":
        return {
            f"rope_factors_{which}.weight": np.array(rope[f"{which}_factor"], np.float32)
            for which in ("short", "long")
        }
    if rope.get("rope_type") != "llama3":
        return {}
    frequencies = rope["rope_theta"] ** -(np.arange(0, config.head_dim, 2) / config.head_dim)
    own = {key: value for key, value in rope.items() if key not in ("rope_type", "rope_theta")}
    return {"rope_freqs.weight": llama3_divisors(frequencies, **own).astype(np.float32)}


def settings_of(model: Any) -> dict[str, Any]:
    config = model.config
    rope = config.rope_parameters.get("full_attention") or config.rope_parameters
    settings = {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "block_count": config.num_hidden_layers,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "rope.freq_base": rope["rope_theta"],
        **OWN_SETTINGS.get(config.model_type, lambda config: {})(config),
    }
    if rope["rope_type"] in ("linear", "yarn"):
        settings["rope.scaling.type"] = rope["rope_type"]
        settings |= {f"rope.scaling.{SCALING[key]}": rope[key] for key in SCALING if key in rope}
    return {f"{architecture_of(model)}.{key}": value for key, value in settings.items()}


def _heads(config: Any) -> dict[str, Any]:
    return {"attention.key_length": config.head_dim, "attention.value_length": config.head_dim}


def _experts(config: Any, width: int) -> dict[str, Any]:
    count = getattr(config, "num_local_experts", None) or config.num_experts
    return {
        "expert_count": count,
        "expert_used_count": config.num_experts_per_tok,
        "expert_feed_forward_length": width,
    }


def _of_phi3(config: Any) -> dict[str, Any]:
    rope, head = config.rope_parameters, config.hidden_size // config.num_attention_heads
    settings = {
        "rope.dimension_count": int(rope["partial_rotary_factor"] * head),
        "rope.scaling.original_context_length": config.original_max_position_embeddings,
        "attention.sliding_window": config.sliding_window or 0,
    }
    if rope["rope_type"] == "longrope":
        original = config.original_max_position_embeddings
        growth = np.log(config.max_position_embeddings / original) / np.log(original)
        settings["rope.scaling.attn_factor"] = float(np.sqrt(1 + growth))
    return settings


def _of_gpt_oss(config: Any) -> dict[str, Any]:
    return {
        **_heads(config),
        **_experts(config, config.intermediate_size),
        "attention.sliding_window": config.sliding_window,
    }


OWN_SETTINGS: dict[str, Any] = {
    "qwen3": _heads,
    "qwen3_moe": lambda config: {**_heads(config), **_experts(config, config.moe_intermediate_size)},
    "gemma3_text": lambda config: {**_heads(config), "attention.sliding_window": config.sliding_window},
    "phi3": _of_phi3,
    "gpt_oss": _of_gpt_oss,
}


def write(
    path: Path,
    family: str,
    settings: dict[str, Any],
    tensors: Tensors,
    *,
    tokenizer: bool = True,
    split: tuple[int, int, int] | None = None,
    kind: gguf.GGMLQuantizationType | None = None,
) -> Path:
    """A file of a model, or a part of one.

    `kind` is how matrices are stored, those of experts too; `split` a part's number from 0 on, how many parts
    there are, and how many tensors in all of them.
    """
    writer = gguf.GGUFWriter(path, family)
    for key, value in settings.items():
        add = {
            bool: writer.add_bool,
            int: writer.add_uint32,
            float: writer.add_float32,
            str: writer.add_string,
        }.get(type(value), writer.add_array)
        add(key, value)
    if tokenizer:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("qwen2")
        writer.add_token_list(TOKENS)
        writer.add_token_types([1] * (len(TOKENS) - 2) + [3, 3])
        writer.add_token_merges(["Ġ t", "Ġt i"])
        writer.add_bos_token_id(len(TOKENS) - 2)
        writer.add_eos_token_id(len(TOKENS) - 1)
        writer.add_add_bos_token(False)
    if split is not None:
        writer.add_uint16("split.no", split[0])
        writer.add_uint16("split.count", split[1])
        writer.add_int32("split.tensors.count", split[2])
    for name, values in tensors.items():
        matrix_kind = kind if values.ndim > 1 and name.endswith(".weight") else None
        writer.add_tensor(
            name, values if matrix_kind is None else stored(values, kind), raw_dtype=matrix_kind
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def stored(values: NDArray[np.float32], kind: Any) -> NDArray[Any]:
    """As the package stores them, or zeros of a type that it cannot write."""
    try:
        return gguf.quantize(values, kind)
    except NotImplementedError:
        block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        return np.zeros((*values.shape[:-1], values.shape[-1] // block * block_bytes), np.uint8)


def write_parts(folder: Path, family: str, settings: dict[str, Any], tensors: Tensors) -> list[Path]:
    """The model in three files, as llama-gguf-split writes them."""
    names, paths = list(tensors), []
    for part in range(3):
        own = {name: tensors[name] for name in names[part * len(names) // 3 : (part + 1) * len(names) // 3]}
        path = folder / f"m-{part + 1:05d}-of-00003.gguf"
        split = (part, 3, len(names))
        paths.append(write(path, family, {} if part else settings, own, tokenizer=not part, split=split))
    return paths
