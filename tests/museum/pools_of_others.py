"""Pools of others, as they are installed here, and old ones, rebuilt; each around a `Server`."""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import ExitStack, asynccontextmanager
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any
from unittest import mock

import anyio

if TYPE_CHECKING:
    from museum.pools import Connection, PoolLike, Server


class _Lender:
    """A pool whose connections are wrapped: `unwrap` finds ours inside."""

    def __init__(
        self,
        acquire: Callable[[], Any],
        release: Callable[[Any], Any],
        unwrap: Callable[[Any], Any],
    ) -> None:
        self._acquire, self._release, self._unwrap = acquire, release, unwrap
        self._lent: dict[Connection, Any] = {}

    async def acquire(self) -> Connection:
        lent = await self._acquire()
        connection: Connection = self._unwrap(lent)
        self._lent[connection] = lent
        return connection

    async def release(self, connection: Connection) -> None:
        given_back = self._release(self._lent.pop(connection))
        if given_back is not None:
            await given_back


@asynccontextmanager
async def of_psycopg(server: Server, *, lifetime: float = math.inf) -> AsyncIterator[PoolLike]:
    import psycopg
    from psycopg.pq import TransactionStatus
    from psycopg_pool import AsyncConnectionPool, base, pool_async, sched_async

    class Stub(psycopg.AsyncConnection[Any]):
        def __init__(self, connection: Connection) -> None:
            self.ours = connection

        @property
        def pgconn(self) -> Any:
            status = TransactionStatus.UNKNOWN if self.ours.dead else TransactionStatus.IDLE
            return SimpleNamespace(transaction_status=status)

        @pgconn.setter
        def pgconn(self, value: Any) -> None: ...

        @classmethod
        async def connect(cls, *args: Any, **kwargs: Any) -> Any:
            return cls(await server.connect())

        async def close(self) -> None:
            self.ours.dead = True

        def __repr__(self) -> str:
            return "a stub"

        def __del__(self, *_: Any) -> None: ...

    async def check(stub: Any) -> None:
        await server.check(stub.ours)

    async def reset(stub: Any) -> None:
        await server.reset(stub.ours)

    with ExitStack() as stack:
        # For it to live in the time of the event loop.
        now = asyncio.get_running_loop().time
        for module in (base, pool_async, sched_async):
            if hasattr(module, "monotonic"):
                stack.enter_context(mock.patch.object(module, "monotonic", now))
        pool = AsyncConnectionPool(
            "",
            connection_class=Stub,
            min_size=0,
            max_size=1,
            timeout=600,
            max_lifetime=min(lifetime, 1e9),
            check=check,
            reset=reset,
            open=False,
        )
        await pool.open()
        try:
            yield _Lender(pool.getconn, pool.putconn, lambda stub: stub.ours)
        finally:
            await pool.close()


@asynccontextmanager
async def of_asyncpg(server: Server, *, lifetime: float = math.inf) -> AsyncIterator[PoolLike]:
    import asyncpg

    class Stub(asyncpg.Connection):  # type: ignore[misc,unused-ignore]
        def __init__(self, connection: Connection) -> None:
            self.ours = connection
            self._pool_holder: Any = None
            self._proxy: Any = None
            self._protocol: Any = SimpleNamespace(queries_count=0, _is_cancelling=lambda: False)

        def is_closed(self) -> bool:
            return self.ours.dead

        def terminate(self) -> None:
            self.ours.dead = True
            if self._pool_holder is not None:
                holder, self._pool_holder = self._pool_holder(), None
                if holder is not None and holder._con is self:
                    holder._release_on_close()

        async def close(self, *, timeout: float | None = None) -> None:
            self.terminate()

        async def _reset(self) -> None: ...

        def _on_release(self, stacklevel: int = 1) -> None: ...

        def __del__(self) -> None: ...

    async def connect(*args: Any, **kwargs: Any) -> Any:
        return Stub(await server.connect())

    async def check(proxy: Any) -> None:
        await server.check(proxy._con.ours)

    async def reset(stub: Any) -> None:
        await server.reset(stub.ours)

    pool = await asyncpg.create_pool(
        connect=connect,
        connection_class=Stub,
        min_size=0,
        max_size=1,
        setup=check,
        reset=reset,
        max_inactive_connection_lifetime=0,
    )
    try:
        yield _Lender(pool.acquire, pool.release, lambda proxy: proxy._con.ours)
    finally:
        pool.terminate()


