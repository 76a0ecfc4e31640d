"""Semaphore and BoundedSemaphore: a `HandoffQueue` of permits.

What must live here: what a permit means to a user (arguments, results, errors, checkpoints). Who
gets one is decided in `_handoff`, how somebody sleeps in `_park`.
"""

from __future__ import annotations

import sys
from collections import deque
from typing import TYPE_CHECKING, Any

from anyio import SemaphoreStatistics, WouldBlock

from ._errors import NotCopied, check_count, normalize_timeout
from ._handoff import HandoffQueue
from ._park import checkpoint, ki_protected, task_waiter, thread_waiter

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine
    from types import TracebackType

    from ._park import Waiter

# All permits are equal. A permit is True, so that taking one is at once the answer of `acquire`.
_PERMIT = True


class Semaphore(NotCopied):
    """A number of permits that tasks and threads share; who finds none waits in line.

    One object serves tasks of any number of asyncio and trio event loops, at the same time. It may
    be created anywhere: at import time, in a thread, before any event loop runs. Waiters are
    served strictly in the order in which they came; a permit that is released while somebody waits
    is handed over at once, and can't be snatched by a newcomer. ``Semaphore()`` is a lock that
    anybody may release.

    The semantics are those of `threading.Semaphore`, with `acquire` to be awaited.

    :param value: how many permits there are to begin with, 0 or more
    :param fast_acquire: if True, `acquire` does not yield to the event loop when it finds a permit
        free. Faster, but a task that only ever finds free permits then never lets others run. The
        same as in `anyio.Semaphore`.
    :raises TypeError: if `value` is no int
    :raises ValueError: if `value` is negative
    :raises OverflowError: if `value` is larger than `sys.maxsize`
    """

    __slots__ = (
        "__weakref__",
        "_detour",
        "_fast_acquire",
        "_items",
        "_line",
        "_new_waiter",
        "_queue",
    )

    def __init__(self, value: int = 1, *, fast_acquire: bool = False) -> None:
        queue: HandoffQueue[bool] = HandoffQueue()
        queue.put_many(_PERMIT, _check_permits("value", value, 0))
        self._share(queue, fast_acquire, task_waiter)

    def _share(
        self, queue: HandoffQueue[bool], fast_acquire: bool, new_waiter: Callable[[], Waiter]
    ) -> None:
        self._queue = queue
        # The queue's own, for the common path: to go through the queue makes it half as long again.
        self._items = queue.items
        self._line = queue.line
        self._fast_acquire = fast_acquire
        # True if `acquire` may not simply take a free permit: while somebody waits, or always if it
        # has to make a checkpoint. One truth test for both.
        self._detour = queue.line if fast_acquire else True
        self._new_waiter = new_waiter

    def _for_threads(self) -> Semaphore:
        """Return a semaphore with the same state whose `acquire` blocks the thread that runs it."""
        twin = object.__new__(Semaphore)
        twin._share(self._queue, True, thread_waiter)
        return twin

    @ki_protected
    async def acquire(self, blocking: bool = True, timeout: float | None = None) -> bool:
        """Take a permit, waiting in line for one if there is none free.

        May be called from any task under asyncio or trio. If it is cancelled, it has not taken a
        permit: one that it had already been handed goes to the next in line. A free permit is taken
        at once, in the order of the calls, and is given back if the checkpoint that follows (see
        `fast_acquire`) is cancelled.

        Arguments and results are those of `threading.Semaphore.acquire`.

        :param blocking: if False, do not wait
        :param timeout: how many seconds to wait at most; 0 or less: do not wait; None: no limit
        :return: True if a permit was taken, False if there was none (in time)
        :raises ValueError: if `blocking` is False and there is a `timeout`, or if that is NaN
        :raises TypeError: if `timeout` is no number
        :raises anyio.NoEventLoopError: if it has to wait, or to make a checkpoint, and is not run
            by asyncio or trio
        """
        # What is awaited here could as well be left to `_acquire_slowly`. But each function on the
        # way to a sleep makes a hand-off take 2 to 4% longer, and a checkpoint too. There are no
        # local variables here, because they would do that to every fast acquire.
        if self._detour or timeout is not None or not blocking:
            if timeout is not None or not blocking:
                return await self._acquire_slowly(blocking, timeout)
            if self._line:
                if self._items or self._queue.reserves:
                    # Free all the same: who is in line has been granted one, and has not run yet.
                    return await self._acquire_slowly(True, None)
                return await self._queue.wait(self._new_waiter(), None, False)
            try:
                self._items.pop()
            except IndexError:
                return await self._acquire_slowly(True, None)
            if not self._fast_acquire:  # or else somebody waited, just a moment ago
                try:
                    await checkpoint()
                except BaseException:
                    self._queue.put(_PERMIT)
                    raise
            return True
        try:
            return self._items.pop()
        except IndexError:
            return await self._acquire_slowly(True, None)

    @ki_protected
    def _acquire_slowly(self, blocking: bool, timeout: float | None) -> Coroutine[Any, Any, bool]:
        """Return what `acquire` has to await, at once."""
        if timeout is not None or not blocking:
            timeout = normalize_timeout(blocking, timeout)
        acquired = self._queue.get_nowait(False)
        if acquired or timeout == 0:
            return self._answer(acquired)
        return self._queue.wait(self._new_waiter(), timeout, False)

    @ki_protected
    async def _answer(self, acquired: bool) -> bool:
        if not self._fast_acquire:
            try:
                await checkpoint()
            except BaseException:
                if acquired:
                    self._queue.put(_PERMIT)
                raise
        return acquired

    @ki_protected
    def acquire_nowait(self) -> None:
        """Take a permit if one is free and nobody is waiting for it.

        May be called from anywhere, including threads, signal handlers and finalizers. The same as
        `anyio.Semaphore.acquire_nowait` and `trio.Semaphore.acquire_nowait`.

        :raises anyio.WouldBlock: if there is none
        """
        if not self._queue.get_nowait(False):
            raise WouldBlock

    @ki_protected
    def release(self, n: int = 1) -> None:
        """Give back `n` permits: the first `n` in line get one each, the rest are free.

        May be called from anywhere: any task, whether it acquired or not, any thread, a signal
        handler, a finalizer. Never blocks. The same as `threading.Semaphore.release`.

        :param n: how many, 1 or more
        :raises ValueError: if `n` is smaller than 1
        :raises TypeError: if `n` is no int
        :raises OverflowError: if `n` is larger than `sys.maxsize`
        """
        if n == 1:
            self._items.append(True)  # a permit; a constant, unlike the name of one
            if self._line:
                self._queue.dispatch()
        else:
            self._queue.put_many(_PERMIT, _check_permits("n", n, 1))

    def __aenter__(self) -> Coroutine[Any, Any, bool]:
        """Do what ``acquire()`` does."""
        return self.acquire()

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
        """Tell whether `acquire` would have to wait. The same as `asyncio.Semaphore.locked`."""
        return bool(self._queue.waiters) or not self._queue.free()

    @property
    def value(self) -> int:
        """How many permits are free. The same as in `anyio.Semaphore` and `trio.Semaphore`."""
        return self._queue.free()

    def statistics(self) -> SemaphoreStatistics:
        """Return how many wait, tasks and threads counted alike. As `anyio.Semaphore.statistics`.

        One that was cancelled counts until its event loop has run it.
        """
        return SemaphoreStatistics(tasks_waiting=len(self._queue.waiters))

    def __repr__(self) -> str:
        return (
            f"<aiosync.{type(self).__name__} value={self.value} waiters={len(self._queue.waiters)} "
            f"at {id(self):#x}>"
        )


