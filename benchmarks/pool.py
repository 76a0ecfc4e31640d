"""The pool against those of others: `python benchmarks/pool.py`.

All manage stub connections, which do nothing, so what is measured is the pool. Peers that are not
installed are named, and left out. The implementations take turns, round by round, in one process;
what is printed is the ratio of the medians.

    python -m pip install 'psycopg[binary]' psycopg_pool sqlalchemy greenlet redis coredis asyncpg
"""

from __future__ import annotations

import asyncio
import gc
import platform
import statistics
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import aiosync

# The tests know how to start a server.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
from postgres_server import PostgresServer

ROUNDS = 15
SIZE = 10


class Peer(NamedTuple):
    """How to borrow from a pool, and how to give back; the latter may return an awaitable."""

    acquire: Callable[[], Awaitable[Any]]
    release: Callable[[Any], Any]
    release_is_async: bool


Maker = Callable[[], AbstractAsyncContextManager[Peer]]


class Stub:
    """A connection of no kind."""


@asynccontextmanager
async def ours(**options: Any) -> AsyncIterator[Peer]:
    async def connect() -> Stub:
        return Stub()

    async with aiosync.ConnectionPool(
        connect, min_size=SIZE, max_size=SIZE, fast_acquire=True, **options
    ) as pool:
        await pool.wait()
        yield Peer(pool.acquire, pool.release, False)


@asynccontextmanager
async def of_psycopg() -> AsyncIterator[Peer]:
    import psycopg
    from psycopg.pq import TransactionStatus
    from psycopg_pool import AsyncConnectionPool

    class Connection(psycopg.AsyncConnection[Any]):
        """Never connected; it only says that it is idle."""

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
    yield Peer(pool.getconn, pool.putconn, True)
    await pool.close()


class _Dbapi:
    """What SQLAlchemy's pool calls."""

    def rollback(self) -> None:
        pass

    def close(self) -> None:
        pass


@asynccontextmanager
async def of_sqlalchemy() -> AsyncIterator[Peer]:
    from sqlalchemy.pool import QueuePool

    pool: Any = QueuePool(_Dbapi, pool_size=SIZE, max_overflow=0)

    async def acquire() -> Any:
        return pool.connect()

    yield Peer(acquire, lambda connection: connection.close(), False)
    pool.dispose()


@asynccontextmanager
async def of_sqlalchemy_async() -> AsyncIterator[Peer]:
    from sqlalchemy.pool import AsyncAdaptedQueuePool
    from sqlalchemy.util import greenlet_spawn

    pool: Any = AsyncAdaptedQueuePool(_Dbapi, pool_size=SIZE, max_overflow=0)

    async def acquire() -> Any:
        return await greenlet_spawn(pool.connect)

    yield Peer(acquire, lambda connection: greenlet_spawn(connection.close), True)
    await greenlet_spawn(pool.dispose)


@asynccontextmanager
async def of_redis() -> AsyncIterator[Peer]:
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

    pool: Any = BlockingConnectionPool(max_connections=SIZE, connection_class=Connection)  # type: ignore[type-var,unused-ignore]
    yield Peer(pool.get_connection, pool.release, True)
    await pool.disconnect()


@asynccontextmanager
async def of_coredis() -> AsyncIterator[Peer]:
    from coredis.connection import TCPLocation
    from coredis.pool import ConnectionPool

    class Connection:
        usable = reusable = True

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self.over = asyncio.Event()
            self.location = args[0]

        async def run(self, *, task_status: Any) -> None:
            task_status.started()
            await self.over.wait()

        def invalidate(self) -> None:
            self.over.set()

    async with ConnectionPool(
        connection_class=Connection,  # type: ignore[type-var,unused-ignore]
        location=TCPLocation("nowhere", 1),
        max_connections=SIZE,
    ) as pool:
        yield Peer(pool.get_connection, pool.release, False)
        for connection in list(pool._online_connections):
            connection.invalidate()


def on_postgres(host: str) -> dict[str, Maker]:
    """Return makers of pools of real connections. None of them resets these, which takes longer."""

    @asynccontextmanager
    async def ours_of_asyncpg() -> AsyncIterator[Peer]:
        import asyncpg

        async def connect() -> Any:
            return await asyncpg.connect(host=host, user="postgres", database="postgres")

        async with aiosync.ConnectionPool(
            connect, min_size=SIZE, max_size=SIZE, fast_acquire=True
        ) as pool:
            await pool.wait()
            yield Peer(pool.acquire, pool.release, False)

    @asynccontextmanager
    async def of_asyncpg() -> AsyncIterator[Peer]:
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
            yield Peer(pool.acquire, pool.release, True)

    return {"aiosync": ours_of_asyncpg, "asyncpg": of_asyncpg}


