"""Pools of connections: one borrower, and 100 borrowers of 10 connections.

What must live here: the work of tasks with a pool. The pools themselves are in `_pools`.
"""

from __future__ import annotations

import itertools
import logging
import statistics
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import NamedTuple

from ..loops import checkpoint, crowd, run
from ..model import US, Contender, Effort, Row
from . import _pools, _postgres
from ._pools import Maker, Pool

NOTE = """\
The connections are stubs that do nothing, so that only the pool is measured; those of asyncpg are
real, to a server of their own. In a pool where a borrower that has just released may overtake the
waiters (see most served / least served), most waits are short, and a few are very long. Replacement
under load: 100 tasks share 10 stubs, one loan in ten ends with a discard, a connect takes 1 ms, and
one in twenty fails."""

TASKS = 100

# Each connect that fails is logged. An application has a handler; this one prints nothing.
logging.getLogger("aiosync.pool").addHandler(logging.NullHandler())


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
    acquire, release, release_is_async, _ = pool
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


async def _replace(pool: Pool, effort: Effort) -> tuple[float, list[int]]:
    """Return the seconds for which 100 tasks borrow, and the number of loans of each.

    One loan in ten ends with a discard. A loan that ends too late is not counted, because fewer and
    fewer tasks are left by then.
    """
    use = checkpoint()
    served = [0] * TASKS
    loans = itertools.count(1)
    begin = time.perf_counter()
    until = begin + max(0.02, effort.scale)

    async def compete(number: int) -> None:
        while True:
            connection = await pool.acquire()
            await use()
            give_back = pool.discard if next(loans) % 10 == 0 else pool.release
            given_back = give_back(connection)
            if pool.release_is_async:
                await given_back
            if time.perf_counter() >= until:
                return
            served[number] += 1

    async with crowd() as spawn:
        for number in range(TASKS):
            spawn(partial(compete, number))
    return until - begin, served


async def replacement(pool: Pool, effort: Effort) -> float:
    """Seconds for each loan, where one in ten ends with a discard and some connects fail."""
    seconds, served = await _replace(pool, effort)
    return seconds / max(1, sum(served))


async def fair_replacement(pool: Pool, effort: Effort) -> float:
    _, served = await _replace(pool, effort)
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


def _on_server(make: Callable[[str], object]) -> Maker:
    return lambda: make(_postgres.host())  # type: ignore[return-value]


ON_SERVER = (
    Subject(US, _on_server(_pools.ours_of_asyncpg), "asyncpg"),
    Subject("asyncpg", _on_server(_pools.of_asyncpg), "asyncpg"),
)
REPLACING = (
    Subject(US, _pools.ours_replacing),
    Subject("connpool", _pools.of_connpool, "connpool"),
    Subject("connpool, retries at once", partial(_pools.of_connpool, 0), "connpool"),
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
        yield row("replacement under load", replacement, *REPLACING)
        shares = row("replacement: most / least served", fair_replacement, *REPLACING)
        yield replace(shares, contenders=[*shares.contenders, EVEN], unit="x")
        yield row("alone, asyncpg on PostgreSQL", alone, *ON_SERVER)
        yield row(f"{crowded}, asyncpg", contended, *ON_SERVER)
