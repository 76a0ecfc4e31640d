"""What each worker did and when, as told by the objects that the workers share."""

from __future__ import annotations

import threading
import time
from enum import Enum
from typing import TYPE_CHECKING, Any

from .._observed import observe

if TYPE_CHECKING:
    from collections.abc import Iterable

    from .. import Barrier, ConnectionPool, Semaphore
    from .._observed import Hold, Outcome, Record, Wait
    from .._observed._caller import Caller


class State(Enum):
    """What a worker is doing."""

    IDLE = "idle"
    WAITING = "waiting"
    READING = "reading"
    AT_BARRIER = "at the barrier"
    COUNTING = "counting"
    CONNECTED = "has a connection"


# Without a permit or a connection, by the number of rounds of the barrier that a worker has passed.
_BETWEEN = (State.IDLE, State.COUNTING, State.IDLE)


class Strip:
    """For how long a worker was in which state, in a limited number of cells of equal width.

    When the cells are full, pairs of them are merged. So a run of any length fits.
    """

    def __init__(self, most: int = 1024, width: float = 0.0001) -> None:
        self._most = most
        self._width = width
        self._cells: list[dict[State, float]] = []
        self._ended = 0.0

    def add(self, state: State, began: float, ended: float) -> None:
        """Add a stretch of time, which begins where the last one has ended."""
        self._ended = ended
        while ended >= self._width * self._most:
            self._merge()
        first, last = int(began / self._width), int(ended / self._width)
        self._cells += [{} for _ in range(last + 1 - len(self._cells))]
        for index in range(first, last + 1):
            cell = self._cells[index]
            part = _overlap(began, ended, index * self._width, self._width)
            cell[state] = cell.get(state, 0) + part

    def _merge(self) -> None:
        if len(self._cells) % 2:
            self._cells.append({})
        pairs = zip(self._cells[::2], self._cells[1::2], strict=True)
        self._cells = [_sum([(first, 1), (second, 1)]) for first, second in pairs]
        self._width *= 2

    def shares(self, columns: int, total: float) -> list[dict[State, float]]:
        """Return which share of each of `columns` was spent in which state.

        :param total: how many seconds the columns stand for, more than 0
        """
        width = total / columns
        shares: list[dict[State, float]] = []
        for column in range(columns):
            began, ended = column * width, (column + 1) * width
            first, last = int(began / self._width), int(ended / self._width)
            weights = [self._part(cell, began, ended) / width for cell in range(first, last + 1)]
            # There may be fewer cells than that.
            shares.append(_sum(zip(self._cells[first : last + 1], weights, strict=False)))
        return shares

    def _part(self, cell: int, began: float, ended: float) -> float:
        """Return which part of a cell is between two moments."""
        start = cell * self._width
        length = min(self._width, self._ended - start)  # the last cell is not full
        return _overlap(began, ended, start, length) / length if length > 0 else 0.0


def _overlap(began: float, ended: float, start: float, width: float) -> float:
    """Return how much of the time from `began` to `ended` is in a cell."""
    return max(0.0, min(ended, start + width) - max(began, start))


def _sum(parts: Iterable[tuple[dict[State, float], float]]) -> dict[State, float]:
    """Return the sum of some cells, each with a weight."""
    total: dict[State, float] = {}
    for cell, weight in parts:
        for state, seconds in cell.items():
            total[state] = total.get(state, 0) + seconds * weight
    return total


class Row:
    """What is known about one worker."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.strip: Strip = Strip()
        self.state: State = State.IDLE
        self.since: float = 0.0
        self.waits: dict[Wait, State] = {}
        self.holds: dict[Hold, State] = {}
        self.rounds: int = 0

    def update(self, now: float) -> None:
        """Take note of the state, which may have changed."""
        between = _BETWEEN[min(self.rounds, len(_BETWEEN) - 1)]
        # A worker that waits while it holds something is shown as waiting.
        state = next(iter([*self.waits.values(), *self.holds.values()]), between)
        if state is not self.state:
            self.strip.add(self.state, self.since, now)
            self.state, self.since = state, now


class History:
    """The rows of some workers. A listener of the objects that they share.

    :param names: the names of the tasks and threads to take note of
    """

    def __init__(
        self,
        names: Iterable[str],
        permits: Semaphore,
        barrier: Barrier,
        pool: ConnectionPool[Any],
    ) -> None:
        self.rows: dict[str, Row] = {name: Row(name) for name in names}
        # How many workers at most may be in a state.
        self.limits: dict[State, int] = {
            State.READING: permits.value,
            State.CONNECTED: pool.max_size,
        }
        # When all workers had arrived at the barrier.
        self.rounds: list[float] = []
        # Events come from many threads. A finalizer may run at any time and cause another one.
        self._lock = threading.RLock()
        # The first event, by the clock, and the last one, in seconds since then.
        self._began: float | None = None
        self._ended = 0.0
        self._seen: list[State] = [State.IDLE] * len(self.rows)
        self._holding: dict[Record, State] = {
            observe(permits, self): State.READING,
            observe(pool, self): State.CONNECTED,
        }
        observe(barrier, self)

    def elapsed(self) -> float:
        """Return the seconds since the first event."""
        return 0.0 if self._began is None else time.perf_counter() - self._began

    def snapshot(self) -> list[State]:
        """Return the states of all rows.

        A release is recorded a moment after it has happened, so more workers may seem to have a
        permit than there are permits. Then the states of the last call are returned.
        """
        with self._lock:
            states = [row.state for row in self.rows.values()]
        if all(states.count(state) <= limit for state, limit in self.limits.items()):
            self._seen = states
        return self._seen

    def close(self) -> float:
        """End the history with the last event, and return its length in seconds, more than 0."""
        with self._lock:
            for row in self.rows.values():
                row.strip.add(row.state, row.since, self._ended)
        return max(self._ended, 1e-6)

    def _row(self, caller: Caller) -> Row | None:
        """Return the row of a worker; None if it has none."""
        row = self.rows.get(caller.name)
        if row is not None:
            if self._began is None:
                self._began = time.perf_counter()
            self._ended = self.elapsed()
        return row

    # -- Listener.

    def wait_began(self, wait: Wait) -> None:
        """See `Listener`."""
        with self._lock:
            row = self._row(wait.caller)
            if row is not None:
                waits = State.AT_BARRIER if wait.record.is_barrier else State.WAITING
                row.waits[wait] = waits
                row.update(self._ended)

    def wait_ended(self, wait: Wait, outcome: Outcome) -> None:
        """See `Listener`."""
        with self._lock:
            row = self._row(wait.caller)
            if row is not None:
                row.waits.pop(wait, None)
                if wait.record.is_barrier and outcome == "got":
                    row.rounds += 1
                    if row.rounds > len(self.rounds):
                        self.rounds.append(self._ended)
                row.update(self._ended)

    def hold_began(self, hold: Hold) -> None:
        """See `Listener`."""
        with self._lock:
            row = self._row(hold.caller)
            if row is not None:
                row.holds[hold] = self._holding[hold.record]
                row.update(self._ended)

    def hold_ended(self, hold: Hold) -> None:
        """See `Listener`."""
        with self._lock:
            row = self._row(hold.caller)
            if row is not None:
                row.holds.pop(hold, None)
                row.update(self._ended)

    def happened(self, record: Record, event: object) -> None:
        """See `Listener`. Events of the pool are not shown."""
