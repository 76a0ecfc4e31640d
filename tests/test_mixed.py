"""One object, used at once by tasks of several event loops, of both kinds, and by OS threads."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import itertools
import random
import sys
import threading
import time
from abc import ABC, abstractmethod
from collections import Counter, defaultdict, deque
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypeVar

import anyio
import anyio.lowlevel
import pytest
import trio
from helpers import PATIENCE, until

from aiosync import Barrier, BoundedSemaphore, BrokenBarrierError, Semaphore
from aiosync._park import run_in_thread

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterator, Sequence

T = TypeVar("T")
S = TypeVar("S", Semaphore, Barrier)

# How long a storm lasts.
STORM = 1.2


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


@pytest.fixture
def fast_switches() -> Iterator[None]:
    """Let the threads take turns after every few bytecodes."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


def assert_free(semaphore: Semaphore, value: int) -> None:
    """Check that `value` permits are free, that nobody waits, and that they can be had."""
    assert semaphore.statistics().waiting == 0
    assert semaphore.value == value
    for _ in range(value):
        semaphore.acquire_nowait()
    with pytest.raises(anyio.WouldBlock):
        semaphore.acquire_nowait()
    semaphore.release(max(value, 1))
    if not value:
        semaphore.acquire_nowait()


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


def run_all(workers: Sequence[Callable[[], None]], driver: Callable[[], None]) -> None:
    """Run `workers`, each in a thread of its own, and `driver` here. Raise what one has raised."""
    errors: list[BaseException] = []

    def run(work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=[work], daemon=True) for work in workers]
    for thread in threads:
        thread.start()
    driver()
    deadline = time.monotonic() + PATIENCE
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    for error in errors:
        raise error
    assert not any(thread.is_alive() for thread in threads), "somebody waits for ever"


class SemaphoreStorm:
    """Threads and tasks that all take and return permits of one semaphore, in every way."""

    def __init__(self, semaphore: Semaphore, seed: int) -> None:
        self.semaphore = semaphore
        self.seed = seed
        self.value = semaphore.value
        # One entry for each permit that somebody holds.
        self.held: deque[str] = deque()
        self.passes: Counter[str] = Counter()
        self.end = time.monotonic() + STORM

    def going(self) -> bool:
        return time.monotonic() < self.end

    def rng(self, *name: object) -> random.Random:
        return random.Random(f"{self.seed} {name}")

    def enter(self, kind: str) -> None:
        self.held.append(kind)
        # Others may come and go, but each leaves before it releases, so this is never too many.
        assert len(self.held) <= self.value, "more holders than permits"
        self.passes[kind] += 1

    def take_more(self, kind: str, rng: random.Random) -> int:
        """Take more permits, as long as the dice say so and there are any."""
        taken = 0
        while rng.random() < 0.3:
            try:
                self.semaphore.acquire_nowait()
            except anyio.WouldBlock:
                break
            self.enter(kind)
            taken += 1
        return taken

    def give_back(self, taken: int, rng: random.Random) -> None:
        for _ in range(taken):
            self.held.pop()
        if rng.random() < 0.5:
            self.semaphore.release(taken)
        else:
            for _ in range(taken):
                self.semaphore.release()

    @staticmethod
    def patience(rng: random.Random) -> float | None:
        return rng.choice([None, None, 0.005, 0.0005, 0.0001, 1e-6, 0, -1])

    async def attempt(self, semaphore: Semaphore, kind: str, rng: random.Random) -> None:
        """Take a permit if there is one in time, hold it for a moment, and give it back."""
        if rng.random() < 0.1:
            acquired = await semaphore.acquire(blocking=False)
        else:
            acquired = await semaphore.acquire(timeout=self.patience(rng))
        if not acquired:
            return
        self.enter(kind)
        taken = 1
        try:
            taken += self.take_more(kind, rng)
            if kind != "thread" and rng.random() < 0.5:
                await anyio.lowlevel.checkpoint()
        finally:
            self.give_back(taken, rng)

    def thread(self, number: int) -> None:
        rng = self.rng("thread", number)
        twin = self.semaphore._for_threads()
        while self.going():
            run_in_thread(self.attempt(twin, "thread", rng))

    async def asyncio_task(self, loop_number: int, number: int) -> None:
        rng = self.rng("asyncio", loop_number, number)
        loop = asyncio.get_running_loop()
        while self.going():
            attempt = self.attempt(self.semaphore, "asyncio", rng)
            how = rng.random()
            if how < 0.3:
                task = loop.create_task(attempt)
                timer = loop.call_later(rng.choice([0, 0, 0.0003, 0.002]), task.cancel)
                with contextlib.suppress(asyncio.CancelledError):
                    await task
                timer.cancel()
            elif how < 0.6:
                with anyio.move_on_after(rng.choice([0, 0.0003, 0.002])):
                    await attempt
            else:
                await attempt
            await anyio.lowlevel.checkpoint()

    def asyncio_loop(self, number: int) -> None:
        async def main() -> None:
            await asyncio.gather(*(self.asyncio_task(number, task) for task in range(4)))

        asyncio.run(main())

    async def trio_task(self, number: int) -> None:
        rng = self.rng("trio", number)
        while self.going():
            how = rng.random()
            if how < 0.3:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self.attempt, self.semaphore, "trio", rng)
                    for _ in range(rng.randrange(4)):
                        await trio.lowlevel.checkpoint()
                    nursery.cancel_scope.cancel()
            elif how < 0.6:
                with trio.move_on_after(rng.choice([0, 0.0003, 0.002])):
                    await self.attempt(self.semaphore, "trio", rng)
            else:
                await self.attempt(self.semaphore, "trio", rng)
            await trio.lowlevel.checkpoint()

    def trio_loop(self) -> None:
        async def main() -> None:
            async with trio.open_nursery() as nursery:
                for number in range(4):
                    nursery.start_soon(self.trio_task, number)

        trio.run(main)

    def run(self) -> None:
        workers: list[Callable[[], None]] = [
            lambda: self.thread(0),
            lambda: self.thread(1),
            lambda: self.thread(2),
            lambda: self.asyncio_loop(0),
            lambda: self.asyncio_loop(1),
            self.trio_loop,
        ]
        run_all(workers, lambda: None)


