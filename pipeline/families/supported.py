"""The families that are supported, by what transformers calls them in `model_type`."""

from __future__ import annotations

from pipeline.families.gemma3 import GEMMA3_TEXT
from pipeline.families.llama import LLAMA, MISTRAL, QWEN2, QWEN3
from pipeline.families.qwen3_moe import QWEN3_MOE
from pipeline.families.slots import Family

FAMILIES: dict[str, Family] = {
    "gemma3_text": GEMMA3_TEXT,
    "llama": LLAMA,
    "mistral": MISTRAL,
    "qwen2": QWEN2,
    "qwen3": QWEN3,
    "qwen3_moe": QWEN3_MOE,
}
