"""as_threading: threads use what tasks share, through views with the API of threading."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import importlib.util
import inspect
import math
import pickle
import random
import signal
import sys
import threading
import time
import weakref
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from functools import partial
from pathlib import Path
from types import FrameType, SimpleNamespace
from typing import Any
from unittest.mock import create_autospec

import anyio
import anyio.from_thread
import anyio.to_thread
import pytest
from support.helpers import (
    PATIENCE,
    Aim,
    Indices,
    InThread,
    assert_free,
    spin_until,
    until,
    until_async,
    wait_for_moment,
)

import aiosync
from aiosync import (
    Barrier,
    BoundedSemaphore,
    BrokenBarrierError,
    ConnectionPool,
    PoolTimeout,
    Semaphore,
    as_threading,
)
from aiosync._park import FREE_THREADED, ThreadWaiter, run_in_thread, thread_waiter

pytestmark = pytest.mark.anyio

# How often a timeout and a grant race for one waiter, for each kind of waiter.
# Without the GIL the two threads of a race need two cores, of which other tests take one.
RACES = 1_000 if FREE_THREADED else 10_000

posix = pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="there are no such signals")
both_semaphores = pytest.mark.parametrize("new", [Semaphore, BoundedSemaphore])

LOOPS: dict[str, tuple[str, dict[str, Any]]] = {"asyncio": ("asyncio", {}), "trio": ("trio", {})}
if importlib.util.find_spec("uvloop") is not None:
    LOOPS["uvloop"] = ("asyncio", {"use_uvloop": True})


class Integer:
    """An integer that is not an int, such as those of numpy."""

    def __init__(self, value: int) -> None:
        self._value = value

    def __index__(self) -> int:
        return self._value


class InLoop:
    """The same for a coroutine, in a loop of another thread."""

    def __init__(self, portal: Any, function: Callable[..., Awaitable[object]], *args: Any) -> None:
        self._future: Future[object] = portal.start_task_soon(function, *args)
        self.cancel = self._future.cancel

    def done(self) -> bool:
        return self._future.done()

    def result(self) -> object:
        error = self._future.exception(PATIENCE)
        return self._future.result(0) if error is None else error


class Loops:
    """Event loops, each in a thread of its own, each started when it is first asked for."""

    def __init__(self, stack: contextlib.ExitStack) -> None:
        self._stack = stack
        self._portals: dict[str, Any] = {}

    def __getitem__(self, name: str) -> Any:
        """Return the loop of that name: a kind, or a kind and a number for further ones."""
        if name not in self._portals:
            backend, options = LOOPS[name.rstrip("0123456789")]
            self._portals[name] = self._stack.enter_context(
                anyio.from_thread.start_blocking_portal(backend, options)
            )
        return self._portals[name]

    def cancel(self) -> None:
        """Let nobody keep a loop from ending."""
        for portal in self._portals.values():
            portal.call(portal.stop, True)


@pytest.fixture
def loops() -> Iterator[Loops]:
    with contextlib.ExitStack() as stack:
        loops = Loops(stack)
        yield loops
        loops.cancel()


def waiting(semaphore: Semaphore) -> int:
    return semaphore.statistics().waiting


def park_in(
    place: str, loops: Loops, semaphore: Semaphore, timeout: float | None = None
) -> InThread | InLoop:
    """Let somebody wait for a permit; returns when he has his place in the line."""
    before = waiting(semaphore)
    job: InThread | InLoop
    if place == "thread":
        view = as_threading(semaphore)
        job = InThread(lambda: view.acquire(timeout=timeout))
    else:
        job = InLoop(loops[place], semaphore.acquire, True, timeout)
    until(lambda: waiting(semaphore) == before + 1)
    return job


def arrive_in(
    place: str, loops: Loops, barrier: Barrier, timeout: float | None = None
) -> InThread | InLoop:
    """Let somebody wait at the barrier; returns when he has arrived."""
    before = barrier.n_waiting
    job: InThread | InLoop
    if place == "thread":
        view = as_threading(barrier)
        job = InThread(lambda: view.wait(timeout))
    else:
        job = InLoop(loops[place], barrier.wait, timeout)
    until(lambda: job.done() or barrier.n_waiting == before + 1)
    return job


# --- One state, many views ---


@pytest.mark.parametrize(
    ("view", "original"),
    [
        (as_threading(Semaphore()), threading.Semaphore),
        (as_threading(BoundedSemaphore()), threading.BoundedSemaphore),
        (as_threading(Barrier(1)), threading.Barrier),
    ],
)
def test_a_view_has_every_public_name_and_signature_of_its_namesake(
    view: object, original: type
) -> None:
    names = [name for name in dir(original) if not name.startswith("_")]
    assert names
    for name in names:
        theirs = getattr(original, name)
        if callable(theirs):
            expected = list(inspect.signature(theirs).parameters.values())[1:]
            found = list(inspect.signature(getattr(view, name)).parameters.values())
            assert [(p.name, p.default, p.kind) for p in found] == [
                (p.name, p.default, p.kind) for p in expected
            ]
        else:
            assert isinstance(getattr(type(view), name), property)


@both_semaphores
def test_several_views_of_one_semaphore_are_one(new: type[Semaphore]) -> None:
    semaphore = new(2)
    one, two = as_threading(semaphore), as_threading(semaphore)
    assert one.acquire()
    assert semaphore.value == 1
    semaphore.acquire_nowait()
    assert not two.acquire(blocking=False)
    two.release()
    two.release()
    assert_free(semaphore, 2)
    if new is BoundedSemaphore:
        for release in (one.release, two.release, semaphore.release):
            with pytest.raises(ValueError, match="released too often"):
                release()


def test_several_views_of_one_barrier_are_one() -> None:
    barrier = Barrier(2)
    one, two = as_threading(barrier), as_threading(barrier)
    party = InThread(one.wait)
    until(lambda: two.n_waiting == 1)
    assert (one.parties, barrier.n_waiting) == (2, 1)
    assert two.wait() == 1
    assert party.result() == 0
    one.abort()
    assert two.broken
    assert barrier.broken
    two.reset()
    assert not one.broken
    assert not barrier.broken


@pytest.mark.parametrize("new", [Semaphore, BoundedSemaphore, lambda: Barrier(2)])
def test_views_cannot_be_pickled_or_copied_but_weakly_referenced(new: Callable[[], Any]) -> None:
    view: Any = as_threading(new())
    for attempt in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(TypeError, match="cannot pickle or copy 'Thread"):
            attempt(view)
    assert weakref.ref(view)() is view
    assert not hasattr(view, "__dict__")


@pytest.mark.parametrize(
    "wrong",
    [
        threading.Semaphore(),
        threading.Barrier(1),
        asyncio.Lock,
        3,
        None,
        Semaphore,
        as_threading(Semaphore()),
        as_threading(Barrier(1)),
    ],
)
def test_as_threading_of_anything_else_is_a_type_error_that_says_what_it_takes(wrong: Any) -> None:
    with pytest.raises(
        TypeError, match="takes an aiosync Semaphore, BoundedSemaphore, Barrier or ConnectionPool"
    ):
        as_threading(wrong)


def test_the_repr_of_a_view_shows_the_shared_object_and_the_state() -> None:
    semaphore, bounded, barrier = Semaphore(3), BoundedSemaphore(3), Barrier(2)
    semaphore.acquire_nowait()
    bounded.acquire_nowait()
    view: Any
    for shared, name, state in (
        (semaphore, "Semaphore", "value=2"),
        (bounded, "BoundedSemaphore", "value=2/3"),
        (barrier, "Barrier", "waiters=0/2"),
    ):
        view = as_threading(shared)
        assert repr(view) == f"<as_threading.{name} at {id(view):#x} of {shared!r}: {state}>"
    barrier.abort()
    assert repr(as_threading(barrier)).endswith(": broken>")


# --- A semaphore in a thread ---


@both_semaphores
class TestSemaphoreInAThread:
    def test_takes_what_is_free_and_gives_it_back(self, new: type[Semaphore]) -> None:
        semaphore = new(2)
        view = as_threading(semaphore)
        assert view.acquire() is True
        assert view.acquire(True, 5) is True
        assert view.acquire(False) is False
        view.release(n=2)
        assert_free(semaphore, 2)

    def test_takes_all_of_more_permits_than_are_kept_in_stock(self, new: type[Semaphore]) -> None:
        semaphore = new(1000)
        view = as_threading(semaphore)
        assert [view.acquire() for _ in range(1000)] == [True] * 1000
        assert view.acquire(blocking=False) is False
        view.release(1000)
        assert_free(semaphore, 1000)

    def test_context_manager_takes_one_and_gives_it_back(self, new: type[Semaphore]) -> None:
        semaphore = new()
        view = as_threading(semaphore)
        with view as taken:
            assert taken is True
            assert semaphore.locked()
        assert_free(semaphore, 1)

    def test_context_manager_gives_back_after_an_exception_and_lets_it_through(
        self, new: type[Semaphore]
    ) -> None:
        semaphore = new()
        view = as_threading(semaphore)
        with pytest.raises(ZeroDivisionError), view:
            1 / 0  # noqa: B018
        assert_free(semaphore, 1)

    @pytest.mark.parametrize("timeout", [0, 0.0, -1, -0.5, -math.inf, False])
    def test_timeout_of_nothing_tries_once(self, new: type[Semaphore], timeout: float) -> None:
        semaphore = new()
        view = as_threading(semaphore)
        assert view.acquire(timeout=timeout) is True
        assert view.acquire(timeout=timeout) is False
        view.release()
        assert_free(semaphore, 1)

    @pytest.mark.parametrize("timeout", [1e9, 1e100, math.inf, sys.maxsize, threading.TIMEOUT_MAX])
    def test_huge_timeout_waits_for_the_permit(self, new: type[Semaphore], timeout: float) -> None:
        semaphore = new()
        view = as_threading(semaphore)
        view.acquire()
        waiter = InThread(lambda: view.acquire(timeout=timeout))
        until(lambda: waiting(semaphore) == 1)
        view.release()
        assert waiter.result() is True

    def test_timeout_gives_up_in_time_and_leaves_nothing(self, new: type[Semaphore]) -> None:
        semaphore = new()
        view = as_threading(semaphore)
        view.acquire()
        before = time.monotonic()
        assert view.acquire(timeout=0.05) is False
        assert 0.04 < time.monotonic() - before < PATIENCE
        assert waiting(semaphore) == 0
        view.release()
        assert_free(semaphore, 1)

    def test_bad_arguments_are_refused_and_take_nothing(self, new: type[Semaphore]) -> None:
        semaphore = new()
        view: Any = as_threading(semaphore)
        for timeout in (1, 0, -1, math.inf):
            with pytest.raises(ValueError, match="timeout for a non-blocking acquire"):
                view.acquire(False, timeout)
        with pytest.raises(ValueError, match="NaN"):
            view.acquire(timeout=math.nan)
        for wrong in ("1", [1], object(), 1j):
            with pytest.raises(TypeError, match="timeout must be a number"):
                view.acquire(timeout=wrong)
        assert_free(semaphore, 1)
        view.acquire()
        for n in (0, -1):
            with pytest.raises(ValueError, match="n must be 1 or more"):
                view.release(n)
        with pytest.raises(TypeError, match="n must be an int"):
            view.release(1.5)
        assert semaphore.value == 0

    def test_release_of_several_wakes_as_many(self, new: type[Semaphore]) -> None:
        semaphore = new(3)
        view = as_threading(semaphore)
        for _ in range(3):
            view.acquire()
        waiters = [InThread(view.acquire) for _ in range(4)]
        until(lambda: waiting(semaphore) == 4)
        view.release(3)
        until(lambda: sum(waiter.done() for waiter in waiters) == 3)
        assert waiting(semaphore) == 1
        view.release()
        assert [waiter.result() for waiter in waiters] == [True] * 4
        assert semaphore.value == 0

    def test_a_newcomer_does_not_overtake_who_waits(self, new: type[Semaphore]) -> None:
        semaphore = new()
        view = as_threading(semaphore)
        view.acquire()
        waiter = InThread(view.acquire)
        until(lambda: waiting(semaphore) == 1)
        view.release()
        assert view.acquire(blocking=False) is False
        assert waiter.result() is True


def test_release_beyond_the_bound_is_refused_whole() -> None:
    semaphore = BoundedSemaphore(2)
    view = as_threading(semaphore)
    view.acquire()
    with pytest.raises(ValueError, match="released too often"):
        view.release(2)
    assert semaphore.value == 1
    view.release()
    assert_free(semaphore, 2)


@pytest.mark.stress
def test_two_threads_that_release_one_permit_at_once_get_exactly_one_error(
    fast_switches: None,
) -> None:
    semaphore = BoundedSemaphore()
    view = as_threading(semaphore)
    rounds = 200  # each keeps two cores busy until both threads have come
    start = [0]
    errors: list[list[int]] = [[], []]

    def release(mine: list[int]) -> None:
        for number in range(1, rounds + 1):
            while start[0] < number:
                pass
            try:
                view.release()
            except ValueError:
                mine.append(1)
            else:
                mine.append(0)

    threads = [InThread(lambda mine=mine: release(mine)) for mine in errors]  # type: ignore[misc]
    for number in range(1, rounds + 1):
        assert view.acquire() is True
        start[0] = number
        until(lambda: all(len(mine) == number for mine in errors))  # noqa: B023
        assert errors[0][-1] + errors[1][-1] == 1
        assert semaphore.value == 1
    assert [thread.result() for thread in threads] == [None, None]
    assert_free(semaphore, 1)


# --- Threads and tasks ---


@both_semaphores
async def test_release_by_a_thread_wakes_a_task(new: type[Semaphore]) -> None:
    semaphore = new()
    view = as_threading(semaphore)
    assert view.acquire()
    results: list[bool] = []

    async def wait() -> None:
        results.append(await semaphore.acquire())

    async with anyio.create_task_group() as tg:
        tg.start_soon(wait)
        await until_async(lambda: waiting(semaphore) == 1)
        thread = InThread(view.release)
        await until_async(lambda: results)
    assert thread.result() is None
    assert results == [True]
    assert semaphore.value == 0


@both_semaphores
async def test_release_by_a_task_wakes_a_thread(new: type[Semaphore]) -> None:
    semaphore = new()
    view = as_threading(semaphore)
    await semaphore.acquire()
    waiter = InThread(view.acquire)
    await until_async(lambda: waiting(semaphore) == 1)
    assert not waiter.done()
    semaphore.release()
    await until_async(waiter.done)
    assert waiter.result() is True
    assert semaphore.value == 0


@pytest.mark.parametrize("seed", range(3))
def test_threads_and_tasks_of_several_loops_are_served_in_the_order_in_which_they_came(
    loops: Loops, seed: int
) -> None:
    places = ["thread"] * 4 + [name + number for name in LOOPS for number in ("", "2")]
    random.Random(seed).shuffle(places)
    semaphore = Semaphore(0)
    jobs = [park_in(place, loops, semaphore) for place in places]
    view = as_threading(semaphore)
    for served, job in enumerate(jobs):
        assert [job.done() for job in jobs] == [True] * served + [False] * (len(jobs) - served)
        view.release()
        assert job.result() is True
        assert semaphore.value == 0


@pytest.mark.slow
@pytest.mark.parametrize("place", ["thread", *LOOPS])
def test_who_times_out_leaves_his_place_to_the_next(loops: Loops, place: str) -> None:
    semaphore = Semaphore(0)
    first = park_in(place, loops, semaphore, 0.2)
    second = park_in("thread", loops, semaphore)
    third = park_in("asyncio", loops, semaphore)
    assert first.result() is False
    semaphore.release()
    assert second.result() is True
    assert not third.done()
    semaphore.release()
    assert third.result() is True
    assert_free(semaphore, 0)


@pytest.mark.parametrize("place", list(LOOPS))
def test_a_permit_handed_to_a_task_that_is_cancelled_goes_to_the_thread_behind_it(
    loops: Loops, place: str
) -> None:
    semaphore = Semaphore(0)
    scopes: list[anyio.CancelScope] = []

    async def wait() -> None:
        with anyio.CancelScope() as scope:
            scopes.append(scope)
            await semaphore.acquire()
            pytest.fail("the cancellation was swallowed")

    def release_and_cancel() -> None:
        # By another thread, so that the task is not told before we leave the loop to itself.
        InThread(as_threading(semaphore).release).result()
        assert waiting(semaphore) == 1  # it has been granted to the task
        scopes[0].cancel()

    task = InLoop(loops[place], wait)
    until(lambda: waiting(semaphore) == 1)
    thread = park_in("thread", loops, semaphore)
    loops[place].call(release_and_cancel)
    assert task.result() is None
    assert thread.result() is True
    assert_free(semaphore, 0)


# --- Barriers ---


def test_mixed_rounds_give_each_index_once_and_run_the_action_once_in_the_last(
    loops: Loops,
) -> None:
    places = ["thread"] * 3 + [name + number for name in LOOPS for number in ("", "2")]
    rounds = 60
    log: list[int] = []
    barrier = Barrier(len(places), lambda: log.append(threading.get_ident()))
    view = as_threading(barrier)
    # For each round: the index and the thread of each party.
    passed: list[list[tuple[int, int]]] = [[] for _ in range(rounds)]

    def in_thread() -> None:
        for round in passed:
            round.append((view.wait(PATIENCE), threading.get_ident()))

    async def in_task() -> None:
        for round in passed:
            round.append((await barrier.wait(PATIENCE), threading.get_ident()))

    jobs = [
        InThread(in_thread) if place == "thread" else InLoop(loops[place], in_task)
        for place in places
    ]
    assert [job.result() for job in jobs] == [None] * len(places)
    assert len(log) == rounds
    for runner, round in zip(log, passed, strict=True):
        assert sorted(index for index, _ in round) == list(range(len(places)))
        assert dict(round)[len(places) - 1] == runner


@pytest.mark.parametrize("last", ["thread", *LOOPS])
def test_the_last_to_arrive_runs_the_action_before_anybody_passes(loops: Loops, last: str) -> None:
    done_at_action: list[list[bool]] = []
    barrier = Barrier(4, lambda: done_at_action.append([job.done() for job in jobs]))
    jobs = [arrive_in(place, loops, barrier) for place in ("thread", "asyncio", "trio")]
    final = arrive_in(last, loops, barrier)
    assert [job.result() for job in [*jobs, final]] == [0, 1, 2, 3]
    assert done_at_action == [[False] * 3]


def test_an_async_action_is_refused_in_a_thread_and_breaks_the_barrier(loops: Loops) -> None:
    cleaned_up: list[bool] = []

    async def action() -> None:
        try:
            await asyncio.sleep(0)
        finally:
            cleaned_up.append(True)

    barrier = Barrier(4, action)
    others = [arrive_in(place, loops, barrier) for place in ("thread", "asyncio", "trio")]
    with pytest.raises(RuntimeError, match="takes a task to do that") as caught:
        as_threading(barrier).wait()
    assert not isinstance(caught.value, threading.BrokenBarrierError)
    assert cleaned_up == [True]
    assert [type(other.result()) for other in others] == [BrokenBarrierError] * 3
    assert barrier.broken
    barrier.reset()
    assert not barrier.broken


def test_an_async_action_with_nothing_to_wait_for_runs_in_a_thread() -> None:
    log: list[str] = []

    async def action() -> None:
        log.append("action")

    assert as_threading(Barrier(1, action)).wait() == 0
    assert log == ["action"]


def test_an_async_action_runs_in_a_task_that_arrives_last(loops: Loops) -> None:
    log: list[str] = []

    async def action() -> None:
        await anyio.sleep(0)
        log.append("action")

    barrier = Barrier(2, action)
    thread = arrive_in("thread", loops, barrier)
    task = arrive_in("trio", loops, barrier)
    assert (thread.result(), task.result(), log) == (0, 1, ["action"])


def test_an_action_that_fails_in_a_thread_breaks_the_barrier_for_tasks(loops: Loops) -> None:
    barrier = Barrier(3, lambda: 1 / 0)
    others = [arrive_in(place, loops, barrier) for place in ("asyncio", "trio")]
    with pytest.raises(ZeroDivisionError):
        as_threading(barrier).wait()
    assert [type(other.result()) for other in others] == [BrokenBarrierError] * 2
    assert barrier.broken


@pytest.mark.parametrize("end", ["abort", "reset"])
@pytest.mark.parametrize("by_view", [True, False])
def test_abort_and_reset_reach_threads_and_tasks(loops: Loops, end: str, by_view: bool) -> None:
    barrier = Barrier(4)
    parties = [arrive_in(place, loops, barrier) for place in ("thread", "asyncio", "trio")]
    getattr(as_threading(barrier) if by_view else barrier, end)()
    assert [type(party.result()) for party in parties] == [BrokenBarrierError] * 3
    assert barrier.broken is (end == "abort")


@pytest.mark.parametrize("place", ["thread", *LOOPS])
def test_the_timeout_of_one_breaks_the_barrier_for_all(loops: Loops, place: str) -> None:
    barrier = Barrier(4)
    others = [arrive_in(other, loops, barrier) for other in ("thread", "asyncio")]
    impatient = arrive_in(place, loops, barrier, 0.05)
    for party in (impatient, *others):
        assert isinstance(party.result(), BrokenBarrierError)
    assert barrier.broken


def test_a_cancelled_task_breaks_the_barrier_for_threads(loops: Loops) -> None:
    barrier = Barrier(3)
    thread = arrive_in("thread", loops, barrier)
    task = arrive_in("asyncio", loops, barrier)
    assert isinstance(task, InLoop)
    task.cancel()
    assert isinstance(thread.result(), BrokenBarrierError)


@pytest.mark.parametrize("timeout", [0, -1, -math.inf])
def test_wait_with_a_timeout_of_nothing_breaks_the_barrier_at_once(timeout: float) -> None:
    barrier = Barrier(2)
    with pytest.raises(threading.BrokenBarrierError):
        as_threading(barrier).wait(timeout)
    assert barrier.broken
    assert as_threading(Barrier(1)).wait(timeout) == 0


@pytest.mark.parametrize("timeout", [1e100, math.inf, sys.maxsize])
def test_wait_with_a_huge_timeout_waits_for_the_others(timeout: float) -> None:
    view = as_threading(Barrier(2, timeout=0))
    party = InThread(lambda: view.wait(timeout))
    until(lambda: view.n_waiting == 1)
    assert view.wait() == 1
    assert party.result() == 0


def test_wait_without_a_timeout_uses_that_of_the_barrier() -> None:
    barrier = Barrier(2, timeout=0.01)
    with pytest.raises(BrokenBarrierError, match="timeout"):
        as_threading(barrier).wait()
    assert barrier.broken


def test_wait_refuses_bad_timeouts_before_it_arrives() -> None:
    barrier = Barrier(1)
    view: Any = as_threading(barrier)
    with pytest.raises(ValueError, match="NaN"):
        view.wait(math.nan)
    for timeout in ("1", [1], 1j):
        with pytest.raises(TypeError, match="timeout must be a number"):
            view.wait(timeout)
    assert (barrier.n_waiting, barrier.broken) == (0, False)
    assert view.wait(timeout=1) == 0


# --- On the thread of an event loop ---


class TestOnTheThreadOfARunningLoop:
    @both_semaphores
    async def test_an_acquire_that_would_block_names_the_awaitable_and_changes_nothing(
        self, new: type[Semaphore]
    ) -> None:
        semaphore = new()
        view = as_threading(semaphore)
        semaphore.acquire_nowait()
        for blocked in (
            view.acquire,
            view.__enter__,
            lambda: view.acquire(timeout=1),
            lambda: view.acquire(True, math.inf),
        ):
            with pytest.raises(RuntimeError, match=r"block the event loop.*await the acquire\(\)"):
                blocked()
        with pytest.raises(RuntimeError, match="block the event loop"), view:
            pytest.fail("it holds no permit")
        assert waiting(semaphore) == 0
        assert semaphore.value == 0
        semaphore.release()
        assert_free(semaphore, 1)

    @both_semaphores
    async def test_a_free_permit_and_the_forms_that_do_not_block_work(
        self, new: type[Semaphore]
    ) -> None:
        semaphore = new()
        view = as_threading(semaphore)
        for take in (
            view.acquire,
            view.__enter__,
            lambda: view.acquire(timeout=1),
            lambda: view.acquire(blocking=False),
            lambda: view.acquire(timeout=0),
        ):
            assert take() is True
            assert view.acquire(blocking=False) is False
            assert view.acquire(timeout=0) is False
            assert view.acquire(timeout=-1) is False
            view.release()
        assert_free(semaphore, 1)

    async def test_a_wait_that_would_block_names_the_awaitable_and_changes_nothing(self) -> None:
        barrier = Barrier(2)
        view = as_threading(barrier)
        for timeout in (None, 1.0, math.inf):
            with pytest.raises(RuntimeError, match=r"block the event loop.*await.*wait\(\)") as e:
                view.wait(timeout)
            assert not isinstance(e.value, threading.BrokenBarrierError)
        assert (barrier.n_waiting, barrier.broken) == (0, False)
        party = InThread(view.wait)
        await until_async(lambda: barrier.n_waiting == 1)
        assert await barrier.wait() == 1
        assert party.result() == 0

    async def test_the_last_to_arrive_does_not_block_and_passes(self) -> None:
        barrier = Barrier(2)
        view = as_threading(barrier)
        party = InThread(view.wait)
        await until_async(lambda: barrier.n_waiting == 1)
        assert view.wait() == 1
        assert party.result() == 0
        assert as_threading(Barrier(1)).wait() == 0

    async def test_wait_with_a_timeout_of_nothing_does_not_block_and_breaks_the_barrier(
        self,
    ) -> None:
        barrier = Barrier(2)
        with pytest.raises(BrokenBarrierError):
            as_threading(barrier).wait(0)
        assert barrier.broken

    async def test_abort_and_reset_work(self) -> None:
        view = as_threading(Barrier(2))
        view.abort()
        assert view.broken
        with pytest.raises(BrokenBarrierError):
            view.wait()
        view.reset()
        assert not view.broken


def test_a_callback_of_an_asyncio_loop_counts_as_its_thread() -> None:
    view = as_threading(Semaphore(0))
    loop = asyncio.new_event_loop()
    errors: list[str] = []

    def callback() -> None:
        try:
            view.acquire()
        except RuntimeError as error:
            errors.append(str(error))
        loop.stop()

    loop.call_soon(callback)
    loop.run_forever()
    assert len(errors) == 1
    assert "event loop" in errors[0]
    # Its thread is free again as soon as it has stopped.
    assert view.acquire(timeout=0.001) is False
    loop.close()
    assert view.acquire(timeout=0.001) is False


# --- Threads of all kinds ---


async def test_worker_threads_of_anyio_block_without_blocking_the_loop() -> None:
    semaphore = Semaphore()
    view = as_threading(semaphore)
    barrier = Barrier(6)
    barrier_view = as_threading(barrier)
    inside, indices = [0], []

    def work() -> None:
        indices.append(barrier_view.wait(PATIENCE))
        for _ in range(50):
            with view:
                inside[0] += 1
                assert inside[0] == 1
                inside[0] -= 1

    async def await_it() -> None:
        indices.append(await barrier.wait(PATIENCE))
        for _ in range(50):
            async with semaphore:
                inside[0] += 1
                assert inside[0] == 1
                inside[0] -= 1

    async with anyio.create_task_group() as tg:
        for _ in range(3):
            tg.start_soon(anyio.to_thread.run_sync, work)
            tg.start_soon(await_it)
    assert sorted(indices) == list(range(6))
    assert_free(semaphore, 1)


async def test_threads_of_a_pool_and_tasks_share_permits() -> None:
    semaphore = BoundedSemaphore(2)
    view = as_threading(semaphore)

    def work() -> bool:
        return view.acquire(timeout=PATIENCE)

    with ThreadPoolExecutor(4) as pool:
        futures = [pool.submit(work) for _ in range(4)]
        await until_async(lambda: waiting(semaphore) == 2)
        semaphore.release(2)
        await until_async(lambda: all(future.done() for future in futures))
        assert [future.result(0) for future in futures] == [True] * 4
        pool.submit(view.release, 2).result(PATIENCE)
    assert await semaphore.acquire(timeout=0)
    semaphore.release()
    assert_free(semaphore, 2)


def test_a_thread_outlives_the_loop_that_started_it(anyio_backend: Any) -> None:
    semaphore, barrier = Semaphore(0), Barrier(2)
    view, barrier_view = as_threading(semaphore), as_threading(barrier)
    jobs: list[InThread] = []

    async def main() -> None:
        jobs.append(InThread(view.acquire))
        jobs.append(InThread(barrier_view.wait))
        await until_async(lambda: waiting(semaphore) == barrier.n_waiting == 1)

    backend, options = anyio_backend
    anyio.run(main, backend=backend, backend_options=options)
    assert not any(job.done() for job in jobs)
    view.release()
    assert barrier_view.wait() == 1
    assert [job.result() for job in jobs] == [True, 0]


def test_a_thread_waits_while_one_loop_after_another_serves_it(anyio_backend: Any) -> None:
    semaphore = Semaphore(0)
    view = as_threading(semaphore)
    thread = InThread(lambda: [view.acquire(timeout=PATIENCE) for _ in range(3)])

    async def main() -> None:
        await until_async(lambda: waiting(semaphore) == 1)
        semaphore.release()
        await until_async(lambda: semaphore.value == 0)

    backend, options = anyio_backend
    for _ in range(3):
        anyio.run(main, backend=backend, backend_options=options)
    assert thread.result() == [True] * 3


@pytest.mark.parametrize("closes_first", [True, False])
@pytest.mark.parametrize("new_loop", [asyncio.new_event_loop, None], ids=["asyncio", "uvloop"])
def test_a_waiter_whose_loop_was_closed_is_skipped_when_a_thread_releases(
    new_loop: Callable[[], asyncio.AbstractEventLoop] | None, closes_first: bool
) -> None:
    if new_loop is None:
        new_loop = pytest.importorskip("uvloop").new_event_loop
    semaphore = Semaphore(0)
    view = as_threading(semaphore)
    loop = new_loop()
    dead = semaphore.acquire()
    task: Any = loop.create_task(dead)
    loop.run_until_complete(asyncio.sleep(0))
    assert waiting(semaphore) == 1
    loop.close()
    behind = InThread(view.acquire)
    until(lambda: waiting(semaphore) == 2)
    if closes_first:
        dead.close()
        assert waiting(semaphore) == 1
    releaser = InThread(view.release)
    assert releaser.result() is None
    assert behind.result() is True
    dead.close()
    assert_free(semaphore, 0)
    view.release()
    assert_free(semaphore, 1)
    # It will never be done, which is not worth a word in the log.
    task._log_destroy_pending = False


# --- Interrupted by a signal ---


class InterruptedError_(Exception):
    """Raised by a signal handler, as KeyboardInterrupt is."""


@contextlib.contextmanager
def interrupted_when(
    condition: Callable[[FrameType | None], object], first: float = 0.001
) -> Iterator[None]:
    """Raise an exception in this thread, once, on an alarm that finds `condition` true."""

    def handler(number: int, frame: FrameType | None) -> None:
        if condition(frame):
            signal.setitimer(signal.ITIMER_REAL, 0)
            raise InterruptedError_

    before = signal.signal(signal.SIGALRM, handler)
    signal.setitimer(signal.ITIMER_REAL, first, 0.001)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@posix
@both_semaphores
@pytest.mark.parametrize("timeout", [None, PATIENCE])
def test_an_interrupted_acquire_leaves_nothing_behind(
    new: type[Semaphore], timeout: float | None
) -> None:
    semaphore = new()
    view = as_threading(semaphore)
    view.acquire()
    with (
        pytest.raises(InterruptedError_),
        interrupted_when(lambda frame: waiting(semaphore) == 1),
    ):
        view.acquire(timeout=timeout)
    assert waiting(semaphore) == 0
    view.release()
    assert_free(semaphore, 1)


@posix
def test_an_interrupted_acquire_leaves_its_place_to_the_next(loops: Loops) -> None:
    semaphore = Semaphore(0)
    view = as_threading(semaphore)
    behind: list[InThread | InLoop] = []

    def somebody_is_behind(frame: FrameType | None) -> bool:
        return len(behind) == 2

    def line_up() -> None:
        until(lambda: waiting(semaphore) == 1)
        behind.append(park_in("thread", loops, semaphore))
        behind.append(park_in("trio", loops, semaphore))

    helper = InThread(line_up)
    with pytest.raises(InterruptedError_), interrupted_when(somebody_is_behind):
        view.acquire()
    assert helper.result() is None
    assert waiting(semaphore) == 2
    view.release()
    assert behind[0].result() is True
    assert not behind[1].done()
    view.release()
    assert behind[1].result() is True
    assert_free(semaphore, 0)


@posix
def test_a_permit_granted_just_before_the_interrupt_goes_to_the_next() -> None:
    semaphore = Semaphore(0)
    view = as_threading(semaphore)

    def grant(frame: FrameType | None) -> bool:
        if waiting(semaphore) != 1:
            return False
        semaphore.release()
        return True

    with pytest.raises(InterruptedError_), interrupted_when(grant):
        view.acquire()
    assert_free(semaphore, 1)


@posix
@pytest.mark.parametrize("timeout", [None, PATIENCE])
def test_an_interrupted_wait_breaks_the_barrier_for_the_others(
    loops: Loops, timeout: float | None
) -> None:
    barrier = Barrier(5)
    others = [arrive_in(place, loops, barrier) for place in ("thread", "asyncio", "trio")]
    with (
        pytest.raises(InterruptedError_),
        interrupted_when(lambda frame: barrier.n_waiting == 4),
    ):
        as_threading(barrier).wait(timeout)
    assert [type(other.result()) for other in others] == [BrokenBarrierError] * 3
    assert barrier.broken


@posix
def test_an_action_interrupted_in_a_thread_breaks_the_barrier_for_the_others(loops: Loops) -> None:
    acting = threading.Event()

    def action() -> None:
        acting.set()
        until(lambda: False)

    barrier = Barrier(3, action)
    others = [arrive_in(place, loops, barrier) for place in ("thread", "trio")]
    with pytest.raises(InterruptedError_), interrupted_when(lambda frame: acting.is_set()):
        as_threading(barrier).wait()
    assert [type(other.result()) for other in others] == [BrokenBarrierError] * 2
    assert barrier.broken


_SOURCES = str(Path(aiosync.__file__).parent)


def inside_aiosync(frame: FrameType | None) -> bool:
    return frame is not None and frame.f_code.co_filename.startswith(_SOURCES)


def interruptions(call: Callable[[], Callable[[], object]], enough: int = 200) -> Iterator[None]:
    """Make calls that an alarm interrupts in their first microseconds, and yield after each.

    :param call: returns what is to be called, made afresh
    """
    rng = random.Random(0)
    count = 0
    deadline = time.monotonic() + PATIENCE
    while count < enough:
        assert time.monotonic() < deadline, "no alarm hits it"
        function = call()
        try:
            with interrupted_when(inside_aiosync, rng.uniform(1e-6, 3e-5)):
                for _ in range(20):
                    function()
        except InterruptedError_:
            count += 1
            yield


@posix
@pytest.mark.filterwarnings("ignore:coroutine .* was never awaited:RuntimeWarning")
def test_a_wait_interrupted_as_the_last_to_arrive_lets_nobody_wait_for_ever() -> None:
    barrier = Barrier(1)

    def prepare() -> Callable[[], object]:
        nonlocal barrier
        barrier = Barrier(1)
        return as_threading(barrier).wait

    undecided = 0
    for _ in interruptions(prepare):
        # All have arrived, so the round has tripped or is broken: nobody waits in it any more.
        undecided += barrier.n_waiting
    assert undecided == 0


# --- Told no, holds nothing ---


@pytest.mark.stress
@both_semaphores
def test_a_thread_told_no_holds_nothing_in_any_race_of_timeout_and_grant(
    fast_switches: None, new: type[Semaphore]
) -> None:
    semaphore = new()
    view = as_threading(semaphore)
    races = RACES // 2  # for each of the two kinds
    timeout = 0.0001
    view.acquire()
    # The times at which the waiter began, and what it was told.
    starts: list[float] = []
    answers: list[bool] = []
    go = threading.Semaphore(0)

    def wait() -> None:
        for _ in range(races):
            assert go.acquire(timeout=PATIENCE)
            starts.append(time.perf_counter())
            answers.append(view.acquire(timeout=timeout))

    waiter = InThread(wait)
    aim = Aim(timeout)
    for race in range(1, races + 1):
        go.release()
        spin_until(lambda: len(starts) == race)  # noqa: B023
        wait_for_moment(aim.moment(starts[-1]))
        view.release()
        spin_until(lambda: len(answers) == race or waiter.done())  # noqa: B023
        granted = answers[race - 1]
        # One permit, and it is here or there.
        assert semaphore.value == (not granted)
        assert waiting(semaphore) == 0
        if not granted:
            assert view.acquire(blocking=False) is True
        aim.learn(granted)
    assert waiter.result() is None
    assert min(aim.outcomes) > races // 20


@pytest.mark.stress
@pytest.mark.parametrize("loop", ["asyncio", "trio"])
def test_a_task_told_no_holds_nothing_in_any_race_of_timeout_and_grant(
    fast_switches: None, loops: Loops, loop: str
) -> None:
    crowd = 10  # tasks that race at the same time, each for a permit of its own
    timeout = 0.001
    semaphores = [BoundedSemaphore() if number % 2 else Semaphore() for number in range(crowd)]
    views = [as_threading(semaphore) for semaphore in semaphores]
    for view in views:
        view.acquire()
    starts: list[float] = []

    async def race_once() -> list[bool]:
        answers = [False] * crowd

        async def wait(number: int) -> None:
            answers[number] = await semaphores[number].acquire(timeout=timeout)

        async with anyio.create_task_group() as tg:
            for number in range(crowd):
                tg.start_soon(wait, number)
            starts.append(time.perf_counter())
        return answers

    aim = Aim(timeout, 2e-5)
    for race in range(1, RACES // crowd + 1):
        job = InLoop(loops[loop], race_once)
        spin_until(lambda: len(starts) == race)  # noqa: B023
        wait_for_moment(aim.moment(starts[-1]))
        for view in views:
            view.release()
        answers: Any = job.result()
        for number, granted in enumerate(answers):
            assert semaphores[number].value == (not granted)
            assert waiting(semaphores[number]) == 0
            if not granted:
                assert views[number].acquire(blocking=False) is True
        aim.learn(sum(answers), crowd)
    assert min(aim.outcomes) > RACES // 20


@pytest.mark.stress
def test_a_round_raced_by_timeout_and_arrival_is_passed_by_both_threads_or_by_neither(
    fast_switches: None,
) -> None:
    barrier = Barrier(2)
    view = as_threading(barrier)
    races = 2000
    timeout = 0.0001
    starts: list[float] = []
    answers: list[object] = []
    go = threading.Semaphore(0)

    def attempt(wait_at_most: float | None) -> object:
        try:
            return view.wait(wait_at_most)
        except BrokenBarrierError:
            return "broken"

    def wait() -> None:
        for _ in range(races):
            assert go.acquire(timeout=PATIENCE)
            starts.append(time.perf_counter())
            answers.append(attempt(timeout))

    waiter = InThread(wait)
    aim = Aim(timeout)
    for race in range(1, races + 1):
        go.release()
        spin_until(lambda: len(starts) == race)  # noqa: B023
        spin_until(lambda: barrier.n_waiting or barrier.broken)
        wait_for_moment(aim.moment(starts[-1]))
        mine = attempt(PATIENCE)
        spin_until(lambda: len(answers) == race or waiter.done())  # noqa: B023
        assert (answers[-1], mine) in {(0, 1), ("broken", "broken")}
        assert barrier.n_waiting == 0
        assert barrier.broken is (mine == "broken")
        barrier.reset()
        aim.learn(mine == 1)
    assert waiter.result() is None
    assert min(aim.outcomes) > races // 20


def test_to_wake_a_thread_when_all_have_just_left_does_no_harm() -> None:
    Barrier(2)._rounds.latest.wake_a_thread()


@pytest.mark.slow
@pytest.mark.parametrize("end", ["trip", "abort", "timeout", "interrupt"])
def test_all_threads_go_on_although_they_wake_one_another(end: str) -> None:
    # Some of them leave for reasons of their own at the very moment when the others are woken.
    parties = 12
    for _ in range(20):
        barrier = Barrier(parties)
        view = as_threading(barrier)
        limits = [0.02 if end == "timeout" and number % 3 == 0 else None for number in range(11)]
        jobs = [InThread(partial(view.wait, limit)) for limit in limits]
        if end == "trip":
            until(lambda: barrier.n_waiting == parties - 1)  # noqa: B023
            assert view.wait() == parties - 1
        elif end == "abort":
            until(lambda: barrier.n_waiting == parties - 1)  # noqa: B023
            barrier.abort()
        elif end == "interrupt":
            until(lambda: barrier.n_waiting == parties - 1)  # noqa: B023
            barrier._rounds.latest.wake_a_thread()  # as if it had been interrupted
        results = [job.result() for job in jobs]
        if end == "trip":
            assert sorted(results, key=repr) == sorted(range(parties - 1), key=repr)
        else:
            assert all(isinstance(result, BrokenBarrierError) for result in results)


def test_a_round_may_trip_just_as_a_party_that_was_too_late_to_give_up_lies_down_again() -> None:
    acting, go = threading.Event(), threading.Event()

    def action() -> None:
        acting.set()
        assert go.wait(PATIENCE)

    barrier = Barrier(2, action)
    last: list[InThread] = []

    def come_last() -> None:  # just after the first, before its time is up
        last.append(InThread(as_threading(barrier).wait))
        assert acting.wait(PATIENCE)

    def new_waiter() -> ThreadWaiter:
        go.set()
        assert last[0].result() == 1
        return thread_waiter()

    barrier._rounds.latest.indices = Indices(barrier._rounds.latest.indices, come_last)
    twin = barrier._for_threads()
    twin._new_waiter = new_waiter
    assert run_in_thread(twin.wait(0)) == 0
    assert not barrier.broken


# --- What is refused, and test doubles ---


@pytest.mark.parametrize(
    "view",
    [as_threading(Semaphore()), as_threading(BoundedSemaphore()), as_threading(Barrier(1))],
    ids=lambda view: type(view).__name__,
)
async def test_async_with_a_view_is_a_type_error_that_names_the_shared_object(view: Any) -> None:
    with pytest.raises(TypeError, match="is for threads; a task uses 'async with' on the object"):
        async with view:
            pytest.fail("entered")


async def test_async_with_the_view_of_a_pool_is_a_type_error_too() -> None:
    async def connect() -> object:
        return object()

    async with aiosync.ConnectionPool(connect) as pool:
        view: Any = as_threading(pool)
        for context in (view, view.connection()):
            with pytest.raises(TypeError, match=f"^{type(context).__name__} is for threads"):
                async with context:
                    pytest.fail("entered")


@pytest.mark.parametrize(
    "cls", [aiosync.ThreadSemaphore, aiosync.ThreadBoundedSemaphore, aiosync.ThreadCheckout]
)
def test_autospec_of_a_view_works_in_with(cls: Any) -> None:
    double = create_autospec(cls, instance=True)
    with double:
        pass
    double.__exit__.assert_called_once()


@pytest.mark.parametrize("cls", [aiosync.ThreadBarrier, aiosync.ThreadConnectionPool])
def test_autospec_of_a_view_without_with_has_its_methods(cls: Any) -> None:
    double = create_autospec(cls, instance=True)
    method = double.wait if cls is aiosync.ThreadBarrier else double.acquire
    method(timeout=1)
    method.assert_called_once_with(timeout=1)


# --- A clock that stands still, as freezegun and time-machine make it ---


@both_semaphores
def test_a_thread_gives_up_in_time_although_the_clock_stands_still(
    frozen_clock: None, new: type[Semaphore]
) -> None:
    view = as_threading(new())
    assert view.acquire() is True
    waiter = InThread(lambda: view.acquire(timeout=0.01))
    assert waiter.result() is False


def test_a_thread_at_a_barrier_gives_up_in_time_although_the_clock_stands_still(
    frozen_clock: None,
) -> None:
    view = as_threading(Barrier(2))
    party = InThread(lambda: view.wait(0.01))
    assert isinstance(party.result(), BrokenBarrierError)


@both_semaphores
@pytest.mark.asyncio
async def test_a_task_gives_up_in_time_although_the_clock_stands_still(
    frozen_clock: None, new: type[Semaphore]
) -> None:
    semaphore = new()
    await semaphore.acquire()
    assert await semaphore.acquire(timeout=0.01) is False
    semaphore.release()
    assert await semaphore.acquire(timeout=0.01) is True


@pytest.mark.asyncio
async def test_a_task_at_a_barrier_gives_up_in_time_although_the_clock_stands_still(
    frozen_clock: None,
) -> None:
    with pytest.raises(BrokenBarrierError):
        await Barrier(2).wait(0.01)


@pytest.mark.asyncio
async def test_a_caller_of_a_pool_gives_up_in_time_although_the_clock_stands_still(
    frozen_clock: None,
) -> None:
    async with ConnectionPool(object, max_size=1, timeout=0.05) as pool:
        connection = await pool.acquire()
        for timeout in (0.01, None):
            with pytest.raises(PoolTimeout):
                await pool.acquire(timeout)
        pool.release(connection)


@pytest.mark.slow
@pytest.mark.asyncio
async def test_a_task_gives_up_in_time_although_the_clock_was_set_by_time_machine(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    travelling = [True]
    machine = SimpleNamespace(escape_hatch=SimpleNamespace(is_travelling=lambda: travelling[0]))
    monkeypatch.setitem(sys.modules, "time_machine", machine)
    before = set(threading.enumerate())
    waiting = asyncio.create_task(Semaphore(0).acquire(timeout=0.2))
    await asyncio.sleep(0)
    timers = set(threading.enumerate()) - before  # the timer is not that of the loop
    assert len(timers) == 1
    assert await waiting is False
    travelling[0] = False
    waiting = asyncio.create_task(Semaphore(0).acquire(timeout=0.01))
    await asyncio.sleep(0)
    assert set(threading.enumerate()) <= before | timers
    assert await waiting is False


# --- What needs the strict checks of arguments ---


@both_semaphores
def test_blocking_is_a_bool(new: type[Semaphore]) -> None:
    semaphore = new()
    view: Any = as_threading(semaphore)
    for wrong in (0.5, 2, "x", None, timedelta(seconds=1)):
        with pytest.raises(TypeError, match="timeout="):
            view.acquire(wrong)
    with pytest.raises(TypeError, match=r"\.total_seconds\(\)"):
        view.acquire(timeout=timedelta(seconds=1))
    assert_free(semaphore, 1)
    assert view.acquire(1) is True
    assert view.acquire(0) is False
    with pytest.raises(TypeError, match="n must be an int"):
        view.release(1.0)
    view.release(Integer(1))
    assert_free(semaphore, 1)


def test_several_permits_are_released_by_an_integer_of_another_type() -> None:
    semaphore = Semaphore(0)
    view: Any = as_threading(semaphore)
    view.release(Integer(3))
    assert_free(semaphore, 3)


def test_the_timeout_of_a_barrier_is_no_timedelta() -> None:
    barrier = Barrier(1)
    view: Any = as_threading(barrier)
    with pytest.raises(TypeError, match=r"\.total_seconds\(\)"):
        view.wait(timedelta(seconds=1))
    assert not barrier.broken


# --- What needs a waiter of pools that does not rely on the clock ---


@pytest.mark.slow
async def test_a_thread_gives_up_a_connection_in_time_although_the_clock_stands_still(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def connect() -> object:
        return object()

    async with aiosync.ConnectionPool(connect, max_size=1) as pool, pool.connection():
        view = as_threading(pool)
        # The clock of the event loop goes on; only that of the waiting thread stands still.
        monkeypatch.setattr("aiosync._park.monotonic", lambda: 1000.0, raising=False)
        waiter = InThread(lambda: view.acquire(timeout=0.6))
        await until_async(waiter.done)
    assert isinstance(waiter.result(), aiosync.PoolTimeout)
