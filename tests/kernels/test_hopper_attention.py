"""Block-sparse attention for Hopper, as far as it can be seen without one: see also tests/gpu."""

from __future__ import annotations

import pytest
import torch

from pipeline.kernels.fused import FP8_MAX

pytest.importorskip("triton.experimental.gluon")
try:
    from pipeline.kernels.blocks import hopper_attention, hopper_rounded_kernel
except ImportError as error:
    pytest.skip(str(error), allow_module_level=True)

SHARED_MEMORY = 227 << 10  # bytes that a program may have on Hopper


def compiled(kernel, tiles, types, constants):
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.experimental.gluon._runtime import GluonASTSource

    bits = {"bf16": 16, "i8": 8, "fp8e4nv": 8}
    types = {"out": "*bf16", "indices": "*i32", "counts": "*i32", "breached": "*i32", "taken": "*i32"} | types
    for name, (rows, columns, dtype) in tiles.items():
        layout = hopper_attention.NVMMASharedLayout(min(128, columns * bits[dtype] // 8), bits[dtype], 2)
        types[name] = f"tensordesc<{dtype}[{rows}, {columns}],{layout!r}>"
    signature = {
        name: "constexpr" if name in constants else types.get(name, "i32") for name in kernel.arg_names
    }
    places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    source = GluonASTSource(kernel, signature, places)
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})
    assert made.metadata.shared <= SHARED_MEMORY
    assert ".local" not in made.asm["ptx"]
    # the products of one tile are still being made while the other products are waited for
    assert made.asm["ptx"].count("wgmma.wait_group.sync.aligned 1") == 2
    return made.asm["ptx"]


@pytest.mark.parametrize(
    ("head_dim", "listed", "sinks"), [(128, True, False), (64, False, True), (256, True, False)]
)
def test_it_compiles_so_that_products_and_softmax_overlap(head_dim, listed, sinks):
    tile, stages = hopper_attention.TILES[head_dim]
    constants = {"LISTED": listed, "SINKS": sinks, "HEAD_DIM": head_dim, "BLOCK": 128}
    constants |= {"TILE": tile, "STAGES": stages}
    tiles = {name: (rows, head_dim, "bf16") for name, rows in (("q", 128), ("k", tile), ("v", tile))}
    compiled(
        hopper_attention.hopper_kernel,
        tiles,
        {"scale": "fp32", "sinks": "*fp32" if sinks else "*i32"},
        constants,
    )


def test_that_of_eight_bits_compiles_likewise():
    constants = {"HEAD_DIM": 128, "BLOCK": 128, "STAGES": hopper_attention.ROUNDED_STAGES}
    tiles = {"q": (128, 128, "bf16"), "k": (128, 128, "i8"), "v": (128, 128, "fp8e4nv")}
    types = {"scale": "fp32", "factors": "*fp32", "spans": "*fp32", "middles": "*fp32"}
    ptx = compiled(hopper_attention.rounded_kernel, tiles, types, constants)
    assert ".s32.s8.s8" in ptx
    assert ".f32.e4m3.e4m3" in ptx


def test_units_that_are_not_told_leave_weights_within_e4m3():
    """What is taken off scores is a float32 of many millions, whose last bits move all weights of a query."""
    names = ("MOVED", "LIFT", "MOST_UNIT")
    moved, lift, most = (getattr(hopper_rounded_kernel, name).value for name in names)
    unit = torch.linspace(1e-6, most, 1 << 16)
    lowered = (moved * unit.double() - lift).float()
    largest = (moved * unit.double() - lowered).exp2()
    assert largest.max() <= FP8_MAX
    assert 2**lift <= largest.max()
