"""Models of the hub: which commit a name stands for, and the files of it that a model needs, in the cache.

A name is resolved once. All files are of that commit, so that a branch that moves meanwhile mixes nothing.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple, TypeVar

from huggingface_hub import HfApi, constants, get_token, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import (
    DisabledRepoError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from pipeline.checkpoints.folder import ADAPTER, INDEX, SETTINGS, SINGLE, TOKENIZER
from pipeline.errors import ModelError, first_line
from pipeline.texts.redaction import without_secrets
from pipeline.values.json_files import object_or_nothing

T = TypeVar("T")

MORE_TOKENIZERS = ("vocab.txt", "spiece.model", "tekken.json", "tiktoken.model")
MORE_TEMPLATES = re.compile(r"additional_chat_templates/[^/]+\.jinja")
CODE = re.compile(r"[^/]+\.py")
PICKLED = (".bin", ".pt", ".pth", ".ckpt")
PASSING = (408, 429, 500, 502, 503, 504)  # states of a hub that is busy or ill
WAITS_S = (1, 2, 4)  # before a request is tried again
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# what is raised where no answer came: of the client that the hub's library has, whichever that is
NO_ANSWER = HfHubHTTPError.__bases__[0]
WORTH_A_NOTE_BYTES = 100_000_000


class HubFile(NamedTuple):
    """A file as the hub lists it; `blob` is the name under which the cache keeps its content."""

    size: int
    blob: str


@dataclass(frozen=True, kw_only=True)
class HubModel:
    """A commit of a model on the hub; its `folder`, in the cache, has what is needed beside weights."""

    name: str
    revision: str  # that was resolved
    commit: str
    folder: Path
    files: Mapping[str, HubFile]  # all that the commit has, by name; none where only the cache was asked
    notes: tuple[str, ...] = ()

    @classmethod
    def find(cls, name: str, revision: str | None, *, with_code: bool = False) -> HubModel:
        """Resolve a name, and fetch what is needed beside weights: with its code, if that may run.

        Where the hub gives nothing, the cache does, if it has all of the model. Raises ModelError.
        """
        revision = revision or constants.DEFAULT_REVISION
        cached = cls._cached(name, revision)
        whole = cached is not None and cached.has_weights
        if cached is not None and whole and revision == cached.commit:
            return cached
        try:
            commit, files = _listed(name, revision)
        except Exception as error:
            why = _why(name, revision, error)
            if cached is None or not whole or isinstance(error, RevisionNotFoundError):
                raise ModelError(_not_had(name, why, cached)) from error
            told = f"{name} is taken from the cache, at commit {cached.commit[:12]}, as {why}"
            return replace(cached, notes=(told,))
        _check_files(name, files)
        folder = _fetch(name, commit, files, _small(files, with_code=with_code))
        found = cls(name=name, revision=revision, commit=commit, folder=folder, files=files)
        found._remember()
        return replace(found, notes=found._size_notes())

    @classmethod
    def _cached(cls, name: str, revision: str) -> HubModel | None:
        """What the cache has for a revision, which need not be all of it."""
        try:
            path = try_to_load_from_cache(name, "config.json", revision=revision)
        except HFValidationError as error:
            raise ModelError(f"{name!r} is no hub id (owner/name): {first_line(error)}") from error
        if not isinstance(path, str):
            return None
        folder = Path(path).parent
        return cls(name=name, revision=revision, commit=folder.name, folder=folder, files={})

    @property
    def has_weights(self) -> bool:
        return not lacking_weights(self.folder)

    def fetch_weights(self) -> bool:
        """Fetch the weights that the cache lacks, and return whether there were any. Raises ModelError."""
        lacking = lacking_weights(self.folder)
        there = [name for name in lacking if name in self.files]
        if there:
            _fetch(self.name, self.commit, self.files, there)
            self._remember()
        return bool(there)

    def _remember(self) -> None:
        """Note in the cache which commit the revision is, once it has all of it: for when the hub is away."""
        if self.revision == self.commit or not self.has_weights:
            return
        path = self.folder.parents[1] / "refs" / self.revision
        with suppress(OSError):  # a cache that is only read
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_name(f"{path.name}.{os.getpid()}.partial")
            temporary.write_text(self.commit, encoding="utf-8")
            temporary.replace(path)

    def _size_notes(self) -> tuple[str, ...]:
        lacking = [name for name in lacking_weights(self.folder) if name in self.files]
        size = sum(self.files[name].size for name in lacking)
        if size < WORTH_A_NOTE_BYTES:
            return ()
        return (f"{size / 1e9:.1f} GB of {self.name} are downloaded from the hub before the first row",)


def lacking_weights(folder: Path) -> list[str]:
    """The files of weights that a folder of the cache does not have, by its configuration and index."""
    explicit = object_or_nothing(folder / "config.json").get("transformers_weights")
    index = folder / (explicit if isinstance(explicit, str) else INDEX)
    if index.suffix == ".json" and index.is_file():
        named = object_or_nothing(index).get("weight_map")
        names = sorted(set(named.values())) if isinstance(named, dict) else []
    else:
        names = [index.name if index.suffix != ".json" else SINGLE]
    return [name for name in names if not (folder / name).is_file()]


def _listed(name: str, revision: str) -> tuple[str, dict[str, HubFile]]:
    """The commit that a revision is now, and its files."""
    timeout_s = constants.HF_HUB_ETAG_TIMEOUT
    ask = partial(HfApi().model_info, name, revision=revision, files_metadata=True, timeout=timeout_s)
    info = _patiently(ask)
    if info.sha is None:
        raise ValueError("it names no commit")
    files = {
        each.rfilename: HubFile(each.size or 0, (each.lfs.sha256 if each.lfs else each.blob_id) or "")
        for each in info.siblings or ()
    }
    return info.sha, files


def _check_files(name: str, files: Iterable[str]) -> None:
    """Raise ModelError for what cannot be a model, before anything is downloaded."""
    names = set(files)
    if "config.json" not in names:
        kinds = " (GGUF files are read from a local path)" if any(n.endswith(".gguf") for n in names) else ""
        raise ModelError(f"model {name!r} has no config.json on the hub{kinds}")
    if ADAPTER not in names and not any(each.endswith(".safetensors") for each in names):
        pickled = any(each.endswith(PICKLED) for each in names)
        reason = "only pickled weights, which can run code" if pickled else "no weights"
        raise ModelError(f"model {name!r} has {reason} on the hub: name one with safetensors")


def _small(files: Iterable[str], *, with_code: bool) -> list[str]:
    """The files that are needed beside the weights, with the index of those that are in several."""
    names = set(files)
    wanted = {*SETTINGS, *TOKENIZER, *MORE_TOKENIZERS, *(() if SINGLE in names else (INDEX,))}
    if not any(_is_weights(each) for each in names):
        wanted.add(ADAPTER)  # which says what it is of
    wanted |= {each for each in names if MORE_TEMPLATES.fullmatch(each)}
    wanted |= {each for each in names if with_code and CODE.fullmatch(each)}
    return sorted(wanted & names)


def _is_weights(name: str) -> bool:
    return name.endswith(".safetensors") and not name.startswith("adapter_")


def _fetch(name: str, commit: str, files: Mapping[str, HubFile], names: list[str]) -> Path:
    """Bring files of a commit into the cache, whose folder for it is returned. Raises ModelError.

    One after the other and in this thread, so that an interrupt ends it at once.
    """
    cache = Path(constants.HF_HUB_CACHE)
    _check_room(name, cache, [files[each] for each in names])
    try:
        for each in names:
            _patiently(partial(hf_hub_download, name, each, revision=commit))
    except OSError as error:
        if error.errno in NO_ROOM:
            raise ModelError(_no_room(name, cache, str(error.strerror).lower())) from error
        raise ModelError(f"model {name!r} cannot be downloaded: {_why(name, commit, error)}") from error
    except Exception as error:
        raise ModelError(f"model {name!r} cannot be downloaded: {_why(name, commit, error)}") from error
    return _kept(name, cache) / "snapshots" / commit


def _kept(name: str, cache: Path) -> Path:
    """Where the cache keeps a model."""
    return cache / f"models--{name.replace('/', '--')}"


def _check_room(name: str, cache: Path, files: Iterable[HubFile]) -> None:
    """Raise ModelError where the disk has no room for what the cache lacks."""
    blobs = _kept(name, cache) / "blobs"
    needed = sum(file.size for file in files if not (blobs / file.blob).is_file())
    place = next(folder for folder in (cache, *cache.absolute().parents) if folder.is_dir())
    free = shutil.disk_usage(place).free
    if needed > free:
        how = f"{needed / 1e9:.1f} GB are needed, {free / 1e9:.1f} are free"
        raise ModelError(_no_room(name, cache, how))


def _no_room(name: str, cache: Path, how: str) -> str:
    return (
        f"model {name!r} cannot be downloaded: no room in {cache} ({how}); free some, or set HF_HUB_CACHE "
        "to a folder on another disk"
    )


def _patiently(act: Callable[[], T]) -> T:
    """What `act` returns; it is tried again where the hub is busy or a connection broke."""
    for wait_s in WAITS_S:
        try:
            return act()
        except Exception as error:
            if not _passes(_cause(error)):
                raise
        time.sleep(wait_s)
    return act()


def _passes(error: BaseException) -> bool:
    """Whether the same request may succeed a little later."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status is not None:
        return status in PASSING
    return isinstance(error, NO_ANSWER) and "Connect" not in type(error).__name__