@pytest.mark.stress
@pytest.mark.usefixtures("fast_switches")
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_semaphore_conserves_its_permits_in_a_storm_of_all_kinds(seed: int) -> None:
    value = 1 + seed % 3
    semaphore = Semaphore(value, fast_acquire=seed % 2 == 0)
    storm = SemaphoreStorm(semaphore, seed)
    storm.run()
    assert not storm.held
    assert all(storm.passes[kind] > 10 for kind in ["thread", "asyncio", "trio"]), storm.passes
    assert_free(semaphore, value)


@pytest.mark.stress
@pytest.mark.usefixtures("fast_switches")
@pytest.mark.parametrize("seed", [4, 5])
def test_bounded_semaphore_refuses_nobody_and_loses_nothing_in_a_storm(seed: int) -> None:
    value = 1 + seed % 3
    semaphore = BoundedSemaphore(value, fast_acquire=seed % 2 == 0)
    storm = SemaphoreStorm(semaphore, seed)
    storm.run()  # a release that is refused raises ValueError here
    assert not storm.held
    assert all(storm.passes[kind] > 10 for kind in ["thread", "asyncio", "trio"]), storm.passes
    assert_free(semaphore, value)
    with pytest.raises(ValueError, match="released too often"):
        semaphore.release()


class Visit(NamedTuple):
    """What became of one call of `wait`."""

    outcome: str  # "passed", "broken" or "cancelled"
    place: int
    # How often the action had been run before and after the call.
    before: int
    after: int


