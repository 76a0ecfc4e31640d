"""Semaphore and BoundedSemaphore: a `HandoffQueue` of permits.

This module defines what users see: arguments, results, errors and checkpoints. `_handoff` decides
which waiter gets a permit, and `_park` knows how a task or thread sleeps.
"""

from __future__ import annotations

import sys
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

from anyio import WouldBlock

from ._created import created
from ._errors import NeedsAsyncWith, NotCopied, check_count, check_name, normalize_timeout
from ._handoff import HandoffQueue
from ._park import ThreadWaiter, checkpoint, ki_protected, task_waiter, thread_waiter

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType
    from typing import SupportsIndex

    from ._park import Waiter

# All permits are equal. A permit is True, so that `acquire` can return the permit itself.
_PERMIT = True
# Compared by identity, since ``1.0 == 1``.
_ONE = 1


@dataclass(frozen=True, slots=True)
class SemaphoreStatistics:
    """What `Semaphore.statistics` returns: a snapshot."""

    value: int
    """How many permits are free."""
    tasks_waiting: int
    """How many tasks wait for a permit. A cancelled task counts until its event loop has run it."""
    threads_waiting: int
    """How many threads wait for a permit."""

    @property
    def waiting(self) -> int:
        """How many tasks and threads wait for a permit."""
        return self.tasks_waiting + self.threads_waiting


