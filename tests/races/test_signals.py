"""Calls from signal handlers and finalizers that come in the middle of other calls."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import importlib.util
import os
import signal
import sys
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import CodeType, FrameType, FunctionType
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import anyio
import anyio.lowlevel
import pytest
import trio
import trio.testing
from support.helpers import PATIENCE, Interrupt, assert_free, run_python, until

import aiosync
from aiosync import Barrier, BoundedSemaphore, BrokenBarrierError, Semaphore
from aiosync._barrier import _Round, _Rounds
from aiosync._handoff import HandoffQueue
from aiosync._park import (
    FREE_THREADED,
    ThreadWaiter,
    TrioWaiter,
    end_wait,
    run_in_thread,
    task_waiter,
    wake,
    wake_all,
)

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine, Iterator

T = TypeVar("T")
S = TypeVar("S", Semaphore, Barrier)

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

    def __enter__(self) -> None:
        self._thread.start()

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


def in_this_thread(shared: S, use: Callable[[S], Coroutine[Any, Any, T]]) -> T:
    """Run ``use(shared)`` in this thread, which blocks as long as that waits."""
    return run_in_thread(use(shared._for_threads()))


class Elsewhere:
    """Makes a call in another thread."""

    def __init__(self, call: Callable[[], object]) -> None:
        self._outcome: object = None
        self._thread = threading.Thread(target=self._run, args=[call], daemon=True)
        self._thread.start()

    def _run(self, call: Callable[[], object]) -> None:
        try:
            self._outcome = call()
        except Exception as error:
            self._outcome = type(error)

    def outcome(self) -> object:
        """Return the result, or the type of the exception."""
        self._thread.join(PATIENCE)
        assert not self._thread.is_alive()
        return self._outcome


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
            lambda: semaphore.statistics().waiting == 1,
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
            signal.setitimer(signal.ITIMER_REAL, 0.01)
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

    async def main() -> int:
        with Meanwhile(
            lambda: signal_main_thread(signal.SIGALRM),
            lambda: barrier.n_waiting == 1,
            bell_of_this_loop(),
        ):
            return await barrier.wait()

    with (
        on_signal(signal.SIGALRM, barrier.abort if how == "abort" else barrier.reset),
        pytest.raises(BrokenBarrierError, match=how),
    ):
        run_under(loop, main)
    assert barrier.broken is (how == "abort")


@posix
def test_release_by_a_signal_handler_wakes_the_thread_it_interrupts() -> None:
    semaphore = Semaphore(0)
    with (
        on_signal(signal.SIGALRM, semaphore.release),
        Meanwhile(
            lambda: signal_main_thread(signal.SIGALRM),
            lambda: semaphore.statistics().waiting == 1,
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
        with Meanwhile(collect, lambda: semaphore.statistics().waiting == 1, bell_of_this_loop()):
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
            while not semaphore.statistics().waiting:
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


_FILES = {str(path) for path in Path(aiosync.__file__).parent.glob("*.py")}


def _codes() -> set[CodeType]:
    """Return all code of aiosync that has been loaded."""
    gc.unfreeze()  # see conftest; or else none would be found
    functions = [thing for thing in gc.get_objects() if isinstance(thing, FunctionType)]
    gc.freeze()
    todo = [function.__code__ for function in functions]
    found = set()
    while todo:
        code = todo.pop()
        if code.co_filename in _FILES and code not in found:
            found.add(code)
            todo += [const for const in code.co_consts if isinstance(const, CodeType)]
    return found


class Strikes:
    """Calls a handler just before the k-th bytecode of aiosync that runs in this thread.

    Once, as a signal handler or a finalizer might be called; like theirs, the calls it makes are
    not interrupted in turn.
    """

    def __init__(self) -> None:
        self._thread = threading.get_ident()
        self._handler: Callable[[], object] = bool
        # How many bytecodes there are still to come before that. Below 0: none.
        self._left = -1
        self._struck = False

    def aim_here(self) -> None:
        """Watch the thread that calls this, from now on."""
        self._thread = threading.get_ident()

    @contextlib.contextmanager
    def at(self, k: int, handler: Callable[[], object]) -> Iterator[Callable[[], bool]]:
        """Call `handler` in this context; yields what tells whether that has happened."""
        self._handler = handler
        self._left = k
        self._struck = False
        with self._tracing():
            yield lambda: self._struck
        self._left = -1

    def _tick(self) -> None:
        if not self._left:
            self._left = -1
            self._struck = True
            self._handler()
        elif self._left > 0:
            self._left -= 1

    if sys.version_info >= (3, 12):
        # sys.settrace() would do, but it can't be confined to some code: five times as long.

        @contextlib.contextmanager
        def watching(self) -> Iterator[None]:
            """Must be entered around all the rest."""
            monitoring = sys.monitoring
            tool = next(tool for tool in range(2, 6) if monitoring.get_tool(tool) is None)
            monitoring.use_tool_id(tool, "strikes")
            monitoring.register_callback(tool, monitoring.events.INSTRUCTION, self._on_instruction)
            codes = _codes()
            for code in codes:
                monitoring.set_local_events(tool, code, monitoring.events.INSTRUCTION)
            try:
                yield
            finally:
                for code in codes:
                    monitoring.set_local_events(tool, code, 0)
                monitoring.register_callback(tool, monitoring.events.INSTRUCTION, None)
                monitoring.free_tool_id(tool)

        def _on_instruction(self, code: CodeType, offset: int) -> None:
            if self._left >= 0 and threading.get_ident() == self._thread:
                self._tick()

        def _tracing(self) -> contextlib.AbstractContextManager[None]:
            return contextlib.nullcontext()

    else:

        def watching(self) -> contextlib.AbstractContextManager[None]:
            """Must be entered around all the rest."""
            return contextlib.nullcontext()

        @contextlib.contextmanager
        def _tracing(self) -> Iterator[None]:
            before = sys.gettrace()
            sys.settrace(self._enter_frame)
            try:
                yield
            finally:
                sys.settrace(before)

        def _enter_frame(self, frame: FrameType, event: str, arg: object) -> Any:
            if frame.f_code.co_filename not in _FILES or self._left < 0:
                return None
            frame.f_trace_lines = False
            frame.f_trace_opcodes = True
            return self._in_frame

        def _in_frame(self, frame: FrameType, event: str, arg: object) -> Any:
            if event == "opcode":
                self._tick()
                if self._left < 0:
                    sys.settrace(None)  # the rest is faster without
            return self._in_frame


@pytest.fixture
def strikes() -> Iterator[Strikes]:
    strikes = Strikes()
    with strikes.watching():
        yield strikes


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
        for _ in range(4):
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
        self.overtook = False  # whether it has got a permit although somebody was waiting

    def release(self) -> None:
        self.semaphore.release()
        self.given += 1

    def release_two(self) -> None:
        self.semaphore.release(2)
        self.given += 2

    def take(self) -> None:
        waiting = self.semaphore.statistics().waiting
        with contextlib.suppress(anyio.WouldBlock):
            self.semaphore.acquire_nowait()
            self.taken += 1
            self.overtook = waiting > 0

    def take_and_release(self) -> None:
        self.take()
        self.give_back()

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


async def visit(semaphore: Semaphore, timeout: float | None = None) -> bool:
    """Acquire, and release in a later step."""
    acquired = await semaphore.acquire(timeout=timeout)
    if acquired:
        try:
            await anyio.lowlevel.checkpoint()
        finally:
            semaphore.release()
    return acquired


async def settled(env: Env, semaphore: Semaphore) -> None:
    """Let all run, and check that who still waits does so because there is nothing to be had."""
    await env.settle()
    # Not by what is public, since the handler might come in the middle of that.
    assert not (semaphore._queue.waiters and semaphore._items)


async def scene_free(env: Env, semaphore: Semaphore) -> list[Task]:
    """Permits are free."""
    first = env.spawn(lambda: visit(semaphore))
    await settled(env, semaphore)
    second = env.spawn(lambda: visit(semaphore, PATIENCE))
    await settled(env, semaphore)
    return [first, second]


async def scene_contended(env: Env, semaphore: Semaphore) -> list[Task]:
    """A permit is handed over."""
    held = await semaphore.acquire(blocking=False)
    task = env.spawn(lambda: visit(semaphore))
    await settled(env, semaphore)
    if held:
        semaphore.release()
    await settled(env, semaphore)
    return [task]


async def scene_release_of_two(env: Env, semaphore: Semaphore) -> list[Task]:
    """Two permits are handed over in one call."""
    held = sum([await semaphore.acquire(blocking=False), await semaphore.acquire(blocking=False)])
    tasks = [env.spawn(lambda: visit(semaphore))]
    await settled(env, semaphore)
    tasks.append(env.spawn(lambda: visit(semaphore)))
    await settled(env, semaphore)
    if held:
        semaphore.release(held)
    await settled(env, semaphore)
    return tasks


async def scene_waiters_cancelled(env: Env, semaphore: Semaphore) -> list[Task]:
    """Waiters are cancelled: before, together with, and after a release."""
    held = await semaphore.acquire(blocking=False)
    tasks = []
    for _ in range(2):
        tasks.append(env.spawn(lambda: visit(semaphore)))
        await settled(env, semaphore)
    tasks[0].cancel()
    if held:
        semaphore.release()
    tasks[1].cancel()
    await settled(env, semaphore)
    return tasks


async def scene_timed_out(env: Env, semaphore: Semaphore) -> list[Task]:
    """A waiter runs out of time."""
    held = await semaphore.acquire(blocking=False)
    tasks = [env.spawn(lambda: visit(semaphore, 0.00005))]
    await settled(env, semaphore)
    tasks.append(env.spawn(lambda: visit(semaphore)))
    while not tasks[0].done():
        await env.expire()
    await settled(env, semaphore)
    if held:
        semaphore.release()
    await settled(env, semaphore)
    return tasks


# Each with the number of permits it begins with.
SEMAPHORE_SCENES: dict[str, tuple[Callable[[Env, Semaphore], Awaitable[list[Task]]], int]] = {
    "free": (scene_free, 1),
    "contended": (scene_contended, 1),
    "release of two": (scene_release_of_two, 2),
    "cancelled": (scene_waiters_cancelled, 1),
    "timed out": (scene_timed_out, 1),
}


async def survive(
    strikes: Strikes,
    env: Env,
    semaphore: Semaphore,
    intruder: Intruder,
    scene: Callable[[Env, Semaphore], Awaitable[list[Task]]],
    k: int,
) -> bool:
    """Let the intruder come in at the k-th bytecode; return False if there are not that many."""
    value = semaphore.value
    with strikes.at(k, intruder.interrupt) as struck:
        tasks = await scene(env, semaphore)
    await settled(env, semaphore)
    assert semaphore.statistics().waiting == sum(not task.done() for task in tasks)
    assert not intruder.overtook
    intruder.give_back()
    await env.settle()
    assert all(task.done() for task in tasks)
    results = {task.result() for task in tasks}
    assert results <= {True, False, asyncio.CancelledError, trio.Cancelled}, results
    assert_free(semaphore, value + intruder.given)
    return struck()


@pytest.mark.stress
@pytest.mark.parametrize("loop", ["asyncio", "trio"])
@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("free", "release"),
        ("free", "take"),
        ("contended", "release"),
        ("contended", "take"),
        ("contended", "take_and_release"),
        ("contended", "finalize"),
        ("contended", "collect"),
        ("release of two", "release_two"),
        ("cancelled", "release"),
        ("cancelled", "take"),
        ("timed out", "release"),
    ],
)
def test_handler_at_any_bytecode_of_a_semaphore_loses_no_permit_and_no_waiter(
    strikes: Strikes, loop: str, name: str, how: str
) -> None:
    scene, value = SEMAPHORE_SCENES[name]

    async def main(env: Env) -> None:
        k, going = 0, True
        while going:
            semaphore = Semaphore(value)
            going = await survive(strikes, env, semaphore, Intruder(semaphore, how), scene, k)
            k += going
        assert k > 50, "hardly anything was interrupted"

    run_in_env(loop, main)


@pytest.mark.stress
@pytest.mark.parametrize("loop", ["asyncio", "trio"])
def test_handler_at_any_bytecode_of_a_bounded_semaphore_is_not_refused(
    strikes: Strikes, loop: str
) -> None:
    scene, value = SEMAPHORE_SCENES["contended"]

    async def main(env: Env) -> None:
        k, going = 0, True
        while going:
            semaphore = BoundedSemaphore(value)
            intruder = Intruder(semaphore, "take_and_release")
            going = await survive(strikes, env, semaphore, intruder, scene, k)
            k += going
            with pytest.raises(ValueError, match="too often"):
                semaphore.release()
        assert k > 50, "hardly anything was interrupted"

    run_in_env(loop, main)


@pytest.mark.stress
def test_release_at_any_bytecode_of_a_thread_s_own_acquire_is_not_lost(strikes: Strikes) -> None:
    k, going = 0, True
    while going:
        semaphore = Semaphore(0)
        with strikes.at(k, semaphore.release) as struck:
            acquired = in_this_thread(semaphore, lambda twin: twin.acquire(timeout=0.002))
        assert semaphore.statistics().waiting == 0
        assert acquired + semaphore.value == struck()
        going = struck()
        k += going
    assert k > 50, "hardly anything was interrupted"


@pytest.mark.stress
@pytest.mark.parametrize("how", ["release", "take", "take_and_release"])
def test_handler_at_any_bytecode_of_a_release_that_wakes_a_thread_loses_nothing(
    strikes: Strikes, how: str
) -> None:
    k, going = 0, True
    while going:
        semaphore = Semaphore(0)
        intruder = Intruder(semaphore, how)
        other = Elsewhere(
            lambda shared=semaphore: in_this_thread(  # type: ignore[misc]
                shared, lambda twin: twin.acquire(timeout=PATIENCE)
            )
        )
        until(lambda shared=semaphore: shared.statistics().waiting == 1)  # type: ignore[misc]
        with strikes.at(k, intruder.interrupt) as struck:
            semaphore.release()
        intruder.give_back()
        assert other.outcome() is True
        assert_free(semaphore, intruder.given)
        going = struck()
        k += going
    assert k > 20, "hardly anything was interrupted"


class Action:
    """An action that counts how often it was run."""

    def __init__(self, kind: str) -> None:
        self.runs = 0
        self.call = {"none": None, "plain": self._plain, "async": self._async}[kind]

    def _plain(self) -> None:
        self.runs += 1

    async def _async(self) -> None:
        self.runs += 1
        await anyio.lowlevel.checkpoint()


async def scene_round(env: Env, barrier: Barrier) -> list[Task]:
    """Three arrive."""
    tasks = [env.spawn(barrier.wait)]
    await env.settle()
    tasks.append(env.spawn(lambda: barrier.wait(PATIENCE)))
    await env.settle()
    tasks.append(env.spawn(barrier.wait))
    await env.settle()
    return tasks


async def scene_latecomer(env: Env, barrier: Barrier) -> list[Task]:
    """Three arrive, and a fourth when the action is running."""
    tasks = [env.spawn(barrier.wait) for _ in range(4)]
    await env.settle()
    return tasks


async def scene_cancelled(env: Env, barrier: Barrier) -> list[Task]:
    """One of those who wait is cancelled."""
    tasks = [env.spawn(barrier.wait)]
    await env.settle()
    tasks.append(env.spawn(barrier.wait))
    await env.settle()
    tasks[0].cancel()
    await env.settle()
    return tasks


async def scene_cancelled_as_the_last_arrives(env: Env, barrier: Barrier) -> list[Task]:
    tasks = [env.spawn(barrier.wait)]
    await env.settle()
    tasks.append(env.spawn(barrier.wait))
    tasks.append(env.spawn(barrier.wait))
    tasks[0].cancel()
    await env.settle()
    return tasks


async def scene_party_timed_out(env: Env, barrier: Barrier) -> list[Task]:
    """One of those who wait runs out of time."""
    tasks = [env.spawn(barrier.wait)]
    await env.settle()
    tasks.append(env.spawn(lambda: barrier.wait(0.00005)))
    while not tasks[1].done():
        await env.expire()
    return tasks


BARRIER_SCENES: dict[str, Callable[[Env, Barrier], Awaitable[list[Task]]]] = {
    "round": scene_round,
    "latecomer": scene_latecomer,
    "cancelled": scene_cancelled,
    "cancelled as the last arrives": scene_cancelled_as_the_last_arrives,
    "timed out": scene_party_timed_out,
}


async def endure(
    strikes: Strikes,
    env: Env,
    action: Action,
    how: str,
    scene: Callable[[Env, Barrier], Awaitable[list[Task]]],
    k: int,
) -> bool:
    """Let the k-th bytecode be interrupted; return False if there are not that many."""
    barrier = Barrier(3, action.call)
    interrupt = barrier.abort if how == "abort" else barrier.reset
    with strikes.at(k, interrupt) as struck:
        tasks = await scene(env, barrier)
    await env.settle()
    # Who still waits does so because others have to come.
    pending = sum(not task.done() for task in tasks)
    assert barrier.n_waiting == pending
    if how == "abort" and struck():
        assert barrier.broken
    barrier.abort()
    await env.settle()
    assert all(task.done() for task in tasks)
    results = [task.result() for task in tasks]
    passed = [result for result in results if isinstance(result, int)]
    refused = {result for result in results if not isinstance(result, int)}
    assert sorted(passed) in ([], [0, 1, 2]), results
    assert refused <= {BrokenBarrierError, asyncio.CancelledError, trio.Cancelled}, results
    if action.call is not None and passed:
        assert action.runs == 1
    if scene in {scene_round, scene_latecomer} and not struck():
        assert passed
    # And the barrier is as good as new.
    barrier.reset()
    tasks = [env.spawn(barrier.wait) for _ in range(3)]
    await env.settle()
    assert sorted(task.result() for task in tasks) == [0, 1, 2]
    return struck()


@pytest.mark.stress
@pytest.mark.parametrize("loop", ["asyncio", "trio"])
@pytest.mark.parametrize(
    ("name", "action", "how"),
    [
        ("round", "none", "abort"),
        ("round", "none", "reset"),
        ("round", "plain", "reset"),
        ("latecomer", "async", "abort"),
        ("cancelled", "none", "reset"),
        ("cancelled as the last arrives", "none", "abort"),
        ("timed out", "none", "abort"),
    ],
)
def test_handler_at_any_bytecode_of_a_barrier_breaks_the_round_for_all_or_none(
    strikes: Strikes, loop: str, name: str, action: str, how: str
) -> None:
    async def main(env: Env) -> None:
        k = 0
        while await endure(strikes, env, Action(action), how, BARRIER_SCENES[name], k):
            k += 1
        assert k > 50, "hardly anything was interrupted"

    run_in_env(loop, main)


@pytest.mark.stress
@pytest.mark.parametrize("how", ["abort", "reset"])
def test_handler_at_any_bytecode_of_a_thread_s_own_wait_breaks_it(
    strikes: Strikes, how: str
) -> None:
    k, going = 0, True
    while going:
        barrier = Barrier(2)
        with (
            pytest.raises(BrokenBarrierError),
            strikes.at(k, barrier.abort if how == "abort" else barrier.reset) as struck,
        ):
            in_this_thread(barrier, lambda twin: twin.wait(0.002))
        assert barrier.n_waiting == 0
        assert barrier.broken or how == "reset"
        going = struck()
        k += going
    assert k > 50, "hardly anything was interrupted"


@pytest.mark.stress
@pytest.mark.parametrize("how", ["abort", "reset"])
def test_handler_at_any_bytecode_of_the_last_arrival_is_heard_by_all_threads_or_none(
    strikes: Strikes,
    how: str,
) -> None:
    broken = 0
    mine: object = None
    k, going = 0, True
    while going:
        barrier = Barrier(2)
        other = Elsewhere(
            lambda shared=barrier: in_this_thread(  # type: ignore[misc]
                shared, lambda twin: twin.wait(PATIENCE)
            )
        )
        until(lambda shared=barrier: shared.n_waiting == 1)  # type: ignore[misc]
        with strikes.at(k, barrier.abort if how == "abort" else barrier.reset) as struck:
            try:
                # If the reset comes before the arrival, nobody else will come.
                mine = in_this_thread(barrier, lambda twin: twin.wait(0.002))
            except BrokenBarrierError:
                mine = BrokenBarrierError
                broken += 1
        assert (other.outcome(), mine) in [(0, 1), (BrokenBarrierError, BrokenBarrierError)]
        going = struck()
        k += going
    assert mine == 1
    assert broken
    assert k > broken


@pytest.mark.stress
@pytest.mark.filterwarnings("ignore:coroutine '.*' was never awaited:RuntimeWarning")
def test_an_exception_at_any_bytecode_of_a_thread_s_own_wait_leaves_nobody_asleep(
    strikes: Strikes,
) -> None:
    def strike() -> None:
        raise Interrupt

    def wait_and_be_struck(barrier: Barrier, k: int) -> tuple[object, bool]:
        # In a thread of its own: Python 3.11, for one, takes it ill if an exception is raised just
        # as it enters or leaves an except clause, and has a wrong context for all later ones.
        strikes.aim_here()
        with strikes.at(k, strike) as struck:
            try:
                mine: object = in_this_thread(barrier, lambda twin: twin.wait(PATIENCE))
            except Interrupt:
                mine = Interrupt
        return mine, struck()

    ends: Counter[str] = Counter()
    mine: object = None
    k, going = 0, True
    while going:
        barrier = Barrier(3)
        round = barrier._rounds.latest

        def wait(enough: int, shared: Barrier = barrier, round: Any = round) -> object:
            until(lambda: len(round.threads) >= enough or shared.broken)
            return in_this_thread(shared, lambda twin: twin.wait(PATIENCE))

        # The first sleeps until the one that is interrupted, which was the second, wakes it.
        others = [Elsewhere(lambda wait=wait: wait(0))]  # type: ignore[misc]
        until(lambda round=round: len(round.threads) == 1)  # type: ignore[misc]
        others.append(Elsewhere(lambda wait=wait: wait(2)))  # type: ignore[misc]
        struck: Any = Elsewhere(
            lambda barrier=barrier, k=k: wait_and_be_struck(barrier, k)  # type: ignore[misc]
        ).outcome()
        mine, going = struck
        if mine is Interrupt and not barrier.broken and barrier.n_waiting == 1:
            # It had not arrived; somebody else comes.
            in_this_thread(barrier, lambda twin: twin.wait(PATIENCE))
        outcomes = [other.outcome() for other in others]
        assert outcomes in ([0, 2], [BrokenBarrierError] * 2)
        assert mine in (1, Interrupt)
        ends["passed" if outcomes == [0, 2] else "broken"] += mine is Interrupt
        k += going
    assert mine == 1
    assert min(ends["passed"], ends["broken"]) > 10, ends


# --- Real signals, and the real collector, at random ---

STORM = 0.5


class Crowd:
    """Tasks that take and return permits until the time is over."""

    def __init__(self, semaphore: Semaphore) -> None:
        self.semaphore = semaphore
        self.value = semaphore.value
        self.passes = 0
        self.end = time.monotonic() + STORM

    def going(self) -> bool:
        return time.monotonic() < self.end

    async def member(self, number: int) -> None:
        while self.going():
            passed = await visit(self.semaphore, [None, 0.0005, 0][number % 3])
            self.passes += passed
            await anyio.lowlevel.checkpoint()

    async def watch(self, meanwhile: contextlib.AbstractContextManager[object]) -> None:
        async with anyio.create_task_group() as group:
            for number in range(6):
                group.start_soon(self.member, number)
            with meanwhile:
                await anyio.sleep(STORM)
            if isinstance(self.semaphore, BoundedSemaphore):
                return
            # Nobody shall wait for what a handler has kept, and will never return.
            self.semaphore.release(self.value)
        for _ in range(self.value):
            self.semaphore.acquire_nowait()


@pytest.mark.stress
@posix
@every_loop
def test_semaphore_conserves_its_permits_in_a_storm_of_signals(loop: str) -> None:
    semaphore = Semaphore(2)
    crowd = Crowd(semaphore)
    kept: list[bool] = []
    calls = 0

    def handler() -> None:
        nonlocal calls
        calls += 1
        if kept:
            kept.pop()
            semaphore.release()
        else:
            with contextlib.suppress(anyio.WouldBlock):
                semaphore.acquire_nowait()
                kept.append(True)

    run_under(loop, lambda: crowd.watch(many_alarms(handler, 0.0005)))
    assert calls > 20
    assert crowd.passes > 20
    assert_free(semaphore, 2 - len(kept))


@pytest.mark.stress
@posix
@every_loop
def test_bounded_semaphore_refuses_nobody_in_a_storm_of_signals(loop: str) -> None:
    semaphore = BoundedSemaphore(2)
    crowd = Crowd(semaphore)
    calls = taken = 0

    def handler() -> None:
        nonlocal calls, taken
        calls += 1
        with contextlib.suppress(anyio.WouldBlock):
            semaphore.acquire_nowait()
            taken += 1
            semaphore.release()

    run_under(loop, lambda: crowd.watch(many_alarms(handler, 0.0005)))
    assert calls > 20
    assert crowd.passes > 20
    assert_free(semaphore, 2)


@pytest.mark.stress
@posix
def test_threads_lose_no_permit_in_a_storm_of_signals() -> None:
    semaphore = Semaphore(1)
    calls = 0
    end = time.monotonic() + STORM

    def handler() -> None:
        nonlocal calls
        calls += 1
        semaphore.release()
        with contextlib.suppress(anyio.WouldBlock):
            semaphore.acquire_nowait()
            return
        extra.append(True)

    def contend() -> int:
        passes = 0
        while time.monotonic() < end:
            if in_this_thread(semaphore, lambda twin: twin.acquire(timeout=0.001)):
                passes += 1
                semaphore.release()
        return passes

    extra: list[bool] = []
    others = [Elsewhere(contend), Elsewhere(contend)]
    with many_alarms(handler, 0.0005):
        passes = contend()
    results = [other.outcome() for other in others]
    assert all(isinstance(result, int) and result for result in [passes, *results]), results
    assert calls > 20
    assert semaphore.statistics().waiting == 0
    assert semaphore.value == 1 + len(extra)


@pytest.mark.stress
@posix
@every_loop
def test_barrier_round_is_passed_by_all_or_none_in_a_storm_of_signals(loop: str) -> None:
    parties = 4
    barrier = Barrier(parties, lambda: None)
    passed: list[list[int]] = [[] for _ in range(parties)]
    over = False
    calls = broken = 0

    def handler() -> None:
        nonlocal calls
        calls += 1
        if calls % 3 == 0:
            barrier.abort()
        barrier.reset()

    async def party(number: int) -> None:
        nonlocal broken
        while not over:
            try:
                passed[number].append(await barrier.wait())
            except BrokenBarrierError:
                broken += 1
            await anyio.lowlevel.checkpoint()

    async def main() -> None:
        nonlocal over
        async with anyio.create_task_group() as group:
            for number in range(parties):
                group.start_soon(party, number)
            with many_alarms(handler, 0.001):
                await anyio.sleep(STORM)
            over = True
            barrier.abort()

    run_under(loop, main)
    assert calls > 20
    assert broken
    assert len(passed[0]) > 20
    for indices in zip(*passed, strict=True):
        assert sorted(indices) == list(range(parties))


@pytest.fixture
def eager_collector() -> Iterator[None]:
    """Let the garbage collector run after every few allocations."""
    threshold = gc.get_threshold()
    gc.set_threshold(3, 1000, 1000)
    if not FREE_THREADED:
        yield
    else:  # the collector of such an interpreter heeds no small threshold
        done = threading.Event()

        def collect() -> None:
            while not done.wait(0.001):
                gc.collect()

        collector = threading.Thread(target=collect)
        collector.start()
        yield
        done.set()
        collector.join()
    gc.set_threshold(*threshold)


@pytest.mark.usefixtures("eager_collector")
@every_loop
def test_finalizers_that_release_during_other_calls_lose_no_permit(loop: str) -> None:
    semaphore = Semaphore(0)
    rounds = 50 if FREE_THREADED else 300  # there each collection is a full one
    finalized = passes = 0

    def finalize() -> None:
        nonlocal finalized
        finalized += 1
        semaphore.release()

    async def member() -> None:
        nonlocal passes
        for _ in range(rounds):
            Garbage(finalize)
            assert await semaphore.acquire(timeout=SHORT_PATIENCE)
            passes += 1

    async def main() -> None:
        async with anyio.create_task_group() as group:
            for _ in range(3):
                group.start_soon(member)
            while passes + semaphore.statistics().waiting < 3 * rounds:
                # Most of the garbage is found sooner.
                Garbage(bool)
                await anyio.lowlevel.checkpoint()
            gc.collect(0)

    run_under(loop, main)
    gc.collect()
    assert (passes, finalized) == (3 * rounds, 3 * rounds)
    assert_free(semaphore, 0)


# --- KeyboardInterrupt ---


def interrupt() -> None:
    raise KeyboardInterrupt


@posix
@pytest.mark.parametrize("timeout", [None, PATIENCE])
def test_keyboard_interrupt_in_a_blocking_acquire_leaves_no_waiter(timeout: float | None) -> None:
    semaphore = Semaphore(0)
    with (
        on_signal(signal.SIGALRM, interrupt),
        Meanwhile(
            lambda: signal_main_thread(signal.SIGALRM),
            lambda: semaphore.statistics().waiting == 1,
            semaphore.release,
        ),
        pytest.raises(KeyboardInterrupt),
    ):
        in_this_thread(semaphore, lambda twin: twin.acquire(timeout=timeout))
    assert_free(semaphore, 0)
    semaphore.release()
    assert_free(semaphore, 1)


@posix
def test_keyboard_interrupt_by_a_timer_leaves_no_waiter() -> None:
    semaphore = Semaphore(0)
    with on_signal(signal.SIGALRM, interrupt), pytest.raises(KeyboardInterrupt):
        # Late enough for the wait to have begun. If it has not, nothing is left behind either.
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        in_this_thread(semaphore, lambda twin: twin.acquire(timeout=PATIENCE))
    semaphore.release()
    assert_free(semaphore, 1)


@posix
def test_interrupted_acquire_leaves_the_line_to_the_next_thread() -> None:
    semaphore = Semaphore(0)
    others: list[Elsewhere] = []

    def queue_another_and_interrupt() -> None:
        others.append(
            Elsewhere(
                lambda: in_this_thread(semaphore, lambda twin: twin.acquire(timeout=PATIENCE))
            )
        )
        until(lambda: semaphore.statistics().waiting == 2)
        os.kill(os.getpid(), signal.SIGINT)

    with (
        on_signal(signal.SIGINT, interrupt),
        Meanwhile(
            queue_another_and_interrupt,
            lambda: semaphore.statistics().waiting == 1,
            lambda: semaphore.release(2),
        ),
        pytest.raises(KeyboardInterrupt),
    ):
        in_this_thread(semaphore, lambda twin: twin.acquire())
    assert semaphore.statistics().waiting == 1
    semaphore.release()
    assert others[0].outcome() is True
    assert_free(semaphore, 0)


@posix
def test_permit_granted_by_the_handler_that_interrupts_is_free_again() -> None:
    semaphore = Semaphore(0)

    def release_and_interrupt() -> None:
        semaphore.release()
        raise KeyboardInterrupt

    with (
        on_signal(signal.SIGALRM, release_and_interrupt),
        Meanwhile(
            lambda: signal_main_thread(signal.SIGALRM),
            lambda: semaphore.statistics().waiting == 1,
            semaphore.release,
        ),
        pytest.raises(KeyboardInterrupt),
    ):
        in_this_thread(semaphore, lambda twin: twin.acquire())
    assert_free(semaphore, 1)


@posix
@every_loop
def test_keyboard_interrupt_under_an_event_loop_leaves_no_waiter(loop: str) -> None:
    semaphore = Semaphore(0)

    async def main() -> None:
        with Meanwhile(
            lambda: os.kill(os.getpid(), signal.SIGINT),
            lambda: semaphore.statistics().waiting == 1,
            semaphore.release,
        ):
            await semaphore.acquire()

    with pytest.raises(KeyboardInterrupt):
        run_under(loop, main)
    assert_free(semaphore, 0)
    semaphore.release()
    assert_free(semaphore, 1)


@posix
@pytest.mark.parametrize("timeout", [None, PATIENCE])
def test_interrupted_barrier_wait_in_the_main_thread_breaks_it_for_the_others(
    timeout: float | None,
) -> None:
    barrier = Barrier(5)
    others = [
        Elsewhere(lambda: in_this_thread(barrier, lambda twin: twin.wait())),
        Elsewhere(lambda: anyio.run(barrier.wait)),
        Elsewhere(lambda: anyio.run(barrier.wait, backend="trio")),
    ]
    until(lambda: barrier.n_waiting == 3)
    with (
        on_signal(signal.SIGALRM, interrupt),
        Meanwhile(
            lambda: signal_main_thread(signal.SIGALRM),
            lambda: barrier.n_waiting == 4,
            barrier.reset,
        ),
        pytest.raises(KeyboardInterrupt),
    ):
        in_this_thread(barrier, lambda twin: twin.wait(timeout))
    assert [other.outcome() for other in others] == [BrokenBarrierError] * 3
    assert barrier.broken


def _round() -> _Round:
    return _Round([0])


# Functions that change what is shared, and arguments for them.
CRITICAL: list[tuple[Callable[..., Any], Callable[[], tuple[Any, ...]]]] = [
    (HandoffQueue.put, lambda: (HandoffQueue(), 1)),
    (HandoffQueue.put_many, lambda: (HandoffQueue(), 1, 1)),
    (HandoffQueue.get_nowait, lambda: (HandoffQueue(), None)),
    (HandoffQueue.join, lambda: (HandoffQueue(), task_waiter())),
    (HandoffQueue.leave, lambda: (HandoffQueue(), task_waiter())),
    (HandoffQueue.wait, lambda: (HandoffQueue([1]), task_waiter(), None, None)),
    (HandoffQueue.dispatch, lambda: (HandoffQueue(),)),
    (HandoffQueue.put_back, lambda: (HandoffQueue(), 1)),
    (HandoffQueue._pop_bulk, lambda: (HandoffQueue(),)),
    (HandoffQueue.give, lambda: (HandoffQueue(), 1)),
    (HandoffQueue._grant, lambda: (HandoffQueue(), ThreadWaiter(), 1)),
    (end_wait, lambda: (ThreadWaiter(),)),
    (wake, lambda: (ThreadWaiter(),)),
    (wake_all, lambda: ([ThreadWaiter()],)),
    (TrioWaiter.end, lambda: (task_waiter(),)),
    (Semaphore.acquire, lambda: (Semaphore(),)),
    (Semaphore._acquire_slowly, lambda: (Semaphore(), False, None)),
    (Semaphore._checkpoint, lambda: (Semaphore(), False)),
    (Semaphore.__aenter__, lambda: (Semaphore(),)),
    (Semaphore.acquire_nowait, lambda: (Semaphore(),)),
    (Semaphore.release, lambda: (Semaphore(),)),
    (Semaphore.__aexit__, lambda: (Semaphore(0), None, None, None)),
    (BoundedSemaphore.acquire, lambda: (BoundedSemaphore(),)),
    (BoundedSemaphore.acquire_nowait, lambda: (BoundedSemaphore(),)),
    (BoundedSemaphore.release, lambda: (_acquired(),)),
    (BoundedSemaphore._claim, lambda: (_acquired(), 1)),
    (_Round.break_, lambda: (_round(), "reset")),
    (_Round.wake, lambda: (_round(),)),
    (_Round.wake_a_thread, lambda: (_round(),)),
    (_Round.leave, lambda: (_round(), ThreadWaiter())),
    (_Rounds.after, lambda: (_Rounds(2, None), _round())),
    (_Rounds.run_action, lambda: (_Rounds(2, bool), _round(), bool)),
    (_Rounds.trip, lambda: (_Rounds(2, None), _round(), "outcome")),
    (Barrier.abort, lambda: (Barrier(2),)),
    (Barrier.reset, lambda: (Barrier(2),)),
    (Barrier.wait, lambda: (Barrier(1),)),
]


_PROTECTED_FROM_THE_BEGINNING = """
import signal, threading
from aiosync import Semaphore, _handoff, as_threading
if {trio_first}:
    import trio
