"""The reset of a connection of asyncpg: what a borrower has changed is undone."""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING, Any

import asyncpg

from . import _postgres

if TYPE_CHECKING:
    from collections.abc import Callable

_QUERIES = (
    "execute",
    "executemany",
    "fetch",
    "fetchmany",
    "fetchrow",
    "fetchval",
    "prepare",
)
# What a connection keeps on this side, and `reset` leaves as it is.
_CODECS = ("reset_type_codec", "set_builtin_type_codec", "set_type_codec")
_CALLBACKS = ("add_query_logger", "add_termination_listener")


class Phase(Enum):
    """The user of a connection: the caller's `configure`, or a borrower."""

    CONFIGURE = "configure"
    CONFIGURE_AGAIN = "configure again"  # after a reset
    BORROWER = "borrower"


class TrackedConnection(asyncpg.Connection):  # type: ignore[misc]
    """A connection whose ``reset`` restores more, in the same single round trip."""

    # No slots: a class of the caller that has some could not be combined with it.

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.aiosync_phase = Phase.CONFIGURE
        # What a borrower did that can't be undone.
        self.aiosync_altered = ""
        # Whether a borrower may have prepared a statement by SQL.
        self.aiosync_prepared = False

    def get_reset_query(self) -> str:
        """Return what ``reset`` sends after it has ended the transaction."""
        parts = [_postgres.AUTHORIZATION, super().get_reset_query(), _postgres.TEMPORARY]
        if self.aiosync_prepared:
            # Costs twice as much as all others together.
            parts.append(_postgres.PREPARED)
        return "\n".join(parts)

    def reset_session(self) -> Any:
        """Return what is left to await until the connection is as when it was opened.

        The same as ``reset``, which costs more, where there is nothing to undo on this side. Only
        private attributes tell; if a version of asyncpg has others, ``reset`` runs.
        """
        has_more_to_undo = (
            self.is_closed()  # `reset` says so
            or getattr(self, "_top_xact", self) is not None
            or getattr(self, "_listeners", True)
            or getattr(self, "_log_listeners", True)
            or self.is_in_transaction()
            or type(self).reset is not asyncpg.Connection.reset  # it may undo what a caller adds
        )
        return self.reset() if has_more_to_undo else super().execute(self.get_reset_query())


def _watched(name: str) -> Any:
    # Not a coroutine function: one more coroutine costs, see docs/performance.md.
    def method(self: TrackedConnection, *args: Any, **kwargs: Any) -> Any:
        # asyncpg calls it "command" in `executemany`.
        query = args[0] if args else kwargs.get("query", kwargs.get("command", ""))
        if "prepare" in str(query).lower():  # asyncpg refuses what is no str
            self.aiosync_prepared = True
        return getattr(super(TrackedConnection, self), name)(*args, **kwargs)

    return method


def _once(name: str) -> Any:
    async def method(self: TrackedConnection, *args: Any, **kwargs: Any) -> Any:
        if self.aiosync_phase is Phase.CONFIGURE_AGAIN:
            return  # it is set still
        if self.aiosync_phase is Phase.BORROWER:
            self.aiosync_altered = f"{name}()"
        await getattr(super(TrackedConnection, self), name)(*args, **kwargs)

    return method


def _plain_once(name: str) -> Any:
    def method(self: TrackedConnection, callback: Any) -> None:
        if self.aiosync_phase is Phase.CONFIGURE_AGAIN:
            return
        if self.aiosync_phase is Phase.BORROWER:
            self.aiosync_altered = f"{name}()"
        getattr(super(TrackedConnection, self), name)(callback)

    return method


def _override(names: tuple[str, ...], make: Callable[[str], Any]) -> None:
    for name in names:
        method = make(name)
        method.__name__ = name
        method.__doc__ = getattr(asyncpg.Connection, name).__doc__
        setattr(TrackedConnection, name, method)


_override(_QUERIES, _watched)
_override(_CODECS, _once)
_override(_CALLBACKS, _plain_once)


def tracked(connection_class: Any) -> type[TrackedConnection]:
    """Return a subclass of `connection_class` that tracks what borrowers do.

    :raises TypeError: if that is not a class of connections
    """
    if connection_class is asyncpg.Connection:
        return TrackedConnection
    if not (
        isinstance(connection_class, type) and issubclass(connection_class, asyncpg.Connection)
    ):
        raise TypeError("connection_class must be a subclass of asyncpg.Connection")
    return type(connection_class.__name__, (TrackedConnection, connection_class), {})


def is_fatal(error: Exception) -> bool:
    """Return whether a connection is of no use after this error of a block."""
    state: str | None = getattr(error, "sqlstate", None)
    return isinstance(error, asyncpg.PostgresError) and _postgres.is_fatal_state(state)
