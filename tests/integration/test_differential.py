"""The same program, with `threading` and with aiosync, must have the same history.

What must live here: programs, as data; the worlds in which they are run; and the comparison. The
worlds: the objects of `threading`, our views of them for threads, and our objects under asyncio and
trio. Programs are drawn by hypothesis, so one that shows a difference is shown at its shortest.

Where `threading` is deterministic, and nowhere else
----------------------------------------------------
One thing is done at a time: after each operation the world comes to rest, that is, each call has
ended or waits. `threading` promises no order among those who wait, but its condition variables wake
the oldest first. Of several that are woken at once nobody can tell who runs first; so it is
compared who has been served, not in which order. An operation is not begun while another, that was
granted, has not run yet: there `threading` lets newcomers overtake, and we do not.

``AIOSYNC_EXPLORE=long`` tries many more programs, from a seed that is printed.
"""

from __future__ import annotations

import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import AsyncExitStack
from functools import partial
from inspect import isawaitable
from typing import Any

import anyio
import anyio.abc
import anyio.lowlevel
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from support.helpers import LONG, PATIENCE, InThread

from aiosync import Barrier, BoundedSemaphore, Semaphore, as_threading

examine = settings(
    max_examples=5000 if LONG else 120,
    derandomize=not LONG,
    deadline=None,
    database=None,
    print_blob=True,
    phases=[Phase.generate, Phase.shrink],
    suppress_health_check=list(HealthCheck),
)

# To make a failure short takes minutes if somebody waits for ever.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

# What an operation is called, and its arguments.
Operation = tuple[Any, ...]
Program = list[Operation]
History = list[object]


def told(outcome: object) -> object:
    """Return what can be compared of what a call has returned or raised."""
    return type(outcome).__name__ if isinstance(outcome, BaseException) else outcome


class World(ABC):
    """Where a program runs. Methods that tasks have to await may be plain ones that block."""

    semaphores: dict[str, Any]
    barrier: Any

    @abstractmethod
    async def start(self, call: Callable[[], Any]) -> Callable[[], tuple[bool, object]]:
        """Let somebody begin a call that may wait; return what tells whether it has ended, and how.

        The world is at rest when this returns.
        """

    @abstractmethod
    async def rest(self, waiting: Callable[[], int]) -> None:
        """Return when all that was begun has ended or waits."""

    @abstractmethod
    def new_gate(self) -> Any:
        """Return an event that somebody waits for, to be set by the program."""

    @abstractmethod
    def use(self, semaphore: Any, inside: dict[int, Any], number: int, gate: Any) -> Any:
        """Enter a ``with`` of either kind, tell that by ``inside[number]``, and wait for `gate`."""

    async def call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> object:
        """Make a call that does not wait, and return what it returns or raises, to be compared."""
        try:
            result = function(*args, **kwargs)
            return told(await result if isawaitable(result) else result)
        except Exception as error:
            return told(error)


class Threads(World):
    # How long they may take to come to rest, in seconds. Once they have not, less time is enough
    # for those programs that are tried to find the shortest one.
    patience = PATIENCE

    def __init__(self) -> None:
        self.begun: list[InThread] = []

    async def start(self, call: Callable[[], Any]) -> Callable[[], tuple[bool, object]]:
        job = InThread(call)
        self.begun.append(job)
        return lambda: (True, told(job.result())) if job.done() else (False, None)

    new_gate = threading.Event

    def use(self, semaphore: Any, inside: dict[int, Any], number: int, gate: Any) -> None:
        with semaphore as entered:
            inside[number] = gate
            assert entered is True
            gate.wait()

    async def rest(self, waiting: Callable[[], int]) -> None:
        deadline = time.monotonic() + Threads.patience
        while sum(not job.done() for job in self.begun) != waiting():
            if time.monotonic() > deadline:
                Threads.patience = 0.5
                raise AssertionError("somebody has been told nothing")
            time.sleep(0.0002)


