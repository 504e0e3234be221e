"""What a run says of itself: what decides its answers, and what else a reader of its output may ask."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from pipeline.settings.run_settings import BatchConfig
from pipeline.texts.versions import timestamp, versions

if TYPE_CHECKING:
    from pipeline.model.loading import Model
    from pipeline.prompts.builder import PromptBuilder
    from pipeline.prompts.splitting import Splitter
    from pipeline.pruning.base import PruningMethod
    from pipeline.setup.guard import Guard

# under which words they are stored: "auto" meant what "any" does today, and outputs of then go on
GROUPS = {"any": "auto", "auto": "method", "off": "off"}


def deciding_settings(
    config: BatchConfig,
    model: Model,
    method: PruningMethod,
    prompts: PromptBuilder,
    splitter: Splitter | None = None,
    guard: Guard | None = None,
    columns: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """The settings of which each can change an answer: a run may be resumed only under the same.

    Rows that are answered together may be answered by dense in place of a pruning method.

    Packs, device and attention backend are not among them: they change the last bits of sums, no more. What
    may stay on the device is, as a document's active blocks depend on it.
    """
    return {
        "model": {
            "fingerprint": model.fingerprint,
            "dtype": str(model.dtype),
            "linear_dtype": config.linear_dtype,
            "attention_dtype": "auto",  # which was a setting once, so that outputs of then go on
            "rope_scaling": model.rope_scaling,
        },
        "method": {"name": method.name, "settings": asdict(method)},
        **({} if columns is None else {"columns": columns}),
        "template_sha256": prompts.template_hash,
        **({} if (moment := moment_of(prompts, splitter)) is None else {"date": moment}),
        "on_overlong": config.on_overlong,
        "split": None
        if splitter is None
        else {"overlap": splitter.overlap, "combine_sha256": splitter.combine.template_hash},
        "max_new_tokens": config.max_new_tokens,
        "sampling": {"temperature": config.temperature, "top_p": config.top_p, "seed": config.seed},
        "stop": list(config.stop),
        "kv_memory": config.kv_memory,
        "guard": None if guard is None else guard.as_dict(),
        # "auto" once meant what "any" does today, and outputs of then go on
        "group": None
        if method.name == "dense"
        else {"any": "auto", "auto": "method"}.get(config.group, "off"),
    }


def moment_of(prompts: PromptBuilder, splitter: Splitter | None = None) -> str | None:
    """The date that the prompts of a run print, if any of them does: it stays, however long the run takes."""
    return prompts.moment or (None if splitter is None else splitter.combine.moment)


def describe_run(config: BatchConfig, model: Model, decides: dict[str, Any]) -> dict[str, Any]:
    """What the output's metadata holds, under the key `marsinfer`."""
    return {
        "config": config.resolved(),
        "settings_that_decide": decides,
        "model": model.name,
        "device": model.device_name(),
        "attention": {"backend": model.attention_name, "refused": model.attention_refused},
        "versions": versions(),
        "started": timestamp(),
    }
