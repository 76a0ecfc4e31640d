"""`as_threading`: the API of `threading` for objects that tasks share.

A view holds no state of its own. It runs the same code as a task, on the calling thread, with
another kind of waiter; see `_park.run_in_thread`. For the opposite direction, objects that
threads own, see `_from_threading`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Generic, NoReturn, TypeVar, overload

from ._barrier import Barrier
from ._errors import NotCopied
from ._park import run_in_thread
from ._pool import Borrowing, ConnectionPool
from ._semaphore import BoundedSemaphore, Semaphore

if TYPE_CHECKING:
    from types import TracebackType

    from ._barrier import BarrierStatistics
    from ._pool import ConnectionInfo

T = TypeVar("T")


class _ThreadView(NotCopied):
    """The base class of the views, and of what they return: refuses ``async with``."""

    __slots__ = ()

    async def __aenter__(self) -> NoReturn:
        """Raise TypeError: a task awaits the shared object itself."""
        raise TypeError(
            f"{type(self).__name__} is for threads; a task uses 'async with' on the object "
            f"that was given to as_threading()"
        )

    async def __aexit__(self, *exc_info: object) -> None:
        """Do nothing: `__aenter__` always raises."""


class ThreadSemaphore(_ThreadView):
    """A `Semaphore` with the API of `threading.Semaphore`. Created by `as_threading`.

    All methods may be called from any thread. Only `acquire` can block.
    """

    __slots__ = ("__weakref__", "_get_nowait", "_semaphore", "_shared")

    def __init__(self, semaphore: Semaphore) -> None:
        self._semaphore = semaphore
        self._shared = semaphore._for_threads()
        self._get_nowait = self._shared._queue.get_nowait

    def acquire(self, blocking: bool = True, timeout: float | None = None) -> bool:
        """Take a permit, waiting in FIFO order with tasks and threads if none is free.

        The same as `threading.Semaphore.acquire`. An exception from a signal handler (Ctrl-C)
        interrupts the wait, and no permit is taken.

        :param blocking: if False, do not wait
        :param timeout: how many seconds to wait at most; 0 or less: do not wait; None: no limit
        :return: True if a permit was taken, False if there was none in time
        :raises RuntimeError: if it would have to wait, and an event loop is running on this thread:
            a task awaits `Semaphore.acquire`
        :raises ValueError: if `timeout` is given although `blocking` is False, or is NaN
        :raises TypeError: if `blocking` is not a bool, or `timeout` not a number
        """
        if blocking is True and timeout is None and self._get_nowait(False):
            return True
        return run_in_thread(self._shared.acquire(blocking, timeout))

    def release(self, n: int = 1) -> None:
        """Give back `n` permits: the `n` oldest waiters, tasks or threads, get one each.

        The same as `threading.Semaphore.release`. May be called from anywhere: any thread or task,
        a signal handler, a finalizer. Never blocks.

        :param n: how many, 1 or more
        :raises ValueError: if `n` is smaller than 1
        :raises TypeError: if `n` is not an integer
        :raises OverflowError: if `n` is larger than `sys.maxsize`
        """
        self._shared.release(n)

    def __enter__(self) -> bool:
        """Do what ``acquire()`` does."""
        return self.acquire()

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Do what ``release()`` does."""
        self._shared.release()

    def __repr__(self) -> str:
        return _repr(self, self._semaphore, f"value={self._semaphore.value}")


class ThreadBoundedSemaphore(ThreadSemaphore):
    """A `BoundedSemaphore` with the API of `threading.BoundedSemaphore`. Created by `as_threading`.

    `release` raises ValueError, and releases nothing, if fewer than `n` permits are held.
    """

    __slots__ = ("_bound", "_held")

    def __init__(self, semaphore: BoundedSemaphore) -> None:
        super().__init__(semaphore)
        self._bound = semaphore._bound
        self._held = semaphore._held

    def acquire(self, blocking: bool = True, timeout: float | None = None) -> bool:
        """See `ThreadSemaphore.acquire`."""
        if blocking is True and timeout is None and self._get_nowait(False):
            self._held.append(True)
            return True
        return run_in_thread(self._shared.acquire(blocking, timeout))

    def __repr__(self) -> str:
        return _repr(self, self._semaphore, f"value={self._semaphore.value}/{self._bound}")


