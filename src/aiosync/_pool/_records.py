"""What the pool knows of one connection, and what it tells others of it.

What must live here: plain data. What must not: waiting, deciding, or a call of foreign code.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import FrameType
    from weakref import ref

T = TypeVar("T")

NEVER, ALWAYS = float("-inf"), float("inf")

# Why a connection was closed, each with a statistic of its own, "closed_...".
Reason = Literal[
    "lifetime",  # it reached `max_lifetime`
    "idle",  # nobody wanted it for `max_idle`
    "check",  # `check` failed
    "reset",  # `reset` failed
    "configure",  # `configure` failed
    "discard",  # its borrower said that it is of no use any more
    "drain",
    "resize",  # there are more than `max_size`
    "collected",  # its borrower lost it, and Python collected it
    "shutdown",  # the pool was closed
    "forced",  # the same, while it was borrowed
]
REASONS: tuple[Reason, ...] = (
    "lifetime", "idle", "check", "reset", "configure", "discard", "drain", "resize", "collected",
    "shutdown", "forced",
)  # fmt: skip


class Record(Generic[T]):
    """One connection. In the hands of one at a time: the queue, a borrower, or the keeper."""

    __slots__ = (
        "connection",
        "created",
        "expires",
        "good_until",
        "idle_since",
        "kept",
        "key",
        "queued",
        "ref",
        "reported",
        "retired",
        "stack",
        "taken",
        "usage",
        "uses",
        "waited",
    )

    def __init__(self, connection: T, created: float, expires: float) -> None:
        # None while it is borrowed, if it can be weakly referenced: then nobody but the borrower
        # keeps it, and Python tells us if that loses it.
        self.connection: T | None = connection
        self.ref: ref[Any] | None = None
        # What `connection` is while it is borrowed.
        self.kept: T | None = connection
        # By which it is known while it is borrowed. Unique, because it does not die before that.
        self.key = id(connection)
        self.created = created
        # When it is to be closed, or as soon as it comes back after that. NEVER, which is long ago:
        # at once.
        self.expires = expires
        # Why, if not because of `max_lifetime`.
        self.retired: Reason = "lifetime"
        # Until when it may be handed out just as it is, if it is idle.
        self.good_until = NEVER
        self.idle_since = created
        # When it was last borrowed; how often, and for how many seconds in all.
        self.taken = created
        self.uses = 0
        self.usage = 0.0
        # How many who got it had to wait, and for how many seconds in all.
        self.queued = 0
        self.waited = 0.0
        # Who borrowed it, if the pool looks for leaks; and whether it has reported this one.
        self.stack: list[tuple[str, int, str]] = []
        self.reported = False

    def retire(self, reason: Reason) -> None:
        """Let it be closed as soon as nobody has it."""
        if self.expires != NEVER:
            self.retired = reason
            self.expires = self.good_until = NEVER

    def add(self, other: Record[Any]) -> None:
        """Count what `other` was used as if this had been used so too."""
        self.uses += other.uses
        self.usage += other.usage
        self.queued += other.queued
        self.waited += other.waited

    def alive(self) -> T | None:
        """Return the connection, also while it is borrowed; None if it was collected."""
        if self.connection is not None or self.ref is None:
            return self.connection
        found: T | None = self.ref()
        return found

    def trace(self) -> str:
        """Return who borrowed it, as in a traceback."""
        return "\n".join(
            f'  File "{file}", line {line}, in {function}' for file, line, function in self.stack
        )


class Failure:
    """What waiters are handed instead of a connection, so that they give up at once."""

    __slots__ = ("error",)

    # As if it were a record that is no good any more; see `Record`.
    good_until = expires = NEVER

    def __init__(self, error: Callable[[], Exception]) -> None:
        self.error = error


def call_stack() -> list[tuple[str, int, str]]:
    """Return (file, line, function) of the callers outside of this package, the outermost first.

    A fraction of what `traceback.extract_stack` takes, because it reads no source.
    """
    frame: FrameType | None = sys._getframe(1)
    stack: list[tuple[str, int, str]] = []
    while frame is not None:
        if not str(frame.f_globals.get("__name__")).startswith("aiosync."):
            code = frame.f_code
            stack.append((code.co_filename, frame.f_lineno, code.co_name))
        frame = frame.f_back
    return stack[::-1]


@dataclass(frozen=True)
class ConnectionInfo:
    """What `ConnectionPool.info` tells of a connection. Times are in seconds."""

    age: float
    """How long ago it was made."""
    uses: int
    """How often it has been borrowed."""
    usage: float
    """For how long it has been borrowed, not counting the present time."""
    in_use: float | None
    """For how long it has been borrowed now; None if it is idle. While the pool closes a connection
    by force, its borrower still has it, until this is None.
    """
    expires_in: float
    """In how many seconds it will be replaced because of its age: infinite if never."""


@dataclass(frozen=True)
class PoolEvent:
    """What `on_event` of a `ConnectionPool` is called with."""

    kind: Literal[
        "connected",
        "connect_failed",
        "outage",
        "recovered",
        "closed",
        "close_failed",
        "leaked",
    ]
    """What happened. "outage": connecting has begun to fail; "recovered": it works again;
    "leaked": a connection is borrowed for longer than `leak_timeout`, or its borrower has lost it.
    """
    pool: str
    """The name of the pool."""
    reason: str = ""
    """Why a connection was closed; of a leak, the stack that took it, as in a traceback."""
    error: BaseException | None = None
    """What went wrong, if an exception tells it."""
    info: ConnectionInfo | None = None
    """The connection concerned."""
