"""LoRA adapters as peft saves them (arXiv 2106.09685), merged into a model's weights as these are read.

A matrix W becomes W + s B A, where s is alpha / rank, or alpha / sqrt(rank) of a rank-stabilised adapter.
Settings of an adapter that would make it compute anything else are refused by name.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pipeline.checkpoints.building import Layout
from pipeline.checkpoints.folder import first_of
from pipeline.checkpoints.own_weights import Weights
from pipeline.checkpoints.safetensor_files import Stored, read_header, read_tensor
from pipeline.errors import ModelError
from pipeline.kernels.fp8 import Fp8Weight
from pipeline.values.json_files import read_object

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
READ = {"peft_type", "r", "lora_alpha", "target_modules", "use_rslora", "rank_pattern", "alpha_pattern"}
READ |= {"bias", "modules_to_save", "layers_to_transform", "layers_pattern", "exclude_modules"}
READ |= {"init_lora_weights"}
# of training, and of programs that run adapters; nothing of them is in the numbers' meaning
HARMLESS = {
    "auto_mapping",
    "base_model_name_or_path",
    "revision",
    "inference_mode",
    "task_type",
    "peft_version",
}
HARMLESS |= {
    "lora_dropout",
    "loftq_config",
    "eva_config",
    "corda_config",
    "runtime_config",
}
HARMLESS |= {"qalora_group_size", "megatron_core", "ensure_weight_tying"}
# those that begin with other values of A and B alone; others, such as PiSSA, change the model's weights too
INITIAL = (None, True, False, "gaussian", "eva", "orthogonal")
BIASES = ("none", "all", "lora_only")  # which of the model's were trained
LAYER = r"(?:^|\.)layers\.(\d+)\."


class _Pair(NamedTuple):
    """What is added to a matrix (N, D): `scale` times `b` (N, r) times `a` (r, D)."""

    a: Stored
    b: Stored
    scale: float


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """An adapter that fits a model of one layout: by the names of its parameters, what becomes of them."""

    path: Path
    base: str | None  # the model that it was trained on, as it names it
    pairs: Mapping[str, _Pair]
    replaced: Mapping[str, Stored]  # weights and biases that were trained whole

    @property
    def note(self) -> str:
        ranks = sorted({pair.a.shape[0] for pair in self.pairs.values()})
        whole = f", and replaces {len(self.replaced)} tensors" if self.replaced else ""
        base = f", trained on {self.base}," if self.base else ""
        return (
            f"the LoRA adapter {self.path} (rank {', '.join(map(str, ranks))}){base} is merged into "
            f"{len(self.pairs)} matrices{whole}"
        )

    def over(self, weights: Weights, device: torch.device) -> Weights:
        return _Merged(self, weights, device)


class _Merged:
    """The weights of a model with an adapter's; what these change is no longer fp8 as it was stored."""

    def __init__(self, adapter: Adapter, weights: Weights, device: torch.device) -> None:
        self._adapter, self._weights, self._device = adapter, weights, device

    def write(self, name: str, target: Tensor, /) -> None:
        if name in self._adapter.replaced:
            target.copy_(_finite(self._adapter.replaced[name], self._device))
            return
        self._weights.write(name, target)
        pair = self._adapter.pairs.get(name)
        if pair is not None:
            a_RD, b_NR = (_finite(each, self._device).float() for each in (pair.a, pair.b))
            target.copy_(target.float().addmm_(b_NR, a_RD, alpha=pair.scale))

    def fp8(self, name: str, device: torch.device, /) -> Fp8Weight | None:
        changed = name in self._adapter.pairs or name in self._adapter.replaced
        return None if changed else self._weights.fp8(name, device)


def _finite(stored: Stored, device: torch.device) -> Tensor:
    tensor = read_tensor(stored).to(device)
    if not torch.isfinite(tensor).all():
        raise ValueError(f"{stored.name} of {stored.file} holds NaN or an infinity: take another adapter")
    return tensor


def adapter_fingerprint(folder: Path) -> str:
    """A hash of the bytes of an adapter's files."""
    digest = hashlib.sha256()
    for name in (CONFIG, WEIGHTS):
        digest.update(hashlib.sha256((folder / name).read_bytes()).digest())
    return digest.hexdigest()


def open_adapter(folder: Path, layout: Layout) -> Adapter:
    """An adapter by its headers. Raises ModelError where it is none, or none of a model of this layout."""
    try:
        about = _settings(folder)
        pairs, whole = _sorted(read_header(folder / WEIGHTS))
        adapter = _fitted(folder, about, pairs, whole, layout)
        _check_targets(about, adapter, layout)
    except ValueError as error:
        raise ModelError(f"--adapter {folder}: {error}") from error
    return adapter


