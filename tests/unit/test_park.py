"""Event loops that stop, close, run inside of one another, or do not run at all."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import importlib.util
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, Generic, TypeVar, cast

import anyio
import anyio.lowlevel
import pytest
import trio
import trio.testing
from support.helpers import PATIENCE, assert_free, until

from aiosync import Barrier, BoundedSemaphore, BrokenBarrierError, Semaphore, _park
from aiosync._park import TrioWaiter, run_in_thread, run_soon

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine, Iterator

T = TypeVar("T")


def uvloop_loop() -> asyncio.AbstractEventLoop:
    import uvloop

    loop: asyncio.AbstractEventLoop = uvloop.new_event_loop()
    return loop


LOOPS: dict[str, Callable[[], asyncio.AbstractEventLoop]] = {"asyncio": asyncio.new_event_loop}
if importlib.util.find_spec("uvloop") is not None:
    LOOPS["uvloop"] = uvloop_loop


@pytest.fixture(params=list(LOOPS))
def new_loop(request: pytest.FixtureRequest) -> Callable[[], asyncio.AbstractEventLoop]:
    return LOOPS[request.param]


@pytest.fixture
def loop(
    new_loop: Callable[[], asyncio.AbstractEventLoop],
) -> Iterator[asyncio.AbstractEventLoop]:
    loop = new_loop()
    yield loop
    loop.close()


class TwinInThread(Generic[T]):
    """Runs a coroutine of a shared object's twin for threads in another thread."""

    def __init__(self, work: Coroutine[Any, Any, T]) -> None:
        self._future: Future[T] = Future()
        self._thread = threading.Thread(target=self._run, args=[work], daemon=True)
        self._thread.start()

    def _run(self, work: Coroutine[Any, Any, T]) -> None:
        try:
            self._future.set_result(run_in_thread(work))
        except BaseException as error:
            self._future.set_exception(error)

    def result(self) -> T:
        try:
            return self._future.result(PATIENCE)
        finally:
            self._thread.join(PATIENCE)
            assert not self._thread.is_alive()


def acquire_in_thread(semaphore: Semaphore) -> TwinInThread[bool]:
    """Start to acquire in a thread; returns when that waits."""
    waiting = semaphore.statistics().waiting
    job = TwinInThread(semaphore._for_threads().acquire(timeout=PATIENCE))
    until(lambda: semaphore.statistics().waiting > waiting)
    return job


