"""All connections of a pool, and the queue in which idle ones and waiters meet.

Everything is synchronous and lock-free, and may be called from any thread, except what says
otherwise. A connection is borrowed while it is in `in_use`: to remove it from there is to claim the
right to say what becomes of it.
"""

from __future__ import annotations

from collections import deque
from enum import Enum
from operator import attrgetter
from typing import TYPE_CHECKING, Any, Generic, TypeVar, Union

from .._handoff import HandoffQueue, Mailbox
from .._park import ki_protected
from ._entry import FOREVER, IMMEDIATELY, Failure, PoolEntry, State

if TYPE_CHECKING:
    from collections.abc import Callable

    from .._park import Waiter
    from ._options import Options

T = TypeVar("T")

_idle_since = attrgetter("idle_since")


class Disposition(Enum):
    """What to do with a connection that is not in use."""

    HAND_OUT = "hand out"
    RESET = "reset"
    CHECK = "check"
    CLOSE = "close"


class Inventory(HandoffQueue[Union[PoolEntry[T], Failure]], Generic[T]):
    """Connections by what they are available for, and the waiters.

    While it is closed, every waiter is handed the reason.

    :param closed: the reason why it is closed
    """

    __slots__ = (
        "closed", "entries", "fresh", "has_capacity", "in_use", "is_closed", "jobs", "lifo",
        "max_idle", "next_deadline", "reclaimed", "stale", "wanted",
    )  # fmt: skip

    def __init__(self, options: Options, closed: Failure) -> None:
        super().__init__()
        self.max_idle: float = options.max_idle
        self.is_closed: Callable[[T], bool] | None = options.is_closed
        self.fresh = options.fresh
        self.lifo: bool = options.lifo
        self.closed: Failure | None = closed
        # For maintenance: functions to call, and entries to decide about; see `hand_over`. It looks
        # for work after each.
        self.jobs: Mailbox[Callable[[], object] | PoolEntry[T]] = Mailbox()
        # Whether a caller that did not wait would have liked a connection.
        self.wanted = False
        # No later than when a waiter has waited, or a borrower has reset a connection, for too
        # long. Maintenance looks then.
        self.next_deadline = FOREVER
        # All that are connected and not yet closed, by their keys.
        self.entries: dict[int, PoolEntry[T]] = {}
        self.in_use: dict[int, PoolEntry[T]] = {}
        # Idle, but to be checked before they are handed out. The fresh ones are in `items`.
        self.stale: deque[PoolEntry[T]] = deque()
        # Connections that were closed while borrowed, until their borrowers give them back.
        self.reclaimed: dict[int, T] = {}
        # Whether one more connection may be opened. Maintenance writes it before it looks at the
        # waiters; a waiter reads it after it can be seen.
        self.has_capacity = False

    def disposition(self, entry: PoolEntry[T], now: float) -> Disposition:
        """Decide what is to be done with an entry that is not in use.

        `ConnectionPool.acquire`, `ConnectionPool.release`, `Validation._finish_return` and `pick`
        contain the test for HAND_OUT: on the hot path, see docs/performance.md.
        """
        if entry.evict_at(self.max_idle) <= now or self.has_closed(entry):
            return Disposition.CLOSE
        if not entry.is_reset:
            return Disposition.RESET
        is_fresh = entry.fresh_until > now and not entry.is_suspect
        return Disposition.HAND_OUT if is_fresh else Disposition.CHECK

    def has_closed(self, entry: PoolEntry[T]) -> bool:
        """Return whether the driver calls the connection closed."""
        if self.is_closed is None or entry.connection is None:
            return False
        try:
            return self.is_closed(entry.connection)
        except Exception:
            return True

    # -- Calling maintenance.

    @ki_protected
    def wake(self) -> None:
        """Have maintenance look for work."""
        self.jobs.post(_nothing)

    @ki_protected
    def want(self) -> None:
        """Have a connection made ready for a caller that does not wait."""
        self.jobs.post(self._want)

    def _want(self) -> None:
        self.wanted = True

    @ki_protected
    def hand_over(self, entry: PoolEntry[T]) -> None:
        """Have maintenance decide about an entry that is not in use; see `Validation.settle`."""
        self.jobs.post(entry)

    @ki_protected
    def watch(self, deadline: float) -> None:
        """Have maintenance look at `deadline`. To be called on the event loop of the pool."""
        if deadline < self.next_deadline:  # otherwise it looks early enough
            self.next_deadline = deadline
            self.wake()

    # -- Checking in.

    @ki_protected
    def freshen(self, entry: PoolEntry[T], now: float) -> None:
        """Let `entry` be handed out without a check for a while."""
        entry.fresh_until = min(entry.evict_at(self.max_idle), now + self.fresh)

    @ki_protected
    def check_in(self, entry: PoolEntry[T], now: float) -> None:
        """Make an entry available that is open, reset and not in use, or hand it over."""
        todo = self.disposition(entry, now)
        if todo is Disposition.HAND_OUT:
            self.put(entry)
        elif todo is Disposition.CHECK:
            self.lay_aside(entry)
        else:
            self.hand_over(entry)

    @ki_protected
    def put(self, item: PoolEntry[T] | Failure, first: bool = False) -> None:
        """Hand out `item`, or make it available.

        :param first: whether it is the next to be handed out even without `lifo`, because nobody
            has used it since it became idle
        """
        if item.expires == IMMEDIATELY:
            # A failure is of no use to later callers. An entry was retired on its way to a waiter.
            if isinstance(item, PoolEntry):
                self.hand_over(item)
            return
        if self.waiters and self.closed is None:
            self.give(item)
            return
        if self.lifo or first:
            self.items.append(item)
        else:
            self.items.appendleft(item)
        if self.waiters or self.closed is not None:
            self.dispatch()

    @ki_protected
    def put_back(self, item: PoolEntry[T] | Failure) -> None:
        if isinstance(item, PoolEntry):  # a failure is of no use to later callers
            super().put_back(item)
            if self.closed is not None:  # since `put` looked: maintenance has to close the entry
                self.wake()

    @ki_protected
    def lay_aside(self, entry: PoolEntry[T]) -> None:
        """Keep an idle entry that has to be checked before it is handed out."""
        self.stale.append(entry)
        # Look last: the waiters did not see it, and the caller may not become a waiter.
        if self.waiters or self.closed is not None:
            self.wake()

    # -- Waiters.

    @ki_protected
    def join(self, waiter: Waiter, deadline: float | None = None) -> None:
        self.waiters[waiter] = deadline
        if self.items or self.closed is not None:
            self.dispatch()
        if self.has_capacity or self.stale:
            self.wake()

    @ki_protected
    def dispatch(self) -> None:
        super().dispatch()
        reason = self.closed
        if reason is not None:
            while self.waiters:
                self.fail(reason)
            self.wake()

    @ki_protected
    def fail(self, failure: Failure) -> None:
        """Hand `failure` to all waiters."""
        self.items.extend([failure] * len(self.waiters))
        super().dispatch()
        try:
            while True:
                self.items.remove(failure)
        except (ValueError, IndexError):  # the latter: changed by another thread
            pass

    @ki_protected
    def close(self, reason: Failure) -> None:
        """Serve nobody from now on. The waiters are told before this returns."""
        self.closed = reason
        self.dispatch()

    # -- Checking out.

    @ki_protected
    def pick(self, now: float, may_wait: bool) -> PoolEntry[T] | None:
        """Take an idle entry, or return None.

        :param may_wait: whether the caller will wait, so that it need not take a stale entry
        """
        while True:
            item = self.get_nowait(None)
            if item is None:
                break
            if isinstance(item, Failure):
                continue
            if item.fresh_until > now:
                if self.is_closed is not None and self.has_closed(item):
                    self.hand_over(item)
                    continue
                if may_wait and self.stale and not self.lifo:
                    # Otherwise stale ones would be passed over as long as there are fresh ones.
                    self.want()
                return item
            self.lay_aside(item)
        if may_wait or self.waiters:
            return None
        return self._pick_stale(now)

    @ki_protected
    def _pick_stale(self, now: float) -> PoolEntry[T] | None:
        for entry in sorted(self._copy(self.stale), key=_idle_since, reverse=self.lifo):
            usable = not entry.is_suspect and not self.has_closed(entry)
            if usable and entry.evict_at(self.max_idle) > now and self.take(entry):
                return entry
        if self.stale:
            self.wake()
        return None

    @ki_protected
    def take(self, entry: PoolEntry[T]) -> bool:
        """Remove an idle entry; return False if it is borrowed, or on its way to a waiter."""
        for available in self.stale, self.items:
            entries: deque[Any] = available
            try:
                entries.remove(entry)
            except (ValueError, IndexError):  # the latter: changed by another thread
                continue
            return True
        return False

    # -- Looking.

    def _copy(self, available: deque[Any]) -> list[PoolEntry[T]]:
        """Return the entries of `items` or `stale`."""
        while True:
            try:
                return [entry for entry in available.copy() if isinstance(entry, PoolEntry)]
            except RuntimeError:
                pass  # changed by another thread

    def available(self) -> list[PoolEntry[T]]:
        """Return the idle entries, the one that was used last at the end."""
        found: list[PoolEntry[T]] = []
        for available in self.stale, self.items:
            entries = self._copy(available)
            found += entries if self.lifo else entries[::-1]
        return sorted(found, key=_idle_since)

    def idle(self) -> int:
        """Return the number of available entries."""
        return len(self.items) + len(self.stale)

    def borrowed(self) -> list[PoolEntry[T]]:
        """Return the entries that are borrowed, in the order in which they were taken."""
        return list(self.in_use.copy().values())

    def count(self, *states: State) -> int:
        """Return the number of entries in one of `states`."""
        return sum(entry.state in states for entry in self.entries.copy().values())


def _nothing() -> None:
    """Do nothing: a job that only wants maintenance to look."""
