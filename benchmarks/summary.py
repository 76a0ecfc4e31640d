"""The summary at the end of a run: a line for each of the rows that matter most.

What must live here: the choice of these rows, and the format of the lines.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from .model import US, Comparison
from .report import factor
from .targets import target_of

HEADING = f"""\
SUMMARY
Cost of the other / cost of {US}: more than 1 means that {US} is faster. ~: the interval contains 1.
"""


class Line(NamedTuple):
    who: str
    title: str
    suite: str
    backend: str
    work: str
    size: int = 0


LINES = (
    Line("asyncio", "free permit", "semaphore", "asyncio", "free permit, fast_acquire"),
    Line("asyncio", "hand-off", "semaphore", "asyncio", "hand-off"),
    Line("asyncio", "barrier of 10", "barrier", "asyncio", "10 parties"),
    Line("asyncio", "16,000 cancelled", "scale", "asyncio", "cancel all, random order", 16_000),
    Line("trio", "free permit", "semaphore", "trio", "free permit"),
    Line("trio", "hand-off", "semaphore", "trio", "hand-off"),
    Line("trio", "barrier of 10", "barrier", "trio", "10 parties"),
    Line("threads", "free permit", "threads", "", "free permit, with"),
    Line("threads", "1 permit, 8 threads", "threads", "", "1 permit, 8 threads"),
    Line("threads", "barrier of 8", "threads", "", "barrier of 8 threads"),
    Line("threads", "shared with asyncio", "threads", "asyncio", "permit shared with tasks"),
    Line("pools", "100 on 10, stub", "pool", "asyncio", "100 tasks, 10 connections"),
    Line("pools", "100 on 10, asyncpg", "drivers", "asyncio", "asyncpg, SELECT 1"),
    Line("pools", "100 on 10, psycopg", "drivers", "asyncio", "psycopg, SELECT 1"),
    Line("pools", "50 on 5, SQLite", "drivers", "asyncio", "SQLite, read"),
    Line("processes", "pair, on a server", "redis", "asyncio", "pair"),
    Line("import", "after asyncio, anyio", "size", "", "import after asyncio and anyio"),
)


def lines(comparisons: Sequence[Comparison], machine: str) -> Iterator[str]:
    """Yield at most 20 lines about the rows that were measured; none if there are none.

    :param machine: the versions, and the machine
    """
    rows = [(line, found) for line in LINES if (found := _of(line, comparisons))]
    if not rows:
        return
    yield from HEADING.splitlines()
    yield machine
    who = ""
    for line, found in rows:
        peers = "".join(f"{_entry(comparison):26}" for comparison in found).rstrip()
        yield f"{line.who if line.who != who else '':10}{line.title:20}{peers}"
        who = line.who


def _of(line: Line, comparisons: Sequence[Comparison]) -> list[Comparison]:
    """Return what a line shows: a floor is no alternative."""
    return [
        comparison
        for comparison in comparisons
        if comparison.key[:4] == line[2:] and not comparison.key.peer.startswith("floor")
    ]


def _entry(comparison: Comparison) -> str:
    mark = "~" if comparison.low <= 1 <= comparison.high else ""
    peer = re.sub(r"\.(Semaphore|Barrier|Pool)$|, fast_acquire$", "", comparison.key.peer)
    target = target_of(comparison.key)
    missed = "" if target is None or comparison.ratio >= target else f" (target {target:.2f})"
    return f"{mark + factor(comparison.ratio):>7} {peer}{missed}"