class Doomed:
    """A task whose event loop is closed while it waits."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        work: Coroutine[Any, Any, Any],
        waits: Callable[[], bool],
    ) -> None:
        self._loop = loop
        # "Task was destroyed but it is pending!" is what this is about.
        loop.set_exception_handler(lambda loop, context: None)
        self._work: Coroutine[Any, Any, Any] | None = work
        self._task: asyncio.Task[Any] | None = loop.create_task(work)
        self.turn()
        assert waits()

    def turn(self) -> None:
        """Run the loop for a moment."""
        self._loop.run_until_complete(asyncio.sleep(0))

    def close_loop(self) -> None:
        self._loop.close()
        assert self._task is not None
        assert not self._task.done()

    def close(self) -> None:
        """Do what the garbage collector does to a coroutine that nobody will ever run."""
        assert self._work is not None
        self._work.close()

    def forget(self) -> None:
        """Leave the task to the garbage collector."""
        self._task = None
        self._work = None
        gc.collect()


def doomed_acquire(
    loop: asyncio.AbstractEventLoop, semaphore: Semaphore, timeout: float | None = None
) -> Doomed:
    waiting = semaphore.statistics().waiting
    return Doomed(
        loop,
        semaphore.acquire(timeout=timeout),
        lambda: semaphore.statistics().waiting == waiting + 1,
    )


# --- Loops that close while somebody waits ---


@pytest.mark.parametrize("timeout", [None, PATIENCE])
def test_waiter_of_a_closed_loop_is_skipped_and_the_permit_goes_to_the_next(
    new_loop: Callable[[], asyncio.AbstractEventLoop],
    loop: asyncio.AbstractEventLoop,
    timeout: float | None,
) -> None:
    semaphore = Semaphore(0)
    dead = [doomed_acquire(new_loop(), semaphore, timeout) for _ in range(3)]
    in_task = loop.create_task(semaphore.acquire())
    loop.run_until_complete(asyncio.sleep(0))
    in_thread = acquire_in_thread(semaphore)
    for waiter in dead:
        waiter.close_loop()
    semaphore.release()
    assert loop.run_until_complete(asyncio.wait_for(in_task, PATIENCE)) is True
    semaphore.release()
    assert in_thread.result() is True
    assert_free(semaphore, 0)
    for waiter in dead:
        waiter.close()
    assert_free(semaphore, 0)
    semaphore.release()
    assert_free(semaphore, 1)


def test_permits_stay_free_if_all_who_wait_are_of_closed_loops(
    new_loop: Callable[[], asyncio.AbstractEventLoop],
) -> None:
    semaphore = Semaphore(0)
    dead = [doomed_acquire(new_loop(), semaphore) for _ in range(3)]
    for waiter in dead:
        waiter.close_loop()
    semaphore.release(2)
    assert_free(semaphore, 2)
    for waiter in dead:
        waiter.close()
    assert_free(semaphore, 2)


def test_waiter_of_a_closed_loop_leaves_the_line_when_its_coroutine_is_closed(
    loop: asyncio.AbstractEventLoop,
) -> None:
    semaphore = Semaphore(0)
    dead = doomed_acquire(loop, semaphore, PATIENCE)
    dead.close_loop()
    dead.close()
    assert_free(semaphore, 0)
    semaphore.release()
    assert_free(semaphore, 1)


@pytest.mark.parametrize("how", ["closed", "collected"])
@pytest.mark.parametrize("timeout", [None, PATIENCE])
@pytest.mark.parametrize("kind", [Semaphore, BoundedSemaphore])
def test_permit_granted_to_a_waiter_whose_loop_closes_before_it_runs_comes_back(
    loop: asyncio.AbstractEventLoop, kind: type[Semaphore], timeout: float | None, how: str
) -> None:
    semaphore = kind(1)
    semaphore.acquire_nowait()
    dead = doomed_acquire(loop, semaphore, timeout)
    semaphore.release()
    # It has been handed over, and there is nobody who could give it back yet.
    assert (semaphore.value, semaphore.statistics().waiting) == (0, 0)
    dead.close_loop()
    if how == "closed":
        dead.close()
    else:
        dead.forget()
    assert_free(semaphore, 1)
    if kind is BoundedSemaphore:
        with pytest.raises(ValueError, match="too often"):
            semaphore.release()


@pytest.mark.parametrize("how", ["closed", "collected"])
def test_permit_that_comes_back_from_a_closed_loop_goes_to_who_waits_for_it(
    loop: asyncio.AbstractEventLoop, how: str
) -> None:
    semaphore = Semaphore(0)
    dead = doomed_acquire(loop, semaphore)
    semaphore.release()
    dead.close_loop()
    job = acquire_in_thread(semaphore)
    if how == "closed":
        dead.close()
    else:
        dead.forget()
    assert job.result() is True
    assert_free(semaphore, 0)


def test_skipped_waiter_of_a_closed_loop_gives_back_nothing_when_it_is_collected(
    loop: asyncio.AbstractEventLoop,
) -> None:
    semaphore = Semaphore(0)
    dead = doomed_acquire(loop, semaphore)
    dead.close_loop()
    semaphore.release()
    assert_free(semaphore, 1)
    dead.forget()
    assert_free(semaphore, 1)


def test_waiter_of_a_loop_that_pauses_keeps_its_place_and_gets_its_permit(
    loop: asyncio.AbstractEventLoop,
) -> None:
    semaphore = Semaphore(0)
    task = loop.create_task(semaphore.acquire())
    loop.run_until_complete(asyncio.sleep(0))
    assert semaphore.statistics().waiting == 1
    semaphore.release()  # the loop is not running now
    with pytest.raises(anyio.WouldBlock):
        semaphore.acquire_nowait()
    assert loop.run_until_complete(asyncio.wait_for(task, PATIENCE)) is True
    assert_free(semaphore, 0)


def test_waiter_cancelled_by_the_end_of_asyncio_run_leaves_nothing() -> None:
    semaphore = Semaphore(0)
    tasks: list[asyncio.Task[bool]] = []

    async def main() -> None:
        tasks.append(asyncio.create_task(semaphore.acquire()))
        await asyncio.sleep(0)
        assert semaphore.statistics().waiting == 1

    asyncio.run(main())
    assert tasks[0].cancelled()
    assert_free(semaphore, 0)
    semaphore.release()
    assert_free(semaphore, 1)


@pytest.mark.parametrize("how", ["returns", "raises"])
def test_waiters_of_a_trio_run_that_is_over_are_gone(how: str) -> None:
    semaphore = Semaphore(0)

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(semaphore.acquire)
            # The run cancels this one itself, after the main task.
            trio.lowlevel.spawn_system_task(semaphore.acquire)
            await trio.testing.wait_all_tasks_blocked()
            assert semaphore.statistics().waiting == 2
            nursery.cancel_scope.cancel()
        assert semaphore.statistics().waiting == 1
        if how == "raises":
            raise LookupError("no such luck")

    with pytest.raises(LookupError) if how == "raises" else contextlib.nullcontext():
        trio.run(main)
    assert_free(semaphore, 0)
    semaphore.release()
    assert_free(semaphore, 1)


def test_permit_granted_just_before_a_trio_run_ends_is_not_lost() -> None:
    semaphore = Semaphore(0)
    acquired: list[bool] = []

    async def acquire() -> None:
        acquired.append(await semaphore.acquire())

    async def main() -> None:
        trio.lowlevel.spawn_system_task(acquire)
        await trio.testing.wait_all_tasks_blocked()
        # By another thread, so that the wake-up is still on its way when the run ends.
        thread = threading.Thread(target=semaphore.release, daemon=True)
        thread.start()
        thread.join(PATIENCE)
        assert (semaphore.value, semaphore.statistics().waiting) == (0, 0)

    trio.run(main)
    # Either it was cancelled, and has given the permit back, or it has acquired it.
    assert_free(semaphore, 1 - len(acquired))


def test_party_whose_loop_is_closed_breaks_the_barrier_when_its_coroutine_is_closed(
    loop: asyncio.AbstractEventLoop,
) -> None:
    barrier = Barrier(3)
    dead = Doomed(loop, barrier.wait(PATIENCE), lambda: barrier.n_waiting == 1)
    job = TwinInThread(barrier._for_threads().wait(PATIENCE))
    until(lambda: barrier.n_waiting == 2)
    dead.close_loop()
    dead.close()
    with pytest.raises(BrokenBarrierError, match="cancelled"):
        job.result()
    assert barrier.broken


@pytest.mark.parametrize("how", ["abort", "reset"])
def test_closed_loop_of_one_party_keeps_nobody_from_breaking_the_barrier(
    loop: asyncio.AbstractEventLoop, how: str
) -> None:
    barrier = Barrier(3)
    dead = Doomed(loop, barrier.wait(), lambda: barrier.n_waiting == 1)
    job = TwinInThread(barrier._for_threads().wait(PATIENCE))
    until(lambda: barrier.n_waiting == 2)
    dead.close_loop()
    if how == "abort":
        barrier.abort()
    else:
        barrier.reset()
    with pytest.raises(BrokenBarrierError, match=how):
        job.result()
    dead.close()
    assert barrier.broken is (how == "abort")
    assert barrier.n_waiting == 0


def test_party_whose_loop_closes_after_the_trip_does_not_disturb_the_next_round(
    loop: asyncio.AbstractEventLoop,
) -> None:
    barrier = Barrier(2)
    dead = Doomed(loop, barrier.wait(), lambda: barrier.n_waiting == 1)
    assert TwinInThread(barrier._for_threads().wait(PATIENCE)).result() == 1
    dead.close_loop()
    job = TwinInThread(barrier._for_threads().wait(PATIENCE))
    until(lambda: barrier.n_waiting == 1)
    dead.close()
    assert (barrier.n_waiting, barrier.broken) == (1, False)
    assert TwinInThread(barrier._for_threads().wait(PATIENCE)).result() == 1
    assert job.result() == 0


# --- Trio as a guest of asyncio ---


async def in_guest(main: Callable[[], Awaitable[T]]) -> T:
    """Run `main` under trio, on top of the loop of asyncio that is running."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[Any] = loop.create_future()
    trio.lowlevel.start_guest_run(
        main,
        run_sync_soon_threadsafe=loop.call_soon_threadsafe,
        done_callback=done.set_result,
        host_uses_signal_set_wakeup_fd=True,
    )
    outcome = await done
    result: T = outcome.unwrap()
    return result


