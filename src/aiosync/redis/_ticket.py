"""One request of a task or thread, which waits for the answer of the server."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .._park import checkpoint, wait_with_timeout, wake_all

if TYPE_CHECKING:
    from .._park import Waiter


class Ticket:
    """A request and its outcome. Removing the only entry of `_undecided` is the right to decide it.

    The conductor settles it with an outcome. The owner, a task of any event loop or a thread, may
    withdraw it.
    """

    __slots__ = ("_undecided", "number", "outcome", "waiter")

    def __init__(self, waiter: Waiter) -> None:
        self.waiter: Waiter = waiter
        # Set by the conductor, in the order of the requests. It identifies the ticket on the
        # server.
        self.number: int = 0
        # Written before the decision, and read only if the conductor has decided.
        self.outcome: Any = None
        self._undecided = [True]

    def _decide(self) -> bool:
        try:
            return self._undecided.pop()
        except IndexError:
            return False

    @property
    def decided(self) -> bool:
        """Whether the ticket was settled or withdrawn."""
        return not self._undecided

    def settle(self, outcome: object) -> bool:
        """Decide with `outcome`, and wake the owner. Return False if it is decided already."""
        if self.decided:
            return False  # the owner may not have read the first outcome yet
        self.outcome = outcome
        if not self._decide():
            return False
        wake_all([self.waiter])
        return True

    def withdraw(self) -> bool:
        """Decide that the owner leaves. Return False if there is an outcome already."""
        return self._decide()

    async def wait(self, timeout: float | None) -> bool:
        """Sleep until there is an outcome. Return False, and withdraw, if there is none in time.

        If this is interrupted or cancelled, the caller has to call `withdraw`.
        """
        if self.waiter.done():  # so awaiting it does not yield
            await checkpoint()
        await (self.waiter if timeout is None else wait_with_timeout(self.waiter, timeout))
        return not self.withdraw()

    async def wait_for_outcome(self) -> Any:
        """Sleep until there is an outcome, and return it. Withdraw if this is interrupted.

        :raises Exception: if the outcome is one
        """
        try:
            # A task with several tickets may have waited for another one when this one was settled.
            # Under trio, that wake is not repeated.
            if not self.decided:
                await self.wait(None)
        except BaseException:
            self.withdraw()
            raise
        return self.result()

    def result(self) -> Any:
        """Return the outcome.

        :raises Exception: if it is one
        """
        if isinstance(self.outcome, Exception):
            # A copy: the same error may be the outcome of several tickets.
            error = type(self.outcome)(*self.outcome.args)
            error.__cause__ = self.outcome.__cause__
            raise error
        return self.outcome
