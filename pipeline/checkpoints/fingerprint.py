"""The fingerprint of a model's folder: of what its files hold, wherever and whenever they were copied."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

from pipeline.checkpoints.folder import SETTINGS, TOKENIZER, Checkpoint
from pipeline.checkpoints.safetensor_files import read_header, sampled

PREFIX = "content:"
WHOLE_BYTES = 64 << 20  # of weights, up to which all are read


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
    return PREFIX + digest.hexdigest()


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
