"""What a borrower did to a connection of psycopg, and how it is undone."""

from __future__ import annotations

import logging
import socket
import sys
from abc import ABC, abstractmethod
from contextlib import suppress
from operator import attrgetter
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypeAlias, TypeVar, Union
from weakref import WeakKeyDictionary

import psycopg
from psycopg.adapt import AdaptersMap
from psycopg.pq import PipelineStatus
from psycopg.pq import TransactionStatus as Status

from .._callers import call_site
from .._errors import PoolMisuse
from . import _postgres
from ._arguments import check_text, copied, provide_text
from ._hooks import combine

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from .._callers import CallSite
    from .._pool import PoolOptions
    from ._arguments import Arguments, Provided

C = TypeVar("C", bound="AnyConnection")
AnyConnection: TypeAlias = Union[psycopg.Connection[Any], psycopg.AsyncConnection[Any]]

_log = logging.getLogger("aiosync.pool")

# They may be set at any time.
_PLAIN = (
    "cursor_factory", "prepare_threshold", "prepared_max", "row_factory", "server_cursor_factory",
)  # fmt: skip
# They may be set outside of a transaction only, by methods that are async in `AsyncConnection`.
_TRANSACTION = ("isolation_level", "read_only", "deferrable", "autocommit")
# There is no public way to list the handlers of a connection, or to copy its adapters.
_HANDLERS = ("_notice_handlers", "_notify_handlers")

_plain = attrgetter(*_PLAIN)
_transaction = attrgetter(*_TRANSACTION)


class Snapshot(NamedTuple):
    """What a connection keeps on this side."""

    plain: tuple[Any, ...]
    transaction: tuple[Any, ...]
    handlers: dict[str, list[Any]]
    adapters: AdaptersMap | None


def snapshot(connection: AnyConnection) -> Snapshot:
    """Return how a connection is, when `configure` has run.

    :raises PoolMisuse: if that has left a transaction open
    """
    if connection.pgconn.transaction_status != Status.IDLE:
        raise PoolMisuse(_postgres.LEFT_OPEN)
    adapters: AdaptersMap | None = vars(connection).get("_adapters")
    return Snapshot(
        _plain(connection),
        _transaction(connection),
        {name: list(vars(connection).get(name, ())) for name in _HANDLERS},
        None if adapters is None else AdaptersMap(adapters),
    )


def put_back(connection: AnyConnection, saved: Snapshot) -> None:
    """Restore what may be set at any time."""
    if _plain(connection) != saved.plain:
        for name, value in zip(_PLAIN, saved.plain, strict=True):
            setattr(connection, name, value)
    state = vars(connection)
    for name, handlers in saved.handlers.items():
        if state.get(name, handlers) != handlers:
            state[name][:] = handlers
    if state.get("_notifies_backlog"):
        state["_notifies_backlog"].clear()
    adapters = state.get("_adapters")
    if adapters is not None and not _are_alike(adapters, saved.adapters or psycopg.adapters):
        # A copy costs little until somebody changes it.
        state["_adapters"] = None if saved.adapters is None else AdaptersMap(saved.adapters)


def _are_alike(adapters: Any, others: Any) -> bool:
    # A copy shares its dicts until one of the two is changed, so this compares few objects.
    try:
        return bool(
            adapters._dumpers == others._dumpers
            and adapters._dumpers_by_oid == others._dumpers_by_oid
            and adapters._loaders == others._loaders
            and adapters.types._registry == others.types._registry
        )
    except AttributeError:  # another version of psycopg
        return False


def changed(connection: AnyConnection, saved: Snapshot) -> list[tuple[str, Any]]:
    """Return the other attributes that are not as they were, with what they were."""
    found = _transaction(connection)
    if found == saved.transaction:
        return []
    named = zip(_TRANSACTION, saved.transaction, found, strict=True)
    return [(name, value) for name, value, now in named if now != value]


