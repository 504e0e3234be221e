"""What the ranks of one model tell each other: sums of their parts, and what the first of them decides.

A rank is a process with a device of its own and a share of each layer. All ranks call the same functions here
in the same order, with tensors of the same shapes.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.ranks.shares import Share

BACKENDS = {"cuda": "nccl", "cpu": "gloo"}
# torch 2.13's name of it, and that before
_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
LONGEST_WAIT = timedelta(days=7)  # of one rank for another: one that has died is seen otherwise


@dataclass(kw_only=True, eq=False)
class Ranks:
    """One rank among all; the others are reached after `connect`."""

    rank: int
    count: int
    device: torch.device
    timer: Callable[[Callable[[], Any]], Any] | None = None  # which does each sum where sums are timed
    _on_their_way: list[tuple[Tensor, Any]] = field(default_factory=list, repr=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)
    _connected: bool = False

    @property
    def share(self) -> Share:
        return Share(rank=self.rank, count=self.count)

    @property
    def leads(self) -> bool:
        """Whether this is the rank that decides."""
        return self.rank == 0

    def connect(self, store: str) -> None:
        """Meet the other ranks by a file that they all see. Raises RuntimeError where that fails."""
        dist.init_process_group(
            BACKENDS[self.device.type],
            store=dist.FileStore(store, self.count),
            rank=self.rank,
            world_size=self.count,
            timeout=LONGEST_WAIT,
            device_id=self.device if self.device.type == "cuda" else None,
        )
        self._connected = True

    def abort(self) -> None:
        """Give up what is on its way; whoever waits for it, in any thread, goes on or has an error."""
        with self._lock:
            if self._connected:
                self._connected = False
                if self.device.type == "cuda":
                    dist.distributed_c10d._abort_process_group()
                else:
                    dist.destroy_process_group()

    def sum_(self, x: Tensor, *, later: bool = False) -> Tensor:
        """Replace each rank's tensor, contiguous, by the sum of all; `later` lets other work go on before.

        Then nobody may read or write the tensor before `settle`.
        """
        if later and self.timer is None:
            self._on_their_way.append((x, dist.all_reduce(x, async_op=True)))
            return x
        add = partial(dist.all_reduce, x)
        add() if self.timer is None else self.timer(add)
        return x

    def settle(self, x: Tensor | None = None) -> None:
        """Have what is queued from now on wait for sums on their way to this memory; None: for all."""
        waiting = self._on_their_way
        if not waiting:
            return
        self._on_their_way = []
        for total, work in waiting:
            if x is None or _overlap(total, x):
                work.wait()
            else:
                self._on_their_way.append((total, work))

    def mean(self, x: Tensor) -> Tensor:
        """The mean of the ranks' tensors, which are overwritten."""
        return self.sum_(x).div_(self.count)

    def largest(self, x: Tensor) -> Tensor:
        """Elementwise; the ranks' tensors are overwritten."""
        dist.all_reduce(x, dist.ReduceOp.MAX)
        return x

    def least(self, x: Tensor) -> Tensor:
        """Elementwise; the ranks' tensors are overwritten."""
        dist.all_reduce(x, dist.ReduceOp.MIN)
        return x

    def all(self, is_so: bool) -> bool:
        """Whether something is so on all ranks; the host waits for them."""
        return bool(self.least(torch.tensor([int(is_so)], device=self.device)).item())

    def from_first_(self, x: Tensor) -> Tensor:
        """Replace each rank's tensor, contiguous, by that of the rank that leads."""
        dist.broadcast(x, 0)
        return x

    def joined(self, part_BN: Tensor) -> Tensor:
        """(B, count * N) of the ranks' (B, N), side by side in the order of the ranks."""
        rows, columns = part_BN.shape
        parts_XN = part_BN.new_empty(self.count * rows, columns)
        _gather(parts_XN, part_BN.contiguous())
        return parts_XN.view(self.count, rows, columns).transpose(0, 1).reshape(rows, -1)


def _overlap(one: Tensor, other: Tensor) -> bool:
    """Whether two contiguous tensors share memory."""
    first, second = one.data_ptr(), other.data_ptr()
    return first < second + other.nbytes and second < first + one.nbytes