def run_host(loop: asyncio.AbstractEventLoop, main: Coroutine[Any, Any, T]) -> T:
    return loop.run_until_complete(asyncio.wait_for(main, PATIENCE))


async def host_until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.0005)


def test_guest_task_of_trio_waits_on_trio_and_a_host_callback_wakes_it(
    loop: asyncio.AbstractEventLoop,
) -> None:
    semaphore = Semaphore(0)

    async def host() -> bool:
        # It waits in a task of trio: one of asyncio could not be awaited there.
        guest = asyncio.ensure_future(in_guest(semaphore.acquire))
        await host_until(lambda: semaphore.statistics().waiting == 1)
        asyncio.get_running_loop().call_soon(semaphore.release)
        return await guest

    assert run_host(loop, host()) is True
    assert_free(semaphore, 0)


@pytest.mark.parametrize("waker", ["host task", "host callback", "guest", "thread"])
def test_release_wakes_waiters_of_host_and_guest_in_their_order(
    loop: asyncio.AbstractEventLoop, waker: str
) -> None:
    semaphore = Semaphore(0)
    order: list[str] = []

    async def acquire(name: str) -> None:
        assert await semaphore.acquire(timeout=PATIENCE)
        order.append(name)

    async def release() -> None:
        semaphore.release()

    async def guest() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(acquire, "guest 1")
            await trio.testing.wait_all_tasks_blocked()
            hosted.append(loop.create_task(acquire("host 2")))
            while semaphore.statistics().waiting < 2:
                await trio.sleep(0.0005)
            nursery.start_soon(acquire, "guest 3")
            await trio.testing.wait_all_tasks_blocked()
            hosted.append(loop.create_task(acquire("host 4")))
            while semaphore.statistics().waiting < 4:
                await trio.sleep(0.0005)
            for count in range(1, 5):
                if waker == "guest":
                    semaphore.release()
                elif waker == "thread":
                    thread = threading.Thread(target=semaphore.release, daemon=True)
                    thread.start()
                    thread.join(PATIENCE)
                elif waker == "host task":
                    hosted.append(loop.create_task(release()))
                else:
                    loop.call_soon(semaphore.release)
                while len(order) < count:
                    await trio.sleep(0.0005)

    async def host() -> None:
        await in_guest(guest)
        await asyncio.gather(*hosted)

    hosted: list[asyncio.Task[None]] = []
    run_host(loop, host())
    assert order == ["guest 1", "host 2", "guest 3", "host 4"]
    assert_free(semaphore, 0)


