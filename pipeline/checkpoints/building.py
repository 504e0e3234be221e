"""Models of transformers made of a configuration: their tensors by name, and weights written into them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from pipeline.checkpoints.text_part import stored_under
from pipeline.errors import ModelError, first_line
from pipeline.families.configuration import slots_of
from pipeline.families.supported import FAMILIES


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The tensors that a model has; `tied` are heads, each with the embedding that it is."""

    shapes: dict[str, tuple[int, ...]]
    tied: dict[str, str]
    base: str  # the decoder's name in the model
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
def as_model_error(name: str, *, on_hub: bool = False) -> Iterator[None]:
    """Loaders raise whatever their libraries do; the user gets one line that names the model."""
    try:
        yield
    except (ModelError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        cannot = "had from the hub" if on_hub else "loaded"
        raise ModelError(f"model {name!r} cannot be {cannot}: {first_line(error)}") from error


def layout_of(config: PreTrainedConfig) -> Layout:
    """The layout of a checkpoint of a model of this configuration, without weights."""
    layout = Layout.of(_skeleton(config, torch.float32))
    shapes = FAMILIES[config.model_type].stored(layout.shapes)
    return replace(layout, shapes=shapes, stored_under=stored_under(config))


def _skeleton(config: PreTrainedConfig, dtype: torch.dtype) -> Any:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=dtype)


def random_model(
    family: str, settings: dict[str, Any], *, device: torch.device, dtype: torch.dtype, seed: int = 0
) -> PreTrainedModel:
    """A model of these dimensions with random weights."""
    config = AutoConfig.for_model(family, **settings)
    return with_random_weights(config, device=device, dtype=dtype, seed=seed)


def with_random_weights(
    config: PreTrainedConfig, *, device: torch.device, dtype: torch.dtype, seed: int = 0
) -> PreTrainedModel:
    """A model of this configuration, its weights drawn on the device without an initial copy on the host.

    The same seed gives the same weights on devices of one kind, in one dtype.
    """
    generator = torch.Generator(device=device).manual_seed(seed)

    norm = 1 - slots_of(config).norm_offset  # the weight that changes nothing

    def draw(name: str, parameter: Tensor) -> None:
        if parameter.dim() == 1 and not name.endswith("bias"):
            nn.init.constant_(parameter, norm)
        else:
            parameter.normal_(std=0.02, generator=generator)

    return with_weights(config, draw, device=device, dtype=dtype)


def with_weights(
    config: PreTrainedConfig,
    write: Callable[[str, Tensor], None],
    *,
    device: torch.device,
    dtype: torch.dtype,
) -> PreTrainedModel:
    """A model of this configuration whose weights are written on the device: `write(name, parameter)`."""
    model = _skeleton(config, dtype).to_empty(device=device).eval()
    _restore_buffers(model, device)
    model.tie_weights()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            write(name, parameter)
    return model


def _restore_buffers(model: Any, device: torch.device) -> None:
    """Make those anew that no checkpoint holds, where `to_empty` left garbage."""
    body = model.model
    body.rotary_emb = type(body.rotary_emb)(model.config).to(device)
    if not all(torch.isfinite(buffer).all() for buffer in body.rotary_emb.buffers()):
        raise ModelError("the rotary frequencies of this configuration are not finite")
    restored = {f"model.rotary_emb.{name}" for name, _ in body.rotary_emb.named_buffers()}
    if hasattr(body.embed_tokens, "embed_scale"):
        body.embed_tokens.embed_scale.fill_(body.embed_tokens.scalar_embed_scale)
        restored.add("model.embed_tokens.embed_scale")
    if left := {name for name, _ in model.named_buffers()} - restored:
        raise ModelError(f"nobody here knows what is in {', '.join(sorted(left))}")
