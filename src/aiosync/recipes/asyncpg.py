"""The recipe for PostgreSQL by asyncpg."""

from __future__ import annotations

from inspect import isawaitable
from typing import TYPE_CHECKING, Any

from .._errors import PoolMisuse
from .._pool import ConnectionPool
from . import _postgres
from ._arguments import (
    check_text,
    copied,
    import_driver,
    mistakes,
    provide_arguments,
    provide_text,
    require_asyncio,
)
from ._hooks import combine

if TYPE_CHECKING:
    from typing import Unpack

    import asyncpg

    from .._pool import PoolOptions
    from ._arguments import Arguments, Provided


def asyncpg_pool(
    dsn: Provided[str] | None = None,
    *,
    kwargs: Arguments | None = None,
    **options: Unpack[PoolOptions[asyncpg.Connection]],
) -> ConnectionPool[asyncpg.Connection]:
    """Return a pool of connections to PostgreSQL by asyncpg. Under asyncio only.

    A connection that comes back is reset by its ``reset()``, in one round trip, or two if a
    transaction is open:

    - The transaction is rolled back. Session authorization, role and settings are as when the
      connection was opened. Advisory locks, cursors, temporary tables, listeners, sequence caches,
      and statements that were prepared by SQL are gone. Those that asyncpg has prepared stay.
    - Then `configure` runs again, if there is one, because what it has set by SET is gone too; each
      of its statements costs one more round trip. (Settings that are given as ``server_settings``
      in `kwargs` cost nothing.)
    - Type codecs, query loggers and termination listeners that `configure` has added stay, and are
      not added again. If a borrower adds some, or removes a codec, the connection is replaced.

    One that does not close in time is terminated.

    :param dsn: as that of ``asyncpg.connect``; or a function that returns it
    :param kwargs: more arguments for ``asyncpg.connect``, for instance ``command_timeout`` or
        ``connection_class``; or a function that returns them. So may be its ``password``. Such a
        function is plain or async, and is called for each new connection.
    :param options: those of `ConnectionPool`; see `aiosync.recipes`
    :raises ImportError: if asyncpg is not installed
    :raises TypeError: see `ConnectionPool`
    :raises ValueError: see `ConnectionPool`
    """
    driver = import_driver("asyncpg")
    from ._asyncpg_session import Phase, TrackedConnection, is_fatal, tracked

    check_text("dsn", dsn)
    kwargs = copied(kwargs)
    configure = options.get("configure")

    async def connect() -> asyncpg.Connection:
        require_asyncio("asyncpg")
        arguments = await provide_arguments(kwargs)
        address = await provide_text("dsn", dsn)
        with mistakes(driver.ClientConfigurationError):
            arguments["connection_class"] = tracked(
                arguments.get("connection_class", driver.Connection)
            )
            connection: TrackedConnection = await driver.connect(address, **arguments)
        return connection

    async def prepare(connection: Any) -> None:
        result = None if configure is None else configure(connection)
        if isawaitable(result):
            await result
        if connection.is_in_transaction():
            raise PoolMisuse(_postgres.LEFT_OPEN)
        connection.aiosync_phase = Phase.BORROWER

    async def check(connection: asyncpg.Connection) -> None:
        await connection.execute("SELECT 1")

    def reset(connection: Any) -> object:
        if connection.aiosync_altered:
            raise ConnectionError(
                f"its borrower has changed its session by {connection.aiosync_altered}"
            )
        if configure is None and not connection.aiosync_prepared:
            return connection.reset_session()
        return reset_all(connection)

    async def reset_all(connection: Any) -> None:
        await connection.reset_session()
        connection.aiosync_prepared = False
        if configure is not None:
            connection.aiosync_phase = Phase.CONFIGURE_AGAIN
            await prepare(connection)

    async def close(connection: asyncpg.Connection) -> None:
        try:
            await connection.close()
        except BaseException:
            connection.terminate()
            raise

    combine(
        options,
        check=check,
        reset=reset,
        close=close,
        is_closed=driver.Connection.is_closed,
        is_fatal=is_fatal,
    )
    options["configure"] = prepare
    return ConnectionPool(connect, **options)
