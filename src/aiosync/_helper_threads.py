"""Threads that block in objects of `threading` on behalf of tasks.

A task can only wait for an object of `threading` through a thread that blocks in it, and a thread
that blocks in it cannot be interrupted. So no thread blocks for long where it could acquire
something after its task has stopped waiting:

`Poller` serves semaphores and locks: one thread for each object, which acquires with a short
timeout, again and again, for as long as tasks wait.
`EventWatcher` serves events: one thread for each object, which acquires nothing.
`BarrierParty` serves barriers: one thread for each task, since each has to arrive. `abort` ends its
wait.

The threads belong to this package, so they do not occupy worker threads of anyio.
"""

from __future__ import annotations

import threading
import time
from functools import partial
from typing import TYPE_CHECKING, Any, Union

from ._handoff import HandoffQueue
from ._park import is_abandoned, task_waiter, wait_shielded, wait_with_timeout, wake_all

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

    def try_acquire(self) -> bool:
        """Acquire the object if it is free and no task waits for it; never block."""
        return not self._queue.waiters and bool(self._owned.acquire(False))

    async def acquire(self, timeout: float | None) -> bool:
        """Wait in FIFO order until the object is acquired for this task.

        If this returns False or raises, no thread blocks in the object unless other tasks wait. The
        only exception is a coroutine that is closed, since it cannot wait.

        :param timeout: how many seconds to wait at most; None: no limit
        :return: False if the object was not acquired in time
        """
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

    async def _wait_stopped(self) -> None:
        """Wait until no thread blocks in the object, unless it does so for other tasks."""
        await wait_shielded(lambda: not self._running or bool(self._clients), self._stop_waiters)

    def _run(self) -> None:
        poll_time = _FIRST_POLL
        while True:
            self._drop_abandoned()
            self._release_unclaimed()
            stopped = self._stop_if_unused()
            self._wake_stop_waiters()
            if stopped:
                return
            if not self._queue.waiters:
                time.sleep(_IDLE_PAUSE)
            elif self._poll(poll_time):
                poll_time = _FIRST_POLL
            else:
                poll_time = min(2 * poll_time, _MAX_POLL)

    def _poll(self, seconds: float) -> bool:
        """Try to acquire the object for the oldest waiter; return False on timeout."""
        try:
            if not self._owned.acquire(True, seconds):
                return False
        except BaseException as error:
            self._queue.put(error)
        else:
            self._queue.put(True)
        return True

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
                try:
                    self._owned.release()
                except (ValueError, RuntimeError):
                    pass  # another thread has already released it

    def _stop_if_unused(self) -> bool:
        with self._lock:
            if self._clients:
                return False
            self._running = False
            return True

    def _wake_stop_waiters(self) -> None:
        while True:
            try:
                waiter = self._stop_waiters.pop()
            except IndexError:
                return
            wake_all([waiter])


class _Watch:
    """One thread of an `EventWatcher`, and the tasks that it wakes at its end."""

    __slots__ = ("event_was_set", "waiters")

    def __init__(self) -> None:
        self.event_was_set = False
        # Entries are removed without the lock, as in `Poller._clients`.
        self.waiters: dict[Waiter, None] = {}


class EventWatcher:
    """Waits for a `threading.Event` in one thread, on behalf of any number of tasks."""

    __slots__ = ("_event", "_lock", "_watch")

    def __init__(self, event: threading.Event) -> None:
        self._event = event
        # Held while `_watch` changes, and while waiters are added to it.
        self._lock = threading.Lock()
        # The watch of the running thread; None if there is no thread.
        self._watch: _Watch | None = None

    async def wait(self, timeout: float | None) -> bool:
        """Wait until the event is set.

        :param timeout: how many seconds to wait at most; None: no limit
        :return: False if the event was not set in time
        """
        waiter = task_waiter()
        watch = self._join(waiter)
        try:
            await (waiter if timeout is None else wait_with_timeout(waiter, timeout))
        finally:
            watch.waiters.pop(waiter, None)
        return watch.event_was_set

    def _join(self, waiter: Waiter) -> _Watch:
        with self._lock:
            watch = self._watch
            if watch is None:
                watch = _Watch()
                start_thread(partial(self._run, watch))
                self._watch = watch
            watch.waiters[waiter] = None
            return watch

    def _run(self, watch: _Watch) -> None:
        # The polls are long, because the thread would miss an event that is set and cleared between
        # two of them.
        while not self._event.wait(_MAX_POLL):
            with self._lock:
                if all(map(is_abandoned, list(watch.waiters))):
                    self._watch = None
                    return
        with self._lock:
            self._watch = None
            watch.event_was_set = True
            waiters = list(watch.waiters)
        wake_all(waiters)


class BarrierParty:
    """One task at a `threading.Barrier`, with a thread that arrives on its behalf."""

    __slots__ = ("_barrier", "_outcome", "_timeout")

    def __init__(self, barrier: threading.Barrier, timeout: float | None) -> None:
        self._barrier = barrier
        self._timeout = timeout
        # What `wait` of the barrier returned or raised; empty until then.
        self._outcome: list[int | BaseException] = []

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
        except GeneratorExit:
            start_thread(self._withdraw)
            raise
        except BaseException:
            from anyio import CancelScope  # late, as in `_park`

            with CancelScope(shield=True):
                await self._wait_withdrawn()
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

    async def _wait_withdrawn(self) -> None:
        """Withdraw in a thread, because `abort` blocks while an action runs."""
        waiter = task_waiter()
        try:
            start_thread(lambda: self._withdraw(waiter))
        except RuntimeError:  # no more threads can be started
            self._withdraw()
        else:
            await waiter

    def _withdraw(self, *waiters: Waiter) -> None:
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
        wake_all(waiters)
