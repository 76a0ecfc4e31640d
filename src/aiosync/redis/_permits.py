"""The conductor of a semaphore: the permits and waiters of this process."""

from __future__ import annotations

from functools import partial
from math import inf
from typing import TYPE_CHECKING, Any, ClassVar

from .._park import run_soon, wake_all
from ._conductor import SAFE_PART, Conductor, unavailable_error
from ._ticket import Ticket

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from .._park import Waiter
    from ._batch import Batch, Operation, Settings


class PermitTicket(Ticket):
    """A request for a permit, and then the permit.

    Everything but the loss belongs to the conductor.
    """

    __slots__ = (
        "_on_loss",
        "_was_lost",
        "asked",
        "conductor",
        "fence",
        "hold",
        "loss_waiters",
        "may_wait",
        "owner",
        "place",
        "sent",
        "sent_at",
    )

    # Only if the semaphore is observed: what its record knows of the permit.
    hold: Any

    def __init__(self, conductor: Permits, waiter: Waiter, *, may_wait: bool) -> None:
        super().__init__(waiter)
        self.conductor: Permits = conductor
        self.may_wait: bool = may_wait
        self.asked: float = 0.0
        self.sent: bool = False
        self.sent_at: float = -inf
        self.place: str = "0"
        self.fence: str = ""
        # Whether it was lost, once that is decided: by the conductor, or as it is released.
        self._was_lost: bool | None = None
        # Keeps the semaphore object alive while the permit is held.
        self.owner: object = None
        self.loss_waiters: list[Waiter] = []
        self._on_loss: list[tuple[object, Callable[[], object]]] = []

    @property
    def lost(self) -> bool:
        """Whether the permit was lost.

        The clock tells, not the conductor alone: its event loop may have been blocked.
        """
        if self._was_lost is None:
            return self.conductor.is_overdue()
        return self._was_lost

    def on_loss(self, token: object, function: Callable[[], object]) -> None:
        """Call `function` on event loop `token` if the permit is lost, or is lost already."""
        self._on_loss.append((token, function))
        if self.lost:
            self._notify()

    def lose(self) -> None:
        """Tell the holder that the permit is lost."""
        self._was_lost = True
        self._notify()

    def give_back(self) -> None:
        """Release the permit, unless the conductor has done so, as it was lost."""
        self._on_loss.clear()  # break the reference cycle through the block
        if self._was_lost is None:
            self._was_lost = self.conductor.is_overdue()
            self.conductor.post(partial(self.conductor.give_back, self))

    def _notify(self) -> None:
        while True:
            try:
                token, function = self._on_loss.pop()
            except IndexError:  # all were called, or `give_back` has just cleared the list
                break
            run_soon(token, function)
        wake_all(self.loss_waiters.copy())