async def alone(peer: Peer) -> float:
    """Seconds to borrow and give back where nobody else wants to."""
    acquire, release, release_is_async = peer
    times = 1000
    begin = time.perf_counter()
    if release_is_async:
        for _ in range(times):
            await release(await acquire())
    else:
        for _ in range(times):
            release(await acquire())
    return (time.perf_counter() - begin) / times


async def work(peer: Peer, times: int) -> None:
    for _ in range(times):
        connection = await peer.acquire()
        await asyncio.sleep(0)  # what is done with it
        given_back = peer.release(connection)
        if peer.release_is_async:
            await given_back


async def contended(peer: Peer) -> float:
    """Seconds for each time that one of 100 tasks has one of 10 connections."""
    tasks, times = 100, 5
    begin = time.perf_counter()
    await asyncio.gather(*(work(peer, times) for _ in range(tasks)))
    return (time.perf_counter() - begin) / (tasks * times)


async def fairness(peer: Peer) -> float:
    """How many times as often the task that was served most was served as the one least."""
    served = [0] * 100
    until = time.perf_counter() + 0.5

    async def compete(number: int) -> None:
        while time.perf_counter() < until:
            await work(peer, 1)
            served[number] += 1

    await asyncio.gather(*map(compete, range(len(served))))
    return max(served) / max(1, min(served))


def installed(peers: dict[str, Maker]) -> dict[str, Maker]:
    async def try_out(make: Maker) -> None:
        async with make() as peer:
            await work(peer, 1)

    found = {}
    for name, make in peers.items():
        try:
            asyncio.run(try_out(make))
        except ImportError as error:
            print(f"{name} is left out: {error}")
        else:
            found[name] = make
    return found


def measure(what: Callable[[Peer], Awaitable[float]], make: Maker) -> float:
    async def run() -> float:
        async with make() as peer:
            await work(peer, 20)  # to warm up
            return await what(peer)

    gc.collect()
    gc.disable()
    try:
        return asyncio.run(run())
    finally:
        gc.enable()


def compare(title: str, what: Callable[[Peer], Awaitable[float]], makers: dict[str, Maker]) -> None:
    """Print how many times as long as the first of `makers` the others take."""
    seconds: dict[str, list[float]] = {name: [] for name in makers}
    for _ in range(ROUNDS):
        for name, make in makers.items():
            seconds[name].append(measure(what, make))
    mine, *others = (statistics.median(found) for found in seconds.values())
    for name, other in zip(list(makers)[1:], others, strict=True):
        print(f"{title:42} {name:28} {other / mine:7.2f}x", flush=True)


def main() -> None:
    print(f"{platform.python_implementation()} {platform.python_version()}, asyncio; ratio of")
    print(f"medians of {ROUNDS} interleaved rounds: how many times as fast aiosync is\n")
    asynchronous = installed(
        {
            "psycopg_pool": of_psycopg,
            "SQLAlchemy, async": of_sqlalchemy_async,
            "redis-py": of_redis,
            "coredis": of_coredis,
        }
    )
    all_of_them = {**asynchronous, **installed({"SQLAlchemy QueuePool": of_sqlalchemy})}
    compare("borrow + give back, alone", alone, {"aiosync": ours, **all_of_them})
    compare("100 tasks, 10 connections", contended, {"aiosync": ours, **asynchronous})
    why_not = PostgresServer.why_not()
    if why_not is None:
        with PostgresServer() as server:
            server.start()
            makers = on_postgres(server.host)
            if "asyncpg" in installed(makers):
                compare("borrow + give back, alone", alone, makers)
                compare("100 tasks, 10 connections", contended, makers)
    else:
        print(f"asyncpg is left out: {why_not}")
    print()
    for name, make in {"aiosync": ours, **asynchronous}.items():
        ratio = statistics.median(measure(fairness, make) for _ in range(3))
        print(f"{'most served task / least served':42} {name:28} {ratio:7.3f}")


if __name__ == "__main__":
    main()
