"""Why a checkpoint's tensors are not those of its configuration: the likeliest cause, and the remedy."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from transformers import PreTrainedConfig

from pipeline.checkpoints.building import Layout
from pipeline.checkpoints.safetensor_files import Stored

SHOWN = 3  # names in a message
# what trainers and torch.compile put into names, somewhere
WRAPPERS = (
    "base_model.model.",
    "_orig_mod.",
    "_fsdp_wrapped_module.",
    "_checkpoint_wrapped_module.",
    "module.",
)
REMEDY = "download or copy its files again, or mend config.json"
MERGE = "merge them, e.g. with peft's merge_and_unload"
LAYER = r"(?:^|\.)layers\.(\d+)\."


@dataclass(frozen=True, kw_only=True)
class TensorComparison:
    """A checkpoint beside what a model of its configuration has."""

    model: str
    config: PreTrainedConfig
    layout: Layout
    stored: Mapping[str, Stored]
    named: Mapping[str, str]  # by an index: the file of each tensor

    @property
    def family(self) -> str:
        return self.config.model_type


def why_missing(compared: TensorComparison, missing: Collection[str]) -> str:
    """What to do about tensors that a checkpoint lacks."""
    names, config = compared.stored, compared.config
    wrapper = _wrapper(names, missing)
    if wrapper is not None:
        return (
            f"its files have them under names with {wrapper!r}: save the model without that wrapper, or"
            " take it out of the names"
        )
    if any(".base_layer." in name or ".lora_" in name for name in names):
        return f"its files hold LoRA layers that are not merged: {MERGE}"
    if {"score.weight", "classifier.weight"} & names.keys():
        return f"it is a classifier{_architecture(config)}, which writes no text: name a language model"
    if set(missing) <= compared.layout.heads:
        return (
            f'if its head is its embedding, config.json must say "tie_word_embeddings": true; else {REMEDY}'
        )
    held = _depth(names)
    if held and all(_layer(name) >= held for name in missing):
        depth = config.num_hidden_layers
        return f"config.json says num_hidden_layers {depth}, and its files hold {held}: {REMEDY}"
    promised = sorted({compared.named[name] for name in missing if name in compared.named})
    if promised:
        return f"the index has them in {listed(promised)}, which does not hold them: download it again"
    return REMEDY


def why_unused(compared: TensorComparison, unused: Collection[str]) -> str:
    """What to do about tensors that a model does not use, as the beginning of a sentence; may be empty."""
    config = compared.config
    switches = _bias_switches(config, unused)
    if switches:
        return f"if it was trained with them, config.json must say {' and '.join(switches)}; else "
    if any(".lora_" in name or ".base_layer." in name for name in unused):
        return f"LoRA layers are no part of it: {MERGE}; "
    if any(re.search(r"scales?(_inv)?$|\.qzeros$|\.SCB$|absmax$", name) for name in unused):
        return (
            "they look like scales of quantised weights, of which config.json says nothing: give it the"
            " quantization_config of the original; "
        )
    depth = config.num_hidden_layers
    if all(_layer(name) >= depth for name in unused):
        return f"config.json says num_hidden_layers {depth}, and its files hold {_depth(unused)}: mend it; "
    return ""


def _wrapper(names: Iterable[str], missing: Collection[str]) -> str | None:
    """What, left out of a checkpoint's names, gives most of those that are missing."""
    found: Counter[str] = Counter()
    wanted = set(missing)
    for name in names:
        found.update(each for each in WRAPPERS if each in name and name.replace(each, "") in wanted)
        parts = name.split(".")
        for at in range(1, len(parts) - 1):
            if ".".join(parts[at:]) in wanted:
                found[".".join(parts[:at]) + "."] += 1
    return found.most_common(1)[0][0] if found else None


def _bias_switches(config: PreTrainedConfig, unused: Collection[str]) -> list[str]:
    """The settings, off in a configuration, that give a model such biases."""
    parts = {"attention_bias": ".self_attn.", "mlp_bias": ".mlp."}
    return [
        f'"{switch}": true'
        for switch, part in parts.items()
        if getattr(config, switch, None) is False
        and any(name.endswith(".bias") and part in name for name in unused)
    ]


def _architecture(config: PreTrainedConfig) -> str:
    names = getattr(config, "architectures", None)
    return f" ({', '.join(names)})" if names else ""


def _layer(name: str) -> int:
    """The layer that a tensor is of; -1 if it is of none."""
    found = re.search(LAYER, name)
    return int(found[1]) if found else -1


def _depth(names: Iterable[str]) -> int:
    """How many layers tensors of these names are of."""
    return max((_layer(name) for name in names), default=-1) + 1


def count(names: Collection[str]) -> str:
    return f"{len(names):,} tensor{'' if len(names) == 1 else 's'}"


def listed(names: Collection[str]) -> str:
    """The first of them, layer 2 before layer 10."""
    first = sorted(names, key=_natural)[:SHOWN]
    return ", ".join([*first, *(["..."] if len(names) > SHOWN else [])])


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in name.split(".")]
