"""Ready-made pools: SQLite, PostgreSQL by asyncpg or psycopg, and plain TCP.

Each function returns a `ConnectionPool` that knows how to connect, check, reset and close; all else
is up to the caller. They are short, and meant to be read: whoever has another driver writes such a
thing in a dozen lines, with nothing but the public API.

A driver is imported when its function is called, so nobody needs those that are not used.

Some drivers block. Their calls are made in worker threads here, outside of anyio's limit of 40,
because all 40 might be waiting for one of our connections. If such a call takes longer than the
pool allows for, its thread is left behind, and the pool goes on. The thread ends what it has begun
as soon as it can: a connection that is made too late is closed there. Should it never end, one
thread and one connection are lost, and under asyncio the process does not exit before the thread
does; the remedy is a timeout of the driver's own, such as ``connect_timeout`` of psycopg.

What must live here: what is special to a driver. What must not: anything of the pool's inside.
"""

from __future__ import annotations

import math
import re
import select
import socket
from contextlib import suppress
from functools import partial
from os import fspath
from threading import Lock
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import parse_qs
from weakref import WeakKeyDictionary

from anyio import (
    BrokenResourceError,
    CapacityLimiter,
    ClosedResourceError,
    EndOfStream,
    connect_tcp,
    create_task_group,
    move_on_after,
    sleep,
    to_thread,
)
from anyio.abc import SocketAttribute
from anyio.lowlevel import checkpoint, current_token

from ._pool import ConnectionPool

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Callable, Mapping
    from os import PathLike
    from typing import Unpack

    import asyncpg
    import psycopg
    from anyio.abc import SocketStream

    from ._pool._settings import CommonOptions

__all__ = ["asyncpg_pool", "psycopg_async_pool", "psycopg_thread_pool", "sqlite_pool", "tcp_pool"]

C = TypeVar("C")

# How often we look whether a borrower has given back what the pool closes by force, in seconds.
_LOOK_AGAIN = 0.02
# How long we wait until a connection that nobody wants is closed, in seconds. The thread goes on.
_PATIENCE = 5.0
# After how many turns of the event loop a task has certainly received what is in a stream's buffer.
# It takes 2 of asyncio to do so; and 3 until it has what only the socket has.
_TURNS = 4


# -- SQLite.


def sqlite_pool(
    database: str | PathLike[str],
    *,
    uri: bool = False,
    busy_timeout: float = 5.0,
    wal: bool = True,
    pragmas: Mapping[str, str | int] | None = None,
    kwargs: Mapping[str, Any] | None = None,
    **options: Unpack[CommonOptions[sqlite3.Connection]],
) -> ConnectionPool[sqlite3.Connection]:
    """Return a pool of connections to a SQLite database. Under asyncio and trio.

    All calls of such a connection block. A thread that borrowed it by `as_threading` just calls
    them; a task lets a worker thread do it::

        def count_users(connection):
            return connection.execute("SELECT count(*) FROM users").fetchone()[0]

        async with pool.connection() as connection:
            number = await anyio.to_thread.run_sync(count_users, connection)

    If the task is cancelled, it waits there until the thread is done: so the next one never gets a
    connection that is still in use. Do not use ``abandon_on_cancel=True``; to make a statement end
    earlier, call ``connection.interrupt()``.

    What was not committed is rolled back when a connection comes back. Whatever else was changed,
    such as a ``row_factory``, stays. When the pool is closed while one is borrowed for longer than
    `close_timeout`, its statements are interrupted until its borrower gives up; one that does not,
    for as long again, keeps it open until Python collects it.

    :param database: the path of the file, or a URI. A database in memory belongs to one connection,
        unless it is a URI with ``cache=shared``; keep a connection of your own to one of those,
        because it vanishes with its last connection.
    :param uri: whether `database` is a URI, "file:..."
    :param busy_timeout: how many seconds a statement waits for a lock that another connection holds
    :param wal: whether to put the database into WAL mode, where readers and a writer do not wait
        for each other. The file stays so. Not for network folders, nor for read-only databases.
    :param pragmas: settings of each connection, for instance ``{"foreign_keys": 1}``
    :param kwargs: more arguments for `sqlite3.connect`, for instance ``isolation_level``
    :param options: those of `ConnectionPool`
    :raises ValueError: if each connection would have a database of its own, or the name of a pragma
        is none; see also `ConnectionPool`
    :raises TypeError: see `ConnectionPool`
    """
    import sqlite3

    path = fspath(database)
    if _is_private(path, uri):
        raise ValueError(
            f"{path!r} is another database for each connection; for one in memory that they share "
            f"use 'file:some_name?mode=memory&cache=shared' with uri=True"
        )
    statements = [_pragma(name, value) for name, value in (pragmas or {}).items()]
    arguments: dict[str, Any] = dict(
        uri=uri, timeout=busy_timeout, check_same_thread=False, **(kwargs or {})
    )
    threads = _Threads()
    # Two that switch to WAL at the same time get "database is locked", whatever the timeout.
    switching = Lock()
    # Held while a thread of ours uses the connection.
    locks: WeakKeyDictionary[sqlite3.Connection, Lock] = WeakKeyDictionary()

    class Connection(sqlite3.Connection):
        """One that may be weakly referenced; so the pool notices if its borrower has lost it."""

    def open_one() -> sqlite3.Connection:
        connection: sqlite3.Connection = sqlite3.connect(
            path, **{"factory": Connection, **arguments}
        )
        try:
            if wal:
                with switching:
                    connection.execute("PRAGMA journal_mode = WAL").close()
            for statement in statements:
                connection.execute(statement).close()
            locks[connection] = Lock()
        except BaseException:
            connection.close()
            raise
        return connection

    def close_one(connection: sqlite3.Connection) -> None:
        _close(connection, locks[connection], connection.interrupt)

    def look(connection: sqlite3.Connection) -> None:
        with locks[connection]:
            connection.execute("SELECT 1").close()

    def roll_back(connection: sqlite3.Connection) -> None:
        with locks[connection]:
            connection.rollback()

    async def check(connection: sqlite3.Connection) -> None:
        await threads.run(look, connection)

    async def reset(connection: sqlite3.Connection) -> None:
        if connection.in_transaction:
            await threads.run(roll_back, connection)

    async def close(connection: sqlite3.Connection) -> None:
        # To close one that a thread is using crashes the interpreter.
        while pool.info(connection).in_use is not None:
            connection.interrupt()
            await sleep(_LOOK_AGAIN)
        await threads.run(close_one, connection)

    pool = ConnectionPool(
        partial(threads.make, open_one, close_one), check=check, reset=reset, close=close, **options
    )
    return pool


