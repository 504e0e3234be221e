"""marsinfer: batch answers over long documents with token-pruned prefill.

    from pipeline import run_batch, load_model

Names are loaded on first use, so that importing the package costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.batch import run_batch
    from pipeline.config import BatchConfig
    from pipeline.errors import MarsError
    from pipeline.model.loading import load_model
    from pipeline.pruning.registry import make_method

_WHERE = {
    "BatchConfig": "pipeline.config",
    "MarsError": "pipeline.errors",
    "load_model": "pipeline.model.loading",
    "make_method": "pipeline.pruning.registry",
    "run_batch": "pipeline.batch",
}
__all__ = ["BatchConfig", "MarsError", "load_model", "make_method", "run_batch"]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'pipeline' has no attribute {name!r}")
    return getattr(import_module(_WHERE[name]), name)
