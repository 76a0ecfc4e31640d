"""`as_threading`: the API of `threading` for objects that tasks share.

A view holds no state of its own. It runs the same code as a task, on the calling thread, with
another kind of waiter; see `_park.run_in_thread`. For the opposite direction, objects that
threads own, see `_from_threading`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol, TypeVar, overload

from ._barrier import Barrier
from ._errors import NeedsPlainWith, normalize_timeout
from ._park import run_in_thread
from ._semaphore import BoundedSemaphore, Semaphore

if TYPE_CHECKING:
    from types import TracebackType

    from ._as_threading_pool import ThreadConnectionPool
    from ._barrier import BarrierStatistics
    from ._pool import ConnectionPool

T = TypeVar("T")
V_co = TypeVar("V_co", covariant=True)


class SupportsThreads(Protocol[V_co]):
    """An object that has a view for threads, such as a semaphore of `aiosync.redis`."""

    def _threading_view(self) -> V_co: ...


class ThreadSemaphore(NeedsPlainWith):
    """A `Semaphore` with the API of `threading.Semaphore`. Created by `as_threading`.

    All methods may be called from any thread. Only `acquire` can block.
    """

    __slots__ = ("__weakref__", "_items", "_semaphore", "_shared", "_slow_path")

    def __init__(self, semaphore: Semaphore) -> None:
        self._semaphore = semaphore
        self._shared = semaphore._for_threads()
        self._items = self._shared._items
        self._slow_path = self._shared._slow_path

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
        if blocking is not True or timeout is not None:
            normalize_timeout(blocking, timeout)  # refuses what is wrong
        if not self._slow_path:  # inlined: the same in `Semaphore.acquire`
            try:
                return self._items.pop()
            except IndexError:
                pass
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
        # A block of an observed semaphore is told from a call; its path is always the slow one.
        return run_in_thread(self._shared.__aenter__()) if self._slow_path else self.acquire()

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
        if blocking is not True or timeout is not None:
            normalize_timeout(blocking, timeout)
        if not self._slow_path:
            try:
                self._held.append(self._items.pop())
                return True
            except IndexError:
                pass
        return run_in_thread(self._shared.acquire(blocking, timeout))

    def __repr__(self) -> str:
        return _repr(self, self._semaphore, f"value={self._semaphore.value}/{self._bound}")


class ThreadBarrier(NeedsPlainWith):
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


def _repr(view: NeedsPlainWith, shared: Semaphore | Barrier, state: str) -> str:
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
@overload
def as_threading(shared: SupportsThreads[V_co]) -> V_co: ...


def as_threading(shared: Any) -> Any:
    """Return a view of `shared` for OS threads, with the API of its namesake in `threading`.

    The view holds no state of its own: threads that use it and tasks that await `shared` wait in
    one FIFO order. Any number of views may be created. May be called from anywhere.

    The view of a pool borrows and gives back connections without ``await``, and opens and closes
    the pool by ``with``. Only tasks of the event loop of the pool can resize or drain it.

    :param shared: a `Semaphore`, a `BoundedSemaphore`, a `Barrier` or a `ConnectionPool`; also a
        semaphore or barrier of `aiosync.redis`
    :return: a `ThreadSemaphore`, `ThreadBoundedSemaphore`, `ThreadBarrier` or
        `ThreadConnectionPool`; for those of `aiosync.redis`, a `ThreadDistributedSemaphore` or
        `ThreadDistributedBarrier` of that package
    :raises TypeError: if `shared` is anything else
    """
    if isinstance(shared, BoundedSemaphore):
        return ThreadBoundedSemaphore(shared)
    if isinstance(shared, Semaphore):
        return ThreadSemaphore(shared)
    if isinstance(shared, Barrier):
        return ThreadBarrier(shared)
    if hasattr(type(shared), "_threading_view"):
        return shared._threading_view()
    # Late, as in `aiosync`.
    from ._as_threading_pool import ThreadConnectionPool
    from ._pool import ConnectionPool

    if isinstance(shared, ConnectionPool):
        return ThreadConnectionPool(shared)
    raise TypeError(
        f"as_threading() takes an aiosync Semaphore, BoundedSemaphore, Barrier or ConnectionPool, "
        f"not {type(shared).__name__}"
    )
