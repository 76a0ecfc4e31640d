"""What the demo knows about its workers."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import anyio
import pytest
from anyio import to_thread
from support.demo import each_backend

from aiosync import Barrier, BrokenBarrierError, ConnectionPool, Semaphore, as_threading
from aiosync._demo._history import History, State, Strip

if TYPE_CHECKING:
    from collections.abc import Callable

IDLE, WAITING, READING, AT_BARRIER, COUNTING, CONNECTED = State


# Strips


def rounded(shares: list[dict[State, float]]) -> list[dict[State, float]]:
    """Return the shares without those that are 0."""
    return [
        {state: round(share, 2) for state, share in column.items() if share > 0.01}
        for column in shares
    ]


def seconds(strip: Strip) -> dict[State, float]:
    """Return how long each state lasted, by the shares of one column."""
    total = len(strip._cells) * strip._width
    return {state: round(share * total, 2) for state, share in strip.shares(1, total)[0].items()}


def test_a_strip_is_divided_into_columns() -> None:
    strip = Strip(width=0.5)
    strip.add(IDLE, 0.0, 1.0)
    strip.add(READING, 1.0, 1.25)
    strip.add(WAITING, 1.25, 4.0)
    assert rounded(strip.shares(4, 4.0)) == [
        {IDLE: 1.0},
        {READING: 0.25, WAITING: 0.75},
        {WAITING: 1.0},
        {WAITING: 1.0},
    ]
    assert rounded(strip.shares(2, 4.0))[0] == {IDLE: 0.5, READING: 0.12, WAITING: 0.38}


def test_columns_without_a_record_are_empty() -> None:
    strip = Strip(width=0.5)
    assert strip.shares(2, 1.0) == [{}, {}]
    strip.add(READING, 0.0, 1.0)
    assert rounded(strip.shares(3, 3.0))[2] == {}


@pytest.mark.parametrize("most", [4, 16])
def test_a_strip_of_any_length_fits(most: int) -> None:
    strip = Strip(most, width=0.25)
    for second in range(0, 60, 2):
        strip.add(READING, second, second + 1)
        strip.add(WAITING, second + 1, second + 2)
    assert len(strip._cells) <= most
    assert seconds(strip) == {READING: 30.0, WAITING: 30.0}
    strip.add(AT_BARRIER, 60.0, 100_000.0)
    assert len(strip._cells) <= most
    assert seconds(strip) == {READING: 30.0, WAITING: 30.0, AT_BARRIER: 99_940.0}


def test_an_odd_number_of_cells_is_merged() -> None:
    strip = Strip(4, width=1.0)
    strip.add(READING, 0.0, 2.5)
    strip.add(WAITING, 2.5, 7.0)
    assert seconds(strip) == {READING: 2.5, WAITING: 4.5}


# The listener


class Stage:
    """Observed objects, a clock, and what the history has seen."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *names: str, parties: int = 1) -> None:
        self.permits = Semaphore(1)
        self.barrier = Barrier(parties)
        self.pool = ConnectionPool(connect=object, max_size=2)
        self.history = History(names, self.permits, self.barrier, self.pool)
        self.now = 0.0
        monkeypatch.setattr(self.history, "elapsed", lambda: self.now)

    async def until(self, *states: State) -> None:
        """Wait until all rows have got there."""
        with anyio.fail_after(10):
            while self.history.snapshot() != list(states):
                await anyio.sleep(0.001)

    def shares(self, name: str, total: float) -> list[dict[State, float]]:
        return rounded(self.history.rows[name].strip.shares(int(total), total))


