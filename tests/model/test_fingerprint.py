"""Fingerprints of folders: of content, not of names and times."""

from __future__ import annotations

import os
import time

import pytest
import torch
from checkpoints import WEIGHTS, change_config, copied, opened, shard, tensors, write

from pipeline.checkpoints import folder as module


@pytest.fixture(params=[module.WHOLE_BYTES, 0], ids=["whole", "sampled"])
def folder(request, model_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "WHOLE_BYTES", request.param)
    return copied(model_folder, tmp_path / "model")


def of(folder):
    return opened(folder).fingerprint


def test_a_copy_has_the_same(folder, tmp_path):
    copy = copied(folder, tmp_path / "copy")
    os.utime(copy / WEIGHTS, (0, 0))
    assert of(copy) == of(folder)
    assert of(copy).startswith("content:")
    shard(copy)
    again = copied(copy, tmp_path / "again")
    assert of(again) == of(copy) != of(folder)


@pytest.mark.parametrize("name", ["lm_head.weight", "model.layers.2.self_attn.k_proj.bias"])
def test_other_weights_have_another(folder, name):
    before, times = of(folder), (folder / WEIGHTS).stat()
    found = tensors(folder)
    found[name] += 0.125
    write(folder, found)
    os.utime(folder / WEIGHTS, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert (folder / WEIGHTS).stat().st_size == times.st_size
    assert of(folder) != before


def test_configuration_and_tokenizer_are_part_of_it(folder):
    before = of(folder)
    change_config(folder, rms_norm_eps=1e-3)
    second = of(folder)
    text = (folder / "tokenizer.json").read_text()
    (folder / "tokenizer.json").write_text(text.replace("\n", "\n ", 1))
    assert len({before, second, of(folder)}) == 3


def test_what_does_not_matter_is_not(folder):
    before = of(folder)
    (folder / "README.md").write_text("about")
    assert of(folder) == before


def test_large_weights_are_read_in_part(tmp_path, monkeypatch):
    """A tensor of 1 GB, most of it a hole."""
    path = tmp_path / "large.safetensors"
    write(tmp_path, {"a": torch.zeros(8)}, path.name)
    header = b'{"a":{"dtype":"F32","shape":[16384,16384],"data_offsets":[0,1073741824]}}'
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + (1 << 30))
    (stored,) = module.read_header(path)
    began = time.perf_counter()
    pieces = list(module.sampled(stored))
    assert sum(map(len, pieces)) == 256 * 4096
    assert time.perf_counter() - began < 1
