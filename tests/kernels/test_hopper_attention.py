"""Block-sparse attention for Hopper, as far as it can be seen without one: see also tests/gpu."""

from __future__ import annotations

import pytest

pytest.importorskip("triton.experimental.gluon")
try:
    from pipeline.kernels.blocks import hopper_attention
except ImportError as error:
    pytest.skip(str(error), allow_module_level=True)

SHARED_MEMORY = 227 << 10  # bytes that a program may have on Hopper


def compiled(head_dim, *, listed, sinks, rounded):
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.experimental.gluon._runtime import GluonASTSource

    kernel = hopper_attention.hopper_kernel
    tile, stages = hopper_attention.tiles_of(head_dim, rounded=rounded)
    constants = {"LISTED": listed, "SINKS": sinks, "HEAD_DIM": head_dim, "BLOCK": 128}
    constants |= {"TILE": tile, "STAGES": stages}
    tiles = {"q": (128, "bf16", 16), "k": (tile, "bf16", 16), "v": (tile, "bf16", 16)}
    if rounded:
        tiles["k"] = (tile, "i8", 8)
    types = {}
    for name, (rows, dtype, bits) in tiles.items():
        layout = hopper_attention.NVMMASharedLayout(min(128, head_dim * bits // 8), bits, 2)
        types[name] = f"tensordesc<{dtype}[{rows}, {head_dim}],{layout!r}>"
    types |= {"out": "*bf16", "indices": "*i32", "counts": "*i32", "breached": "*i32", "scale": "fp32"}
    types |= {
        "taken": "*i32",
        "sinks": "*fp32" if sinks else "*i32",
        "factors": "*fp32" if rounded else "*i32",
    }
    signature = {
        name: "constexpr" if name in constants else types.get(name, "i32") for name in kernel.arg_names
    }
    places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    source = GluonASTSource(kernel, signature, places)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})


@pytest.mark.parametrize(
    ("head_dim", "listed", "sinks", "rounded"),
    [
        (128, True, False, False),
        (128, True, False, True),
        (64, False, True, False),
        (256, True, False, False),
    ],
)
def test_it_compiles_so_that_products_and_softmax_overlap(head_dim, listed, sinks, rounded):
    made = compiled(head_dim, listed=listed, sinks=sinks, rounded=rounded)
    assert made.metadata.shared <= SHARED_MEMORY
    assert ".local" not in made.asm["ptx"]
    # the values of a tile are still being added while the next one's weights are made
    assert made.asm["ptx"].count("wgmma.wait_group.sync.aligned 1") == 2
    assert (".s32.s8.s8" in made.asm["ptx"]) == rounded
