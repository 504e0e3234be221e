"""A checkpoint's tensors held against those that its configuration asks for, before any is read.

transformers fills what a checkpoint lacks with random numbers, and passes over what it does not know: the
answers would be another model's. So both are refused by name, but for what is known to be harmless.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

from pipeline.checkpoints.building import Layout
from pipeline.checkpoints.folder import Checkpoint
from pipeline.checkpoints.quantised import FP8_DTYPES, scales_of
from pipeline.checkpoints.safetensor_files import Stored, seem_equal
from pipeline.checkpoints.tensor_causes import (
    REMEDY,
    TensorComparison,
    count,
    listed,
    why_missing,
    why_unused,
)
from pipeline.errors import ModelError

FLOATS = ("F64", "F32", "F16", "BF16", *FP8_DTYPES)
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


def check_tensors(
    model: str, checkpoint: Checkpoint, config: PreTrainedConfig, layout: Layout, ignored: str | None
) -> list[str]:
    """Raise ModelError where a checkpoint lacks tensors, has others or has them in other shapes.

    What it returns is worth a note: unused tensors that are harmless or match the pattern `ignored`.
    Raises ValueError for damaged files.
    """
    stored = checkpoint.stored()
    scales = {each.name for each in scales_of(stored, config).values()}
    compared = TensorComparison(
        model=model, config=config, layout=layout, stored=stored, named=checkpoint.named
    )
    placed = {layout.place(name): each for name, each in stored.items() if name not in scales}
    missing = layout.missing(placed)
    if missing:
        raise lacks(model, compared.family, missing, why_missing(compared, missing))
    _check_form(compared, {name: each for name, each in placed.items() if name in layout.shapes})
    for head, embedding in layout.tied.items():
        if head in placed and embedding in placed and not seem_equal(placed[head], placed[embedding]):
            raise untied(model, head, embedding)
    return check_unused(compared, placed.keys() - layout.shapes.keys(), ignored)


def _check_form(compared: TensorComparison, used: Mapping[str, Stored]) -> None:
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
    packed = [f"{name} is {each.dtype}" for name, each in used.items() if each.dtype not in FLOATS]
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


def check_loaded(
    model: str,
    loaded: PreTrainedModel,
    report: Mapping[str, Any],
    scales: Collection[str],
    ignored: str | None,
) -> None:
    """Raise ModelError for what transformers itself reports of loading: the last guard, whatever came before.

    Releases differ in the keys of `report`. `scales` are tensors that transformers does not know and we use.
    """
    config, layout = loaded.config, Layout.of(loaded)
    missing = [_name(key) for key in (*report.get("missing_keys", ()), *report.get("mismatched_keys", ()))]
    if missing:
        raise lacks(model, config.model_type, missing, REMEDY)
    compared = TensorComparison(model=model, config=config, layout=layout, stored={}, named={})
    check_unused(compared, set(report.get("unexpected_keys", ())) - set(scales), ignored)
    for head, embedding in layout.tied.items():
        if loaded.get_parameter(head) is not loaded.get_parameter(embedding):
            raise untied(model, head, embedding)


def _name(key: Any) -> str:
    """Of what lacks, or of what is mismatched, which stands with its shapes."""
    return key if isinstance(key, str) else str(key[0])


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