def _settings(folder: Path) -> dict[str, Any]:
    if not (folder / CONFIG).is_file():
        raise ValueError(f"there is no {CONFIG}: name the folder of a LoRA adapter")
    if not (folder / WEIGHTS).is_file():
        pickled = (folder / "adapter_model.bin").is_file()
        instead = "; adapter_model.bin can run code: save it as safetensors" if pickled else ""
        raise ValueError(f"there is no {WEIGHTS}{instead}")
    about = read_object(folder / CONFIG)
    if (kind := about.get("peft_type")) != "LORA":
        raise ValueError(f"its peft_type is {kind!r}, and LORA is what can be merged")
    unread = sorted(key for key, value in about.items() if key not in READ | HARMLESS and value)
    if unread:
        raise ValueError(f"its {CONFIG} has settings that are not supported: {', '.join(unread)}")
    initial = about.get("init_lora_weights")
    if initial not in INITIAL:
        raise ValueError(
            f"its init_lora_weights is {initial!r}, which changed the model's own weights too:"
            " save it converted to LoRA"
        )
    for name, (fits, wanted) in FORMS.items():
        if not fits(about.get(name)):
            raise ValueError(f"its {CONFIG} has {name} {about.get(name)!r}, and {wanted} is needed")
    return about


def _is_positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf


def _is_pattern(value: Any) -> bool:
    try:
        return isinstance(value, str) and re.compile(value) is not None
    except re.error:
        return False


def _are_numbers_by_pattern(value: Any) -> bool:
    found = value or {}
    return isinstance(found, dict) and all(map(_is_pattern, found)) and all(map(_is_positive, found.values()))


def _are_names(value: Any) -> bool:
    return value is None or (isinstance(value, list) and all(isinstance(each, str) for each in value))


def _name_modules(value: Any) -> bool:
    return _are_names(value) or _is_pattern(value)


def _name_layers(value: Any) -> bool:
    layers = value if isinstance(value, list) else [value]
    return value is None or all(isinstance(each, int) and not isinstance(each, bool) for each in layers)


# what settings that are read must look like, and how that is told
FORMS: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    **dict.fromkeys(("r", "lora_alpha"), (_is_positive, "a number above 0")),
    **dict.fromkeys(
        ("rank_pattern", "alpha_pattern"), (_are_numbers_by_pattern, "a number above 0 for each pattern")
    ),
    **dict.fromkeys(("target_modules", "exclude_modules"), (_name_modules, "a list of names or a pattern")),
    "modules_to_save": (_are_names, "a list of names"),
    "layers_to_transform": (_name_layers, "a layer's number or a list of some"),
    "bias": (lambda value: value in (None, *BIASES), f"one of {', '.join(BIASES)}"),
}


def _sorted(stored: list[Stored]) -> tuple[dict[str, dict[str, Stored]], dict[str, Stored]]:
    """Pairs A and B by the names of their modules, and tensors that were trained whole by their own."""
    pairs: dict[str, dict[str, Stored]] = {}
    whole: dict[str, Stored] = {}
    for each in stored:
        name = each.name.removeprefix("base_model.model.")
        found = re.fullmatch(r"(.+)\.lora_(A|B)(?:\.default)?\.weight", name)
        if found is not None:
            pairs.setdefault(found[1], {})[found[2]] = each
        elif "lora_" in name:
            raise ValueError(f"it holds {each.name}, and only pairs lora_A and lora_B can be merged")
        else:
            whole[re.sub(r"\.(?:base_layer|modules_to_save(?:\.default)?)(?=\.)", "", name)] = each
    for module, pair in pairs.items():
        if len(pair) < 2:
            raise ValueError(f"it has lora_{next(iter(pair))} of {module} alone: download it again")
    if not pairs:
        raise ValueError(f"{WEIGHTS} holds no pair lora_A and lora_B")
    return pairs, whole


def _fitted(
    folder: Path,
    about: Mapping[str, Any],
    pairs: Mapping[str, Mapping[str, Stored]],
    whole: Mapping[str, Stored],
    layout: Layout,
) -> Adapter:
    found = {layout.place(f"{module}.weight"): (module, pair) for module, pair in pairs.items()}
    replaced = {layout.place(name): each for name, each in whole.items()}
    unknown = [name for name in (*found, *replaced) if name not in layout.shapes]
    if unknown:
        raise ValueError(f"the model has no {first_of(sorted(unknown))}: it is an adapter of another model")
    apart = [name for name in (*found, *replaced) if layout.parts.get(name) != (name,)]
    if apart:
        raise ValueError(f"it changes {first_of(sorted(apart))}, which the model holds together with others")
    tied = [name for name in (*found, *replaced) if name in {*layout.tied, *layout.tied.values()}]
    if tied:
        raise ValueError(
            f"it changes {first_of(tied)}, and the model's head is its embedding: merge it with peft"
        )
    made = {name: _pair(about, *each, layout.shapes[name]) for name, each in found.items()}
    for name, each in replaced.items():
        _expect(each, layout.shapes[name])
    base = about.get("base_model_name_or_path")
    return Adapter(path=folder, base=None if base is None else str(base), pairs=made, replaced=replaced)


