"""The holders and waiters of one object: plain data, and the calls that change it.

Every method may be called from any thread, signal handler or finalizer: each changes a dict by a
single C call, and none takes a lock.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol
from weakref import WeakSet, ref

from .._callers import call_site
from .._park import real_clock
from ._caller import UNKNOWN, current_caller

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from .._callers import CallSite
    from .._errors import BrokenReason
    from ._caller import Caller

    class View(Protocol):
        """What an observed object can tell of its state."""

        def observed_state(self) -> str:
            """Return its figures, such as "value=0"."""
            ...

        def observed_missing(self) -> int:
            """Return how many parties, permits or connections are missing until a waiter can go on.

            It is 0 if a waiter can go on already, or if that cannot be told.
            """
            ...


log = logging.getLogger("aiosync.debug")

# "got": a permit, a connection, or the other parties. "timeout": nothing in time. "failed": the
# barrier was broken, the pool was closed, and so on.
Outcome = Literal["got", "timeout", "cancelled", "failed"]

# What an object is, whatever the name of its class. Locks are semaphores.
Role = Literal["semaphore", "barrier", "pool", "event"]


class Attempt(NamedTuple):
    """A call that did not wait: it got what was free, or there was nothing."""

    outcome: Outcome
    seconds: float


class BrokenRound(NamedTuple):
    """A round of a barrier that was broken. It is told once, however many parties it had."""

    reason: BrokenReason


class Wait:
    """One call of `acquire`, `wait` or the like that has not returned."""

    __slots__ = ("caller", "record", "reported", "scoped", "since", "site", "timeout")

    def __init__(self, record: Record, timeout: float | None, scoped: bool) -> None:
        self.record: Record = record
        self.timeout: float | None = timeout
        # Whether it is made by a ``with`` block, which also releases what it takes.
        self.scoped: bool = scoped
        # Whether the watchdog has told of it.
        self.reported: bool = False
        self.caller: Caller = current_caller() if record.names_callers else UNKNOWN
        self.site: CallSite | None = call_site() if record.names_callers else None
        self.since: float = real_clock()


class Hold:
    """A permit or connection that is held."""

    __slots__ = ("caller", "is_kept", "item", "record", "scoped", "since", "site")

    def __init__(
        self,
        record: Record,
        wait: Wait | None,
        item: object,
        is_kept: Callable[[], bool] | None,
    ) -> None:
        self.record: Record = record
        self.scoped: bool = wait is not None and wait.scoped
        # The pool entry; None if the permits are all alike.
        self.item: object = item
        # Returns False once it was lost, or taken away by force.
        self.is_kept: Callable[[], bool] | None = is_kept
        self.caller: Caller = UNKNOWN
        self.site: CallSite | None = None
        if wait is not None:
            self.caller, self.site = wait.caller, wait.site
        elif record.names_callers:
            self.caller, self.site = current_caller(), call_site()
        self.since: float = real_clock()


class Listener(Protocol):
    """What is told of the changes of a record."""

    def wait_began(self, wait: Wait) -> None:
        """Take note that `wait` is in ``wait.record.waits`` now."""

    def wait_ended(self, wait: Wait, outcome: Outcome) -> None:
        """Take note that it is not any more."""

    def hold_began(self, hold: Hold) -> None:
        """Take note that `hold` is in ``hold.record.holds`` now."""

    def hold_ended(self, hold: Hold) -> None:
        """Take note that it is not any more."""

    def happened(self, record: Record, event: Any) -> None:
        """Take note of an event: a `PoolEvent`, a `Step`, an `Attempt` or a `BrokenRound`."""


class Record:
    """What is known about one object and all of its views.

    To be created when the object is.

    :param role: what it is
    :param kind: the public name of its class
    :param capacity: how many permits there are, free or held
    """

    def __init__(
        self, shared: Any, role: Role, kind: str, name: str | None, capacity: int = 0
    ) -> None:
        self._shared = ref(shared)
        self.role: Role = role
        self.kind: str = kind
        self.name: str | None = name
        self.created: CallSite | None = call_site()
        self.capacity: int = capacity
        # In the order in which they began.
        self.waits: dict[Wait, None] = {}
        self.holds: dict[Hold, None] = {}
        # Those that have an item, by its id.
        self._by_item: dict[int, Hold] = {}
        # Whether others than those in `holds` may let a waiter go on: permits are released by
        # callers that hold none, or the object is used from elsewhere too.
        self.is_open: bool = False
        # The parties of earlier rounds of a barrier.
        self.parties: WeakSet[Caller] = WeakSet()
        self.listeners: tuple[Listener, ...] = ()
        # Whether a listener reads the callers and their lines. To find them takes time; otherwise
        # all callers are `UNKNOWN`.
        self.names_callers: bool = False

    @property
    def shared(self) -> View | None:
        """The object; None if it has been collected."""
        return self._shared()

    @property
    def is_barrier(self) -> bool:
        """Whether it is a barrier, which has parties instead of holders."""
        return self.role == "barrier"

    def __str__(self) -> str:
        if self.name is not None:
            return f"{self.kind} {self.name!r}"
        return f"{self.kind} at {id(self.shared):#x}"

    def begin(self, timeout: float | None, *, scoped: bool = False) -> Wait:
        """Take note that the caller begins to wait."""
        wait = Wait(self, timeout, scoped)
        try:
            self.waits[wait] = None
            self._notify("wait_began", wait)
        except BaseException:  # a signal handler has raised
            self.end(wait, "cancelled")
            raise
        return wait

    def end(self, wait: Wait, outcome: Outcome) -> None:
        """Take note that a wait has ended. May be repeated."""
        if self.waits.pop(wait, False) is False:
            return
        if self.is_barrier and outcome == "got":
            self.parties.add(wait.caller)
        self._notify("wait_ended", wait, outcome)

    def hold(
        self,
        wait: Wait | None = None,
        *,
        item: object = None,
        is_kept: Callable[[], bool] | None = None,
    ) -> Hold:
        """Take note that the caller holds a permit or connection now; see `Hold`.

        :param wait: what it has waited for; None: it did not wait
        """
        hold = Hold(self, wait, item, is_kept)
        if item is not None:
            self._by_item[id(item)] = hold
        try:
            self.holds[hold] = None
            self._notify("hold_began", hold)
        except BaseException:  # a signal handler has raised, and the caller gives it back
            self.drop(hold)
            raise
        return hold

    def drop(self, hold: Hold) -> bool:
        """Take note that a permit or connection was given back; return False if it was before."""
        if self.holds.pop(hold, False) is False:
            return False
        if hold.item is not None and self._by_item.get(id(hold.item)) is hold:
            del self._by_item[id(hold.item)]
        self._notify("hold_ended", hold)
        return True

    def drop_item(self, item: object) -> None:
        """Take note that a connection or ticket was given back. May be repeated."""
        hold = self._by_item.get(id(item))
        if hold is not None:
            self.drop(hold)

    def drop_lost(self) -> None:
        """Drop what was lost, or taken away by force."""
        for hold in list(self.holds):
            if hold.is_kept is not None and not hold.is_kept():
                self.drop(hold)

    def released(self, n: int) -> None:
        """Take note that the caller has released `n` permits, if possible its own latest ones."""
        if not self.names_callers:  # all holds are alike
            self.capacity += max(0, n - len(self.holds))
            for hold in list(self.holds)[:n]:
                self.drop(hold)
            return
        caller = current_caller()
        for _ in range(n):
            # Another thread may drop the same one.
            while not self._drop_one(caller):
                pass

    def _drop_one(self, caller: Caller) -> bool:
        holds = list(self.holds)
        own = next((hold for hold in reversed(holds) if hold.caller is caller), None)
        if own is not None:
            return self.drop(own)
        self.is_open = True
        if holds:
            return self.drop(holds[0])
        self.capacity += 1
        return True

    def tell(self, event: object) -> None:
        """Tell the listeners of an event."""
        self._notify("happened", self, event)

    def _notify(self, method: str, *args: object) -> None:
        for listener in self.listeners:
            try:
                getattr(listener, method)(*args)
            except Exception:  # must not become an error of the program that is observed
                log.exception("%s of %s", method, self)


class Records:
    """Records that are forgotten when their objects are. Any thread may add to it or iterate.

    A `WeakSet` raises RuntimeError if another thread adds to it during an iteration.
    """

    def __init__(self) -> None:
        self._refs: dict[ref[Record], None] = {}

    def add(self, record: Record) -> None:
        """Add a record, unless it is there."""
        self._refs[ref(record, self._forget)] = None

    def discard(self, record: Record) -> None:
        """Remove a record if it is there."""
        self._refs.pop(ref(record), None)

    def _forget(self, dead: ref[Record]) -> None:
        self._refs.pop(dead, None)

    def __iter__(self) -> Iterator[Record]:
        records = [reference() for reference in list(self._refs)]
        return iter([record for record in records if record is not None])

    def __contains__(self, record: Record) -> bool:
        return ref(record) in self._refs