@each_backend
def test_a_task_and_a_thread(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stage = Stage(monkeypatch, "task-1", "thread-2", parties=2)
    go = threading.Event()

    async def task(step: Callable[[], anyio.Event]) -> None:
        async with stage.permits:
            await step().wait()
        async with stage.pool.connection():
            await step().wait()
        await stage.barrier.wait()
        await step().wait()
        await stage.barrier.wait()

    def thread() -> None:
        threading.current_thread().name = "thread-2"
        with as_threading(stage.permits):
            assert go.wait(10)
        go.clear()
        with as_threading(stage.pool).connection():
            assert go.wait(10)
        as_threading(stage.barrier).wait()
        as_threading(stage.barrier).wait()

    async def main() -> None:
        steps = [anyio.Event() for _ in range(3)]
        iterator = iter(steps)
        async with stage.pool, anyio.create_task_group() as group:
            group.start_soon(task, lambda: next(iterator), name="task-1")
            await stage.until(READING, IDLE)
            group.start_soon(to_thread.run_sync, thread)
            await stage.until(READING, WAITING)
            stage.now = 1.0
            steps[0].set()
            await stage.until(CONNECTED, READING)
            stage.now = 2.0
            go.set()
            await stage.until(CONNECTED, CONNECTED)
            stage.now = 3.0
            steps[1].set()
            await stage.until(AT_BARRIER, CONNECTED)
            stage.now = 4.0
            go.set()
            await stage.until(COUNTING, AT_BARRIER)
            stage.now = 5.0
            steps[2].set()
            await stage.until(IDLE, IDLE)

    anyio.run(main, backend=backend)
    assert stage.history.close() == 5.0
    assert stage.history.rounds == [4.0, 5.0]
    steps = [READING, CONNECTED, CONNECTED, AT_BARRIER, COUNTING]
    assert stage.shares("task-1", 5.0) == [{state: 1.0} for state in steps]
    steps = [WAITING, READING, CONNECTED, CONNECTED, AT_BARRIER]
    assert stage.shares("thread-2", 5.0) == [{state: 1.0} for state in steps]


@each_backend
def test_others_are_left_alone(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stage = Stage(monkeypatch, "task-1")

    async def main() -> None:
        async with stage.pool, stage.permits, stage.pool.connection():
            await stage.barrier.wait()
            assert stage.history.snapshot() == [IDLE]

    anyio.run(main, backend=backend)
    assert stage.history.rounds == []


@each_backend
def test_a_wait_in_vain(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stage = Stage(monkeypatch, "task-1", parties=2)

    async def work() -> None:
        with pytest.raises(BrokenBarrierError):
            await stage.barrier.wait()

    async def main() -> None:
        async with anyio.create_task_group() as group:
            group.start_soon(work, name="task-1")
            await stage.until(AT_BARRIER)
            stage.barrier.abort()
            await stage.until(IDLE)

    anyio.run(main, backend=backend)
    assert stage.history.rounds == []


def test_no_more_workers_are_shown_with_a_permit_than_there_are_permits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stage = Stage(monkeypatch, "task-1", "thread-2")
    one, two = stage.history.rows.values()
    one.state, two.state = READING, WAITING
    assert stage.history.snapshot() == [READING, WAITING]
    two.state = READING  # the task has released its permit, and has not told so yet
    assert stage.history.snapshot() == [READING, WAITING]
    one.state = AT_BARRIER
    assert stage.history.snapshot() == [AT_BARRIER, READING]


def test_the_clock_begins_with_the_first_event_and_ends_with_the_last() -> None:
    permits = Semaphore()
    history = History(["a", "b"], permits, Barrier(1), ConnectionPool(connect=object))
    as_threading(permits).acquire()
    assert history.elapsed() == 0
    threading.current_thread().name, name = "a", threading.current_thread().name
    try:
        as_threading(permits).release()
        as_threading(permits).acquire()
    finally:
        threading.current_thread().name = name
    assert 0 < history._ended <= history.elapsed()
    assert history.close() == history._ended
    assert rounded(history.rows["b"].strip.shares(1, history._ended)) == [{IDLE: 1.0}]


def test_an_empty_history_has_a_length() -> None:
    assert History(["a"], Semaphore(), Barrier(1), ConnectionPool(connect=object)).close() > 0
