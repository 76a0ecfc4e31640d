"""aiosync's pool and those of others, each with stubs for connections.

What must live here: adapters, one for each pool. The work with them is in `pool`.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import anyio

import aiosync

SIZE = 10


def _cannot_discard(connection: Any) -> None:
    raise NotImplementedError


class Pool(NamedTuple):
    """How to borrow from a pool, and how to give back.

    `release` and `discard`, which closes the connection, may both return awaitables.
    """

    acquire: Callable[[], Awaitable[Any]]
    release: Callable[[Any], Any]
    release_is_async: bool
    discard: Callable[[Any], Any] = _cannot_discard


Maker = Callable[[], AbstractAsyncContextManager[Pool]]


class Stub:
    """A connection to nothing; the methods that SQLAlchemy calls do nothing."""

    def rollback(self) -> None:
        pass

    def close(self) -> None:
        pass


async def _stub() -> Stub:
    return Stub()


def _slow_connect() -> Callable[[], Awaitable[Stub]]:
    """Return a function that connects in 1 ms, and fails one time in twenty."""
    numbers = itertools.count(1)

    async def connect() -> Stub:
        await asyncio.sleep(0.001)
        if next(numbers) % 20 == 0:
            raise ConnectionError("the server is busy")
        return Stub()

    return connect


@asynccontextmanager
async def ours(connect: Callable[[], Awaitable[Any]] = _stub) -> AsyncIterator[Pool]:
    async with aiosync.ConnectionPool(
        connect, min_size=SIZE, max_size=SIZE, fast_acquire=True
    ) as pool:
        await pool.wait()
        yield Pool(pool.acquire, pool.release, False)


@asynccontextmanager
async def of_psycopg() -> AsyncIterator[Pool]:
    import psycopg
    from psycopg.pq import TransactionStatus
    from psycopg_pool import AsyncConnectionPool

    class Connection(psycopg.AsyncConnection[Any]):
        """A connection that is never opened, and that calls itself idle."""

        def __init__(self) -> None:
            self.pgconn: Any = SimpleNamespace(transaction_status=TransactionStatus.IDLE)

        @classmethod
        async def connect(cls, *args: Any, **kwargs: Any) -> Any:
            return cls()

        async def close(self) -> None:
            pass

        def __del__(self, *_: Any) -> None:
            pass

    pool = AsyncConnectionPool(
        "", connection_class=Connection, min_size=SIZE, max_size=SIZE, open=False
    )
    await pool.open(wait=True)
    yield Pool(pool.getconn, pool.putconn, True)
    await pool.close()


@asynccontextmanager
async def of_sqlalchemy() -> AsyncIterator[Pool]:
    """Yield the pool for threads, which is fast, but blocks the event loop while it is empty."""
    from sqlalchemy.pool import QueuePool

    pool: Any = QueuePool(Stub, pool_size=SIZE, max_overflow=0)  # type: ignore[arg-type,unused-ignore]

    async def acquire() -> Any:
        return pool.connect()

    yield Pool(acquire, lambda connection: connection.close(), False)
    pool.dispose()


@asynccontextmanager
async def of_sqlalchemy_async() -> AsyncIterator[Pool]:
    from sqlalchemy.pool import AsyncAdaptedQueuePool
    from sqlalchemy.util import greenlet_spawn

    pool: Any = AsyncAdaptedQueuePool(Stub, pool_size=SIZE, max_overflow=0)  # type: ignore[arg-type,unused-ignore]

    async def acquire() -> Any:
        return await greenlet_spawn(pool.connect)

    yield Pool(acquire, lambda connection: greenlet_spawn(connection.close), True)
    await greenlet_spawn(pool.dispose)


@asynccontextmanager
async def of_redis() -> AsyncIterator[Pool]:
    from redis.asyncio import BlockingConnectionPool

    class Connection:
        def __init__(self, **kwargs: Any) -> None:
            pass

        async def connect(self) -> None:
            pass

        async def disconnect(self, nowait: bool = False) -> None:
            pass

        async def can_read(self) -> bool:
            return False

        def should_reconnect(self) -> bool:
            return False

        def set_re_auth_token(self, token: Any) -> None:
            pass

        async def re_auth(self) -> None:
            pass

    pool: Any = BlockingConnectionPool(max_connections=SIZE, connection_class=Connection)  # type: ignore[type-var,arg-type,unused-ignore]
    yield Pool(pool.get_connection, pool.release, True)
    await pool.disconnect()


@asynccontextmanager
async def of_coredis() -> AsyncIterator[Pool]:
    from coredis.connection import TCPLocation
    from coredis.pool import ConnectionPool

    class Connection:
        usable = reusable = True

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self.over = anyio.Event()
            self.location = args[0]

        async def run(self, *, task_status: Any) -> None:
            task_status.started()
            await self.over.wait()

        def invalidate(self) -> None:
            self.over.set()

    async with ConnectionPool(
        connection_class=Connection,  # type: ignore[type-var,arg-type,unused-ignore]
        location=TCPLocation("nowhere", 1),
        max_connections=SIZE,
    ) as pool:
        yield Pool(pool.get_connection, pool.release, False)
        for connection in list(pool._online_connections):
            connection.invalidate()


# With the default options. Each has a server of its own, which is slow and sometimes fails.


@asynccontextmanager
async def ours_replacing() -> AsyncIterator[Pool]:
    async with aiosync.ConnectionPool(_slow_connect(), max_size=SIZE) as pool:
        yield Pool(pool.acquire, pool.release, False, pool.discard)


@asynccontextmanager
async def of_connpool(base_delay: float = 0.1) -> AsyncIterator[Pool]:
    """Yield a pool whose borrowers connect; one that fails tries again after `base_delay`."""
    from connpool import AsyncConnectionPool, PoolConfig, RetryPolicy

    # The number of attempts is not the default: none of them may end the benchmark.
    retry = RetryPolicy(max_attempts=100, base_delay=base_delay)
    pool: AsyncConnectionPool[Any] = AsyncConnectionPool.from_callables(
        _slow_connect(), config=PoolConfig(max_size=SIZE, retry=retry)
    )
    async with pool:
        yield Pool(pool.acquire, pool.release, True, partial(pool.release, discard=True))


@asynccontextmanager
async def ours_of_asyncpg(host: str) -> AsyncIterator[Pool]:
    import asyncpg

    async def connect() -> Any:
        return await asyncpg.connect(host=host, user="postgres", database="postgres")

    async with ours(connect) as pool:
        yield pool


@asynccontextmanager
async def of_asyncpg(host: str) -> AsyncIterator[Pool]:
    """Yield asyncpg's pool without its default reset, since ours does none."""
    import asyncpg

    async def leave_it(connection: Any) -> None:
        pass

    async with asyncpg.create_pool(
        host=host,
        user="postgres",
        database="postgres",
        min_size=SIZE,
        max_size=SIZE,
        reset=leave_it,
    ) as pool:
        yield Pool(pool.acquire, pool.release, True)
