"""The families that are supported, by what transformers calls them in `model_type`."""

from __future__ import annotations

from pipeline.families.llama import LLAMA, MISTRAL, QWEN2, QWEN3
from pipeline.families.slots import Family

FAMILIES: dict[str, Family] = {
    "llama": LLAMA,
    "mistral": MISTRAL,
    "qwen2": QWEN2,
    "qwen3": QWEN3,
}
