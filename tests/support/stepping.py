"""Event loops driven by hand: a step of a task at a time, and in virtual time.

What must live here: how to hold an event loop still, from outside, and how to let it run until
every task is blocked. What must not: anything of aiosync.

A loop runs in a thread of its own, but only when it is told to, so nothing depends on how fast the
machine is. It stands still in one of two places:

- *at rest*: every task is blocked. Nothing happens before somebody calls or time passes;
- *in a step* of its *driver*, a task that does what it is told. What is called now, and whatever
  else is called before the loop is let go, happens within that one step: who is woken or cancelled
  meanwhile has not run yet. Other threads may call as well, as the test's own thread does.
"""

from __future__ import annotations

import asyncio
import math
import selectors
import threading
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable
from functools import partial
from queue import Empty, SimpleQueue
from typing import Any, NoReturn

import anyio
import trio
import trio.testing

from support.virtual_time import VirtualLoop

# How long something may take that happens at once unless it never happens.
PATIENCE = 20.0

# How often a loop may go round on its way to rest; no test needs a hundredth of it.
ROUNDS = 20_000

# What a job ended with, if it was cancelled; or else the type of the exception, or the result.
CANCELLED = "cancelled"


class Job:
    """A task, and what became of it."""

    def __init__(self, work: Callable[[], Awaitable[object]], cancelled: bool) -> None:
        self._work = work
        self._cancelled = cancelled
        self.done = False
        self.outcome: object = None
        # To be called in a step. The latter only under asyncio.
        self.cancel: Callable[[], object]
        self.cancel_natively: Callable[[], object]

    async def run(self) -> None:
        with anyio.CancelScope() as scope:
            self.cancel = scope.cancel
            if self._cancelled:
                scope.cancel()
            try:
                self.outcome = await self._work()
            except Exception as error:
                self.outcome = type(error)
            except BaseException:
                self.outcome = CANCELLED
                raise
            finally:
                self.done = True


class Stepper(ABC):
    """One event loop. To be used by one thread, which is not that of the loop."""

    name: str

    def __init__(self) -> None:
        self._commands: SimpleQueue[Callable[[], object] | None] = SimpleQueue()
        self._reports: SimpleQueue[tuple[str, Any]] = SimpleQueue()
        self._rounds = 0
        self._closing = self._stuck = False
        self.in_step = False
        self._thread = threading.Thread(target=self._live, daemon=True)
        self._thread.start()
        self._expect("at rest")

    # -- For the test.

    def enter(self) -> None:
        """Go on to the next step of the driver, unless we are in one."""
        if not self.in_step:
            self._tell(self._wake_driver)
            self._commands.put(None)
            self._expect("in step")
            self.in_step = True

    def call(self, function: Callable[[], object]) -> Any:
        """Call `function` in a step of the driver, and return what it returns, or raise that."""
        self.enter()
        return self._tell(function)

    def start(self, work: Callable[[], Awaitable[object]], *, cancelled: bool = False) -> Job:
        """Let a new task run ``await work()``. It begins when the step is over.

        :param cancelled: whether it is cancelled from the outset, by the scope around it
        """
        job = Job(work, cancelled)
        self.call(partial(self._start, job))
        return job

    def jump(self, seconds: float) -> None:
        """Let time pass within the step, as if it took so long."""
        self.call(partial(self._jump, seconds))

    def rest(self) -> None:
        """Let everybody run until all are blocked."""
        if self.in_step:
            self._commands.put(None)
            self._expect("at rest")
            self.in_step = False

    def close(self) -> bool:
        """End all tasks, and the loop; time flies meanwhile. To be called once.

        :return: whether they have ended; if not, some wait for what never comes
        """
        self._closing = True
        if self._stuck:
            return False
        if not self.in_step:
            self._commands.put(self._wake_driver)
        self._commands.put(None)
        while (report := self._next_report())[0] not in {"dead", "stuck"}:
            pass
        return report == ("dead", None)

    @abstractmethod
    def time(self) -> float:
        """Return what the clock of the loop shows."""

    def _tell(self, command: Callable[[], object]) -> Any:
        self._commands.put(command)
        return self._expect("returned")

    def _expect(self, kind: str) -> Any:
        found, what = self._next_report()
        if found == "raised":
            raise what
        self._stuck = found != kind
        assert not self._stuck, f"the event loop is not {kind}, but {found}: {what!r}"
        return what

    def _next_report(self) -> tuple[str, Any]:
        try:
            return self._reports.get(timeout=PATIENCE)
        except Empty:
            return "stuck", "it does not answer"

    # -- For the thread of the loop.

    def _live(self) -> None:
        try:
            self._run()
        except BaseException as error:
            self._reports.put(("dead", error))
        else:
            self._reports.put(("dead", None))

    async def _drive(self) -> None:
        while True:
            await self._doze()
            if not self._closing:
                self._hold("in step")
            if self._closing:
                return

    def _hold(self, place: str) -> None:
        """Stand still, and do what we are told, until that is to go on."""
        self._rounds = 0
        self._reports.put((place, None))
        while (command := self._commands.get()) is not None:
            try:
                self._reports.put(("returned", command()))
            except BaseException as error:
                self._reports.put(("raised", error))

    def _goes_round(self) -> None:
        self._rounds += 1
        if self._rounds > ROUNDS:
            self._give_up("it goes round for ever")

    def _give_up(self, why: str) -> NoReturn:
        """Never go on; there is no other way to stop a loop that works everywhere."""
        self._reports.put(("stuck", why))
        while True:
            self._commands.get()

    @abstractmethod
    def _run(self) -> None:
        """Run the loop, with `_drive` in it, and hold it whenever it is at rest."""

    @abstractmethod
    def _wake_driver(self) -> None: ...

    @abstractmethod
    async def _doze(self) -> None:
        """Sleep until `_wake_driver`."""

    @abstractmethod
    def _start(self, job: Job) -> None: ...

    @abstractmethod
    def _jump(self, seconds: float) -> None: ...


