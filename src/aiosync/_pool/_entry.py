"""PoolEntry: one connection, and the explicit state that it is in. Plain data."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from math import inf
from typing import TYPE_CHECKING, Any, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable
    from weakref import ref

    from anyio import Event

    from .._callers import CallSite
    from .._scopes import ShieldedScope
    from ._events import CloseReason
    from ._limit import ConnectionPermit

T = TypeVar("T")

# A moment long ago, for "at once", and one that never comes.
IMMEDIATELY, FOREVER = -inf, inf


class State(Enum):
    """Where a connection is in its life."""

    CONNECTING = "connecting"
    CONFIGURING = "configuring"
    STANDBY = "standby"  # ready, but not lent before the connection that it replaces is gone
    IDLE = "idle"
    IN_USE = "in use"
    RETURNING = "returning"  # given back; its borrower resets it, or maintenance will look at it
    VALIDATING = "validating"  # maintenance checks it
    CLOSING = "closing"
    CLOSED = "closed"


# Inlined on the hot paths of the pool, between IDLE and IN_USE. A connection that is collected is
# CLOSED from any state.
TRANSITIONS: dict[State, frozenset[State]] = {
    State.CONNECTING: frozenset({State.CONFIGURING, State.CLOSED}),
    State.CONFIGURING: frozenset({State.IDLE, State.STANDBY, State.CLOSING}),
    State.STANDBY: frozenset({State.IDLE, State.CLOSING}),
    State.IDLE: frozenset({State.IN_USE, State.VALIDATING, State.CLOSING}),
    State.IN_USE: frozenset({State.IDLE, State.RETURNING, State.CLOSING}),
    State.RETURNING: frozenset({State.IDLE, State.CLOSING}),
    State.VALIDATING: frozenset({State.IDLE, State.CLOSING}),
    State.CLOSING: frozenset({State.CLOSED}),
    State.CLOSED: frozenset(),
}


@dataclass(slots=True, eq=False, repr=False)
class PoolEntry(Generic[T]):
    """One connection. It belongs to one at a time: the inventory, a borrower, or maintenance."""

    # When it entered the state; not kept for IDLE and IN_USE, which have times of their own.
    since: float
    # How many attempts to connect had failed in a row when this one began.
    failures: int = 0
    # The connection that this one is to replace, in excess of `max_size`.
    replaces: PoolEntry[T] | None = None
    state: State = State.CONNECTING
    # The first connection of a pool has 1.
    number: int = 0
    # Whether a replacement has been started.
    renewed: bool = False
    # None while it is borrowed, if it can be weakly referenced: then only its borrower keeps it,
    # and the pool notices if it is garbage collected.
    connection: T | None = None
    ref: ref[Any] | None = None
    # What `connection` is while it is borrowed.
    kept: T | None = None
    # The key of the entry while it is borrowed: unique, since the connection is alive then.
    key: int = 0
    created: float = 0.0
    # From when on it may not be handed out any more, and why.
    expires: float = FOREVER
    retired: CloseReason = "lifetime"
    # Until when it may be handed out without a check, if it is idle.
    fresh_until: float = IMMEDIATELY
    # Whether nothing has to be reset since it was last used.
    is_reset: bool = True
    # Whether the block of its last borrower raised, so that it is to be checked.
    is_suspect: bool = False
    idle_since: float = 0.0
    # When it was last used or checked.
    keepalive_from: float = 0.0
    # When it was last borrowed.
    taken: float = 0.0
    # How often it was borrowed; for how many seconds in all; and the durations of the last few
    # times, which are not yet in that sum, nor in the statistics.
    uses: int = 0
    usage: float = 0.0
    samples: list[float] = field(default_factory=list)
    # The permit that it has from the option `limit`.
    permit: ConnectionPermit | None = None
    # Why it is closed, and the error that made it useless. Without a close it was collected.
    end: tuple[CloseReason, BaseException | None] = "collected", None
    # If it is an async context manager: tells its task to leave it.
    leave: Event | None = None
    # The scope in which it is connected, checked or reset, or waits for a permit to connect.
    scope: ShieldedScope | None = None
    # How long that reset may still go on, since it has been cancelled.
    grace_until: float = FOREVER
    # The borrower, if the pool looks for leaks, and whether this loan has been reported.
    stack: list[CallSite] = field(default_factory=list)
    borrower: str = ""
    reported: bool = False

    def enter(self, state: State, now: float) -> None:
        """Change the state, by the table above."""
        if state not in TRANSITIONS[self.state]:
            raise AssertionError(f"a connection that is {self.state.value} can't be {state.value}")
        self.state = state
        self.since = now

    def retire(self, reason: CloseReason) -> None:
        """Have it closed as soon as it is not in use."""
        if self.expires != IMMEDIATELY:
            self.retired = reason
            # In this order: a caller that gives it back meanwhile, in another thread, writes
            # `fresh_until` first and looks at `expires` afterwards.
            self.expires = IMMEDIATELY
            self.fresh_until = IMMEDIATELY

    def evict_at(self, max_idle: float) -> float:
        """Return from when on it may not be handed out, checked or not, if it stays idle."""
        return min(self.expires, self.idle_since + max_idle)

    def alive(self) -> T | None:
        """Return the connection, also while it is borrowed; None if it was collected."""
        if self.connection is not None or self.ref is None:
            return self.connection
        found: T | None = self.ref()
        return found

    def trace(self) -> str:
        """Return the stack of the borrower, as in a traceback."""
        return "\n".join(
            f'  File "{file}", line {line}, in {function}' for file, line, function in self.stack
        )

    def __repr__(self) -> str:
        return f"<PoolEntry {self.state.value}: {self.alive()!r}>"


class Failure:
    """What waiters are handed instead of a connection, so that they stop waiting."""

    __slots__ = ("error",)

    # As if it were an entry that is not to be handed out.
    fresh_until = expires = IMMEDIATELY

    def __init__(self, error: Callable[[], Exception]) -> None:
        self.error = error
