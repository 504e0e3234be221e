"""Block-sparse attention for Hopper, as far as it can be seen without one: see also tests/gpu."""

from __future__ import annotations

import pytest

pytest.importorskip("triton.experimental.gluon")
try:
    from pipeline.kernels.blocks import hopper_attention
except ImportError as error:
    pytest.skip(str(error), allow_module_level=True)

SHARED_MEMORY = 227 << 10  # bytes that a program may have on Hopper


def compiled(head_dim, *, listed, sinks):
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.experimental.gluon._runtime import GluonASTSource

    kernel = hopper_attention.hopper_kernel
    tile, stages = hopper_attention.tiles_of(head_dim)
    constants = {"LISTED": listed, "SINKS": sinks, "HEAD_DIM": head_dim, "BLOCK": 128}
    constants |= {"TILE": tile, "STAGES": stages}
    layout = repr(hopper_attention.NVMMASharedLayout(128, 16, 2))
    rows = {"q": 128, "k": tile, "v": tile}
    types = {name: f"tensordesc<bf16[{n}, {head_dim}],{layout}>" for name, n in rows.items()}
    types |= {"out": "*bf16", "indices": "*i32", "counts": "*i32", "breached": "*i32", "scale": "fp32"}
    types["sinks"] = "*fp32" if sinks else "*i32"
    signature = {
        name: "constexpr" if name in constants else types.get(name, "i32") for name in kernel.arg_names
    }
    places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    source = GluonASTSource(kernel, signature, places)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})


@pytest.mark.parametrize(
    ("head_dim", "listed", "sinks"), [(128, True, False), (64, False, True), (256, True, False)]
)
def test_it_compiles_so_that_products_and_softmax_overlap(head_dim, listed, sinks):
    made = compiled(head_dim, listed=listed, sinks=sinks)
    assert made.metadata.shared <= SHARED_MEMORY
    assert ".local" not in made.asm["ptx"]
    # the values of a tile are still being added while the next one's weights are made
    assert made.asm["ptx"].count("wgmma.wait_group.sync.aligned 1") == 2
