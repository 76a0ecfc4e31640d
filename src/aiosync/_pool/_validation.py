"""What happens to a connection between two borrowers: reset and check.

Each step has a deadline, is shielded from cancellation, and ends by passing its connection on
synchronously: to the inventory, or to `Closing.discard`. So a slot always comes back.
"""

from __future__ import annotations

from contextlib import suppress
from functools import partial
from inspect import isawaitable
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar

from anyio import CancelScope, fail_after, get_cancelled_exc_class

from .._park import ki_protected
from .._scopes import current_task_id, shielded_scope
from ._entry import FOREVER, State
from ._inventory import Disposition

if TYPE_CHECKING:
    from ._closing import Closing
    from ._core import Core
    from ._entry import PoolEntry

T = TypeVar("T")
Step = Literal["check", "reset"]

_CLOSED = (State.CLOSING, State.CLOSED)
_FAILED = object()


class Validation(Generic[T]):
    """Resets and checks connections, and makes them available. On the event loop of the pool."""

    # The first two are for `aiosync.debug`.
    __slots__ = ("_begun", "_closing", "_core", "_record")

    def __init__(self, core: Core[T], closing: Closing[T]) -> None:
        self._core = core
        self._closing = closing

    def make_available(self, entry: PoolEntry[T], *, is_new: bool) -> None:
        """Make available an entry that is new, or was checked."""
        now = self._core.clock()
        entry.is_suspect = False
        entry.keepalive_from = now
        if is_new:  # a check is no use of the connection
            entry.idle_since = now
        entry.enter(State.IDLE, now)
        if self._core.inventory.disposition(entry, now) is Disposition.CLOSE:
            self._evict(entry, now)
            return
        self._core.inventory.freshen(entry, now)
        self._core.inventory.put(entry, first=not is_new)

    def _evict(self, entry: PoolEntry[T], now: float) -> None:
        if entry.expires <= now:
            self._closing.discard(entry, entry.retired)
        elif entry.evict_at(self._core.inventory.max_idle) <= now:
            self._closing.discard(entry, "idle")
        else:
            self._closing.discard(entry, "check", ConnectionError("the connection is closed"))

    def settle(self, entry: PoolEntry[T]) -> None:
        """Reset, close or make available an entry that is not in use."""
        if entry.state in _CLOSED:
            return  # it took too long to come here
        now = self._core.clock()
        todo = self._core.inventory.disposition(entry, now)
        if todo is Disposition.CLOSE:
            self._evict(entry, now)
        elif self._core.inventory.closed is not None:
            self._closing.discard(entry, "shutdown")
        elif todo is Disposition.RESET:
            with suppress(get_cancelled_exc_class()):  # of a cancelled Future; it counts as failed
                self.reset_in_background(entry)
        else:
            if entry.state is not State.IDLE:
                entry.enter(State.IDLE, now)
            self._core.inventory.check_in(entry, now)

    def check(self, entry: PoolEntry[T]) -> None:
        """Check an entry; in a task, if the hook is async."""
        entry.enter(State.VALIDATING, self._core.clock())
        try:
            result = self._core.tasks.begin(self._core.options.check, entry.connection)
        except (Exception, get_cancelled_exc_class()) as error:
            self._validated(entry, "check", error)
            return
        if isawaitable(result):
            self._core.tasks.start(self._check, entry, result)
        else:
            self._validated(entry, "check", _refusal(result))

    async def _check(self, entry: PoolEntry[T], result: Any) -> None:
        error: BaseException | None = ConnectionError("check() was cancelled")
        try:
            with fail_after(self._core.options.check_timeout, shield=True) as entry.scope:
                error = _refusal(await self._core.tasks.finish(result))
        except Exception as caught:
            error = caught
        finally:
            entry.scope = None
            self._validated(entry, "check", error)
            self._core.wake()
            del error  # break the reference cycle through the traceback

    def _validated(self, entry: PoolEntry[T], step: Step, error: BaseException | None) -> None:
        if entry.state in _CLOSED:
            return
        if error is None:
            self.make_available(entry, is_new=False)
        else:
            self._closing.discard(entry, step, error)

    async def check_all(self) -> None:
        """Check the idle entries, one after the other, so that the others are available."""
        inventory = self._core.inventory
        idle = inventory.available()
        # The one that is checked last is handed out first.
        for entry in idle if inventory.lifo else reversed(idle):
            if inventory.take(entry):
                entry.enter(State.VALIDATING, self._core.clock())
                check = self._core.tasks.call(self._core.options.check, entry.connection)
                await self._check(entry, check)

    # -- Resets, in the task of a borrower or in one of the pool.

    @ki_protected
    def reset_here(self, entry: PoolEntry[T]) -> Any:
        """Reset an entry at the end of the block of its borrower.

        :return: what is left to await; None if the hook is plain
        """
        result = self._begin_reset(entry)
        if isawaitable(result):
            return self._finish_reset(entry, result)
        if result is not _FAILED:
            self._finish_return(entry)
        return None

    @ki_protected
    def reset_in_background(self, entry: PoolEntry[T]) -> None:
        """Reset an entry at once if the hook is plain, and otherwise in a task of the pool."""
        rest = self.reset_here(entry)
        if rest is not None:
            # It can't take too long before it has begun.
            entry.since = entry.grace_until = FOREVER
            self._core.post(partial(self._core.tasks.start, self._reset, entry, rest))

    async def _reset(self, entry: PoolEntry[T], rest: Any) -> None:
        entry.since = self._core.clock()
        # Inside of a scope, a cancellation is repeated until the hook ends. Otherwise a hook that
        # ignores the first one would keep the pool from being closed.
        with CancelScope():
            await rest

    def _begin_reset(self, entry: PoolEntry[T]) -> Any:
        try:
            return self._core.tasks.begin(self._core.options.reset, entry.connection)
        except Exception as error:
            self._core.post(partial(self._validated, entry, "reset", error))
            return _FAILED
        except BaseException:
            interrupted = ConnectionError("reset() was interrupted")
            self._core.post(partial(self._validated, entry, "reset", interrupted))
            raise

    @ki_protected
    async def _finish_reset(self, entry: PoolEntry[T], result: Any) -> None:
        """Await a reset, shielded. Maintenance cancels it if it takes too long.

        If it is cancelled natively, or closed, the connection is closed in the background.
        """
        error: BaseException | None = ConnectionError("reset() was cancelled")
        task, ids = current_task_id(), self._core.tasks.ids
        is_of_pool = task in ids  # if a hook has borrowed the connection, or in the background
        ids.add(task)
        try:
            with shielded_scope() as scope:
                entry.scope = scope
                self._core.inventory.watch(entry.since + self._core.options.check_timeout)
                await result
                error = None
            if scope.cancel_called and error is not None:
                limit: float = self._core.options.check_timeout
                error = TimeoutError(f"reset() took longer than {limit:g} s")
        except Exception as caught:
            error = caught
        finally:
            if not is_of_pool:
                ids.discard(task)
            entry.scope = None
            entry.grace_until = FOREVER
            if entry.state is not State.RETURNING:
                pass  # maintenance has taken it over
            elif error is None:
                self._finish_return(entry)
            else:
                self._core.post(partial(self._validated, entry, "reset", error))
            del error  # break the reference cycle through the traceback

    @ki_protected
    def _finish_return(self, entry: PoolEntry[T]) -> None:
        """Make available an entry that its borrower has reset, or hand it over."""
        inventory = self._core.inventory
        now = self._core.clock()
        entry.is_reset = True
        entry.idle_since = now
        # Inlined: `Inventory.freshen` and `Inventory.disposition`.
        fresh_until = now + inventory.fresh
        entry.fresh_until = fresh_until if fresh_until < entry.expires else entry.expires
        is_fresh = entry.fresh_until > now
        if inventory.is_closed is not None and inventory.has_closed(entry):
            is_fresh = False
        if inventory.closed is None and is_fresh and not entry.is_suspect:
            entry.state = State.IDLE
            inventory.put(entry)
        else:
            inventory.hand_over(entry)


def _refusal(result: object) -> BaseException | None:
    """Return what is wrong if `check` returned `result`."""
    return ConnectionError("check() returned False") if result is False else None
