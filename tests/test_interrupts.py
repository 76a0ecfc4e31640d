"""Calls from signal handlers and finalizers that come in the middle of other calls."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import gc
import importlib.util
import os
import signal
import sys
import threading
import time
import weakref
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import anyio
import anyio.lowlevel
import pytest
import trio
import trio.testing

import aiosync
from aiosync import Barrier, BoundedSemaphore, BrokenBarrierError, Semaphore
from aiosync._park import run_in_thread

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine, Iterator
    from types import FrameType

T = TypeVar("T")
S = TypeVar("S", Semaphore, Barrier)

# How long something may take that happens at once unless it never happens.
PATIENCE = 20.0

# The same, if the test goes on and says what was wrong.
SHORT_PATIENCE = 5.0

posix = pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="there are no such signals")

LOOPS: dict[str, tuple[str, dict[str, Any]]] = {"asyncio": ("asyncio", {}), "trio": ("trio", {})}
if importlib.util.find_spec("uvloop") is not None:
    LOOPS["uvloop"] = ("asyncio", {"use_uvloop": True})

every_loop = pytest.mark.parametrize("loop", list(LOOPS))


def run_under(loop: str, function: Callable[[], Awaitable[T]]) -> T:
    backend, options = LOOPS[loop]
    return anyio.run(function, backend=backend, backend_options=options)


def until(condition: Callable[[], bool]) -> None:
    """Wait until `condition` is true, and fail if that takes too long."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.0005)


def until_main_thread_rests() -> None:
    """Wait until the main thread sits in one call of C, as it does in select() or a lock."""
    main = threading.main_thread().ident
    assert main is not None
    seen, times = None, 0

    def rests() -> bool:
        nonlocal seen, times
        frame: FrameType | None = sys._current_frames()[main]
        assert frame is not None
        now = (id(frame), frame.f_lasti)
        seen, times = now, (times + 1 if now == seen else 0)
        return times >= 20

    until(rests)


def bell_of_this_loop() -> Callable[[], object]:
    """Return what wakes the event loop that is running, whatever it has missed."""
    try:
        loop = asyncio.get_running_loop()
    except RuntimeError:
        token = trio.lowlevel.current_trio_token()
        return lambda: token.run_sync_soon(bool)
    return lambda: loop.call_soon_threadsafe(bool)


class Meanwhile:
    """Acts in another thread while the main thread sleeps; wakes it if that does not help."""

    def __init__(
        self, act: Callable[[], object], ready: Callable[[], bool], rescue: Callable[[], object]
    ) -> None:
        self._act, self._ready, self._rescue = act, ready, rescue
        self._awake = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._acted = False
        self.rescued = False

    def _run(self) -> None:
        until(self._ready)
        until_main_thread_rests()
        self._acted = True
        self._act()
        if not self._awake.wait(SHORT_PATIENCE):
            self.rescued = True
            self._rescue()

    def __enter__(self) -> Meanwhile:
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._awake.set()
        self._thread.join(PATIENCE)
        assert not self._thread.is_alive()
        assert self._acted
        assert not self.rescued, "nobody heard that"


def signal_main_thread(number: int) -> None:
    main = threading.main_thread().ident
    assert main is not None
    signal.pthread_kill(main, number)


@contextlib.contextmanager
def on_signal(number: int, handler: Callable[[], object]) -> Iterator[None]:
    """Let `handler` be called on that signal."""
    before = signal.signal(number, lambda *_: handler())
    try:
        yield
    finally:
        signal.signal(number, before)


@contextlib.contextmanager
def many_alarms(handler: Callable[[], object], pause: float) -> Iterator[None]:
    """Let a signal call `handler` every `pause` seconds."""
    with on_signal(signal.SIGALRM, handler):
        signal.setitimer(signal.ITIMER_REAL, pause, pause)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)


