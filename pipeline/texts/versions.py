"""Versions of installed packages."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

UNKNOWN = "unknown (not installed)"  # of a copied folder, say, that was never installed


def version_of(package: str) -> str:
    """The version that is installed, or `UNKNOWN`."""
    try:
        return version(package)
    except PackageNotFoundError:
        return UNKNOWN
