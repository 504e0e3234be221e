"""The families that are supported, by what transformers calls them in `model_type`."""

from __future__ import annotations

from pipeline.families.gemma3 import GEMMA3_TEXT
from pipeline.families.gpt_oss import GPT_OSS
from pipeline.families.granite import GRANITE
from pipeline.families.llama import LLAMA, MISTRAL, QWEN2, QWEN3
from pipeline.families.ministral3 import MINISTRAL3
from pipeline.families.mixtral import MIXTRAL
from pipeline.families.olmo import OLMO2, OLMO3
from pipeline.families.phi3 import PHI3
from pipeline.families.qwen3_moe import QWEN3_MOE
from pipeline.families.slots import Family
from pipeline.families.smollm3 import SMOLLM3

FAMILIES: dict[str, Family] = {
    "gemma3_text": GEMMA3_TEXT,
    "gpt_oss": GPT_OSS,
    "granite": GRANITE,
    "llama": LLAMA,
    "ministral3": MINISTRAL3,
    "mistral": MISTRAL,
    "mixtral": MIXTRAL,
    "olmo2": OLMO2,
    "olmo3": OLMO3,
    "phi3": PHI3,
    "qwen2": QWEN2,
    "qwen3": QWEN3,
    "qwen3_moe": QWEN3_MOE,
    "smollm3": SMOLLM3,
}
