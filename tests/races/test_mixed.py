"""One object, used at once by tasks of several event loops, of both kinds, and by OS threads."""

from __future__ import annotations

import asyncio
import importlib.util
import itertools
import threading
import time
from abc import ABC, abstractmethod
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import anyio
import anyio.lowlevel
import pytest
import trio
from support.helpers import PATIENCE, assert_free, until

from aiosync import Barrier, BoundedSemaphore, BrokenBarrierError, Semaphore
from aiosync._park import run_in_thread

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterator

T = TypeVar("T")
S = TypeVar("S", Semaphore, Barrier)


class Job(Generic[T]):
    """A call that runs elsewhere."""

    def __init__(self) -> None:
        self._future: Future[T] = Future()
        # Cancels it in the way that is native to where it runs; to be called from anywhere.
        self.cancel: Callable[[], object] = self._cannot_be_cancelled
        # The same, at once; to be called where it runs.
        self.cancel_here: Callable[[], object] = self._cannot_be_cancelled

    @staticmethod
    def _cannot_be_cancelled() -> None:
        raise AssertionError("nobody can cancel a thread")

    async def carry_out(self, work: Coroutine[Any, Any, T]) -> None:
        try:
            result = await work
        except Exception as error:
            self._future.set_exception(error)
        except BaseException as error:
            self._future.set_exception(error)
            raise
        else:
            self._future.set_result(result)

    def done(self) -> bool:
        return self._future.done()

    def result(self) -> T:
        return self._future.result(PATIENCE)

    def error(self) -> BaseException | None:
        return self._future.exception(PATIENCE)


class Home(ABC):
    """A place where something can be done with a shared object, by somebody of one kind."""

    @abstractmethod
    def start(self, shared: S, use: Callable[[S], Coroutine[Any, Any, T]]) -> Job[T]:
        """Let somebody who lives here run ``use(shared)``."""

    @abstractmethod
    def close(self) -> None:
        """Send all home, and fail if one does not go."""

    def acquire(self, semaphore: Semaphore, timeout: float | None = None) -> Job[bool]:
        """Start to acquire. Returns when that is done, or has its place in the line."""
        waiting = semaphore.statistics().waiting
        job = self.start(semaphore, lambda shared: shared.acquire(timeout=timeout))
        until(lambda: job.done() or semaphore.statistics().waiting > waiting)
        return job

    def wait(self, barrier: Barrier, timeout: float | None = None) -> Job[int]:
        """Start to wait. Returns when that is done, or the party has arrived."""
        waiting = barrier.n_waiting
        job = self.start(barrier, lambda shared: shared.wait(timeout))
        until(lambda: job.done() or barrier.n_waiting > waiting)
        return job

    def do(self, call: Callable[[], T]) -> T:
        """Make a plain call here: in a task, or in a thread."""

        async def called(_: Semaphore) -> T:
            return call()

        return self.start(Semaphore(), called).result()


class AsyncioHome(Home):
    def __init__(
        self, new_loop: Callable[[], asyncio.AbstractEventLoop] = asyncio.new_event_loop
    ) -> None:
        self._loop = new_loop()
        self._tasks: set[asyncio.Task[None]] = set()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()

    def start(self, shared: S, use: Callable[[S], Coroutine[Any, Any, T]]) -> Job[T]:
        job: Job[T] = Job()
        created = threading.Event()

        def create() -> None:
            task = self._loop.create_task(job.carry_out(use(shared)))
            self._tasks.add(task)
            job.cancel_here = task.cancel
            job.cancel = lambda: self._loop.call_soon_threadsafe(task.cancel)
            created.set()

        self._loop.call_soon_threadsafe(create)
        assert created.wait(PATIENCE)
        return job

    def close(self) -> None:
        async def cancel_all() -> None:
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)

        asyncio.run_coroutine_threadsafe(cancel_all(), self._loop).result(PATIENCE)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(PATIENCE)
        assert not self._thread.is_alive()
        self._loop.close()


class TrioHome(Home):
    def __init__(self) -> None:
        self._ready = threading.Event()
        self._thread = threading.Thread(target=trio.run, args=[self._main], daemon=True)
        self._thread.start()
        assert self._ready.wait(PATIENCE)

    async def _main(self) -> None:
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            self._token = trio.lowlevel.current_trio_token()
            self._ready.set()
            await trio.sleep_forever()

    def start(self, shared: S, use: Callable[[S], Coroutine[Any, Any, T]]) -> Job[T]:
        job: Job[T] = Job()
        scope = trio.CancelScope()

        async def run() -> None:
            with scope:
                await job.carry_out(use(shared))

        job.cancel_here = scope.cancel
        job.cancel = lambda: self._token.run_sync_soon(scope.cancel)
        self._token.run_sync_soon(self._nursery.start_soon, run)
        return job

    def close(self) -> None:
        self._token.run_sync_soon(self._nursery.cancel_scope.cancel)
        self._thread.join(PATIENCE)
        assert not self._thread.is_alive()


