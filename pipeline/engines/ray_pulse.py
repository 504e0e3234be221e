"""Whether Ray's own processes live: without them its library ends this process, without a word."""

from __future__ import annotations

import socket
import time
from dataclasses import dataclass, field
from typing import Any, Self

from pipeline.errors import KEPT, MarsError

EVERY_S = 0.2
ANSWERS_WITHIN_S = 5.0


@dataclass(kw_only=True)
class Pulse:
    """Of a process its name and its address: the path of a socket, or HOST:PORT."""

    addresses: dict[str, str]
    lost: str | None = None  # the one that is gone
    _next: float = field(default=0.0, repr=False)

    @classmethod
    def of(cls, ray: Any, *, is_own: bool) -> Self:
        """That of this machine's raylet, and of the server of a Ray that is the run's own.

        A cluster's server may come back, for which its raylets wait.
        """
        context = ray.get_runtime_context()
        here = next(node for node in ray.nodes() if node["NodeID"] == context.get_node_id())
        addresses = {"raylet": str(here["RayletSocketName"])}
        return cls(addresses=addresses | ({"gcs_server": context.gcs_address} if is_own else {}))

    def check(self, *, at_once: bool = False) -> None:
        """Raise MarsError where one of them is gone; looks now and then, or `at_once`."""
        now = time.monotonic()
        if at_once or now >= self._next:
            self._next = now + EVERY_S
            self.lost = next((name for name, address in self.addresses.items() if _is_dead(address)), None)
        if self.lost is not None:
            raise MarsError(
                f"Ray's {self.lost} on this machine has died, and the workers with it; {KEPT}; "
                "its messages are under /tmp/ray/session_latest/logs"
            )


def _is_dead(address: str) -> bool:
    """Whether nobody listens there; who is slow to answer is alive."""
    is_path = address.startswith("/")
    host, _, port = address.rpartition(":")
    with socket.socket(socket.AF_UNIX if is_path else socket.AF_INET) as probe:
        probe.settimeout(ANSWERS_WITHIN_S)
        try:
            probe.connect(address if is_path else (host, int(port)))
        except (ConnectionRefusedError, FileNotFoundError):
            return True
        except OSError:
            return False
    return False
