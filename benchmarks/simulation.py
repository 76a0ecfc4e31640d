"""`python -m benchmarks.simulation`: what one Redis or Valkey server can carry for aiosync.redis.

What must live here: the model of the load on a server, its simulation, and the costs that were
measured. A server runs one command at a time, so its load is the sum of the time of all commands.
"""

from __future__ import annotations

import argparse
import math
import random
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import NamedTuple

# The largest part of its time that a server should be busy: waits grow without bound towards 1.
BUSY = 0.7
# A process sends a heartbeat for each of its names each third of a lease. A call may take as long.
BEATS = 3


@dataclass(frozen=True)
class Costs:
    """What a server spends. Times are CPU time of its main thread, with reading and writing."""

    heartbeat: float
    """Microseconds of a command that only renews the lease."""
    pair: float
    """Microseconds of a command with one release and one acquire."""
    batched: float
    """Microseconds of a release and an acquire in a command with many of them."""
    hand_off: float
    """Microseconds of a command that gives a permit to another process, with the message."""
    name: float
    """Bytes of a name that one process uses."""
    member: float
    """Bytes of each further process that uses a name: its lease, and its subscription."""
    holder: float
    """Bytes of a permit that is held."""
    waiter: float
    """Bytes of a waiter."""
    connection: float
    """Bytes of a connection."""


# As `--measure` has printed: Valkey 9.1.2 on 2 cores that were busy with other work.
MEASURED = Costs(
    heartbeat=96.6,
    pair=155,
    batched=16.8,
    hand_off=313,
    name=933,
    member=261,
    holder=104,
    waiter=101,
    connection=6090,
)


@dataclass(frozen=True)
class Load:
    """How a server is used."""

    names: int = 1000
    processes: int = 10
    """How many processes use each name, and hold a permit or wait."""
    waiters: int = 1
    """Tasks that wait, in each process for each name."""
    holders: int = 1
    """Permits that are held, in each process for each name."""
    lease: float = 10.0
    pairs: float = 0.0
    """How often a permit is taken and given back a second, for each name."""
    batch: int = 1
    """How many of these are in one command, because tasks of one process come at the same time."""
    contended: bool = False
    """Whether each of these goes from one process to another."""


@dataclass(frozen=True)
class Answer:
    """What a load is for a server."""

    heartbeats: float
    """Commands a second that only renew leases. A name that is busy needs fewer."""
    others: float
    """Other commands a second."""
    cost: float
    """Microseconds of each of these."""
    share: float
    """The part of its time that one server is busy; more than 1 is too much."""
    memory: float
    """Bytes."""
    recovery: float
    """Seconds of work after a restart: all processes ask again about everything."""


def predict(load: Load, costs: Costs) -> Answer:
    """Return what `load` is for one server."""
    members = load.names * load.processes
    tickets = members * (load.waiters + load.holders)
    heartbeats = members * BEATS / load.lease
    others = load.names * load.pairs / load.batch
    cost = costs.hand_off if load.contended else costs.pair
    cost += (load.batch - 1) * costs.batched
    memory = (
        load.names * costs.name
        + (members - load.names) * costs.member
        + members * (load.holders * costs.holder + load.waiters * costs.waiter)
        + load.processes * costs.connection
    )
    # Each process asks about each of its names by one command, with an operation for each ticket.
    recovery = (members * costs.heartbeat + tickets * costs.batched / 2) / 1e6
    share = (heartbeats * costs.heartbeat + others * cost) / 1e6
    return Answer(heartbeats, others, cost, share, memory, recovery)


class Limit(NamedTuple):
    """How much one server carries at the most."""

    factor: float
    """How many times the load."""
    why: str
    """What ends first: its "time", its "memory", or the "restart"."""


def limit(load: Load, costs: Costs, memory: float) -> Limit:
    """Return how many times `load` one server carries.

    :param memory: how many bytes the server may use
    """
    answer = predict(load, costs)
    found = {
        "time": BUSY / answer.share,
        # Else calls run out of time, and all processes connect and ask once more.
        "restart": load.lease / BEATS / answer.recovery,
        "memory": memory / answer.memory,
    }
    why = min(found, key=found.__getitem__)
    return Limit(found[why], why)


def simulate(load: Load, costs: Costs, commands: int = 20_000, seed: int = 1) -> list[float]:
    """Return how many seconds each of some commands waits until the server begins with it.

    Heartbeats come from many processes at times of their own, so all commands come at random. The
    server takes them one by one in the order in which they come.
    """
    dice = random.Random(seed)
    answer = predict(load, costs)
    rate = answer.heartbeats + answer.others
    now = free = 0.0
    waits = []
    for _ in range(commands):
        now += dice.expovariate(rate)
        begin = max(now, free)
        waits.append(begin - now)
        is_heartbeat = dice.random() < answer.heartbeats / rate
        free = begin + (costs.heartbeat if is_heartbeat else answer.cost) / 1e6
    return waits


# -- Output.


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
    """Yield the costs, as they stand in this file."""
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