class ThreadHome(Home):
    def __init__(self) -> None:
        self._threads: list[threading.Thread] = []

    def start(self, shared: S, use: Callable[[S], Coroutine[Any, Any, T]]) -> Job[T]:
        job: Job[T] = Job()
        twin = shared._for_threads()

        def run() -> None:
            run_in_thread(job.carry_out(use(twin)))

        thread = threading.Thread(target=run, daemon=True)
        self._threads.append(thread)
        thread.start()
        return job

    def close(self) -> None:
        for thread in self._threads:
            thread.join(PATIENCE)
        assert not any(thread.is_alive() for thread in self._threads)


def uvloop_home() -> Home:
    import uvloop

    return AsyncioHome(uvloop.new_event_loop)


HOMES: dict[str, Callable[[], Home]] = {
    "asyncio": AsyncioHome,
    "trio": TrioHome,
    "thread": ThreadHome,
}
if importlib.util.find_spec("uvloop") is not None:
    HOMES["uvloop"] = uvloop_home

KINDS = list(HOMES)
TASK_KINDS = [kind for kind in KINDS if kind != "thread"]


class Homes:
    """One home of each kind, each built when it is first asked for."""

    def __init__(self) -> None:
        self._homes: dict[str, Home] = {}

    def __getitem__(self, name: str) -> Home:
        """Return the home of that name: a kind, or a kind and a number for further ones."""
        if name not in self._homes:
            self._homes[name] = HOMES[name.rstrip("0123456789")]()
        return self._homes[name]

    def close(self) -> None:
        for home in self._homes.values():
            home.close()


@pytest.fixture
def homes() -> Iterator[Homes]:
    homes = Homes()
    yield homes
    homes.close()


# --- Semaphore, step by step ---


@pytest.mark.parametrize("releaser", KINDS)
@pytest.mark.parametrize("waiter", KINDS)
def test_release_by_any_kind_wakes_a_waiter_of_any_kind(
    homes: Homes, waiter: str, releaser: str
) -> None:
    semaphore = Semaphore(0)
    job = homes[waiter].acquire(semaphore)
    assert not job.done()
    homes[releaser + "2"].do(semaphore.release)
    assert job.result() is True
    assert_free(semaphore, 0)


@pytest.mark.parametrize("kind", KINDS)
def test_release_on_the_home_of_the_waiter_wakes_it(homes: Homes, kind: str) -> None:
    semaphore = Semaphore(0)
    job = homes[kind].acquire(semaphore)
    homes[kind].do(semaphore.release)
    assert job.result() is True
    assert_free(semaphore, 0)


@pytest.mark.parametrize("order", list(itertools.permutations(["asyncio", "trio", "thread"])))
def test_waiters_of_all_kinds_are_served_first_in_first_out(
    homes: Homes, order: tuple[str, ...]
) -> None:
    semaphore = Semaphore(0)
    names = [*order, *(name + "2" for name in order), *order]
    jobs = [homes[name].acquire(semaphore) for name in names]
    assert semaphore.statistics().waiting == len(names)
    for position, job in enumerate(jobs):
        semaphore.release()
        assert job.result() is True
        assert [other.done() for other in jobs[position + 1 :]] == [False] * (
            len(jobs) - position - 1
        )
        assert semaphore.statistics().waiting == len(jobs) - position - 1
    assert_free(semaphore, 0)


def test_release_of_several_goes_to_the_first_in_line_whatever_their_kind(homes: Homes) -> None:
    semaphore = Semaphore(0)
    jobs = [homes[name].acquire(semaphore) for name in ["trio", "thread", "asyncio", "thread"]]
    semaphore.release(3)
    assert [job.result() for job in jobs[:3]] == [True] * 3
    assert not jobs[3].done()
    assert semaphore.value == 0
    semaphore.release(3)
    assert jobs[3].result() is True
    assert_free(semaphore, 2)


