"""Threads that block in objects of `threading` on behalf of tasks.

A task can only wait for an object of `threading` through a thread that blocks in it, and a thread
that blocks in it cannot be interrupted. So no thread blocks for long where it could acquire
something after its task has stopped waiting:

`Poller` serves semaphores and locks: one thread for each object, which acquires with a short
timeout, again and again, for as long as tasks wait.
`EventPoller` does the same for events, of which nothing can be taken from others.
`BarrierParty` serves barriers: one thread for each task, since each has to arrive. `abort` ends its
wait.

The threads belong to this package, so they do not occupy worker threads of anyio.
"""

from __future__ import annotations

import threading
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Union

from ._handoff import HandoffQueue
from ._park import checkpoint, is_abandoned, task_waiter, wait_shielded, wake_all

if TYPE_CHECKING:
    from collections.abc import Callable

    from ._park import Waiter

# How many seconds a poll blocks in the object, at first and at most. The time doubles with each
# poll that fails, since a thread that returns loses its place among the threads that wait. It is
# limited because a task that is cancelled waits until the poll has ended.
_FIRST_POLL, _MAX_POLL = 0.02, 0.5
# How many seconds a poller sleeps while all of its tasks are about to wait, or about to return.
_IDLE_PAUSE = 0.001


def start_thread(run: Callable[[], object]) -> None:
    """Run `run` in a new thread.

    :raises RuntimeError: if no more threads can be started
    """
    # A daemon, since an event loop may be closed while its tasks wait.
    threading.Thread(target=run, name="aiosync.from_threading", daemon=True).start()


class Poller:
    """Acquires a semaphore or lock of `threading` for tasks, in FIFO order.

    *No task waits without a thread.* A task is in `_clients` from before it joins the queue until
    it has left it. The thread ends only if there are no clients. It decides this while it holds the
    lock that is held to add clients.

    *Nothing acquired stays in the queue.* Only the thread and clients add to the queue or remove
    waiters from it, and each of them calls `_release_unclaimed` afterwards.

    Clients are removed without the lock, because a finalizer may do so while the same thread
    holds the lock.
    """

    __slots__ = ("_clients", "_lock", "_owned", "_queue", "_running", "_stop_waiters")

    def __init__(self, owned: Any) -> None:
        self._owned = owned
        # What was acquired, or the exception that was raised instead.
        self._queue: HandoffQueue[Union[bool, BaseException]] = HandoffQueue()
        self._lock = threading.Lock()
        self._clients: dict[Waiter, None] = {}
        # Whether there is a thread that may block in the object. Set under the lock.
        self._running = False
        # Tasks that wait until the thread no longer blocks in the object.
        self._stop_waiters: list[Waiter] = []

    async def acquire(self, timeout: float | None) -> bool:
        """Acquire the object for this task, waiting in FIFO order if it is not free.

        If this returns False or raises, no thread blocks in the object unless other tasks wait. The
        only exception is a coroutine that is closed, since it cannot wait.

        :param timeout: how many seconds to wait at most; 0: do not wait; None: no limit
        :return: False if the object was not acquired in time
        """
        acquired = self._try()
        if not acquired and timeout != 0:
            return await self._acquire_by_thread(timeout)
        try:
            await checkpoint()
        except BaseException:
            if acquired:
                self._release()
            raise
        return acquired

    async def _acquire_by_thread(self, timeout: float | None) -> bool:
        waiter = self._add_client()
        try:
            outcome = await self._wait(waiter, timeout)
        except GeneratorExit:
            raise
        except BaseException:
            await self._wait_stopped()
            raise
        if isinstance(outcome, BaseException):
            try:
                raise outcome
            finally:
                del outcome  # break the reference cycle through the traceback
        if not outcome:
            await self._wait_stopped()
        return outcome

    def _add_client(self) -> Waiter:
        waiter = task_waiter()
        with self._lock:
            if not self._running:
                start_thread(self._run)
                self._running = True
            self._clients[waiter] = None
        return waiter

    async def _wait(self, waiter: Waiter, timeout: float | None) -> bool | BaseException:
        try:
            return await self._queue.wait(waiter, timeout, False)
        finally:
            self._clients.pop(waiter, None)
            self._release_unclaimed()

    def _run(self) -> None:
        poll_time = _FIRST_POLL
        while True:
            self._drop_abandoned()
            self._release_unclaimed()
            with self._lock:
                goes_on = self._running = bool(self._clients)
            wake_all(self._stop_waiters.copy())
            if not goes_on:
                return
            if not self._queue.waiters:
                time.sleep(_IDLE_PAUSE)
            elif self._poll(poll_time):
                poll_time = _FIRST_POLL
            else:
                poll_time = min(2 * poll_time, _MAX_POLL)

    def _poll(self, seconds: float) -> bool:
        """Try to acquire the object for the oldest waiters; return False on timeout."""
        try:
            served = self._block(seconds)
        except BaseException as error:
            self._queue.put(error)
            return True
        self._queue.put_many(True, served)
        return served > 0

    def _drop_abandoned(self) -> None:
        """Remove tasks whose event loop was closed before they finished."""
        for waiter in list(self._clients):
            if is_abandoned(waiter):
                self._queue.waiters.pop(waiter, None)
                self._clients.pop(waiter, None)

    def _release_unclaimed(self) -> None:
        """Release what was acquired for tasks that no longer wait."""
        while outcome := self._queue.get_nowait(False):
            if outcome is True:
                self._release()

    # What follows is different for events.

    def _try(self) -> bool:
        """Acquire the object if it is free and no task waits for it; never block."""
        return not self._queue.waiters and bool(self._owned.acquire(False))

    def _block(self, seconds: float) -> int:
        """Block in the object; return for how many waiters it was acquired."""
        return int(self._owned.acquire(True, seconds))

    def _release(self) -> None:
        """Release what no task has taken."""
        with suppress(ValueError, RuntimeError):  # another thread has already released it
            self._owned.release()

    async def _wait_stopped(self) -> None:
        """Wait until no thread blocks in the object, unless it does so for other tasks."""
        await wait_shielded(lambda: not self._running or bool(self._clients), self._stop_waiters)