def _pair(about: Mapping[str, Any], module: str, pair: Mapping[str, Stored], shape: tuple[int, ...]) -> _Pair:
    rank = _by_pattern(about.get("rank_pattern"), module, about["r"])
    alpha = _by_pattern(about.get("alpha_pattern"), module, about["lora_alpha"])
    if len(shape) != 2:
        raise ValueError(f"{module} is no matrix in the model")
    _expect(pair["A"], (rank, shape[1]))
    _expect(pair["B"], (shape[0], rank))
    return _Pair(pair["A"], pair["B"], alpha / (math.sqrt(rank) if about.get("use_rslora") else rank))


def _by_pattern(patterns: Mapping[str, Any] | None, module: str, otherwise: Any) -> Any:
    """The value of the first pattern that the end of a module's name matches."""
    matching = (value for key, value in (patterns or {}).items() if re.match(rf"(.*\.)?({key})$", module))
    return next(matching, otherwise)


def _expect(stored: Stored, shape: tuple[int, ...]) -> None:
    if stored.shape != shape:
        raise ValueError(
            f"{stored.name} is {stored.shape}, and {shape} is what fits the model and {CONFIG}:"
            " it is an adapter of another model, or damaged"
        )


def _check_targets(about: Mapping[str, Any], adapter: Adapter, layout: Layout) -> None:
    """Raise ValueError unless the pairs are those that the adapter's settings promise, none lacking."""
    promised = set(_targets(about, layout))
    lacking, more = promised - adapter.pairs.keys(), adapter.pairs.keys() - promised
    if lacking:
        raise ValueError(
            f"target_modules of its {CONFIG} name {first_of(sorted(lacking))}, and {WEIGHTS} lacks them"
        )
    if more:
        raise ValueError(
            f"{WEIGHTS} has pairs of {first_of(sorted(more))}, and target_modules of its {CONFIG} name none"
        )
    saved = set(about.get("modules_to_save") or ())
    biases = set(_trained_biases(about, promised, layout))
    left = sorted(biases - adapter.replaced.keys())
    if left:
        kind = about["bias"]
        raise ValueError(f"bias {kind!r} of its {CONFIG} means {first_of(left)}, and {WEIGHTS} lacks them")
    for name in adapter.replaced:
        module = name.rpartition(".")[0]
        if not (module.rpartition(".")[2] in saved or module in saved or name in biases):
            raise ValueError(f"{WEIGHTS} has {name}, of which its {CONFIG} says nothing")
    ends = {name.split(".")[-2] for name in adapter.replaced}
    absent = [each for each in sorted(saved) if each.split(".")[-1] not in ends]
    if absent:
        raise ValueError(f"modules_to_save of its {CONFIG} are {first_of(absent)}, and {WEIGHTS} lacks them")


def _trained_biases(about: Mapping[str, Any], targets: Collection[str], layout: Layout) -> Iterator[str]:
    """The model's biases that an adapter's settings mean: all, or those of the matrices it changes."""
    kind = about.get("bias") or "none"
    for name in layout.shapes:
        if name.endswith(".bias") and kind != "none":
            matrix = name.removesuffix("bias") + "weight"
            if kind == "all" or matrix in targets:
                yield name


def _targets(about: Mapping[str, Any], layout: Layout) -> Iterator[str]:
    """The matrices that an adapter's settings mean."""
    targets, excluded = about.get("target_modules"), about.get("exclude_modules")
    if not targets:
        raise ValueError(f"its {CONFIG} has no target_modules")
    layers = about.get("layers_to_transform")
    chosen = {layers} if isinstance(layers, int) else set(layers or ())
    for name, shape in layout.shapes.items():
        module = name.removesuffix(".weight")
        found = re.search(LAYER, name)
        if module == name or len(shape) != 2 or (chosen and (found is None or int(found[1]) not in chosen)):
            continue
        meant = found is not None if targets == "all-linear" else _is_named(module, targets)
        if meant and not (excluded and _is_named(module, excluded)):
            yield name


def _is_named(module: str, names: Any) -> bool:
    """By a pattern for all of the name, or by one of several ends of it."""
    if isinstance(names, str):
        return re.fullmatch(names, module) is not None
    return any(module == each or module.endswith(f".{each}") for each in names)
