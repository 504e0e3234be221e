"""A checkpoint's tensors held against those that its configuration asks for, before any is read.

transformers fills what a checkpoint lacks with random numbers, and passes over what it does not know: the
answers would be another model's. So both are refused by name, with the likeliest cause and the remedy, but
for what is known to be harmless.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from transformers import PreTrainedConfig

from pipeline.checkpoints.building import Layout
from pipeline.checkpoints.folder import Checkpoint, first_of
from pipeline.checkpoints.safetensor_files import Stored, matrices_of_zeros, seem_equal
from pipeline.checkpoints.stored_matrices import StoredWeight
from pipeline.errors import ModelError
from pipeline.texts.words import counted

# what training and other programs leave beside the weights of a language model
HARMLESS = (
    r"(^|\.)v_head\.",  # the value head of reinforcement learning
    r"(^|\.)([kv]_scale|kv_scale|[kv]_proj\.(output|[kv])_scale)$",  # of a calibrated K/V cache
    r"(^|\.)(input|activation)_scale$",  # of activations in fp8, which are not quantised here
    r"(^|\.)_extra_state$",
    r"(^|\.)attn\.(masked_)?bias$",  # masks
    r"(^|\.)rotary_emb\.(inv_freq|cos_cached|sin_cached)$",
    r"(^|\.)position_ids$",
    r"^(model\.)?(visual|vision_tower|vision_model|audio_tower|audio_model)\.",
    r"^(model\.)?(multi_modal_projector|mm_projector)\.",
    r"^(model\.)?(mtp|mtp_layers|medusa_heads?|eagle|hydra_heads?|draft_model)\.",  # draft heads
)
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


def check_tensors(
    model: str,
    checkpoint: Checkpoint,
    config: PreTrainedConfig,
    layout: Layout,
    weights: Mapping[str, StoredWeight],
    ignored: str | None,
) -> tuple[dict[str, StoredWeight], list[str]]:
    """The `weights` of a checkpoint by the names of the model's parameters, and what is worth a note.

    Notes are of unused tensors that are harmless or match the pattern `ignored`. Raises ModelError where a
    checkpoint lacks tensors, has others or has them in other shapes.
    """
    compared = TensorComparison(
        model=model, config=config, layout=layout, stored=checkpoint.stored(), named=checkpoint.named
    )
    placed = {layout.place(name): each for name, each in weights.items()}
    missing = layout.missing(placed)
    if missing:
        raise lacks(model, compared.family, missing, why_missing(compared, missing))
    used = {name: each for name, each in placed.items() if name in layout.shapes}
    _check_form(compared, used)
    empty = matrices_of_zeros({name: each.first for name, each in used.items()})
    if empty:
        raise ModelError(
            f"model {model} holds {count(empty)} of zeros alone: {listed(empty)}; files are like this where a"
            " download was cut off: download or copy them again"
        )
    for head, embedding in layout.tied.items():
        if head in used and embedding in used:
            if not seem_equal(used[head].first, used[embedding].first):
                raise untied(model, head, embedding)
        elif head in used:
            used[embedding] = used[head]
    return used, check_unused(compared, placed.keys() - used.keys(), ignored)


def _check_form(compared: TensorComparison, used: Mapping[str, StoredWeight]) -> None:
    """Raise ModelError for tensors of other shapes, or of no floating-point numbers."""
    shapes = compared.layout.shapes
    odd = [
        f"{name} is {each.shape}, not {shapes[name]}"
        for name, each in used.items()
        if each.shape != shapes[name]
    ]
    if odd:
        raise ModelError(
            f"model {compared.model} has {count(odd)} of other shapes than a {compared.family} model of this"
            f" configuration: {listed(odd)}; {REMEDY}"
        )
    packed = [f"{name} is {each.first.dtype}" for name, each in used.items() if not each.is_number]
    if packed:
        raise ModelError(
            f"model {compared.model} has {count(packed)} without floating-point numbers:"
            f" {listed(packed)}; name the model that it was made from, unquantised, or a GGUF file of it"
        )


def check_unused(compared: TensorComparison, unused: Collection[str], ignored: str | None) -> list[str]:
    """A note on tensors that are not used; raises ModelError for those that nobody said are harmless."""
    left = [name for name in unused if not _is_harmless(compared.config, name)]
    if ignored is not None:
        left = [name for name in left if not re.search(ignored, name)]
    if left:
        raise ModelError(
            f"model {compared.model} holds {count(left)} that a {compared.family} model of this configuration"
            f" does not use: {listed(left)}; {why_unused(compared, left)}"
            "--ignore-unused-tensors REGEX goes on without those that it matches"
        )
    are = "is" if len(unused) == 1 else "are"
    return [f"{count(unused)} of {compared.model} {are} not used: {listed(unused)}"] if unused else []


def _is_harmless(config: PreTrainedConfig, name: str) -> bool:
    if any(re.search(pattern, name) for pattern in HARMLESS):
        return True
    drafts = getattr(config, "num_nextn_predict_layers", None) or 0  # layers that guess the token after next
    found = re.match(r"(?:model\.)?layers\.(\d+)\.", name)
    depth = config.num_hidden_layers
    return found is not None and depth <= int(found[1]) < depth + drafts


def lacks(model: str, family: str, missing: Collection[str], remedy: str) -> ModelError:
    return ModelError(
        f"model {model} lacks {count(missing)} that a {family} model of this configuration has:"
        f" {listed(missing)}; {remedy}"
    )


def untied(model: str, head: str, embedding: str) -> ModelError:
    """A head beside the embedding that it is said to be: one of the two is not what was trained."""
    return ModelError(
        f"model {model}: config.json says that its head is its embedding, and its files hold a {head} that"
        f' differs from {embedding}; write "tie_word_embeddings": false there if that head was trained, else'
        f" take {head} out of the files"
    )


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
    return counted(len(names), "tensor")


def listed(names: Collection[str]) -> str:
    """The first of them, layer 2 before layer 10."""
    return first_of(sorted(names, key=_natural))


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in name.split(".")]
