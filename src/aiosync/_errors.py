"""The exceptions of the package, and the checks of arguments that raise the built-in ones."""

from __future__ import annotations

import threading
from operator import index
from typing import Any, Literal, NoReturn, SupportsIndex, TypeAlias

from ._park import AsyncioBrokenBarrierError

BrokenReason: TypeAlias = Literal["aborted", "reset", "timeout", "cancelled", "action", "lost"]


class BrokenBarrierError(threading.BrokenBarrierError, AsyncioBrokenBarrierError):
    """Raised by `Barrier.wait` when the barrier is, or becomes, broken.

    It is a `threading.BrokenBarrierError` and an `asyncio.BrokenBarrierError` too, so an ``except``
    clause written for either keeps working. If the action of the barrier raised, that exception is
    the ``__cause__``.
    """

    reason: BrokenReason | None
    """What broke the barrier; None if the error does not come from a `Barrier`.

    "aborted", "reset": a call of `Barrier.abort` or `Barrier.reset`. "timeout": a party waited
    longer than its timeout. "cancelled": a party was cancelled or interrupted while it waited, or
    had left when the last one arrived. "action": the action raised. "lost", only for a
    `aiosync.redis.DistributedBarrier`: a process died, or the server lost its state.
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


# The next three classes have the names that psycopg_pool uses.
class PoolTimeout(TimeoutError):  # noqa: N818
    """Raised when no connection of a `ConnectionPool` becomes available within the timeout.

    If the pool failed to connect to its backend in the meantime, the last such error is the
    ``__cause__``.
    """

    stats: dict[str, int]
    """The result of `ConnectionPool.get_stats` at the time of the timeout."""

    def __init__(self, message: str, stats: dict[str, int] | None = None) -> None:
        super().__init__(message)
        self.stats = {} if stats is None else stats


class PoolClosed(RuntimeError):  # noqa: N818
    """Raised by a `ConnectionPool` that is not open: not opened yet, closed, or forked."""


class TooManyRequests(RuntimeError):  # noqa: N818
    """Raised by a `ConnectionPool` when `max_waiting` tasks and threads already wait."""


class PoolMisuse(TypeError):  # noqa: N818
    """Raised to callers of a `ConnectionPool` whose `connect` or `configure` is wrong.

    Waiting would not help, so all waiters get it at once. It is also raised if `limit` is not ready
    for use, or if other processes use it with other settings. A `connect` or `configure` of your
    own may raise it too, for a mistake of the program that no other attempt can fix; each waiter
    then gets an error with the same arguments and ``__cause__``.
    """


class NotCopied:
    """A base class that refuses pickling and copying: a copy would not share the waiters."""

    __slots__ = ()

    def __reduce_ex__(self, protocol: SupportsIndex, /) -> NoReturn:
        raise TypeError(
            f"cannot pickle or copy {type(self).__name__!r} object: "
            f"tasks and threads have to share the object itself"
        )


class NeedsAsyncWith:
    """A base class that refuses a plain ``with``."""

    __slots__ = ()

    # What the error recommends to threads.
    _for_threads_use = "'with as_threading(...)'"

    def __enter__(self) -> NoReturn:
        """Raise TypeError: a task uses ``async with``, a thread ``with as_threading(...)``."""
        refuse_with(self)

    def __exit__(self, *exc_info: object) -> None:
        """Do nothing: `__enter__` always raises."""


class NeedsPlainWith(NotCopied):
    """The base class of what threads use: refuses an ``async with``."""

    __slots__ = ()

    async def __aenter__(self) -> NoReturn:
        """Raise TypeError: a task awaits the shared object itself."""
        raise TypeError(
            f"{type(self).__name__} is for threads; a task uses 'async with' on the object "
            f"that was given to as_threading()"
        )

    async def __aexit__(self, *exc_info: object) -> None:
        """Do nothing: `__aenter__` always raises."""


def check_count(name: str, value: SupportsIndex, least: int) -> int:
    """Return `value` as an int of at least `least`.

    :param value: any integer, including numpy's; never a float
    :raises TypeError: if it is not an integer
    :raises ValueError: if it is smaller than `least`
    """
    try:
        number = index(value)
    except TypeError:
        raise TypeError(f"{name} must be an int, not {type(value).__name__}") from None
    if number < least:
        raise ValueError(f"{name} must be {least} or more, not {number}")
    return number


def check_name(name: object) -> str | None:
    """Return `name`, which appears in the repr and in errors.

    :raises TypeError: if it is neither a str nor None
    """
    if name is None or isinstance(name, str):
        return name
    raise TypeError(f"name must be a str or None, not {type(name).__name__}")


# So many seconds are no limit: timers of some event loops overflow on large numbers.
_FOREVER = 30 * 366 * 24 * 3600


def check_timeout(timeout: Any) -> float | None:
    """Return `timeout` as a finite number of seconds, or None for "no limit".

    :param timeout: any real number, including Decimal, Fraction and numpy's
    :raises TypeError: if it is neither a number nor None
    :raises ValueError: if it is NaN
    """
    if timeout is None:
        return None
    if not isinstance(timeout, (int, float)):
        timeout = _as_float(timeout)
    seconds: float = timeout
    if seconds != seconds:  # noqa: PLR0124  (NaN)
        raise ValueError("timeout must be a number of seconds or None, not NaN")
    return None if seconds > _FOREVER else seconds


def _as_float(timeout: Any) -> float:
    if hasattr(timeout, "total_seconds"):
        raise TypeError(
            "timeout must be a number of seconds or None, not timedelta: "
            "pass timeout.total_seconds()"
        )
    if not (hasattr(timeout, "__float__") or hasattr(timeout, "__index__")):
        raise TypeError(
            f"timeout must be a number of seconds or None, not {type(timeout).__name__}"
        )
    return float(timeout)


def normalize_timeout(blocking: object, timeout: Any) -> float | None:
    """Return how many seconds `acquire` may wait: None for no limit, 0 for a single try.

    :param blocking: True or False; 0 and 1 are accepted, since callers of `threading` pass them
    :raises TypeError: if `blocking` is anything else, most likely a timeout, or if `timeout` is not
        a number
    :raises ValueError: if `timeout` is given although `blocking` is False, or is NaN
    """
    if not (isinstance(blocking, int) and blocking in {0, 1}):
        raise TypeError(
            f"blocking must be a bool, not {type(blocking).__name__}: "
            f"pass a number of seconds as timeout="
        )
    if not blocking:
        if timeout is not None:
            raise ValueError("can't specify a timeout for a non-blocking acquire")
        return 0
    timeout = check_timeout(timeout)
    return None if timeout is None else max(timeout, 0)


def refuse_with(shared: NeedsAsyncWith) -> NoReturn:
    """Raise the error for a plain ``with`` on an object that tasks await."""
    name, remedy = type(shared).__name__, shared._for_threads_use
    raise TypeError(f"{name} needs 'async with' in a task; in a thread use {remedy}")
