"""Pools on real databases: PostgreSQL and SQLite, one task, and many tasks that share few of them.

What must live here: the work of tasks with a pool. The pools themselves are in `_drivers`.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from functools import partial
from typing import LiteralString, NamedTuple

from ..loops import crowd, run
from ..model import US, Contender, Effort, Row
from . import _drivers
from ._drivers import Job, Maker

NOTE = """\
A job borrows a connection, executes one statement and gives the connection back. On PostgreSQL, 100
tasks share 10 connections, on SQLite 50 tasks share 5. All pools use one server with the same
settings, and are full before they are measured. Each resets its connections as it does by default:
asyncpg by several statements in one round trip, psycopg_pool by the end of the transaction,
SQLAlchemy by a transaction around each job, aiosqlitepool by a rollback, with a SELECT 1 before
each loan. On psycopg, aiosync with reset_session=False does what psycopg_pool does; by default it
restores the session too, by one more round trip. On SQLite its jobs run in threads of the pool, and
the wait ends when the thread begins. A pool in which a borrower may overtake the waiters has short
median waits and long 99% waits."""


class Subject(NamedTuple):
    name: str
    make: Maker
    needs: str = ""


class Work(NamedTuple):
    """A kind of job, and the pools that do it; the first is aiosync's."""

    title: str
    tasks: int
    jobs: int  # of each task
    times_alone: int  # 0: not measured
    subjects: Sequence[Subject]


def _asyncpg(query: str) -> tuple[Subject, ...]:
    return (
        Subject(US, partial(_drivers.ours_on_asyncpg, query), "asyncpg"),
        Subject("asyncpg.Pool", partial(_drivers.of_asyncpg, query), "asyncpg"),
        Subject("SQLAlchemy on asyncpg", partial(_drivers.of_sqlalchemy, query), "sqlalchemy"),
        Subject("floor: a deque of connections", partial(_drivers.bare_asyncpg, query), "asyncpg"),
    )


def _psycopg(query: LiteralString) -> tuple[Subject, ...]:
    return (
        Subject(US, partial(_drivers.ours_on_psycopg, query, False), "psycopg"),
        Subject(f"{US}, session too", partial(_drivers.ours_on_psycopg, query, True), "psycopg"),
        Subject("psycopg_pool", partial(_drivers.of_psycopg, query), "psycopg_pool"),
    )


SHORT = "SELECT 1"
LONG = "SELECT pg_sleep(0.002)"
READS = (
    Subject(US, partial(_drivers.ours_on_sqlite, False)),
    Subject("aiosqlitepool", _drivers.reads_of_aiosqlitepool, "aiosqlitepool"),
    Subject(
        "aiosqlitepool, one call", _drivers.reads_of_aiosqlitepool_by_one_call, "aiosqlitepool"
    ),
)
WRITES = (
    Subject(US, partial(_drivers.ours_on_sqlite, True)),
    Subject("aiosqlitepool", _drivers.writes_of_aiosqlitepool, "aiosqlitepool"),
)
WORKS = (
    Work("asyncpg, SELECT 1", 100, 20, 300, _asyncpg(SHORT)),
    Work("asyncpg, 2 ms", 100, 10, 0, _asyncpg(LONG)),
    Work("psycopg, SELECT 1", 100, 20, 300, _psycopg(SHORT)),
    Work("psycopg, 2 ms", 100, 10, 0, _psycopg(LONG)),
    Work("SQLite, read", 50, 20, 300, READS),
    Work("SQLite, write", 50, 20, 300, WRITES),
)
EVEN = Contender("floor: all alike", lambda: 1.0)


async def alone(job: Job, work: Work, effort: Effort) -> float:
    """Seconds for one job, where no other task uses the pool."""
    times = effort.times(work.times_alone)
    begin = time.perf_counter()
    for _ in range(times):
        await job()
    return (time.perf_counter() - begin) / times


async def _contend(job: Job, tasks: int, jobs: int) -> tuple[float, list[float]]:
    """Return the seconds that all jobs of all tasks take, and those of each wait."""
    waits: list[float] = []

    async def several() -> None:
        waits.extend([await job() for _ in range(jobs)])

    async with crowd() as spawn:
        for _ in range(tasks):
            spawn(several)
        begin = time.perf_counter()
    return time.perf_counter() - begin, waits


async def contended(job: Job, work: Work, effort: Effort) -> float:
    """Seconds for each job, where all tasks share the connections."""
    seconds, waits = await _contend(job, work.tasks, effort.times(work.jobs))
    return seconds / len(waits)


async def wait(job: Job, work: Work, effort: Effort, percent: int) -> float:
    _, waits = await _contend(job, work.tasks, effort.times(work.jobs))
    return statistics.quantiles(waits, n=100)[percent - 1]


async def fairness(job: Job, work: Work, effort: Effort) -> float:
    """The number of jobs of the task with the most, divided by that of the one with the fewest."""
    served = [0] * work.tasks
    until = time.perf_counter() + max(0.02, 0.3 * effort.scale)

    async def compete(number: int) -> None:
        while time.perf_counter() < until:
            await job()
            served[number] += 1

    async with crowd() as spawn:
        for number in range(work.tasks):
            spawn(partial(compete, number))
    # On a machine that stood still meanwhile, a task may have been served not even once.
    return max(1, *served) / max(1, min(served))


Question = Callable[[Job, Work, Effort], Awaitable[float]]


def measure(backend: str, question: Question, work: Work, make: Maker, effort: Effort) -> float:
    async def main() -> float:
        async with make() as job:
            # psycopg prepares a statement after 5 executions on a connection, others at once.
            await _contend(job, work.tasks, 1 if effort.scale < 0.1 else 2)
            return await question(job, work, effort)

    return run(backend, main)


def rows(backend: str, effort: Effort) -> Iterator[Row]:
    if backend in {"", "trio"}:  # the peers need asyncio
        return
    for work in WORKS:
        yield from _rows_of(work, backend, effort)


def _rows_of(work: Work, backend: str, effort: Effort) -> Iterator[Row]:
    def row(title: str, question: Question, *more: Contender, unit: str = "s") -> Row:
        contenders = [
            Contender(name, partial(measure, backend, question, work, make, effort), needs)
            for name, make, needs in work.subjects
        ]
        return Row("drivers", backend, title, [*contenders, *more], unit)

    yield row(work.title, contended)
    yield row(f"{work.title}: median wait", partial(wait, percent=50))
    yield row(f"{work.title}: 99% wait", partial(wait, percent=99))
    yield row(f"{work.title}: most / least served", fairness, EVEN, unit="x")
    if work.times_alone:
        yield row(f"{work.title}: alone", alone)