class Permits(Conductor):
    """The permits and waiters of one process at one semaphore."""

    script: ClassVar[str] = "semaphore"

    def __init__(self, name: str, value: int, settings: Settings) -> None:
        super().__init__(name, value, settings)
        # Called at an audit while there are waiters, with whether other processes have some. `bool`
        # does nothing.
        self.on_contention: Callable[[bool], object] = bool
        # By number, so in the order of the requests.
        self._waiting: dict[int, PermitTicket] = {}
        self._held: dict[int, PermitTicket] = {}
        # What the server has not confirmed yet: fences of released permits, by the number of the
        # ticket, and numbers of tickets that were withdrawn.
        self._returning: dict[int, str] = {}
        self._leaving: dict[int, None] = {}
        # Whether the last audit found another number of permits than this process knows of, and
        # their list has not been compared yet.
        self._comparing = False

    def _keys(self, stem: str) -> tuple[str, ...]:
        state = f"{stem}:semaphore"
        return state, f"{state}:members", f"{state}:holders", f"{state}:waiters"

    @property
    def channel(self) -> str:
        return f"{self.keys[0]}!{self.member}"

    @property
    def is_idle(self) -> bool:
        return not (
            self._waiting
            or self._held
            or self._returning
            or self._leaving
            or self._requests
            or self._comparing
        )

    def _is_known(self) -> bool:
        return bool(self._held) or any(ticket.sent for ticket in self._waiting.values())

    # -- Jobs that the owners of tickets post.

    def ask(self, ticket: PermitTicket) -> None:
        """Ask for a permit."""
        if ticket.decided:
            return
        if not (ticket.may_wait or self.connected):
            ticket.settle(unavailable_error(f"semaphore {self.name!r}", 0, None))
            return
        ticket.number = next(self.settings.numbers)
        ticket.asked = self._clock()
        self._waiting[ticket.number] = ticket
        self._ask(ticket)

    def _ask(self, ticket: PermitTicket) -> None:
        number = str(ticket.number)
        if ticket.sent and ticket.may_wait:
            arguments: tuple[str, ...] = ("A", number, ticket.place)
        else:
            arguments = ("a" if ticket.may_wait else "t", number)
        self._send(*arguments, answered=partial(self._take_answer, ticket), asker=ticket)

    def leave(self, ticket: PermitTicket) -> None:
        """Stop waiting; the owner has withdrawn `ticket`."""
        if self._waiting.pop(ticket.number, None) is not None and ticket.sent:
            self._leaving[ticket.number] = None
            self._send_leave(ticket.number)

    def _send_leave(self, number: int) -> None:
        self._send("r", str(number), "-", answered=lambda _: self._leaving.pop(number, None))

    def give_back(self, ticket: PermitTicket) -> None:
        """Release a permit, if it is still held."""
        if self._held.pop(ticket.number, None) is not None:
            ticket.owner = None
            self._return(ticket.number, ticket.fence)

    def _return(self, number: int, fence: str) -> None:
        self._returning[number] = fence
        self._send_return(number, fence)

    def _send_return(self, number: int, fence: str) -> None:
        self._send("r", str(number), fence, answered=lambda _: self._returning.pop(number, None))

    # -- The connection.

    def disconnect(self) -> None:
        super().disconnect()
        for ticket in [*self._waiting.values()]:
            if not ticket.may_wait:  # its owner waits for an answer only
                ticket.settle(unavailable_error(f"semaphore {self.name!r}", 0, None))
                self.leave(ticket)

    def _ask_again(self) -> None:
        # Permits first: after a restart, claims must arrive while the gate is closed.
        for number, ticket in self._held.items():
            self._send("c", str(number), ticket.fence, answered=partial(self._claimed, ticket))
        for number, fence in self._returning.items():
            self._send_return(number, fence)
        for number in self._leaving:
            self._send_leave(number)
        for ticket in self._waiting.values():
            self._ask(ticket)
        super()._ask_again()

    def _header(self, audit: bool) -> list[str]:
        return [
            str(self.value),
            self._lease_ms,
            self.member,
            str(self._epoch),
            self._run,
            str(round(1000 * max(0.0, self._fresh_until - self._clock()))),
            "1" if audit else "0",
            self._publish,
        ]

    def _is_wanted(self, asker: object) -> bool:
        return isinstance(asker, Ticket) and not asker.decided

    def _sent(self, operation: Operation) -> None:
        if isinstance(operation.asker, PermitTicket) and not operation.asker.sent:
            operation.asker.sent = True
            operation.asker.sent_at = self._clock()

    # -- Answers.

    def _take(self, batch: Batch, reply: Sequence[Any]) -> None:
        mine, waiting, grants, answers = reply
        for operation, answer in zip(batch.operations, answers, strict=True):
            operation.answered(answer)
        for number, fence in _pairs(grants):
            self._grant(number, fence)
        if batch.audit and waiting:
            self.on_contention(waiting > len(self._waiting))
        # The server keeps a permit as long as the process lives, so no one could use a permit that
        # the process does not know of.
        if batch.audit:
            self._comparing = mine != len(self._held) + len(self._returning)
        if batch.audit and self._comparing:
            self._send("L", answered=partial(self._compare, list(self._held.values())))

    def _take_answer(self, ticket: PermitTicket, answer: str) -> None:
        if answer == "-":
            self._waiting.pop(ticket.number, None)
            ticket.settle(False)
        elif answer[0] == "g":
            self._grant(ticket.number, answer[1:])
        else:
            ticket.place = answer[1:]

    def take_message(self, message: str) -> None:
        for number, fence in _pairs(message.split()):
            ticket = self._waiting.get(number)
            if ticket is not None:  # the server has received the command that asked
                self._answered = max(self._answered, ticket.sent_at)
            self._grant(number, fence)

    def _grant(self, number: int, fence: str) -> None:
        ticket = self._waiting.get(number)
        if ticket is None:
            if not (number in self._held or number in self._returning or number in self._leaving):
                # From an old state of the server, or for a request that arrived late.
                self._return(number, fence)
        elif self._clock() < self._safe_until():  # otherwise an audit finds the permit
            del self._waiting[number]
            ticket.fence = fence
            self._held[number] = ticket
            if not ticket.settle(True):
                self.give_back(ticket)

    def _claimed(self, ticket: PermitTicket, answer: str) -> None:
        if answer == "0" and self._held.pop(ticket.number, None) is not None:
            ticket.owner = None
            ticket.lose()

    def _compare(self, held: list[PermitTicket], listed: str) -> None:
        """Compare the list of the server with the permits that were held when it was requested."""
        self._comparing = False
        permits = dict.fromkeys(_pairs(listed.split()))  # a set that keeps the order
        for ticket in held:
            if (ticket.number, ticket.fence) not in permits:
                self._claimed(ticket, "0")
        for number, fence in permits:
            if number in self._waiting:
                self._grant(number, fence)  # the message was lost
                continue
            known = self._held.get(number)
            if number not in self._returning and (known is None or known.fence != fence):
                self._return(number, fence)

    def _differs(self, number: int, lease_ms: int) -> ValueError:
        return ValueError(
            f"semaphore {self.name!r} has other settings on the server "
            f"(value={number}, lease={lease_ms / 1000:g} s there; "
            f"value={self.value}, lease={self.settings.lease:g} s here)"
        )

    # -- Time.

    def _has_claims_left(self) -> bool:
        # Claims are sent first, but not all of them may be in the first batch. If the server
        # process has changed, the gate may open before the last one arrives.
        return bool(self._outbox) and self._outbox[0].arguments[0] == "c"

    def _safe_until(self) -> float:
        return self._answered + SAFE_PART * self.settings.lease

    def is_overdue(self) -> bool:
        """Return whether other processes may have been given what this one holds."""
        return self._clock() >= self._safe_until()

    def deadline(self) -> float:
        return self._safe_until() if self._held else inf

    def expire(self, now: float) -> None:
        if now >= self.deadline():
            for ticket in [*self._held.values()]:
                self.give_back(ticket)
                ticket.lose()

    def unavailable(self, since: float, now: float, cause: BaseException | None) -> float:
        look_at = super().unavailable(since, now, cause)
        for ticket in [*self._waiting.values()]:
            limit = max(since, ticket.asked) + self.settings.give_up
            if now < limit:
                look_at = min(look_at, limit)
            elif ticket.settle(unavailable_error(f"semaphore {self.name!r}", now - since, cause)):
                self.leave(ticket)
        return look_at

    def close(self, error: Exception) -> None:
        super().close(error)
        for ticket in [*self._waiting.values()]:
            ticket.settle(error)
            self.leave(ticket)
        for held in [*self._held.values()]:
            self.give_back(held)
            held.lose()

    def refuse(self, batch: Batch, error: Exception) -> None:
        super().refuse(batch, error)
        for operation in batch.operations:
            if operation.arguments[0] == "r":  # otherwise it is repeated for ever
                operation.answered("-")
        self._comparing = False

    def _refuse(self, asker: object, error: Exception) -> None:
        if isinstance(asker, PermitTicket):
            self._waiting.pop(asker.number, None)
            asker.settle(error)
        else:
            super()._refuse(asker, error)


def _pairs(permits: Iterable[str]) -> Iterator[tuple[int, str]]:
    """Yield the number and the fence of each "ticket:fence"."""
    for permit in permits:
        number, fence = permit.split(":")
        yield int(number), fence
