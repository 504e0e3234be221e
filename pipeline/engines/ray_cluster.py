"""Ray itself: connecting to it, what it has, and its worker processes."""

from __future__ import annotations

import logging
import os
import secrets
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from pipeline.engines.ray_pulse import Pulse
from pipeline.errors import ConfigError, MarsError
from pipeline.interrupts import SIGNALS
from pipeline.model.loading import UnloadedModel
from pipeline.settings.parse import parse_workers
from pipeline.settings.run_settings import BatchConfig
from pipeline.setup.preparation import Setup, open_for_run

if TYPE_CHECKING:
    from pipeline.engines.ray_worker import ModelFacts

HOME = Path(__file__).resolve().parents[2]
LOGGER = logging.getLogger("marsinfer.ray")  # at INFO, Ray's own messages are shown
OBJECT_STORE_BYTES = 256 * 2**20  # of a Ray of the run's own: blocks and answers on their way, no more
LOOK_UP_S = 0.5
CONNECT_S = 10.0
# read by Ray when it is imported; who has set them knows why
QUIET = {"RAY_DEDUP_LOGS_SKIP_REGEX": "^"}  # of messages about the cluster, which it prints
ALWAYS = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_worker_niceness": "0",  # as the local engine's process
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}


AUTHENTICATION = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")


@dataclass(frozen=True, kw_only=True)
class DistantModel(UnloadedModel):
    """A model for a device that this process need not have: of the worker that has it come the facts."""

    facts: ModelFacts

    def load(self, precision: object = None, remedies: object = None) -> NoReturn:
        raise TypeError("the weights are loaded where the device is")

    @property
    def attention_name(self) -> str:
        return self.facts.attention_name

    @property
    def attention_refused(self) -> dict[str, str]:
        return self.facts.attention_refused

    def device_name(self) -> str:
        return self.facts.device_name

    def check_fp8(self) -> None:
        if self.facts.fp8_refused is not None:
            raise ConfigError(self.facts.fp8_refused)


def distant_model(config: BatchConfig, facts: ModelFacts) -> DistantModel:
    """The model of a configuration, for the GPU that the facts are of; its files are read here."""
    import torch

    here = open_for_run(config, dtype=facts.dtype, device="cpu")
    values = {field.name: getattr(here, field.name) for field in fields(here)}
    return DistantModel(**values | {"device": torch.device("cuda")}, facts=facts)


class _Places(list[str]):
    """Where workers look for modules first. Ray would add the working folder, whose files may hide ours."""

    def extend(self, places: Iterable[str]) -> None:
        """Leave out what Ray adds."""