class _Selector(selectors.DefaultSelector):
    """Instead of waiting it tells that the loop would."""

    def __init__(self, goes_round: Callable[[], None], at_rest: Callable[[float | None], None]):
        super().__init__()
        self._goes_round = goes_round
        self._at_rest = at_rest

    def select(self, timeout: float | None = None) -> Any:
        self._goes_round()
        found = super().select(0)
        if not found and timeout != 0:
            self._at_rest(timeout)
            found = super().select(0)
        return found


class AsyncioStepper(Stepper):
    name = "asyncio"

    def time(self) -> float:
        return self._loop.now

    def _run(self) -> None:
        loop = self._loop = VirtualLoop(_Selector(self._goes_round, self._at_rest))
        asyncio.set_event_loop(None)
        self._tasks: set[asyncio.Task[None]] = set()
        try:
            loop.run_until_complete(self._drive())
            others = asyncio.all_tasks(loop)
            for task in others:
                task.cancel()
            loop.run_until_complete(asyncio.wait(others) if others else asyncio.sleep(0))
        finally:
            loop.close()

    def _at_rest(self, timeout: float | None) -> None:
        if not self._closing:
            self._hold("at rest")
        elif timeout is None:
            self._give_up("a task that was cancelled does not end")
        else:
            self._loop.now += timeout

    def _wake_driver(self) -> None:
        self._bell.set_result(None)

    async def _doze(self) -> None:
        self._bell = self._loop.create_future()
        await self._bell

    def _start(self, job: Job) -> None:
        task = self._loop.create_task(job.run())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        job.cancel_natively = task.cancel

    def _jump(self, seconds: float) -> None:
        self._loop.now += seconds


class TrioStepper(Stepper, trio.abc.Instrument):
    name = "trio"

    def time(self) -> float:
        return self._clock.current_time()

    def _run(self) -> None:
        self._clock = trio.testing.MockClock()
        self._listener: object = None
        self._heard = False
        trio.run(self._main, clock=self._clock, instruments=[self])

    async def _main(self) -> None:
        self._token = trio.lowlevel.current_trio_token()
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            await self._drive()
            nursery.cancel_scope.cancel()

    def before_task_step(self, task: object) -> None:
        self._goes_round()
        if task is not self._listener:
            self._heard = False

    def before_io_wait(self, timeout: float) -> None:
        if timeout == 0 or not hasattr(self, "_token"):
            return
        if not self._heard:
            # Perhaps somebody has called from afar. All such calls are made in their order, by a
            # task of trio's; if none but that runs before ours is, and after it, there is no other.
            self._token.run_sync_soon(self._hear)
            return
        self._heard = False
        if not self._closing:
            self._hold("at rest")
            return
        seconds = trio.lowlevel.current_statistics().seconds_to_next_deadline
        if seconds == math.inf:
            self._give_up("a task that was cancelled does not end")
        self._clock.jump(seconds)
        self._token.run_sync_soon(self._hear)

    def _hear(self) -> None:
        self._listener = trio.lowlevel.current_task()
        self._heard = True

    def _wake_driver(self) -> None:
        self._token.run_sync_soon(self._bell.set)

    async def _doze(self) -> None:
        self._bell = trio.Event()
        await self._bell.wait()

    def _start(self, job: Job) -> None:
        self._nursery.start_soon(job.run)

    def _jump(self, seconds: float) -> None:
        self._clock.jump(seconds)


STEPPERS: dict[str, type[Stepper]] = {"asyncio": AsyncioStepper, "trio": TrioStepper}
