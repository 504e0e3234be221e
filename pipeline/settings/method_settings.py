"""The pruning method, its parameters, and the precision of what it runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from pipeline.errors import ConfigError
from pipeline.pruning.registry import brings_code, check_method_name
from pipeline.settings.kinds import NUMBER, PARAMETERS, TEXT
from pipeline.settings.option import METHOD, MODEL, Renamed, Settings, gone, option
from pipeline.settings.parse import check_between

AUTO = "auto"
LINEAR_DTYPES = ("auto", "fp8", "mixed")
KV_DTYPES = ("auto", "fp8")
IN_STEPS = ("ffn-skip",)  # methods that prune decode steps, of a row that is decoded alone
NO_FP8_ATTENTION = (
    "attention in fp8 is taken out: the sums of FlashAttention-3's kernel lose 7% at 4,096 tokens and 65% at "
    "131,072 where values share a sign; leave it out, and use --linear-dtype fp8 or mixed"
)


def _sparse_attention(mass: float) -> dict[str, Any]:
    check_between("--sparse-attention", mass, 0, 1)
    return {"settings": {"sparse_attention": mass}}


class MethodSettings(Settings, panel=METHOD):
    """A method by name; `settings` are its parameters, as numbers or as text."""

    renamed: ClassVar[tuple[Renamed, ...]] = (
        Renamed(
            name="sparse_attention",
            kind=NUMBER,
            now="--set sparse_attention=MASS",
            values=_sparse_attention,
            metavar="MASS",
        ),
        Renamed(
            name="attention_dtype",
            kind=TEXT,
            now="left out: attention is computed in --dtype",
            values=gone("--attention-dtype {}: " + NO_FP8_ATTENTION, "auto"),
            metavar="auto",
        ),
    )

    method: str = option(
        AUTO,
        help="auto (a profile that calibrate kept for this model and device, otherwise dense), a name "
        "(see `marsinfer methods`), or FILE.py:Class.",
        offered="methods",
        check=lambda name, flag: None if name == AUTO else check_method_name(name),
        in_profile=True,
        brings_code=brings_code,
    )
    settings: Mapping[str, Any] = option(
        factory=dict,
        flag="--set",
        help="A method's parameter as NAME=VALUE; repeatable.",
        shown_default="the method's own",
        kind=PARAMETERS,
        in_environment=False,
        in_profile=True,
    )
    profile: str | None = option(
        None,
        metavar="FILE",
        help="Method, settings and precisions as calibrate found them; flags, environment and file override "
        "them.",
    )
    linear_dtype: str = option(
        "auto",
        help="auto (as --dtype); on a GPU that can, fp8: all linear layers but the head; or mixed: most of "
        "them, but not for the prompt's end, short documents or the answer.",
        choices=LINEAR_DTYPES,
        in_profile=True,
        panel=MODEL,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.settings and self.method == AUTO:
            raise ConfigError("--set gives parameters of a method: name it with --method")
