"""Settings that a calibration may try: of every method the published ones, and a grid that probes guide."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from itertools import product
from typing import Any, NamedTuple

from pipeline.bench.variant import Variant
from pipeline.errors import ConfigError
from pipeline.kernels.sparse import SHORTEST
from pipeline.model.shape import ModelShape
from pipeline.pruning.base import PAPER_DEPTH
from pipeline.pruning.dense import Dense
from pipeline.pruning.registry import make_method
from pipeline.quality.sensitivity import Sensitivity

SPARSE = (None, 0.95, 0.9, 0.8)
MOST_MARS_LAYERS = 8
EXCHANGES = (1, 2, 4, 8, 16, 32)  # times what a pair costs in divergence with one mass, that it may cost
MARSINFER_RISES = (0.25, 0.5, 1.0, 2.0, 4.0)  # of the rise that the budget seems to allow
DEPTHS = (2 / 3, 1 / 2, 1 / 3)  # where methods begin that prune from some layer on
WORTH = 1.05  # times as fast a precision must be as every more exact one
NOTHING = 0.2  # of the budget, which a precision may cost that all else is searched with


@dataclass(frozen=True, kw_only=True)
class Precision:
    """How the model's products are computed, and what became of dense on the cases that are searched on."""

    linears: str = "auto"
    drop: float = 0.0  # expected by its divergence
    speed_up: float = 1.0  # over dense in the model's own


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A variant, and its place among its kin: in one family more of any axis is harsher."""

    variant: Variant
    family: str
    axes: tuple[float, ...]
    drop: float | None = None  # predicted, in the unit of the main bound, where probes say something
    precision_drop: float = 0.0  # what dense is expected to lose in its precision, likewise

    def harsher(self, other: Candidate) -> bool:
        """Whether no axis is milder than `other`'s, in the same family; True of itself."""
        pairs = zip(self.axes, other.axes, strict=True)
        return self.family == other.family and all(own >= others for own, others in pairs)

    @property
    def settings(self) -> dict[str, Any]:
        """Those that are not the method's defaults."""
        method = self.variant.method
        named = {field.name: (getattr(method, field.name), field.default) for field in fields(method)}
        return {name: value for name, (value, default) in named.items() if value != default}


def describe(candidate: Candidate) -> str:
    """Method, settings and precisions in a line; a setting with a value a layer in short."""
    parts = [f"{name}={_short(value)}" for name, value in candidate.settings.items()]
    variant = candidate.variant
    if variant.linears != "auto":
        parts.append(f"linears:{variant.linears}")
    return " ".join([variant.method.name, *parts])


def _short(value: Any) -> str:
    if not isinstance(value, tuple):
        return "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
    if len(value) <= 4:
        return ",".join(map(_short, value))
    spared = sum(1 for each in value if each < 1)
    return f"({spared} of {len(value)} layers)"


@dataclass(frozen=True, kw_only=True)
class Found:
    """What candidates are made from."""

    shape: ModelShape
    longest: int  # prompt tokens of the cases
    rows: Sequence[Sensitivity]
    mass: float  # of the probes
    drop_per_nat: float  # drop of the score for a rise of the answers' nll by a nat a token, as observed
    budget: float  # drop allowed
    saved_ms: Callable[[Sensitivity], float]
    fp8: bool  # whether FFNs may be told to compute in fp8
    sparse: bool = True  # whether the device computes block-sparse attention

    def by_action(self, action: str) -> dict[int, Sensitivity]:
        return {row.layer: row for row in self.rows if row.action == action}

    def drop_of(self, rows: Iterable[Sensitivity]) -> float:
        """What their rises add up to."""
        return self.drop_per_nat * sum(max(0.0, row.nll_rise) for row in rows)


class Cost(NamedTuple):
    """What was seen of a cause and what it costs, in so many cases."""

    cause: float
    drop: float
    cases: int


def drop_per_nat(rows: Sequence[Sensitivity]) -> float:
    """Points of right tokens for a rise of the nll by a nat a token, as the probes show; never negative."""
    return slope_through_zero(Cost(row.nll_rise, row.drop, row.cases) for row in rows if row.nll_rise > 0)


