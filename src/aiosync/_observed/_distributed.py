"""What observed semaphores and barriers of `aiosync.redis` do in addition.

The record knows the tasks and threads of this process only.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .._errors import check_timeout, normalize_timeout
from .._park import ki_protected
from ._extend import extend
from ._record import BrokenRound
from ._semaphores import outcome_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from .._park import Waiter
    from ..redis._barrier_calls import BarrierCalls
    from ..redis._party import Party
    from ..redis._permits import PermitTicket
    from ..redis._semaphore_calls import SemaphoreCalls
    from ..redis._ticket import Ticket
    from ._record import Record

    SemaphoreBase = SemaphoreCalls
    BarrierBase = BarrierCalls
    TicketBase = PermitTicket
else:
    SemaphoreBase = BarrierBase = TicketBase = object


class ObservedSemaphoreCalls(SemaphoreBase):
    """`SemaphoreCalls` that keep a record of the holders and waiters of this process."""

    __slots__ = ()

    _record: Record

    @ki_protected
    async def take(
        self,
        owner: object,
        blocking: bool,
        timeout: float | None,
        new_waiter: Callable[[], Waiter],
    ) -> PermitTicket | None:
        """See `SemaphoreCalls.take`."""
        return await self._take(owner, normalize_timeout(blocking, timeout), new_waiter, True)

    @ki_protected
    async def acquire(
        self,
        owner: object,
        blocking: bool,
        timeout: float | None,
        new_waiter: Callable[[], Waiter],
    ) -> bool:
        """See `SemaphoreCalls.acquire`."""
        ticket = await self._take(owner, normalize_timeout(blocking, timeout), new_waiter, False)
        if ticket is not None:
            self.permits.append(ticket)
        return ticket is not None

    @ki_protected
    async def _take(
        self, owner: object, timeout: float | None, new_waiter: Callable[[], Waiter], scoped: bool
    ) -> PermitTicket | None:
        wait = self._record.begin(timeout, scoped=scoped)
        try:
            ticket: Any = await super().take(owner, True, timeout, new_waiter)
        except BaseException as error:
            self._record.end(wait, outcome_of(error))
            raise
        try:
            self._record.end(wait, "timeout" if ticket is None else "got")
        except BaseException:  # a signal handler has raised
            if ticket is not None:
                ticket.give_back()
            raise
        if ticket is not None:
            extend(ticket, ObservedTicket)
            ticket.hold = self._record.hold(wait, is_kept=lambda: not ticket.lost)
        return ticket  # type: ignore[no-any-return]

    def observed_state(self) -> str:
        """See `View`."""
        return f"permits={self.value} held_here={len(self._record.holds)}"

    def observed_missing(self) -> int:
        """See `View`."""
        return int(len(self._record.holds) >= self.value)


class ObservedTicket(TicketBase):
    """A permit that tells when it is given back."""

    __slots__ = ()

    def give_back(self) -> None:
        """See `PermitTicket.give_back`."""
        super().give_back()
        self.hold.record.drop(self.hold)


class ObservedBarrierCalls(BarrierBase):
    """`BarrierCalls` that keep a record of the parties of this process."""

    __slots__ = ()

    _record: Record

    def _new_party(self, ticket: Ticket) -> Party:
        party = super()._new_party(ticket)
        record = self._record
        party.on_broken = lambda reason: record.tell(BrokenRound(reason))
        return party

    async def wait(self, timeout: float | None, new_waiter: Callable[[], Waiter]) -> int:
        """See `BarrierCalls.wait`."""
        limit = check_timeout(timeout)
        wait = self._record.begin(self.timeout if limit is None else limit)
        try:
            index = await super().wait(timeout, new_waiter)
        except BaseException as error:
            self._record.end(wait, outcome_of(error))
            raise
        self._record.end(wait, "got")
        return index

    def observed_state(self) -> str:
        """See `View`."""
        return f"parties={self.parties} waiting_here={len(self._record.waits)}"

    def observed_missing(self) -> int:
        """See `View`."""
        return 0
