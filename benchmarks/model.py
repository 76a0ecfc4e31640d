"""The data that all other modules share: contenders, rows, outcomes, comparisons.

What must live here: plain data, and the arithmetic that compares two lists of samples. Nothing here
measures, prints or reads files.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

US = "aiosync"

RESAMPLES = 1000

# One measurement: does its own set-up, and returns a cost; less is better.
Measure = Callable[[], float]


class LeftOutError(Exception):
    """A contender that can't be measured here; the message says why."""


@dataclass(frozen=True)
class Contender:
    name: str
    measure: Measure
    needs: str = ""  # a module or a name in one; without it the contender is left out


@dataclass(frozen=True)
class Row:
    """One kind of work, and its contenders; the first is the one that is judged."""

    suite: str
    backend: str  # "" if no event loop takes part
    work: str
    contenders: Sequence[Contender]
    unit: str = "s"
    size: int = 0  # the number of waiters, in rows where it varies
    exact: bool = False  # whether each measurement gives the same result


@dataclass(frozen=True)
class Effort:
    """The amount of measurements."""

    name: str
    rounds: int  # of each row, at most
    least: int  # the least number of rounds of each row, even if they take too long
    least_of_many: int  # the same for rows with a size, which take long
    seconds: float  # a row starts no further round after this time
    scale: float  # a factor for the repetitions in each measurement
    sizes: tuple[int, ...]  # numbers of waiters

    def times(self, count: int) -> int:
        return max(2, round(count * self.scale))


class Key(NamedTuple):
    """What identifies a comparison in different runs."""

    suite: str
    backend: str
    work: str
    size: int
    peer: str

    def __str__(self) -> str:
        row = " ".join(filter(None, (self.suite, self.backend)))
        return f"{row}: {work_title(self.work, self.size)} / {self.peer}"


@dataclass
class Outcome:
    """The samples of a row."""

    suite: str
    backend: str
    work: str
    size: int
    unit: str
    samples: dict[str, list[float]] = field(default_factory=dict)

    def comparisons(self) -> Iterator[Comparison]:
        ours = self.samples.get(US)
        if ours:
            for peer, theirs in self.samples.items():
                if peer != US:
                    key = Key(self.suite, self.backend, self.work, self.size, peer)
                    yield Comparison(key, self.unit, ours, theirs)


class Comparison:
    """The cost of a peer divided by ours, with its confidence interval."""

    def __init__(self, key: Key, unit: str, ours: list[float], theirs: list[float]) -> None:
        self.key = key
        self.unit = unit
        self.ours = ours
        self.theirs = theirs
        # The median of the ratios of each round, not the ratio of the medians: while the machine is
        # slow for some rounds, the two medians may come from different ones.
        ratios = [their / our for our, their in zip(ours, theirs, strict=True)]
        self.ratio = statistics.median(ratios)
        self.low, self.high = _interval(ratios)

    def overlaps(self, other: Comparison) -> bool:
        return self.low <= other.high and other.low <= self.high


def work_title(work: str, size: int) -> str:
    return f"{work}, {size:,} waiters" if size else work


def spread(samples: list[float]) -> float:
    """Return half of the distance between the quartiles, as a part of the median."""
    if len(samples) < 2:
        return 0.0
    first, _, third = statistics.quantiles(samples, n=4, method="inclusive")
    return (third - first) / 2 / statistics.median(samples)


def _interval(ratios: list[float]) -> tuple[float, float]:
    """Return the 95% confidence interval of the median, by the bootstrap."""
    if len(set(ratios)) == 1:
        return ratios[0], ratios[0]
    dice = random.Random(0)  # so that the same samples always give the same interval
    medians = sorted(
        statistics.median(dice.choices(ratios, k=len(ratios))) for _ in range(RESAMPLES)
    )
    edge = RESAMPLES // 40
    return medians[edge], medians[-edge - 1]