def slope_through_zero(costs: Iterable[Cost]) -> float:
    """Drop for one of the cause: the line through 0 that is nearest, by least squares; never negative."""
    seen = list(costs)
    square = sum(cases * cause**2 for cause, _, cases in seen)
    return max(0.0, sum(cases * cause * drop for cause, drop, cases in seen) / square) if square else 0.0


def precisions_of(tried: Sequence[Precision], budget: float) -> list[Precision]:
    """What to search with, the fastest first, down to one that costs next to nothing.

    `tried` begins with the model's own and becomes less exact; one that is no faster than a more exact one,
    or not within the budget, is not worth searching with.
    """
    own, *others = tried
    chosen = [own]
    for each in others:
        if each.drop <= budget and each.speed_up >= WORTH * chosen[-1].speed_up:
            chosen.append(each)
    free = max(place for place, each in enumerate(chosen) if each.drop <= NOTHING * budget)
    return list(reversed(chosen[free:]))


def make_candidates(found: Found, precisions: Sequence[Precision]) -> list[Candidate]:
    """All of them, families in turn, so that every beginning holds something of each; plain dense is none."""
    families = [list(family(found)) for family in FAMILIES]
    ordered = [
        family[turn] for turn in range(max(map(len, families))) for family in families if turn < len(family)
    ]
    made: dict[Variant, Candidate] = {}
    for precision, (family, axes, method, settings, drop) in product(precisions, ordered):
        linears = precision.linears
        if method == "dense" and not settings and linears == "auto":
            continue
        suffix = "" if linears == "auto" else f"/{linears}"
        try:
            chosen = make_method(method, settings)
            chosen.plan(found.shape, (1,))
        except ConfigError:
            continue  # the model is too shallow for this one
        variant = Variant(method, chosen, linears)
        candidate = Candidate(
            variant=variant,
            family=family + suffix,
            axes=axes,
            drop=drop,
            precision_drop=max(0.0, precision.drop),
        )
        made.setdefault(variant, candidate)
    return list(made.values())


Made = tuple[
    str, tuple[float, ...], str, dict[str, Any], float | None
]  # family, axes, method, settings, drop


def _sparse(found: Found) -> Sequence[float | None]:
    """Short prompts are not block-sparse whatever is asked."""
    return SPARSE if found.sparse and found.longest >= SHORTEST else (None,)


def _harsh(sparse: float | None) -> float:
    return 0.0 if sparse is None else 1 - sparse


def _dense(found: Found) -> Iterator[Made]:
    for sparse in _sparse(found):
        settings = {} if sparse is None else {"sparse_attention": sparse}
        yield "dense", (_harsh(sparse),), Dense.name, settings, None


