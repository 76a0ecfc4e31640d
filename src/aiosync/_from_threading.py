"""`from_threading`: objects of `threading`, awaited by tasks.

The views hold no state of the object: they check arguments, make checkpoints, and call the object
where that cannot block. Where it can block, a thread of `_helper_threads` calls it.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any, overload

from ._created import created
from ._errors import NeedsAsyncWith, NotCopied, check_count, check_timeout, normalize_timeout
from ._helper_threads import BarrierParty, EventPoller, Poller

if TYPE_CHECKING:
    from types import TracebackType

_LOCK = type(threading.Lock())  # before Python 3.13, threading.Lock is a function


class _TaskView(NotCopied):
    """The base class of the views."""

    __slots__ = ("__weakref__", "_owned", "_record")

    def __init__(self, owned: Any) -> None:
        self._owned = owned
        created(self)

    def __repr__(self) -> str:
        return f"<from_threading {self._owned!r}>"


class _AcquirableView(NeedsAsyncWith, _TaskView):
    """The base class of the views of semaphores and locks."""

    __slots__ = ("_poller",)

    _for_threads_use = "the threading object itself"

    def __init__(self, owned: Any) -> None:
        super().__init__(owned)
        self._poller = Poller(owned)

    async def acquire(self, blocking: bool = True, timeout: float | None = None) -> bool:
        """Acquire the `threading` object, waiting if it is not free.

        May be called by any task under asyncio or trio. Tasks that use the same view wait in FIFO
        order. If this is cancelled or returns False, nothing was acquired, and no thread is left
        that would acquire anything later. Stopping that thread delays the return, by some
        hundredths of a second, or by up to half a second after a long wait.

        Arguments and results are those of `threading.Semaphore.acquire`.

        :param blocking: if False, do not wait
        :param timeout: how many seconds to wait at most; 0 or less: do not wait; None: no limit
        :return: True if the object was acquired, False if not (in time)
        :raises ValueError: if `timeout` is given although `blocking` is False, or is NaN
        :raises TypeError: if `blocking` is not a bool, or `timeout` not a number
        :raises RuntimeError: if it has to wait, and no more threads can be started
        :raises anyio.NoEventLoopError: if it is not run by asyncio or trio
        """
        return await self._poller.acquire(normalize_timeout(blocking, timeout))

    async def __aenter__(self) -> bool:
        """Do what ``acquire()`` does."""
        return await self.acquire()

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Do what ``release()`` does; there is nothing to wait for."""
        self._owned.release()


class TaskSemaphore(_AcquirableView):
    """A `threading.Semaphore` or `threading.BoundedSemaphore`, awaited by tasks.

    Created by `from_threading`, which describes the views.
    """

    __slots__ = ()

    def release(self, n: int = 1) -> None:
        """Release the semaphore `n` times, for threads and tasks alike.

        May be called from anywhere. Blocks no longer than `release` of the semaphore itself.

        :param n: how many times, 1 or more
        :raises ValueError: if `n` is smaller than 1, or if a BoundedSemaphore is released more
            often than it was acquired
        :raises TypeError: if `n` is not an integer
        """
        self._owned.release(check_count("n", n, 1))


class TaskLock(_AcquirableView):
    """A `threading.Lock`, awaited by tasks.

    Created by `from_threading`, which describes the views.
    """

    __slots__ = ()

    def release(self) -> None:
        """Release the lock, whichever task or thread acquired it. May be called from anywhere.

        :raises RuntimeError: if it is not locked
        """
        self._owned.release()

    def locked(self) -> bool:
        """Return whether the lock is locked. May be called from anywhere."""
        return bool(self._owned.locked())


class TaskEvent(_TaskView):
    """A `threading.Event`, awaited by tasks.

    Created by `from_threading`, which describes the views.
    """

    __slots__ = ("_poller",)

    def __init__(self, owned: threading.Event) -> None:
        super().__init__(owned)
        self._poller = EventPoller(owned)

    async def wait(self, timeout: float | None = None) -> bool:
        """Wait until the event is set.

        May be called by any task under asyncio or trio, and may be cancelled. If the event is set
        and cleared at once, a call that comes just afterwards may still return True.

        Arguments and results are those of `threading.Event.wait`.

        :param timeout: how many seconds to wait at most; 0 or less: do not wait; None: no limit
        :return: True if the event is or was set, False if it was not set in time
        :raises TypeError: if `timeout` is not a number
        :raises ValueError: if `timeout` is NaN
        :raises RuntimeError: if it has to wait, and no more threads can be started
        :raises anyio.NoEventLoopError: if it is not run by asyncio or trio
        """
        return await self._poller.acquire(normalize_timeout(True, timeout))

    def is_set(self) -> bool:
        """Return whether the event is set. May be called from anywhere."""
        return bool(self._owned.is_set())

    def set(self) -> None:
        """Set the event, which wakes all tasks and threads that wait for it.

        May be called from anywhere.
        """
        self._owned.set()

    def clear(self) -> None:
        """Reset the event: from now on, `wait` waits for the next `set`.

        May be called from anywhere.
        """
        self._owned.clear()


