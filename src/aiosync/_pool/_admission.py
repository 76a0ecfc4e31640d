"""Permits to connect, from a limit that pools share. Runs on the event loop of the pool."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Generic, TypeVar

from anyio import CancelScope

from .._errors import PoolMisuse
from .._park import current_token
from ._entry import FOREVER, State
from ._policy import surplus

if TYPE_CHECKING:
    from collections.abc import Callable

    from ._closing import Closing
    from ._core import Core
    from ._entry import PoolEntry

T = TypeVar("T")


class Admission(Generic[T]):
    """Takes a permit of the option `limit` before each connect."""

    def __init__(self, core: Core[T], closing: Closing[T]) -> None:
        self._core = core
        self._closing = closing
        self._unwatch: Callable[[], object] = bool

    def begin(self) -> None:
        """Close an idle connection from time to time while other pools wait for a permit."""
        limit = self._core.options.limit
        if limit is not None:
            self._unwatch = limit.watch_contention(partial(self._core.post, self._yield_one))

    def end(self) -> None:
        """End what `begin` has begun."""
        self._unwatch()

    def _yield_one(self) -> None:
        inventory = self._core.inventory
        if not inventory.waiters:
            for entry in inventory.available()[:1]:
                self._closing.close(entry, "limit")

    @property
    def is_waiting(self) -> bool:
        """Whether an attempt waits for a permit."""
        has_limit = self._core.options.limit is not None
        return has_limit and any(entry.permit is None for entry in self._core.attempts)

    async def admit(self, entry: PoolEntry[T]) -> bool:
        """Take a permit for the attempt `entry`. Return whether it should connect now.

        :raises PoolMisuse: if the limit is not ready for use, or others use it with other settings
        """
        if entry not in self._core.attempts or self._core.stopping:
            return False  # stopped before its task began
        try:
            with CancelScope(shield=True) as entry.scope:
                # A replacement does not wait: the old connection keeps its permit until it closes,
                # and the replacement is optional.
                entry.permit = await self._core.options.limit.take_for_pool(
                    blocking=entry.replaces is None
                )
            self.stop_needless(entry)
        except (RuntimeError, ValueError) as error:
            raise PoolMisuse(f"limit of the pool: {error}") from error
        if not self.is_waiting:
            self._core.inventory.wanted = False
        if entry.permit is None or entry.state is State.CLOSED:
            return False
        entry.permit.on_loss(current_token(), partial(self._lost, entry))
        entry.since = self._core.clock()
        return True

    def _lost(self, entry: PoolEntry[T]) -> None:
        entry.retire("limit")
        self._core.post(partial(self._closing.close, entry, "limit"))

    def stop_needless(self, admitted: PoolEntry[T] | None = None) -> None:
        """Stop the newest of the attempts that wait for a permit, if fewer are needed.

        :param admitted: one that has just got its permit, and may be stopped too
        """
        core = self._core
        # They have not begun, so they can be stopped at any time.
        waiting = [
            entry
            for entry in core.attempts
            if entry.replaces is None and (entry.permit is None or entry is admitted)
        ]
        if core.options.limit is None or not waiting:
            return
        for entry in waiting:
            # The attempt has not begun, so earlier drains and failures do not apply to it.
            entry.failures, entry.expires = core.backoff.failures, FOREVER
            entry.retired = "lifetime"
        for entry in waiting[::-1][: surplus(core.situation())]:
            # Forget it at once, so that plans do not count it. Its task ends later.
            core.forget_attempt(entry)
            if entry.scope is not None:  # otherwise its task has not begun
                entry.scope.cancel()
