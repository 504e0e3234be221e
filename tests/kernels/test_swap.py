"""Fetching scattered blocks: plain torch, and the kernel in Triton's interpreter, against a loop."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import interpreted

from pipeline.kernels.swap import WORDS, BlockCopies, as_rows


@pytest.fixture
def kernel(monkeypatch):
    return interpreted(monkeypatch, "triton_kernels", "fetch_blocks_kernel").fetch_blocks_kernel


def random_blocks(words):
    generator = torch.Generator().manual_seed(words)
    sources = [torch.randint(-(2**62), 2**62, (9, words), generator=generator) for _ in "kv"]
    targets = [torch.zeros(5, words, dtype=torch.int64) for _ in "kv"]
    slots, blocks = torch.tensor([4, 0, 2]), torch.tensor([8, 3, 1])
    expected = [target.clone() for target in targets]
    for source, wanted in zip(sources, expected, strict=True):
        for slot, block in ((4, 8), (0, 3), (2, 1)):
            wanted[slot] = source[block]
    return targets, sources, slots, blocks, expected


@pytest.mark.parametrize("words", [1, 100])
def test_blocks_reach_their_slots_and_no_other(words):
    targets, sources, slots, blocks, expected = random_blocks(words)
    assert BlockCopies(targets, sources).fetch(slots, blocks) == 2 * 3 * words * 8
    assert all(map(torch.equal, targets, expected))


@pytest.mark.parametrize("words", [1, 100, 64, 200])
@pytest.mark.parametrize("programs", [1, 2, 16])
def test_the_kernel_does_the_same(kernel, words, programs):
    targets, sources, slots, blocks, expected = random_blocks(words)
    pairs = torch.tensor([(to.data_ptr(), of.data_ptr()) for to, of in zip(targets, sources, strict=True)])
    kernel[(programs,)](pairs, slots, blocks, 2, 3, words, WORDS=64)
    assert all(map(torch.equal, targets, expected))
    assert WORDS & (WORDS - 1) == 0  # as Triton wants it


def test_rows_are_the_memory_of_whole_blocks():
    values = torch.randn(12, 2, 4)
    rows = as_rows(values, 4)
    assert rows.shape == (3, 4 * 2 * 4 // 2)
    assert torch.equal(rows[1].view(torch.float32).view(4, 2, 4), values[4:8])
