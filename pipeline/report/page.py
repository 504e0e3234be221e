"""Pages that stand alone: one file, no network, and no script but our own."""

from __future__ import annotations

import base64
import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from pipeline.errors import ConfigError
from pipeline.outputs.replacing import is_page, refuse_foreign_file
from pipeline.storage.whole_file import writing
from pipeline.texts.shown import in_xml
from pipeline.texts.versions import version_of

TEMPLATES = Path(__file__).parent / "templates"


def render(template: str, scripts: Sequence[str] = (), **values: Any) -> str:
    """A page; all values are escaped. `scripts` names files put in as one script, allowed by its hash."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_without_controls,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["cut"] = cut
    code = "\n".join((TEMPLATES / name).read_text(encoding="utf-8") for name in scripts)
    return environment.get_template(template).render(
        policy=_policy(code), script=Markup(code), version=version_of("marsinfer"), **values
    )


def _without_controls(value: Any) -> Any:
    """What stands in the page, of whatever type; markup stays so."""
    return type(value)(in_xml(value)) if isinstance(value, str) else value


def cut(text: str | None, length: int) -> str:
    """A text as far as it is worth its place in a page."""
    text = "" if text is None else text
    return text if len(text) <= length else text[: length - 1] + "…"


def _policy(code: str) -> str:
    """What the page may load: nothing but what stands in it."""
    parts = ["default-src 'none'", "style-src 'unsafe-inline'", "img-src data:", "base-uri 'none'"]
    parts.append("form-action 'none'")
    if code:
        digest = base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()
        parts.append(f"script-src 'sha256-{digest}'")
    return "; ".join(parts)


def check_page(path: str, given: Sequence[str]) -> None:
    """Raise ConfigError, before anything is read, for a page that could not or should not be written."""
    file = Path(path)
    if file.suffix.lower() not in (".html", ".htm"):
        raise ConfigError(f"--html {path}: name an .html file")
    if file.is_dir() or not file.absolute().parent.is_dir():
        raise ConfigError(f"--html {path}: there is no such folder, or it is one itself")
    for name in given:
        if file.exists() and Path(name).exists() and os.path.samefile(file, name):
            raise ConfigError(f"--html {path} is also an output to report on; name another file")
    refuse_foreign_file("--html", file, is_page)


def write_page(path: str, page: str) -> None:
    """Replace the page whole; StorageError if it cannot be written."""
    with writing(Path(path)) as file:
        file.write(page.encode(errors="replace"))