def test_guest_task_can_be_cancelled_and_can_run_out_of_time(
    loop: asyncio.AbstractEventLoop,
) -> None:
    semaphore = Semaphore(0)

    async def guest() -> bool:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(semaphore.acquire)
            await trio.testing.wait_all_tasks_blocked()
            assert semaphore.statistics().waiting == 1
            nursery.cancel_scope.cancel()
        return await semaphore.acquire(timeout=0.01)

    async def host() -> bool:
        return await in_guest(guest)

    assert run_host(loop, host()) is False
    assert_free(semaphore, 0)


@pytest.mark.parametrize("fast_acquire", [False, True])
def test_tasks_of_host_and_guest_exclude_each_other(
    loop: asyncio.AbstractEventLoop, fast_acquire: bool
) -> None:
    semaphore = Semaphore(1, fast_acquire=fast_acquire)
    visits: list[str] = []
    inside = 0

    async def visit(name: str) -> None:
        nonlocal inside
        for _ in range(20):
            async with semaphore:
                inside += 1
                await anyio.lowlevel.checkpoint()
                visits.append(name)
                assert inside == 1
                inside -= 1

    async def guest() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(visit, "guest")
            nursery.start_soon(visit, "guest")

    async def host() -> None:
        await asyncio.gather(in_guest(guest), visit("host"), visit("host"))

    run_host(loop, host())
    assert (visits.count("guest"), visits.count("host")) == (40, 40)
    assert_free(semaphore, 1)


