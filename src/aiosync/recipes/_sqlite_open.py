"""How a SQLite connection is opened, in a thread."""

from __future__ import annotations

import sqlite3
import sys
from threading import Lock
from typing import TYPE_CHECKING, Any, cast

from ._sqlite_connection import tracked

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from ._sqlite_connection import TrackedConnection

_UNSET = object()


class Opener:
    """Opens the connections of one pool.

    :param arguments: of `sqlite3.connect`, the same for all
    :param wal: whether to put the database into WAL mode
    :param statements: executed on each connection
    """

    def __init__(
        self, path: str, arguments: Mapping[str, Any], wal: bool, statements: Sequence[str]
    ) -> None:
        self._path = path
        self._arguments = {**arguments, "check_same_thread": False}
        self._wal = wal
        self._statements = statements
        # Two that switch to WAL at the same time get "database is locked", whatever the timeout.
        self._switching = Lock()

    def open(self, kwargs: Mapping[str, Any]) -> TrackedConnection:
        """Return a connection with the pragmas set.

        :param kwargs: more arguments of `sqlite3.connect`
        """
        arguments = {**kwargs, **self._arguments}
        arguments["factory"] = tracked(kwargs.get("factory", sqlite3.Connection))
        # With autocommit=False there is always a transaction, in which some pragmas do nothing.
        mode = arguments.pop("autocommit", _UNSET)
        connection: Any = sqlite3.connect(self._path, **arguments)
        try:
            if self._wal:
                with self._switching:
                    connection.execute("PRAGMA journal_mode = WAL").close()
            for statement in self._statements:
                connection.execute(statement).close()
            if sys.version_info >= (3, 12) and mode is not _UNSET:
                connection.autocommit = mode
        except BaseException:
            connection.close()
            raise
        return cast("TrackedConnection", connection)