semaphore = Semaphore(0)
import trio

def strike():
    _handoff.current_token = current_token
    signal.raise_signal(signal.SIGINT)
    return current_token()

async def main():
    if not {trio_first}:
        semaphore.release()
        await semaphore.acquire()  # the first checkpoint
    thread.start()
    while not semaphore.statistics().threads_waiting:
        await trio.sleep(0.001)
    _handoff.current_token = strike
    semaphore.release()
    thread.join(20)
    print(got)

got = []
current_token = _handoff.current_token
thread = threading.Thread(target=lambda: got.append(as_threading(semaphore).acquire()), daemon=True)
try:
    trio.run(main)
except KeyboardInterrupt:
    print("interrupted later")
"""


_SO_IS_A_BARRIER = """
import signal, threading, trio
from aiosync import Barrier, BrokenBarrierError, _park, as_threading

barrier = Barrier(2)
ring = _park.ThreadWaiter.wake_threadsafe

def strike(self):
    signal.raise_signal(signal.SIGINT)
    ring(self)

def wait():
    try:
        as_threading(barrier).wait()
    except BrokenBarrierError:
        got.append(True)

async def main():
    thread.start()
    while not barrier._rounds.latest.threads:
        await trio.sleep(0.001)
    _park.ThreadWaiter.wake_threadsafe = strike
    barrier.abort()
    thread.join(20)
    print(got)

