"""What all parts of the background of a pool share: its connections, figures, tasks and clock."""

from __future__ import annotations

from time import monotonic
from typing import TYPE_CHECKING, Generic, TypeVar

from .._errors import PoolMisuse, PoolTimeout
from ._backoff import Backoff
from ._entry import Failure, PoolEntry, State
from ._events import PoolEvent
from ._hooks import BackgroundTasks
from ._inventory import Inventory
from ._policy import Snapshot
from ._statistics import Statistics, borrowers, describe, info

if TYPE_CHECKING:
    from collections.abc import Callable

    from ._events import EventKind, PoolStatistics
    from ._options import Options

T = TypeVar("T")


class Core(Generic[T]):
    """The state of one pool, from when it is opened until it is closed.

    :param closed: what waiters are handed when the pool is closed
    """

    def __init__(self, options: Options, statistics: Statistics, closed: Failure) -> None:
        self.options = options
        self.name: str = options.name
        self.statistics = statistics
        self.clock: Callable[[], float] = monotonic
        self.inventory: Inventory[T] = Inventory(options, closed)
        # Of the inventory: runs a function on the event loop of the pool; has maintenance look.
        self.post, self.wake = self.inventory.jobs.post, self.inventory.wake
        self.tasks = BackgroundTasks(self.name, self._task_ended)
        # The attempts that have not connected yet.
        self.attempts: list[PoolEntry[T]] = []
        self.backoff = Backoff()
        # How long the latest connect took, in seconds.
        self.connect_time = 0.0
        self.last_error: BaseException | None = None
        self.connect_failure = Failure(self.connect_error)
        self.stopping = False

    # -- From any thread.

    @property
    def size(self) -> int:
        """How many connections there are, and are being made."""
        return len(self.inventory.entries) + len(self.attempts)

    def cannot_connect(self) -> bool:
        """Return whether waiting is in vain: a mistake in a hook, or an outage and `fail_fast`."""
        if isinstance(self.last_error, PoolMisuse):
            return True
        if not (self.options.fail_fast and self.backoff.is_outage):
            return False
        # Otherwise they may get a connection that there is.
        working = self.inventory.count(State.RETURNING, State.VALIDATING)
        return not (self.inventory.stale or working or self.size >= self.options.max_size)

    def connect_error(self) -> Exception:
        """Return the error for a caller that would wait in vain; see `cannot_connect`."""
        if isinstance(self.last_error, PoolMisuse):
            return copied(self.last_error)
        return self.timed_out("while connecting fails")

    def snapshot(self) -> PoolStatistics:
        """Return all figures."""
        return self.statistics.snapshot(self.inventory, self.options, len(self.attempts))

    def timed_out(self, when: float | str | None) -> Exception:
        """Return the PoolTimeout of a request.

        :param when: how many seconds it has waited, or words for that
        """
        waited = when if isinstance(when, str) else "at once"
        if isinstance(when, (int, float)) and when > 0:
            waited = f"within {when:g} s"
        self.statistics.count("timeouts")
        names, found = borrowers(self.inventory, self.clock()), self.snapshot()
        because = f"; borrowed by {names}" if names else ""
        if self.last_error is not None:
            because += f"; connecting fails: {describe(self.last_error)}"
        error = PoolTimeout(
            f"{self.name}: no connection available {waited} (max={found.max_size}, "
            f"in_use={found.in_use}, connecting={found.connecting}, "
            f"waiting={found.tasks_waiting + found.threads_waiting}){because}",
            self.statistics.as_psycopg(found),
        )
        error.__cause__ = self.last_error
        return error

    # -- On the loop of the pool.

    def situation(self) -> Snapshot:
        """Return what a plan is made from."""
        return Snapshot(
            options=self.options,
            entries=list(self.inventory.entries.copy().values()),
            idle=self.inventory.available(),
            attempts=self.attempts.copy(),
            waiting=max(len(self.inventory.waiters), self.inventory.wanted),
            backoff=self.backoff,
            connect_time=self.connect_time,
        )

    def emit(
        self,
        kind: EventKind,
        entry: PoolEntry[T] | None = None,
        reason: str = "",
        error: BaseException | None = None,
        seconds: float | None = None,
    ) -> None:
        """Call `on_event`, if there is one."""
        hook = self.options.on_event
        if hook is not None:
            facts = None if entry is None else info(self.inventory, entry, self.clock())
            event = PoolEvent(kind, self.name, reason, error, facts, seconds)
            self.tasks.notify(self.options.time_to_close, hook, event)

    def forget_attempt(self, entry: PoolEntry[T]) -> None:
        """Give the slot of an attempt back that has led to no connection. May be repeated."""
        if entry.state is State.CONNECTING:
            entry.enter(State.CLOSED, self.clock())
            self.attempts.remove(entry)
        self.give_back_permit(entry)

    def give_back_permit(self, entry: PoolEntry[T]) -> None:
        """Give back the permit of a connection that is closed, or was never opened."""
        permit, entry.permit = entry.permit, None
        if permit is not None and not self.tasks.forked:
            permit.give_back()

    def _task_ended(self) -> None:
        if self.tasks.crash is not None:
            self.stopping = True
        if self.stopping:
            self.wake()


def copied(error: PoolMisuse) -> PoolMisuse:
    """Return an equal error: two callers that raise the same object would mix their tracebacks."""
    copy = PoolMisuse(*error.args)
    copy.__cause__ = error.__cause__
    return copy
