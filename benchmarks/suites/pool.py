"""Pools of connections: one borrower, and 100 borrowers of 10 connections.

What must live here: the work of tasks with a pool. The pools themselves are in `_pools`.
"""

from __future__ import annotations

import atexit
import functools
import statistics
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

from ..loops import checkpoint, crowd, run
from ..model import US, Contender, Effort, LeftOutError, Row
from . import _pools
from ._pools import Maker, Pool

# The server is started by a helper of the tests.
sys.path.append(str(Path(__file__).resolve().parent.parent.parent / "tests"))
from postgres_server import PostgresServer

NOTE = """\
The connections are stubs that do nothing, so that only the pool is measured; those of asyncpg are
real, to a server of their own. In a pool where a borrower that has just released may overtake the
waiters (see most served / least served), most waits are short, and a few are very long."""

TASKS = 100


class Subject(NamedTuple):
    name: str
    make: Maker
    needs: str = ""


OURS = Subject(US, _pools.ours)
COREDIS = Subject("coredis", _pools.of_coredis, "coredis")
ASYNC = {
    "asyncio": (
        OURS,
        Subject("psycopg_pool", _pools.of_psycopg, "psycopg_pool"),
        Subject("SQLAlchemy async", _pools.of_sqlalchemy_async, "sqlalchemy"),
        Subject("redis-py", _pools.of_redis, "redis"),
        COREDIS,
    ),
    "trio": (OURS, COREDIS),
}
BLOCKING = Subject("SQLAlchemy QueuePool", _pools.of_sqlalchemy, "sqlalchemy")


async def alone(pool: Pool, effort: Effort) -> float:
    """Seconds for one acquire and release of a pool that no other task uses."""
    acquire, release, release_is_async = pool
    times = effort.times(1000)
    begin = time.perf_counter()
    if release_is_async:
        for _ in range(times):
            await release(await acquire())
    else:
        for _ in range(times):
            release(await acquire())
    return (time.perf_counter() - begin) / times


async def _contend(pool: Pool, effort: Effort) -> tuple[float, list[float]]:
    """Return the seconds that 100 tasks take to borrow several times, and those of each wait."""
    use = checkpoint()
    times = effort.times(5)
    waits: list[float] = []

    async def work() -> None:
        for _ in range(times):
            begin = time.perf_counter()
            connection = await pool.acquire()
            waits.append(time.perf_counter() - begin)
            await use()
            given_back = pool.release(connection)
            if pool.release_is_async:
                await given_back

    async with crowd() as spawn:
        for _ in range(TASKS):
            spawn(work)
        begin = time.perf_counter()
    return time.perf_counter() - begin, waits


async def contended(pool: Pool, effort: Effort) -> float:
    """Seconds for each loan, where 100 tasks share 10 connections."""
    seconds, waits = await _contend(pool, effort)
    return seconds / len(waits)


async def wait(pool: Pool, effort: Effort, percent: int) -> float:
    _, waits = await _contend(pool, effort)
    return statistics.quantiles(waits, n=100)[percent - 1]


async def fairness(pool: Pool, effort: Effort) -> float:
    """The number of loans of the task with the most, divided by that of the one with the fewest."""
    use = checkpoint()
    served = [0] * TASKS
    until = time.perf_counter() + max(0.02, 0.3 * effort.scale)

    async def compete(number: int) -> None:
        while time.perf_counter() < until:
            connection = await pool.acquire()
            await use()
            given_back = pool.release(connection)
            if pool.release_is_async:
                await given_back
            served[number] += 1

    async with crowd() as spawn:
        for number in range(TASKS):
            spawn(partial(compete, number))
    # On a machine that stood still meanwhile, a task may have been served not even once.
    return max(1, *served) / max(1, min(served))


def measure(
    backend: str, what: Callable[[Pool, Effort], Awaitable[float]], make: Maker, effort: Effort
) -> float:
    async def main() -> float:
        async with make() as pool:
            for _ in range(20):  # to warm up
                given_back = pool.release(await pool.acquire())
                if pool.release_is_async:
                    await given_back
            return await what(pool, effort)

    return run(backend, main)


@functools.cache
def _server() -> str:
    """Return the host of a server that runs until the program ends."""
    why_not = PostgresServer.why_not()
    if why_not is not None:
        raise LeftOutError(why_not)
    server = PostgresServer()
    atexit.register(server.__exit__)
    try:
        server.start()
    except (RuntimeError, ImportError) as error:
        raise LeftOutError(str(error)) from None
    return server.host


def _on_server(make: Callable[[str], object]) -> Maker:
    return lambda: make(_server())  # type: ignore[return-value]


ON_SERVER = (
    Subject(US, _on_server(_pools.ours_of_asyncpg), "asyncpg"),
    Subject("asyncpg", _on_server(_pools.of_asyncpg), "asyncpg"),
)
EVEN = Contender("floor: all alike", lambda: 1.0)


def rows(backend: str, effort: Effort) -> Iterator[Row]:
    def row(work: str, what: Callable[..., Awaitable[float]], *subjects: Subject) -> Row:
        contenders = [
            Contender(s.name, partial(measure, backend, what, s.make, effort), s.needs)
            for s in subjects
        ]
        return Row("pool", backend, work, contenders)

    if not backend:
        return
    under_trio = backend == "trio"
    subjects = ASYNC["trio" if under_trio else "asyncio"]
    yield row("alone", alone, *subjects, *(() if under_trio else (BLOCKING,)))
    crowded = f"{TASKS} tasks, {_pools.SIZE} connections"
    yield row(crowded, contended, *subjects)
    yield row("wait of these, median", partial(wait, percent=50), *subjects)
    yield row("wait of these, 99%", partial(wait, percent=99), *subjects)
    shares = row("most served / least served", fairness, *subjects)
    yield replace(shares, contenders=[*shares.contenders, EVEN], unit="x")
    if not under_trio:
        yield row("alone, asyncpg on PostgreSQL", alone, *ON_SERVER)
        yield row(f"{crowded}, asyncpg", contended, *ON_SERVER)