@asynccontextmanager
async def of_redis(server: Server, *, lifetime: float = math.inf) -> AsyncIterator[PoolLike]:
    from redis.asyncio import BlockingConnectionPool

    class Stub:
        def __init__(self, **kwargs: Any) -> None:
            self.ours: Any = None

        async def connect(self) -> None:
            if self.ours is None:
                self.ours = await server.connect()

        async def disconnect(self, nowait: bool = False) -> None:
            self.ours = None

        async def can_read(self) -> bool:
            if self.ours.dead:
                raise ConnectionResetError
            return False

        def should_reconnect(self) -> bool:
            return False

        def set_re_auth_token(self, token: Any) -> None: ...

        async def re_auth(self) -> None: ...

    pool: Any = BlockingConnectionPool(max_connections=1, timeout=600, connection_class=Stub)  # type: ignore[type-var,arg-type,unused-ignore]
    try:
        yield _Lender(pool.get_connection, pool.release, lambda stub: stub.ours)
    finally:
        await pool.disconnect()


@asynccontextmanager
async def of_sqlalchemy(server: Server, *, lifetime: float = math.inf) -> AsyncIterator[PoolLike]:
    from sqlalchemy.pool import AsyncAdaptedQueuePool
    from sqlalchemy.util import await_only, greenlet_spawn

    class Stub:
        def __init__(self, connection: Connection) -> None:
            self.ours = connection

        def rollback(self) -> None:
            await_only(server.reset(self.ours))

        def close(self) -> None:
            self.ours.dead = True

        terminate = close

    def connect() -> Any:
        return Stub(await_only(server.connect()))

    pool: Any = AsyncAdaptedQueuePool(connect, pool_size=1, max_overflow=0, timeout=600)  # type: ignore[arg-type,unused-ignore]
    try:
        yield _Lender(
            lambda: greenlet_spawn(pool.connect),
            lambda lent: greenlet_spawn(lent.close),
            lambda lent: lent.dbapi_connection.ours,
        )
    finally:
        await greenlet_spawn(pool.dispose)


@asynccontextmanager
async def of_coredis(server: Server, *, lifetime: float = math.inf) -> AsyncIterator[PoolLike]:
    from coredis import exceptions
    from coredis.connection import TCPLocation
    from coredis.pool import ConnectionPool

    class Stub:
        def __init__(self, location: Any, **kwargs: Any) -> None:
            self.location = location
            self.over = anyio.Event()
            self.ours: Any = None

        @property
        def usable(self) -> bool:
            return not self.ours.dead

        reusable = usable

        async def run(self, *, task_status: Any) -> None:
            try:
                self.ours = await server.connect()
            except ConnectionError as error:
                raise exceptions.ConnectionError(str(error)) from error
            task_status.started()
            await self.over.wait()

        def invalidate(self) -> None:
            self.over.set()

    failure: list[Exception] = []  # its task group would wrap it
    async with ConnectionPool(
        connection_class=Stub,  # type: ignore[type-var,arg-type,unused-ignore]
        location=TCPLocation("nowhere", 1),
        max_connections=1,
        timeout=600,
    ) as pool:
        try:
            yield _Lender(pool.get_connection, pool.release, lambda stub: stub.ours)
        except Exception as error:
            failure.append(error)
    if failure:
        raise failure.pop()


# -- Rebuilt.


