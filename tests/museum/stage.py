"""Where the scenarios of the museum are played: event loops, and actors who can be cancelled.

What must live here: all that differs between the event loops, so that a scenario is written once.
Nothing here knows what is played.

Time jumps: where nobody has anything to do, it is the time of the next timer at once. So who waits
in vain is found out without waiting. Only uvloop can't do that.
"""

from __future__ import annotations

import asyncio
import enum
import gc
import importlib.util
import math
import sys
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable
from typing import Any

import anyio
import trio
import trio.testing
from support.virtual_time import JumpingSelector, VirtualLoop

# In virtual seconds: who waits for so long, waits in vain.
FOR_EVER = 1e5

Play = Callable[[], Awaitable[Any]]


class Symptom(AssertionError):
    """A scenario has found the bug that it looks for."""


def expect(condition: object, symptom: str) -> None:
    if not condition:
        raise Symptom(symptom)


class Fate(enum.Enum):
    """What became of an actor that has neither returned nor raised."""

    CANCELLED = "cancelled"
    HANGS = "hangs"


class Actor(ABC):
    """A task that can be cancelled."""

    @property
    @abstractmethod
    def done(self) -> bool: ...

    @abstractmethod
    def cancel(self) -> None:
        """Cancel it, and return before it has run."""

    @abstractmethod
    async def outcome(self) -> Any:
        """Return what it has returned or raised, or its `Fate`."""


class Stage(ABC):
    """What scenarios are given; see `perform`."""

    for_ever = FOR_EVER
    # Whether actors are cancelled by ``task.cancel()``.
    native = False

    def __init__(self) -> None:
        self.actors: list[Actor] = []

    @abstractmethod
    def spawn(self, play: Play) -> Actor: ...

    @abstractmethod
    async def step(self) -> None:
        """Let everybody run who can, once."""

    @abstractmethod
    async def settle(self) -> None:
        """Let everybody run until nobody can any more."""

    def begin(self, play: Play) -> Actor:
        """Start an actor, who may not have run yet."""
        actor = self.spawn(play)
        self.actors.append(actor)
        return actor

    async def start(self, play: Play) -> Actor:
        """Start an actor, and let it come as far as it can."""
        actor = self.begin(play)
        await self.settle()
        return actor

    async def try_it(self, awaitable: Awaitable[Any]) -> Any:
        """Do it, as the main task, without a step in between; `Fate.HANGS` if it takes for ever."""
        with anyio.move_on_after(self.for_ever):
            return await awaitable
        return Fate.HANGS

    async def clear(self) -> None:
        for actor in self.actors:
            actor.cancel()
        await self.settle()


class _Task(Actor):
    def __init__(self, task: asyncio.Task[Any], for_ever: float) -> None:
        self.task = task
        self.for_ever = for_ever

    @property
    def done(self) -> bool:
        return self.task.done()

    def cancel(self) -> None:
        self.task.cancel()

    async def outcome(self) -> Any:
        await asyncio.wait({self.task}, timeout=self.for_ever)
        if not self.task.done():
            return Fate.HANGS
        if self.task.cancelled():
            return Fate.CANCELLED
        return self.task.exception() or self.task.result()


class _Scope(Actor):
    def __init__(self, for_ever: float) -> None:
        self.scope = anyio.CancelScope()
        self.end = anyio.Event()
        self.result: Any = Fate.HANGS
        self.for_ever = for_ever

    async def run(self, play: Play) -> None:
        try:
            with self.scope:
                try:
                    self.result = await play()
                except Exception as error:
                    self.result = error
            if self.scope.cancelled_caught:
                self.result = Fate.CANCELLED
        finally:
            self.end.set()

    @property
    def done(self) -> bool:
        return self.end.is_set()

    def cancel(self) -> None:
        self.scope.cancel()

    async def outcome(self) -> Any:
        with anyio.move_on_after(self.for_ever):
            await self.end.wait()
        return self.result


class AsyncioStage(Stage):
    """Actors are cancelled natively."""

    native = True

    def spawn(self, play: Play) -> Actor:
        async def run() -> Any:
            return await play()

        return _Task(asyncio.get_running_loop().create_task(run()), self.for_ever)

    async def step(self) -> None:
        await asyncio.sleep(0)

    async def settle(self) -> None:
        for _ in range(50):
            await asyncio.sleep(0)


