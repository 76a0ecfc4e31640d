"""A connection that is borrowed for the length of a block."""

from __future__ import annotations

from functools import partial
from inspect import isawaitable
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

from .._errors import NeedsAsyncWith, NotCopied
from .._park import ki_protected

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine
    from types import TracebackType

    from ._entry import PoolEntry

T = TypeVar("T")


class Lender(Protocol[T]):
    """What a checkout needs of a pool."""

    _is_plain: bool
    _commit: Callable[[T], object] | None

    def acquire(self, timeout: float | None = None) -> Coroutine[Any, Any, T]: ...

    def _take(self, timeout: float | None, is_task: bool) -> Coroutine[Any, Any, T]: ...

    def _entry_of(self, connection: T) -> PoolEntry[T] | None:
        """Return the entry of a borrowed connection."""

    def _forget(self, connection: T) -> None:
        """Take note that the borrower of a connection that was closed by force has let go of it."""

    def release(self, connection: T) -> None: ...

    def _release_after(self, error: BaseException | None, connection: T) -> None: ...

    def discard(self, connection: T) -> None: ...

    def _reset_and_release(self, connection: T) -> Any:
        """Give back a connection; return what is left to await, or None."""


class Loan(NotCopied, Generic[T]):
    """One connection at a time, borrowed by means of a ``with`` of either kind.

    If it was given back or discarded before the end of the block, nothing is left to do there.
    """

    __slots__ = ("_connection", "_entered", "_entry", "_pool", "_timeout", "_use")

    def __init__(self, pool: Lender[T], timeout: float | None) -> None:
        self._pool = pool
        self._timeout = timeout
        self._entered = False
        self._entry: PoolEntry[T] | None = None

    def release(self) -> None:
        """Give the connection back before the end of the block.

        Does nothing if that has been done, also if another caller has borrowed the connection
        since. May be called from anywhere, and never blocks.
        """
        self._give_back(self._pool.release)

    def discard(self) -> None:
        """Give the connection back to be closed. Like `release` in all else."""
        self._give_back(self._pool.discard)

    @property
    def borrowed(self) -> bool:
        """Whether a connection is borrowed by this object."""
        entry = self._entry
        if entry is None or entry.uses != self._use:
            return False
        try:
            return self._pool._entry_of(self._connection) is entry
        except AttributeError:  # another thread has just given it back
            return False

    @ki_protected
    def _begin(self) -> None:
        if self._entered:
            raise RuntimeError("this has borrowed a connection already; call connection() again")
        self._entered = True

    @ki_protected
    def _borrowed(self, connection: T) -> T:
        # None if the pool has closed it by force, from another thread, already.
        entry = self._entry = self._pool._entry_of(connection)
        if entry is not None:
            self._use = entry.uses  # tells this loan from later ones of the same connection
        self._connection = connection  # from now on it may be given back, by any thread
        return connection

    @ki_protected
    def _give_back(self, give_back: Any) -> Any:
        """Call `give_back` with the connection if it is still borrowed by this object."""
        try:
            connection = self._connection
            del self._connection  # to remove it is to claim the right to give it back
        except AttributeError:
            return None  # it was given back, or there is none yet
        entry, self._entry = self._entry, None
        self._entered = False
        if entry is not None and self._pool._entry_of(connection) is entry:
            if entry.uses == self._use:
                return give_back(connection)
        elif entry is None or entry.uses == self._use:
            self._pool._forget(connection)
        return None


class Checkout(NeedsAsyncWith, Loan[T]):
    """A connection that is borrowed for the length of an ``async with`` block.

    Created by `ConnectionPool.connection`.
    """

    __slots__ = ()

    @ki_protected
    async def __aenter__(self) -> T:
        """Do what `ConnectionPool.acquire` does.

        :raises RuntimeError: also if this object has borrowed a connection already
        """
        self._begin()
        pool, timeout = self._pool, self._timeout
        try:
            connection = await (
                pool.acquire(timeout) if pool._is_plain else pool._take(timeout, True)
            )
        except BaseException:
            self._entered = False
            raise
        return self._borrowed(connection)

    @ki_protected
    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Give the connection back, unless that has been done.

        If the block has raised nothing, the hooks `commit` and `reset` of the pool run here, the
        latter shielded from cancellation; otherwise `reset` runs in the background, as if by
        `ConnectionPool.release`. An error of `commit` is raised; after an error of `reset` the
        connection is replaced.
        """
        if exc_type is not None:
            self._give_back(partial(self._pool._release_after, exc))
            return
        commit = self._pool._commit
        if commit is not None and self.borrowed:
            try:
                result = commit(self._connection)
                if isawaitable(result):
                    await result
            except BaseException as error:
                self._give_back(partial(self._pool._release_after, error))
                raise
        rest = self._give_back(self._pool._reset_and_release)
        if rest is not None:
            await rest