def test_tasks_of_host_and_guest_meet_at_one_barrier(loop: asyncio.AbstractEventLoop) -> None:
    rounds = 20
    actions = 0
    indices: list[list[int]] = [[], [], [], []]

    def action() -> None:
        nonlocal actions
        actions += 1

    barrier = Barrier(4, action)

    async def party(number: int) -> None:
        for round in range(1, rounds + 1):
            indices[number].append(await barrier.wait(PATIENCE))
            assert actions == round

    async def guest() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(party, 0)
            nursery.start_soon(party, 1)

    async def host() -> None:
        await asyncio.gather(in_guest(guest), party(2), party(3))

    run_host(loop, host())
    for round in zip(*indices, strict=True):
        assert sorted(round) == [0, 1, 2, 3]
    assert actions == rounds


@pytest.mark.parametrize("breaker", ["host", "guest"])
def test_cancel_of_host_or_guest_breaks_the_barrier_for_the_other(
    loop: asyncio.AbstractEventLoop, breaker: str
) -> None:
    barrier = Barrier(3)

    async def guest() -> None:
        with trio.CancelScope() as scope:
            scopes.append(scope)
            await barrier.wait(PATIENCE)

    async def host() -> list[Any]:
        tasks = [
            asyncio.ensure_future(in_guest(guest)),
            asyncio.ensure_future(barrier.wait(PATIENCE)),
        ]
        await host_until(lambda: barrier.n_waiting == 2)
        if breaker == "host":
            tasks[1].cancel()
        else:
            scopes[0].cancel()
        return await asyncio.gather(*tasks, return_exceptions=True)

    scopes: list[trio.CancelScope] = []
    guest_outcome, host_outcome = run_host(loop, host())
    if breaker == "host":
        assert isinstance(guest_outcome, BrokenBarrierError)
        assert isinstance(host_outcome, asyncio.CancelledError)
    else:
        assert guest_outcome is None
        assert isinstance(host_outcome, BrokenBarrierError)
    assert barrier.broken


# --- One event loop inside a task of another ---


def in_another_thread(call: Callable[[], T]) -> T:
    """Make a call where neither of two event loops wants to deal with signals."""

    async def called() -> T:
        return call()

    return TwinInThread(called()).result()


@pytest.mark.parametrize("fast_acquire", [False, True])
def test_trio_run_inside_a_task_of_asyncio_waits_on_trio(
    loop: asyncio.AbstractEventLoop, fast_acquire: bool
) -> None:
    semaphore = Semaphore(1, fast_acquire=fast_acquire)
    barrier = Barrier(2)
    log: list[str] = []

    async def inner(name: str) -> None:
        await barrier.wait(PATIENCE)
        assert await semaphore.acquire(timeout=PATIENCE)
        log.append(f"{name} in")
        await trio.testing.wait_all_tasks_blocked()
        log.append(f"{name} out")
        semaphore.release()

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(inner, "a")
            nursery.start_soon(inner, "b")

    async def outer() -> None:
        trio.run(main)
        # And asyncio is asyncio again.
        assert await semaphore.acquire(timeout=PATIENCE)
        semaphore.release()

    in_another_thread(lambda: run_host(loop, outer()))
    assert log in (["a in", "a out", "b in", "b out"], ["b in", "b out", "a in", "a out"])
    assert_free(semaphore, 1)


def test_release_inside_a_nested_trio_run_wakes_a_task_of_the_outer_asyncio(
    loop: asyncio.AbstractEventLoop,
) -> None:
    semaphore = Semaphore(0)

    async def main() -> None:
        semaphore.release()
        await trio.lowlevel.checkpoint()

    async def outer() -> bool:
        waiter = asyncio.ensure_future(semaphore.acquire())
        await asyncio.sleep(0)
        assert semaphore.statistics().waiting == 1
        trio.run(main)
        return await waiter

    assert in_another_thread(lambda: run_host(loop, outer())) is True
    assert_free(semaphore, 0)


def test_thread_wakes_a_waiter_in_a_trio_run_inside_a_task_of_asyncio(
    loop: asyncio.AbstractEventLoop,
) -> None:
    semaphore = Semaphore(0)

    def release() -> None:
        until(lambda: semaphore.statistics().waiting == 1)
        semaphore.release()

    async def main() -> bool:
        return await semaphore.acquire(timeout=PATIENCE)

    async def outer() -> bool:
        return trio.run(main)

    thread = threading.Thread(target=release, daemon=True)
    thread.start()
    assert in_another_thread(lambda: run_host(loop, outer())) is True
    thread.join(PATIENCE)
    assert_free(semaphore, 0)


