"""Whether a model's weights fit on a device, and what to do where they do not."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch

from pipeline.errors import ModelError, first_line
from pipeline.families.sharding import FLAG
from pipeline.texts.words import either


@dataclass(frozen=True, kw_only=True)
class Remedies:
    """What a user may give so that less memory of a device is needed.

    Nothing that is in use already, and nothing that the method, the model, the device or a flag excludes.
    """

    weights: tuple[str, ...] = ()  # flags that make the model's smaller
    documents: tuple[str, ...] = ()  # flags that make what a document needs smaller
    more_devices: str | None = None  # the flag that divides the model among more

    def for_weights(self, itemsize: int) -> list[str]:
        """Of a model whose data type has numbers of so many bytes, without dividing it."""
        smaller = ["--dtype bfloat16"] if itemsize > torch.bfloat16.itemsize else []
        return [*smaller, *self.weights, "a smaller model"]

    def for_document(self, itemsize: int) -> list[str]:
        """Of a document beside such a model."""
        more = [] if self.more_devices is None else [self.more_devices]
        return [*self.documents, *more, *self.for_weights(itemsize)]


NO_REMEDIES = Remedies()


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes on a device: what a model's weights hold, what they need while they are made, what is free."""

    held: int
    most: int
    free: int
    where: str
    ranks: int = 1  # devices, of each of which all this is said
    draft: int = 0  # of what is held, the weights of a draft model

    def __str__(self) -> str:
        each = "" if self.ranks == 1 else f" each of {self.ranks} devices,"
        draft = f", {self.draft / 1e9:.3g} of them the draft model's," if self.draft else ""
        held, free = f"{self.held / 1e9:.3g} GB{draft}", f"{self.free / 1e9:.3g} GB"
        return f"weights take {held} of {free} free on{each} {self.where}"

    def with_draft(self, draft: Memory) -> Memory:
        """The same with the weights of a draft model, which are made first."""
        held, most = self.held + draft.held, max(draft.most, draft.held + self.most)
        return replace(self, held=held, most=most, draft=draft.held)

    def check(self, model: str, ways: Sequence[str], enough: Callable[[], int | None]) -> None:
        """Raise ModelError where the weights cannot fit, with `ways` to need less.

        `enough` says among how many devices they fit, if the model can be divided among so many.
        """
        if self.most > self.free:
            needed, free = (f"{bytes_ / 1e9:.3g} GB" for bytes_ in (self.most, self.free))
            count = enough()
            divide = "" if count is None else f"; {FLAG} {count} divides it among {count} such GPUs"
            raise ModelError(
                f"model {model} does not fit on {self.where}: loading its weights takes {needed}, and {free}"
                f" are free; take {either(ways)}{divide}"
            )


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, on a device or on the host, for which torch has no class of errors."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM  # files are mapped into memory
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator: can't allocate memory" in str(error)


@contextmanager
def fits(name: str, device: torch.device | None = None) -> Iterator[None]:
    """Raise ModelError for a model that is being loaded where memory runs out, the host's or its device's.

    Without a device that its memory ran out is left to a caller who knows it.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        if device is None:
            raise
        raise ModelError(f"model {name} does not fit on {device}: {first_line(error)}") from error
    except (RuntimeError, MemoryError, OSError) as error:
        if not is_out_of_memory(error):
            raise
        raise ModelError(
            f"model {name!r} cannot be loaded: the memory of this machine ran out ({first_line(error)}); "
            "end other programs, or take a smaller model"
        ) from error
