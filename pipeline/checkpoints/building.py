"""Models of transformers made of a configuration: their tensors by name, and weights written into them."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from pipeline.checkpoints.device_memory import fits
from pipeline.checkpoints.own_weights import OwnWeights, Weights
from pipeline.checkpoints.text_part import stored_under
from pipeline.errors import ModelError, first_line
from pipeline.families.configuration import shape_of, slots_of
from pipeline.families.projection import IN_FULL, HeldAs, LinearPrecision, depth_of, matrices
from pipeline.families.sharding import part_of
from pipeline.families.supported import FAMILIES
from pipeline.kernels.fp8 import Fp8Weight
from pipeline.ranks.shares import Share, TensorPart


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The tensors that a model has; `tied` are heads, each with the embedding that it is."""

    shapes: dict[str, tuple[int, ...]]
    tied: dict[str, str]
    base: str  # the decoder's name in the model
    # of each parameter the tensors that a checkpoint holds, whose rows it has end to end
    parts: dict[str, tuple[str, ...]] = field(default_factory=dict)
    stored_under: str = ""  # what names in the checkpoint begin with, beside others that are not the model's

    @classmethod
    def of(cls, model: PreTrainedModel) -> Layout:
        return cls(
            shapes={name: tuple(tensor.shape) for name, tensor in model.state_dict().items()},
            tied=model.get_expanded_tied_weights_keys(all_submodels=True),
            base=model.base_model_prefix,
        )

    @property
    def heads(self) -> set[str]:
        return {name for name in self.shapes if not name.startswith(f"{self.base}.")}

    def place(self, name: str) -> str:
        """Where transformers puts a tensor of this name: a decoder's own checkpoint lacks its prefix."""
        name = name.removeprefix(self.stored_under)
        inner = name.removeprefix(f"{self.base}.")
        if inner != name and inner in self.shapes:
            return inner
        outer = f"{self.base}.{name}"
        return outer if outer in self.shapes else name

    def missing(self, names: Collection[str]) -> list[str]:
        """What tensors of these names leave open; of two that are tied, one is enough."""
        there = set(names)
        for one, other in self.tied.items():
            if there & {one, other}:
                there |= {one, other}
        return [name for name in self.shapes if name not in there]


@contextmanager
def as_model_error(name: str) -> Iterator[None]:
    """Loaders raise whatever their libraries do; the user gets one line that names the model.

    That a device's memory ran out is left to a caller who knows the device.
    """
    try:
        with fits(name):
            yield
    except (ModelError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise ModelError(f"model {name!r} cannot be loaded: {first_line(error)}") from error


def layout_of(config: PreTrainedConfig) -> Layout:
    """The layout of a checkpoint of a model of this configuration, without weights."""
    layout = parameters_of(config)
    stored = FAMILIES[config.model_type].stored
    parts = {name: tuple(stored({name: shape})) for name, shape in layout.shapes.items()}
    return replace(layout, shapes=stored(layout.shapes), parts=parts, stored_under=stored_under(config))


def parameters_of(config: PreTrainedConfig) -> Layout:
    """The layout of a model's own parameters, whatever its checkpoints hold in their place."""
    return Layout.of(_skeleton(config, torch.float32))


def _skeleton(config: PreTrainedConfig, dtype: torch.dtype) -> Any:
    """Without weights; code of the model's own runs where its source has let the configuration name it."""
    own_code = hasattr(config, "auto_map")
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=own_code)


def random_model(
    family: str,
    settings: dict[str, Any],
    *,
    device: torch.device,
    dtype: torch.dtype,
    seed: int = 0,
    share: Share | None = None,
) -> PreTrainedModel:
    """A model of these dimensions with random weights, or a rank's share of it."""
    config = AutoConfig.for_model(family, **settings)
    draw = RandomDraw(config, device, seed)
    return with_weights(config, draw, device=device, dtype=dtype, share=share)


class RandomDraw:
    """Weights that are drawn on the device, one after the other.

    The same seed gives the same weights on devices of one kind, in one dtype.
    """

    def __init__(self, config: PreTrainedConfig, device: torch.device, seed: int = 0) -> None:
        self._generator = torch.Generator(device=device).manual_seed(seed)
        self._norm = 1 - slots_of(config).norm_offset  # the weight that changes nothing

    def write(self, name: str, target: Tensor, /) -> None:
        if target.dim() == 1 and not name.endswith("bias"):
            nn.init.constant_(target, self._norm)
        else:
            target.normal_(std=0.02, generator=self._generator)

    def fp8(self, name: str, device: torch.device, /) -> Fp8Weight | None:
        return None


