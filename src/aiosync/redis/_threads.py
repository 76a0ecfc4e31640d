"""The views of distributed semaphores and barriers that `as_threading` returns."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from .._errors import NeedsPlainWith, check_timeout
from .._park import run_in_thread
from ._hold import Permit, no_permit, report_loss

if TYPE_CHECKING:
    from types import TracebackType
    from typing import SupportsIndex

    from ._barrier_calls import BarrierCalls, DistributedBarrierStatistics
    from ._semaphore_calls import DistributedSemaphoreStatistics, SemaphoreCalls


class ThreadHold(NeedsPlainWith):
    """A permit for the duration of a ``with`` block.

    Created by `ThreadDistributedSemaphore.hold`. Each object is for one block.
    """

    __slots__ = ("_calls", "_owner", "_permit", "_timeout")

    def __init__(self, calls: SemaphoreCalls, owner: object, timeout: float | None) -> None:
        self._calls = calls
        self._owner = owner
        self._timeout = timeout
        self._permit: Permit | None = None

    def __enter__(self) -> Permit:
        """Take a permit, as `ThreadDistributedSemaphore.acquire` does.

        :raises TimeoutError: if there is none in time
        """
        if self._permit is not None:
            raise RuntimeError("this hold() was entered already; call hold() again")
        calls = self._calls
        ticket = run_in_thread(
            calls.take(self._owner, True, self._timeout, calls.current.thread_waiter)
        )
        if ticket is None:
            raise no_permit(calls.name, self._timeout)
        self._permit = Permit(calls.name, ticket)
        return self._permit

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Release the permit, unless the block has done so.

        :raises LeaseLost: if the permit was lost meanwhile. If the block raises an exception of its
            own, that gets a note instead.
        """
        assert self._permit is not None
        was_lost = self._permit.lost
        self._permit.release()
        if was_lost:
            report_loss(self._calls.name, exc)


class ThreadDistributedSemaphore(NeedsPlainWith):
    """A `DistributedSemaphore` with the API of `threading.BoundedSemaphore`.

    Created by `aiosync.as_threading`. All methods may be called from any thread. A thread cannot be
    cancelled if a permit is lost: look at `Permit.lost`, or send the fence along.
    """

    __slots__ = ("__weakref__", "_calls", "_entered", "_semaphore")

    def __init__(self, calls: SemaphoreCalls, semaphore: object) -> None:
        self._calls = calls
        # Kept alive, so that its conductor is not retired.
        self._semaphore = semaphore
        # The holds of the ``with`` blocks of each thread.
        self._entered: dict[int, list[ThreadHold]] = {}

    def acquire(self, blocking: bool = True, timeout: float | None = None) -> bool:
        """Take a permit. The same as `DistributedSemaphore.acquire`, which lists the exceptions.

        An exception from a signal handler (Ctrl-C) interrupts the wait, and no permit is taken.

        :raises RuntimeError: also if an event loop is running on this thread
        """
        calls = self._calls
        return run_in_thread(
            calls.acquire(self._semaphore, blocking, timeout, calls.current.thread_waiter)
        )

    def release(self, n: SupportsIndex = 1) -> None:
        """Release `n` permits. The same as `DistributedSemaphore.release`."""
        self._calls.release(n)

    def hold(self, timeout: float | None = None) -> ThreadHold:
        """Return a context manager that takes a permit and releases it.

        :param timeout: how many seconds to wait for a permit at most; None: no limit
        """
        return ThreadHold(self._calls, self._semaphore, check_timeout(timeout))

    def resize(self, n: SupportsIndex) -> None:
        """Change how many permits there are. The same as `DistributedSemaphore.resize`."""
        run_in_thread(self._calls.resize(n, self._calls.current.thread_waiter))

    def statistics(self) -> DistributedSemaphoreStatistics:
        """Return figures of all processes. The same as `DistributedSemaphore.statistics`."""
        return run_in_thread(self._calls.statistics(self._calls.current.thread_waiter))

    def __enter__(self) -> bool:
        """Do what `hold` does."""
        hold = self.hold()
        hold.__enter__()
        self._entered.setdefault(threading.get_ident(), []).append(hold)
        return True

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Release the permit.

        :raises LeaseLost: see `ThreadHold`
        """
        holds = self._entered[threading.get_ident()]
        hold = holds.pop()
        if not holds:
            del self._entered[threading.get_ident()]
        hold.__exit__(exc_type, exc, traceback)

    def __repr__(self) -> str:
        return f"<as_threading at {id(self):#x} of {self._semaphore!r}>"


class ThreadDistributedBarrier(NeedsPlainWith):
    """A `DistributedBarrier` with the API of `threading.Barrier`.

    Created by `aiosync.as_threading`. All methods may be called from any thread.
    """

    __slots__ = ("__weakref__", "_barrier", "_calls")

    def __init__(self, calls: BarrierCalls, barrier: object) -> None:
        self._calls = calls
        # Kept alive, so that its conductor is not retired.
        self._barrier = barrier

    def wait(self, timeout: float | None = None) -> int:
        """Wait for all parties. The same as `DistributedBarrier.wait`, which lists the exceptions.

        An exception from a signal handler (Ctrl-C) interrupts the wait, and breaks the barrier.

        :raises RuntimeError: also if an event loop is running on this thread, or if the action is
            async, which only a task can run
        """
        return run_in_thread(self._calls.wait(timeout, self._calls.current.thread_waiter))

    def abort(self) -> None:
        """Break the barrier. The same as `DistributedBarrier.abort`."""
        self._calls.abort()

    def reset(self) -> None:
        """Return the barrier to its initial state. The same as `DistributedBarrier.reset`."""
        self._calls.reset()

    @property
    def parties(self) -> int:
        """The number of parties of a round."""
        return self._calls.parties

    @property
    def n_waiting(self) -> int:
        """The number of parties in the current round, as the server has last reported."""
        return self._calls.conductor().n_waiting

    @property
    def broken(self) -> bool:
        """Whether the barrier is broken, as the server has last reported."""
        return self._calls.conductor().broken

    def statistics(self) -> DistributedBarrierStatistics:
        """Return figures of all processes. The same as `DistributedBarrier.statistics`."""
        return run_in_thread(self._calls.statistics(self._calls.current.thread_waiter))

    def __repr__(self) -> str:
        return f"<as_threading at {id(self):#x} of {self._barrier!r}>"
