"""The hooks of the recipe for psycopg's Connection, which is used in threads."""

from __future__ import annotations

from functools import partial
from typing import Any, TypeAlias

import psycopg
from psycopg.rows import tuple_row

from . import _postgres
from ._arguments import mistakes, provide_arguments
from ._psycopg_session import Recipe, changed, hang_up, has_work_left, is_in_transaction, put_back
from ._threads import Threads, close_when_free, in_event_loop

Connection: TypeAlias = psycopg.Connection[Any]

# How long it may take to ask the server to cancel a command, in seconds.
_TIME_TO_CANCEL = 5.0


class ThreadRecipe(Recipe[Connection]):
    """The hooks of one pool."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._threads = Threads()

    async def connect(self) -> Connection:
        arguments = await provide_arguments(self.kwargs)
        open_one = partial(psycopg.connect, await self.provide_conninfo(), **arguments)
        with mistakes(psycopg.ProgrammingError):
            return await self._threads.make(open_one, _close)

    async def configure(self, connection: Connection) -> None:
        if self.users_configure is not None:
            await self._threads.call(self.users_configure, connection)
        self.remember(connection)

    async def check(self, connection: Connection) -> None:
        await self._threads.run(_look, connection)

    def commit_here(self, connection: Connection) -> None:
        """Commit in the thread that runs this."""
        if is_in_transaction(connection):
            connection.commit()

    def commit(self, connection: Connection) -> object:
        if is_in_transaction(connection):
            if in_event_loop():
                return self._threads.run(connection.commit)
            connection.commit()
        return None

    async def restore(self, connection: Connection) -> None:
        await self._threads.run(self._restore_here, connection)
        if self.reset_session and self.users_configure is not None:
            await self.configure(connection)

    def _restore_here(self, connection: Connection) -> None:
        saved = self.snapshots[connection]
        if has_work_left(connection):
            connection.rollback()
        put_back(connection, saved)
        if self.reset_session:
            _execute(connection, _postgres.SESSION)
        for name, value in changed(connection, saved):
            setattr(connection, name, value)

    async def close(self, connection: Connection) -> None:
        await self._threads.run_anyway(_close, connection)

    def interrupt(self, connection: Connection) -> object:
        # To the end: a cancellation that comes late would hit the next borrower.
        return self._threads.run_to_end(partial(connection.cancel_safe, timeout=_TIME_TO_CANCEL))


def _close(connection: Connection) -> None:
    close_when_free(connection, connection.lock, partial(hang_up, connection))


def _look(connection: Connection) -> None:
    autocommit = connection.autocommit
    _execute(connection, "")
    if not autocommit:
        connection.autocommit = False


def _execute(connection: Connection, statement: Any) -> None:
    """Execute statements outside of a transaction, whatever the caller has configured."""
    if not connection.autocommit:
        connection.autocommit = True
    cursor = psycopg.Cursor(connection, row_factory=tuple_row)
    cursor.execute(statement, prepare=False)