class BarrierStorm:
    """Threads and tasks that all meet at one barrier, again and again."""

    def __init__(self, barrier: Barrier, seed: int, *, cancels: bool) -> None:
        self.barrier = barrier
        self.seed = seed
        self.cancels = cancels
        self.over = False
        # Only one party at a time runs the action.
        self.actions = 0
        self.visits: defaultdict[str, list[Visit]] = defaultdict(list)

    def rng(self, name: str) -> random.Random:
        return random.Random(f"{self.seed} {name}")

    @staticmethod
    def timeout(rng: random.Random) -> float | None:
        return rng.choices([None, 1, 0.003, 0.0003, 1e-6, 0], [40, 40, 4, 1, 1, 1])[0]

    def going(self, name: str, visit: Visit) -> bool:
        """Note `visit`, and tell whether to come again."""
        self.visits[name].append(visit)
        return not self.over

    async def wait(self, barrier: Barrier, timeout: float | None) -> tuple[str, int]:
        try:
            return "passed", await barrier.wait(timeout)
        except BrokenBarrierError:
            return "broken", -1

    def thread(self, name: str) -> None:
        rng = self.rng(name)
        twin = self.barrier._for_threads()
        going = True
        while going:
            before = self.actions
            outcome, index = run_in_thread(self.wait(twin, self.timeout(rng)))
            going = self.going(name, Visit(outcome, index, before, self.actions))
            if outcome != "passed":
                time.sleep(0.0001)

    async def asyncio_task(self, name: str) -> None:
        rng = self.rng(name)
        loop = asyncio.get_running_loop()
        going = True
        while going:
            outcome, index = "cancelled", -1
            before = self.actions
            wait = self.wait(self.barrier, self.timeout(rng))
            how = rng.random() if self.cancels else 1
            if how < 0.05:
                task = loop.create_task(wait)
                timer = loop.call_later(rng.choice([0, 0.0003, 0.002]), task.cancel)
                with contextlib.suppress(asyncio.CancelledError):
                    outcome, index = await task
                timer.cancel()
            elif how < 0.1:
                with anyio.move_on_after(rng.choice([0, 0.0003, 0.002])):
                    outcome, index = await wait
            else:
                outcome, index = await wait
            going = self.going(name, Visit(outcome, index, before, self.actions))
            await asyncio.sleep(0 if outcome == "passed" else 0.0001)

    async def trio_task(self, name: str) -> None:
        rng = self.rng(name)
        going = True
        while going:
            outcome, index = "cancelled", -1
            before = self.actions
            patience = rng.choice([0, 0.0003, 0.002])
            if not self.cancels or rng.random() < 0.9:
                patience = float("inf")
            with trio.move_on_after(patience):
                outcome, index = await self.wait(self.barrier, self.timeout(rng))
            going = self.going(name, Visit(outcome, index, before, self.actions))
            await trio.sleep(0 if outcome == "passed" else 0.0001)

    def run(self, participants: int, driver: Callable[[random.Random], None]) -> None:
        """Let that many take part, while `driver` is called again and again."""
        kinds: dict[str, list[str]] = defaultdict(list)
        first = self.seed % 3
        for number in range(first, first + participants):
            kind = ("asyncio", "trio", "thread")[number % 3]
            kinds[kind].append(f"{kind} {number}")

        async def asyncio_main(names: Sequence[str]) -> None:
            await asyncio.gather(*map(self.asyncio_task, names))

        async def trio_main() -> None:
            async with trio.open_nursery() as nursery:
                for name in kinds["trio"]:
                    nursery.start_soon(self.trio_task, name)

        def thread_main(name: str) -> Callable[[], None]:
            return lambda: self.thread(name)

        def drive() -> None:
            rng = self.rng("driver")
            end = time.monotonic() + STORM
            while time.monotonic() < end:
                driver(rng)
                time.sleep(rng.random() * 0.002)
            self.over = True
            self.barrier.abort()

        # Two loops of asyncio, as soon as there is something to do for both.
        run_all(
            [
                lambda: asyncio.run(asyncio_main(kinds["asyncio"][::2])),
                lambda: asyncio.run(asyncio_main(kinds["asyncio"][1::2])),
                lambda: trio.run(trio_main),
                *map(thread_main, kinds["thread"]),
            ],
            drive,
        )
        assert self.barrier.broken
        self.barrier.reset()
        assert (self.barrier.n_waiting, self.barrier.broken) == (0, False)