class EventPoller(Poller):
    """Waits for a `threading.Event` for tasks. If it is set, all that wait are served."""

    __slots__ = ()

    def _try(self) -> bool:
        return bool(self._owned.is_set())

    def _block(self, seconds: float) -> int:
        # The polls are long, because the thread would miss an event that is set and cleared between
        # two of them.
        return len(self._queue.waiting()) if self._owned.wait(_MAX_POLL) else 0

    def _release(self) -> None:
        pass

    async def _wait_stopped(self) -> None:
        pass  # the thread may go on, since it takes nothing from others


class BarrierParty:
    """One task at a `threading.Barrier`, with a thread that arrives on its behalf."""

    __slots__ = ("_barrier", "_outcome", "_timeout", "_waiters", "_withdrawn")

    def __init__(self, barrier: threading.Barrier, timeout: float | None) -> None:
        self._barrier = barrier
        self._timeout = timeout
        # What `wait` of the barrier returned or raised; empty until then.
        self._outcome: list[int | BaseException] = []
        # What waits for the thread of `_withdraw`, and whether that has ended.
        self._waiters: list[Waiter] = []
        self._withdrawn = False

    async def wait(self) -> int:
        """Arrive at the barrier. If cancelled before the barrier trips, abort it.

        If this raises, the thread has left the barrier. The only exception is a coroutine that is
        closed, since it cannot wait.

        :return: the index of the party
        """
        waiter = task_waiter()
        start_thread(lambda: self._arrive(waiter))
        try:
            await waiter
        except BaseException as error:
            try:
                start_thread(self._withdraw)  # in a thread: `abort` blocks while an action runs
            except RuntimeError:  # no more threads can be started
                self._withdraw()
            if not isinstance(error, GeneratorExit):
                await wait_shielded(lambda: self._withdrawn, self._waiters)
            raise
        outcome = self._outcome.pop()
        try:
            if isinstance(outcome, BaseException):
                raise outcome
            return outcome
        finally:
            del outcome  # break the reference cycle through the traceback

    def _arrive(self, waiter: Waiter) -> None:
        try:
            self._outcome.append(self._barrier.wait(self._timeout))
        except BaseException as error:
            self._outcome.append(error)
        wake_all([waiter])

    def _withdraw(self) -> None:
        """Block until the thread has left the barrier, and abort the barrier if necessary."""
        pause = 0.001
        while not self._outcome:
            time.sleep(pause)  # the thread may be about to leave
            pause = min(2 * pause, _FIRST_POLL)
            # If all parties have arrived, the action is running. `abort` would wait for it and then
            # split the round: parties that are fast would pass, the others would not. If no party
            # has arrived, the round has tripped, or the thread has yet to arrive.
            if not self._outcome and 0 < self._barrier.n_waiting < self._barrier.parties:
                self._barrier.abort()
        self._withdrawn = True
        wake_all(self._waiters.copy())