class BoundedSemaphore(Semaphore):
    """A `Semaphore` that refuses to be released more often than it was acquired.

    The semantics are those of `threading.BoundedSemaphore`.
    """

    __slots__ = ("_bound", "_held")

    def __init__(self, value: int = 1, *, fast_acquire: bool = False) -> None:
        super().__init__(value, fast_acquire=fast_acquire)
        self._bound = value
        # One entry for each permit that was acquired. To remove one is to claim the right to
        # release: of two threads that release the same permit one finds none.
        self._held: deque[bool] = deque()

    def _for_threads(self) -> BoundedSemaphore:
        twin = object.__new__(BoundedSemaphore)
        twin._share(self._queue, True, thread_waiter)
        twin._held = self._held
        return twin

    @ki_protected
    async def acquire(self, blocking: bool = True, timeout: float | None = None) -> bool:
        """See `Semaphore.acquire`."""
        # The common path stands here again: to await the one of the base class takes half as
        # long again.
        if not self._detour and blocking and timeout is None:
            try:
                permit = self._items.pop()
            except IndexError:
                pass
            else:
                self._held.append(permit)
                return permit
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
    def release(self, n: int = 1) -> None:
        """See `Semaphore.release`; releases all of `n` or nothing.

        :raises ValueError: also if fewer than `n` permits are held. (If several threads release
            too often at the same instant, at least one of them gets this.)
        """
        if n != 1:
            _check_permits("n", n, 1)
            self._claim(n)
            super().release(n)
            return
        try:
            self._held.pop()
        except IndexError:
            raise _released_too_often(1, 0) from None
        self._items.append(_PERMIT)
        if self._line:
            self._queue.dispatch()

    @ki_protected
    def _claim(self, n: int) -> None:
        """Remove `n` entries from `_held`, or none and raise ValueError."""
        held = self._held
        claimed = 0
        # Looked at first, because to claim in vain keeps others from claiming in the meantime.
        if len(held) >= n:
            try:
                while claimed < n:
                    held.pop()
                    claimed += 1
            except IndexError:  # another thread took what we have seen
                held.extend([_PERMIT] * claimed)
        if claimed < n:
            raise _released_too_often(n, len(held))


def _check_permits(name: str, value: int, least: int) -> int:
    if check_count(name, value, least) > sys.maxsize:
        raise OverflowError(f"{name} must be at most sys.maxsize, not {value}")
    return value


def _released_too_often(n: int, held: int) -> ValueError:
    return ValueError(
        f"released too often: {n} given back, {held} held; a release needs a successful acquire"
    )