def _is_private(database: str, uri: bool) -> bool:
    """Tell whether each connection would have a database of its own, in memory or temporary."""
    if not uri or not database.startswith("file:"):
        return database in {"", ":memory:"}
    path, _, query = database.removeprefix("file:").partition("?")
    settings = parse_qs(query.partition("#")[0])
    in_memory = path in {"", ":memory:"} or settings.get("mode") == ["memory"]
    return in_memory and settings.get("cache") != ["shared"]


def _pragma(name: str, value: str | int) -> str:
    if re.fullmatch(r"(\w+\.)?\w+", name) is None:
        raise ValueError(f"{name!r} is not the name of a pragma")
    literal = "'" + value.replace("'", "''") + "'" if isinstance(value, str) else int(value)
    return f"PRAGMA {name} = {literal}"


# -- PostgreSQL.


def asyncpg_pool(
    dsn: str | None = None,
    *,
    kwargs: Mapping[str, Any] | None = None,
    **options: Unpack[CommonOptions[asyncpg.Connection]],
) -> ConnectionPool[asyncpg.Connection]:
    """Return a pool of connections to PostgreSQL by asyncpg. Under asyncio only.

    A connection that comes back is reset by its own ``reset()``: an open transaction is rolled
    back, locks are released, listeners removed, settings restored. One that does not close in time
    is terminated.

    :param dsn: as that of ``asyncpg.connect``
    :param kwargs: more arguments for ``asyncpg.connect``, for instance ``command_timeout``
    :param options: those of `ConnectionPool`
    :raises ImportError: if asyncpg is not installed
    :raises TypeError: see `ConnectionPool`
    :raises ValueError: see `ConnectionPool`
    """
    try:
        import asyncpg
    except ImportError as error:
        raise _missing("asyncpg") from error
    arguments = dict(kwargs or {})

    async def connect() -> asyncpg.Connection:
        _only_asyncio("asyncpg")
        connection: asyncpg.Connection = await asyncpg.connect(dsn, **arguments)
        return connection

    async def check(connection: asyncpg.Connection) -> None:
        await connection.execute("SELECT 1")

    async def reset(connection: asyncpg.Connection) -> None:
        await connection.reset()

    async def close(connection: asyncpg.Connection) -> None:
        try:
            await connection.close()
        except BaseException:
            connection.terminate()
            raise

    return ConnectionPool(connect, check=check, reset=reset, close=close, **options)


