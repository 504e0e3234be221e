"""GGUF files for tests: models of transformers as llama.cpp's converter would write them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray
from transformers.convert_slow_tokenizer import bytes_to_unicode

from pipeline.checkpoints.gguf_rope import llama3_divisors

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
}
OUTER = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
SCALING = {
    "factor": "factor",
    "original_max_position_embeddings": "original_context_length",
    "attention_factor": "yarn_attn_factor",
    "beta_fast": "yarn_beta_fast",
    "beta_slow": "yarn_beta_slow",
}


def tensors_of(model: Any) -> Tensors:
    config, tensors = model.config, {}
    for name, parameter in model.named_parameters():
        module, kind = name.rsplit(".", 1)
        values = parameter.detach().numpy()
        if module.startswith("model.layers."):
            block, leaf = module.removeprefix("model.layers.").split(".", 1)
            new = f"blk.{block}.{LEAVES[leaf]}"
        else:
            new = OUTER[module]
        if config.model_type == "llama" and new.endswith(("attn_q", "attn_k")):
            heads = config.num_attention_heads if new.endswith("q") else config.num_key_value_heads
            halves = values.reshape(heads, 2, values.shape[0] // heads // 2, *values.shape[1:])
            values = halves.swapaxes(1, 2).reshape(values.shape)
        tensors[f"{new}.{kind}"] = np.ascontiguousarray(values)
    rope = config.rope_parameters
    if rope["rope_type"] == "llama3":
        frequencies = rope["rope_theta"] ** -(np.arange(0, config.head_dim, 2) / config.head_dim)
        own = {key: value for key, value in rope.items() if key not in ("rope_type", "rope_theta")}
        tensors["rope_freqs.weight"] = llama3_divisors(frequencies, **own).astype(np.float32)
    return tensors


def settings_of(model: Any) -> dict[str, Any]:
    config = model.config
    rope = config.rope_parameters
    settings = {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "block_count": config.num_hidden_layers,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "rope.freq_base": rope["rope_theta"],
    }
    if config.model_type == "qwen3":
        settings["attention.key_length"] = settings["attention.value_length"] = config.head_dim
    if rope["rope_type"] in ("linear", "yarn"):
        settings["rope.scaling.type"] = rope["rope_type"]
        settings |= {f"rope.scaling.{SCALING[key]}": rope[key] for key in SCALING if key in rope}
    return {f"{config.model_type}.{key}": value for key, value in settings.items()}


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

    `kind` is how matrices are stored; `split` a part's number from 0 on, how many parts there are, and how
    many tensors in all of them.
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
        matrix_kind = kind if values.ndim == 2 else None
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
        return np.zeros((len(values), values.shape[1] // block * block_bytes), np.uint8)


def write_parts(folder: Path, family: str, settings: dict[str, Any], tensors: Tensors) -> list[Path]:
    """The model in three files, as llama-gguf-split writes them."""
    names, paths = list(tensors), []
    for part in range(3):
        own = {name: tensors[name] for name in names[part * len(names) // 3 : (part + 1) * len(names) // 3]}
        path = folder / f"m-{part + 1:05d}-of-00003.gguf"
        split = (part, 3, len(names))
        paths.append(write(path, family, {} if part else settings, own, tokenizer=not part, split=split))
    return paths
