"""Counters and histograms of a pool, and facts for its messages."""

from __future__ import annotations

import logging
from bisect import bisect_left
from collections import Counter
from copy import deepcopy
from itertools import count
from threading import RLock
from typing import TYPE_CHECKING, Any

from .._park import ThreadWaiter
from ._entry import State
from ._events import CLOSE_REASONS, ConnectionInfo, Histogram, PoolStatistics

if TYPE_CHECKING:
    from collections.abc import Iterable

    from ._entry import PoolEntry
    from ._inventory import Inventory
    from ._options import Options

log = logging.getLogger("aiosync.pool")

# The upper bounds of the buckets of all histograms, in seconds.
BOUNDS = (
    0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0,
    10.0, 30.0, 60.0,
)  # fmt: skip

# A connection's durations of use are counted in one go after so many, minus 1 (a power of 2).
BATCH = 255

# How many borrowers an error names.
_MOST = 5

# The fields of `PoolStatistics` that are counted by name. Others are "requests_errors", for
# `as_psycopg`, "closed_" with the reason, and "loans" of closed connections.
_COUNTED = (
    "refusals", "timeouts", "cancelled", "errors", "connects", "connect_errors", "failed_checks",
    "failed_resets", "failed_closes", "leaks",
)  # fmt: skip


class _Durations:
    """A histogram that is added to."""

    def __init__(self) -> None:
        self.counts = [0] * (len(BOUNDS) + 1)
        self.sum = 0.0

    def add(self, durations: Iterable[float]) -> None:
        for duration in durations:
            self.counts[bisect_left(BOUNDS, duration)] += 1
            self.sum += duration

    def frozen(self) -> Histogram:
        return Histogram(BOUNDS, tuple(self.counts), self.sum)


class Statistics:
    """The figures of one pool. Every method may be called from any thread.

    The lock is taken only when something unusual happens, never to borrow an idle connection. It is
    re-entrant, for signal handlers and finalizers, and no foreign code runs while it is held.
    """

    def __init__(self) -> None:
        self._lock = RLock()
        self._counts: Counter[str] = Counter()
        # How long requests have waited that are not in the histogram yet, in seconds.
        self.waits: list[float] = []
        self._wait, self._use, self._connect = _Durations(), _Durations(), _Durations()
        # For new connections.
        self.numbers = count(1)

    def count(self, name: str) -> None:
        with self._lock:
            self._counts[name] += 1

    def fold_waits(self) -> None:
        """Count what is in `waits`. To be called now and then, so that it does not grow."""
        with self._lock:
            waits = self.waits.copy()
            del self.waits[: len(waits)]  # other threads append
            self._wait.add(waits)

    def observe_connect(self, seconds: float) -> None:
        """Take note of how long it took to connect."""
        with self._lock:
            self._connect.add((seconds,))

    def flush(self, entry: PoolEntry[Any]) -> None:
        """Count the latest uses of an entry. To be called by the one that it belongs to."""
        with self._lock:
            samples, entry.samples = entry.samples, []
            entry.usage += sum(samples)
            self._use.add(samples)

    def forget(self, entry: PoolEntry[Any]) -> None:
        """Keep the sums of an entry that has been closed."""
        self.flush(entry)
        with self._lock:
            self._counts["loans"] += entry.uses

    def snapshot(
        self, inventory: Inventory[Any], options: Options, connecting: int
    ) -> PoolStatistics:
        """Return all figures.

        :param connecting: how many connections are being made that are not in the inventory
        """
        entries = list(inventory.entries.copy().values())
        waiting = inventory.waiting()
        threads = sum(isinstance(waiter, ThreadWaiter) for waiter in waiting)
        self.fold_waits()
        with self._lock:
            counts = self._counts.copy()
            loans = counts["loans"] + sum(entry.uses for entry in entries)
            use = deepcopy(self._use)
            wait, connect = self._wait.frozen(), self._connect.frozen()
        for entry in entries:
            use.add(entry.samples.copy())
        return PoolStatistics(
            min_size=options.min_size,
            max_size=options.max_size,
            size=len(entries) + connecting,
            idle=inventory.idle(),
            in_use=len(inventory.in_use),
            connecting=connecting + inventory.count(State.CONFIGURING),
            tasks_waiting=len(waiting) - threads,
            threads_waiting=threads,
            loans=loans,
            queued=wait.count,
            closed={reason: counts[f"closed_{reason}"] for reason in CLOSE_REASONS},
            wait_time=wait,
            use_time=use.frozen(),
            connect_time=connect,
            **{name: counts[name] for name in _COUNTED},
        )

    def as_psycopg(self, found: PoolStatistics) -> dict[str, int]:
        """Return `found` by the names of ``psycopg_pool``; see `ConnectionPool.get_stats`."""
        errors = self._counts["requests_errors"]
        return {
            "pool_min": found.min_size,
            "pool_max": found.max_size,
            "pool_size": found.size,
            "pool_available": found.idle,
            "in_use": found.in_use,
            "connecting": found.connecting,
            "requests_waiting": found.tasks_waiting + found.threads_waiting,
            "requests_num": found.loans + errors + found.cancelled,
            "requests_queued": found.queued,
            "requests_wait_ms": int(1000 * found.wait_time.sum),
            "requests_errors": errors,
            "timeouts": found.timeouts,
            "cancelled": found.cancelled,
            "usage_ms": int(1000 * found.use_time.sum),
            "returns_bad": found.closed["reset"] + found.closed["discard"],
            "connections_num": found.connects,
            "connections_ms": int(1000 * found.connect_time.sum),
            "connections_errors": found.connect_errors,
            "connections_lost": found.failed_checks,
            "leaks": found.leaks,
            **{f"closed_{reason}": number for reason, number in found.closed.items()},
        }


def info(inventory: Inventory[Any], entry: PoolEntry[Any], now: float) -> ConnectionInfo:
    """Return the facts about one connection."""
    borrowed = entry.key in inventory.in_use or entry.key in inventory.reclaimed
    return ConnectionInfo(
        number=entry.number,
        age=now - entry.created,
        uses=entry.uses,
        usage=entry.usage + sum(entry.samples.copy()),
        in_use=now - entry.taken if borrowed else None,
        expires_in=max(0.0, entry.expires - now),
    )


def borrowers(inventory: Inventory[Any], now: float) -> str:
    """Return the known borrowers and for how many seconds they borrow, the longest first."""
    # Each stack is read once, since another thread may end the loan meanwhile.
    known = [
        (entry.taken, f"{entry.borrower} at {site} for {now - entry.taken:.1f} s")
        for entry in inventory.borrowed()
        for site in entry.stack[-1:]
    ]
    known.sort()
    found = [text for _, text in known[:_MOST]]
    return ", ".join(found) + (", ..." if len(known) > _MOST else "")


def describe(error: BaseException | None) -> str:
    """Return the repr of `error`, or its class if that fails."""
    try:
        return repr(error)
    except Exception:
        return type(error).__name__
