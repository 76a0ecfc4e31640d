"""Semaphores and barriers on a Redis or Valkey server: round trips, hand-offs, and what they cost.

What must live here: the work with the locks of `_redis_locks`, and the counts that the server
keeps.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import AsyncExitStack
from functools import partial
from typing import Any

import anyio
import anyio.to_thread

from ..loops import crowd, run
from ..model import US, Contender, Effort, LeftOutError, Row
from . import _redis_processes as processes
from ._redis_locks import LEASE, SUBJECTS, Maker, Subject, of_aiosync_by_hold, ours
from ._redis_server import new_name, scripts_run, server, used_memory

NOTE = """\
All contenders use one server, which the benchmark starts, over TCP. A pair is an acquire and a
release of a permit that is free. "coredis, PING" is the least that one round trip costs by the
client that aiosync uses; a ratio of 0.7 to it means that a pair takes 1.4 PINGs. A "bar" is no
contender but the most that is allowed. Commands are counted by the server. In a hand-off, two
processes take turns, and the time is from a release in one until the other has the permit. For
"takeover", a process that holds the permit is killed by kill -9, and the time is from then until
a process that waits has it. Peers that need asyncio run there in the rows of trio too."""

WAITERS = 1000
# Seconds, where it is waited for the end of leases, or for heartbeats.
SHORT_LEASE = 2.0
NEEDS = "aiosync.redis"
PING = "coredis, PING"

Clock = Callable[[], float]


def _url() -> str:
    return server().url


# -- Pairs.


async def pairs(make: Maker, effort: Effort, clock: Clock = time.perf_counter) -> float:
    """Seconds for one acquire and release by one task."""
    times = effort.times(400)
    async with make(_url(), new_name(), LEASE) as (acquire, release):
        for lap in (3, times):
            begin = clock()
            for _ in range(lap):
                await acquire()
                released = release()
                if released is not None:
                    await released
        return (clock() - begin) / times


async def pings(tasks: int, effort: Effort, clock: Clock = time.perf_counter) -> float:
    """Seconds for one PING, where so many tasks send them."""
    import coredis

    times = effort.times(400 if tasks == 1 else 40)
    client = coredis.Redis.from_url(_url())
    async with client:

        async def several() -> None:
            for _ in range(times):
                await client.ping()

        await client.ping()
        begin = clock()
        if tasks == 1:
            await several()
        else:
            async with crowd() as spawn:
                for _ in range(tasks):
                    spawn(several)
        return (clock() - begin) / (times * tasks)


async def by_tasks(tasks: int, limit: int, effort: Effort, *, count: bool = False) -> float:
    """Seconds for one pair, where so many tasks want a permit. Or commands, if `count`."""
    times = effort.times(40 if limit > 1 else 20)
    async with ours(_url()) as redis:
        semaphore = redis.semaphore(new_name(), limit)

        async def several() -> None:
            for _ in range(times):
                await semaphore.acquire()
                semaphore.release()

        await semaphore.acquire()
        semaphore.release()
        commands = scripts_run() if count else 0
        begin = time.perf_counter()
        if tasks == 1:
            await several()
        else:
            async with crowd() as spawn:
                for _ in range(tasks):
                    spawn(several)
        cost = scripts_run() - commands if count else time.perf_counter() - begin
    return cost / (times * tasks)


# -- Barriers.


async def rounds(parties: int, effort: Effort, *, count: bool = False) -> float:
    """Seconds for one round of parties on two connections. Or commands, if `count`."""
    times = effort.times(200 if parties == 2 else 20)
    name = new_name()
    async with AsyncExitStack() as stack:
        connections = [await stack.enter_async_context(ours(_url())) for _ in range(2)]
        barriers = [redis.barrier(name, parties) for redis in connections]

        async def several(barrier: Any, times: int) -> None:
            for _ in range(times):
                await barrier.wait()

        for lap in (1, times):
            commands = scripts_run() if count else 0
            begin = time.perf_counter()
            async with crowd() as spawn:
                for number in range(parties):
                    spawn(partial(several, barriers[number % 2], lap))
        cost = scripts_run() - commands if count else time.perf_counter() - begin
    return cost / times


# -- Several processes.


def hand_off(lock: str, backend: str, effort: Effort, percent: int) -> float:
    """Seconds from a release in one process until the other has the permit."""
    found = processes.gaps(lock, backend, _url(), new_name(), max(20, effort.times(100)))
    if len(found) < 2:
        raise LeftOutError("it never changed hands")
    return statistics.quantiles(found, n=100, method="inclusive")[percent - 1]


async def takeover(lock: str, make: Maker, backend: str, effort: Effort) -> float:
    """The most seconds from kill -9 of a holder until a waiter has the permit."""
    worst = 0.0

    async def once(delay: float) -> None:
        nonlocal worst
        name = new_name()
        holder = processes.Process("hold", lock, backend, _url())
        try:
            holder.tell(name, SHORT_LEASE)
            await anyio.to_thread.run_sync(holder.hear)
            async with make(_url(), name, SHORT_LEASE) as (acquire, release), crowd() as spawn:
                killed = 0.0

                async def wait() -> None:
                    nonlocal worst
                    await acquire()
                    worst = max(worst, time.perf_counter() - killed)
                    released = release()
                    if released is not None:
                        await released

                spawn(wait)
                # Heartbeats are a third of a lease apart, so any moment between two is hit.
                await anyio.sleep(delay)
                killed = time.perf_counter()
                await anyio.to_thread.run_sync(holder.kill)
        finally:
            holder.kill()

    dice = random.Random(4)
    async with crowd() as spawn:
        for _ in range(min(4, effort.times(8))):
            spawn(partial(once, 0.3 + SHORT_LEASE * dice.random() / 3))
    return worst


# -- Many waiters.


async def _with_waiters(job: Callable[[int], Awaitable[float]]) -> float:
    """Run `job` where one connection has a holder, and another one many waiters.

    :param job: takes the memory that the server used before they waited
    """
    name, url = new_name(), _url()
    async with ours(url, SHORT_LEASE) as holding, ours(url, SHORT_LEASE) as waiting:
        await holding.semaphore(name).acquire()
        semaphore = waiting.semaphore(name)
        await semaphore.statistics()
        before = used_memory()
        async with crowd() as spawn:
            cancels = [spawn(semaphore.acquire) for _ in range(WAITERS)]
            while (await semaphore.statistics()).waiting < WAITERS:
                pass
            found = await job(before)
            for cancel in cancels:
                cancel()
        return found


async def subscriptions() -> float:
    async def job(before: int) -> float:
        # The two connections have subscribed, and none of another measurement is left.
        return max(float(client["sub"]) for client in server().clients())

    return await _with_waiters(job)


async def memory() -> float:
    """Bytes that each waiter costs the server."""

    async def job(before: int) -> float:
        return (used_memory() - before) / WAITERS

    return await _with_waiters(job)


async def heartbeats(effort: Effort) -> float:
    """Commands of each of the two processes in one lease."""
    leases = 3 if effort.scale > 0.1 else 1

    async def job(before: int) -> float:
        commands = scripts_run()
        await anyio.sleep(leases * SHORT_LEASE)
        return (scripts_run() - commands) / leases / 2

    return await _with_waiters(job)


# -- Rows.


def _bar(most: float, unit: str) -> Contender:
    return Contender(f"bar: {most:g} {unit}", lambda: most)


def rows(backend: str, effort: Effort) -> Iterator[Row]:
    if not backend:
        return

    def contender(name: str, main: Callable[[], Awaitable[float]], needs: str = NEEDS) -> Contender:
        return Contender(name, partial(run, backend, main), needs)

    def timed(title: str, main: Callable[[], Awaitable[float]], *others: Contender) -> Row:
        return Row("redis", backend, title, [contender(US, main), *others])

    def exact(title: str, main: Callable[[], Awaitable[float]], most: float, unit: str) -> Row:
        both = [contender(US, main), _bar(most, unit)]
        return Row("redis", backend, title, both, unit, exact=True)

    # Each with the backend that it runs on.
    locks = [
        (backend if subject.any_backend or backend != "trio" else "asyncio", subject)
        for subject in SUBJECTS
    ]
    ping = contender(PING, partial(pings, 1, effort), "coredis")
    ping_cpu = contender(PING, partial(pings, 1, effort, time.process_time), "coredis")
    ping_50 = contender("coredis, 50 tasks PING", partial(pings, 50, effort), "coredis")

    def pairs_of(clock: Clock) -> list[Contender]:
        return [
            Contender(
                subject.name,
                partial(run, loop, partial(pairs, subject.make, effort, clock)),
                subject.needs,
            )
            for loop, subject in locks
        ]

    us, *others = pairs_of(time.perf_counter)
    yield Row("redis", backend, "pair", [us, ping, *others])
    us, *others = pairs_of(time.process_time)
    yield Row("redis", backend, "pair: CPU time of the client", [us, ping_cpu, *others])
    yield timed("pair by hold()", partial(pairs, of_aiosync_by_hold, effort), ping)
    yield exact("pair: commands", partial(by_tasks, 1, 1, effort, count=True), 1, "commands")
    crowded = partial(by_tasks, 50, 50, effort)
    yield timed("50 tasks, limit 50", crowded, ping_50)
    title = "50 tasks, limit 50: commands a pair"
    yield exact(title, partial(crowded, count=True), 0.05, "commands")
    yield timed("50 tasks, limit 1", partial(by_tasks, 50, 1, effort), ping)
    for parties, most in ((2, 2), (100, 6)):
        title = f"barrier of {parties}, 2 connections"
        yield timed(title, partial(rounds, parties, effort), ping)
        title = f"barrier of {parties}: commands a round"
        yield exact(title, partial(rounds, parties, effort, count=True), most, "commands")
    yield from _rows_of_processes(backend, effort, locks, ping)
    yield exact("1,000 waiters: subscriptions", subscriptions, 1, "channels")
    yield exact("1,000 waiters: server memory of each", memory, 200, "B")
    yield exact("1,000 waiters: commands a lease", partial(heartbeats, effort), 4, "commands")


def _rows_of_processes(
    backend: str, effort: Effort, locks: Sequence[tuple[str, Subject]], ping: Contender
) -> Iterator[Row]:
    for percent, title in ((50, "median"), (99, "99%")):
        contenders = [
            Contender(
                subject.name, partial(hand_off, subject.name, loop, effort, percent), subject.needs
            )
            for loop, subject in locks
            if subject.fifo
        ]
        yield Row("redis", backend, f"hand-off of 2 processes, {title}", [*contenders, ping])
    contenders = [
        Contender(
            subject.name,
            partial(run, loop, partial(takeover, subject.name, subject.make, loop, effort)),
            subject.needs,
        )
        for loop, subject in locks
        if subject.expires
    ]
    bar = Contender("bar: lease + 0.1 s", lambda: SHORT_LEASE + 0.1)
    title = "takeover after kill -9, the longest"
    yield Row("redis", backend, title, [*contenders, bar], exact=True)
