"""Versions of installed packages, and the moment: what a result says that it was made with, and when."""

from __future__ import annotations

import platform
import time
from importlib.metadata import PackageNotFoundError, version

PACKAGES = ("marsinfer", "torch", "transformers", "tokenizers", "pyarrow")  # that results may depend on
UNKNOWN = "unknown (not installed)"  # of a copied folder, say, that was never installed


def version_of(package: str) -> str:
    """The version that is installed, or `UNKNOWN`."""
    try:
        return version(package)
    except PackageNotFoundError:
        return UNKNOWN


def versions() -> dict[str, str]:
    """Those of Python and of `PACKAGES`."""
    return {"python": platform.python_version(), **{name: version_of(name) for name in PACKAGES}}


def timestamp() -> str:
    """The present moment in UTC, to the second."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