class ThreadBarrier(_ThreadView):
    """A `Barrier` with the API of `threading.Barrier`. Created by `as_threading`.

    All methods may be called from any thread. Only `wait` can block.
    """

    __slots__ = ("__weakref__", "_barrier", "_shared")

    def __init__(self, barrier: Barrier) -> None:
        self._barrier = barrier
        self._shared = barrier._for_threads()

    def wait(self, timeout: float | None = None) -> int:
        """Wait until all parties, tasks and threads, have arrived.

        The same as `threading.Barrier.wait`, with one difference: an exception from a signal
        handler (Ctrl-C) interrupts the wait and breaks the barrier for all parties. The threads of
        a round wake one another in turn, so a signal handler that interrupts one of them must not
        wait for the others.

        :param timeout: how many seconds to wait for the other parties to arrive; after that, the
            barrier is broken for all. 0 or less: do not wait. None: the timeout of the barrier.
        :return: the index of the party in its round, 0 to parties - 1
        :raises BrokenBarrierError: if the barrier is broken, or is broken or reset while the thread
            waits
        :raises RuntimeError: if it would have to wait, and an event loop is running on this thread:
            a task awaits `Barrier.wait`. Also if this is the last party to arrive and the action is
            async, which only a task can run; then the barrier is broken for all.
        :raises TypeError: if `timeout` is not a number
        :raises ValueError: if `timeout` is NaN
        """
        return run_in_thread(self._shared.wait(timeout))

    def abort(self) -> None:
        """Break the barrier. The same as `threading.Barrier.abort` and `Barrier.abort`.

        May be called from anywhere. Never blocks.
        """
        self._shared.abort()

    def reset(self) -> None:
        """Return the barrier to its initial state. The same as `threading.Barrier.reset`.

        May be called from anywhere. Never blocks.
        """
        self._shared.reset()

    @property
    def name(self) -> str | None:
        """The name of the barrier."""
        return self._shared.name

    @property
    def parties(self) -> int:
        """How many parties have to arrive. The same as `threading.Barrier.parties`."""
        return self._shared.parties

    @property
    def n_waiting(self) -> int:
        """How many parties have arrived in the current round."""
        return self._shared.n_waiting

    @property
    def broken(self) -> bool:
        """Whether the barrier is broken, so that `wait` raises BrokenBarrierError."""
        return self._shared.broken

    def statistics(self) -> BarrierStatistics:
        """Return what `Barrier.statistics` returns."""
        return self._shared.statistics()

    def __repr__(self) -> str:
        state = "broken" if self.broken else f"waiters={self.n_waiting}/{self.parties}"
        return _repr(self, self._barrier, state)


class ThreadConnectionPool(_ThreadView, Generic[T]):
    """A `ConnectionPool` whose connections are borrowed by threads. Created by `as_threading`.

    A task opens and closes the pool. The functions of the pool (`connect`, `reset` and so on) are
    called on the event loop of that task. Threads and tasks wait for connections in one FIFO order.
    All methods may be called from any thread. Only `acquire` and `connection` can block.
    """

    __slots__ = ("__weakref__", "_shared")

    def __init__(self, pool: ConnectionPool[T]) -> None:
        self._shared = pool

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

    def __repr__(self) -> str:
        return f"<as_threading.ConnectionPool at {id(self):#x}: {self._shared!r}>"


class ThreadCheckout(Borrowing[T], _ThreadView):
    """A connection that is borrowed for the length of a ``with`` block.

    Created by `ThreadConnectionPool.connection`.
    """

    __slots__ = ()

    def __enter__(self) -> T:
        """Do what `ThreadConnectionPool.acquire` does.

        :raises RuntimeError: also if a connection was borrowed by this object already
        """
        return run_in_thread(self._borrow(self._pool._take(self._timeout, False)))

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Do what `ThreadConnectionPool.release` does, unless the connection was given back."""
        self._give_back()


def _repr(view: _ThreadView, shared: Semaphore | Barrier, state: str) -> str:
    # The form that CPython's tests of `threading` expect.
    name = type(view).__name__.removeprefix("Thread")
    return f"<as_threading.{name} at {id(view):#x} of {shared!r}: {state}>"


@overload
def as_threading(shared: BoundedSemaphore) -> ThreadBoundedSemaphore: ...
@overload
def as_threading(shared: Semaphore) -> ThreadSemaphore: ...
@overload
def as_threading(shared: Barrier) -> ThreadBarrier: ...
@overload
def as_threading(shared: ConnectionPool[T]) -> ThreadConnectionPool[T]: ...


def as_threading(
    shared: Semaphore | Barrier | ConnectionPool[Any],
) -> ThreadSemaphore | ThreadBarrier | ThreadConnectionPool[Any]:
    """Return a view of `shared` for OS threads, with the API of its namesake in `threading`.

    The view holds no state of its own: threads that use it and tasks that await `shared` wait in
    one FIFO order. Any number of views may be created. May be called from anywhere.

    The view of a pool borrows and gives back connections without ``await``. Only tasks of the event
    loop that opened the pool can resize, drain or close it.

    :param shared: a `Semaphore`, a `BoundedSemaphore`, a `Barrier` or a `ConnectionPool`
    :return: a `ThreadSemaphore`, `ThreadBoundedSemaphore`, `ThreadBarrier` or
        `ThreadConnectionPool`
    :raises TypeError: if `shared` is anything else
    """
    if isinstance(shared, BoundedSemaphore):
        return ThreadBoundedSemaphore(shared)
    if isinstance(shared, Semaphore):
        return ThreadSemaphore(shared)
    if isinstance(shared, Barrier):
        return ThreadBarrier(shared)
    if isinstance(shared, ConnectionPool):
        return ThreadConnectionPool(shared)
    raise TypeError(
        f"as_threading() takes an aiosync Semaphore, BoundedSemaphore, Barrier or ConnectionPool, "
        f"not {type(shared).__name__}"
    )
