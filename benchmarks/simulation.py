"""`python -m benchmarks.simulation`: what one Redis or Valkey server can carry for aiosync.redis.

What must live here: the examples, the tables and the command line. The model is in `capacity`.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import fields

from .capacity import MEASURED, Costs, Load, limit, predict, simulate

SCENARIOS = {
    "leader of 1,000 jobs, 2 candidates": Load(1000, 2, waiters=1, holders=0),
    "100 limits, 20 workers with 10 tasks": Load(
        100, 20, waiters=9, holders=1, pairs=20, contended=True
    ),
    "100,000 locks of one process each": Load(100_000, 1, waiters=0, pairs=0.01),
    "the same, with a lease of 60 s": Load(100_000, 1, waiters=0, lease=60, pairs=0.01),
    "10 connection limits, 200 processes": Load(10, 200, waiters=0, holders=10, pairs=20),
    "100,000 waiters for one name": Load(1, 100, waiters=1000, pairs=100, contended=True),
    "one hot name, a task at a time": Load(1, 50, waiters=1, pairs=2000, contended=True),
    "one hot name, 50 tasks at a time": Load(1, 1, waiters=50, pairs=20_000, batch=50),
}

HEADER = (
    f"{'':37} {'names':>7} {'processes':>9} {'waiters':>7} {'held':>4} {'lease':>5} {'pairs/s':>7}"
    f" {'commands/s':>10} {'busy':>5} {'99% wait':>8} {'memory':>7} {'restart':>7} {'servers':>7}"
)


def line(title: str, load: Load, costs: Costs, memory: float) -> str:
    """Return a line of the table."""
    answer = predict(load, costs)
    most, why = limit(load, costs, memory)
    waits = "endless"
    if answer.share < 1:
        waits = f"{statistics.quantiles(simulate(load, costs), n=100)[98] * 1000:.2f} ms"
    servers = f"{math.ceil(1 / most):,} ({why}"
    if load.names == 1 and most < 1:
        servers = f"too much ({why}"
    return (
        f"{title:37} {load.names:>7,} {load.processes:>9,} {load.waiters:>7,} {load.holders:>4,}"
        f" {load.lease:>3g} s {load.names * load.pairs:>7,.0f}"
        f" {answer.heartbeats + answer.others:>10,.0f} {answer.share:>5.0%} {waits:>8}"
        f" {answer.memory / 1e6:>4,.0f} MB {answer.recovery:>5.2f} s {servers}, x{most:.3g})"
    )


def table(loads: dict[str, Load], costs: Costs, memory: float) -> Iterator[str]:
    """Yield the lines of a table."""
    yield HEADER
    for title, load in loads.items():
        yield line(title, load, costs, memory)


def describe(costs: Costs) -> Iterator[str]:
    """Yield the costs, as they stand in `capacity`."""
    for part in fields(costs):
        yield f"    {part.name}={getattr(costs, part.name):.3g},"


# -- The command line.


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.simulation",
        description="What one Redis or Valkey server carries for aiosync.redis.",
        epilog="Without numbers, it prints a table of examples.",
    )
    parser.add_argument("--names", type=int, help="names in use")
    parser.add_argument("--processes", type=int, help="processes that use each of them")
    parser.add_argument("--waiters", type=int, help="tasks that wait, in each process, by name")
    parser.add_argument("--holders", type=int, help="permits held, in each process, by name")
    parser.add_argument("--lease", type=float, help="seconds")
    parser.add_argument("--pairs", type=float, help="acquires a second, of each name")
    parser.add_argument("--batch", type=int, help="how many of these are in one command")
    parser.add_argument(
        "--contended", action="store_true", default=None, help="each goes to another process"
    )
    parser.add_argument("--memory", type=float, default=4.0, help="GB the server has; default: 4")
    parser.add_argument(
        "--measure", action="store_true", help="measure the costs on a server that it starts"
    )
    parser.add_argument(
        "--verify", action="store_true", help="put a load on that server, and count"
    )
    options = parser.parse_args(arguments)
    for name, least in (
        ("names", 1),
        ("processes", 1),
        ("batch", 1),
        ("waiters", 0),
        ("holders", 0),
    ):
        given = getattr(options, name)
        if given is not None and given < least:
            parser.error(f"--{name} must be at least {least}, not {given}")
    for name in ("lease", "memory"):
        given = getattr(options, name)
        if given is not None and given <= 0:
            parser.error(f"--{name} must be positive, not {given:g}")
    if options.pairs is not None and options.pairs < 0:
        parser.error(f"--pairs must not be negative, not {options.pairs:g}")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parse(arguments)
    costs = MEASURED
    if options.measure or options.verify:
        # Not before: the tables need no server and no client.
        from .suites import _redis_costs

        costs = _redis_costs.measure()
        print("Costs, measured now:", *describe(costs), sep="\n")
        if options.verify:
            print(*_redis_costs.verify(costs), sep="\n")
    given = {
        part.name: getattr(options, part.name)
        for part in fields(Load)
        if getattr(options, part.name) is not None
    }
    loads = {"this load": Load(**given)} if given else SCENARIOS
    print(*table(loads, costs, options.memory * 1e9), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
