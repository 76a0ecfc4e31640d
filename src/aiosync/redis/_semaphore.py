"""The public class `DistributedSemaphore`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .._errors import NeedsAsyncWith, NotCopied, check_timeout
from .._park import task_waiter
from .._scopes import current_task_id
from ._hold import Hold
from ._semaphore_calls import SemaphoreCalls
from ._threads import ThreadDistributedSemaphore

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType
    from typing import SupportsIndex

    from ._permits import PermitTicket
    from ._semaphore_calls import DistributedSemaphoreStatistics
    from ._session import CurrentSession


class DistributedSemaphore(NeedsAsyncWith, NotCopied):
    """A semaphore whose permits are shared by all processes that use the same server and name.

    Created by `Redis.semaphore`. The semantics are those of `aiosync.BoundedSemaphore`. A permit is
    a lease: if the process dies or loses the server, its permits pass on after at most one lease.
    Waiters of all processes are served in FIFO order.

    One object may be used by tasks of any event loop, and by threads through `as_threading`, while
    the `Redis` is entered.
    """

    __slots__ = ("__weakref__", "_calls", "_entered")

    def __init__(self, current: CurrentSession, name: str, value: int) -> None:
        self._calls = SemaphoreCalls(current, name, value)
        # What the blocks of each task have taken.
        self._entered: dict[int, list[Hold]] = {}

    @property
    def name(self) -> str:
        """The name that processes share."""
        return self._calls.name

    @property
    def value(self) -> int:
        """The number of permits, free or not, unless `resize` was called."""
        return self._calls.value

    async def acquire(self, blocking: bool = True, timeout: float | None = None) -> bool:
        """Take a permit, waiting in FIFO order with all processes if none is free.

        If it is cancelled, no permit is taken: one that was already granted goes to the next
        waiter. Arguments and results are those of `threading.Semaphore.acquire`. With
        ``blocking=False`` too, it waits for the answer of the server.

        :param blocking: if False, do not wait for a permit
        :param timeout: how many seconds to wait at most; 0 or less: do not wait; None: no limit
        :return: True if a permit was taken, False if there was none in time
        :raises BackendUnavailable: if there is no server for `give_up` seconds, or, with
            ``blocking=False``, just now
        :raises ValueError: if other processes use another value or lease for this name. Also if
            `timeout` is given although `blocking` is False, or is NaN.
        :raises TypeError: if `blocking` is not a bool, or `timeout` not a number
        :raises RuntimeError: if the `Redis` is not entered, or was entered before a fork
        """
        return await self._calls.acquire(self, blocking, timeout, task_waiter)

    def release(self, n: SupportsIndex = 1) -> None:
        """Release `n` permits that `acquire` has taken in this process, the oldest first.

        It may be called from any task or thread, and never blocks. It is sent with the next
        command; `Redis.flush` waits until the server has received it.

        :param n: how many, 1 or more
        :raises ValueError: if `n` is less than 1, or this process holds fewer than `n` permits;
            then none is released
        :raises LeaseLost: if one of them was lost; the others are released
        :raises TypeError: if `n` is not an integer
        """
        self._calls.release(n)

    def hold(self, timeout: float | None = None, *, cancel: bool = True) -> Hold:
        """Return an async context manager that takes a permit and releases it.

        ``async with semaphore.hold() as permit:`` gives the block a `Permit`, with its fence.

        :param timeout: how many seconds to wait for a permit at most; None: no limit
        :param cancel: whether to cancel the block if the permit is lost. Its
            ``finally`` clauses may run while another process has the permit already.
        :raises TypeError: if `timeout` is not a number
        :raises ValueError: if `timeout` is NaN
        """
        return Hold(self.name, self._take, check_timeout(timeout), cancel=cancel)

    async def _take(self, timeout: float | None) -> PermitTicket | None:
        return await self._calls.take(self, True, timeout, task_waiter)

    async def __aenter__(self) -> bool:
        """Do what `hold` does.

        :return: True, as `aiosync.Semaphore` does
        """
        hold = self.hold()
        await hold.__aenter__()
        self._entered.setdefault(current_task_id(), []).append(hold)
        return True

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Release the permit.

        :raises LeaseLost: see `Hold`
        """
        key = current_task_id()
        holds = self._entered[key]
        hold = holds.pop()
        if not holds:
            del self._entered[key]
        await hold.__aexit__(exc_type, exc, traceback)

    async def take_for_pool(self, *, blocking: bool) -> PermitTicket | None:
        """Take a permit for a connection; see `ConnectionLimit` of the pool."""
        ticket = await self._calls.take(self, blocking, None, task_waiter)
        if ticket is not None:
            ticket.conductor.on_contention = self._calls.tell_contention
        return ticket

    def watch_contention(self, function: Callable[[], object]) -> Callable[[], object]:
        """Call `function` while others wait for a permit; see `ConnectionLimit` of the pool.

        Others are other processes, and other pools of this process. It is called at most once each
        third of a lease.

        :return: a function that stops the calls
        """
        self._calls.watchers.append(function)
        return lambda: self._calls.watchers.remove(function)

    async def resize(self, n: SupportsIndex) -> None:
        """Change how many permits there are, for all processes.

        Permits that are held beyond a smaller number are not taken away. The server
        forgets the change when no process has used the name for ten leases (or one minute, if that
        is longer), at the earliest after two thirds of that time. After the change, a process may
        use either number as its `value`. If this is cancelled, the change may still be made.

        :param n: 1 or more
        :raises BackendUnavailable: if there is no server for `give_up` seconds
        :raises ValueError: if `n` is smaller than 1
        :raises TypeError: if `n` is not an integer
        """
        await self._calls.resize(n, task_waiter)

    async def statistics(self) -> DistributedSemaphoreStatistics:
        """Return the figures for all processes.

        Cancellation has no effect on the semaphore.

        :raises BackendUnavailable: if there is no server for `give_up` seconds
        :raises ValueError: if other processes use another value or lease for this name
        :raises RuntimeError: if the `Redis` is not entered, or was entered before a fork
        """
        return await self._calls.statistics(task_waiter)

    def _threading_view(self) -> ThreadDistributedSemaphore:
        return ThreadDistributedSemaphore(self._calls, self)

    def __repr__(self) -> str:
        return f"<aiosync.redis.DistributedSemaphore {self.name!r} value={self.value}>"
