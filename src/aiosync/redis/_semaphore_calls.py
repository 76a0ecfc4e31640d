"""The calls of a distributed semaphore, for tasks and threads, which wait in different ways."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from .._created import created
from .._errors import check_count, normalize_timeout
from ._hold import lease_lost
from ._permits import Permits, PermitTicket
from ._ticket import Ticket

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import SupportsIndex

    from .._park import Waiter
    from ._session import CurrentSession


@dataclass(frozen=True, slots=True)
class DistributedSemaphoreStatistics:
    """What `DistributedSemaphore.statistics` returns: figures of all processes."""

    limit: int
    """The number of permits; see `DistributedSemaphore.resize`."""
    held: int
    """The number of permits that are held."""
    waiting: int
    """The number of tasks and threads, of all processes, that wait for a permit."""
    members: int
    """The number of processes that have used the semaphore within one lease."""
    gated: bool
    """Whether nothing is granted because the server was started less than a lease ago.

    Until then, permits and waiters of processes that have not reconnected are not counted.
    """


class SemaphoreCalls:
    """The calls of one `DistributedSemaphore`, shared with its views.

    Methods that wait take a function that returns a new waiter for the calling task or thread.
    """

    __slots__ = (
        "__weakref__",
        "_record",
        "current",
        "name",
        "permits",
        "user",
        "value",
        "watchers",
    )

    def __init__(self, current: CurrentSession, name: str, value: int) -> None:
        self.current: CurrentSession = current
        self.name: str = name
        self.value: int = value
        # Stands for the object in the session.
        self.user: object = object()
        # The permits that `acquire` has taken, the oldest first. Removing one is the claim to
        # release it.
        self.permits: deque[PermitTicket] = deque()
        # Called while others wait; see `DistributedSemaphore.watch_contention`.
        self.watchers: list[Callable[[], object]] = []
        created(self)

    async def take(
        self,
        owner: object,
        blocking: bool,
        timeout: float | None,
        new_waiter: Callable[[], Waiter],
    ) -> PermitTicket | None:
        """Take a permit, which keeps `owner` alive. Return None if there is none in time."""
        timeout = normalize_timeout(blocking, timeout)
        session = self.current.get()
        conductor = session.conductor(Permits, self.name, self.value, self.user)
        ticket = PermitTicket(conductor, new_waiter(), may_wait=timeout != 0)
        ticket.owner = owner
        try:
            session.post(conductor, partial(conductor.ask, ticket), ticket)
            granted = await ticket.wait(timeout if ticket.may_wait else None)
        except BaseException:
            if ticket.withdraw():
                conductor.post(partial(conductor.leave, ticket))
            elif ticket.outcome is True:
                conductor.post(partial(conductor.give_back, ticket))
            raise
        if not granted:
            conductor.post(partial(conductor.leave, ticket))
            return None
        return ticket if ticket.result() else None

    async def acquire(
        self,
        owner: object,
        blocking: bool,
        timeout: float | None,
        new_waiter: Callable[[], Waiter],
    ) -> bool:
        """Take a permit for `release`; see `DistributedSemaphore.acquire`."""
        ticket = await self.take(owner, blocking, timeout, new_waiter)
        if ticket is None:
            return False
        self.permits.append(ticket)
        return True

    def release(self, n: SupportsIndex) -> None:
        """Release `n` permits, or none if there are fewer; see `DistributedSemaphore.release`."""
        n = check_count("n", n, 1)
        self.current.refuse_fork()
        claimed: list[PermitTicket] = []
        try:
            while len(claimed) < n:
                claimed.append(self.permits.popleft())
        except IndexError:
            self.permits.extendleft(reversed(claimed))
            raise ValueError(
                f"semaphore {self.name!r} released too often (n={n}, held={len(claimed)})"
            ) from None
        lost = [ticket for ticket in claimed if ticket.lost]
        for ticket in claimed:
            ticket.give_back()
        if lost:
            raise lease_lost(self.name, len(lost))

    def tell_contention(self, elsewhere: bool) -> None:
        """Call the watchers, since there are waiters.

        :param elsewhere: whether there are waiters in other processes
        """
        # A pool must not close connections for its own waiters.
        if elsewhere or len(self.watchers) > 1:
            for function in self.watchers.copy():
                function()

    async def resize(self, n: SupportsIndex, new_waiter: Callable[[], Waiter]) -> None:
        """Change the number of permits; see `DistributedSemaphore.resize`."""
        await self._request(new_waiter, "N", str(check_count("n", n, 1)))

    async def statistics(self, new_waiter: Callable[[], Waiter]) -> DistributedSemaphoreStatistics:
        """Ask the server; see `DistributedSemaphore.statistics`."""
        answer = await self._request(new_waiter, "S")
        limit, held, waiting, members, gated = map(int, answer.split())
        return DistributedSemaphoreStatistics(limit, held, waiting, members, bool(gated))

    async def _request(self, new_waiter: Callable[[], Waiter], *arguments: str) -> str:
        session = self.current.get()
        conductor = session.conductor(Permits, self.name, self.value, self.user)
        ticket = Ticket(new_waiter())
        session.post(conductor, partial(conductor.request, ticket, *arguments), ticket)
        answer: str = await ticket.wait_for_outcome()
        return answer
