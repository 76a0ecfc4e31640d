"""A connection of sqlite3 that knows what its borrower did.

It learns from SQLite's authorizer, which is called whenever a statement is
prepared, what else than rows a statement changes: pragmas, attached databases, temporary tables.
That can't be undone, so such a connection is replaced.
"""

from __future__ import annotations

import sqlite3
import sys
from threading import Lock
from typing import TYPE_CHECKING, Any, TypeVar
from weakref import ref

from .._callers import CallSite

if TYPE_CHECKING:
    from collections.abc import Callable

R = TypeVar("R")

# Pragmas that take an argument, but leave the connection as it is: they ask, or change the file.
_HARMLESS_PRAGMAS = frozenset(
    {
        "application_id", "foreign_key_check", "foreign_key_list", "incremental_vacuum",
        "index_info", "index_list", "index_xinfo", "integrity_check", "optimize", "quick_check",
        "table_info", "table_list", "table_xinfo", "user_version", "wal_checkpoint",
    }
)  # fmt: skip
_ATTACHING = frozenset({sqlite3.SQLITE_ATTACH, sqlite3.SQLITE_DETACH})
_READING = frozenset({sqlite3.SQLITE_READ, sqlite3.SQLITE_SELECT, sqlite3.SQLITE_FUNCTION})
_SCHEMA = frozenset({"sqlite_master", "sqlite_schema"})
# Methods of a connection whose effect lasts.
_ALTERING = (
    "create_aggregate", "create_collation", "create_function", "create_window_function",
    "deserialize", "enable_load_extension", "load_extension", "set_progress_handler",
    "set_trace_callback", "setconfig", "setlimit",
)  # fmt: skip
# Forget cursors that are gone when there are this many.
_MANY = 64


class Session:
    """What is known about one connection. It does not refer to it: that would be a cycle."""

    def __init__(self) -> None:
        # Held while a thread of the recipe uses the connection.
        self.lock = Lock()
        # Whether the connection is ready: what happens from then on is done by borrowers.
        self.watches = False
        # What a borrower did that can't be undone.
        self.altered = ""
        # The authorizer of the caller.
        self.authorizer: Callable[..., int] | None = None
        # Whether the schema was changed since the last commit.
        self.schema_changed = False
        # `total_changes` at the last commit.
        self.committed_changes = 0
        # The cursors and blobs, which may keep a snapshot of the database.
        self.cursors: list[ref[Any]] = []
        self.many = _MANY
        # The line of the block that ends, and that of the last statement.
        self.borrower: CallSite | None = None
        self.last_statement: CallSite | None = None
        # What `configure` has left in these attributes.
        self.attributes: dict[str, Any] = {}

    def alter(self, what: str) -> None:
        """Take note of something that can't be undone."""
        if self.watches:
            self.altered = what

    def track(self, cursor: R) -> R:
        """Take note of a cursor or a blob."""
        self.cursors.append(ref(cursor))
        if len(self.cursors) > self.many:
            self.cursors = [found for found in self.cursors if found() is not None]
            self.many = 2 * len(self.cursors) + _MANY
        return cursor

    def live_cursors(self) -> list[Any]:
        """Return the cursors that are still referenced."""
        found = [reference() for reference in self.cursors]
        return [cursor for cursor in found if cursor is not None]

    def authorize(
        self, action: int, first: Any, second: Any, database: str | None, trigger: Any
    ) -> int:
        """Take note of what a statement that is being prepared will do; called by SQLite."""
        if action == sqlite3.SQLITE_PRAGMA:
            if second is not None and first.lower() not in _HARMLESS_PRAGMAS:
                self.alter(f"PRAGMA {first}")
        elif action in _ATTACHING:
            self.alter("ATTACH or DETACH")
        elif action == sqlite3.SQLITE_TRANSACTION:
            if first == "COMMIT":
                self.schema_changed = False
        elif action not in _READING:
            if database == "temp":
                self.alter("a temporary table, view or trigger")
            elif first in _SCHEMA:
                self.schema_changed = True
        users = self.authorizer
        return (
            sqlite3.SQLITE_OK if users is None else users(action, first, second, database, trigger)
        )


class TrackedConnection(sqlite3.Connection):
    """A connection that knows what its borrower did. It may be weakly referenced."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.aiosync_session = Session()
        super().__init__(*args, **kwargs)
        super().set_authorizer(self.aiosync_session.authorize)

    def _track(self, cursor: R) -> R:
        session = self.aiosync_session
        session.last_statement = CallSite.of(sys._getframe(2))
        return session.track(cursor)

    def cursor(self, *args: Any, **kwargs: Any) -> Any:
        return self._track(super().cursor(*args, **kwargs))

    # These three do not call `cursor`.
    def execute(self, *args: Any) -> sqlite3.Cursor:
        return self._track(super().execute(*args))

    def executemany(self, *args: Any) -> sqlite3.Cursor:
        return self._track(super().executemany(*args))

    def executescript(self, *args: Any) -> sqlite3.Cursor:
        return self._track(super().executescript(*args))

    def blobopen(self, *args: Any, **kwargs: Any) -> Any:
        return self._track(super().blobopen(*args, **kwargs))

    def commit(self) -> None:
        super().commit()
        self.aiosync_session.committed_changes = self.total_changes

    def __exit__(self, *args: Any) -> Any:  # noqa: PYI036
        result = super().__exit__(*args)
        self.aiosync_session.committed_changes = self.total_changes
        return result

    def set_authorizer(self, authorizer_callback: Callable[..., int] | None) -> None:
        session = self.aiosync_session
        session.alter("set_authorizer()")
        session.authorizer = authorizer_callback
        super().set_authorizer(session.authorize)  # statements are to be prepared again


def _altering(name: str) -> Any:
    def method(self: TrackedConnection, *args: Any, **kwargs: Any) -> Any:
        self.aiosync_session.alter(f"{name}()")
        return getattr(super(TrackedConnection, self), name)(*args, **kwargs)

    method.__name__ = name
    return method


for _name in _ALTERING:
    if hasattr(sqlite3.Connection, _name):
        setattr(TrackedConnection, _name, _altering(_name))


def tracked(factory: Any) -> type[TrackedConnection]:
    """Return a subclass of `factory` that tracks what borrowers do.

    :raises TypeError: if `factory` is not a class of connections
    """
    if not (isinstance(factory, type) and issubclass(factory, sqlite3.Connection)):
        raise TypeError("factory must be a subclass of sqlite3.Connection")
    if factory is sqlite3.Connection:
        return TrackedConnection
    return type(factory.__name__, (TrackedConnection, factory), {})