class Threading(Threads):
    semaphores = {"plain": threading.Semaphore, "bounded": threading.BoundedSemaphore}
    barrier = threading.Barrier


class Views(Threads):
    semaphores = {
        "plain": lambda value: as_threading(Semaphore(value)),
        "bounded": lambda value: as_threading(BoundedSemaphore(value)),
    }

    @staticmethod
    def barrier(*args: Any) -> Any:
        return as_threading(Barrier(*args))


class Tasks(World):
    semaphores = {"plain": Semaphore, "bounded": BoundedSemaphore}
    barrier = Barrier

    def __init__(self, tasks: anyio.abc.TaskGroup) -> None:
        self.tasks = tasks

    async def start(self, call: Callable[[], Any]) -> Callable[[], tuple[bool, object]]:
        ends: list[object] = []

        async def run() -> None:
            try:
                ends.append(told(await call()))
            except Exception as error:
                ends.append(told(error))

        self.tasks.start_soon(run)
        await self.rest(int)
        return lambda: (bool(ends), ends[0] if ends else None)

    new_gate = anyio.Event

    async def use(self, semaphore: Any, inside: dict[int, Any], number: int, gate: Any) -> None:
        async with semaphore as entered:
            inside[number] = gate
            assert entered is True
            await gate.wait()

    async def rest(self, waiting: Callable[[], int]) -> None:
        for _ in range(20):
            await anyio.lowlevel.checkpoint()  # or else anyio sleeps for 0.1 seconds under asyncio
        await anyio.wait_all_tasks_blocked()


def in_threads(world: Threads, program: Callable[[World], Coroutine[Any, Any, History]]) -> History:
    coroutine = program(world)
    try:
        coroutine.send(None)
    except StopIteration as stop:
        history: History = stop.value
        return history
    raise AssertionError("a world of threads awaits nothing")


def in_tasks(backend: str, program: Callable[[World], Awaitable[History]]) -> History:
    async def main() -> History:
        async with AsyncExitStack() as stack:
            return await program(Tasks(await stack.enter_async_context(anyio.create_task_group())))

    return anyio.run(main, backend=backend)


def compare(program: Callable[[World], Coroutine[Any, Any, History]]) -> None:
    expected = in_threads(Threading(), program)
    assert in_threads(Views(), program) == expected, "the views for threads differ"
    for backend in ("asyncio", "trio"):
        assert in_tasks(backend, program) == expected, f"under {backend} it differs"


# -- Semaphores.

# What is to be done often stands here more than once.
a_semaphore_operation: st.SearchStrategy[Operation] = st.sampled_from(
    [
        *[("begin to acquire",)] * 10,
        *[("release", n) for n in (1, 1, 1, 1, 2, 2, 3, 3, 0, -1)],
        *[("acquire", timeout) for timeout in (0, 0.0, -1, -0.5)],
        *[("acquire without blocking",)] * 2,
        ("acquire with contradictory arguments",),
        *[("begin to use",)] * 5,
        *[("end to use",)] * 5,
    ]
)


def waiters(semaphore: Any) -> int:
    """How many wait in line."""
    if isinstance(semaphore, threading.Semaphore):
        return len(semaphore._cond._waiters)  # type: ignore[attr-defined]
    shared = getattr(semaphore, "_shared", semaphore)
    return len(shared._queue.waiters)


