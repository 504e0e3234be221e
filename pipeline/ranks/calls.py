"""Calls on their way from the rank that leads to those that follow.

What exists on every rank is not sent but named: devices, the function that looks whether to go on, and
objects that each rank has made in an earlier call.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

DEVICE, TENSOR, TWIN, CHECK = "device", "tensor", "twin", "check"


def packed(message: object, number_of: Callable[[object], int | None], check: object) -> bytes:
    """`number_of` says which of the objects of every rank one is, if it is one."""
    target = io.BytesIO()
    pickler = _CallPickler(target, protocol=pickle.HIGHEST_PROTOCOL)
    pickler.number_of, pickler.check = number_of, check
    pickler.dump(message)
    return target.getvalue()


def unpacked(message: bytes, twins: dict[int, Any], check: object, device: torch.device) -> Any:
    """The same on another rank, with its own objects and its own device."""
    unpickler = _CallUnpickler(io.BytesIO(message))
    unpickler.twins, unpickler.check, unpickler.device = twins, check, device
    return unpickler.load()


class _CallPickler(pickle.Pickler):
    number_of: Callable[[object], int | None]
    check: object

    def persistent_id(self, obj: object) -> tuple[str, Any] | None:
        if isinstance(obj, Tensor):
            return TENSOR, obj.cpu().numpy()
        if isinstance(obj, torch.device):
            return DEVICE, None
        if obj is self.check:
            return CHECK, None
        number = self.number_of(obj)
        return None if number is None else (TWIN, number)


class _CallUnpickler(pickle.Unpickler):
    twins: dict[int, Any]
    check: object
    device: torch.device

    def persistent_load(self, named: tuple[str, Any]) -> Any:
        kind, value = named
        if kind == TENSOR:
            return torch.from_numpy(value).to(self.device)
        if kind == TWIN:
            return self.twins[value]
        return self.device if kind == DEVICE else self.check