@pytest.mark.parametrize("kind", KINDS)
def test_permit_handed_to_a_waiter_elsewhere_cannot_be_snatched(homes: Homes, kind: str) -> None:
    semaphore = Semaphore(0)
    job = homes[kind].acquire(semaphore)
    semaphore.release()
    with pytest.raises(anyio.WouldBlock):
        semaphore.acquire_nowait()
    assert semaphore.value == 0
    assert job.result() is True


@pytest.mark.parametrize("kind", KINDS)
def test_newcomer_of_any_kind_does_not_overtake_who_waits(homes: Homes, kind: str) -> None:
    semaphore = Semaphore(0)
    first = homes["trio" if kind != "trio" else "asyncio"].acquire(semaphore)
    second = homes[kind].start(semaphore, lambda shared: shared.acquire(blocking=False))
    assert second.result() is False
    third = homes[kind].acquire(semaphore)
    semaphore.release()
    assert first.result() is True
    assert not third.done()
    semaphore.release()
    assert third.result() is True


@pytest.mark.parametrize("kind", TASK_KINDS)
@pytest.mark.parametrize("follower", KINDS)
def test_cancelled_waiter_leaves_the_line_to_those_of_other_kinds(
    homes: Homes, kind: str, follower: str
) -> None:
    semaphore = Semaphore(0)
    first = homes[kind].acquire(semaphore)
    second = homes[follower + "2"].acquire(semaphore)
    first.cancel()
    assert isinstance(first.error(), (asyncio.CancelledError, trio.Cancelled))
    until(lambda: semaphore.statistics().waiting == 1)
    semaphore.release()
    assert second.result() is True
    assert_free(semaphore, 0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("follower", KINDS)
def test_timed_out_waiter_leaves_the_line_to_those_of_other_kinds(
    homes: Homes, kind: str, follower: str
) -> None:
    semaphore = Semaphore(0)
    first = homes[kind].acquire(semaphore, 0.02)
    # Not waited for: by then the first may be gone.
    second = homes[follower + "2"].start(semaphore, lambda shared: shared.acquire(timeout=PATIENCE))
    assert first.result() is False
    until(lambda: semaphore.statistics().waiting == 1)
    semaphore.release()
    assert second.result() is True
    assert_free(semaphore, 0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("timeout", [0, -1, 1e-9])
def test_timeout_of_nothing_gives_up_at_once_and_leaves_nothing(
    homes: Homes, kind: str, timeout: float
) -> None:
    semaphore = Semaphore(0)
    job = homes[kind].start(semaphore, lambda shared: shared.acquire(timeout=timeout))
    assert job.result() is False
    assert_free(semaphore, 0)


@pytest.mark.parametrize("kind", TASK_KINDS)
@pytest.mark.parametrize("follower", KINDS)
def test_cancel_after_the_hand_over_loses_no_permit(homes: Homes, kind: str, follower: str) -> None:
    semaphore = Semaphore(0)
    first = homes[kind].acquire(semaphore)
    second = homes[follower + "2"].acquire(semaphore)

    def release_and_cancel() -> None:
        semaphore.release()
        first.cancel_here()

    homes[kind].do(release_and_cancel)
    # asyncio raises the cancellation, trio keeps it for the next checkpoint. So the permit goes to
    # the second, or stays with the first.
    assert (first.error() is None) == (kind == "trio")
    if first.error() is None:
        assert not second.done()
        semaphore.release()
    assert second.result() is True
    assert_free(semaphore, 0)


@pytest.mark.parametrize("kind", TASK_KINDS)
@pytest.mark.parametrize("follower", KINDS)
def test_cancel_just_before_the_release_gives_the_permit_to_the_next(
    homes: Homes, kind: str, follower: str
) -> None:
    semaphore = Semaphore(0)
    first = homes[kind].acquire(semaphore)
    second = homes[follower + "2"].acquire(semaphore)

    def cancel_and_release() -> None:
        first.cancel_here()
        semaphore.release(2)
        # The cancelled one has not run yet, and gets nothing all the same.
        semaphore.acquire_nowait()

    homes[kind].do(cancel_and_release)
    assert second.result() is True
    assert isinstance(first.error(), (asyncio.CancelledError, trio.Cancelled))
    assert_free(semaphore, 0)


@pytest.mark.parametrize("kinds", list(itertools.permutations(["asyncio", "trio", "thread"], 2)))
def test_two_kinds_take_turns_without_losing_one(homes: Homes, kinds: tuple[str, str]) -> None:
    turns = 100
    mine = [Semaphore(1), Semaphore(0)]
    log: list[int] = []

    def player(me: int) -> Job[None]:
        in_thread = kinds[me] == "thread"
        my_turn, your_turn = mine[me], mine[1 - me]

        async def play(_: Semaphore) -> None:
            own = my_turn._for_threads() if in_thread else my_turn
            for _turn in range(turns):
                assert await own.acquire(timeout=PATIENCE)
                log.append(me)
                your_turn.release()

        return homes[kinds[me]].start(my_turn, play)

    for job in [player(0), player(1)]:
        job.result()
    assert log == [0, 1] * turns
    assert (mine[0].value, mine[1].value) == (1, 0)


# Created before there is any event loop.
ON_IMPORT_SEMAPHORE = Semaphore(1)
ON_IMPORT_BOUNDED = BoundedSemaphore(1)
ON_IMPORT_BARRIER = Barrier(2)


def test_objects_created_at_import_serve_asyncio_then_trio_then_asyncio_again() -> None:
    async def use() -> list[int]:
        indices = []

        async def use_one(semaphore: Semaphore) -> None:
            assert await semaphore.acquire()
            await anyio.lowlevel.checkpoint()
            semaphore.release()
            async with ON_IMPORT_BARRIER as index:
                indices.append(index)

        for semaphore in [ON_IMPORT_SEMAPHORE, ON_IMPORT_BOUNDED]:
            async with anyio.create_task_group() as group:
                group.start_soon(use_one, semaphore)
                group.start_soon(use_one, semaphore)
        return indices

    for backend in ["asyncio", "trio", "asyncio", "trio"]:
        indices = anyio.run(use, backend=backend)
        assert [sorted(indices[:2]), sorted(indices[2:])] == [[0, 1], [0, 1]]
    assert_free(ON_IMPORT_SEMAPHORE, 1)
    assert_free(ON_IMPORT_BOUNDED, 1)
    assert (ON_IMPORT_BARRIER.n_waiting, ON_IMPORT_BARRIER.broken) == (0, False)


# --- Barrier, step by step ---


def test_barrier_rounds_of_all_kinds_give_each_index_once_and_run_the_action_once(
    homes: Homes,
) -> None:
    rounds = 30
    runs: list[int] = []
    barrier = Barrier(3, lambda: runs.append(len(runs)))

    async def take_part(shared: Barrier) -> list[tuple[int, int]]:
        log = []
        for _ in range(rounds):
            index = await shared.wait(PATIENCE)
            # Nobody gets through the next round before this party has joined it.
            log.append((index, len(runs)))
        return log

    jobs = [homes[kind].start(barrier, take_part) for kind in ["asyncio", "trio", "thread"]]
    logs = [job.result() for job in jobs]
    for round, entries in enumerate(zip(*logs, strict=True), 1):
        assert sorted(entries) == [(0, round), (1, round), (2, round)]
    assert len(runs) == rounds
    assert (barrier.n_waiting, barrier.broken) == (0, False)


@pytest.mark.parametrize("order", list(itertools.permutations(["asyncio", "trio", "thread"])))
def test_barrier_indices_follow_the_order_of_arrival_across_kinds(
    homes: Homes, order: tuple[str, ...]
) -> None:
    barrier = Barrier(3)
    for _ in range(3):
        jobs = [homes[kind].wait(barrier) for kind in order]
        assert [job.result() for job in jobs] == [0, 1, 2]


@pytest.mark.parametrize("last", KINDS)
def test_async_action_of_a_barrier_runs_where_the_last_party_is(homes: Homes, last: str) -> None:
    ran_in: list[threading.Thread] = []

    async def action() -> None:
        if last != "thread":
            await anyio.lowlevel.checkpoint()
        ran_in.append(threading.current_thread())

    barrier = Barrier(3, action)
    jobs = [homes[kind].wait(barrier) for kind in ["thread2", "trio2", last]]
    assert [job.result() for job in jobs] == [0, 1, 2]
    if last != "thread":
        assert ran_in == [homes[last].do(threading.current_thread)]
    assert len(ran_in) == 1


@pytest.mark.parametrize("last", KINDS)
def test_failing_action_of_one_kind_breaks_the_barrier_for_the_others(
    homes: Homes, last: str
) -> None:
    def action() -> None:
        raise LookupError("no such luck")

    barrier = Barrier(4, action)
    others = [homes[kind].wait(barrier) for kind in ["thread2", "trio2", "asyncio2"]]
    assert isinstance(homes[last].wait(barrier).error(), LookupError)
    assert [type(job.error()) for job in others] == [BrokenBarrierError] * 3
    assert barrier.broken


@pytest.mark.parametrize("breaker", KINDS)
@pytest.mark.parametrize("how", ["abort", "reset"])
def test_abort_and_reset_by_one_kind_reach_those_of_all_kinds(
    homes: Homes, breaker: str, how: str
) -> None:
    barrier = Barrier(4)
    jobs = [homes[kind].wait(barrier) for kind in ["asyncio", "trio", "thread"]]
    homes[breaker].do(barrier.abort if how == "abort" else barrier.reset)
    assert [type(job.error()) for job in jobs] == [BrokenBarrierError] * 3
    assert barrier.broken is (how == "abort")
    assert barrier.n_waiting == 0
    if how == "abort":
        for kind in KINDS:
            assert isinstance(homes[kind].wait(barrier).error(), BrokenBarrierError)
        homes[breaker].do(barrier.reset)
    jobs = [homes[kind].wait(barrier) for kind in ["asyncio", "trio", "thread", "thread"]]
    assert [job.result() for job in jobs] == [0, 1, 2, 3]


@pytest.mark.parametrize("kind", KINDS)
def test_timeout_of_one_kind_breaks_the_barrier_for_the_others(homes: Homes, kind: str) -> None:
    barrier = Barrier(5)
    others = [homes[name].wait(barrier) for name in ["asyncio2", "trio2", "thread2"]]
    assert isinstance(homes[kind].wait(barrier, 0.01).error(), BrokenBarrierError)
    assert [type(job.error()) for job in others] == [BrokenBarrierError] * 3
    assert barrier.broken


@pytest.mark.parametrize("kind", TASK_KINDS)
def test_cancel_of_one_kind_breaks_the_barrier_for_the_others(homes: Homes, kind: str) -> None:
    barrier = Barrier(5)
    others = [homes[name].wait(barrier) for name in ["asyncio2", "trio2", "thread2"]]
    victim = homes[kind].wait(barrier)
    victim.cancel()
    assert isinstance(victim.error(), (asyncio.CancelledError, trio.Cancelled))
    assert [type(job.error()) for job in others] == [BrokenBarrierError] * 3
    assert barrier.broken


@pytest.mark.parametrize("kind", KINDS)
def test_party_that_comes_while_the_action_runs_joins_the_next_round(
    homes: Homes, kind: str
) -> None:
    entered, leave = threading.Event(), threading.Event()

    def action() -> None:
        entered.set()
        assert leave.wait(PATIENCE)

    barrier = Barrier(2, action)
    early = homes["trio2"].wait(barrier)
    last = homes["thread2"].start(barrier, lambda shared: shared.wait())
    assert entered.wait(PATIENCE)
    late = [homes[kind].start(barrier, lambda shared: shared.wait()) for _ in range(2)]
    assert not early.done()
    leave.set()
    assert (early.result(), last.result()) == (0, 1)
    assert sorted(job.result() for job in late) == [0, 1]


@pytest.mark.parametrize("kind", TASK_KINDS)
def test_cancel_while_the_action_runs_elsewhere_concerns_nobody_else(
    homes: Homes, kind: str
) -> None:
    entered, leave = threading.Event(), threading.Event()

    def action() -> None:
        entered.set()
        assert leave.wait(PATIENCE)

    barrier = Barrier(4, action)
    others = [homes[name].wait(barrier) for name in ["thread2", "trio2"]]
    victim = homes[kind].wait(barrier)
    last = homes["thread3"].start(barrier, lambda shared: shared.wait())
    assert entered.wait(PATIENCE)
    victim.cancel()
    assert isinstance(victim.error(), (asyncio.CancelledError, trio.Cancelled))
    assert not barrier.broken
    leave.set()
    assert [job.result() for job in [*others, last]] == [0, 1, 3]


@pytest.mark.slow
def test_nobody_of_any_kind_runs_out_of_time_while_the_action_runs_elsewhere(
    homes: Homes,
) -> None:
    timeout = 1.0
    barrier = Barrier(len(KINDS) + 1, lambda: time.sleep(timeout + 0.05))
    for kind in KINDS:
        homes[kind].do(bool)  # have them built, so that all arrive in time
    jobs = [homes[kind].wait(barrier, timeout) for kind in KINDS]
    jobs.append(homes["thread2"].wait(barrier))
    assert [job.result() for job in jobs] == list(range(len(KINDS) + 1))


# --- Storms ---