def psycopg_async_pool(
    conninfo: str = "",
    *,
    kwargs: Mapping[str, Any] | None = None,
    **options: Unpack[CommonOptions[psycopg.AsyncConnection[Any]]],
) -> ConnectionPool[psycopg.AsyncConnection[Any]]:
    """Return a pool of connections to PostgreSQL by psycopg's AsyncConnection. Under asyncio only.

    What was not committed is rolled back when a connection comes back; one that comes back broken,
    or in the middle of a command, is replaced. So it is in ``psycopg_pool``.

    :param conninfo: as that of ``psycopg.AsyncConnection.connect``
    :param kwargs: more arguments for it, for instance ``row_factory`` or ``autocommit``
    :param options: those of `ConnectionPool`
    :raises ImportError: if psycopg is not installed
    :raises TypeError: see `ConnectionPool`
    :raises ValueError: see `ConnectionPool`
    """
    try:
        import psycopg
    except ImportError as error:
        raise _missing("psycopg") from error
    arguments = dict(kwargs or {})

    async def connect() -> psycopg.AsyncConnection[Any]:
        _only_asyncio("psycopg's AsyncConnection")
        return await psycopg.AsyncConnection.connect(conninfo, **arguments)

    async def check(connection: psycopg.AsyncConnection[Any]) -> None:
        if connection.autocommit:
            await connection.execute("")
            return
        await connection.set_autocommit(True)  # or else it would begin a transaction
        await connection.execute("")
        await connection.set_autocommit(False)

    async def reset(connection: psycopg.AsyncConnection[Any]) -> None:
        if _has_work_left(connection):
            await connection.rollback()

    async def close(connection: psycopg.AsyncConnection[Any]) -> None:
        # See `_close`.
        if connection.lock.locked():
            _hang_up(connection)
        try:
            async with connection.lock:
                pass
        finally:
            await connection.close()

    return ConnectionPool(connect, check=check, reset=reset, close=close, **options)


def psycopg_thread_pool(
    conninfo: str = "",
    *,
    kwargs: Mapping[str, Any] | None = None,
    **options: Unpack[CommonOptions[psycopg.Connection[Any]]],
) -> ConnectionPool[psycopg.Connection[Any]]:
    """Return a pool of connections to PostgreSQL by psycopg's Connection. Under asyncio and trio.

    All calls of such a connection block: for how to make them, and what becomes of them if a task
    is cancelled, see `sqlite_pool`. To make a command end earlier, call ``cancel_safe()``. The pool
    is otherwise as that of `psycopg_async_pool`.

    :param conninfo: as that of ``psycopg.connect``. Its ``connect_timeout`` had better be shorter
        than that of the pool.
    :param kwargs: more arguments for it, for instance ``row_factory`` or ``autocommit``
    :param options: those of `ConnectionPool`
    :raises ImportError: if psycopg is not installed
    :raises TypeError: see `ConnectionPool`
    :raises ValueError: see `ConnectionPool`
    """
    try:
        import psycopg
    except ImportError as error:
        raise _missing("psycopg") from error
    arguments = dict(kwargs or {})
    threads = _Threads()

    def open_one() -> psycopg.Connection[Any]:
        return psycopg.connect(conninfo, **arguments)

    def close_one(connection: psycopg.Connection[Any]) -> None:
        _close(connection, connection.lock, partial(_hang_up, connection))

    def look(connection: psycopg.Connection[Any]) -> None:
        if connection.autocommit:
            connection.execute("")
            return
        connection.autocommit = True  # or else it would begin a transaction
        connection.execute("")
        connection.autocommit = False

    async def check(connection: psycopg.Connection[Any]) -> None:
        await threads.run(look, connection)

    async def reset(connection: psycopg.Connection[Any]) -> None:
        if _has_work_left(connection):
            await threads.run(connection.rollback)

    async def close(connection: psycopg.Connection[Any]) -> None:
        await threads.run(close_one, connection)

    return ConnectionPool(
        partial(threads.make, open_one, close_one), check=check, reset=reset, close=close, **options
    )


def _has_work_left(connection: psycopg.Connection[Any] | psycopg.AsyncConnection[Any]) -> bool:
    """Tell whether a connection has to be rolled back.

    :raises ConnectionError: if that would not help
    """
    status = connection.info.transaction_status.name
    if status in {"INTRANS", "INERROR"}:
        return True
    if status != "IDLE":
        raise ConnectionError(f"the connection came back in the state {status}")
    return False


def _hang_up(connection: psycopg.Connection[Any] | psycopg.AsyncConnection[Any]) -> None:
    """End what others are doing with a connection: they see that the server has gone."""
    with suppress(Exception):  # it may have come to its end already
        endpoint = socket.socket(fileno=connection.fileno())
        try:
            endpoint.shutdown(socket.SHUT_RDWR)
        finally:
            endpoint.detach()  # it is the connection who closes it


# -- TCP.


