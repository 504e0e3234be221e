"""What a model's folder holds, told from its files' names and first bytes: weights, an adapter, pointers.

The fingerprint of a folder is of what its files hold, wherever and whenever they were copied.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedConfig

from pipeline.checkpoints.safetensor_files import (
    Stored,
    are_equal,
    is_lfs_pointer,
    lfs_message,
    read_header,
    sampled,
)
from pipeline.errors import ModelError
from pipeline.values.json_files import AGAIN, object_or_nothing, read_object

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
ADAPTER = "adapter_config.json"
# what is read of a folder beside its weights, and decides answers as they do
SETTINGS = ("config.json", "generation_config.json")
TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
)
FINGERPRINT_PREFIX = "content:"
WHOLE_BYTES = 64 << 20  # of weights, up to which all are read for the fingerprint


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """The files that transformers reads a model's weights from; `named` are an index's tensors, by file."""

    folder: Path
    files: tuple[Path, ...]
    named: dict[str, str]

    def stored(self) -> dict[str, Stored]:
        """All tensors by name. Raises ValueError for damaged files, and for a name with two contents."""
        found: dict[str, Stored] = {}
        for file in self.files:
            for each in read_header(file):
                before = found.setdefault(each.name, each)
                if before is not each and not are_equal(before, each):
                    raise ValueError(
                        f"{each.name} stands in {before.file.name} and in {file.name}, with different values:"
                        " the folder mixes two models; download it again into an empty one"
                    )
        return found


def check_files(model: str, folder: Path) -> None:
    """Raise ModelError where what a folder holds is not a model: an adapter, or pointers to files."""
    for name in (*SETTINGS, *TOKENIZER, SINGLE, INDEX):
        if is_lfs_pointer(folder / name):
            raise ModelError(f"model folder {model}: {lfs_message(folder / name)}")
    if not (folder / ADAPTER).is_file():
        return
    kind, base = _adapter(folder / ADAPTER)
    if not _has_full_weights(folder):
        raise ModelError(
            f"model folder {model} is a {kind} adapter of {base}: give that model as --model, and "
            f"this folder as --adapter"
        )


def folder_notes(folder: Path) -> list[str]:
    """What a user should know of files that are not used."""
    notes = []
    if (folder / ADAPTER).is_file():
        kind, base = _adapter(folder / ADAPTER)
        notes.append(
            f"the {kind} adapter of {base} beside the weights of {folder} is not applied: --adapter {folder} "
            "does that"
        )
    if (folder / SINGLE).is_file() and (folder / INDEX).is_file():
        notes.append(f"{folder} holds {SINGLE}, which is used, and {INDEX}, which is not")
    return notes


def _adapter(path: Path) -> tuple[str, str]:
    """Its kind and its model, as far as its configuration tells."""
    about = object_or_nothing(path)
    kind, base = about.get("peft_type"), about.get("base_model_name_or_path")
    return "LoRA" if kind in (None, "LORA") else "PEFT", str(base or "another model")


def _has_full_weights(folder: Path) -> bool:
    names = [path.name for path in folder.iterdir()]
    return any(
        (name.endswith(".safetensors") and not name.startswith("adapter_"))
        or name.startswith("pytorch_model")
        or name == INDEX
        for name in names
    )


def find_checkpoint(folder: Path, config: PreTrainedConfig) -> Checkpoint:
    """The weights of a folder as transformers finds them. Raises ValueError where it would not."""
    explicit = getattr(config, "transformers_weights", None)
    if isinstance(explicit, str) and Path(explicit).name != explicit:
        raise ValueError(f"its config.json has transformers_weights {explicit!r}, which is no file's name")
    path = _first_file(folder, (explicit,) if isinstance(explicit, str) else (SINGLE, INDEX))
    if any(
        re.match(r"shard-\d{5}-model-\d{5}-of-\d{5}\.safetensors$", each.name) for each in folder.iterdir()
    ):
        raise ValueError("it holds a distributed checkpoint (shard-...): save it as one model first")
    if not path.name.endswith(".json"):
        return Checkpoint(folder=folder, files=(path,), named={})
    named = _weight_map(path)
    files = tuple(folder / name for name in sorted(set(named.values())))
    gone = [file.name for file in files if not file.is_file()]
    if gone:
        raise ValueError(
            f"{first_of(gone)}, which {path.name} names, {'is' if len(gone) == 1 else 'are'} not there:"
            " download or copy the folder again"
        )
    return Checkpoint(folder=folder, files=files, named=named)


def _first_file(folder: Path, names: tuple[str, ...]) -> Path:
    for name in names:
        if (folder / name).is_file():
            return folder / name
    links = [name for name in names if (folder / name).is_symlink()]
    if links:
        raise ValueError(f"{links[0]} is a link to a file that is not there: copy the folder with its files")
    there = sorted(path.name for path in folder.glob("*.safetensors"))
    if any("-of-" in name for name in there):
        raise ValueError(f"{first_of(there)} are there without {INDEX}: download or copy that file too")
    raise ValueError(f"it holds {first_of(there)} but no {' or '.join(names)}: rename or convert its weights")


def _weight_map(path: Path) -> dict[str, str]:
    """File names by tensor, of an index."""
    index = read_object(path)
    named = index.get("weight_map")
    if not isinstance(named, dict) or not named or not all(isinstance(file, str) for file in named.values()):
        raise ValueError(f"{path.name} is no index of weights: {AGAIN}")
    if not isinstance(index.get("metadata"), dict):
        raise ValueError(f'{path.name} lacks "metadata", without which it is not read: add "metadata": {{}}')
    return named


def first_of(names: list[str], most: int = 3) -> str:
    """Names for a message."""
    return ", ".join([*names[:most], *(["..."] if len(names) > most else [])])


def folder_fingerprint(checkpoint: Checkpoint) -> str:
    """A hash of configuration, tokenizer and weights.

    Of large weights all headers are read, and a sample of each tensor (`sampled`): some thousandths of the
    whole, so that a model of tens of GB takes about a second and another training of it differs.
    """
    digest = hashlib.sha256()
    for name in (*SETTINGS, *TOKENIZER):
        path = checkpoint.folder / name
        if path.is_file():
            _add(digest, name, [path.read_bytes()])
    whole = sum(path.stat().st_size for path in checkpoint.files) <= WHOLE_BYTES
    for path in checkpoint.files:
        _add(digest, path.name, [path.read_bytes()] if whole else _sample(path))
    return FINGERPRINT_PREFIX + digest.hexdigest()


def _sample(path: Path) -> Iterable[bytes]:
    """A file's size, its header, and bytes of each of its tensors."""
    yield path.stat().st_size.to_bytes(8, "little")
    for stored in sorted(read_header(path), key=lambda each: each.name):
        yield repr((stored.name, stored.dtype, stored.shape, stored.begin)).encode()
        yield from sampled(stored)


def _add(digest: hashlib._Hash, name: str, pieces: Iterable[bytes]) -> None:
    """Each file as a hash of its own, so that no bytes can pass from one to the next."""
    own = hashlib.sha256()
    for piece in pieces:
        own.update(piece)
    digest.update(f"{name} {own.hexdigest()}\n".encode())
