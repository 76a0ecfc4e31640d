"""aiosync's recipes and the pools of others, on real databases, each used as its docs say.

What must live here: adapters, one for each pool and driver. The work with them is in `drivers`.
"""

from __future__ import annotations

import asyncio
import itertools
import sqlite3
import tempfile
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, closing, contextmanager
from pathlib import Path
from typing import Any, LiteralString

from aiosync import recipes

from . import _postgres

POSTGRES_SIZE = 10
SQLITE_SIZE = 5

# Borrows a connection, executes one statement and gives the connection back. Returns the seconds
# until it had the connection.
Job = Callable[[], Awaitable[float]]
Maker = Callable[[], AbstractAsyncContextManager[Job]]


# -- PostgreSQL. Each pool is full before the first job.


def _to_server() -> dict[str, Any]:
    return {"host": _postgres.host(), "user": "postgres", "database": "postgres"}


def _conninfo() -> str:
    return f"host={_postgres.host()} user=postgres dbname=postgres"


@asynccontextmanager
async def ours_on_asyncpg(query: str) -> AsyncIterator[Job]:
    async with recipes.asyncpg_pool(
        kwargs=_to_server(), min_size=POSTGRES_SIZE, max_size=POSTGRES_SIZE
    ) as pool:
        await pool.wait()

        async def job() -> float:
            begin = time.perf_counter()
            async with pool.connection() as connection:
                seconds = time.perf_counter() - begin
                await connection.fetchval(query)
            return seconds

        yield job


@asynccontextmanager
async def of_asyncpg(query: str) -> AsyncIterator[Job]:
    import asyncpg

    async with asyncpg.create_pool(
        **_to_server(), min_size=POSTGRES_SIZE, max_size=POSTGRES_SIZE
    ) as pool:

        async def job() -> float:
            begin = time.perf_counter()
            async with pool.acquire() as connection:
                seconds = time.perf_counter() - begin
                await connection.fetchval(query)
            return seconds

        yield job


@asynccontextmanager
async def bare_asyncpg(query: str) -> AsyncIterator[Job]:
    """Yield a job of connections in FIFO order, reset as by asyncpg.Pool, and of nothing else."""
    import asyncpg

    connections = [await asyncpg.connect(**_to_server()) for _ in range(POSTGRES_SIZE)]
    idle = deque(connections)
    waiters: deque[asyncio.Future[Any]] = deque()

    async def job() -> float:
        begin = time.perf_counter()
        if idle:
            connection = idle.pop()
        else:
            waiter = asyncio.get_running_loop().create_future()
            waiters.append(waiter)
            connection = await waiter
        seconds = time.perf_counter() - begin
        await connection.fetchval(query)
        await connection.reset()
        if waiters:
            waiters.popleft().set_result(connection)
        else:
            idle.append(connection)
        return seconds

    yield job
    for connection in connections:
        await connection.close()


@asynccontextmanager
async def of_sqlalchemy(query: str) -> AsyncIterator[Job]:
    """Yield a job of SQLAlchemy, which begins a transaction and rolls it back."""
    from sqlalchemy import text
    from sqlalchemy.ext.asyncio import create_async_engine

    engine = create_async_engine(
        "postgresql+asyncpg://",
        connect_args=_to_server(),
        pool_size=POSTGRES_SIZE,
        max_overflow=0,
    )
    statement = text(query)

    async def job() -> float:
        begin = time.perf_counter()
        async with engine.connect() as connection:
            seconds = time.perf_counter() - begin
            (await connection.execute(statement)).scalar()
        return seconds

    yield job
    await engine.dispose()


@asynccontextmanager
async def ours_on_psycopg(query: LiteralString, reset_session: bool) -> AsyncIterator[Job]:
    async with recipes.psycopg_async_pool(
        _conninfo(), reset_session=reset_session, min_size=POSTGRES_SIZE, max_size=POSTGRES_SIZE
    ) as pool:
        await pool.wait()

        async def job() -> float:
            begin = time.perf_counter()
            async with pool.connection() as connection:
                seconds = time.perf_counter() - begin
                await (await connection.execute(query)).fetchone()
            return seconds

        yield job