got = []
thread = threading.Thread(target=wait, daemon=True)
try:
    trio.run(main)
except KeyboardInterrupt:
    print("interrupted later")
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "program",
    [
        _PROTECTED_FROM_THE_BEGINNING.format(trio_first=True),
        _PROTECTED_FROM_THE_BEGINNING.format(trio_first=False),
        _SO_IS_A_BARRIER,
    ],
    ids=["trio first", "trio later", "barrier"],
)
def test_no_keyboard_interrupt_of_trio_hits_a_program_in_which_no_task_has_waited_yet(
    program: str,
) -> None:
    done = run_python("-c", program)
    assert done.stderr == ""
    assert done.stdout == "[True]\ninterrupted later\n"


def _acquired() -> BoundedSemaphore:
    semaphore = BoundedSemaphore()
    semaphore.acquire_nowait()
    return semaphore


@pytest.mark.parametrize(
    ("function", "arguments"), CRITICAL, ids=[function.__qualname__ for function, _ in CRITICAL]
)
def test_no_keyboard_interrupt_of_trio_is_raised_in_the_middle_of(
    function: Callable[..., Any], arguments: Callable[[], tuple[Any, ...]]
) -> None:
    code: Any = function.__code__
    protected: list[bool] = []

    def look(frame: FrameType, event: str, arg: object) -> None:
        if event == "call" and frame.f_code is code:
            protected.append(trio.lowlevel.currently_ki_protected())

    async def main() -> None:
        given = arguments()
        task_waiter()  # the first makes trio know what is critical
        assert not trio.lowlevel.currently_ki_protected()
        before = sys.getprofile()
        sys.setprofile(look)
        try:
            result = function(*given)
            if hasattr(result, "__await__"):
                await result
        finally:
            sys.setprofile(before)

    trio.run(main)
    assert protected
    assert all(protected)