class RayCluster:
    """The cluster that a run names, or a Ray of its own, here, which ends with it: see `close`."""

    def __init__(self, config: BatchConfig, check: Callable[[], None]) -> None:
        """Connects when something is asked of it."""
        self._config, self._check = config, check
        self._pulse: Pulse | None = None
        self._connected = self._was_connected = False
        self._actors: list[Any] = []
        self._given: tuple[Any, str] = (None, "")

    def close(self) -> None:
        """End the workers, and the packs in flight with them, and leave the cluster."""
        if not self._connected or self._is_lost:  # without Ray's processes, calls of Ray never return
            return
        import ray

        for actor in self._actors:
            ray.kill(actor)
        self._actors = []
        self._connected = False
        if not self._was_connected:
            with _own_signals():
                ray.shutdown()

    @property
    def _is_lost(self) -> bool:
        return self._pulse is not None and self._pulse.lost is not None

    def check(self, *, at_once: bool = False) -> None:
        """To be called often: raises what the run's own check does, and MarsError where Ray itself has died.

        Ray is looked at now and then, or `at_once`.
        """
        self._check()
        if self._pulse is not None:
            self._pulse.check(at_once=at_once)

    def connect(self) -> None:
        """Raises ConfigError where Ray is not installed, or not to be reached."""
        if self._connected:
            return
        if self._config.ray_address is None:
            _close_to_others()
        ray = _import_ray()
        self._was_connected = ray.is_initialized()
        address = self._config.ray_address
        if not self._was_connected:
            from ray.job_config import JobConfig

            shown = LOGGER.isEnabledFor(logging.INFO)
            options: dict[str, Any] = {
                "log_to_driver": shown,
                "logging_level": logging.INFO if shown else logging.CRITICAL,
                "job_config": JobConfig(_py_driver_sys_path=_Places([str(HOME)])),
            }
            if address is None:
                options |= {
                    "include_dashboard": False,
                    "num_cpus": max(os.cpu_count() or 1, parse_workers(self._config.workers) or 1),
                    "object_store_memory": OBJECT_STORE_BYTES,
                }
            _check_listens(address)
            with _own_signals():
                try:
                    ray.init(address=address or "local", **options)
                except (OSError, RuntimeError, ValueError) as error:
                    where = "here" if address is None else f"at --ray-address {address}"
                    what = str(error).partition(". ")[0] or type(error).__name__
                    raise ConfigError(
                        f"no Ray can be used {where}: {what}; `ray start --head` starts a cluster"
                    ) from error
        self._connected = True
        self._pulse = Pulse.of(ray, is_own=not self._was_connected and address is None)

    @property
    def gpus_per_worker(self) -> int:
        """As the configuration says, or 1 where there are GPUs."""
        wanted = self._config.gpus_per_worker
        if wanted is not None:
            return wanted
        if self._config.device != "auto":
            return int(self._config.device == "cuda")
        return int(self._total("GPU") >= 1)

    def places(self) -> tuple[int, int]:
        """How many workers are wanted, and how many the cluster has room for as it is."""
        kind, gpus = ("GPU", self._config.tensor_parallel) if self.gpus_per_worker else ("CPU", 1)
        room = self._total(kind) // gpus
        wanted = parse_workers(self._config.workers) or room
        if not room and gpus > 1:
            raise ConfigError(f"--tensor-parallel {gpus}: the cluster has fewer GPUs than a worker takes")
        if not room:
            raise ConfigError(
                f"the cluster has no {kind} for a worker: give --gpus-per-worker {1 - self.gpus_per_worker},"
                " or add a machine that has one"
            )
        return wanted, room

    def _total(self, kind: str) -> int:
        self.connect()
        import ray

        return int(ray.cluster_resources().get(kind, 0))

    def open_model(self, config: BatchConfig) -> UnloadedModel:
        """The model as the workers will have it, its weights not loaded."""
        if not self.gpus_per_worker:
            return open_for_run(config, device="cpu")
        self.places()
        import ray

        from pipeline.engines.ray_worker import model_facts

        ask: Any = ray.remote(num_gpus=config.tensor_parallel, max_retries=3)(model_facts)
        return distant_model(config, self.wait_for(ask.remote(config)))

    def make_workers(self, setup: Setup) -> list[Any]:
        """Actors of the class `Worker`, whose processes Ray makes where there is room for them.

        What they need is given to `start`: an argument of their making would have to outlive its machine.
        """
        wanted, _ = self.places()
        import ray

        from pipeline.engines.ray_worker import Worker

        gpus = self.gpus_per_worker * self._config.tensor_parallel
        module = type(setup.method).__module__
        if not module.startswith("pipeline."):  # a method of the user's own, whose file others may not have
            ray.cloudpickle.register_pickle_by_value(sys.modules[module])
        made: Any = ray.remote(num_cpus=1, num_gpus=gpus, max_restarts=-1)(Worker)
        fields_of_setup = {field.name: getattr(setup, field.name) for field in fields(Setup)}
        self._given = ray.put(Setup(**fields_of_setup)), setup.model.fingerprint
        self._actors = [made.remote(gpus=gpus, workers=wanted) for _ in range(wanted)]
        return self._actors

    def start(self, actor: Any) -> Any:
        """A reference to what the actor's `start` returns, once it has a process."""
        setup, fingerprint = self._given
        return actor.start.remote(setup, fingerprint)

    def wait_for(self, reference: Any) -> Any:
        """What a task returns; its MarsErrors are raised as they are."""
        import ray

        while not ray.wait([reference], timeout=LOOK_UP_S)[0]:
            self.check()
        return got(reference)


def got(reference: Any) -> Any:
    """The value that a task made; a MarsError that it raised is raised here."""
    import ray
    from ray.exceptions import RayTaskError

    try:
        return ray.get(reference)
    except RayTaskError as error:
        if isinstance(error.cause, MarsError):
            raise error.cause from None
        raise


def _check_listens(address: str | None) -> None:
    """Raise ConfigError at once where nobody would answer; Ray would try for minutes."""
    host, colon, port = (address or "").rpartition(":")
    if not colon:
        return
    try:
        socket.create_connection((host, int(port)), CONNECT_S).close()
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"--ray-address {address}: nobody answers there ({error}); `ray start --head` tells the address"
        ) from error


def _close_to_others() -> None:
    """Have a Ray of the run's own, whose ports run what they are sent, refuse all without this run's secret.

    Where the environment says something about it, that holds, as does Ray's own way where it is imported
    already, for which it has read the environment.
    """
    if "ray" not in sys.modules and not any(name in os.environ for name in AUTHENTICATION):
        os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}


def _import_ray() -> Any:
    quiet = {} if LOGGER.isEnabledFor(logging.INFO) else QUIET
    for name, value in (ALWAYS | quiet).items():
        os.environ.setdefault(name, value)
    try:
        import ray
    except ImportError as error:
        raise ConfigError(f"--engine ray needs Ray: pip install 'marsinfer[ray]' ({error})") from error
    return ray


@contextmanager
def _own_signals() -> Iterator[None]:
    """Whoever handled signals before still does afterwards: Ray installs a handler of its own."""
    in_main = threading.current_thread() is threading.main_thread()
    handlers = {number: signal.getsignal(number) for number in SIGNALS} if in_main else {}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
