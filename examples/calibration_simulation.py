"""How often a calibration writes a false profile, one whose settings truly lose more than the bound:

    python examples/calibration_simulation.py --calibrations 1000

Each simulated calibration orders a ladder by what a noisy search expects, tests it on 200 documents that the
search did not see, and takes the fastest rung that passed. Four kinds of losses take turns. In all of them
the bound lies between two rungs: hardly below the mildest of those that lose too much.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from pipeline.calibration.ladder import climb, fastest_passed
from pipeline.evaluate.drops import TAIL, Paired

DOCUMENTS = 200
SEARCH_NOISE = 0.2  # points, of what the search expects a rung to lose
Scores = tuple[np.ndarray, np.ndarray]  # (D,) of dense and of a method


def total_losses(rng: np.random.Generator, drop: float) -> Scores:
    """A document loses everything or nothing."""
    return np.ones(DOCUMENTS), 1.0 - (rng.random(DOCUMENTS) < drop)


def rare_losses(rng: np.random.Generator, drop: float) -> Scores:
    """One document of 20 loses everything, and the others lose or gain as much as makes up the drop."""
    lost = rng.random(DOCUMENTS) < 1 / 20
    return np.where(lost, 1.0, 0.5), np.where(lost, 0.0, 0.5 - (drop - 1 / 20) * 20 / 19)


def many_losses(rng: np.random.Generator, drop: float) -> Scores:
    """All documents lose or gain something."""
    dense = rng.uniform(0.4, 0.6, DOCUMENTS)
    return dense, dense - drop + rng.uniform(-0.3, 0.3, DOCUMENTS)


@dataclass(frozen=True)
class Kind:
    """A bound, the true drops of rungs that are ever faster, all in points, and how documents lose."""

    bound: float
    drops: tuple[float, ...]
    losses: Callable[[np.random.Generator, float], Scores]


KINDS = {
    "total losses, bound 2pt": Kind(2.0, (0.0, 0.01, 0.02, 0.05, 2.02, 2.5, 8.0), total_losses),
    "total losses, bound 5pt": Kind(5.0, (0.0, 0.1, 0.3, 1.0, 5.05, 6.0, 12.0), total_losses),
    "rare losses, bound 5pt": Kind(5.0, (-1.0, -0.5, 0.0, 0.5, 5.05, 6.0, 12.0), rare_losses),
    "many losses, bound 5pt": Kind(5.0, (0.0, 0.3, 0.6, 1.0, 5.05, 6.0, 12.0), many_losses),
}


@dataclass(frozen=True)
class Simulated:
    """A rung that was tested."""

    true_drop: float
    speed_up: float
    passes: bool


@dataclass
class Count:
    """Calibrations, profiles that they wrote, and false ones among these."""

    calibrations: int = 0
    profiles: int = 0
    false: int = 0


def by_gate(paired: Paired, bound: float) -> bool:
    """Whether a drop passes, as calibrate decides it."""
    return paired.p_beyond(bound) <= TAIL


def calibration(
    rng: np.random.Generator, kind: Kind, passes: Callable[[Paired, float], bool] = by_gate
) -> Simulated | None:
    """One calibration; what it would write a profile of."""

    def test(rung: int) -> Simulated:
        paired = Paired.of(*kind.losses(rng, kind.drops[rung] / 100))
        return Simulated(kind.drops[rung], 1.1 ** (rung + 1), passes(paired, kind.bound))

    expected = np.array(kind.drops) + SEARCH_NOISE * rng.standard_normal(len(kind.drops))
    return fastest_passed(climb(map(int, np.argsort(expected)), test))


def simulate(
    calibrations: int, *, passes: Callable[[Paired, float], bool] = by_gate, seed: int = 0
) -> dict[str, Count]:
    """What so many calibrations, of all kinds in turn, come to, by kind."""
    found = {name: Count() for name in KINDS}
    for number in range(calibrations):
        name = list(KINDS)[number % len(KINDS)]
        chosen = calibration(np.random.default_rng([seed, number]), KINDS[name], passes)
        found[name].calibrations += 1
        found[name].profiles += chosen is not None
        found[name].false += chosen is not None and chosen.true_drop > KINDS[name].bound
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).partition(":")[0])
    parser.add_argument("--calibrations", type=int, default=1000)
    count = parser.parse_args().calibrations
    found = simulate(count)
    for name, each in found.items():
        print(
            f"{name}: {each.false:,} false of {each.profiles:,} profiles, {each.calibrations:,} calibrations"
        )
    false = sum(each.false for each in found.values())
    print(f"{false:,} false profiles of {count:,} calibrations: {false / count:.1%}, allowed {TAIL:.1%}")


if __name__ == "__main__":
    main()