def tcp_pool(
    host: str,
    port: int,
    *,
    local_host: str | None = None,
    happy_eyeballs_delay: float = 0.25,
    **options: Unpack[CommonOptions[SocketStream]],
) -> ConnectionPool[SocketStream]:
    """Return a pool of TCP connections, which are byte streams of anyio. Under asyncio and trio.

    A stream that comes back, or is to be handed out, must be open and must have nothing to be read:
    or else it is replaced. That takes no word to the peer, so by default it is done each time:
    `check_idle` is 0. It can't tell that an answer is still on its way: who asked, but has not read
    the whole answer, calls ``pool.discard(stream)``.

    :param host: name or address of the peer
    :param port: its port
    :param local_host: the address of this machine to connect from
    :param happy_eyeballs_delay: how many seconds until the next address of `host` is tried as well
    :param options: those of `ConnectionPool`
    :raises TypeError: see `ConnectionPool`
    :raises ValueError: see `ConnectionPool`
    """
    options.setdefault("check_idle", 0.0)

    async def connect() -> SocketStream:
        return await connect_tcp(
            host, port, local_host=local_host, happy_eyeballs_delay=happy_eyeballs_delay
        )

    async def check(stream: SocketStream) -> None:
        if not await _is_quiet(stream):
            raise ConnectionError("the peer has closed the stream, or left something unread in it")

    return ConnectionPool(connect, check=check, reset=check, **options)


async def _is_quiet(stream: SocketStream) -> bool:
    """Tell whether a stream is open, and has nothing to be read.

    That is to be found out from the socket: asyncio might not have looked at it for long. But it
    may also be in the buffer that a stream of asyncio has, and the only way to look there is to
    receive it. So if there is something, it is lost, with the stream.
    """
    if _is_readable(stream.extra(SocketAttribute.raw_socket)):  # noqa: S610
        return False
    found = False

    async def receive() -> None:
        nonlocal found
        try:
            await stream.receive(1)
        except (EndOfStream, BrokenResourceError, ClosedResourceError):
            pass
        found = True

    async with create_task_group() as tasks:
        tasks.start_soon(receive)
        for _ in range(_TURNS):
            await checkpoint()
        tasks.cancel_scope.cancel()
    return not found


def _is_readable(endpoint: Any) -> bool:
    """Tell whether a socket has bytes to be read, or its end; also if it is closed here."""
    number = endpoint.fileno()
    if number < 0:
        return True
    if hasattr(select, "poll"):
        poll = select.poll()  # which takes any number, not only those below 1024
        poll.register(number, select.POLLIN)
        return bool(poll.poll(0))
    return bool(select.select([number], [], [], 0)[0])  # Windows


# -- For drivers that block.


class _Threads:
    """The worker threads of one pool. Whoever waits for one may leave: that does not lose anything.

    There is no limit to their number but that of the pool: so many connections, one call of each.
    """

    def __init__(self) -> None:
        self._limiter = CapacityLimiter(math.inf)

    async def run(self, work: Callable[..., C], *args: Any) -> C:
        """Call ``work(*args)`` in a thread. If cancelled, let the thread go on alone."""
        return await to_thread.run_sync(
            partial(work, *args), abandon_on_cancel=True, limiter=self._limiter
        )

    async def make(self, connect: Callable[[], C], close: Callable[[C], object]) -> C:
        """Call `connect` in a thread. If cancelled, its result is closed, be it now or later."""
        # To remove it from here is to claim it.
        made: list[C] = []
        abandoned = False

        def work() -> None:
            made.append(connect())
            if abandoned:
                drop()

        def drop() -> None:
            try:
                connection = made.pop()
            except IndexError:
                return
            close(connection)

        try:
            await self.run(work)
            return made.pop()
        except BaseException:
            # First say so, then look: `work` does it the other way round, so one of us finds it.
            abandoned = True
            if made:
                with move_on_after(_PATIENCE, shield=True):
                    await self.run(drop)
            raise


def _close(connection: Any, lock: Lock, stop: Callable[[], object]) -> None:
    """Close a connection, in a thread; but end what another one is doing with it before.

    It may be a call that took too long, so that its thread was left behind, or a borrower who had
    to be left behind. No driver likes to have a connection closed while it is used.
    """
    if not lock.acquire(blocking=False):
        stop()
        lock.acquire()
    try:
        connection.close()
    finally:
        lock.release()


def _missing(extra: str) -> ImportError:
    return ImportError(f"{extra} can't be imported; install it by: pip install 'aiosync[{extra}]'")


def _only_asyncio(driver: str) -> None:
    if type(current_token().native_token).__module__.startswith("trio"):
        raise RuntimeError(f"{driver} needs asyncio; under trio use psycopg_thread_pool")