def with_a_semaphore(
    kind: str, value: int, program: Program
) -> Callable[[World], Coroutine[Any, Any, History]]:
    async def run(world: World) -> History:
        semaphore = world.semaphores[kind](value)
        history: History = []
        begun: list[Callable[[], tuple[bool, object]]] = []
        # Who is inside of a ``with``, by his number, and what he waits for there.
        inside: dict[int, Any] = {}

        async def rest() -> None:
            await world.rest(lambda: waiters(semaphore) + len(inside))
            history.append([end() for end in begun])

        async def go_outside() -> None:
            inside.pop(min(inside)).set()
            await rest()

        for name, *args in program:
            history.append(name)
            if name == "acquire":
                history.append(await world.call(semaphore.acquire, timeout=args[0]))
            elif name == "acquire without blocking":
                history.append(await world.call(semaphore.acquire, False))
            elif name == "acquire with contradictory arguments":
                history.append(await world.call(semaphore.acquire, False, 1))
            elif name == "begin to use":
                new = (semaphore, inside, len(begun), world.new_gate())
                begun.append(await world.start(partial(world.use, *new)))
            elif name == "end to use":
                if inside:
                    await go_outside()
            elif name == "begin to acquire":
                begun.append(await world.start(semaphore.acquire))
            else:
                history.append(await world.call(semaphore.release, *args))
            await rest()
        # All who wait are let go; then it is counted how many permits there are.
        for _ in begun * 2:
            if inside:
                await go_outside()
            elif not all(end()[0] for end in begun):
                history.append(await world.call(semaphore.release))
                await rest()
        assert all(end()[0] for end in begun), "somebody waits for ever"
        free = 0
        while await world.call(semaphore.acquire, False):
            free += 1
        return [*history, free]

    return run


@pytest.mark.parametrize("kind", ["plain", "bounded"])
@examine
@given(st.sampled_from([0, 0, 1, 2, 3]), st.lists(a_semaphore_operation, min_size=3, max_size=12))
def test_semaphores_have_the_same_history(kind: str, value: int, program: Program) -> None:
    if kind == "bounded":
        # Who waits there can be let go only by those who hold a permit.
        value = max(value, 1)
    compare(with_a_semaphore(kind, value, program))


# -- Barriers.

a_barrier_operation: st.SearchStrategy[Operation] = st.sampled_from(
    [
        *[("begin to wait", None)] * 9,
        *[("begin to wait", timeout) for timeout in (60, 0, -1)],
        *[("reset",)] * 3,
        ("abort",),
    ]
)
# In which rounds the action raises, if there is one.
an_action = st.none() | st.sets(st.integers(0, 3), max_size=2)


def with_a_barrier(
    parties: int, failing: set[int] | None, timeout: float | None, program: Program
) -> Callable[[World], Coroutine[Any, Any, History]]:
    async def run(world: World) -> History:
        history: History = []
        begun: list[Callable[[], tuple[bool, object]]] = []
        # Of those the ones that never wait.
        hasty: list[Callable[[], tuple[bool, object]]] = []
        rounds: list[None] = []

        def action() -> None:
            number = len(rounds)
            rounds.append(None)
            history.append(("action", number))
            if failing is not None and number in failing:
                raise ZeroDivisionError

        def waiting() -> int:
            """How many wait; or a number that can't be, if somebody is about to change that."""
            number: int = barrier.n_waiting
            # The last one to arrive counts as well until it trips the barrier, and who has no time
            # to wait until it breaks it.
            return number if number < parties and all(end()[0] for end in hasty) else -1

        barrier = world.barrier(parties, None if failing is None else action, timeout)
        for name, *args in program:
            history.append(name)
            if name == "begin to wait":
                begun.append(await world.start(lambda: barrier.wait(args[0])))  # noqa: B023
                patience = timeout if args[0] is None else args[0]
                if patience is not None and patience <= 0:
                    hasty.append(begun[-1])
            else:
                history.append(await world.call(getattr(barrier, name)))
            await world.rest(waiting)
            history.append((barrier.parties, barrier.n_waiting, barrier.broken))
            history.append([end() for end in begun])
        await world.call(barrier.abort)
        await world.rest(lambda: 0)
        return [*history, [end() for end in begun], barrier.broken]

    return run


@examine
@given(
    st.sampled_from([2, 3, 3, 1]),
    an_action,
    st.sampled_from([None, None, None, None, 60, 0]),
    st.lists(a_barrier_operation, min_size=3, max_size=12),
)
def test_barriers_have_the_same_history(
    parties: int, failing: set[int] | None, timeout: float | None, program: Program
) -> None:
    compare(with_a_barrier(parties, failing, timeout, program))
