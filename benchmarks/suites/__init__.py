"""The suites, in the order in which they run.

What must live here: the list, and nothing else. A suite is data (the rows and their contenders) and
small functions that do the work.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

from ..model import Effort, Row
from . import barrier, debug, drivers, pool, redis, scale, semaphore, size, threads


class Suite(NamedTuple):
    # Takes a backend; "" for the rows without an event loop.
    rows: Callable[[str, Effort], Iterator[Row]]
    note: str = ""


SUITES = {
    "semaphore": Suite(semaphore.rows),
    "barrier": Suite(barrier.rows, barrier.NOTE),
    "threads": Suite(threads.rows),
    "scale": Suite(scale.rows, scale.NOTE),
    "pool": Suite(pool.rows, pool.NOTE),
    "drivers": Suite(drivers.rows, drivers.NOTE),
    "redis": Suite(redis.rows, redis.NOTE),
    "debug": Suite(debug.rows, debug.NOTE),
    "size": Suite(size.rows),
}