class TaskBarrier(_TaskView):
    """A `threading.Barrier`, awaited by tasks.

    Created by `from_threading`, which describes the views.
    """

    __slots__ = ()

    async def wait(self, timeout: float | None = None) -> int:
        """Arrive at the barrier of the threads, and wait until all parties have arrived.

        May be called by any task under asyncio or trio. Each call occupies a thread of its own
        while it waits, and an action runs in the thread that arrives last. If the task is cancelled
        before that thread has passed the barrier, the barrier is aborted, and the other parties get
        BrokenBarrierError.

        Arguments and results are those of `threading.Barrier.wait`.

        :param timeout: how many seconds to wait for the other parties to arrive; after that, the
            barrier is broken for all. None: the timeout of the barrier itself.
        :return: the index of the party in its round, 0 to parties - 1
        :raises threading.BrokenBarrierError: if the barrier is broken, or is broken or reset while
            the task waits
        :raises TypeError: if `timeout` is not a number
        :raises ValueError: if `timeout` is NaN
        :raises RuntimeError: if no more threads can be started
        :raises anyio.NoEventLoopError: if it is not run by asyncio or trio
        """
        if timeout is not None:
            timeout = check_timeout(timeout)
            if timeout is None:
                timeout = threading.TIMEOUT_MAX  # None would mean that of the barrier
        return await BarrierParty(self._owned, timeout).wait()

    def abort(self) -> None:
        """Break the barrier. The same as `threading.Barrier.abort`.

        May be called from anywhere. Blocks while an action runs.
        """
        self._owned.abort()

    def reset(self) -> None:
        """Return the barrier to its initial state. The same as `threading.Barrier.reset`.

        May be called from anywhere. Blocks while an action runs.
        """
        self._owned.reset()

    @property
    def parties(self) -> int:
        """How many parties have to arrive."""
        return int(self._owned.parties)

    @property
    def n_waiting(self) -> int:
        """How many parties have arrived in the current round."""
        return int(self._owned.n_waiting)

    @property
    def broken(self) -> bool:
        """Whether the barrier is broken, so that `wait` raises BrokenBarrierError."""
        return bool(self._owned.broken)


@overload
def from_threading(owned: threading.Semaphore) -> TaskSemaphore: ...
@overload
def from_threading(owned: threading.Barrier) -> TaskBarrier: ...
@overload
def from_threading(owned: threading.Event) -> TaskEvent: ...
@overload
def from_threading(owned: threading.Lock) -> TaskLock: ...


def from_threading(owned: Any) -> TaskSemaphore | TaskBarrier | TaskEvent | TaskLock:
    """Return a view of `owned`, an object of `threading`, that tasks can await.

    Use it for code that cannot be changed. If the code can be changed, create an object of aiosync
    and give the threads its `as_threading` view, which is much faster.

    Create one view and share it: tasks that use the same view wait in FIFO order, and share one
    thread that waits for the semaphore, lock or event. `threading` promises no order, so a task has
    no fixed place among the threads that wait. At a barrier each task occupies a thread of its own.

    May be called from anywhere.

    :param owned: a `threading.Semaphore`, `BoundedSemaphore`, `Barrier`, `Lock` or `Event`
    :return: a `TaskSemaphore`, `TaskBarrier`, `TaskLock` or `TaskEvent`
    :raises TypeError: if `owned` is anything else
    """
    if isinstance(owned, threading.Semaphore):
        return TaskSemaphore(owned)
    if isinstance(owned, threading.Barrier):
        return TaskBarrier(owned)
    if isinstance(owned, threading.Event):
        return TaskEvent(owned)
    if isinstance(owned, _LOCK):
        return TaskLock(owned)
    raise TypeError(
        f"from_threading() takes a Semaphore, BoundedSemaphore, Barrier, Lock or Event of "
        f"threading, not {type(owned).__name__}"
    )
