"""What kernels in Triton share. Importing this module fails without Triton."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def larger(a, b):  # type: ignore[no-untyped-def]
    """To be given to `tl.reduce`, as `plus`."""
    return tl.maximum(a, b)


@triton.jit
def plus(a, b):  # type: ignore[no-untyped-def]
    return a + b