def assert_free(semaphore: Semaphore, value: int) -> None:
    """Check that `value` permits are free, that nobody waits, and that they can be had."""
    assert semaphore.statistics().tasks_waiting == 0
    assert semaphore.value == value
    for _ in range(value):
        semaphore.acquire_nowait()
    with pytest.raises(anyio.WouldBlock):
        semaphore.acquire_nowait()
    if value:
        semaphore.release(value)


def in_this_thread(shared: S, use: Callable[[S], Coroutine[Any, Any, T]]) -> T:
    """Run ``use(shared)`` in this thread, which blocks as long as that waits."""
    return run_in_thread(use(shared._for_threads()))


class InThread:
    """Runs ``use(shared)`` in another thread."""

    def __init__(self, shared: S, use: Callable[[S], Coroutine[Any, Any, Any]]) -> None:
        self.outcome: Any = None
        self._thread = threading.Thread(target=self._run, args=[shared, use], daemon=True)
        self._thread.start()

    def _run(self, shared: S, use: Callable[[S], Coroutine[Any, Any, Any]]) -> None:
        try:
            self.outcome = in_this_thread(shared, use)
        except Exception as error:
            self.outcome = type(error)

    def join(self) -> Any:
        self._thread.join(PATIENCE)
        assert not self._thread.is_alive()
        return self.outcome


class Garbage:
    """A cycle of references that calls something when the collector finds it."""

    def __init__(self, call: Callable[[], object]) -> None:
        self.call = call
        self.cycle = self

    def __del__(self) -> None:
        self.call()


# --- An event loop that sleeps ---


@posix
@every_loop
def test_release_by_a_signal_handler_wakes_an_idle_loop(loop: str) -> None:
    semaphore = Semaphore(0)

    async def main() -> bool:
        with Meanwhile(
            lambda: signal_main_thread(signal.SIGALRM),
            lambda: semaphore.statistics().tasks_waiting == 1,
            bell_of_this_loop(),
        ):
            return await semaphore.acquire()

    with on_signal(signal.SIGALRM, semaphore.release):
        assert run_under(loop, main) is True
    assert_free(semaphore, 0)


@posix
@every_loop
def test_release_by_a_handler_of_a_timer_signal_wakes_an_idle_loop(loop: str) -> None:
    semaphore = Semaphore(0)
    rounds = 5

    async def main() -> float:
        started = time.monotonic()
        for _ in range(rounds):
            signal.setitimer(signal.ITIMER_REAL, 0.02)
            # The timeout is what would wake it if the signal did not.
            assert await semaphore.acquire(timeout=SHORT_PATIENCE)
        return time.monotonic() - started

    with on_signal(signal.SIGALRM, semaphore.release):
        assert run_under(loop, main) < SHORT_PATIENCE
    assert_free(semaphore, 0)


@posix
@every_loop
@pytest.mark.parametrize("how", ["abort", "reset"])
def test_abort_and_reset_by_a_signal_handler_wake_an_idle_loop(loop: str, how: str) -> None:
    barrier = Barrier(2)

    async def main() -> None:
        with Meanwhile(
            lambda: signal_main_thread(signal.SIGALRM),
            lambda: barrier.n_waiting == 1,
            bell_of_this_loop(),
        ):
            with pytest.raises(BrokenBarrierError, match=how):
                await barrier.wait()

    with on_signal(signal.SIGALRM, barrier.abort if how == "abort" else barrier.reset):
        run_under(loop, main)
    assert barrier.broken is (how == "abort")


@posix
def test_release_by_a_signal_handler_wakes_the_thread_it_interrupts() -> None:
    semaphore = Semaphore(0)
    with (
        on_signal(signal.SIGALRM, semaphore.release),
        Meanwhile(
            lambda: signal_main_thread(signal.SIGALRM),
            lambda: semaphore.statistics().tasks_waiting == 1,
            semaphore.release,
        ),
    ):
        assert in_this_thread(semaphore, lambda twin: twin.acquire()) is True
    assert_free(semaphore, 0)