class Recipe(ABC, Generic[C]):
    """What the hooks of the two recipes have in common.

    :param configure: the caller's, if there is one
    """

    def __init__(
        self,
        conninfo: Provided[str],
        kwargs: Arguments | None,
        reset_session: bool,
        configure: Callable[[C], object] | None,
    ) -> None:
        check_text("conninfo", conninfo)
        self._conninfo = conninfo
        self.kwargs = copied(kwargs)
        self.reset_session = reset_session
        self.users_configure = configure
        self.pool_name = ""
        # The lines that have released a connection in a transaction.
        self._warned: set[CallSite] = set()
        self.snapshots: WeakKeyDictionary[C, Snapshot] = WeakKeyDictionary()

    def add_hooks(self, options: PoolOptions[C]) -> None:
        """Add the hooks of the recipe to those that the caller has given."""
        options["configure"] = self.configure
        combine(
            options,
            check=self.check,
            reset=self.reset,
            commit=self.commit,
            close=self.close,
            is_closed=is_closed,
            is_fatal=is_fatal,
        )

    async def provide_conninfo(self) -> str:
        """Return the connection string for the next connect."""
        return await provide_text("conninfo", self._conninfo) or ""

    def remember(self, connection: C) -> None:
        """Take note of how a connection is, when `configure` has run.

        :raises PoolMisuse: if that has left a transaction open
        """
        self.snapshots[connection] = snapshot(connection)

    def reset(self, connection: C) -> object:
        """Return what is left to await until a connection is as it was after `configure`."""
        saved = self.snapshots[connection]
        is_open = has_work_left(connection)
        if is_open:
            self._report_rollback()
        if is_open or self.reset_session or changed(connection, saved):
            return self.restore(connection)
        put_back(connection, saved)
        return None

    def _report_rollback(self) -> None:
        # A block commits, unless it raises. A thread may have done either, or released it.
        if sys.exc_info()[1] is not None:
            return
        site = call_site()
        if site is None:
            _log.info("%s: rolled back a transaction of a thread", self.pool_name)
        elif site not in self._warned:
            self._warned.add(site)
            _log.warning(
                "%s: rolled back a transaction that was open when its connection was released: %s",
                self.pool_name, site,
            )  # fmt: skip

    @abstractmethod
    def configure(self, connection: C) -> Awaitable[None]: ...

    @abstractmethod
    def check(self, connection: C) -> Awaitable[None]: ...

    @abstractmethod
    def commit(self, connection: C) -> object: ...

    @abstractmethod
    def restore(self, connection: C) -> Awaitable[None]:
        """Undo all that a borrower did."""

    @abstractmethod
    def close(self, connection: C) -> Awaitable[None]: ...


def has_work_left(connection: AnyConnection) -> bool:
    """Return whether a connection has to be rolled back.

    :raises ConnectionError: if that would not help
    """
    if connection.pgconn.pipeline_status != PipelineStatus.OFF:
        raise ConnectionError("the connection came back in pipeline mode")
    status = connection.pgconn.transaction_status
    if status == Status.IDLE:
        return False
    if status not in {Status.INTRANS, Status.INERROR}:
        state = connection.info.transaction_status.name
        raise ConnectionError(f"the connection came back in the state {state}")
    return True


def is_in_transaction(connection: AnyConnection) -> bool:
    """Return whether there is something to commit; a closed connection is no error."""
    return not connection.closed and connection.pgconn.transaction_status != Status.IDLE


def is_closed(connection: AnyConnection) -> bool:
    """Return whether the driver calls a connection closed."""
    return connection.closed


def is_fatal(error: Exception) -> bool:
    """Return whether a connection is of no use after this error of a block."""
    return isinstance(error, psycopg.Error) and _postgres.is_fatal_state(error.sqlstate)


def hang_up(connection: AnyConnection) -> None:
    """End what others are doing with a connection: they see that the server has gone."""
    with suppress(Exception):  # it may have come to its end already
        endpoint = socket.socket(fileno=connection.fileno())
        try:
            endpoint.shutdown(socket.SHUT_RDWR)
        finally:
            endpoint.detach()  # it is the connection that closes it