class SmallPool:
    """A pool as most are made: a queue of slots, and who borrows does all the work.

    It has one flaw only, that of asyncio.Queue: who comes last may be served first.
    MagicStack/asyncpg#1247
    """

    def __init__(self, server: Server, lifetime: float) -> None:
        self.server = server
        self.lifetime = lifetime
        self.born: dict[Connection, float] = {}
        self.slots: asyncio.Queue[Connection | None] = asyncio.Queue()
        self.slots.put_nowait(None)

    async def acquire(self) -> Connection:
        slot = await self.slots.get()
        try:
            return await self.prepare(slot)
        except BaseException:
            self.slots.put_nowait(None)
            raise

    async def prepare(self, slot: Connection | None) -> Connection:
        if slot is not None and not self.is_old(slot):
            try:
                await self.server.check(slot)
            except ConnectionError:
                pass
            else:
                return slot
        connection = await self.server.connect()
        self.born[connection] = anyio.current_time()
        return connection

    def is_old(self, connection: Connection) -> bool:
        return anyio.current_time() >= self.born[connection] + self.lifetime

    async def release(self, connection: Connection) -> None:
        await asyncio.shield(asyncio.ensure_future(self.give_back(connection)))

    async def give_back(self, connection: Connection) -> None:
        try:
            await self.server.reset(connection)
        except ConnectionError:
            self.slots.put_nowait(None)
        else:
            self.slots.put_nowait(connection)


class ForgetsTheCancelled(SmallPool):
    """CancelledError is no Exception. MagicStack/asyncpg#467, psycopg/psycopg#1208."""

    async def acquire(self) -> Connection:
        slot = await self.slots.get()
        try:
            return await self.prepare(slot)
        except Exception:
            self.slots.put_nowait(None)
            raise


class ResetsUnshielded(SmallPool):
    """Who is cancelled while it gives back has not given back. MagicStack/asyncpg#97."""

    async def release(self, connection: Connection) -> None:
        await self.give_back(connection)


class DeliversBlindly(SmallPool):
    """Hands over to a waiter that is about to be cancelled. psycopg/psycopg#509."""

    def __init__(self, server: Server, lifetime: float) -> None:
        super().__init__(server, lifetime)
        self.waiters: deque[asyncio.Future[Connection]] = deque()

    async def acquire(self) -> Connection:
        if not self.slots.empty():
            return await super().acquire()
        waiter: asyncio.Future[Connection] = asyncio.get_running_loop().create_future()
        self.waiters.append(waiter)
        return await waiter

    async def give_back(self, connection: Connection) -> None:
        while self.waiters:
            waiter = self.waiters.popleft()
            if not waiter.done():
                waiter.set_result(connection)
                return
        await super().give_back(connection)


class KeepsNoDead(SmallPool):
    """A dead connection needs no reset, and takes its slot with it. MagicStack/asyncpg#220."""

    async def give_back(self, connection: Connection) -> None:
        if not connection.dead:
            await super().give_back(connection)


class SwallowsCancels(SmallPool):
    """Whatever ends a check, another is tried. psycopg/psycopg#1401."""

    async def acquire(self) -> Connection:
        while True:
            slot = await self.slots.get()
            try:
                return await self.prepare(slot)
            except BaseException:
                self.slots.put_nowait(slot)


class GivesUp(SmallPool):
    """Grows in the background, one connection at a time; and forgets that it no longer does.

    psycopg/psycopg#370
    """

    def __init__(self, server: Server, lifetime: float) -> None:
        super().__init__(server, lifetime)
        self.slots.get_nowait()
        self.growing: asyncio.Task[None] | None = None

    async def acquire(self) -> Connection:
        if self.growing is None:
            self.growing = asyncio.ensure_future(self.grow())
        return await asyncio.wait_for(super().acquire(), 600)

    async def grow(self) -> None:
        for delay in (1, 2, 4, 8):
            try:
                connection = await self.server.connect()
            except ConnectionError:
                await asyncio.sleep(delay)
            else:
                self.born[connection] = anyio.current_time()
                self.slots.put_nowait(connection)
                return


class LooksAtAgeTooLate(SmallPool):
    """Looks at the age of what comes back, not of what goes out. psycopg/psycopg#584."""

    async def prepare(self, slot: Connection | None) -> Connection:
        lifetime, self.lifetime = self.lifetime, math.inf
        try:
            return await super().prepare(slot)
        finally:
            self.lifetime = lifetime

    async def give_back(self, connection: Connection) -> None:
        connection.dead |= self.is_old(connection)
        await super().give_back(connection)


@asynccontextmanager
async def rebuilt(
    kind: type[SmallPool], server: Server, *, lifetime: float = math.inf
) -> AsyncIterator[PoolLike]:
    yield kind(server, lifetime)
