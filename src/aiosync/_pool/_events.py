"""What a pool tells its users: events, statistics, and facts about one connection. Plain data."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

# Why a connection was closed. Each has a counter, "closed_...".
CloseReason = Literal[
    "lifetime",  # it reached `max_lifetime`
    "idle",  # it was idle for `max_idle`
    "check",  # `check` failed
    "reset",  # `reset` failed
    "configure",  # `configure` failed
    "discard",  # its borrower discarded it
    "drain",
    "resize",  # there are more than `max_size`
    "limit",  # its permit of `limit` was lost, or other pools wait for one
    "collected",  # its borrower lost it, and it was garbage collected
    "shutdown",  # the pool was closed
    "forced",  # the same, while it was borrowed
]
CLOSE_REASONS: tuple[CloseReason, ...] = get_args(CloseReason)

EventKind = Literal[
    "connected",
    "connect_failed",
    "outage",
    "recovered",
    "closed",
    "close_failed",
    "leaked",
    "acquired",
    "released",
]


@dataclass(frozen=True)
class ConnectionInfo:
    """Facts about a connection, returned by `ConnectionPool.info`. Times are in seconds."""

    number: int
    """A number of its own: the first connection of a pool has 1."""
    age: float
    """How long ago it was made."""
    uses: int
    """How often it has been borrowed."""
    usage: float
    """For how long it has been borrowed, not counting the present time."""
    in_use: float | None
    """For how long it has been borrowed now; None if it is idle. While the pool closes a connection
    by force, its borrower still has it, until this is None.
    """
    expires_in: float
    """In how many seconds it will be replaced because of its age: infinite if never."""


@dataclass(frozen=True)
class PoolEvent:
    """The argument of the `on_event` hook of a `ConnectionPool`."""

    kind: EventKind
    """What happened.

    "outage": connecting keeps failing; "recovered": it works again; "leaked": a connection is
    borrowed for longer than `leak_timeout`, or its borrower has lost it; "acquired", "released":
    only if the pool has `loan_events`.
    """
    pool: str
    """The name of the pool."""
    reason: str = ""
    """Why a connection was closed; of a leak, the stack that took it, as in a traceback."""
    error: BaseException | None = None
    """What went wrong, if an exception tells it."""
    info: ConnectionInfo | None = None
    """The connection concerned."""
    seconds: float | None = None
    """For "connected": how long `connect` and `configure` took together."""


@dataclass(frozen=True)
class Histogram:
    """How often something took how long."""

    bounds: tuple[float, ...]
    """The upper bounds of all buckets but the last, in seconds, in ascending order."""
    counts: tuple[int, ...]
    """How many durations fell into each bucket: at most its bound, and more than the one before.
    The last bucket is for those above all bounds.
    """
    sum: float
    """The sum of all durations, in seconds."""

    @property
    def count(self) -> int:
        """How many durations there were."""
        return sum(self.counts)

    def as_dict(self) -> dict[str, Any]:
        """Return the fields as a dict of plain values."""
        return {"bounds": list(self.bounds), "counts": list(self.counts), "sum": self.sum}


@dataclass(frozen=True)
class PoolStatistics:
    """A snapshot of a `ConnectionPool`, returned by `ConnectionPool.statistics`.

    The fields up to `threads_waiting` describe the present; all others count from when the pool was
    made.
    """

    min_size: int
    """How many connections are kept."""
    max_size: int
    """How many connections there may be."""
    size: int
    """How many there are: idle, borrowed, or being made, validated or closed."""
    idle: int
    """How many are idle."""
    in_use: int
    """How many are borrowed."""
    connecting: int
    """How many are being made."""
    tasks_waiting: int
    """How many tasks wait for a connection."""
    threads_waiting: int
    """How many threads wait for a connection."""
    loans: int
    """How often a connection was borrowed."""
    queued: int
    """How many requests had to wait, whether they got a connection or not."""
    refusals: int
    """How many requests were refused without a wait: `max_waiting` or `fail_fast`."""
    timeouts: int
    """How many requests ended by a PoolTimeout."""
    cancelled: int
    """How many requests were cancelled or interrupted."""
    errors: int
    """How many requests ended because the pool was closed, or connecting failed (`fail_fast`)."""
    connects: int
    """How many attempts to connect have ended."""
    connect_errors: int
    """How many of these failed."""
    failed_checks: int
    """How many connections failed their `check`."""
    failed_resets: int
    """How many connections failed their `reset`."""
    failed_closes: int
    """How many times `close` failed. The connection is forgotten all the same."""
    leaks: int
    """How many connections were borrowed for longer than `leak_timeout`, or lost."""
    closed: dict[CloseReason, int]
    """How many connections were closed, by the reason."""
    wait_time: Histogram
    """How long requests that had to wait have waited."""
    use_time: Histogram
    """How long connections were borrowed."""
    connect_time: Histogram
    """How long `connect` and `configure` took together, if they succeeded."""

    def as_dict(self) -> dict[str, Any]:
        """Return the fields as a dict of plain values, for JSON for instance."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        values["closed"] = dict(self.closed)
        for name in ("wait_time", "use_time", "connect_time"):
            values[name] = values[name].as_dict()
        return values
