"""The queue in which idle connections and those who wait for one meet.

What must live here: what distinguishes a connection from any other item of a `HandoffQueue`. It
gets stale while it lies there, and the queue may be shut. All of it is synchronous, without a lock,
and may be called from any thread.
"""

from __future__ import annotations

from collections import deque
from operator import attrgetter
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar, Union

from .._handoff import HandoffQueue
from .._park import ki_protected
from ._records import NEVER, Failure, Record

if TYPE_CHECKING:
    from collections.abc import Callable

    from .._park import Waiter

T = TypeVar("T")

_idle_since = attrgetter("idle_since")


class IdleQueue(HandoffQueue[Union[Record[T], Failure]], Generic[T]):
    """Idle connections that may be handed out as they are, and those that may not.

    While it is shut, every waiter is handed the reason.
    """

    __slots__ = ("call_keeper", "dormant", "hand_over", "lifo", "max_idle", "room", "shut")

    def __init__(
        self,
        lifo: bool,
        max_idle: float,
        shut: Failure,
        call_keeper: Callable[[], object],
        hand_over: Callable[[Record[T], Literal["check", "reset"]], object],
    ) -> None:
        super().__init__()
        self.lifo = lifo
        self.max_idle = max_idle
        # Has the keeper see to who waits; and to a connection that nobody else has.
        self.call_keeper = call_keeper
        self.hand_over = hand_over
        # Idle as well, but to be checked, or replaced, by the keeper before anybody gets them.
        self.dormant: deque[Record[T]] = deque()
        # Whether there may be one connection more. Written by the keeper before it looks at the
        # waiters; read by a waiter after it can be seen.
        self.room = False
        # Why nobody is served; None if the pool is open.
        self.shut: Failure | None = shut

    def open(self) -> None:
        self.shut = None

    @ki_protected
    def close(self, reason: Failure) -> None:
        """Serve nobody from now on. Those who wait are told so before this returns."""
        self.shut = reason
        self.dispatch()

    @ki_protected
    def put(self, item: Record[T] | Failure, first: bool = False) -> None:
        """Let somebody have `item`.

        :param first: whether it is next, although it is not `lifo`: nobody has used it since it was
            idle
        """
        if item.good_until == NEVER:
            # Handed over, and not taken. A failure is of no use to others; a connection that was
            # retired meanwhile is the keeper's.
            if isinstance(item, Record):
                self.hand_over(item, "reset")
            return
        if self.lifo or first:
            self.items.append(item)
        else:
            self.items.appendleft(item)
        if self.waiters or self.shut is not None:
            self.dispatch()

    @ki_protected
    def put_back(self, item: Record[T] | Failure) -> None:
        if isinstance(item, Record):  # a failure is not kept for later waiters
            super().put_back(item)

    @ki_protected
    def join(self, waiter: Waiter, deadline: float | None = None) -> None:
        self.waiters[waiter] = deadline
        if self.items or self.shut is not None:
            self.dispatch()
        if self.room or self.dormant:
            self.call_keeper()

    @ki_protected
    def dispatch(self) -> None:
        super().dispatch()
        reason = self.shut
        if reason is not None:
            while self.waiters:
                self.fail(reason)
            self.call_keeper()

    @ki_protected
    def fail(self, failure: Failure) -> None:
        """Hand `failure` to all who wait."""
        self.items.extend([failure] * len(self.waiters))
        super().dispatch()
        try:
            while True:
                self.items.remove(failure)
        except ValueError:
            pass

    @ki_protected
    def pick(self, now: float, patient: bool) -> Record[T] | None:
        """Take an idle connection; None if there is none that may be handed out.

        :param patient: whether the caller will wait for one that has to be checked before
        """
        while True:
            item = self.get_nowait(None)
            if item is None:
                break
            if isinstance(item, Failure):
                continue
            if item.good_until > now:
                if patient and self.dormant and not self.lifo:
                    # Or else others would be passed over for as long as one is good. The next gets
                    # the one that is checked meanwhile.
                    try:
                        self.hand_over(self.pop_dormant(), "check")
                    except IndexError:
                        pass  # the keeper took it
                return item
            self.lay_aside(item)
        if patient or self.waiters:
            return None
        found, spoiled = None, []
        while self.dormant and found is None:
            try:
                record = self.pop_dormant()
            except IndexError:
                break  # the keeper took it
            if self.spoils_at(record) <= now:
                spoiled.append(record)
            else:
                found = record
        if spoiled:
            self.dormant.extend(spoiled)
            self.call_keeper()
        return found

    @ki_protected
    def pop_dormant(self) -> Record[T]:
        """Take the one that is next.

        :raises IndexError: if there is none
        """
        choose = max if self.lifo else min
        while True:
            try:
                record = choose(self.dormant.copy(), key=_idle_since, default=None)
                if record is not None:
                    self.dormant.remove(record)
            except (ValueError, IndexError, RuntimeError):
                continue  # somebody else took it, or has changed it meanwhile
            if record is None:
                raise IndexError
            return record

    @ki_protected
    def lay_aside(self, record: Record[T]) -> None:
        """Keep an idle connection that may not be handed out as it is."""
        self.dormant.append(record)
        # Looked at last: who came before has not seen it, and the caller may not come to wait.
        if self.waiters:
            self.call_keeper()

    def idle(self) -> int:
        return len(self.items) + len(self.dormant)

    def spoils_at(self, record: Record[T]) -> float:
        """Return from when on an idle connection may not be handed out, checked or not."""
        return min(record.expires, record.idle_since + self.max_idle)

    def snapshot(self) -> list[Record[T]]:
        """Return those that are idle, the one that was not used for longest first."""
        found: list[Record[T]] = []
        for where in self.dormant, self.items:
            pile: deque[Any] = where
            while True:
                try:
                    records = [record for record in pile.copy() if isinstance(record, Record)]
                    break
                except RuntimeError:
                    pass  # somebody has changed it meanwhile
            found += records if self.lifo else records[::-1]
        return sorted(found, key=_idle_since)

    def take_out(self, unwanted: Callable[[Record[T]], bool]) -> list[Record[T]]:
        """Remove and return the idle connections that are `unwanted`."""
        return [record for record in self.snapshot() if unwanted(record) and self.take(record)]

    def take(self, record: Record[T]) -> bool:
        """Remove an idle connection; False if somebody else has."""
        for where in self.dormant, self.items:
            pile: deque[Any] = where
            try:
                pile.remove(record)
            except (ValueError, IndexError):  # the latter: changed meanwhile
                continue
            return True
        return False