class ScopesStage(AsyncioStage):
    """Actors are cancelled by cancel scopes of anyio."""

    native = False

    def spawn(self, play: Play) -> Actor:
        actor = _Scope(self.for_ever)
        self.tasks.start_soon(actor.run, play)
        return actor

    def __init__(self, tasks: anyio.abc.TaskGroup) -> None:
        super().__init__()
        self.tasks = tasks


class TrioStage(ScopesStage):
    async def step(self) -> None:
        await trio.lowlevel.checkpoint()

    async def settle(self) -> None:
        await trio.testing.wait_all_tasks_blocked()


class _UvloopStage(AsyncioStage):
    # In real time: too short only for a machine that stands still for so long.
    for_ever = 10.0


class _Selector(JumpingSelector):
    # How often in a row somebody had something to do.
    busy = 0

    def select(self, timeout: float | None = None) -> Any:
        if timeout is None:
            raise Symptom("everybody waits for ever")
        self.busy = 0 if timeout > 0 else self.busy + 1
        if self.busy > 100_000:
            raise Symptom("somebody is busy for ever")
        return super().select(timeout)


Scenario = Callable[[Stage], Awaitable[None]]


async def _natively(stage: Stage, scenario: Scenario) -> None:
    try:
        await scenario(stage)
    finally:
        await stage.clear()


async def _in_scopes(kind: type[ScopesStage], scenario: Scenario) -> None:
    # What the scenario raises must not be wrapped into a group.
    failure: list[BaseException] = []
    async with anyio.create_task_group() as tasks:
        stage = kind(tasks)
        try:
            await scenario(stage)
        except Exception as error:
            failure.append(error)
        finally:
            tasks.cancel_scope.cancel()
    if failure:
        raise failure.pop()


def _run(loop: asyncio.AbstractEventLoop, main: Awaitable[None]) -> None:
    try:
        loop.run_until_complete(main)
    finally:
        # What the pools of others leave behind.
        left = asyncio.all_tasks(loop)
        for task in left:
            task.cancel()
        try:
            if left:
                loop.run_until_complete(asyncio.wait(left, timeout=FOR_EVER))
            loop.run_until_complete(loop.shutdown_asyncgens())
        finally:
            loop.close()


def _on_asyncio(scenario: Scenario) -> None:
    _run(VirtualLoop(_Selector()), _natively(AsyncioStage(), scenario))


def _on_eager(scenario: Scenario) -> None:
    if sys.version_info >= (3, 12):
        loop = VirtualLoop(_Selector())
        loop.set_task_factory(asyncio.eager_task_factory)
        _run(loop, _natively(AsyncioStage(), scenario))


def _on_scopes(scenario: Scenario) -> None:
    _run(VirtualLoop(_Selector()), _in_scopes(ScopesStage, scenario))


def _on_uvloop(scenario: Scenario) -> None:
    import uvloop

    _run(uvloop.new_event_loop(), _natively(_UvloopStage(), scenario))


def _on_trio(scenario: Scenario) -> None:
    clock: Any = trio.testing.MockClock(autojump_threshold=0)
    jump = clock._autojump

    def autojump() -> None:
        if trio.lowlevel.current_statistics().seconds_to_next_deadline == math.inf:
            raise Symptom("everybody waits for ever")
        jump()

    clock._autojump = autojump  # it can't be subclassed
    try:
        trio.run(_in_scopes, TrioStage, scenario, clock=clock)
        return
    except trio.TrioInternalError as error:
        if not isinstance(error.__cause__, Symptom):
            raise
    gc.collect()  # what is left of the run complains, and not in another test
    raise Symptom("everybody waits for ever")


LOOPS: dict[str, Callable[[Scenario], None]] = {
    "asyncio": _on_asyncio,
    "asyncio-scopes": _on_scopes,
    "trio": _on_trio,
}
if importlib.util.find_spec("uvloop") is not None:
    LOOPS["uvloop"] = _on_uvloop
if sys.version_info >= (3, 12):
    LOOPS["eager"] = _on_eager


def perform(loop: str, scenario: Scenario) -> None:
    """Play `scenario` on the event loop of that name; raises what it raises."""
    LOOPS[loop](scenario)