@every_loop
def test_release_by_a_finalizer_in_another_thread_wakes_an_idle_loop(loop: str) -> None:
    semaphore = Semaphore(0)

    def collect() -> None:
        Garbage(semaphore.release)
        gc.collect()

    async def main() -> bool:
        with Meanwhile(
            collect, lambda: semaphore.statistics().tasks_waiting == 1, bell_of_this_loop()
        ):
            return await semaphore.acquire()

    assert run_under(loop, main) is True
    assert_free(semaphore, 0)


@every_loop
@pytest.mark.parametrize("where", ["task", "callback"])
def test_release_by_a_finalizer_on_the_loop_of_the_waiter_wakes_it(loop: str, where: str) -> None:
    semaphore = Semaphore(0)
    results: list[bool] = []

    def collect() -> None:
        Garbage(semaphore.release)
        gc.collect()

    async def acquire() -> None:
        results.append(await semaphore.acquire(timeout=SHORT_PATIENCE))

    async def main() -> None:
        async with anyio.create_task_group() as group:
            group.start_soon(acquire)
            while not semaphore.statistics().tasks_waiting:
                await anyio.lowlevel.checkpoint()
            if where == "task":
                collect()
            elif LOOPS[loop][0] == "trio":
                trio.lowlevel.current_trio_token().run_sync_soon(collect)
            else:
                asyncio.get_running_loop().call_soon(collect)

    run_under(loop, main)
    assert results == [True]
    assert_free(semaphore, 0)


# --- Interruptions at every bytecode ---

_FOLDER = str(Path(aiosync.__file__).parent)


class Strike:
    """Calls `handler` just before the k-th bytecode of aiosync that runs in this thread.

    Once, as a signal handler or a finalizer might be called; like theirs, the calls it makes are
    not interrupted in turn.
    """

    def __init__(self, k: int, handler: Callable[[], object]) -> None:
        self._left = k
        self._handler = handler
        self.struck = False

    def __enter__(self) -> Strike:
        self._before = sys.gettrace()
        sys.settrace(self._enter_frame)
        return self

    def __exit__(self, *exc_info: object) -> None:
        sys.settrace(self._before)

    def _enter_frame(self, frame: FrameType, event: str, arg: object) -> Any:
        if not frame.f_code.co_filename.startswith(_FOLDER):
            return None
        frame.f_trace_lines = False
        frame.f_trace_opcodes = True
        return self._in_frame

    def _in_frame(self, frame: FrameType, event: str, arg: object) -> Any:
        if event == "opcode":
            self._left -= 1
            if self._left < 0 and not self.struck:
                self.struck = True
                self._handler()
        return self._in_frame


class Task(Protocol):
    def done(self) -> bool: ...
    def result(self) -> Any:
        """Return the result, or the type of the exception."""

    def cancel(self) -> object: ...


class Env(Protocol):
    """What a scene needs from an event loop."""

    def spawn(self, function: Callable[[], Coroutine[Any, Any, Any]]) -> Task: ...
    async def settle(self) -> None:
        """Return when all other tasks are done or wait for something that does not come soon."""

    async def expire(self) -> None:
        """The same, after a very short timeout."""


class Outcome:
    """The result of a task, or the type of what it has raised."""

    def __init__(self) -> None:
        self._value: list[Any] = []

    def done(self) -> bool:
        return bool(self._value)

    def result(self) -> Any:
        return self._value[0]

    async def follow(self, work: Coroutine[Any, Any, Any]) -> None:
        try:
            self._value.append(await work)
        except Exception as error:
            self._value.append(type(error))
        except BaseException as error:
            self._value.append(type(error))
            raise


class AsyncioTask(Outcome):
    def __init__(self, work: Coroutine[Any, Any, Any]) -> None:
        super().__init__()
        self._task = asyncio.get_running_loop().create_task(self.follow(work))
        self.cancel = self._task.cancel