@asynccontextmanager
async def of_psycopg(query: LiteralString) -> AsyncIterator[Job]:
    from psycopg_pool import AsyncConnectionPool

    async with AsyncConnectionPool(
        _conninfo(), min_size=POSTGRES_SIZE, max_size=POSTGRES_SIZE, open=False
    ) as pool:
        await pool.wait()

        async def job() -> float:
            begin = time.perf_counter()
            async with pool.connection() as connection:
                seconds = time.perf_counter() - begin
                await (await connection.execute(query)).fetchone()
            return seconds

        yield job


# -- SQLite. Each measurement has a new database. All connections use WAL, with the same settings.

SQLITE_ROWS = 1000
READ = "SELECT visits FROM users WHERE id = ?"
WRITE = "UPDATE users SET visits = visits + 1 WHERE id = ?"
PRAGMAS = {"synchronous": "NORMAL", "temp_store": "MEMORY"}
BUSY_TIMEOUT = 30.0


@contextmanager
def _database() -> Iterator[str]:
    """Yield the path of a database with one table."""
    with tempfile.TemporaryDirectory(prefix="aiosync-", ignore_cleanup_errors=True) as folder:
        file = str(Path(folder, "users.db"))
        with closing(sqlite3.connect(file)) as connection:
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("CREATE TABLE users (id INTEGER PRIMARY KEY, visits INTEGER)")
            connection.executemany(
                "INSERT INTO users VALUES (?, 0)", ((number,) for number in _keys())
            )
            connection.commit()
        yield file


def _keys() -> range:
    return range(1, SQLITE_ROWS + 1)


def _read(connection: sqlite3.Connection, key: int) -> Any:
    return connection.execute(READ, (key,)).fetchone()


def _write(connection: sqlite3.Connection, key: int) -> None:
    connection.execute(WRITE, (key,))
    connection.commit()


@asynccontextmanager
async def ours_on_sqlite(writes: bool) -> AsyncIterator[Job]:
    work: Callable[[sqlite3.Connection, int], Any] = _write if writes else _read
    keys = itertools.cycle(_keys())
    with _database() as file:
        async with recipes.sqlite_pool(
            file,
            busy_timeout=BUSY_TIMEOUT,
            pragmas=PRAGMAS,
            min_size=SQLITE_SIZE,
            max_size=SQLITE_SIZE,
        ) as pool:
            await pool.wait()

            def visit(connection: sqlite3.Connection, key: int) -> float:
                seconds = time.perf_counter()
                work(connection, key)
                return seconds

            async def job() -> float:
                begin = time.perf_counter()
                return await pool.run(visit, next(keys)) - begin

            yield job


async def _read_by_cursor(connection: Any, key: int) -> None:
    cursor = await connection.execute(READ, (key,))
    await cursor.fetchone()


async def _read_by_one_call(connection: Any, key: int) -> None:
    await connection.execute_fetchall(READ, (key,))


async def _write_and_commit(connection: Any, key: int) -> None:
    await connection.execute(WRITE, (key,))
    await connection.commit()


@asynccontextmanager
async def of_aiosqlitepool(work: Callable[[Any, int], Awaitable[None]]) -> AsyncIterator[Job]:
    """Yield a job of a pool that asks each connection for a sign of life before it lends it."""
    import aiosqlite
    from aiosqlitepool import SQLiteConnectionPool

    keys = itertools.cycle(_keys())
    with _database() as file:

        async def connect() -> Any:
            connection = await aiosqlite.connect(file, timeout=BUSY_TIMEOUT)
            await connection.execute("PRAGMA journal_mode = WAL")
            for name, value in PRAGMAS.items():
                await connection.execute(f"PRAGMA {name} = {value}")
            return connection

        async with SQLiteConnectionPool(connect, pool_size=SQLITE_SIZE) as pool:

            async def job() -> float:
                begin = time.perf_counter()
                async with pool.connection() as connection:
                    seconds = time.perf_counter() - begin
                    await work(connection, next(keys))
                return seconds

            yield job


def reads_of_aiosqlitepool() -> AbstractAsyncContextManager[Job]:
    return of_aiosqlitepool(_read_by_cursor)


def reads_of_aiosqlitepool_by_one_call() -> AbstractAsyncContextManager[Job]:
    return of_aiosqlitepool(_read_by_one_call)


def writes_of_aiosqlitepool() -> AbstractAsyncContextManager[Job]:
    return of_aiosqlitepool(_write_and_commit)
