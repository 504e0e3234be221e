"""Whether a model's weights fit on a device, and what to do where they do not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from pipeline.errors import ModelError
from pipeline.families.sharding import FLAG


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes on a device: what a model's weights hold, what they need while they are made, what is free."""

    held: int
    most: int
    free: int
    where: str
    ranks: int = 1  # devices, of each of which all this is said

    def __str__(self) -> str:
        each = "" if self.ranks == 1 else f" each of {self.ranks} devices,"
        return f"weights take {self.held / 1e9:.3g} GB of {self.free / 1e9:.3g} GB free on{each} {self.where}"

    def check(self, model: str, enough: Callable[[], int | None]) -> None:
        """Raise ModelError where the weights cannot fit; `enough` says among how many devices they do."""
        if self.most > self.free:
            needed, free = (f"{bytes_ / 1e9:.3g} GB" for bytes_ in (self.most, self.free))
            count = enough()
            divide = "" if count is None else f"; {FLAG} {count} divides it among {count} such GPUs"
            raise ModelError(
                f"model {model} does not fit on {self.where}: loading its weights takes {needed}, and {free}"
                " are free; take a smaller model, another --dtype or, on a GPU that can, --linear-dtype fp8"
                + divide
            )
