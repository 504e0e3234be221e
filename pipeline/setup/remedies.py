"""By which flags a run would need less memory of its device."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from pipeline.checkpoints.device_memory import Remedies
from pipeline.errors import ConfigError
from pipeline.pruning.base import PruningMethod
from pipeline.pruning.capabilities import HoldsUnrotatedKeys, exit_maps_of
from pipeline.settings.method_settings import AUTO
from pipeline.settings.model_settings import DIVIDED
from pipeline.settings.run_settings import BatchConfig

if TYPE_CHECKING:
    from pipeline.model.loading import Model, UnloadedModel


def remedies_of(config: BatchConfig, method: PruningMethod, model: Model) -> Remedies:
    """Those of a run. A model that is loaded already keeps its weights, and is divided no further."""
    from pipeline.model.loading import UnloadedModel

    in_fp8 = _computes_in_fp8(model)
    in_model_dtype = config.kv_memory is not None or isinstance(method, HoldsUnrotatedKeys)
    documents = ["--kv-dtype fp8"] if in_fp8 and config.kv_dtype == AUTO and not in_model_dtype else []
    if not isinstance(model, UnloadedModel):
        return Remedies(documents=tuple(documents))
    weights = ["--linear-dtype fp8"] if in_fp8 and config.linear_dtype != "fp8" else []
    excluded = config.kv_memory is not None or config.trust_remote_code
    return Remedies(
        documents=tuple(documents),
        weights=tuple(weights),
        more_devices=None if excluded else more_devices(config.device, model, [method]),
    )


def more_devices(asked: str, model: UnloadedModel, methods: Iterable[PruningMethod]) -> str | None:
    """What to give to divide a model among more devices than now, or None where that cannot be.

    `asked` is the device as the user gives it.
    """
    from pipeline.families.sharding import FLAG, can_be_divided, sizes_of

    is_free = model.device.type == "cuda" and asked in ("auto", "cuda")
    if not (is_free and can_be_divided(model.config) and sizes_of(model.shape)[-1] > model.ranks):
        return None
    if any(method.name not in DIVIDED or exit_maps_of(method, model.shape) is not None for method in methods):
        return None
    return FLAG if model.ranks == 1 else f"a larger {FLAG}"


def _computes_in_fp8(model: Model) -> bool:
    try:
        model.check_fp8()
    except ConfigError:
        return False
    return True
