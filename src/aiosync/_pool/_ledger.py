"""What a pool counts, and whom it tells.

What must live here: statistics, events and messages. They say what is, and decide nothing.
"""

from __future__ import annotations

import logging
from inspect import isawaitable
from threading import RLock
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from anyio import fail_after, get_cancelled_exc_class

from .._errors import PoolTimeout
from ._records import NEVER, REASONS, ConnectionInfo, PoolEvent, Record

if TYPE_CHECKING:
    from collections.abc import Callable

    from ._keeper import Keeper
    from ._settings import Settings

T = TypeVar("T")

log = logging.getLogger("aiosync.pool")

_COUNTS = (
    "requests_queued", "requests_wait_ms", "requests_errors", "timeouts", "cancelled",
    "returns_bad", "connections_num", "connections_ms", "connections_errors", "connections_lost",
    "leaks", *(f"closed_{reason}" for reason in REASONS),
)  # fmt: skip


class Ledger(Generic[T]):
    """The figures of one pool. From any thread, but for `emit` and `tell`."""

    def __init__(self, settings: Settings[T], keeper: Keeper[T]) -> None:
        self._settings = settings
        self._keeper = keeper
        # Added to when something unusual happens; never on the common path. The lock is re-entrant,
        # for signal handlers and finalizers; nothing foreign ever runs under it.
        self._counts: dict[str, float] = {}
        self._lock = RLock()
        # What those connections were used that are closed.
        self.past = Record[T](None, 0, NEVER)  # type: ignore[arg-type]

    def count(self, name: str, amount: float = 1) -> None:
        with self._lock:
            self._counts[name] = self._counts.get(name, 0) + amount

    def gauges(self) -> dict[str, int]:
        """Return how things are."""
        keeper = self._keeper
        return {
            "pool_min": keeper.min_size,
            "pool_max": keeper.max_size,
            "pool_size": keeper.size,
            "pool_available": keeper.idle.idle(),
            "in_use": len(keeper.lent),
            "connecting": keeper.opening,
            "requests_waiting": len(keeper.idle.waiters),
        }

    def counts(self) -> dict[str, int]:
        """Return what has happened since the pool was made."""
        total: Record[Any] = Record(None, 0, NEVER)
        for record in (self.past, *self._keeper.records.copy().values()):
            total.add(record)
        found = {name: int(self._counts.get(name, 0)) for name in _COUNTS}
        found["requests_num"] = total.uses + found["requests_errors"] + found["cancelled"]
        found["requests_queued"] += total.queued
        found["requests_wait_ms"] += int(1000 * total.waited)
        found["usage_ms"] = int(1000 * total.usage)
        return found

    def too_late(self, when: float | str | None) -> PoolTimeout:
        """Return what to raise for who got no connection, in so many seconds for instance."""
        self.count("timeouts")
        waited = when if isinstance(when, str) else "at once"
        if isinstance(when, (int, float)) and when > 0:
            waited = f"within {when:g} s"
        stats = self._keeper.pool.get_stats()
        cause = self._keeper.last_error
        because = "" if cause is None else f"; connecting fails: {describe(cause)}"
        error = PoolTimeout(
            f"{self._settings.name} had no connection {waited}: of {stats['pool_max']} at most, "
            f"{stats['in_use']} are in use and {stats['connecting']} being made; "
            f"{stats['requests_waiting']} others wait{because}",
            stats,
        )
        error.__cause__ = cause
        return error

    def info(self, record: Record[T]) -> ConnectionInfo:
        keeper = self._keeper
        now = keeper.clock()
        borrowed = record.key in keeper.lent or record.key in keeper.forced
        return ConnectionInfo(
            age=now - record.created,
            uses=record.uses,
            usage=record.usage,
            in_use=now - record.taken if borrowed else None,
            expires_in=max(0.0, record.expires - now),
        )

    def emit(
        self,
        kind: Any,
        record: Record[T] | None = None,
        reason: str = "",
        error: BaseException | None = None,
    ) -> None:
        if self._settings.on_event is not None:
            info = None if record is None else self.info(record)
            event = PoolEvent(kind, self._settings.name, reason, error, info)
            self.tell(self._settings.on_event, event)

    def tell(self, hook: Callable[..., Any], *args: object) -> None:
        """Call what only wants to know; in a task of its own if it is async."""
        if self._keeper.is_orphan:
            return
        try:
            result = hook(*args)
        except (Exception, get_cancelled_exc_class()):  # the result of a cancelled Future
            log.exception("%s: %r failed", self._settings.name, hook)
            return
        if isawaitable(result):
            close = getattr(result, "close", bool)
            self._keeper.start(self._finish_telling, hook, result, stillborn=close)

    async def _finish_telling(self, hook: object, result: Any) -> None:
        try:
            with fail_after(self._settings.time_to_close, shield=True):
                await result
        except Exception:
            log.exception("%s: %r failed", self._settings.name, hook)


def describe(error: BaseException) -> str:
    """Return the repr of `error`, whatever that is."""
    try:
        return repr(error)
    except Exception:
        return type(error).__name__
