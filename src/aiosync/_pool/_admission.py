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
        # The attempts that have no permit yet, the oldest first, each with the scope of its wait.
        # They have not begun, so they can be stopped at any time.
        self._waiting: dict[PoolEntry[T], CancelScope] = {}
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
        return bool(self._waiting)

    def join(self, entry: PoolEntry[T]) -> None:
        """Register an attempt that will call `admit`."""
        self._waiting[entry] = CancelScope(shield=True)

    def leave(self, entry: PoolEntry[T]) -> None:
        """Unregister an attempt that does not wait any more."""
        self._waiting.pop(entry, None)
        if not self._waiting:
            self._core.inventory.wanted = False

    async def admit(self, entry: PoolEntry[T]) -> bool:
        """Take a permit for the attempt `entry`. Return whether it should connect now.

        :raises PoolMisuse: if the limit is not ready for use, or others use it with other settings
        """
        scope = self._waiting.get(entry)
        if scope is None:  # stopped before its task began
            return False
        try:
            with scope:
                # A replacement does not wait: the old connection keeps its permit until it closes,
                # and the replacement is optional.
                entry.permit = await self._core.options.limit.take_for_pool(
                    blocking=entry.replaces is None
                )
            self.stop_needless()
        except (RuntimeError, ValueError) as error:
            raise PoolMisuse(f"limit of the pool: {error}") from error
        finally:
            self.leave(entry)
        if entry.permit is None or entry.state is State.CLOSED:
            return False
        entry.permit.on_loss(current_token(), partial(self._lost, entry))
        entry.since = self._core.clock()
        return True

    def _lost(self, entry: PoolEntry[T]) -> None:
        entry.retire("limit")
        self._core.post(partial(self._closing.close, entry, "limit"))

    def stop_needless(self) -> None:
        """Stop the newest of the attempts that wait for a permit, if fewer are needed."""
        waiting = [entry for entry in self._waiting if entry.replaces is None]
        if not waiting:
            return
        core = self._core
        for entry in waiting:
            # The attempt has not begun, so earlier drains and failures do not apply to it.
            entry.failures, entry.expires = core.backoff.failures, FOREVER
        for entry in waiting[::-1][: surplus(core.situation())]:
            self._stop(entry)

    def cancel(self) -> None:
        """Stop the attempts that wait for a permit."""
        for entry in [*self._waiting]:
            self._stop(entry)

    def _stop(self, entry: PoolEntry[T]) -> None:
        # Forget it at once, so that plans do not count it. Its task ends later.
        self._core.forget_attempt(entry)
        self._waiting.pop(entry).cancel()
