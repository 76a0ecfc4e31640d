"""as_threading: the API of `threading` over the objects that tasks share.

What must live here: views, which hold no state of their own. A view runs the very code that tasks
run, on the thread that calls, with another kind of waiter; see `_park.run_in_thread`. The way
back, for objects that threads own, is in `_from_threading`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Generic, TypeVar, overload

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


class ThreadSemaphore(NotCopied):
    """What `as_threading` makes of a `Semaphore`: the API of `threading.Semaphore`.

    All methods may be called from any thread. Only `acquire` can block.
    """

    __slots__ = ("__weakref__", "_items", "_line", "_shared")

    def __init__(self, semaphore: Semaphore) -> None:
        self._shared = semaphore._for_threads()
        # For the common path.
        self._items = self._shared._items
        self._line = self._shared._line

    def acquire(self, blocking: bool = True, timeout: float | None = None) -> bool:
        """Take a permit, waiting in line with tasks and threads for one if there is none free.

        The same as `threading.Semaphore.acquire`. An exception from a signal handler (Ctrl-C)
        interrupts the wait, and leaves it with no permit.

        :param blocking: if False, do not wait
        :param timeout: how many seconds to wait at most; 0 or less: do not wait; None: no limit
        :return: True if a permit was taken, False if there was none (in time)
        :raises RuntimeError: if it would have to wait, and an event loop is running on this thread:
            await `Semaphore.acquire` there
        :raises ValueError: if `blocking` is False and there is a `timeout`, or if that is NaN
        :raises TypeError: if `timeout` is no number
        """
        if not self._line and timeout is None and blocking:
            try:
                return self._items.pop()
            except IndexError:
                pass
        return run_in_thread(self._shared.acquire(blocking, timeout))

    def release(self, n: int = 1) -> None:
        """Do what `Semaphore.release` does: wake the first `n` in line, tasks or threads.

        The same as `threading.Semaphore.release`.

        :param n: how many permits to give back, 1 or more
        :raises ValueError: if `n` is smaller than 1
        :raises TypeError: if `n` is no int
        """
        self._shared.release(n)

    def __enter__(self) -> bool:
        return self.acquire()

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._shared.release()

    def __repr__(self) -> str:
        return f"<as_threading.Semaphore at {id(self):#x}: value={self._shared.value}>"


class ThreadBoundedSemaphore(ThreadSemaphore):
    """What `as_threading` makes of a `BoundedSemaphore`: that of `threading`.

    `release` raises ValueError, and releases nothing, if fewer than `n` permits are held.
    """

    __slots__ = ("_bound", "_held")

    def __init__(self, semaphore: BoundedSemaphore) -> None:
        super().__init__(semaphore)
        self._bound = semaphore._bound
        self._held = semaphore._held

    def acquire(self, blocking: bool = True, timeout: float | None = None) -> bool:
        """See `ThreadSemaphore.acquire`."""
        if not self._line and timeout is None and blocking:
            try:
                permit = self._items.pop()
            except IndexError:
                pass
            else:
                self._held.append(permit)
                return permit
        return run_in_thread(self._shared.acquire(blocking, timeout))

    def __repr__(self) -> str:
        value = f"{self._shared.value}/{self._bound}"
        return f"<as_threading.BoundedSemaphore at {id(self):#x}: value={value}>"


class ThreadBarrier(NotCopied):
    """What `as_threading` makes of a `Barrier`: the API of `threading.Barrier`.

    All methods may be called from any thread. Only `wait` can block.
    """

    __slots__ = ("__weakref__", "_shared")

    def __init__(self, barrier: Barrier) -> None:
        self._shared = barrier._for_threads()

    def wait(self, timeout: float | None = None) -> int:
        """Wait until all parties, tasks and threads, have arrived.

        The same as `threading.Barrier.wait`. An exception from a signal handler (Ctrl-C) interrupts
        it, and breaks the barrier for all, which that of `threading` does not. The threads of a
        round are woken one by one, each by the one before; so a signal handler that interrupts one
        of them must not wait for the others.

        :param timeout: how many seconds to wait for the others to arrive, at most; then the barrier
            is broken for all. 0 or less: do not wait. None: the barrier's own timeout.
        :return: the index of the party in its round, 0 to parties - 1
        :raises BrokenBarrierError: if the barrier is broken, or is broken or reset while waiting
        :raises RuntimeError: if it would have to wait, and an event loop is running on this thread:
            await `Barrier.wait` there. Also if it is the last to arrive, and the action is async:
            that takes a task to run it. The barrier is broken for all then.
        :raises TypeError: if `timeout` is no number
        :raises ValueError: if `timeout` is NaN
        """
        return run_in_thread(self._shared.wait(timeout))

    def abort(self) -> None:
        """Do what `Barrier.abort` does. The same as `threading.Barrier.abort`."""
        self._shared.abort()

    def reset(self) -> None:
        """Do what `Barrier.reset` does. The same as `threading.Barrier.reset`."""
        self._shared.reset()

    @property
    def name(self) -> str | None:
        """The name of the barrier."""
        return self._shared.name

    @property
    def parties(self) -> int:
        """How many have to arrive. The same as `threading.Barrier.parties`."""
        return self._shared.parties

    @property
    def n_waiting(self) -> int:
        """How many have arrived in the current round. The same as `threading.Barrier.n_waiting`."""
        return self._shared.n_waiting

    @property
    def broken(self) -> bool:
        """Whether `wait` raises BrokenBarrierError. The same as `threading.Barrier.broken`."""
        return self._shared.broken

    def statistics(self) -> BarrierStatistics:
        """Return what `Barrier.statistics` returns."""
        return self._shared.statistics()

    def __repr__(self) -> str:
        name = "" if self.name is None else f" {self.name!r}"
        state = "broken" if self.broken else f"waiters={self.n_waiting}/{self.parties}"
        return f"<as_threading.Barrier{name} at {id(self):#x}: {state}>"


class ThreadConnectionPool(NotCopied, Generic[T]):
    """What `as_threading` makes of a `ConnectionPool`: the same pool, for threads.

    The pool is opened and closed by a task; its functions (`connect`, `reset` and so on) are called
    on the event loop of that. Threads and tasks stand in one line. All methods may be called from
    any thread. Only `acquire` can block, and so `connection`.
    """

    __slots__ = ("__weakref__", "_shared")

    def __init__(self, pool: ConnectionPool[T]) -> None:
        self._shared = pool

    def acquire(self, timeout: float | None = None) -> T:
        """Borrow a connection, waiting in line for one if need be. It has to be given to `release`.

        An exception from a signal handler (Ctrl-C) interrupts it, and leaves it with nothing.

        :param timeout: as that of `ConnectionPool.acquire`; so are the exceptions
        :raises PoolClosed: also if no connection is idle, and the event loop of the pool has ended
        :raises RuntimeError: if it would have to wait, and an event loop is running on this thread
        """
        return run_in_thread(self._shared._take(timeout, False))

    def acquire_nowait(self) -> T:
        """Do what `ConnectionPool.acquire_nowait` does.

        :raises anyio.WouldBlock: if no connection is idle
        :raises PoolClosed: if the pool is not open
        """
        return self._shared._grab()

    def release(self, connection: T) -> None:
        """Do what `ConnectionPool.release` does.

        :raises ValueError: if it is not borrowed
        """
        self._shared.release(connection)

    def discard(self, connection: T) -> None:
        """Do what `ConnectionPool.discard` does.

        :raises ValueError: if it is not borrowed
        """
        self._shared.discard(connection)

    def connection(self, timeout: float | None = None) -> ThreadCheckout[T]:
        """Return what borrows a connection with ``with``, and gives it back at the end.

        :param timeout: as that of `acquire`; so are the exceptions
        """
        return ThreadCheckout(self._shared, timeout)

    def info(self, connection: T) -> ConnectionInfo:
        """Do what `ConnectionPool.info` does.

        :raises ValueError: if it is not one of this pool
        """
        return self._shared.info(connection)

    def get_stats(self) -> dict[str, int]:
        """Do what `ConnectionPool.get_stats` does."""
        return self._shared.get_stats()

    def __repr__(self) -> str:
        return f"<as_threading.ConnectionPool at {id(self):#x}: {self._shared!r}>"


class ThreadCheckout(Borrowing[T]):
    """What `ThreadConnectionPool.connection` returns: ``with`` it borrows a connection."""

    __slots__ = ()

    def __enter__(self) -> T:
        """Do what `ThreadConnectionPool.acquire` does.

        :raises RuntimeError: also if it has borrowed a connection already
        """
        return run_in_thread(self._borrow(self._pool._take(self._timeout, False)))

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Do what `ThreadConnectionPool.release` does."""
        self._give_back()


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
    """Return a view of `shared` for OS threads, with the API that its namesake in `threading` has.

    The view of a pool borrows and gives back as the pool does, without ``await``; only the tasks of
    the event loop that opened a pool resize, drain or close it.

    The view holds no state of its own: threads that use it and tasks that await `shared` stand in
    one line, and any number of views may be made. May be called from anywhere.

    :param shared: a `Semaphore`, a `BoundedSemaphore`, a `Barrier` or a `ConnectionPool`
    :raises TypeError: if it is anything else
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