class AsyncioEnv:
    def spawn(self, function: Callable[[], Coroutine[Any, Any, Any]]) -> Task:
        return AsyncioTask(function())

    async def settle(self) -> None:
        for _ in range(6):
            await asyncio.sleep(0)

    async def expire(self) -> None:
        await asyncio.sleep(0.0001)
        await self.settle()


class TrioTask(Outcome):
    def __init__(self, nursery: trio.Nursery, work: Coroutine[Any, Any, Any]) -> None:
        super().__init__()
        self._scope = trio.CancelScope()
        self.cancel = self._scope.cancel
        nursery.start_soon(self._run, work)

    async def _run(self, work: Coroutine[Any, Any, Any]) -> None:
        with self._scope:
            await self.follow(work)


class TrioEnv:
    def __init__(self, nursery: trio.Nursery) -> None:
        self._nursery = nursery

    def spawn(self, function: Callable[[], Coroutine[Any, Any, Any]]) -> Task:
        return TrioTask(self._nursery, function())

    async def settle(self) -> None:
        await trio.testing.wait_all_tasks_blocked()

    async def expire(self) -> None:
        await trio.sleep(0.0001)
        await self.settle()


def run_in_env(loop: str, main: Callable[[Env], Awaitable[None]]) -> None:
    async def in_asyncio() -> None:
        await main(AsyncioEnv())

    async def in_trio() -> None:
        async with trio.open_nursery() as nursery:
            await main(TrioEnv(nursery))

    run_under(loop, in_trio if loop == "trio" else in_asyncio)


class Intruder:
    """What a handler does to a semaphore, and what it owes or has given when it is done."""

    def __init__(self, semaphore: Semaphore, how: str) -> None:
        self.semaphore = semaphore
        self.interrupt: Callable[[], None] = getattr(self, how)
        self.taken = 0  # permits that it still holds
        self.given = 0  # permits that it has added

    def release(self) -> None:
        self.semaphore.release()
        self.given += 1

    def release_two(self) -> None:
        self.semaphore.release(2)
        self.given += 2

    def take(self) -> None:
        with contextlib.suppress(anyio.WouldBlock):
            self.semaphore.acquire_nowait()
            self.taken += 1

    def take_and_release(self) -> None:
        with contextlib.suppress(anyio.WouldBlock):
            self.semaphore.acquire_nowait()
            self.semaphore.release()

    def finalize(self) -> None:
        class Owner:
            pass

        owner = Owner()
        weakref.finalize(owner, self.release)
        del owner

    def collect(self) -> None:
        Garbage(self.release)
        gc.collect(0)

    def give_back(self) -> None:
        if self.taken:
            self.semaphore.release(self.taken)
        self.taken = 0


SemaphoreScene = "Callable[[Env, Semaphore], Coroutine[Any, Any, list[Task]]]"


async def visit(semaphore: Semaphore, timeout: float | None = None) -> bool:
    """Acquire, and release in a later step."""
    acquired = await semaphore.acquire(timeout=timeout)
    if acquired:
        try:
            await anyio.lowlevel.checkpoint()
        finally:
            semaphore.release()
    return acquired


async def scene_free(env: Env, semaphore: Semaphore) -> list[Task]:
    """Permits are free."""
    first = env.spawn(lambda: visit(semaphore))
    await env.settle()
    second = env.spawn(lambda: visit(semaphore, PATIENCE))
    await env.settle()
    return [first, second]


async def scene_contended(env: Env, semaphore: Semaphore) -> list[Task]:
    """A permit is handed over."""
    held = await semaphore.acquire(blocking=False)
    tasks = [env.spawn(lambda: visit(semaphore))]
    await env.settle()
    tasks.append(env.spawn(lambda: visit(semaphore, PATIENCE)))
    await env.settle()
    if held:
        semaphore.release()
    await env.settle()
    return tasks


async def scene_release_of_two(env: Env, semaphore: Semaphore) -> list[Task]:
    """Two permits are handed over in one call."""
    held = sum([await semaphore.acquire(blocking=False), await semaphore.acquire(blocking=False)])
    tasks = [env.spawn(lambda: visit(semaphore))]
    await env.settle()
    tasks.append(env.spawn(lambda: visit(semaphore)))
    await env.settle()
    if held:
        semaphore.release(held)
    await env.settle()
    return tasks


