"""What `as_threading` returns for a pool, and a connection that a thread has borrowed from it."""

from __future__ import annotations

from functools import partial
from inspect import isawaitable
from typing import TYPE_CHECKING, Generic, TypeVar

from ._errors import NeedsPlainWith, refuse_with
from ._loop_thread import LoopThread
from ._park import current_token, run_in_thread
from ._pool import ConnectionPool, Loan

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType
    from typing import Self

    from ._pool import ConnectionInfo, PoolStatistics

T = TypeVar("T")


class ThreadConnectionPool(NeedsPlainWith, Generic[T]):
    """A `ConnectionPool` whose connections are borrowed by threads. Created by `as_threading`.

    A task opens and closes the pool, or a thread does by ``with as_threading(pool):``. The hooks of
    the pool (`connect`, `reset` and so on) are called on the event loop of that task or of that
    ``with``. Threads and tasks wait for connections in one FIFO order. All methods may be called
    from any thread. Only ``with``, `acquire` and `connection` can block.
    """

    __slots__ = ("__weakref__", "_loop", "_shared")

    def __init__(self, pool: ConnectionPool[T]) -> None:
        self._shared = pool
        self._loop = LoopThread()

    def __enter__(self) -> Self:
        """Open the pool on an event loop of its own, which runs in a thread until the block ends.

        For programs that have no event loop.

        :raises RuntimeError: if the pool is open already, or an event loop is running on this
            thread
        """
        if current_token() is not None:
            refuse_with(self._shared)
        self._loop.start(self._shared.open)
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close the pool, as `ConnectionPool.close` does, and end its event loop."""
        self._loop.stop(self._shared.close)

    def acquire(self, timeout: float | None = None) -> T:
        """Borrow a connection, waiting in FIFO order if none is idle. `release` gives it back.

        An exception from a signal handler (Ctrl-C) interrupts the wait, and nothing is borrowed.

        :param timeout: that of `ConnectionPool.acquire`, which documents the other exceptions
        :raises PoolClosed: also if no connection is idle, and the event loop of the pool has ended
        :raises RuntimeError: if it would have to wait, and an event loop is running on this thread
        """
        return run_in_thread(self._shared._take(timeout, False))

    def acquire_nowait(self) -> T:
        """Borrow an idle connection. The same as `ConnectionPool.acquire_nowait`.

        :raises anyio.WouldBlock: if no connection is idle
        :raises PoolClosed: if the pool is not open
        """
        return self._shared._grab()

    def release(self, connection: T) -> None:
        """Give back `connection`. The same as `ConnectionPool.release`. Never blocks.

        :raises ValueError: if `connection` is not borrowed
        """
        self._shared.release(connection)

    def discard(self, connection: T) -> None:
        """Give back `connection` to be closed. The same as `ConnectionPool.discard`. Never blocks.

        :raises ValueError: if `connection` is not borrowed
        """
        self._shared.discard(connection)

    def connection(self, timeout: float | None = None) -> ThreadCheckout[T]:
        """Return a context manager that borrows a connection and gives it back.

        :param timeout: that of `acquire`, which documents the exceptions
        """
        return ThreadCheckout(self._shared, timeout)

    def info(self, connection: T) -> ConnectionInfo:
        """Return what the pool knows about `connection`. The same as `ConnectionPool.info`.

        :raises ValueError: if `connection` does not belong to this pool
        """
        return self._shared.info(connection)

    def get_stats(self) -> dict[str, int]:
        """Return the statistics of the pool. The same as `ConnectionPool.get_stats`."""
        return self._shared.get_stats()

    def statistics(self) -> PoolStatistics:
        """Return typed figures. The same as `ConnectionPool.statistics`."""
        return self._shared.statistics()

    @property
    def closed(self) -> bool:
        """Whether the pool is not open. The same as `ConnectionPool.closed`."""
        return self._shared.closed

    @property
    def healthy(self) -> bool:
        """Whether the pool is open and can connect. The same as `ConnectionPool.healthy`."""
        return self._shared.healthy

    def __repr__(self) -> str:
        return f"<as_threading.ConnectionPool at {id(self):#x}: {self._shared!r}>"


class ThreadCheckout(Loan[T], NeedsPlainWith):
    """A connection that is borrowed for the length of a ``with`` block.

    Created by `ThreadConnectionPool.connection`.
    """

    __slots__ = ()

    def __enter__(self) -> T:
        """Do what `ThreadConnectionPool.acquire` does.

        :raises RuntimeError: also if a connection was borrowed by this object already
        """
        self._begin()
        try:
            connection = run_in_thread(self._pool._take(self._timeout, False))
        except BaseException:
            self._entered = False
            raise
        return self._borrowed(connection)

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Do what `ThreadConnectionPool.release` does, unless the connection was given back.

        If the block has raised nothing, the `commit` hook of the pool is called first.

        :raises RuntimeError: if that is async, which only a task can run
        """
        commit = self._pool._commit
        if exc_type is None and commit is not None and self.borrowed:
            try:
                run_in_thread(_call(commit, self._connection))
            except BaseException as error:
                self._give_back(partial(self._pool._release_after, error))
                raise
        self._give_back(partial(self._pool._release_after, exc))


async def _call(hook: Callable[[T], object], connection: T) -> None:
    result = hook(connection)
    if isawaitable(result):
        await result


# As in `aiosync`, which imports this module late.
ThreadConnectionPool.__module__ = ThreadCheckout.__module__ = "aiosync"
