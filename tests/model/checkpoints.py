"""Changed copies of a tiny model's folder, as conversions, trainers and downloads leave them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from torch import Tensor

from pipeline.errors import ModelError
from pipeline.families.decoder import Decoder
from pipeline.families.projection import LinearPrecision
from pipeline.kernels.fp8 import Fp8Weight
from pipeline.model.loading import UnloadedModel, open_model
from pipeline.settings.model_settings import ModelSettings

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a21\nsize 988097824\n"


def copied(folder: Path, target: Path) -> Path:
    shutil.copytree(folder, target)
    return target


def tensors(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / WEIGHTS)


def write(folder: Path, tensors: Mapping[str, Tensor], name: str = WEIGHTS) -> None:
    save_file({key: value.contiguous() for key, value in tensors.items()}, folder / name, {"format": "pt"})


def rename(folder: Path, new_name: Callable[[str], str | None]) -> None:
    """Give tensors other names, or take out those whose new name is None."""
    renamed = {new_name(key): value for key, value in tensors(folder).items()}
    write(folder, {key: value for key, value in renamed.items() if key is not None})


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def shard(folder: Path) -> dict[str, str]:
    """Cut the weights in two files with an index, whose mapping is returned."""
    found = tensors(folder)
    names = [f"model-0000{part}-of-00002.safetensors" for part in (1, 2)]
    named = {key: names[key.startswith("model.layers.")] for key in found}
    for name in names:
        write(folder, {key: value for key, value in found.items() if named[key] == name}, name)
    (folder / WEIGHTS).unlink()
    write_index(folder, named)
    return named


def write_index(folder: Path, named: Mapping[str, str]) -> None:
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": named}))


def opened(folder: Path, **settings: Any) -> UnloadedModel:
    return open_model(ModelSettings(model=str(folder), device="cpu", **settings))


def refusal(folder: Path, **settings: Any) -> str:
    """What opening a model says that must fail before any weight is read."""
    with pytest.raises(ModelError) as caught:
        opened(folder, **settings)
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    return message


def loaded(folder: Path, **precision: Any) -> Decoder:
    """A folder's model in bfloat16, but for what `precision` says."""
    return opened(folder, dtype="bfloat16").load(LinearPrecision(**precision)).decoder


def dequantised(weight: Fp8Weight) -> Tensor:
    """What a weight in fp8 stands for, in float32; of a matrix or of one for each expert."""
    return weight.quantised.float() * weight.scale.transpose(-1, -2)


def bytes_held(decoder: Decoder) -> int:
    """Of all weights of a model, in its own type and in fp8, each counted once."""
    held = {each.data_ptr(): each for each in decoder.model.parameters() if each.numel()}
    for layer in decoder._layers:
        for projection in layer.projections.values():
            low = projection.fp8
            held |= {} if low is None else {each.data_ptr(): each for each in (low.quantised, low.scale)}
    return sum(each.numel() * each.itemsize for each in held.values())