async def scene_cancelled(env: Env, semaphore: Semaphore) -> list[Task]:
    """Waiters are cancelled: before, together with, and after a release."""
    held = await semaphore.acquire(blocking=False)
    tasks = []
    for _ in range(4):
        tasks.append(env.spawn(lambda: visit(semaphore)))
        await env.settle()
    tasks[0].cancel()
    await env.settle()
    tasks[1].cancel()
    if held:
        semaphore.release()
    tasks[2].cancel()
    await env.settle()
    return tasks


async def scene_timed_out(env: Env, semaphore: Semaphore) -> list[Task]:
    """A waiter runs out of time."""
    held = await semaphore.acquire(blocking=False)
    tasks = [env.spawn(lambda: visit(semaphore, 0.00005))]
    await env.settle()
    tasks.append(env.spawn(lambda: visit(semaphore)))
    await env.expire()
    if held:
        semaphore.release()
    await env.settle()
    return tasks


# Each with the number of permits it begins with.
SEMAPHORE_SCENES: dict[str, tuple[Callable[[Env, Semaphore], Awaitable[list[Task]]], int]] = {
    "free": (scene_free, 1),
    "contended": (scene_contended, 1),
    "release of two": (scene_release_of_two, 2),
    "cancelled": (scene_cancelled, 1),
    "timed out": (scene_timed_out, 1),
}


async def survive(
    env: Env,
    semaphore: Semaphore,
    intruder: Intruder,
    scene: Callable[[Env, Semaphore], Awaitable[list[Task]]],
    k: int,
) -> bool:
    """Let the intruder come in at the k-th bytecode; return False if there are not that many."""
    value = semaphore.value
    with Strike(k, intruder.interrupt) as strike:
        tasks = await scene(env, semaphore)
    await env.settle()
    # Who still waits does so because there is nothing to be had.
    pending = sum(not task.done() for task in tasks)
    assert semaphore.statistics().tasks_waiting == pending
    assert not (pending and semaphore.value)
    intruder.give_back()
    await env.settle()
    assert all(task.done() for task in tasks)
    results = {task.result() for task in tasks}
    assert results <= {True, False, asyncio.CancelledError, trio.Cancelled}, results
    assert_free(semaphore, value + intruder.given)
    return strike.struck


@pytest.mark.parametrize("loop", ["asyncio", "trio"])
@pytest.mark.parametrize("how", ["release", "release_two", "take", "take_and_release", "finalize"])
@pytest.mark.parametrize("name", list(SEMAPHORE_SCENES))
def test_handler_at_any_bytecode_of_a_semaphore_loses_no_permit_and_no_waiter(
    loop: str, how: str, name: str
) -> None:
    scene, value = SEMAPHORE_SCENES[name]

    async def main(env: Env) -> None:
        for k in range(100_000):
            semaphore = Semaphore(value)
            if not await survive(env, semaphore, Intruder(semaphore, how), scene, k):
                break
        assert k > 60, "hardly anything was interrupted"

    run_in_env(loop, main)


@pytest.mark.parametrize("loop", ["asyncio", "trio"])
@pytest.mark.parametrize("name", ["contended", "release of two"])
def test_handler_at_any_bytecode_of_a_bounded_semaphore_is_not_refused(
    loop: str, name: str
) -> None:
    scene, value = SEMAPHORE_SCENES[name]

    async def main(env: Env) -> None:
        for k in range(100_000):
            semaphore = BoundedSemaphore(value)
            intruder = Intruder(semaphore, "take_and_release")
            if not await survive(env, semaphore, intruder, scene, k):
                break
            with pytest.raises(ValueError, match="too often"):
                semaphore.release()
        assert k > 60, "hardly anything was interrupted"

    run_in_env(loop, main)
