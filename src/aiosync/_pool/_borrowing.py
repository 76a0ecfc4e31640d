"""A connection that is borrowed for the length of a block.

What must live here: what knows, at the end of the block, whether there is still something to give
back. How one is borrowed is in `_face`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Generic, TypeVar

from .._errors import NotCopied
from .._park import ki_protected

if TYPE_CHECKING:
    from collections.abc import Coroutine
    from types import TracebackType

    from ._face import ConnectionPool
    from ._records import Record

T = TypeVar("T")


class Borrowing(NotCopied, Generic[T]):
    """One connection, borrowed by means of a ``with`` of either kind.

    If it was given back, or discarded, before the end, there is nothing left to do there.
    """

    __slots__ = ("_connection", "_entered", "_pool", "_record", "_timeout", "_use")

    def __init__(self, pool: ConnectionPool[T], timeout: float | None) -> None:
        self._pool = pool
        self._timeout = timeout
        self._entered = False
        self._record: Record[T] | None = None

    @ki_protected
    async def _borrow(self, acquire: Coroutine[Any, Any, T]) -> T:
        if self._entered:
            acquire.close()
            raise RuntimeError("this has borrowed a connection already; call connection() again")
        self._entered = True
        try:
            connection = self._connection = await acquire
        except BaseException:
            self._entered = False
            raise
        # None if the pool has taken it back by force, from a thread, already.
        record = self._record = self._pool._lent.get(id(connection))
        if record is not None:
            # By which we know at the end whether it is still ours.
            self._use = record.uses
        return connection

    @ki_protected
    def _give_back(self) -> None:
        self._entered = False
        record, self._record = self._record, None
        connection = self._connection
        del self._connection
        if record is not None and self._pool._lent.get(record.key) is record:
            if record.uses == self._use:
                self._pool.release(connection)
        elif record is None or record.uses == self._use:
            self._pool._keeper.forced.pop(id(connection), None)


class Checkout(Borrowing[T]):
    """What `ConnectionPool.connection` returns: ``async with`` it borrows a connection."""

    __slots__ = ()

    async def __aenter__(self) -> T:
        """Do what `ConnectionPool.acquire` does.

        :raises RuntimeError: also if it has borrowed a connection already
        """
        return await self._borrow(self._pool.acquire(self._timeout))

    @ki_protected
    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Do what `ConnectionPool.release` does; there is nothing to wait for."""
        self._give_back()
