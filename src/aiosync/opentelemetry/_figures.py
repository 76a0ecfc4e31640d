"""The names of all metrics, and how the figures are read that show the present."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from .._barrier import Barrier
from .._semaphore import Semaphore

if TYPE_CHECKING:
    from collections.abc import Callable

    from .._observed import Record, Role
    from .._pool import ConnectionPool

    Attributes = dict[str, str]

POOL, SEMAPHORE, BARRIER = "db.client.connection", "aiosync.semaphore", "aiosync.barrier"

# What the names of the metrics of an object begin with, and the attribute with its own name.
PREFIXES: dict[Role, str] = {"pool": POOL, "semaphore": SEMAPHORE, "barrier": BARRIER}
_NAMES: dict[Role, str] = {
    "pool": f"{POOL}.pool.name",
    "semaphore": f"{SEMAPHORE}.name",
    "barrier": f"{BARRIER}.name",
}


def attributes_of(record: Record) -> Attributes:
    """Return the attributes of the metrics of an object. An object without a name has none."""
    return {} if record.name is None else {_NAMES[record.role]: record.name}


def _connections(record: Record, pool: ConnectionPool[Any]) -> dict[str, int]:
    """Return how many are idle, and how many are open for any other reason."""
    statistics = pool.statistics()
    used = statistics.size - statistics.idle - statistics.connecting
    return {"idle": statistics.idle, "used": max(0, used)}


def _pending(record: Record, pool: ConnectionPool[Any]) -> dict[str, int]:
    statistics = pool.statistics()
    return {"": statistics.tasks_waiting + statistics.threads_waiting}


def _value(record: Record, semaphore: object) -> dict[str, int]:
    # Only the server knows how many permits of a distributed semaphore are free.
    return {"": semaphore.value} if isinstance(semaphore, Semaphore) else {}


def _waiters(record: Record, shared: object) -> dict[str, int]:
    if isinstance(shared, Semaphore):
        return {"": shared.statistics().waiting}
    return {"": shared.n_waiting if isinstance(shared, Barrier) else len(record.waits)}


class Gauge(NamedTuple):
    """A figure of one object that is read whenever metrics are collected."""

    role: Role
    name: str
    unit: str
    description: str
    # Returns the values by the states that they are for; "": it has no states.
    read: Callable[[Record, Any], dict[str, int]]


GAUGES = (
    Gauge(
        "pool",
        f"{POOL}.count",
        "{connection}",
        "The number of connections that are currently in state described by the state attribute.",
        _connections,
    ),
    Gauge(
        "pool",
        f"{POOL}.idle.max",
        "{connection}",
        "The maximum number of idle open connections allowed.",
        lambda _, pool: {"": pool.max_size},
    ),
    Gauge(
        "pool",
        f"{POOL}.idle.min",
        "{connection}",
        "The minimum number of idle open connections allowed.",
        lambda _, pool: {"": pool.min_size},
    ),
    Gauge(
        "pool",
        f"{POOL}.max",
        "{connection}",
        "The maximum number of open connections allowed.",
        lambda _, pool: {"": pool.max_size},
    ),
    Gauge(
        "pool",
        f"{POOL}.pending_requests",
        "{request}",
        "The number of current pending requests for an open connection.",
        _pending,
    ),
    Gauge(
        "semaphore",
        f"{SEMAPHORE}.value",
        "{permit}",
        "The number of permits that are free.",
        _value,
    ),
    Gauge(
        "semaphore",
        f"{SEMAPHORE}.waiters",
        "{waiter}",
        "The number of tasks and threads that wait for a permit.",
        _waiters,
    ),
    Gauge(
        "barrier",
        f"{BARRIER}.parties",
        "{party}",
        "The number of parties of a round.",
        lambda _, barrier: {"": barrier.parties},
    ),
    Gauge(
        "barrier",
        f"{BARRIER}.waiters",
        "{waiter}",
        "The number of parties that have arrived in the current round.",
        _waiters,
    ),
)

# Durations in seconds, and their descriptions.
HISTOGRAMS = {
    f"{POOL}.create_time": "The time it took to create a new connection.",
    f"{POOL}.wait_time": "The time it took to obtain an open connection from the pool.",
    f"{POOL}.use_time": "The time between borrowing a connection and returning it to the pool.",
    f"{SEMAPHORE}.wait_time": "The time it took to acquire a permit.",
    f"{BARRIER}.wait_time": "The time from the arrival of a party to its passing.",
}

# With their units and descriptions.
COUNTERS = {
    f"{POOL}.timeouts": (
        "{timeout}",
        "The number of connection timeouts that have occurred trying to obtain a connection from "
        "the pool.",
    ),
    f"{SEMAPHORE}.timeouts": ("{timeout}", "The number of waits for a permit that timed out."),
    f"{BARRIER}.broken_rounds": ("{round}", "The number of rounds that were broken."),
}
