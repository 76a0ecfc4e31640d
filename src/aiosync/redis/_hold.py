"""A permit for the duration of a block, and the end of a block whose permit was lost."""

from __future__ import annotations

from typing import TYPE_CHECKING

from anyio import CancelScope

from .._errors import NeedsAsyncWith
from .._park import current_token, task_waiter
from ._errors import LeaseLost

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from types import TracebackType

    from ._permits import PermitTicket


class Permit:
    """A permit that is held. Created by `DistributedSemaphore.hold`. May be used by any thread."""

    __slots__ = ("_name", "_ticket", "_unreleased")

    def __init__(self, name: str, ticket: PermitTicket) -> None:
        self._name = name
        self._ticket = ticket
        # Removing the only entry is the claim to release the permit, so it is released once.
        self._unreleased = [True]

    @property
    def fence(self) -> int:
        """A number that is larger than that of any permit that was granted before.

        Send it along with each write. A resource that refuses a number that is smaller than one it
        has seen is safe from a holder that was paused for longer than a lease, if `value` is 1.
        """
        return int(self._ticket.fence)

    @property
    def lost(self) -> bool:
        """Whether the permit was lost, so that others may have it."""
        return self._ticket.lost

    async def wait_lost(self) -> None:
        """Wait until the permit is lost; for ever, if it is released instead.

        Any number of tasks of any event loop may wait. Cancellation has no effect on the permit.
        """
        waiter = task_waiter()
        self._ticket.loss_waiters.append(waiter)
        try:
            if not self.lost:
                await waiter
        finally:
            self._ticket.loss_waiters.remove(waiter)

    def release(self) -> None:
        """Release the permit before the block ends. Never blocks; further calls do nothing."""
        try:
            self._unreleased.pop()
        except IndexError:
            return
        self._ticket.give_back()

    def __repr__(self) -> str:
        state = " lost" if self.lost else ""
        return f"<aiosync.redis.Permit of {self._name!r} fence={self.fence}{state}>"


class Hold(NeedsAsyncWith):
    """A permit for the duration of an ``async with`` block. Created by `DistributedSemaphore.hold`.

    Each object is for one block.
    """

    __slots__ = ("_cancels", "_name", "_permit", "_scope", "_take", "_timeout")

    def __init__(
        self,
        name: str,
        take: Callable[[float | None], Awaitable[PermitTicket | None]],
        timeout: float | None,
        *,
        cancel: bool,
    ) -> None:
        self._name = name
        self._take = take
        self._timeout = timeout
        self._cancels = cancel
        self._scope: CancelScope | None = None
        self._permit: Permit | None = None

    async def __aenter__(self) -> Permit:
        """Take a permit, as `DistributedSemaphore.acquire` does.

        :raises TimeoutError: if there is none in time
        :raises RuntimeError: if this object was entered before
        """
        if self._permit is not None:
            raise RuntimeError("this hold() was entered already; call hold() again")
        ticket = await self._take(self._timeout)
        if ticket is None:
            raise no_permit(self._name, self._timeout)
        self._permit = Permit(self._name, ticket)
        if self._cancels:
            self._scope = CancelScope()
            self._scope.__enter__()
            ticket.on_loss(current_token(), self._scope.cancel)
        return self._permit

    def __repr__(self) -> str:
        permit = "not entered" if self._permit is None else repr(self._permit)
        return f"<aiosync.redis.Hold of {self._name!r}: {permit}>"

    async def __aexit__(
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
        try:
            caught = self._scope is not None and self._scope.__exit__(exc_type, exc, traceback)
        except BaseException as rest:  # trio: a group without the cancellation that has ended here
            report_loss(self._name, rest)
            raise
        ended_by_loss = bool(caught) and exc is not None  # trio: true also without an exception
        # `ended_by_loss` implies `was_lost`. Both are tested, so that nothing is ever swallowed.
        if was_lost or ended_by_loss:
            report_loss(self._name, None if ended_by_loss else exc)


def report_loss(name: str, error: BaseException | None) -> None:
    """End a block whose permit was lost.

    :param error: the exception of the block, which gets a note; None if it raised none
    :raises LeaseLost: if `error` is None
    """
    if error is None:
        raise lease_lost(name, 1)
    error.add_note(f"the permit of semaphore {name!r} was lost")


def lease_lost(name: str, n: int) -> LeaseLost:
    """Return the error for a holder."""
    return LeaseLost(f"semaphore {name!r}: {n} permit(s) lost; others may have had them")


def no_permit(name: str, timeout: float | None) -> TimeoutError:
    """Return the error for a caller of `hold`."""
    return TimeoutError(f"semaphore {name!r}: no permit within {timeout:g} s")
