"""Every exception and every refusal of the package, with its message.

What must live here: exception classes, and the functions that turn bad input into one of them.
What must not: state, waiting, or an import of a room above the ground floor.
"""

from __future__ import annotations

import threading
from math import isnan
from typing import Literal, NoReturn, SupportsIndex, TypeAlias

from ._park import AsyncioBrokenBarrierError

BrokenReason: TypeAlias = Literal["aborted", "reset", "timeout", "cancelled", "action"]


class BrokenBarrierError(threading.BrokenBarrierError, AsyncioBrokenBarrierError):
    """Raised by `Barrier.wait` when the barrier is, or becomes, broken.

    It is a `threading.BrokenBarrierError` and an `asyncio.BrokenBarrierError` too, so an ``except``
    clause written for either keeps working. If the action of the barrier raised, that exception is
    the ``__cause__``.
    """

    reason: BrokenReason | None
    """What broke the barrier; None if the error was not raised by a `Barrier`.

    "aborted", "reset": a call of `Barrier.abort` or `Barrier.reset`. "timeout": a party waited
    longer than its timeout. "cancelled": a party was cancelled or interrupted while it waited, or
    had left when the last one arrived. "action": the action raised.
    """

    arrived: int
    """How many parties had arrived when the barrier broke."""

    parties: int
    """How many parties a round of the barrier takes."""

    def __init__(
        self,
        message: str = "",
        *,
        reason: BrokenReason | None = None,
        arrived: int = 0,
        parties: int = 0,
    ) -> None:
        super().__init__(message)
        self.reason = reason
        self.arrived = arrived
        self.parties = parties


def broken_barrier(
    name: str | None, reason: BrokenReason, arrived: int, parties: int
) -> BrokenBarrierError:
    """Return the error for a party of a barrier that is broken."""
    barrier = "barrier" if name is None else f"barrier {name!r}"
    hint = "; call reset() to use it again" if reason == "aborted" else ""
    return BrokenBarrierError(
        f"{barrier} is broken: {reason} (arrived={arrived}, parties={parties}){hint}",
        reason=reason,
        arrived=arrived,
        parties=parties,
    )


# The names of the next three are those of psycopg_pool.
class PoolTimeout(TimeoutError):  # noqa: N818
    """Raised when no connection of a `ConnectionPool` was to be had in time.

    If the pool could not connect to its backend in the meantime, the last error of that is its
    ``__cause__``.
    """

    stats: dict[str, int]
    """What `ConnectionPool.get_stats` returned when the time was over."""

    def __init__(self, message: str, stats: dict[str, int] | None = None) -> None:
        super().__init__(message)
        self.stats = {} if stats is None else stats


class PoolClosed(RuntimeError):  # noqa: N818
    """Raised by a `ConnectionPool` that is not open: not yet, not any more, or after a fork."""


class TooManyRequests(RuntimeError):  # noqa: N818
    """Raised by a `ConnectionPool` when `max_waiting` tasks and threads wait for a connection."""


class NotCopied:
    """A base class that refuses pickling and copying: a copy would not share the waiters."""

    __slots__ = ()

    def __reduce_ex__(self, protocol: SupportsIndex, /) -> NoReturn:
        raise TypeError(
            f"cannot pickle or copy {type(self).__name__!r} object: "
            f"it only synchronizes those who share the one object; pass the object itself"
        )


def check_count(name: str, value: int, least: int) -> int:
    """Return `value` if it is an int of at least `least`.

    :raises TypeError: if it is no int
    :raises ValueError: if it is smaller
    """
    if not isinstance(value, int):
        raise TypeError(f"{name} must be an int, not {type(value).__name__}")
    if value < least:
        raise ValueError(f"{name} must be {least} or more, not {value}")
    return value


def check_timeout(timeout: float | None) -> float | None:
    """Return `timeout` (seconds) as a finite number, or None for "wait for ever".

    :raises TypeError: if it is neither a number nor None
    :raises ValueError: if it is not a number in the sense of IEEE 754
    """
    if timeout is None:
        return None
    if not isinstance(timeout, (int, float)):
        raise TypeError(
            f"timeout must be a number of seconds or None, not {type(timeout).__name__}"
        )
    if isinstance(timeout, float) and isnan(timeout):
        raise ValueError("timeout must be a number of seconds or None, not NaN")
    # Nobody can tell 30 years from for ever, but timers of some event loops overflow on the latter.
    return None if timeout > _FOR_EVER else timeout


def normalize_timeout(blocking: bool, timeout: float | None) -> float | None:
    """Return how many seconds to wait: None for ever, 0 not at all."""
    if timeout is None and blocking:
        return None
    if not blocking:
        if timeout is not None:
            raise ValueError("can't specify a timeout for a non-blocking acquire; leave it out")
        return 0
    timeout = check_timeout(timeout)
    return None if timeout is None else max(timeout, 0)


_FOR_EVER = 30 * 366 * 24 * 3600
