"""The recipes for PostgreSQL by psycopg."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .._pool import ConnectionPool
from ._arguments import import_driver
from ._blocking import BlockingPool

if TYPE_CHECKING:
    from typing import Unpack

    import psycopg

    from .._pool import PoolOptions
    from ._arguments import Arguments, Provided


def psycopg_async_pool(
    conninfo: Provided[str] = "",
    *,
    reset_session: bool = True,
    kwargs: Arguments | None = None,
    **options: Unpack[PoolOptions[psycopg.AsyncConnection[Any]]],
) -> ConnectionPool[psycopg.AsyncConnection[Any]]:
    """Return a pool of connections to PostgreSQL by psycopg's AsyncConnection. Under asyncio only.

    As in ``psycopg_pool``, a block ``async with pool.connection()`` that raises nothing commits at
    its end, and raises what the commit raises; otherwise, and after ``pool.release()``, what was
    not committed is rolled back. The logger ``aiosync.pool`` warns of it in the latter case, once
    for each line that releases (of a thread, it informs each time, without the line).

    Then a connection that comes back is as it was after `configure`:

    - On the server, by one round trip, unless `reset_session` is False: session authorization,
      role and settings are as when it was opened; advisory locks, cursors, temporary tables,
      listeners, sequence caches, and statements that were prepared by SQL are gone. Those that
      psycopg has prepared stay. Then `configure` runs again, if there is one, because what it has
      set by SET is gone too; that costs its own round trips. (Settings that are given as
      ``options="-c name=value"`` in `kwargs` cost nothing.)
    - In psycopg, at no cost: ``autocommit``, ``isolation_level``, ``read_only``, ``deferrable``,
      ``row_factory``, ``cursor_factory``, ``server_cursor_factory``, ``prepare_threshold``,
      ``prepared_max``, adapters, and the handlers of notices and notifications.

    A connection that comes back broken, in pipeline mode, or in the middle of a command or of a
    two-phase commit, is replaced.

    :param conninfo: as that of ``psycopg.AsyncConnection.connect``; or a function that returns it
    :param reset_session: whether to restore the state of the session on the server too. With False
        only the transaction ends, as in ``psycopg_pool``.
    :param kwargs: more arguments for connect, for instance ``row_factory`` or ``autocommit``; or a
        function that returns them. So may be its ``password``. Such a function is plain or async,
        and is called for each new connection.
    :param options: those of `ConnectionPool`; see `aiosync.recipes`
    :raises ImportError: if psycopg is not installed
    :raises TypeError: see `ConnectionPool`
    :raises ValueError: see `ConnectionPool`
    """
    import_driver("psycopg")
    from ._psycopg_async import AsyncRecipe

    recipe = AsyncRecipe(conninfo, kwargs, reset_session, options.get("configure"))
    recipe.add_hooks(options)
    pool: ConnectionPool[psycopg.AsyncConnection[Any]] = ConnectionPool(recipe.connect, **options)
    recipe.pool_name = pool.name
    return pool


def psycopg_thread_pool(
    conninfo: Provided[str] = "",
    *,
    reset_session: bool = True,
    kwargs: Arguments | None = None,
    **options: Unpack[PoolOptions[psycopg.Connection[Any]]],
) -> BlockingPool[psycopg.Connection[Any]]:
    """Return a pool of connections to PostgreSQL by psycopg's Connection. Under asyncio and trio.

    All calls of such a connection block. A task lets a thread of the pool make them::

        def add_user(connection, name):
            connection.execute("INSERT INTO users VALUES (%s)", [name])

        await pool.run(add_user, "me")  # commits

    For threads, and for tasks that borrow a connection by ``async with``, see `sqlite_pool`. The
    pool is otherwise as that of `psycopg_async_pool`.

    :param conninfo: as that of ``psycopg.connect``, or a function that returns it. Its
        ``connect_timeout`` had better be shorter than that of the pool.
    :param reset_session: as that of `psycopg_async_pool`
    :param kwargs: as that of `psycopg_async_pool`
    :param options: those of `ConnectionPool`; see `aiosync.recipes`
    :raises ImportError: if psycopg is not installed
    :raises TypeError: see `ConnectionPool`
    :raises ValueError: see `ConnectionPool`
    """
    import_driver("psycopg")
    from ._psycopg_threads import ThreadRecipe

    recipe = ThreadRecipe(conninfo, kwargs, reset_session, options.get("configure"))
    recipe.add_hooks(options)
    pool: BlockingPool[psycopg.Connection[Any]] = BlockingPool(
        recipe.connect, interrupt=recipe.interrupt, finish=recipe.commit_here, **options
    )
    recipe.pool_name = pool.name
    return pool