def _mars(found: Found) -> Iterator[Made]:
    """From late layers to early ones, as far as parking there looks bearable."""
    parks = found.by_action("park")
    depth = found.shape.layers
    # the last layer but one loses nothing: all that the last one does with parked tokens is read them
    layers = sorted(({*parks} or {*range(depth)}) - {depth - 1} | {max(0, depth - 2)}, reverse=True)
    step = max(1, -(-len(layers) // MOST_MARS_LAYERS))
    for layer, sparse in product(layers[::step], _sparse(found)):
        row = parks.get(layer)
        drop = None if row is None else found.drop_of([row])
        axes = (float(depth - layer), _harsh(sparse))
        yield "mars", axes, "mars", {"last_full": layer, "sparse_attention": sparse}, drop


def _mars_by_layer(found: Found) -> Iterator[Made]:
    """Each layer's own mass: the layers' divergences add up, and so do the pairs that they compute."""
    if len(_sparse(found)) < 2:
        return
    for level, masses in enumerate(exchanged(found)):
        yield "mars by layer", (float(level),), "mars", {"sparse_attention": masses}, None


def exchanged(found: Found) -> list[tuple[float, ...]]:
    """Masses of all layers, ever harsher: each layer's is the one best at some price of a pair.

    The price is told in divergence, from that of the largest mass with which all layers were probed on. A
    larger mass is taken to diverge no more than a smaller one, which on few cases may look otherwise.
    """
    depth = found.shape.layers
    probes: dict[float, dict[int, Sensitivity]] = {}
    for row in found.rows:
        if row.action == "sparse":
            probes.setdefault(row.mass, {})[row.layer] = row
    masses = sorted((mass for mass, rows in probes.items() if len(rows) == depth), reverse=True)
    if not masses:
        return []
    first = probes[masses[0]].values()
    diverged = sum(row.divergence for row in first)
    saved = sum(1 - row.attended for row in first)
    if diverged <= 0 or saved <= 0:
        return []
    levels = []
    for factor in EXCHANGES:
        price = factor * diverged / saved
        levels.append(tuple(_best([probes[m][layer] for m in masses], price) for layer in range(depth)))
    return list(dict.fromkeys(levels))


def _best(rows: Sequence[Sensitivity], price: float) -> float:
    """Of one layer's probes, ever harsher, the mass with the least divergence and price together."""
    mass, least, diverged = 1.0, price, 0.0
    for row in rows:
        diverged = max(diverged, row.divergence)
        if diverged + price * row.attended < least:
            mass, least = row.mass, diverged + price * row.attended
    return mass


def _marsinfer(found: Found) -> Iterator[Made]:
    """Layers whose FFN cold tokens skip, those first that save most for what they cost."""
    depth, rows = found.shape.layers, found.by_action("skip")
    for low in (None, "fp8") if found.fp8 else (None,):
        for level, layers in enumerate(greedy(found)):
            eta = tuple(found.mass if layer in layers else 1.0 for layer in range(depth))
            settings = {"eta": eta, "start_layer": 0, "prefix": 4, "window": 64, "low": low}
            drop = found.drop_of(rows[layer] for layer in layers)
            yield f"marsinfer{low or ''}", (float(level),), "marsinfer", settings, drop
    for start, mass in product((round(depth * share) for share in DEPTHS), (0.99, 0.95, 0.9)):
        settings = {"start_layer": start, "eta": mass}
        yield "ftp", (float(depth - start), 1 - mass), "marsinfer", settings, None


def greedy(found: Found) -> list[frozenset[int]]:
    """Growing sets of layers: as many as `MARSINFER_RISES` of the budget hold, by rise for each ms saved."""
    rows = [row for row in found.by_action("skip").values() if found.saved_ms(row) > 0]
    rows.sort(key=lambda row: (max(0.0, row.nll_rise) / found.saved_ms(row), -row.layer))
    levels = []
    for factor in MARSINFER_RISES:
        taken: list[Sensitivity] = []
        for row in rows:
            if found.drop_of([*taken, row]) <= factor * found.budget:
                taken.append(row)
        levels.append(frozenset(row.layer for row in taken))
    return [level for level in dict.fromkeys(levels) if level]


def _uniprefill(found: Found) -> Iterator[Made]:
    depth = found.shape.layers
    starts = [round(depth * share) for share in (*DEPTHS, 7 / PAPER_DEPTH)]
    for start, p in product(starts, (0.99, 0.95, 0.9)):
        yield "uniprefill", (float(depth - start), 1 - p), "uniprefill", {"first_layer": start, "p": p}, None


def _sliminfer(found: Found) -> Iterator[Made]:
    depth = found.shape.layers
    for start, budget in product(DEPTHS, (0.75, 0.5, 0.25)):
        layers = tuple(dict.fromkeys(round(depth * (start + (1 - start) * n / 3)) for n in range(3)))
        settings = {"layers": layers, "budget": tuple(budget * 0.75**n for n in range(len(layers)))}
        yield "sliminfer", (float(depth - layers[0]), 1 - budget), "sliminfer", settings, None
    yield "sliminfer as published", (0.0,), "sliminfer", {}, None


def _fastkv(found: Found) -> Iterator[Made]:
    depth = found.shape.layers
    for at, share in product((*DEPTHS, 15 / PAPER_DEPTH), (0.6, 0.4, 0.2)):
        layer = min(round(depth * at), depth - 1)
        settings = {"layer": layer, "share": share, "kv_share": 1.0}
        yield "fastkv", (float(depth - layer), 1 - share), "fastkv", settings, None
    yield "fastkv as published", (0.0,), "fastkv", {}, None


def _published(found: Found) -> Iterator[Made]:
    for method in ("mars", "marsinfer", "uniprefill", "gemfilter"):
        yield f"{method} as published", (0.0,), method, {}, None


FAMILIES = (_published, _dense, _mars, _mars_by_layer, _marsinfer, _uniprefill, _sliminfer, _fastkv)
