"""How much memory a pack may take, and how much it will."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import psutil
import torch

from pipeline.model.shape import ModelShape
from pipeline.pruning.base import PruningMethod

# larger packs fill no device better, and every row waits for its whole pack's prefill
MOST_PACK_TOKENS = {"cpu": 8192, "cuda": 65536}
USABLE = {"cpu": 0.7, "cuda": 0.9}  # of what is free; the rest is for allocators and estimates gone wrong


def free_bytes(device: torch.device) -> int:
    """Memory that a pack may use, in bytes."""
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    return int(free * USABLE[device.type])


def pack_bytes(
    method: PruningMethod, shape: ModelShape, *, itemsize: int, new_tokens: int
) -> Callable[[Sequence[int]], int]:
    """A function from prompt lengths to the bytes a pack needs: planned K/V, activations, logits."""
    per_token = activation_bytes(shape, itemsize)

    def planned(lengths: Sequence[int]) -> int:
        kv = method.plan(shape, lengths).kv_bytes(itemsize, new_tokens)
        logits = len(lengths) * shape.vocab * (itemsize + 4)
        return kv + sum(lengths) * per_token + logits

    return planned


def activation_bytes(shape: ModelShape, itemsize: int) -> int:
    """Bytes a token needs while a layer runs, at the wider of its attention and its FFN.

    Attention holds the residual, its norm, q, k and v before and after RoPE, and the output; the FFN
    holds gate, up and their product. Scores of the observation window are float32, one key head at a time.
    """
    attention = 4 * shape.hidden + (3 * shape.heads + 4 * shape.kv_heads) * shape.head_dim
    ffn = 4 * shape.hidden + 3 * shape.ffn
    scoring = 3 * 4 * 64 * shape.heads // shape.kv_heads
    return max(attention, ffn) * itemsize + scoring


def default_pack_tokens(shape: ModelShape, *, itemsize: int, device: torch.device) -> int:
    """Tokens of a pack when the user names none: what free memory holds, up to what a device needs."""
    per_token = shape.layers * shape.kv_bytes_per_token(itemsize) + activation_bytes(shape, itemsize)
    return max(1, min(MOST_PACK_TOKENS[device.type], free_bytes(device) // per_token))
