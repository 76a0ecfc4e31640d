"""The suites, in the order in which they run.

What must live here: the list, and nothing else. A suite is data (who is compared with whom, doing
what) and the small functions that do it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

from ..model import Effort, Row
from . import barrier, pool, scale, semaphore, size, threads


class Suite(NamedTuple):
    # What it measures on a backend; "" stands for what needs none.
    rows: Callable[[str, Effort], Iterator[Row]]
    note: str = ""


SUITES = {
    "semaphore": Suite(semaphore.rows),
    "barrier": Suite(barrier.rows, barrier.NOTE),
    "scale": Suite(scale.rows, scale.NOTE),
    "threads": Suite(threads.rows),
    "pool": Suite(pool.rows, pool.NOTE),
    "size": Suite(size.rows),
}
