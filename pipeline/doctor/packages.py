"""Which packages are installed, whether they can be imported, and what the missing ones would give."""

from __future__ import annotations

import platform
import sys
from importlib import import_module
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.doctor.findings import Finding, one_line

# whose modules have the same names
REQUIRED = (
    *("torch", "transformers", "accelerate", "pyarrow", "gguf", "numpy"),
    *("fsspec", "jinja2", "psutil", "rich", "safetensors", "typer"),
)


class Optional(NamedTuple):
    """A package that marsinfer runs without."""

    module: str
    extra: str | None  # of marsinfer, by which it is installed
    gives: str


OPTIONAL = {
    "triton": Optional("triton", None, "kernels of our own on a GPU; torch's CUDA builds bring it"),
    "fa3-fwd": Optional("fa3_fwd_interface", "hopper", "FlashAttention-3, for prefills on Hopper"),
    "flash-attn": Optional("flash_attn", "flash", "FlashAttention-2, for GPUs other than Hopper"),
    "ray": Optional("ray", "ray", "--engine ray: several GPUs and machines"),
    "s3fs": Optional("s3fs", "s3", "s3:// URLs"),
    "gcsfs": Optional("gcsfs", "gs", "gs:// URLs"),
    "pypdf": Optional("pypdf", "documents", "PDF files as documents"),
    "python-docx": Optional("docx", "documents", "DOCX files as documents"),
    "beautifulsoup4": Optional("bs4", "documents", "HTML files as documents"),
    "lxml": Optional("lxml", "documents", "HTML files as documents"),
    "aiohttp": Optional("aiohttp", "http", "https:// URLs"),
    "llguidance": Optional("llguidance", "structured", "--json-schema and --regex"),
    "matplotlib": Optional("matplotlib", "plot", "--plot of bench and calibrate"),
    "jsonschema": Optional("jsonschema", "structured", "answers held against JSON schemas"),
    "rapidfuzz": Optional("rapidfuzz", "quality", "check's edit similarity"),
    "rouge-score": Optional("rouge_score", "quality", "check's ROUGE-L"),
}


def marsinfer() -> Finding:
    """This package itself, and where it runs from."""
    place = str(Path(__file__).parents[2])
    try:
        installed = version("marsinfer")
    except PackageNotFoundError:
        text = f"not installed, run from {place}: --version and version checks have nothing to go by"
        return Finding("note", text, {"version": None, "path": place})
    return Finding("ok", f"{installed}, {place}", {"version": installed, "path": place})


def python() -> Finding:
    """The interpreter and the system."""
    facts = {
        "version": platform.python_version(),
        "executable": sys.executable,
        "platform": platform.platform(),
    }
    return Finding("ok", "{version}, {executable}, {platform}".format(**facts), facts)


def package(name: str) -> Finding:
    """One package: broken where it is installed and cannot be imported, or is needed and not there."""
    optional = OPTIONAL.get(name)
    try:
        installed = version(name)
    except PackageNotFoundError:
        if optional is None:
            text = "not installed, and nothing works without it: pip install marsinfer again"
            return Finding("broken", text, {"version": None})
        how = f" (pip install '.[{optional.extra}]')" if optional.extra else ""
        text = f"not installed; it gives {optional.gives}{how}"
        missing = {"version": None, "extra": optional.extra, "gives": optional.gives}
        return Finding("absent", text, missing)
    facts = {"version": installed}
    try:
        import_module(optional.module if optional else name)
    except (Exception, SystemExit) as error:  # noqa: BLE001 - whatever a package does when it is imported
        text = f"{installed} is installed, but cannot be imported: {one_line(error)}"
        return Finding("broken", text, facts)
    wanted = _wanted(name)
    if wanted is not None and not wanted.contains(installed, prereleases=True):
        return Finding("note", f"{installed}, and tested is {wanted}", facts)
    return Finding("ok", installed, facts)


def _wanted(name: str) -> Any:
    """The versions of a package that marsinfer asks for, as packaging's SpecifierSet, or None."""
    from packaging.requirements import Requirement

    try:
        lines = requires("marsinfer") or []
    except PackageNotFoundError:
        return None
    found = [Requirement(line) for line in lines]
    return next((wanted.specifier for wanted in found if wanted.name == name), None)
