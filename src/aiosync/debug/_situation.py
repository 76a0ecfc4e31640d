"""A snapshot of all records, for the report and the search for deadlocks. Plain data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeVar

if TYPE_CHECKING:
    from collections.abc import Iterable
    from weakref import WeakSet

    from .._callers import CallSite
    from .._observed import Hold, Record, Wait
    from .._observed._caller import Caller

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Holder:
    """A task or thread that holds a permit or a connection. Returned by `holders`."""

    name: str
    """The name of the task or thread."""
    kind: Literal["task", "thread"]
    """Which of the two it is."""
    loop: str | None
    """The kind of event loop of a task and its thread, such as "asyncio in MainThread"."""
    age: float
    """For how many seconds it has held it."""
    file: str
    """The file of the code that asked for it, outside of this package; or an empty string."""
    line: int
    """The line in that file."""
    function: str
    """The function of that line."""
    ended: bool
    """Whether the task or thread has ended, so that it cannot release anything any more."""


@dataclass(frozen=True, slots=True)
class Waiter:
    """A task or thread that waits. Returned by `waiters`."""

    name: str
    """The name of the task or thread."""
    kind: Literal["task", "thread"]
    """Which of the two it is."""
    loop: str | None
    """The kind of event loop of a task and its thread, such as "asyncio in MainThread"."""
    age: float
    """For how many seconds it has waited."""
    file: str
    """The file of the code that waits, outside of this package; or an empty string."""
    line: int
    """The line in that file."""
    function: str
    """The function of that line."""
    timeout: float | None
    """How many seconds it waits at most; None: no limit."""


@dataclass(frozen=True)
class Seen:
    """One object at the time of the snapshot."""

    label: str
    """What it is called, such as "Semaphore 'mail'"."""
    state: str
    """Its figures, such as "value=0"."""
    created: CallSite | None
    """The line that created it, if it has no name."""
    missing: int
    """How many parties, permits or connections a waiter needs; 0 if it can go on, or unknown."""
    is_barrier: bool
    is_open: bool
    """Whether others than the holders may let a waiter go on."""
    holds: list[Hold]
    """The longest first."""
    waits: list[Wait]
    """In the order in which they began."""
    parties: frozenset[Caller]
    """The parties of earlier rounds of a barrier."""


def see(records: Iterable[Record]) -> list[Seen]:
    """Take a snapshot."""
    return [seen for record in records if (seen := _see_one(record)) is not None]


def _see_one(record: Record) -> Seen | None:
    shared = record.shared
    if shared is None:  # collected
        return None
    holds = held(record)
    # The waits first: one that ends meanwhile makes `observed_missing` answer 0.
    waits = list(record.waits)
    return Seen(
        label=str(record),
        state=shared.observed_state(),
        created=record.created if record.name is None else None,
        missing=shared.observed_missing(),
        is_barrier=record.is_barrier,
        is_open=record.is_open,
        holds=holds,
        waits=waits,
        parties=frozenset(members(record.parties)),
    )


def members(found: WeakSet[T]) -> list[T]:
    """Return the members of a set to which other threads may add some meanwhile."""
    while True:
        try:
            return list(found)
        except RuntimeError:  # it changed during the iteration, which is written in Python
            continue


def held(record: Record) -> list[Hold]:
    """Return what is held of an object. Forget what was lost, or taken away by force."""
    record.drop_lost()
    return list(record.holds)


def holder(hold: Hold, now: float) -> Holder:
    """Return what users are told of a hold."""
    caller = hold.caller
    file, line, function = _place(hold.site)
    age = now - hold.since
    return Holder(
        caller.name, caller.kind, caller.loop, age, file, line, function, ended=caller.ended
    )


def waiter(wait: Wait, now: float) -> Waiter:
    """Return what users are told of a wait."""
    caller = wait.caller
    file, line, function = _place(wait.site)
    age = now - wait.since
    return Waiter(
        caller.name, caller.kind, caller.loop, age, file, line, function, timeout=wait.timeout
    )


def _place(site: CallSite | None) -> tuple[str, int, str]:
    return ("", 0, "") if site is None else (site.file, site.line, site.function)