def _cause(error: BaseException) -> BaseException:
    """The error behind one that says that a file is not in the cache either."""
    while isinstance(error, LocalEntryNotFoundError) and error.__cause__ is not None:
        error = error.__cause__
    return error


def _why(name: str, revision: str, error: BaseException) -> str:
    """Why the hub gives nothing, and what to do, as the end of a sentence."""
    error, hub = _cause(error), without_secrets(constants.ENDPOINT)
    has_token = get_token() is not None
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, OfflineModeIsEnabled) or constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    if isinstance(error, GatedRepoError):
        remedy = "with the account of your token" if has_token else "and set HF_TOKEN to a token of yours"
        return f"it is gated: accept its licence at {hub}/{name}, {remedy}"
    if isinstance(error, DisabledRepoError):
        return "the hub has disabled it"
    if isinstance(error, RevisionNotFoundError):
        return f"the hub has no revision {revision!r} of it"
    if isinstance(error, RepositoryNotFoundError):
        private = "your token may not read it" if has_token else "HF_TOKEN is not set"
        return f"the hub has no model of this name, or it is private and {private}"
    if status in (401, 403):
        return f"the hub refuses your token (HF_TOKEN): {first_line(error).strip()}"
    if status is not None:
        return f"the hub answers with an error, {status}; try again later"
    if isinstance(error, NO_ANSWER):
        return f"the hub ({hub}) cannot be reached: {first_line(error)}"
    return f"{type(error).__name__}: {first_line(error).strip()}"


def _not_had(name: str, why: str, cached: HubModel | None) -> str:
    """That neither the hub nor the cache has a model."""
    place = constants.HF_HUB_CACHE
    lacking = [] if cached is None else lacking_weights(cached.folder)
    there = f"the cache, {place}, lacks its {lacking[0]}" if lacking else f"it is not in the cache, {place}"
    return f"model {name!r} cannot be had: {why}; {there}"
