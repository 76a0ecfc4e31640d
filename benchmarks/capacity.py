"""The model of the load on a Redis or Valkey server, and its simulation.

What must live here: the load, the costs that were measured, and the arithmetic. A server runs one
command at a time, so its load is the sum of the time of all commands.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
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
