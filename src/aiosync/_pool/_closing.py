"""The end of a connection: closed, lost, or reported as leaked. On the event loop of the pool."""

from __future__ import annotations

from functools import partial
from inspect import isawaitable
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from anyio import fail_after, get_cancelled_exc_class

from .._park import ki_protected
from ._entry import FOREVER, State
from ._policy import GRACE
from ._statistics import describe, log

if TYPE_CHECKING:
    from ._core import Core
    from ._entry import PoolEntry
    from ._events import CloseReason

T = TypeVar("T")


class Closing(Generic[T]):
    """Closes connections, and gives their slots back whatever `close` does."""

    def __init__(self, core: Core[T]) -> None:
        self._core = core

    def close(self, entry: PoolEntry[T], reason: CloseReason) -> None:
        """Close an entry, at the latest when its borrower gives it back."""
        if entry.state is State.STANDBY or self._core.inventory.take(entry):
            self.discard(entry, reason)
        elif reason != "idle" or entry.renewed:  # otherwise it is on its way to a waiter
            entry.retire(reason)

    def discard(
        self, entry: PoolEntry[T], reason: CloseReason, error: BaseException | None = None
    ) -> None:
        """Close a connection that is not in use."""
        entry.enter(State.CLOSING, self._core.clock())
        if reason == "reset":
            self._core.statistics.count("failed_resets")
            log.warning("%s: reset failed: %s", self._core.name, describe(error))
        elif reason == "check":
            self._core.statistics.count("failed_checks")
            log.info("%s: check failed: %s", self._core.name, describe(error))
        elif reason == "forced":
            log.warning("%s: closing a connection that is borrowed", self._core.name)
        entry.end = reason, error
        try:
            result = self._core.tasks.begin(self._core.options.close, entry.alive())
        except (Exception, get_cancelled_exc_class()) as failure:
            self._close_failed(entry, failure)
        else:
            if isawaitable(result):
                self._core.tasks.start(self._close, entry, result)
                return
        self._end(entry)

    async def _close(self, entry: PoolEntry[T], result: Any) -> None:
        try:
            with fail_after(self._core.options.time_to_close, shield=True):
                await self._core.tasks.finish(result)
        except Exception as failure:
            self._close_failed(entry, failure)
        finally:
            self._end(entry)

    def _close_failed(self, entry: PoolEntry[T], failure: BaseException) -> None:
        self._core.statistics.count("failed_closes")
        log.warning("%s: close failed: %s", self._core.name, describe(failure))
        self._core.emit("close_failed", entry, error=failure)

    def _end(self, entry: PoolEntry[T]) -> None:
        if entry.leave is None:
            self._forget(entry)
        else:
            entry.leave.set()

    def context_left(self, entry: PoolEntry[T], error: BaseException | None) -> None:
        """Take note that the task of a context manager has left it, because of `error` if any."""
        leave, entry.leave = entry.leave, None
        if leave is not None and leave.is_set():
            if error is not None:
                self._close_failed(entry, error)
            self._forget(entry)
            return
        # It has ended by itself.
        log.warning("%s: a connection has ended: %s", self._core.name, describe(error))
        if self._core.inventory.take(entry):
            self.discard(entry, "check", error)
        else:
            entry.retire("check")

    def _forget(self, entry: PoolEntry[T]) -> None:
        """Give the slot of a closed connection back."""
        entry.state = State.CLOSED
        # An error that stays would keep itself and the connection alive by its traceback.
        reason, error = entry.end
        entry.end = "collected", None
        self._core.give_back_permit(entry)
        self._core.inventory.entries.pop(entry.key, None)
        entry.ref = None  # nobody needs to know when it is collected
        self._core.statistics.forget(entry)
        self._core.statistics.count(f"closed_{reason}")
        self._core.wake()
        self._core.emit("closed", entry, reason, error)

    @ki_protected
    def collected(self, entry: PoolEntry[T], _: object) -> None:
        """Take note that the connection was garbage collected. Called by Python."""
        self._core.inventory.in_use.pop(entry.key, None)
        self._core.post(partial(self.lost, entry))

    def lost(self, entry: PoolEntry[T]) -> None:
        """Give the slot of a connection back that was garbage collected."""
        if self._core.inventory.entries.get(entry.key) is entry:
            entry.samples.append(self._core.clock() - entry.taken)
            self._leaked(entry, "it was garbage collected\n" + entry.trace())
            self._forget(entry)

    def _leaked(self, entry: PoolEntry[T], reason: str) -> None:
        self._core.statistics.count("leaks")
        self._core.emit("leaked", entry, reason)

    def report_leak(self, entry: PoolEntry[T]) -> None:
        """Tell that a connection is borrowed for too long, once."""
        entry.reported = True
        stack = entry.trace()
        seconds = self._core.options.leak_timeout
        log.warning(
            "%s: a connection is borrowed for more than %g s by %s\n%s",
            self._core.name,
            seconds,
            entry.borrower,
            stack,
        )
        self._leaked(entry, stack)

    # -- What takes too long.

    def end_reset(self, entry: PoolEntry[T], now: float) -> None:
        """Cancel a reset that takes too long; take its connection over if it ignores that."""
        if entry.grace_until == FOREVER:
            entry.grace_until = now + GRACE
            if entry.scope is not None:  # otherwise its borrower was interrupted just before
                entry.scope.cancel()
        else:
            self.discard(entry, "reset", TimeoutError("reset() can't be cancelled"))

    def cancel(self, *states: State) -> None:
        """Cancel what is done with the connections in these states."""
        for entry in (*self._core.attempts, *self._core.inventory.entries.values()):
            if entry.state in states and entry.scope is not None:
                entry.scope.cancel()

    def close_by_force(self) -> None:
        """Close what is borrowed."""
        inventory, now = self._core.inventory, self._core.clock()
        for entry in inventory.borrowed():
            connection = entry.alive()
            if connection is not None and inventory.in_use.pop(entry.key, None) is entry:
                entry.samples.append(now - entry.taken)
                # Its borrower may let go of it before it is closed.
                entry.connection = inventory.reclaimed[entry.key] = connection
                self.discard(entry, "forced")
