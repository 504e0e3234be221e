"""How a model is divided among ranks: each has some heads, and some columns of the feed-forward networks.

What a rank's heads and columns make is a part of a sum over the ranks: the matrices that make queries, keys,
values, gate and up are divided by rows, those behind them by columns. Norms and the embedding each rank has
whole; of the head each has some tokens.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from transformers import PreTrainedConfig

from pipeline.errors import ConfigError
from pipeline.families.configuration import shape_of
from pipeline.kernels.fp8 import MULTIPLE
from pipeline.pruning.shape import ModelShape
from pipeline.ranks.shares import Range, Share, TensorPart, sizes_that_fit

FLAG = "--tensor-parallel"
HEAD = "lm_head.weight"


def own_shape(shape: ModelShape, share: Share | None) -> ModelShape:
    """A model's dimensions as one rank computes them, the vocabulary left whole."""
    if share is None:
        return shape
    return replace(
        shape,
        heads=shape.heads // share.count,
        kv_heads=share.kv_heads(shape.kv_heads),
        ffn=shape.ffn // share.count,
    )


def can_be_divided(config: PreTrainedConfig) -> bool:
    """Whether it has no experts, nor a norm over all of its heads together."""
    return not shape_of(config).experts and not config.model_type.startswith("olmo")


def check_divides(config: PreTrainedConfig, count: int) -> None:
    """Raise ConfigError for a model that cannot be divided among `count` ranks."""
    shape, family = shape_of(config), config.model_type
    if not can_be_divided(config):
        what = "experts" if shape.experts else "norms over all heads"
        raise ConfigError(f"{FLAG} cannot divide a model with {what} yet, such as this {family}")
    sizes = sizes_of(shape)
    if count not in sizes:
        what = f"{shape.heads} heads, {shape.kv_heads} key/value heads and {shape.ffn:,} columns of the FFN"
        told = f"{what}: choose from {', '.join(map(str, sizes))}"
        raise ConfigError(f"{FLAG} {count} does not divide a model of {told}")


def check_devices(asked: str, device: torch.device, count: int) -> None:
    """Raise ConfigError where there are not so many devices as there are to be ranks."""
    if device.type == "cpu":
        return
    if asked not in ("auto", "cuda"):
        raise ConfigError(
            f"{FLAG} {count} takes the first {count} GPUs: --device {asked} must be auto or cuda"
        )
    there = torch.cuda.device_count()
    if there < count:
        raise ConfigError(f"{FLAG} {count} needs {count} GPUs, and torch sees {there}")


def sizes_of(shape: ModelShape, *, fp8: bool = False) -> list[int]:
    """Among how many ranks a model of this shape can be divided."""
    sizes = sizes_that_fit(shape.heads, shape.kv_heads, shape.ffn)
    return [count for count in sizes if not fp8 or _in_fp8(shape, count)]


def _in_fp8(shape: ModelShape, count: int) -> bool:
    """Whether the parts have sides that tensor cores multiply in float8."""
    own = own_shape(shape, Share(rank=0, count=count))
    sides = own.ffn, own.heads * own.head_dim, own.kv_heads * own.head_dim
    return not any(side % MULTIPLE for side in sides)


def part_of(name: str, whole: tuple[int, ...], shape: ModelShape, share: Share | None) -> TensorPart | None:
    """Which part of a parameter of this name and shape a rank has; None: all of it."""
    if share is None:
        return None
    if name == HEAD:
        return TensorPart(0, (share.range(whole[0]),))
    module, _, _kind = name.rpartition(".")
    module = module.rpartition(".")[2]
    queries, keys = _wide(share.range(shape.heads), shape), _wide(share.kv_range(shape.kv_heads), shape)
    columns = share.range(shape.ffn)
    first_key, first_value = shape.heads * shape.head_dim, (shape.heads + shape.kv_heads) * shape.head_dim
    rows: dict[str, tuple[Range, ...]] = {
        "q_proj": (queries,),
        "k_proj": (keys,),
        "v_proj": (keys,),
        "qkv_proj": (queries, _behind(first_key, keys), _behind(first_value, keys)),
        "gate_proj": (columns,),
        "up_proj": (columns,),
        "gate_up_proj": (columns, _behind(shape.ffn, columns)),
    }
    if module in rows:
        return TensorPart(0, rows[module])
    if module in ("o_proj", "down_proj") and len(whole) == 2:
        return TensorPart(1, (queries if module == "o_proj" else columns,))
    return None


def _wide(heads: Range, shape: ModelShape) -> Range:
    return heads[0] * shape.head_dim, heads[1] * shape.head_dim


def _behind(first: int, within: Range) -> Range:
    return first + within[0], first + within[1]
