"""The reset of a connection of sqlite3: what a borrower has changed is undone."""

from __future__ import annotations

import sqlite3
import sys
from typing import TYPE_CHECKING, Any

from .._errors import PoolMisuse

if TYPE_CHECKING:
    from ._sqlite_connection import TrackedConnection

# The attributes that are restored, in this order.
_ATTRIBUTES = [
    name
    for name in ("isolation_level", "autocommit", "row_factory", "text_factory")
    if hasattr(sqlite3.Connection, name)
]


def begin(connection: TrackedConnection) -> None:
    """Take note of how a connection is, when `configure` has run.

    :raises PoolMisuse: if that has left a transaction open
    """
    session = connection.aiosync_session
    is_open = connection.in_transaction and not is_always_in_transaction(connection)
    if is_open or has_uncommitted(connection):
        raise PoolMisuse("configure() has left a transaction open: let it end by a commit")
    session.attributes = {name: getattr(connection, name) for name in _ATTRIBUTES}
    forget(connection)
    session.watches = True


def is_closed(connection: sqlite3.Connection) -> bool:
    """Return whether a connection is closed."""
    try:
        connection.total_changes  # noqa: B018  (raises if it is)
    except sqlite3.ProgrammingError:
        return True
    return False


def is_always_in_transaction(connection: sqlite3.Connection) -> bool:
    """Return whether a transaction begins when the last one ends."""
    return getattr(connection, "autocommit", True) is False


def has_uncommitted(connection: TrackedConnection) -> bool:
    """Return whether something was written that is not committed.

    :raises sqlite3.ProgrammingError: if the connection is closed
    """
    session = connection.aiosync_session
    return connection.in_transaction and (
        connection.total_changes != session.committed_changes or session.schema_changed
    )


def needs_restore(connection: TrackedConnection) -> bool:
    """Return whether `restore` has anything to do.

    :raises ConnectionError: if that would not help
    """
    session = connection.aiosync_session
    if session.altered:
        raise ConnectionError(f"its borrower has changed its session by {session.altered}")
    return connection.in_transaction or bool(session.live_cursors()) or bool(_changed(connection))


def _changed(connection: TrackedConnection) -> list[tuple[str, Any]]:
    """Return the attributes that are not as they were, with what they were."""
    attributes = connection.aiosync_session.attributes.items()
    return [(name, value) for name, value in attributes if getattr(connection, name) != value]


def forget(connection: TrackedConnection) -> None:
    """Forget what the last borrower did, when it is undone."""
    session = connection.aiosync_session
    session.cursors.clear()
    session.schema_changed = False
    session.committed_changes = connection.total_changes
    session.borrower = session.last_statement = None


def restore(connection: TrackedConnection) -> None:
    """Undo what a borrower did, in a thread."""
    session = connection.aiosync_session
    with session.lock:
        for cursor in session.live_cursors():
            cursor.close()
        connection.rollback()
        if sys.version_info >= (3, 12) and connection.autocommit is True:
            # Then `rollback` does nothing, also if the borrower has begun a transaction.
            if connection.in_transaction:
                connection.execute("ROLLBACK").close()
        # After the rollback: to set some of them commits.
        for name, value in _changed(connection):
            setattr(connection, name, value)
        forget(connection)
