"""What the commands of `marsinfer bench` measure, from text: variants, lengths, packs, shares."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from pipeline.errors import ConfigError
from pipeline.pruning.registry import make_method
from pipeline.settings.method_settings import LINEAR_DTYPES, NO_FP8_ATTENTION
from pipeline.settings.parse import parse_count, parse_settings

if TYPE_CHECKING:
    from pipeline.model.variant import Variant
    from pipeline.pruning.base import PruningMethod

# among a method's settings in --methods
LINEARS = tuple(name for name in LINEAR_DTYPES if name != "auto")
LISTED = re.compile(r"=[^/]+(/[\d.e-]+)+$")  # a list of values, which no file's name is
KV_IN_FP8 = "kv-fp8"  # likewise: keys and values behind the prefill
ATTENTION_IN_FP8 = "attention-fp8"  # of the version before


def parse_variants(specs: str, keep: str | None) -> list[Variant]:
    shares = parse_shares(keep) if keep else None
    names = [spec.strip() for spec in specs.split(",")]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ConfigError(f"--methods names {twice!r} twice")
    return [parse_variant(name, shares) for name in names]


def parse_variant(spec: str, keep: tuple[float, ...] | None) -> Variant:
    from pipeline.model.variant import Variant
    from pipeline.pruning.capabilities import SkipsInSteps

    if spec.startswith("@"):
        return _profile_variant(spec)
    parts = spec.split(":")
    linears = [part for part in parts if part in LINEARS]
    if len(linears) > 1:
        raise ConfigError(f"--methods {spec!r}: give fp8 or mixed, not both")
    if ATTENTION_IN_FP8 in parts:
        raise ConfigError(f"--methods {spec!r}: {NO_FP8_ATTENTION}")
    kv = "fp8" if KV_IN_FP8 in parts else "auto"
    parts = [part for part in parts if part not in (*LINEARS, KV_IN_FP8)]
    settings = [LISTED.sub(lambda found: found[0].replace("/", ","), part) for part in parts if "=" in part]
    method = make_method(":".join(part for part in parts if "=" not in part), parse_settings(settings))
    if isinstance(method, SkipsInSteps):
        raise ConfigError(
            f"--methods {spec!r}: {method.name} is for decode steps of batch, with --in-flight 1"
        )
    return Variant(
        spec,
        method if settings or keep is None else _with_keep(method, keep),
        linears[0] if linears else "auto",
        kv,
    )


def _with_keep(method: PruningMethod, shares: tuple[float, ...]) -> PruningMethod:
    from pipeline.pruning.capabilities import FixesShares

    if not isinstance(method, FixesShares):
        raise ConfigError(f"method {method.name} has no share of tokens to fix")
    return method.with_keep(shares)


def _profile_variant(spec: str) -> Variant:
    """`@FILE`: the settings and the precision of a profile."""
    from pipeline.model.variant import Variant
    from pipeline.setup.profile import load_profile

    batch = load_profile(spec[1:]).batch
    method = make_method(batch["method"], batch["settings"])
    return Variant(spec, method, batch.get("linear_dtype", "auto"))


def parse_lengths(text: str) -> list[int]:
    lengths = [parse_count("--lengths", part) for part in text.split(",")]
    if not all(lengths):
        raise ConfigError(f"--lengths {text!r}: a prompt has at least one token")
    return lengths


def parse_packs(text: str) -> dict[str, list[int]]:
    """Packs such as `8k;4x8k;16k+8k+5k`: of each as written, the lengths of its documents."""
    packs: dict[str, list[int]] = {}
    for pack in text.replace(";", " ").split():
        lengths: list[int] = []
        for part in pack.split("+"):
            count, times, length = part.rpartition("x")
            repeats = parse_count("--packs", count) if times else 1
            lengths += [parse_count("--packs", length)] * repeats
        if not lengths or not all(lengths):
            raise ConfigError(f"--packs {pack!r}: a pack has documents, and a document at least one token")
        packs[pack] = lengths
    if not packs:
        raise ConfigError(f"--packs {text!r}: name a pack, such as 32k, 4x8k or 16k+8k+5k")
    return packs


def parse_shares(text: str) -> tuple[float, ...]:
    try:
        shares = tuple(float(part) for part in text.split(","))
    except ValueError:
        raise ConfigError(f"--keep {text!r}: give shares such as 0.25,0.125,0.0625") from None
    if not all(0 < share <= 1 for share in shares):
        raise ConfigError(f"--keep {text!r}: a share is above 0 and at most 1")
    return shares
