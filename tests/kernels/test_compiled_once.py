"""Documents of all lengths run by the same compiled kernels.

Triton compiles a kernel for each set of its constants, and of what it knows of the other arguments: their
types, which numbers are 1, and which numbers and addresses divide by 16.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch

import pipeline.kernels
from pipeline.kernels import decoding, modules, scoring, sparse, swap
from pipeline.kernels.blocks import block_attention
from pipeline.kernels.blocks.block_attention import block_sparse_attention
from pipeline.kernels.segments import Segments

FOLDER = Path(pipeline.kernels.__file__).parent
# arguments that a model, a method or a device has one of, whatever the documents
OF_THE_MODEL = {
    "heads",
    "kv_heads",
    "group",
    "head_dim",
    "half",
    "width",
    "words",
    "scale",
    "decay",
    "eps",
    "mass",
    "headroom",
}
LENGTHS = [8192, 16384, 9001, 12345, 32768, 32769]


def _kernels(module):
    """Of each kernel in a file its arguments, which are constants, and which are not specialised."""
    found = {}
    for each in ast.parse((FOLDER / f"{module}.py").read_text()).body:
        if not isinstance(each, ast.FunctionDef) or not each.name.endswith("_kernel"):
            continue
        (decorator,) = each.decorator_list
        told = decorator.keywords if isinstance(decorator, ast.Call) else []
        options = {keyword.arg: ast.literal_eval(keyword.value) for keyword in told}
        constants = {a.arg for a in each.args.args if a.annotation is not None}
        names = [a.arg for a in each.args.args]
        found[each.name] = names, constants, set(options.get("do_not_specialize", ()))
    return found


MODULES = ["triton_decoding", "triton_experts", "triton_kernels", "triton_scoring", "triton_sparse"]
MODULES += ["blocks/hopper_kernel", "blocks/triton_attention", "blocks/triton_rounding"]
KERNELS = {name: kernel for module in MODULES for name, kernel in _kernels(module).items()}
# arguments that are tensors or their descriptors
TENSORS = {"q", "k", "v", "x", "qkv", "gate_up", "product", "total", "weight", "bias", "out", "scales"}
TENSORS |= {
    "row_scales",
    "column_scales",
    "cos",
    "sin",
    "keys",
    "values",
    "places",
    "pairs",
    "slots",
    "blocks",
}
TENSORS |= {"indices", "counts", "masses", "table", "partial_logs", "logs", "sums", "parts", "made"}
TENSORS |= {"starts", "stops", "k_scales", "v_scales", "k_means", "means", "sinks", "experts", "weights"}
TENSORS |= {"breached", "taken", "factors", "low", "high", "query_reach", "query_power"}
TENSORS |= {"spans", "middles"}


@pytest.mark.parametrize("name", KERNELS)
def test_what_documents_decide_is_not_specialised(name):
    names, constants, unspecialised = KERNELS[name]
    rest = set(names) - constants - unspecialised
    if name == "choice_kernel":  # whose `blocks` is a number
        assert "blocks" in unspecialised
    unknown = {each for each in rest if not each.endswith("stride")} - OF_THE_MODEL - TENSORS
    assert not unknown, "each document's own numbers belong in do_not_specialize"
    assert not unspecialised & constants


class Recording:
    """Stands for a kernel, and keeps what it would be compiled for."""

    def __init__(self, name, seen):
        self.name, self.seen = name, seen

    def __getitem__(self, grid):
        return self

    def __call__(self, *arguments, **options):
        names, constants, unspecialised = KERNELS[self.name]
        given = dict(zip(names, arguments, strict=False)) | options
        known = {
            name: value
            if name in constants or name not in names
            else what_is_known(value, name, unspecialised)
            for name, value in given.items()
        }
        self.seen.setdefault(self.name, set()).add(tuple(sorted(known.items(), key=str)))


def what_is_known(value, name, unspecialised):
    if isinstance(value, torch.Tensor):
        return str(value.dtype), name in unspecialised or value.data_ptr() % 16 == 0
    if isinstance(value, int):
        wide = value >= 2**31
        return ("int", wide) if name in unspecialised else ("int", wide, value == 1, value % 16 == 0)
    return type(value).__name__


class Recorded:
    """Stands for a module of kernels."""

    def __init__(self, seen):
        self.seen = seen

    def __getattr__(self, name):
        return Recording(name, self.seen)


def qkv(tokens, heads=4, kv_heads=2, head_dim=16):
    joined = torch.zeros(tokens, heads + 2 * kv_heads, head_dim)
    return joined.split((heads, kv_heads, kv_heads), dim=1)


def test_block_sparse_attention_compiles_nothing_at_new_lengths(monkeypatch):
    seen = {}
    for module in (sparse, block_attention):
        monkeypatch.setattr(module, "_kernels", lambda x: Recorded(seen))
    for tokens in LENGTHS:
        q, k, v = qkv(tokens)
        blocks = sparse.choose_blocks(q, k, 0.9)
        block_sparse_attention(q, k, v, blocks, left_out=sparse.WHOLE_ROWS)
    assert {name: len(variants) for name, variants in seen.items()} == {
        "mean_keys_kernel": 1,
        "estimate_kernel": 1,
        "choice_kernel": 1,
        "attention_kernel": 1,
    }


def test_scoring_compiles_nothing_at_new_lengths_and_packs(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # read when the kernels' module is imported
    pytest.importorskip("triton")
    from pipeline.kernels import triton_scoring

    seen = {}
    for name in ("partial_sums_kernel", "added_sums_kernel", "weights_kernel"):
        monkeypatch.setattr(triton_scoring, name, Recording(name, seen))
    monkeypatch.setattr(scoring, "_kernels", lambda x: triton_scoring)
    for lengths in ((1000,), (1024,), (30, 1), (7,) * 16):
        segments = Segments.of(lengths)
        q, k, _ = qkv(segments.total)
        scoring.window_importance(q, k, segments, 64)
    assert {name: len(variants) for name, variants in seen.items()} == dict.fromkeys(seen, 1)
    assert len(seen) == 3


def test_decode_steps_compile_nothing_at_new_layers_lengths_and_batches(monkeypatch):
    seen = {}
    monkeypatch.setattr(decoding, "_kernels", lambda x: Recorded(seen))
    table = torch.zeros(4, 300, dtype=torch.int32)
    for layer, columns, longest in ((0, 1, 500), (1, 3, 4096), (3, 16, 5000), (2, 256, 131_072)):
        q, k, v = (torch.zeros(columns, heads, 16) for heads in (4, 2, 2))
        ranges = decoding.Ranges(
            starts_N=table[layer, layer : layer + columns],
            used_N=table[layer, :columns],
            queries_N1=table[0, : columns + 1],
            most_queries=1,
            longest=longest,
        )
        decoding.attention(q, [(k, v, ranges)])
    assert {name: len(variants) for name, variants in seen.items()} == {
        "partial_attention_kernel": 1,
        "merge_kernel": 3,  # by how many parts there are, in powers of two
    }


def test_fetching_blocks_compiles_nothing_at_new_numbers_of_them(monkeypatch):
    seen = {}
    monkeypatch.setattr(swap, "kernels_for", lambda x, module: Recorded(seen))
    rows = torch.zeros(64, 32, dtype=torch.int64)
    for copies, count in ((1, 1), (2, 16), (3, 17)):
        places = torch.arange(count)
        swap.BlockCopies([rows] * copies, [rows] * copies).fetch(places, places)
    assert len(seen["fetch_blocks_kernel"]) == 1


def test_kernels_are_sought_only_where_there_is_a_gpu():
    assert not modules.kernels_on("cpu")