# --- Eager tasks ---

if sys.version_info >= (3, 12):

    @pytest.fixture
    def eager_loop() -> Iterator[asyncio.AbstractEventLoop]:
        # Not one of uvloop: there eager tasks fail on some versions of Python.
        loop = asyncio.new_event_loop()
        loop.set_task_factory(asyncio.eager_task_factory)
        yield loop
        loop.close()

    def test_eager_task_that_need_not_wait_acquires_in_the_step_that_creates_it(
        eager_loop: asyncio.AbstractEventLoop,
    ) -> None:
        semaphore = Semaphore(1, fast_acquire=True)

        async def main() -> None:
            task = asyncio.ensure_future(semaphore.acquire())
            assert task.done()
            assert task.result() is True
            assert semaphore.value == 0
            semaphore.release()

        run_host(eager_loop, main())
        assert_free(semaphore, 1)

    @pytest.mark.parametrize("fast_acquire", [False, True])
    def test_eager_tasks_exclude_each_other_and_are_served_in_order(
        eager_loop: asyncio.AbstractEventLoop, fast_acquire: bool
    ) -> None:
        semaphore = Semaphore(1, fast_acquire=fast_acquire)
        log: list[int] = []

        async def visit(number: int) -> None:
            assert await semaphore.acquire(timeout=None if number % 2 else PATIENCE)
            log.append(number)
            await asyncio.sleep(0)
            log.append(number)
            semaphore.release()

        async def main() -> None:
            await asyncio.gather(*(asyncio.ensure_future(visit(number)) for number in range(5)))

        run_host(eager_loop, main())
        assert log == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
        assert_free(semaphore, 1)

    def test_eager_task_waits_and_is_woken_by_its_creator(
        eager_loop: asyncio.AbstractEventLoop,
    ) -> None:
        semaphore = Semaphore(0)

        async def main() -> None:
            task = asyncio.ensure_future(semaphore.acquire())
            assert semaphore.statistics().waiting == 1
            semaphore.release()
            with pytest.raises(anyio.WouldBlock):
                semaphore.acquire_nowait()
            assert await task is True

        run_host(eager_loop, main())
        assert_free(semaphore, 0)

    def test_release_in_an_eager_task_wakes_its_creator_s_siblings(
        eager_loop: asyncio.AbstractEventLoop,
    ) -> None:
        semaphore = Semaphore(0)

        async def release() -> None:
            semaphore.release()

        async def main() -> None:
            waiter = asyncio.ensure_future(semaphore.acquire())
            # From a callback, where no task is running but the eager one.
            asyncio.get_running_loop().call_soon(lambda: tasks.append(loop_task(release())))
            assert await waiter is True
            await tasks[0]

        def loop_task(work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
            return eager_loop.create_task(work)

        tasks: list[asyncio.Task[None]] = []
        run_host(eager_loop, main())
        assert_free(semaphore, 0)

    def test_eager_task_can_be_cancelled_as_soon_as_it_waits(
        eager_loop: asyncio.AbstractEventLoop,
    ) -> None:
        semaphore = Semaphore(0)

        async def main() -> None:
            task = asyncio.ensure_future(semaphore.acquire())
            task.cancel()
            # It has not run since, and is skipped all the same.
            semaphore.release()
            semaphore.acquire_nowait()
            with pytest.raises(asyncio.CancelledError):
                await task

        run_host(eager_loop, main())
        assert_free(semaphore, 0)

    def test_eager_tasks_pass_a_barrier_round_after_round(
        eager_loop: asyncio.AbstractEventLoop,
    ) -> None:
        barrier = Barrier(3)

        async def main() -> None:
            for _ in range(3):
                tasks = [asyncio.ensure_future(barrier.wait()) for _ in range(3)]
                # The last one trips it before its creator goes on.
                assert tasks[2].done()
                assert barrier.n_waiting == 0
                assert await asyncio.gather(*tasks) == [0, 1, 2]

        run_host(eager_loop, main())


# --- No event loop at all ---


@pytest.fixture(params=["first", "after trio", "after asyncio"])
def no_loop(request: pytest.FixtureRequest) -> None:
    """Have no event loop, or none any more."""
    if request.param == "after trio":
        trio.run(trio.lowlevel.checkpoint)
    elif request.param == "after asyncio":
        asyncio.run(asyncio.sleep(0))


@pytest.mark.usefixtures("no_loop")
@pytest.mark.parametrize("kind", [Semaphore, BoundedSemaphore])
@pytest.mark.parametrize("fast_acquire", [False, True])
@pytest.mark.parametrize("timeout", [None, PATIENCE])
def test_acquire_that_has_to_wait_outside_of_an_event_loop_is_refused(
    kind: type[Semaphore], fast_acquire: bool, timeout: float | None
) -> None:
    semaphore = kind(0, fast_acquire=fast_acquire)
    with pytest.raises(anyio.NoEventLoopError):
        semaphore.acquire(timeout=timeout).send(None)
    assert_free(semaphore, 0)
    if kind is BoundedSemaphore:
        with pytest.raises(ValueError, match="too often"):
            semaphore.release()
    else:
        semaphore.release()
        assert_free(semaphore, 1)


@pytest.mark.usefixtures("no_loop")
@pytest.mark.parametrize("kind", [Semaphore, BoundedSemaphore])
@pytest.mark.parametrize("timeout", [None, PATIENCE, 0])
def test_acquire_that_makes_a_checkpoint_outside_of_an_event_loop_takes_nothing(
    kind: type[Semaphore], timeout: float | None
) -> None:
    semaphore = kind(1)
    with pytest.raises(anyio.NoEventLoopError):
        semaphore.acquire(timeout=timeout).send(None)
    assert_free(semaphore, 1)
    if kind is BoundedSemaphore:
        with pytest.raises(ValueError, match="too often"):
            semaphore.release()


@pytest.mark.parametrize("kind", [Semaphore, BoundedSemaphore])
def test_acquire_by_what_asyncio_does_not_know_as_a_task_makes_a_checkpoint(
    kind: type[Semaphore],
) -> None:
    class Foreign:
        """Drives a coroutine as a task does, but by callbacks only, and without a word."""

        def __init__(self, coroutine: Coroutine[Any, Any, bool]) -> None:
            self.coroutine = coroutine
            self.steps = 0
            loop.call_soon(self.step)

        def step(self) -> None:
            self.steps += 1
            try:
                assert self.coroutine.send(None) is None
            except StopIteration as stop:
                done.set_result(stop.value)
            except BaseException as error:
                done.set_exception(error)
            else:
                loop.call_soon(self.step)

    loop = asyncio.new_event_loop()
    done: asyncio.Future[bool] = loop.create_future()
    foreign = Foreign(kind().acquire())
    try:
        assert loop.run_until_complete(done) is True
    finally:
        loop.close()
    assert foreign.steps == 2


@pytest.mark.usefixtures("no_loop")
def test_acquire_that_need_not_wait_needs_no_event_loop() -> None:
    semaphore = Semaphore(1, fast_acquire=True)
    with pytest.raises(StopIteration) as stopped:
        semaphore.acquire().send(None)
    assert stopped.value.value is True
    assert semaphore.value == 0
    with pytest.raises(StopIteration) as stopped:
        semaphore.acquire(blocking=False).send(None)
    assert stopped.value.value is False


@pytest.mark.usefixtures("no_loop")
@pytest.mark.parametrize("parties", [2, 3])
@pytest.mark.parametrize("timeout", [None, PATIENCE, 0])
def test_wait_that_has_to_wait_outside_of_an_event_loop_does_not_arrive(
    parties: int, timeout: float | None
) -> None:
    barrier = Barrier(parties)
    with pytest.raises(anyio.NoEventLoopError):
        barrier.wait(timeout).send(None)
    assert (barrier.n_waiting, barrier.broken) == (0, False)


@pytest.mark.usefixtures("no_loop")
def test_wait_of_a_single_party_outside_of_an_event_loop_does_not_arrive() -> None:
    runs: list[bool] = []
    barrier = Barrier(1, lambda: runs.append(True))
    with pytest.raises(anyio.NoEventLoopError):
        barrier.wait().send(None)
    assert (barrier.n_waiting, barrier.broken) == (0, False)
    assert not runs, "the action of a round was run in which nobody has arrived"


def test_a_trio_that_does_not_tell_whether_a_task_is_at_rest_wakes_it_all_the_same() -> None:
    semaphore = Semaphore(0)

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(semaphore.acquire)
            await trio.testing.wait_all_tasks_blocked()
            (sleeper,) = semaphore._queue.waiters
            assert isinstance(sleeper, TrioWaiter)
            task = sleeper._task
            sleeper._task = cast("trio.lowlevel.Task", object())  # without its private attributes
            semaphore.release()
            sleeper._task = task

    trio.run(main)
    assert_free(semaphore, 0)


@pytest.mark.parametrize("granted", [False, True])
def test_the_collection_of_a_task_of_a_closed_loop_raises_nothing(
    granted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The collector may close the coroutine that waits before those that await it."""
    unraisable: list[object] = []
    monkeypatch.setattr(sys, "unraisablehook", lambda error: unraisable.append(error.exc_value))
    semaphore = Semaphore(0)
    coroutine = semaphore.acquire()

    async def wait(acquire: Any) -> None:
        await acquire

    loop = asyncio.new_event_loop()
    loop.set_exception_handler(lambda *_: None)  # that a pending task was destroyed
    task = loop.create_task(wait(coroutine))
    loop.run_until_complete(asyncio.sleep(0))
    if granted:
        semaphore._queue.waiters.popitem()  # another thread is about to grant it something
    loop.close()
    del task, loop
    coroutine.close()
    del coroutine
    gc.collect()
    assert unraisable == []
    assert semaphore.statistics().waiting == 0


def test_a_function_for_a_loop_that_is_closed_is_not_run() -> None:
    loop = asyncio.new_event_loop()
    loop.close()
    calls: list[str] = []
    run_soon(loop, lambda: calls.append("run"))
    assert not calls


def test_it_can_be_told_whether_a_loop_has_ended() -> None:
    found: list[object] = []

    async def main() -> None:
        found.append(_park.current_token())
        assert not _park.loop_ended(found[-1])

    trio.run(main)
    asyncio.run(main())
    assert all(map(_park.loop_ended, found))


def test_the_tasks_of_a_loop_that_was_closed_without_a_word_are_forgotten() -> None:
    async def sleep_on() -> None:
        await asyncio.sleep(1000)

    async def start() -> None:
        _park.start_background_task(sleep_on, "sleeper", lambda: None)

    loop = asyncio.new_event_loop()
    loop.run_until_complete(start())
    (task,) = _park._background
    loop.close()
    task._log_destroy_pending = False  # type: ignore[attr-defined]
    del task
    asyncio.run(start())
    assert not _park._background


def test_between_two_steps_of_trio_no_task_is_running() -> None:
    found: list[object] = []

    class Look(trio.abc.Instrument):
        def before_io_wait(self, timeout: float) -> None:
            found.append(_park.running_task())

    async def main() -> None:
        assert _park.running_task() is trio.lowlevel.current_task()
        await trio.sleep(0)

    trio.run(main, instruments=[Look()])
    assert found
    assert set(found) == {None}


def test_a_task_that_is_cancelled_by_a_signal_handler_as_it_is_woken_is_only_cancelled() -> None:
    complaints: list[Any] = []

    class Interrupted(asyncio.Future[Any]):
        """A signal handler runs whenever somebody looks whether it is over."""

        def done(self) -> bool:
            was_over = super().done()
            self.cancel()
            return was_over

    async def main() -> None:
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda _, context: complaints.append(context))
        waiter = Interrupted()
        loop.call_soon(waiter.cancel)
        assert _park.wake(waiter)
        assert _park.wake(waiter)
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        interrupted = Interrupted()
        loop.call_soon(_park._wake, interrupted)
        await asyncio.sleep(0)

    asyncio.run(main())
    assert complaints == []


def test_to_ask_whether_an_event_loop_has_ended_does_not_wake_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    loop = asyncio.new_event_loop()
    woken: list[object] = []
    monkeypatch.setattr(loop, "call_soon_threadsafe", woken.append)
    assert not _park.loop_ended(loop)
    loop.close()
    assert _park.loop_ended(loop)
    assert woken == []
