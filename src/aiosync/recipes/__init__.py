"""Ready-made pools: SQLite, PostgreSQL by asyncpg or psycopg, and plain TCP.

Each function returns a `ConnectionPool` that knows how to connect, check, reset and close; all else
is up to the caller. They use nothing but the public API: docs/recipes.md shows how to write one for
another driver. A driver is imported when its function is called.

The options are those of `ConnectionPool`. These differ:

- `reset` and `check` of the caller run after those of the recipe. After one that fails, which for
  `check` includes to return False, the other one is not called. `close` of the caller runs before
  that of the recipe, which closes the connection whatever the caller's raises.
- `is_closed` and `is_fatal` of the caller are asked if those of the recipe return False, and
  `commit` of the caller runs before that of the recipe.
- `configure` must not leave a transaction open; if it does, all waiters get `PoolMisuse` at once.
  What it has set is there for every borrower. The same error tells of a driver under the wrong
  event loop, and of arguments that the driver refuses.
- Where the docstring names credentials, they may be functions, plain or async, which are called for
  each new connection. So `ConnectionPool.drain` makes new ones take effect.

Pools of drivers that block are `BlockingPool`, with the method `BlockingPool.run`. They call the
driver in worker threads of their own, outside of anyio's limit of 40, because all 40 might be
waiting for a connection. A plain `configure` is called in such a thread too; all other hooks of the
caller on the event loop, as for any pool. If a call takes longer than the pool allows for, its
thread is left behind, and the pool goes on; a connection that is made too late is closed there.
Should a call never end, a thread and a connection are lost, and under asyncio the process does not
exit before the thread does; the remedy is a timeout of the driver, such as ``connect_timeout`` of
psycopg.

_arguments         credentials that are asked for at each connect; drivers that are missing
_hooks             the recipe's hooks and the caller's, as one
_threads           worker threads; how to close a connection that another thread may be using
_blocking          BlockingPool
_sqlite_arguments  arguments and statements of SQLite
_sqlite_connection a connection of sqlite3 that knows what its borrower did
_sqlite_session    how that is undone
_sqlite_open       how such a connection is opened
_postgres          the statements that reset a session
_asyncpg_session   what a borrower did to a connection of asyncpg, and how it is undone
_psycopg_session   what a borrower did to a connection of psycopg, and how it is undone
_psycopg_async     the hooks for psycopg's AsyncConnection
_psycopg_threads   the hooks for psycopg's Connection
sqlite, asyncpg, psycopg, tcp   the recipes

Each imports only from those above it.
"""

from ._blocking import BlockingPool
from .asyncpg import asyncpg_pool
from .psycopg import psycopg_async_pool, psycopg_thread_pool
from .sqlite import sqlite_pool
from .tcp import tcp_pool

__all__ = [
    "BlockingPool",
    "asyncpg_pool",
    "psycopg_async_pool",
    "psycopg_thread_pool",
    "sqlite_pool",
    "tcp_pool",
]

# Tracebacks and help() show the public name, not the private module.
BlockingPool.__module__ = __name__
