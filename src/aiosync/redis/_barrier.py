"""The public class `DistributedBarrier`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .._errors import NeedsAsyncWith, NotCopied
from .._park import task_waiter
from ._barrier_calls import BarrierCalls
from ._threads import ThreadDistributedBarrier

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

    from ._barrier_calls import DistributedBarrierStatistics
    from ._session import CurrentSession


class DistributedBarrier(NeedsAsyncWith, NotCopied):
    """A barrier at which parties of several processes wait for one another.

    Created by `Redis.barrier`. The semantics are those of `aiosync.Barrier`. If a process dies
    while it waits, the round is broken for the others after at most one lease.

    One object may be used by tasks of any event loop, and by threads through `as_threading`, while
    the `Redis` is entered.
    """

    __slots__ = ("__weakref__", "_calls")

    def __init__(
        self,
        current: CurrentSession,
        name: str,
        parties: int,
        action: Callable[[], object] | None,
        timeout: float | None,
    ) -> None:
        self._calls = BarrierCalls(current, name, parties, action, timeout)

    @property
    def name(self) -> str:
        """The name that processes share."""
        return self._calls.name

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

    async def wait(self, timeout: float | None = None) -> int:
        """Wait until all parties, of all processes, have arrived.

        The same as `threading.Barrier.wait`. The action, if there is one, is run by the last party
        to arrive, in its process, before any party passes. If this is cancelled before all parties
        have arrived, the barrier is broken for the others. If it is cancelled later, the others
        pass, unless it runs the action: then the action counts as failed.

        :param timeout: how many seconds to wait for the other parties to arrive; after that, the
            barrier is broken for all. None: the timeout of the barrier.
        :return: the index of the party in its round, 0 to parties - 1, in the order of arrival
        :raises BrokenBarrierError: if the barrier is broken, or is broken or reset meanwhile. The
            reason is "lost" if a process has died, or if the server was restarted.
        :raises BackendUnavailable: if there is no server for `give_up` seconds, or if the
            connection is lost and the outcome cannot be learned; the others may have passed
        :raises ValueError: if other processes use another number of parties or lease for this
            name. Also if `timeout` is NaN.
        :raises TypeError: if `timeout` is not a number
        :raises RuntimeError: if the `Redis` is not entered, or was entered before a fork
        """
        return await self._calls.wait(timeout, task_waiter)

    def abort(self) -> None:
        """Break the barrier for all processes, until it is reset.

        It may be called from any task or thread, and never blocks; see `threading.Barrier.abort`.
        It is sent after the calls of `wait` that this process made before; `Redis.flush` waits
        until the server has received it.

        :raises RuntimeError: if the `Redis` is not entered, or was entered before a fork
        """
        self._calls.abort()

    def reset(self) -> None:
        """Return the barrier to its initial state; parties that wait get BrokenBarrierError.

        It may be called from any task or thread, and never blocks; see `threading.Barrier.reset`.

        :raises RuntimeError: if the `Redis` is not entered, or was entered before a fork
        """
        self._calls.reset()

    async def statistics(self) -> DistributedBarrierStatistics:
        """Return the figures for all processes.

        Cancellation has no effect on the barrier.

        :raises BackendUnavailable: if there is no server for `give_up` seconds
        :raises ValueError: if other processes use another number of parties or lease
        :raises RuntimeError: if the `Redis` is not entered, or was entered before a fork
        """
        return await self._calls.statistics(task_waiter)

    async def __aenter__(self) -> int:
        """Do what ``wait()`` does."""
        return await self.wait()

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Do nothing."""

    def _threading_view(self) -> ThreadDistributedBarrier:
        return ThreadDistributedBarrier(self._calls, self)

    def __repr__(self) -> str:
        return f"<aiosync.redis.DistributedBarrier {self.name!r} parties={self.parties}>"
