"""The hall of connection pools.

What must live here: a backend that does what a scenario wants, and the scenarios. All pools have
room for one connection only, so a slot that is lost is missed at once.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial
from typing import Protocol

import anyio

import aiosync
from museum import pools_of_others as others
from museum.exhibits import Control, exhibit
from museum.stage import Fate, Stage, expect


class Connection:
    def __init__(self) -> None:
        self.dead = False

    def __repr__(self) -> str:
        return "a connection"


class Server:
    """A backend. Each step (connect, check, reset) can be held up."""

    def __init__(self) -> None:
        self.up = True
        self.begun: Counter[str] = Counter()
        self._held: dict[str, anyio.Event] = {}

    def hold(self, step: str) -> None:
        self._held[step] = anyio.Event()

    def let_go(self, step: str) -> None:
        self._held.pop(step).set()

    async def connect(self) -> Connection:
        await self._take("connect")
        if not self.up:
            raise ConnectionRefusedError("the server is down")
        return Connection()

    async def check(self, connection: Connection) -> None:
        await self._take("check")
        if connection.dead:
            raise ConnectionResetError("the connection is dead")

    async def reset(self, connection: Connection) -> None:
        await self._take("reset")
        if connection.dead:
            raise ConnectionResetError("the connection is dead")

    async def _take(self, step: str) -> None:
        self.begun[step] += 1
        if step in self._held:
            await self._held[step].wait()


class PoolLike(Protocol):
    async def acquire(self) -> Connection: ...

    async def release(self, connection: Connection) -> None: ...


class Maker(Protocol):
    def __call__(
        self, server: Server, *, lifetime: float = math.inf
    ) -> AbstractAsyncContextManager[PoolLike]: ...


class _Ours:
    def __init__(self, pool: aiosync.ConnectionPool[Connection]) -> None:
        self.pool = pool

    async def acquire(self) -> Connection:
        return await self.pool.acquire()

    async def release(self, connection: Connection) -> None:
        self.pool.release(connection)


@asynccontextmanager
async def ours(server: Server, *, lifetime: float = math.inf) -> AsyncIterator[PoolLike]:
    async with aiosync.ConnectionPool(
        server.connect,
        check=server.check,
        check_idle=0,
        reset=server.reset,
        max_size=1,
        max_lifetime=lifetime,
        max_idle=None,
        # No step may end because it takes too long.
        timeout=600,
        check_timeout=None,
    ) as pool:
        yield _Ours(pool)


async def expect_service(stage: Stage, pool: PoolLike) -> Connection:
    """Borrow, as nobody else does or wants to; return what was borrowed, given back."""
    actor = await stage.start(pool.acquire)
    outcome = await actor.outcome()
    expect(isinstance(outcome, Connection), f"all is idle, and acquire() ends in {outcome!r}")
    connection: Connection = outcome
    await pool.release(connection)
    await stage.settle()
    return connection


PSYCOPG = Control("psycopg_pool.AsyncConnectionPool", others.of_psycopg, "psycopg_pool")
ASYNCPG = Control("asyncpg.Pool", others.of_asyncpg, "asyncpg")
REDIS = Control("redis.asyncio.BlockingConnectionPool", others.of_redis, "redis")
SQLALCHEMY = Control("sqlalchemy.AsyncAdaptedQueuePool", others.of_sqlalchemy, "sqlalchemy")
COREDIS = Control("coredis.ConnectionPool", others.of_coredis, "coredis")
ALL = (ASYNCPG, COREDIS, PSYCOPG, REDIS, SQLALCHEMY)


def rebuilt(kind: type[others.SmallPool]) -> Control:
    return Control(kind.__name__, partial(others.rebuilt, kind))


SMALL = rebuilt(others.SmallPool)


@exhibit(
    "asyncpg, psycopg, httpcore",
    "a caller is cancelled while its connection is made: the slot is lost",
    reports="MagicStack/asyncpg#467 psycopg/psycopg#509 encode/httpcore#1093",
    seen="coredis 6.9.0",
    ours=ours,
    controls=[rebuilt(others.ForgetsTheCancelled), *ALL],
)
async def lost_at_connect(stage: Stage, make: Maker) -> None:
    server = Server()
    async with make(server) as pool:
        server.hold("connect")
        waiter = await stage.start(pool.acquire)
        expect(server.begun["connect"] == 1, "nobody connects")
        waiter.cancel()
        await stage.settle()
        server.let_go("connect")
        await stage.settle()
        await expect_service(stage, pool)


@exhibit(
    "psycopg",
    "a caller is cancelled while its connection is checked: the slot is lost",
    reports="psycopg/psycopg#1208",
    ours=ours,
    controls=[rebuilt(others.ForgetsTheCancelled), PSYCOPG, ASYNCPG],
)
async def lost_at_check(stage: Stage, make: Maker) -> None:
    server = Server()
    async with make(server) as pool:
        await expect_service(stage, pool)
        before = server.begun["check"]
        server.hold("check")
        waiter = await stage.start(pool.acquire)
        expect(server.begun["check"] == before + 1, "nobody checks")
        waiter.cancel()
        await stage.settle()
        server.let_go("check")
        await stage.settle()
        await expect_service(stage, pool)


@exhibit(
    "asyncpg, redis-py",
    "the borrower and a waiter are cancelled during the reset: the slot is lost",
    reports="MagicStack/asyncpg#97 redis/redis-py#4121",
    ours=ours,
    controls=[rebuilt(others.ResetsUnshielded), ASYNCPG, PSYCOPG, SQLALCHEMY],
)
async def lost_at_reset(stage: Stage, make: Maker) -> None:
    server = Server()
    async with make(server) as pool:
        connection = await pool.acquire()
        waiter = await stage.start(pool.acquire)
        server.hold("reset")
        borrower = await stage.start(partial(pool.release, connection))
        expect(server.begun["reset"] == 1, "nobody resets")
        borrower.cancel()
        waiter.cancel()
        await stage.settle()
        server.let_go("reset")
        await stage.settle()
        await expect_service(stage, pool)


# At which steps after the beginning of a release something else happens.
MOMENTS = range(12)


@exhibit(
    "asyncpg, psycopg",
    "a waiter is cancelled as it is given a connection: the slot is lost",
    reports="MagicStack/asyncpg#547 MagicStack/asyncpg#955 psycopg/psycopg#509",
    ours=ours,
    controls=[rebuilt(others.DeliversBlindly), *ALL],
)
async def lost_at_delivery(stage: Stage, make: Maker) -> None:
    for moment in MOMENTS:
        async with make(Server()) as pool:
            connection = await pool.acquire()
            waiter = await stage.start(pool.acquire)
            stage.begin(partial(pool.release, connection))
            for _ in range(moment):
                await stage.step()
            waiter.cancel()
            outcome = await waiter.outcome()
            if isinstance(outcome, Connection):  # it was too late for that
                await pool.release(outcome)
            await stage.settle()
            await expect_service(stage, pool)


@exhibit(
    "asyncpg",
    "a connection dies while it is borrowed: the slot is lost",
    reports="MagicStack/asyncpg#220",
    seen="coredis 6.9.0",
    ours=ours,
    controls=[rebuilt(others.KeepsNoDead), *ALL],
)
async def lost_with_the_dead(stage: Stage, make: Maker) -> None:
    async with make(Server()) as pool:
        connection = await pool.acquire()
        connection.dead = True
        await pool.release(connection)
        await stage.settle()
        another = await expect_service(stage, pool)
        expect(another is not connection, "the dead one is lent again")


@exhibit(
    "asyncpg",
    "a newcomer takes a connection that is given back, and the waiter goes on waiting",
    reports="MagicStack/asyncpg#1247",
    seen="asyncpg 0.32.0, redis-py 8.1.0, SQLAlchemy 2.1.9",
    ours=ours,
    controls=[SMALL, *ALL],
)
async def overtaken(stage: Stage, make: Maker) -> None:
    for moment in MOMENTS:
        async with make(Server()) as pool:
            order: list[str] = []
            connection = await pool.acquire()
            waiter = await stage.start(partial(_visit, pool, order, "waiter"))
            stage.begin(partial(pool.release, connection))
            for _ in range(moment):
                await stage.step()
            newcomer = await stage.start(partial(_visit, pool, order, "newcomer"))
            await waiter.outcome()
            await newcomer.outcome()
            expect(order == ["waiter", "newcomer"], f"served, {moment} steps later: {order}")


async def _visit(pool: PoolLike, order: list[str], name: str) -> None:
    connection = await pool.acquire()
    order.append(name)
    await pool.release(connection)


@exhibit(
    "psycopg",
    "a caller is cancelled as its connection is checked or handed over: it never notices",
    reports="psycopg/psycopg#1401 psycopg/psycopg#1345",
    seen="psycopg_pool 3.3.3 on CPython 3.11",
    ours=ours,
    controls=[rebuilt(others.SwallowsCancels), PSYCOPG, ASYNCPG],
)
async def cancel_swallowed(stage: Stage, make: Maker) -> None:
    server = Server()
    async with make(server) as pool:
        await expect_service(stage, pool)
        server.hold("check")
        waiter = await stage.start(pool.acquire)
        waiter.cancel()
        await stage.settle()
        server.let_go("check")
        outcome = await waiter.outcome()
        expect(outcome is Fate.CANCELLED, f"acquire() was cancelled, and ends in {outcome!r}")
    # A cancel scope that is cancelled after the delivery is felt later, and that is right.
    for moment in MOMENTS if stage.native else ():
        async with make(Server()) as pool:
            connection = await pool.acquire()
            waiter = await stage.start(pool.acquire)
            stage.begin(partial(pool.release, connection))
            for _ in range(moment):
                await stage.step()
            late = waiter.done
            waiter.cancel()
            outcome = await waiter.outcome()
            expect(late or outcome is Fate.CANCELLED, f"{moment} steps later: {outcome!r}")
            if isinstance(outcome, Connection):
                await pool.release(outcome)


@exhibit(
    "psycopg",
    "after an outage the pool never connects again",
    reports="psycopg/psycopg#370 psycopg/psycopg#1315",
    ours=ours,
    controls=[rebuilt(others.GivesUp), *ALL],
    not_on="uvloop",
)
async def never_recovers(stage: Stage, make: Maker) -> None:
    server = Server()
    server.up = False
    async with make(server) as pool:
        for _ in range(10):
            await stage.start(pool.acquire)
            await anyio.sleep(700)
        server.up = True
        await anyio.sleep(700)
        await expect_service(stage, pool)


@exhibit(
    "psycopg",
    "a connection that expired while it was idle is lent",
    reports="psycopg/psycopg#584 psycopg/psycopg#849",
    seen="psycopg_pool 3.3.3",
    ours=ours,
    controls=[rebuilt(others.LooksAtAgeTooLate), PSYCOPG],
    not_on="uvloop",
)
async def expired_is_lent(stage: Stage, make: Maker) -> None:
    async with make(Server(), lifetime=100) as pool:
        connection = await expect_service(stage, pool)
        await anyio.sleep(150)
        another = await expect_service(stage, pool)
        expect(another is not connection, "it is 50 seconds too old")
