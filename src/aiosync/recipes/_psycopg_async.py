"""The hooks of the recipe for psycopg's AsyncConnection."""

from __future__ import annotations

from inspect import isawaitable
from typing import Any, TypeAlias

import psycopg
from psycopg.rows import tuple_row

from . import _postgres
from ._arguments import mistakes, provide_arguments, require_asyncio
from ._psycopg_session import Recipe, changed, hang_up, has_work_left, is_in_transaction, put_back

Connection: TypeAlias = psycopg.AsyncConnection[Any]


class AsyncRecipe(Recipe[Connection]):
    """The hooks of one pool."""

    async def connect(self) -> Connection:
        require_asyncio("psycopg's AsyncConnection")
        arguments = await provide_arguments(self.kwargs)
        conninfo = await self.provide_conninfo()
        with mistakes(psycopg.ProgrammingError):
            return await psycopg.AsyncConnection.connect(conninfo, **arguments)

    async def configure(self, connection: Connection) -> None:
        if self.users_configure is not None:
            result = self.users_configure(connection)
            if isawaitable(result):
                await result
        self.remember(connection)

    async def check(self, connection: Connection) -> None:
        autocommit = connection.autocommit
        await _execute(connection, "")
        if not autocommit:
            await connection.set_autocommit(False)

    def commit(self, connection: Connection) -> object:
        return connection.commit() if is_in_transaction(connection) else None

    async def restore(self, connection: Connection) -> None:
        saved = self.snapshots[connection]
        if has_work_left(connection):
            await connection.rollback()
        put_back(connection, saved)
        if self.reset_session:
            await _execute(connection, _postgres.SESSION)
        for name, value in changed(connection, saved):
            await getattr(connection, f"set_{name}")(value)
        if self.reset_session and self.users_configure is not None:
            await self.configure(connection)

    async def close(self, connection: Connection) -> None:
        # As `close_when_free`.
        if connection.lock.locked():
            hang_up(connection)
        try:
            async with connection.lock:
                pass
        finally:
            await connection.close()


async def _execute(connection: Connection, statement: Any) -> None:
    """Execute statements outside of a transaction, whatever the caller has configured."""
    if not connection.autocommit:
        await connection.set_autocommit(True)
    cursor = psycopg.AsyncCursor(connection, row_factory=tuple_row)
    await cursor.execute(statement, prepare=False)
