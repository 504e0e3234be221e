"""Settings that a ladder may be made of: `mars` by what probes say of each layer, and published ones."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from pipeline.calibration.sensitivity import Sensitivity
from pipeline.errors import ConfigError
from pipeline.model.variant import Variant
from pipeline.pruning.mars import Mars
from pipeline.pruning.registry import make_method
from pipeline.pruning.shape import ModelShape
from pipeline.settings.parse import as_set

EXCHANGES = (1, 2, 4, 8, 16, 32)  # times what a pair costs in divergence with one mass, that it may cost
EXITS = (7 / 8, 3 / 4, 2 / 3, 1 / 2)  # of the depth, that all tokens pass
OTHERS = ("marsinfer", "uniprefill", "fastkv", "sliminfer", "gemfilter")  # as published


def describe(variant: Variant) -> str:
    """Method, settings that are not its defaults, and precision in a line; values a layer in short."""
    method = variant.method
    named = {field.name: (getattr(method, field.name), field.default) for field in fields(method)}
    parts = [f"{name}={_short(value)}" for name, (value, default) in named.items() if value != default]
    precision = [] if variant.linears == "auto" else [f"linears:{variant.linears}"]
    return " ".join([method.name, *parts, *precision])


def _short(value: Any) -> str:
    if isinstance(value, str):
        return Path(value).name
    if not isinstance(value, tuple) or len(value) <= 4:
        return as_set(value)
    return f"({sum(each < 1 for each in value)} of {len(value)} layers, mean {sum(value) / len(value):.2f})"


def sparse_rungs(depth: int, rows: Sequence[Sensitivity], linears: str) -> list[Variant]:
    """`mars` with a mass for each layer, ever harsher."""
    levels = exchanged(depth, rows)
    return [Variant(Mars.name, Mars(sparse_attention=masses), linears) for masses in levels]


def exit_layers(depth: int) -> list[int]:
    """The layers after which tokens may stop, ever earlier: after the last but one they lose nothing."""
    last = max(0, depth - 2)
    layers = dict.fromkeys([last, *(round(share * depth) - 1 for share in EXITS)])
    return [layer for layer in layers if 0 <= layer <= last]


def exit_rungs(depth: int, linears: str) -> list[Variant]:
    """`mars` for prompts that gain nothing by being block-sparse: tokens stop after ever earlier layers."""
    return [
        Variant(Mars.name, Mars(sparse_attention=None, last_full=layer), linears)
        for layer in exit_layers(depth)
    ]


def mapped_rungs(method: Mars, maps: Mapping[int, Path], linears: str) -> list[Variant]:
    """`method`, whose tokens stop after ever earlier layers, each with the maps fitted for it."""
    return [
        Variant(Mars.name, replace(method, last_full=last, exit_maps=str(maps[last])), linears)
        for last in sorted(maps, reverse=True)
    ]


def other_rungs(shape: ModelShape, linears: str) -> list[Variant]:
    """The other methods as published, those that the model is deep enough for."""
    made = []
    for name in OTHERS:
        try:
            method = make_method(name)
            method.plan(shape, (1,))
        except ConfigError:
            continue
        made.append(Variant(name, method, linears))
    return made


def exchanged(depth: int, rows: Sequence[Sensitivity]) -> list[tuple[float, ...]]:
    """Masses of all layers, ever harsher: each layer's is the one best at some price of a query-key pair.

    All layers cost the same, so a pair is so much time, and the layers' divergences add up. The price is
    told in divergence, from that of the largest mass on with which all layers were probed and which saves
    something. A larger mass is taken to diverge no more than a smaller one, which on few cases may look
    otherwise.
    """
    probes: dict[float, dict[int, Sensitivity]] = {}
    for row in rows:
        probes.setdefault(row.mass, {})[row.layer] = row
    masses = sorted((mass for mass, own in probes.items() if len(own) == depth), reverse=True)
    price = next((price for mass in masses if (price := _price(probes[mass].values())) > 0), None)
    if price is None:
        return []
    levels = [
        tuple(_best([probes[mass][layer] for mass in masses], factor * price) for layer in range(depth))
        for factor in EXCHANGES
    ]
    return [level for level in dict.fromkeys(levels) if min(level) < 1]


def _price(rows: Collection[Sensitivity]) -> float:
    """What a pair costs in divergence with one mass in all layers; 0 if it saves or costs nothing."""
    saved = sum(1 - row.attended for row in rows)
    return sum(row.divergence for row in rows) / saved if saved > 0 else 0.0


def _best(rows: Sequence[Sensitivity], price: float) -> float:
    """Of one layer's probes, ever harsher, the mass with the least divergence and price together."""
    mass, least, diverged = 1.0, price, 0.0
    for row in rows:
        diverged = max(diverged, row.divergence)
        if diverged + price * row.attended < least:
            mass, least = row.mass, diverged + price * row.attended
    return mass
