"""How often a gate passes what it should not: python examples/gate_simulation.py [SAMPLES]

Documents' drops are drawn from known laws, and judged at a bound that is just their true mean: whatever
passes is a false pass, of which a sound gate has at most 2.5%. Prints a Markdown table. A last line tells how
often settings that lose nothing pass 2 points.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from pipeline.evaluate.drops import TAIL
from pipeline.evaluate.gaffke import beyond

SIZES = (8, 30, 100, 300)
AT_ONCE = 1 << 21  # drops that are judged together
Draw = Callable[[np.random.Generator, tuple[int, int]], np.ndarray]


@dataclass(frozen=True)
class Law:
    """How documents' drops are spread; `mean` is the true one."""

    name: str
    draw: Draw
    mean: float


def _rare(share: float, others: float = 0.0) -> Draw:
    return lambda rng, shape: np.where(rng.random(shape) < share, 1.0, others)


def _mixed(rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    drawn = rng.random(shape)
    return np.select([drawn < 0.06, drawn < 0.10], [1.0, -1.0], 0.0)


def _graded(rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    return rng.uniform(-0.1, 0.14, shape)


def _lognormal(rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    return np.minimum(rng.lognormal(-5.0, 1.5, shape), 1.0)


def laws() -> list[Law]:
    """Those of the table."""
    long_run = _lognormal(np.random.default_rng(99), (1000, 20_000)).mean()
    return [
        Law("1 of 20 documents loses all", _rare(0.05), 0.05),
        Law("1 of 50 loses all", _rare(0.02), 0.02),
        Law("1 of 20 loses all, the others gain 2 points", _rare(0.05, -0.02), 0.05 - 0.95 * 0.02),
        Law("6% lose all, 4% gain all", _mixed, 0.02),
        Law("evenly from a gain of 10 points to a loss of 14", _graded, 0.02),
        Law("lognormal, a median of 0.7 points, at most all", _lognormal, float(long_run)),
    ]


def passes(law: Law, bound: float, count: int, samples: int, seed: int = 0) -> float:
    """The share of samples of so many documents that pass the bound."""
    rng = np.random.default_rng(seed)
    step = max(1, AT_ONCE // count)
    passed = 0
    for start in range(0, samples, step):
        drops_SD = law.draw(rng, (min(step, samples - start), count))
        passed += int((beyond(drops_SD - bound, 1 - bound) <= TAIL).sum())
    return passed / samples


def main(samples: int) -> None:
    print("| drops of documents | true mean, points |", *(f"{count} documents |" for count in SIZES))
    print("|---|---|" + "---|" * len(SIZES))
    for law in laws():
        shares = (passes(law, law.mean, count, samples) for count in SIZES)
        print(f"| {law.name} | {100 * law.mean:.2f} |", *(f"{share:.2%} |" for share in shares), flush=True)
    harmless = Law("no loss but for noise of 2 points", lambda rng, shape: rng.normal(0, 0.02, shape), 0.0)
    right = [
        f"{passes(harmless, 0.02, count, min(samples, 2000)):.0%} of {count}" for count in (200, 300, 400)
    ]
    print(f"\n{harmless.name}: passes 2pt with {', '.join(right)} documents")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 20_000)