def with_weights(
    config: PreTrainedConfig,
    weights: Weights,
    *,
    device: torch.device,
    dtype: torch.dtype,
    precision: LinearPrecision = IN_FULL,
    share: Share | None = None,
) -> PreTrainedModel:
    """A model of this configuration, or a rank's `share`, whose weights are made on the device one by one.

    A matrix that `precision` wants in fp8 alone is quantised before the next one is read: memory is needed
    for the model as it will be, and for one weight as it was.
    """
    model = _skeleton(config, dtype).eval()
    model.tie_weights()
    parts = _parts(model, config, share)
    if parts:
        weights = OwnWeights(weights, parts, {name: tuple(p.shape) for name, p in model.named_parameters()})
    layers, inputs_first = matrices(model), FAMILIES[config.model_type].inputs_first
    with torch.no_grad():
        for name, parameter in list(model.named_parameters()):
            path, _, last = name.rpartition(".")
            module = model.get_submodule(path)
            form = _form(precision, layers, name, config)
            own = parameter if name not in parts else parameter.new_empty(parts[name].shape(parameter.shape))
            tensor, in_fp8 = _made(weights, name, own, device, form, inputs_first)
            setattr(module, last, nn.Parameter(tensor, requires_grad=False))
            if in_fp8 is not None:
                setattr(module, f"{last}_fp8", in_fp8)
        model.tie_weights()
        _make_buffers(model, device)
    return model


def _form(
    precision: LinearPrecision, layers: Mapping[str, str], name: str, config: PreTrainedConfig
) -> HeldAs:
    """What a parameter is needed in; `layers` are those that may be in fp8, by name."""
    if name not in layers:
        return HeldAs.FULL
    return precision.form(layers[name], depth_of(name, config.num_hidden_layers))


def _parts(model: Any, config: PreTrainedConfig, share: Share | None) -> dict[str, TensorPart]:
    """Of a model's parameters, by name, those of which a rank has a part."""
    shape = shape_of(config)
    named = ((name, part_of(name, tuple(p.shape), shape, share)) for name, p in model.named_parameters())
    return {name: part for name, part in named if part is not None}


def bytes_needed(
    config: PreTrainedConfig,
    dtype: torch.dtype,
    precision: LinearPrecision = IN_FULL,
    share: Share | None = None,
) -> tuple[int, int]:
    """Bytes of a model's weights on its device, and at most while they are made, by their shapes alone.

    With a `share` those of one rank, which may have to read each weight whole.

    The second holds the largest weight once more, with its numbers in float32 and their scales if it is a
    matrix that may be quantised.
    """
    model = _skeleton(config, dtype)
    model.tie_weights()
    layers, held, most = matrices(model), 0, 0
    parts = _parts(model, config, share)
    inputs = 1 if FAMILIES[config.model_type].inputs_first else 2  # which side of experts' matrices
    for name, parameter in model.named_parameters():
        form = _form(precision, layers, name, config)
        numbers, is_matrix = parameter.numel(), parameter.dim() == 2
        rows = numbers // parameter.shape[inputs if parameter.dim() == 3 else -1]
        most = max(most, numbers * (8 + dtype.itemsize if name in layers and is_matrix else 4))
        if name in parts:
            numbers = prod(parts[name].shape(parameter.shape))
            rows = parts[name].size if parts[name].dim == 0 else rows
        full, in_fp8 = numbers * dtype.itemsize, numbers + 4 * rows
        held += {HeldAs.FULL: full, HeldAs.FP8: in_fp8, HeldAs.BOTH: full + in_fp8}[form]
    return held, held + most


def _made(
    weights: Weights,
    name: str,
    parameter: Tensor,
    device: torch.device,
    form: HeldAs,
    inputs_first: bool,
) -> tuple[Tensor, Fp8Weight | None]:
    """A weight of this name and shape, empty where only its fp8 form is wanted, and that form.

    `inputs_first` is said of experts' matrices, see `Family`.
    """
    in_fp8 = None if form is HeldAs.FULL else weights.fp8(name, device)
    in_fp8 = None if in_fp8 is None else in_fp8.shaped(parameter.shape)
    if form is HeldAs.FP8 and in_fp8 is not None:
        return parameter.new_empty(0, device=device), in_fp8
    tensor = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
    weights.write(name, tensor)
    if form is HeldAs.FP8:
        rows_first = tensor.transpose(1, 2) if inputs_first and tensor.dim() == 3 else tensor
        return parameter.new_empty(0, device=device), Fp8Weight.of(rows_first)
    return tensor, in_fp8


def _make_buffers(model: Any, device: torch.device) -> None:
    """Compute what no checkpoint holds, such as the inverse frequencies of RoPE, as transformers does it."""
    for module in model.modules():
        missing = [name for name, each in module.named_buffers(recurse=False) if each.is_meta]
        if not missing:
            continue
        for name in missing:
            module._buffers[name] = torch.full_like(module._buffers[name], math.nan, device=device)
        for parameter in module.parameters(recurse=False):
            parameter._is_hf_initialized = True  # without this mark it would be drawn anew
        model._init_weights(module)
        for name in missing:
            if not torch.isfinite(module._buffers[name]).all():
                raise ModelError(f"the buffer {name} of a model of this configuration is not finite")
