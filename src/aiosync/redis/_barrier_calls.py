"""The calls of a distributed barrier, for tasks and threads, which wait in different ways."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from inspect import isawaitable
from typing import TYPE_CHECKING, Any

from .._created import created
from .._errors import broken_barrier, check_timeout
from ._arrivals import Arrivals
from ._party import Broken, Party, Passed
from ._ticket import Ticket

if TYPE_CHECKING:
    from collections.abc import Callable

    from .._park import Waiter
    from ._session import CurrentSession, Session


@dataclass(frozen=True, slots=True)
class DistributedBarrierStatistics:
    """What `DistributedBarrier.statistics` returns: figures of all processes."""

    parties: int
    """The number of parties of a round."""
    waiting: int
    """The number of parties that have arrived in the current round."""
    broken: bool
    """Whether the barrier is broken."""
    members: int
    """The number of processes that have used the barrier within one lease."""


class BarrierCalls:
    """The calls of one `DistributedBarrier`, shared with its views.

    Methods that wait take a function that returns a new waiter for the calling task or thread.
    """

    __slots__ = (
        "__weakref__",
        "_record",
        "action",
        "current",
        "name",
        "parties",
        "timeout",
        "user",
    )

    def __init__(
        self,
        current: CurrentSession,
        name: str,
        parties: int,
        action: Callable[[], object] | None,
        timeout: float | None,
    ) -> None:
        self.current: CurrentSession = current
        self.name: str = name
        self.parties: int = parties
        self.action: Callable[[], object] | None = action
        self.timeout: float | None = timeout
        # Stands for the object in the session.
        self.user: object = object()
        created(self)

    def conductor(self, session: Session | None = None) -> Arrivals:
        """Return the conductor, by default that of the current session."""
        session = self.current.get() if session is None else session
        return session.conductor(Arrivals, self.name, self.parties, self.user)

    async def wait(self, timeout: float | None, new_waiter: Callable[[], Waiter]) -> int:
        """Wait for the other parties; see `DistributedBarrier.wait`."""
        timeout = self.timeout if timeout is None else check_timeout(timeout)
        session = self.current.get()
        conductor = self.conductor(session)
        party = self._new_party(Ticket(new_waiter()))
        try:
            session.post(conductor, partial(conductor.arrive, party), party.ticket)
            in_time = await party.ticket.wait(None if timeout is None else max(timeout, 0))
        except BaseException:
            self._withdraw(conductor, party)
            raise
        if not in_time:
            # All may have arrived meanwhile; only the server knows.
            party.ticket = Ticket(new_waiter())
            await self._finish(session, party, partial(conductor.leave, party, "timeout"))
        return await self._outcome(session, party, new_waiter)

    def _new_party(self, ticket: Ticket) -> Party:
        return Party(ticket, has_action=self.action is not None)

    def _withdraw(self, conductor: Arrivals, party: Party) -> None:
        if party.ticket.withdraw():
            party.cancelled = True
            conductor.post(partial(conductor.leave, party, "cancelled"))
            return
        outcome = (
            party.ticket.outcome
        )  # read last: the conductor may have settled the ticket just now
        if isinstance(outcome, Passed) and outcome.acts:
            conductor.post(partial(conductor.end_action, party, failed=True))

    async def _finish(self, session: Session, party: Party, job: Callable[[], object]) -> None:
        """Post `job`, and wait for the outcome of `party`."""
        conductor = self.conductor(session)
        try:
            session.post(conductor, job, party.ticket)
            await party.ticket.wait(None)
        except BaseException:
            self._withdraw(conductor, party)
            raise

    async def _outcome(
        self, session: Session, party: Party, new_waiter: Callable[[], Waiter]
    ) -> int:
        outcome = party.ticket.result()
        if isinstance(outcome, Passed) and outcome.acts:
            outcome = await self._act(session, party, new_waiter)
        if isinstance(outcome, Broken):
            raise broken_barrier(self.name, outcome.reason, outcome.arrived, self.parties)
        index: int = outcome.index
        return index

    async def _act(
        self, session: Session, party: Party, new_waiter: Callable[[], Waiter]
    ) -> Passed | Broken:
        """Run the action, then report it, so that the others pass."""
        conductor = self.conductor(session)
        assert self.action is not None
        try:
            result = self.action()
            if isawaitable(result):
                await result
        except BaseException:
            conductor.post(partial(conductor.end_action, party, failed=True))
            raise
        party.ticket = Ticket(new_waiter())
        await self._finish(session, party, partial(conductor.end_action, party, failed=False))
        outcome: Any = party.ticket.result()
        return outcome if isinstance(outcome, Broken) else Passed(party.index)

    def abort(self) -> None:
        """Break the barrier."""
        conductor = self.conductor()
        conductor.post(conductor.abort)

    def reset(self) -> None:
        """Return the barrier to its initial state."""
        conductor = self.conductor()
        conductor.post(conductor.reset)

    async def statistics(self, new_waiter: Callable[[], Waiter]) -> DistributedBarrierStatistics:
        """Ask the server; see `DistributedBarrier.statistics`."""
        session = self.current.get()
        conductor = self.conductor(session)
        ticket = Ticket(new_waiter())
        session.post(conductor, partial(conductor.request, ticket, "S"), ticket)
        answer: str = await ticket.wait_for_outcome()
        parties, waiting, status, members = answer.split()
        return DistributedBarrierStatistics(
            int(parties), int(waiting), status == "broken", int(members)
        )
