"""The output for people: numbers with units, and tables of plain text.

What must live here: the format of tables, but no decision on what is measured or printed.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence

from .model import US, Comparison, spread, work_title

_TIMES = ((1.0, "s"), (1e-3, "ms"), (1e-6, "us"), (1e-9, "ns"))


def quantity(value: float, unit: str) -> str:
    """Return `value` with three digits and a unit."""
    if unit == "s":
        size, unit = next((pair for pair in _TIMES if value >= pair[0]), _TIMES[-1])
        value /= size
    if unit == "x":
        return f"{value:.3f}x"
    if unit == "B" and value >= 10_000:
        value, unit = value / 1000, "kB"
    digits = 0 if value >= 100 or value == int(value) else 1 if value >= 10 else 2
    return f"{value:,.{digits}f} {unit}"


def factor(ratio: float) -> str:
    return f"{ratio:.2f}x" if ratio < 100 else f"{ratio:.0f}x"


def _cost(samples: list[float], unit: str) -> str:
    cost = quantity(statistics.median(samples), unit)
    return f"{cost} ±{spread(samples):3.0%}" if len(samples) > 1 else cost


def table(comparisons: Sequence[Comparison]) -> Iterator[str]:
    """Yield the lines of a table of one suite and backend."""
    yield f"{'ratio':>8} {'95% interval':^15} {'against':27} {'the other':>13} {US:>13}"
    work = ""
    for comparison in comparisons:
        title = work_title(comparison.key.work, comparison.key.size)
        if title != work:
            work = title
            rounds = len(comparison.ours)
            yield f"{work}" + (f" ({rounds} rounds)" if rounds > 1 else "")
        interval = f"[{factor(comparison.low)}, {factor(comparison.high)}]".replace("x", "")
        yield (
            f"{factor(comparison.ratio):>8} {interval:^15} {comparison.key.peer:27}"
            f" {_cost(comparison.theirs, comparison.unit):>13}"
            f" {_cost(comparison.ours, comparison.unit):>13}"
        )


def changes(old: Sequence[Comparison], new: Sequence[Comparison]) -> Iterator[str]:
    """Yield a line for each comparison that is in both runs."""
    before = {comparison.key: comparison for comparison in old}
    yield f"{'old':>8} {'new':>8}  intervals"
    for comparison in new:
        earlier = before.pop(comparison.key, None)
        if earlier is not None:
            overlap = "overlap" if comparison.overlaps(earlier) else "APART"
            yield (
                f"{factor(earlier.ratio):>8} {factor(comparison.ratio):>8}"
                f"  {overlap:9}  {comparison.key}"
            )
        else:
            yield f"{'-':>8} {factor(comparison.ratio):>8}  {'':9}  {comparison.key}"
    for key, earlier in before.items():
        yield f"{factor(earlier.ratio):>8} {'-':>8}  {'':9}  {key}"