class Semaphore(NeedsAsyncWith, NotCopied):
    """A number of permits shared by tasks and threads, with waiters served in FIFO order.

    One object serves tasks of any number of asyncio and trio event loops at the same time. It may
    be created anywhere: at import time, in a thread, before any event loop runs. A permit that is
    released while callers wait is handed to the oldest waiter at once; a newcomer cannot take it.
    ``Semaphore()`` is a lock that any task or thread may release.

    The semantics are those of `threading.Semaphore`, except that `acquire` is awaited.

    :param value: the initial number of permits, 0 or more
    :param fast_acquire: if True, `acquire` does not yield to the event loop when a permit is free.
        This is faster, but a task that only ever finds free permits never lets other tasks run. The
        same as in `anyio.Semaphore`.
    :param name: appears in the repr and in errors
    :raises TypeError: if `value` is not an integer, or `name` not a str
    :raises ValueError: if `value` is negative
    :raises OverflowError: if `value` is larger than `sys.maxsize`
    """

    __slots__ = (
        "__weakref__",
        "_fast_acquire",
        "_items",
        "_name",
        "_new_waiter",
        "_queue",
        "_record",
        "_slow_path",
        "_waiters",
    )

    def __init__(
        self, value: SupportsIndex = 1, *, fast_acquire: bool = False, name: str | None = None
    ) -> None:
        queue: HandoffQueue[bool] = HandoffQueue()
        queue.put_many(_PERMIT, _check_permits("value", value, 0))
        self._share(queue, fast_acquire, check_name(name), task_waiter)
        created(self)

    def _share(
        self,
        queue: HandoffQueue[bool],
        fast_acquire: bool,
        name: str | None,
        new_waiter: Callable[[], Waiter],
    ) -> None:
        self._queue = queue
        # The queue's own containers: on the hot path, see docs/performance.md.
        self._items = queue.items
        self._waiters = queue.waiters
        self._fast_acquire = fast_acquire
        # Truthy if `acquire` must not just pop a free permit: always if it has to make a
        # checkpoint, otherwise while there are waiters. One test for both: on the hot path, see
        # docs/performance.md.
        self._slow_path = queue.waiters if fast_acquire else True
        self._name = name
        self._new_waiter = new_waiter

    def _for_threads(self) -> Semaphore:
        """Return a semaphore with the same state whose `acquire` blocks the calling thread."""
        twin = object.__new__(Semaphore)
        twin._share(self._queue, True, self._name, thread_waiter)
        return twin

    @ki_protected
    async def acquire(self, blocking: bool = True, timeout: float | None = None) -> bool:
        """Take a permit, waiting in FIFO order if none is free.

        May be called by any task under asyncio or trio. If it is cancelled, no permit was taken: a
        permit that it had already been handed goes to the next waiter. A free permit is taken at
        once, and is put back if the checkpoint that follows (see `fast_acquire`) is cancelled.

        Arguments and results are those of `threading.Semaphore.acquire`.

        :param blocking: if False, do not wait
        :param timeout: how many seconds to wait at most; 0 or less: do not wait; None: no limit
        :return: True if a permit was taken, False if there was none in time
        :raises ValueError: if `timeout` is given although `blocking` is False, or is NaN
        :raises TypeError: if `blocking` is not a bool (0 and 1 pass), or `timeout` not a number
        :raises anyio.NoEventLoopError: if it has to wait, or to make a checkpoint, and is not run
            by asyncio or trio
        """
        if blocking is not True or timeout is not None:
            return await self._acquire_slowly(blocking, timeout)
        # Inlined: `HandoffQueue.get_nowait`, `_checkpoint` and `HandoffQueue.wait`. On the hot
        # path, see docs/performance.md.
        if not self._slow_path:
            try:
                return self._items.pop()
            except IndexError:
                if self._queue.bulk:
                    return await self._acquire_slowly(True, None)
        elif not self._waiters:
            try:
                self._items.pop()
            except IndexError:
                if self._queue.bulk:
                    return await self._acquire_slowly(True, None)
            else:
                if not self._fast_acquire:  # otherwise the last waiter has just left
                    try:
                        await checkpoint()
                    except BaseException:
                        self._queue.put(_PERMIT)
                        raise
                return True
        waiter = self._new_waiter()
        try:
            self._waiters[waiter] = None
            if self._items or self._queue.bulk:
                self._queue.dispatch()
                if waiter.done():  # a permit came just now, so awaiting the waiter does not yield
                    await checkpoint()
            return await waiter or self._queue.leave(waiter) is True
        except BaseException:
            if self._queue.leave(waiter):
                self._queue.put(_PERMIT)
            raise

    @ki_protected
    async def _acquire_slowly(self, blocking: bool, timeout: float | None) -> bool:
        timeout = normalize_timeout(blocking, timeout)
        acquired = self._queue.get_nowait(False)
        if not acquired and timeout != 0:
            return await self._queue.wait(self._new_waiter(), timeout, False)
        if not self._fast_acquire:
            await self._checkpoint(acquired)
        return acquired

    @ki_protected
    async def _checkpoint(self, acquired: bool) -> None:
        """Make a checkpoint. If that is cancelled, put back the permit that was acquired."""
        try:
            await checkpoint()
        except BaseException:
            if acquired:
                self._queue.put(_PERMIT)
            raise

    @ki_protected
    def acquire_nowait(self) -> None:
        """Take a permit if one is free and no caller is waiting for it.

        May be called from anywhere, including threads, signal handlers and finalizers. The same as
        `anyio.Semaphore.acquire_nowait` and `trio.Semaphore.acquire_nowait`.

        :raises anyio.WouldBlock: if no permit is free
        """
        if not self._queue.get_nowait(False):
            raise WouldBlock

    @ki_protected
    def release(self, n: SupportsIndex = 1) -> None:
        """Give back `n` permits: the `n` oldest waiters get one each, the rest are free.

        May be called from anywhere: any task, whether it acquired or not, any thread, a signal
        handler, a finalizer. Never blocks. The same as `threading.Semaphore.release`.

        :param n: how many, 1 or more
        :raises ValueError: if `n` is smaller than 1
        :raises TypeError: if `n` is not an integer
        :raises OverflowError: if `n` is larger than `sys.maxsize`
        """
        if n is _ONE:
            # Inlined: `HandoffQueue.put`. On the hot path, see docs/performance.md.
            self._items.append(True)
            if self._waiters:
                self._queue.give(None)
        else:
            self._queue.put_many(_PERMIT, _check_permits("n", n, 1))

    @ki_protected
    async def __aenter__(self) -> bool:
        """Do what ``acquire()`` does."""
        return await self.acquire()

    @ki_protected
    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Do what ``release()`` does; there is nothing to wait for."""
        self.release()

    def locked(self) -> bool:
        """Return whether `acquire` would have to wait. The same as `asyncio.Semaphore.locked`."""
        return bool(self._waiters) or not self._queue.free()

    @property
    def value(self) -> int:
        """How many permits are free. The same as in `anyio.Semaphore` and `trio.Semaphore`."""
        return self._queue.free()

    @property
    def name(self) -> str | None:
        """The name of the semaphore, or None."""
        return self._name

    def statistics(self) -> SemaphoreStatistics:
        """Return how many permits are free, and how many tasks and threads wait.

        May be called from anywhere. Compare `anyio.Semaphore.statistics`.
        """
        waiters = self._queue.waiting()
        threads = sum(isinstance(waiter, ThreadWaiter) for waiter in waiters)
        return SemaphoreStatistics(self.value, len(waiters) - threads, threads)

    def __repr__(self) -> str:
        name = "" if self._name is None else f" {self._name!r}"
        return (
            f"<aiosync.{type(self).__name__}{name} value={self.value} "
            f"waiters={len(self._waiters)} at {id(self):#x}>"
        )


class BoundedSemaphore(Semaphore):
    """A `Semaphore` that refuses to be released more often than it was acquired.

    The semantics are those of `threading.BoundedSemaphore`.
    """

    __slots__ = ("_bound", "_held")

    def __init__(
        self, value: SupportsIndex = 1, *, fast_acquire: bool = False, name: str | None = None
    ) -> None:
        super().__init__(value, fast_acquire=fast_acquire, name=name)
        self._bound = self.value
        # One entry for each permit that is held. Removing one is the claim to release: if two
        # threads release the same permit, one of them finds no entry.
        self._held: deque[bool] = deque()

    def _for_threads(self) -> BoundedSemaphore:
        twin = object.__new__(BoundedSemaphore)
        twin._share(self._queue, True, self._name, thread_waiter)
        twin._bound = self._bound
        twin._held = self._held
        return twin

    @ki_protected
    async def acquire(self, blocking: bool = True, timeout: float | None = None) -> bool:
        """See `Semaphore.acquire`."""
        if self._fast_acquire and blocking is True and timeout is None:
            acquired = self._queue.get_nowait(False) or await super().acquire()
        else:
            acquired = await super().acquire(blocking, timeout)
        if acquired:
            self._held.append(_PERMIT)
        return acquired

    @ki_protected
    def acquire_nowait(self) -> None:
        """See `Semaphore.acquire_nowait`."""
        super().acquire_nowait()
        self._held.append(_PERMIT)

    @ki_protected
    def release(self, n: SupportsIndex = 1) -> None:
        """Give back `n` permits, or none if fewer are held. See `Semaphore.release`.

        :raises ValueError: also if fewer than `n` permits are held. If several threads release too
            often at the same instant, at least one of them gets the error.
        """
        if n is not _ONE:
            self._claim(_check_permits("n", n, 1))
            super().release(n)
            return
        try:
            self._held.pop()
        except IndexError:
            raise self._released_too_often(1, 0) from None
        self._queue.put(_PERMIT)

    @ki_protected
    def _claim(self, n: int) -> None:
        """Remove `n` entries from `_held`, or remove none and raise ValueError."""
        held = self._held
        claimed = 0
        # Check first: a failed claim briefly hides entries from other threads.
        if len(held) >= n:
            try:
                while claimed < n:
                    held.pop()
                    claimed += 1
            except IndexError:  # another thread took them
                held.extend([_PERMIT] * claimed)
        if claimed < n:
            raise self._released_too_often(n, len(held))

    def _released_too_often(self, n: int, held: int) -> ValueError:
        name = "semaphore" if self._name is None else f"semaphore {self._name!r}"
        return ValueError(f"{name} released too often (n={n}, held={held}, bound={self._bound})")


def _check_permits(name: str, value: SupportsIndex, least: int) -> int:
    number = check_count(name, value, least)
    if number > sys.maxsize:
        raise OverflowError(f"{name} must be at most sys.maxsize, not {number}")
    return number