@pytest.mark.stress
@pytest.mark.usefixtures("fast_switches")
@pytest.mark.parametrize("seed", [1, 2])
def test_barrier_round_is_passed_by_all_or_none_in_a_storm_of_cancels_and_timeouts(
    seed: int,
) -> None:
    def action() -> None:
        storm.actions += 1
        if storm.actions % 4 == 0:
            time.sleep(0.001)  # long enough for some to run out of time, which must not matter

    def mend(rng: random.Random) -> None:
        # Nothing else ends the broken state, and nothing but a cancel or a timeout begins it: so no
        # round is broken once its action runs, and each run of the action is the one of a round.
        if barrier.broken:
            barrier.reset()

    parties = 3 + seed % 3
    barrier = Barrier(parties, action)
    storm = BarrierStorm(barrier, seed, cancels=True)
    storm.run(parties, mend)
    rounds: defaultdict[int, list[Visit]] = defaultdict(list)
    outcomes: Counter[str] = Counter()
    for visits in storm.visits.values():
        for visit, previous in zip(visits, [None, *visits], strict=False):
            outcomes[visit.outcome] += 1
            # Whether it may have left the round before just as the action of that was about to run,
            # which then does so during this visit.
            has_left = previous is not None and (
                (previous.outcome, previous.after) == ("cancelled", visit.before)
            )
            # No further round can trip while one party is still on its way through this one.
            actions = visit.after - visit.before
            assert 0 <= actions <= 1 + has_left
            if not actions:
                assert visit.outcome != "passed", "passed a round that has not tripped"
            elif actions == 2 or visit.outcome != "broken" or not has_left:
                rounds[visit.after].append(visit)
    assert max(rounds) == storm.actions
    for number, visits in rounds.items():
        passed = [visit.place for visit in visits if visit.outcome == "passed"]
        broken = [visit for visit in visits if visit.outcome == "broken"]
        if number == storm.actions and not passed:
            continue  # the abort at the end may have come while the action was running
        assert not broken, "some have passed and others were told that it is broken"
        # Who was cancelled while the action was running may have left before it counted.
        early = [
            visit
            for visit in itertools.chain.from_iterable(storm.visits.values())
            if visit.outcome == "cancelled" and visit.after == number - 1
        ]
        assert parties - len(early) <= len(visits) <= parties
        assert len(set(passed)) == len(passed)
        assert set(passed) <= set(range(parties))
    assert outcomes["passed"] > 10 * parties, outcomes
    assert outcomes["cancelled"], outcomes
    assert outcomes["broken"], outcomes


def abort_and_reset(barrier: Barrier, rng: random.Random) -> None:
    """Break `barrier` now and then, and mend it."""
    if rng.random() < 0.2:
        barrier.abort()
    if rng.random() < 0.2 or barrier.broken:
        barrier.reset()


@pytest.mark.stress
@pytest.mark.usefixtures("fast_switches")
@pytest.mark.parametrize("seed", [4, 5])
def test_barrier_round_is_passed_by_all_or_none_in_a_storm_of_aborts_and_resets(
    seed: int,
) -> None:
    def action() -> None:
        storm.actions += 1
        if storm.actions % 8 == 0:
            time.sleep(0)

    parties = 3 + seed % 3
    barrier = Barrier(parties, action if seed % 2 else None)
    storm = BarrierStorm(barrier, seed, cancels=False)
    storm.run(parties, lambda rng: abort_and_reset(barrier, rng))
    # Nobody can be left out of a round, so the first that one has passed is the first for all.
    passed = [
        [visit for visit in visits if visit.outcome == "passed"] for visits in storm.visits.values()
    ]
    assert len({len(visits) for visits in passed}) == 1
    assert len(passed[0]) > 10
    assert any(visit.outcome == "broken" for visits in storm.visits.values() for visit in visits)
    for number, visits in enumerate(zip(*passed, strict=True), 1):
        assert sorted(visit.place for visit in visits) == list(range(parties))
        if seed % 2:
            assert all(visit.after >= number for visit in visits), "passed before the action"


@pytest.mark.stress
@pytest.mark.usefixtures("fast_switches")
@pytest.mark.parametrize("seed", [6, 7])
def test_barrier_gives_each_index_equally_often_to_a_crowd_larger_than_its_parties(
    seed: int,
) -> None:
    def action() -> None:
        storm.actions += 1

    barrier = Barrier(3, action)
    storm = BarrierStorm(barrier, seed, cancels=False)
    storm.run(10, lambda rng: abort_and_reset(barrier, rng))
    indices = Counter(
        visit.place
        for visits in storm.visits.values()
        for visit in visits
        if visit.outcome == "passed"
    )
    assert set(indices) == {0, 1, 2}
    assert len(set(indices.values())) == 1, indices
    # One more for each round that was aborted while its action was running.
    assert 10 < indices[0] <= storm.actions
