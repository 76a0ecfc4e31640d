"""The recipe for SQLite."""

from __future__ import annotations

import logging
from functools import partial
from os import fspath
from typing import TYPE_CHECKING, Any

from anyio import sleep

from .._callers import CallSite, call_site
from ._arguments import copied, mistakes, provide
from ._blocking import BlockingPool
from ._hooks import combine
from ._sqlite_arguments import check_arguments, is_private, pragma
from ._threads import Threads, close_when_free

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Mapping
    from os import PathLike
    from typing import Unpack

    from .._pool import PoolOptions
    from ._arguments import Arguments
    from ._sqlite_connection import TrackedConnection

_log = logging.getLogger("aiosync.pool")

# How often to look whether a borrower has given back what the pool closes by force, in seconds.
_LOOK_AGAIN = 0.02
# The names of the errors after which a connection is of no use.
_FATAL = {"SQLITE_CORRUPT", "SQLITE_NOTADB", "SQLITE_IOERR", "SQLITE_CANTOPEN"}


def sqlite_pool(
    database: str | PathLike[str],
    *,
    uri: bool = False,
    busy_timeout: float = 5.0,
    wal: bool = True,
    pragmas: Mapping[str, str | int] | None = None,
    kwargs: Arguments | None = None,
    **options: Unpack[PoolOptions[sqlite3.Connection]],
) -> BlockingPool[sqlite3.Connection]:
    """Return a pool of connections to a SQLite database. Under asyncio and trio.

    All calls of such a connection block. A task lets a thread of the pool make them::

        def add_user(connection, name):
            with connection:  # commits
                connection.execute("INSERT INTO users VALUES (?)", [name])

        await pool.run(add_user, "me")

    A thread that borrowed a connection by `as_threading` just calls it. A task that borrows one by
    ``async with`` may call ``anyio.to_thread.run_sync`` with it; but if 40 other calls of
    ``to_thread`` wait for a connection, that one gets no thread, and all wait until a timeout. It
    also must not leave the block before the thread has ended, which ``abandon_on_cancel=True`` and
    ``task.cancel()`` of asyncio do not heed. `BlockingPool.run` has neither problem.

    When a connection comes back:

    - What was not committed is rolled back. The logger ``aiosync.pool`` warns of it, once for each
      line that borrowed a connection; or, if a thread has released it or its block has raised, once
      for each line that executed the last statement.
    - Open cursors and blobs are closed, so that no unfinished SELECT keeps a snapshot; but not a
      cursor that was made by ``sqlite3.Cursor(connection)`` and is kept.
    - ``row_factory``, ``text_factory``, ``isolation_level`` and ``autocommit`` are set to what they
      were after `configure`.
    - If a pragma was set, a database attached or detached, a temporary table, view or trigger made
      or written to, or a function, collation, callback or limit set, the connection is replaced.

    When the pool is closed while a connection is borrowed for longer than `close_timeout`, its
    statements are interrupted until its borrower gives up; one that does not, for as long again,
    keeps it open until Python collects it.

    :param database: the path of the file, or a URI. A database in memory belongs to one connection,
        unless it is a URI with ``cache=shared``; keep a connection of your own to one of those,
        because it vanishes with its last connection.
    :param uri: whether `database` is a URI, "file:..."
    :param busy_timeout: how many seconds a statement waits for a lock that another connection holds
    :param wal: whether to put the database into WAL mode, where readers and a writer do not wait
        for each other. The file stays so. Not for network folders, nor for read-only databases.
    :param pragmas: settings of each connection, for instance ``{"foreign_keys": 1}``
    :param kwargs: more arguments for `sqlite3.connect`, for instance ``isolation_level`` or
        ``autocommit``; or a function that returns them, called for each new connection
    :param options: those of `ConnectionPool`; see `aiosync.recipes`
    :raises ValueError: if each connection would have a database of its own, or the name of a pragma
        is none; see also `ConnectionPool`
    :raises TypeError: if `kwargs` has ``check_same_thread=True``, which makes a pool impossible, or
        what the recipe sets itself; see also `ConnectionPool`
    """
    path = fspath(database)
    if is_private(path, uri):
        raise ValueError(
            f"{path!r} is another database for each connection; for one in memory that they share "
            f"use 'file:some_name?mode=memory&cache=shared' with uri=True"
        )
    statements = [pragma(name, value) for name, value in (pragmas or {}).items()]
    kwargs = copied(kwargs)
    if not callable(kwargs):
        check_arguments(kwargs)
    # Imported late: sqlite3 is not needed by the other recipes.
    from ._sqlite_open import Opener
    from ._sqlite_session import begin, forget, has_uncommitted, is_closed, needs_restore, restore

    opener = Opener(path, {"timeout": busy_timeout, "uri": uri}, wal, statements)
    threads = Threads()
    warned: set[CallSite | None] = set()
    configure = options.get("configure")

    async def connect() -> sqlite3.Connection:
        given = await provide(kwargs)
        with mistakes(ValueError):
            check_arguments(given)
            return await threads.make(partial(opener.open, given), close_one)

    async def prepare(connection: Any) -> None:
        if configure is not None:
            await threads.call(configure, connection, connection.aiosync_session.lock)
        begin(connection)

    async def check(connection: Any) -> None:
        await threads.run(partial(_locked, _look), connection)

    def reset(connection: Any) -> object:
        if has_uncommitted(connection):
            warn(connection)
        if needs_restore(connection):
            return threads.run(restore, connection)
        forget(connection)
        return None

    def remember_borrower(connection: Any) -> None:
        # `reset` is called elsewhere if a thread has borrowed the connection.
        if not is_closed(connection) and has_uncommitted(connection):
            connection.aiosync_session.borrower = call_site()

    def warn(connection: TrackedConnection) -> None:
        borrower = connection.aiosync_session.borrower or call_site()
        site = borrower or connection.aiosync_session.last_statement
        if site not in warned:
            warned.add(site)
            who = "borrowed at" if borrower else "its last statement was at"
            _log.warning(
                "%s: rolled back what was not committed on a connection: %s %s",
                pool.name, who, site or "an unknown line",
            )  # fmt: skip

    async def close(connection: Any) -> None:
        # To close one that a thread is using crashes the interpreter.
        while pool.info(connection).in_use is not None:
            connection.interrupt()
            await sleep(_LOOK_AGAIN)
        await threads.run_anyway(close_one, connection)

    def close_one(connection: TrackedConnection) -> None:
        close_when_free(connection, connection.aiosync_session.lock, connection.interrupt)

    combine(
        options,
        check=check,
        reset=reset,
        # Nothing is committed: it is called where a block ends that has raised nothing.
        commit=remember_borrower,
        close=close,
        is_closed=is_closed,
        is_fatal=_is_fatal,
    )
    options["configure"] = prepare
    pool: BlockingPool[sqlite3.Connection] = BlockingPool(connect, interrupt=_interrupt, **options)
    return pool


def _interrupt(connection: sqlite3.Connection) -> None:
    connection.interrupt()


def _locked(work: Any, connection: TrackedConnection) -> object:
    with connection.aiosync_session.lock:
        return work(connection)


def _look(connection: sqlite3.Connection) -> None:
    connection.execute("SELECT 1").close()


def _is_fatal(error: Exception) -> bool:
    return any(getattr(error, "sqlite_errorname", "").startswith(name) for name in _FATAL)
