"""An explorer of schedules: the tasks of one event loop, one step at a time, in every order.

What must live here: how tasks are let go on or cancelled, and which orders are tried. What must
not: tests, and what a right outcome is; see `test_task_orders`. What `explorer` is for threads and
bytecodes, this is for tasks and their *steps*: from one await that yields to the next.

How it works
------------
The event loop is real, but what it could run next waits until it is chosen: that is a *decision*.
There are to choose from, in this order,

1. what the loop is ready to run, the oldest first: steps of tasks, and callbacks under asyncio;
2. to cancel one of the *victims* now, between two steps (or in the middle of one, where the
   scenario calls `moment`);
3. to let time pass until the next timer: only `early` times as long as anything else could go on,
   and as a matter of course when nothing can. No real time passes.

A *schedule* is a list of exceptions from the rule that the first choice is taken. ``(12, 2)`` says
that at decision 12 it is choice 2; the first one is choice 0. Decisions are counted from 0, only
where there are two or more to choose from. So the empty schedule is first in, first out, as asyncio
does it; nobody is cancelled, and nobody late if there is another way to go on.

Schedules are tried in the order of the number of their exceptions, since most mistakes take few.
Each is found from one with one exception less, by adding an exception after its last, so that none
is tried twice. If the limit allows it, all of them are, and the report says so. Or else some of the
last kind are drawn, by a seeded generator of random numbers, and random walks follow.

A deadlock is noticed at once: nothing is ready, and there is no timer.

Which orders are legitimate
---------------------------
asyncio runs callbacks first in, first out; trio runs batches of tasks, each in an order of chance.
Here *any* of those that are ready may be next, however long others wait. So more can happen than
under either of them, and what a primitive promises about who gets what has to stand it: that is
decided when it is claimed, and may not depend on who is told first. What it promises about order is
about arrivals, and those are real: who came first is who ran first.

Two things are not left to choice. Under asyncio anyio tells the tasks of a cancelled scope to leave
once in each round of the loop; here only if anything has happened since the last time, or else
there would be no end to it. And `_park._background.discard`, which concerns nobody, runs at once.

There are three backends: "asyncio" with victims cancelled by ``task.cancel()``, "asyncio+scope"
with a cancel scope of anyio around each victim, and "trio", always by a scope.
"""

from __future__ import annotations

import asyncio
import heapq
import math
import random
import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import outcome
import trio
from anyio._core._eventloop import get_async_backend
from trio._core import _run as trio_run

from aiosync import _park

Schedule = list[tuple[int, int]]
Scenario = Callable[[], "Plan"]
Work = Callable[[], Awaitable[object]]
Ends = dict[str, object]

BACKENDS = ("asyncio", "asyncio+scope", "trio")
# So many steps are no schedule any more, but an endless loop.
_ENDLESS = 500


class _Mark:
    def __init__(self, name: str) -> None:
        self._name = name

    def __repr__(self) -> str:
        return self._name


# How a task has ended that has not returned: it was cancelled, or it is blocked for ever.
CANCELLED, BLOCKED = _Mark("CANCELLED"), _Mark("BLOCKED")


def _nothing() -> None:
    """Check nothing."""


@dataclass
class Plan:
    """What a scenario returns: fresh objects, the tasks that use them, and what must come of it.

    The tasks must do the same each time: no clock, no chance, no sets of objects in the order of
    their addresses.
    """

    # By their names.
    tasks: dict[str, Work]
    # Called at the end, with what each task has returned, or CANCELLED or BLOCKED.
    check: Callable[[Ends], object]
    # Those that may be cancelled, once each.
    victims: Sequence[str] = ()
    # So many of the tasks run until they block or end, in turn, before the first decision.
    parked: int = 0
    # How often time may pass although somebody could go on.
    early: int = 1
    # Or else a task that is still blocked at the end is an error.
    may_block: bool = False
    # Called after each step: what is true all the time.
    always: Callable[[], object] = _nothing
    # Run before all tasks, and after `check`; nothing is decided meanwhile.
    begin: Work | None = None
    end: Work | None = None


class Found(AssertionError):
    """A schedule after which something is wrong."""

    def __init__(
        self, scenario: Scenario, backend: str, run: _Run, seed: int | None, why: str
    ) -> None:
        self.schedule = run.schedule
        self.story = run.story
        name = getattr(scenario, "__name__", "scenario")
        again = f'replay({name}, "{backend}", {run.schedule})  # seed: {seed}'
        super().__init__("\n".join([why, *run.story, f"to see it again: {again}"]))


@dataclass
class Report:
    """What has been explored."""

    # How many schedules, by the number of their exceptions; and how many random walks.
    schedules: list[int] = field(default_factory=list)
    walks: int = 0
    # Up to how many exceptions all schedules were tried; -1: not even the empty one.
    complete: int = -1
    # Whether there are no others.
    everything: bool = False
    # The most decisions that a schedule had.
    decisions: int = 0
    seconds: float = 0.0

    def count(self, runs: list[_Run]) -> None:
        self.schedules.append(len(runs))
        self.decisions = max([self.decisions, *(len(run.decisions) for run in runs)])

    def __str__(self) -> str:
        covered = "everything" if self.everything else f"complete up to {self.complete} exceptions"
        return (
            f"{sum(self.schedules)} schedules {self.schedules}, {covered}, and {self.walks} walks; "
            f"at most {self.decisions} decisions; {self.seconds:.2f} s"
        )


def explore(
    scenario: Scenario, backend: str, *, limit: int, walks: int = 0, seed: int = 1
) -> Report:
    """Try schedules of `scenario`, and raise `Found` for the first after which something is wrong.

    :param backend: one of `BACKENDS`
    :param limit: how many at most, not counting random walks
    :param walks: how many random walks, if the limit does not allow to try all
    """
    report = Report()
    began = time.perf_counter()
    chance = random.Random(seed)
    with _stage(backend) as stage:
        level: Iterable[Schedule] = [[]]
        left, total = limit, 1
        while 0 < total <= left:
            runs = [stage.perform(scenario, schedule, seed) for schedule in level]
            report.count(runs)
            left -= total
            total = sum(choices - 1 for run in runs for _, choices in run.further())
            level = _one_more(runs)
        report.complete = len(report.schedules) - 1
        report.everything = not total
        if total:
            drawn = set(chance.sample(range(total), left))
            some = (schedule for number, schedule in enumerate(level) if number in drawn)
            report.count([stage.perform(scenario, schedule, seed) for schedule in some])
            for _ in range(walks):
                stage.perform(scenario, [], seed, chance)
                report.walks += 1
    report.seconds = time.perf_counter() - began
    return report


def _one_more(runs: list[_Run]) -> Iterator[Schedule]:
    """Yield the schedules of `runs` with one exception more, after the last."""
    for run in runs:
        for step, choices in run.further():
            for choice in range(1, choices):
                yield [*run.schedule, (step, choice)]


def replay(scenario: Scenario, backend: str, schedule: Schedule) -> list[str]:
    """Run one schedule again; raise `Found` if something is wrong after it.

    :return: the story: what was chosen, and instead of what; it is part of a `Found` as well
    """
    with _stage(backend) as stage:
        return stage.perform(scenario, schedule, None, tell=True).story


# -- To be called by the tasks of a scenario.


def moment() -> None:
    """Let victims be cancelled now, in the middle of the step of the task that calls."""
    _current[-1].moment()


def was_cancelled(name: str) -> bool:
    """Tell whether this victim was cancelled, even if it does not know yet."""
    return _current[-1].actors[name].cancelled


def has_to_leave(name: str) -> bool:
    """Tell whether its cancellation has got through to it, so that it has to end so."""
    return _current[-1].actors[name].doomed


# -- One schedule.


class _Wrong(Exception):
    """Something is wrong; the message says what."""


class _AbandonedError(Exception):
    """Ends a task that is left at the end of a schedule and that no cancellation can end."""


class _Run:
    """One schedule, and what has come of it."""

    def __init__(self, schedule: Schedule, chance: random.Random | None, tell: bool) -> None:
        self.schedule = schedule
        self._exceptions = dict(schedule)
        # For a random walk, which writes the schedule.
        self._chance = chance
        self._nerves = 0.0 if chance is None else chance.choice([0.1, 0.3, 0.6])
        self.tell = tell
        self.story: list[str] = []
        # How many there were to choose from, at each decision.
        self.decisions: list[int] = []
        # The schedule asks for what is impossible.
        self.misfit: str | None = None

    def further(self) -> Iterable[tuple[int, int]]:
        """Return the decisions after the last exception, and how many choices there were."""
        first = self.schedule[-1][0] + 1 if self.schedule else 0
        return enumerate(self.decisions[first:], first)

    def choose(self, choices: int) -> int:
        step = len(self.decisions)
        self.decisions.append(choices)
        choice = self._exceptions.get(step, 0)
        if self._chance is not None and self._chance.random() < self._nerves:
            choice = self._chance.randrange(1, choices)
            self.schedule.append((step, choice))
        if choice >= choices:
            self.misfit = f"there is no choice {choice} at decision {step}"
            return 0
        return choice


class _Actor:
    """A task of the plan."""

    def __init__(self, name: str, victim: bool, scope: Any) -> None:
        self.name = name
        self.victim = victim
        # That is around it; None if it is cancelled natively.
        self.scope = scope
        self.task: Any = None
        self.begun = False
        self.ended = False
        self.end: object = BLOCKED
        self.error: Exception | None = None
        self.cancelled = False
        self.doomed = False

    async def live(self, work: Work) -> None:
        self.begun = True
        try:
            with nullcontext() if self.scope is None else self.scope:
                self.end = await work()
            if self.end is BLOCKED:
                self.end = CANCELLED
        except Exception as error:
            self.error = error
        except BaseException:
            self.end = CANCELLED
            raise
        finally:
            self.ended = True

    def can_be_cancelled(self) -> bool:
        # Who is cancelled natively before it has begun never does.
        can_begin = self.begun or self.scope is not None
        return self.victim and can_begin and not self.cancelled and not self.ended


# -- Event loops that run only what they are told to.

# What can be run next: a handle of asyncio, a task of trio.
_Step = Any
_Task = Any


class _Loop(ABC):
    """What a stage has to know of an event loop."""

    def __init__(self, backend: str) -> None:
        self.backend = backend

    @abstractmethod
    def open(self) -> None:
        """Prepare for one schedule."""

    @abstractmethod
    def close(self, actors: Iterable[_Actor]) -> None:
        """End one schedule, and all tasks that are left of it."""

    @abstractmethod
    def leave(self) -> None:
        """Do without this event loop from now on."""

    @abstractmethod
    def new_scope(self, victim: bool) -> Any:
        """Return a scope for a task, or None if it is cancelled natively."""

    @abstractmethod
    def spawn(self, name: str, work: Callable[[], Any]) -> _Task: ...

    @abstractmethod
    def ready(self) -> list[_Step]:
        """Return what can be run next, the oldest first."""

    @abstractmethod
    def run(self, step: _Step) -> None: ...

    @abstractmethod
    def has_timer(self) -> bool: ...

    @abstractmethod
    def pass_time(self) -> None:
        """Let time pass until the next timer."""

    @abstractmethod
    def cancel(self, actor: _Actor) -> bool:
        """Cancel a victim; False if nothing has come of it so far, and perhaps never will."""

    @abstractmethod
    def actor(self, step: _Step) -> _Task | None:
        """Return the task that makes a step, if one does."""

    @abstractmethod
    def coroutine(self, task: _Task) -> Any: ...

    @abstractmethod
    def name(self, step: _Step) -> str: ...

    def drain(self, until: Callable[[], object]) -> None:
        """Run all there is, in order, whatever time it takes."""
        for _ in range(_ENDLESS):
            if until():
                return
            ready = self.ready()
            if ready:
                self.run(ready[0])
            elif self.has_timer():
                self.pass_time()
            else:
                return


class _BareLoop(asyncio.BaseEventLoop):
    """The callbacks and timers of asyncio, without what runs them."""

    now = 0.0

    def time(self) -> float:
        return self.now

    def _write_to_self(self) -> None:
        """Wake nobody: nobody sleeps."""


class _AsyncioLoop(_Loop):
    """asyncio, a new loop for each schedule.

    Of its privacy it uses `_ready`, `_scheduled` and `_thread_id` of the loop, `_callback`,
    `_args`, `_when`, `_cancelled`, `_scheduled` and `_run` of its handles, `_fut_waiter` and
    `_must_cancel` of a task; of that of anyio `CancelScope._deliver_cancellation` and `_host_task`.
    """

    def open(self) -> None:
        loop: Any = _BareLoop()
        self._loop = loop
        self._complaints: list[str] = []
        # How much has happened, and had happened when a scope last told its tasks to leave.
        self._happened = 0
        self._told: dict[object, int] = {}
        loop.set_exception_handler(lambda _, context: self._complaints.append(str(context)))
        loop._thread_id = threading.get_ident()
        asyncio._set_running_loop(loop)

    def close(self, actors: Iterable[_Actor]) -> None:
        self._loop.set_exception_handler(lambda *_: None)
        self._complaints.clear()
        try:
            tasks = asyncio.all_tasks(self._loop)
            for task in tasks:
                task.cancel()
            self.drain(lambda: all(task.done() for task in tasks))
            left: Any = asyncio.all_tasks(self._loop)
            for task in left:
                if task._fut_waiter is not None and not task._fut_waiter.done():
                    task._fut_waiter.set_exception(_AbandonedError())
            self.drain(lambda: all(task.done() for task in left))
        finally:
            asyncio._set_running_loop(None)
            self._loop._thread_id = None
            self._loop.close()

    def leave(self) -> None:
        """Do nothing: that of each schedule is closed."""

    def new_scope(self, victim: bool) -> Any:
        if self.backend == "asyncio" or not victim:
            return None
        return get_async_backend("asyncio").create_cancel_scope()

    def spawn(self, name: str, work: Callable[[], Any]) -> _Task:
        return self._loop.create_task(work(), name=name)

    def ready(self) -> list[_Step]:
        loop = self._loop
        while self.has_timer() and loop._scheduled[0]._when <= loop.now:
            loop._ready.append(self._pop_timer())
        found = []
        for handle in list(loop._ready):
            if handle._cancelled:
                loop._ready.remove(handle)
            elif handle._callback == _park._background.discard or (
                self._tells_to_leave(handle) and handle._callback.__self__._host_task is None
            ):
                self.run(handle)  # it concerns nobody, or nobody any more
            elif not (
                self._tells_to_leave(handle)
                and self._told.get(handle._callback.__self__, -1) == self._happened
            ):
                found.append(handle)
        if self._complaints:
            raise _Wrong(f"the event loop complains: {self._complaints}")
        return found

    @staticmethod
    def _tells_to_leave(handle: _Step) -> bool:
        return getattr(handle._callback, "__name__", "") == "_deliver_cancellation"

    def run(self, step: _Step) -> None:
        if self._tells_to_leave(step):
            self._told[step._callback.__self__] = self._happened
        else:
            self._happened += 1
        self._loop._ready.remove(step)
        step._run()

    def has_timer(self) -> bool:
        timers = self._loop._scheduled
        while timers and timers[0]._cancelled:
            self._pop_timer()
        return bool(timers)

    def _pop_timer(self) -> Any:
        timer: Any = heapq.heappop(self._loop._scheduled)
        timer._scheduled = False
        return timer

    def pass_time(self) -> None:
        self._happened += 1
        timer = self._pop_timer()
        self._loop.now = timer._when
        timer._run()

    def cancel(self, actor: _Actor) -> bool:
        self._happened += 1
        task = actor.task
        if actor.scope is None:
            task.cancel()
            return True
        self._told[actor.scope] = self._happened
        # The pool may have cancelled its reset just before, from which this scope is shielded.
        was_cancelled = self._is_cancelled(task)
        actor.scope.cancel()
        return self._is_cancelled(task) and not was_cancelled

    def _is_cancelled(self, task: Any) -> bool:
        waiter = task._fut_waiter
        return bool(task._must_cancel or (waiter is not None and waiter.cancelled()))

    def actor(self, step: _Step) -> _Task | None:
        owner = getattr(step._callback, "__self__", None)
        return owner if isinstance(owner, asyncio.Task) else None

    def coroutine(self, task: _Task) -> Any:
        return task.get_coro()

    def name(self, step: _Step) -> str:
        owner = getattr(step._callback, "__self__", None)
        if isinstance(owner, asyncio.Task):
            return f"{owner.get_name()} goes on"
        if self._tells_to_leave(step):
            host = step._callback.__self__._host_task
            return f"{host.get_name()} is told again to leave"
        tasks: Any = asyncio.all_tasks(self._loop)
        for task in tasks:
            if task._fut_waiter in step._args:
                return f"the bell of {task.get_name()} rings"
        if step._args and isinstance(step._args[0], asyncio.Task):
            return f"the end of {step._args[0].get_name()} is told"
        return f"{getattr(step._callback, '__qualname__', 'something')} is called"


class _Runnable(deque[Any]):
    """The tasks that trio could run; it sees only the one that it is to run."""

    chosen: _Task | None = None

    def __iter__(self) -> Iterator[_Task]:
        return iter(() if self.chosen is None else (self.chosen,))

    def clear(self) -> None:
        if self.chosen is not None:
            self.remove(self.chosen)

    def everybody(self) -> list[_Task]:
        return list(super().__iter__())


class _Clock(trio.abc.Clock):
    now = 0.0

    def start_clock(self) -> None:
        """Do nothing: it goes when it is told to."""

    def current_time(self) -> float:
        return self.now

    def deadline_to_sleep_time(self, deadline: float) -> float:
        return 0.0  # never sleep


class _TrioLoop(_Loop):
    """trio, as our guest. One run serves all schedules, since to begin one takes long.

    Of its privacy it uses `runq`, `deadlines` and `tasks` of the runner, and `_abort_func` of a
    task.
    """

    def __init__(self, backend: str) -> None:
        super().__init__(backend)
        self._begin()

    def _begin(self) -> None:
        self._clock = _Clock()
        self._ticks: deque[Callable[[], object]] = deque()
        self._outcome: list[object] = []
        self._scope = trio.CancelScope()
        trio.lowlevel.start_guest_run(
            self._main,
            run_sync_soon_threadsafe=self._ticks.append,
            done_callback=self._outcome.append,
            host_uses_signal_set_wakeup_fd=True,
            clock=self._clock,
        )
        self._runner: Any = trio_run.GLOBAL_RUN_CONTEXT.runner
        self._runnable = self._runner.runq = _Runnable(self._runner.runq)
        self.drain(lambda: False)
        # Those that are none of a schedule.
        self._own = set(self._runner.tasks)

    async def _main(self) -> None:
        with self._scope:
            await trio.sleep_forever()

    def _tick(self, task: _Task | None) -> None:
        self._runnable.chosen = task
        self._ticks.popleft()()
        self._runnable.chosen = None

    def open(self) -> None:
        if self._outcome:
            self._begin()
        self._clock.now = 0.0

    def close(self, actors: Iterable[_Actor]) -> None:
        for actor in actors:
            actor.scope.cancel()
        self.drain(lambda: self._outcome)
        if len(self._runner.tasks) > len(self._own):
            self.leave()  # there are tasks that nobody else can end, such as those of a pool

    def leave(self) -> None:
        self._scope.cancel()
        self.drain(lambda: self._outcome)
        if not self._outcome:
            for task in self._runner.tasks - self._own:
                trio.lowlevel.reschedule(task, outcome.Error(_AbandonedError()))
            self.drain(lambda: self._outcome)
        assert self._outcome, "the trio run does not end"

    def new_scope(self, victim: bool) -> Any:
        return trio.CancelScope()

    def spawn(self, name: str, work: Callable[[], Any]) -> _Task:
        return trio.lowlevel.spawn_system_task(work, name=name)

    def ready(self) -> list[_Step]:
        if not self._runnable:
            self._tick(None)  # a call from elsewhere comes by a socket
        return self._runnable.everybody()

    def run(self, step: _Step) -> None:
        self._tick(step)
        if self._outcome and not self._scope.cancel_called:
            raise _Wrong(f"the trio run has ended: {self._outcome}")

    def has_timer(self) -> bool:
        return bool(self._runner.deadlines.next_deadline() < math.inf)

    def pass_time(self) -> None:
        self._clock.now = self._runner.deadlines.next_deadline()
        self._runner.deadlines.expire(self._clock.now)

    def cancel(self, actor: _Actor) -> bool:
        waited = actor.task._abort_func is not None
        actor.scope.cancel()
        return waited and actor.task._abort_func is None

    def actor(self, step: _Step) -> _Task | None:
        return step

    def coroutine(self, task: _Task) -> Any:
        return task.coro

    def name(self, step: _Step) -> str:
        return f"{step.name} goes on"


# -- What is chosen.

# What is done, and to what.
_Choice = tuple[Callable[[Any], None], Any]


class _Stage:
    """Where schedules are performed, one after the other."""

    def __init__(self, loop: _Loop) -> None:
        self._loop = loop
        self.actors: dict[str, _Actor] = {}
        self._run = _Run([], None, False)
        self._plan = Plan({}, lambda _: None)
        self._deciding = False
        self._early = 0
        self._steps = 0
        # The task whose step is being made.
        self._acting: _Task | None = None

    def perform(
        self,
        scenario: Scenario,
        schedule: Schedule,
        seed: int | None,
        chance: random.Random | None = None,
        *,
        tell: bool = False,
    ) -> _Run:
        run = self._run = _Run(schedule, chance, tell)
        why: str | None = None
        self._loop.open()
        try:
            self._play(scenario())
        except _Wrong as wrong:
            why = str(wrong)
        finally:
            self._deciding = False
            self._loop.close(self.actors.values())
        if schedule and schedule[-1][0] >= len(run.decisions):
            run.misfit = run.misfit or f"there is no decision {schedule[-1][0]}"
        if run.misfit is not None:
            raise ValueError(
                f"the schedule {schedule} does not fit, {run.misfit}: it is one of another scenario"
                f" or backend, or the scenario does not do the same each time"
            )
        if why is None:
            return run
        if not tell:
            # Once more, with the story.
            self.perform(scenario, run.schedule, seed, tell=True)
            why = f"{why}\n(but not when it was done again, so the scenario is to blame)"
        raise Found(scenario, self._loop.backend, run, seed, why)

    def _play(self, plan: Plan) -> None:
        self._plan = plan
        self._early = plan.early
        self._steps = 0
        self.actors = {}
        if plan.begin is not None:
            self._see_through("begin", plan.begin)
        for number, (name, work) in enumerate(plan.tasks.items()):
            self._spawn(name, work)
            if number < plan.parked:
                self._settle()
        cast = list(self.actors.values())
        self._deciding = True
        while not all(actor.ended for actor in cast) and self._decide():
            pass
        self._deciding = False
        self._settle()
        for actor in cast:
            self._judge(actor)
        _right(partial(plan.check, {actor.name: actor.end for actor in cast}))
        if plan.end is not None:
            self._see_through("end", plan.end)

    def _spawn(self, name: str, work: Work) -> _Actor:
        victim = name in self._plan.victims
        actor = self.actors[name] = _Actor(name, victim, self._loop.new_scope(victim))
        actor.task = self._loop.spawn(name, partial(actor.live, work))
        return actor

    def _see_through(self, name: str, work: Work) -> None:
        """Run something from its begin to its end, and then all that is ready."""
        actor = self._spawn(name, work)
        self._loop.drain(lambda: actor.ended)
        if not actor.ended:
            raise _Wrong(f"the {name} does not end")
        self._judge(actor)
        del self.actors[name]
        self._settle()

    def _settle(self) -> None:
        """Run all that is ready, in order."""
        while ready := self._loop.ready():
            self._do(self._step, ready[0])

    def _judge(self, actor: _Actor) -> None:
        if actor.error is not None:
            raise _Wrong(f"{actor.name} raised {actor.error!r}")
        if actor.doomed and actor.end is not CANCELLED:
            raise _Wrong(f"the cancellation of {actor.name} was swallowed, it ended: {actor.end}")
        if actor.end is CANCELLED and not actor.cancelled:
            raise _Wrong(f"{actor.name} was cancelled by nobody")
        if actor.end is BLOCKED and not self._plan.may_block:
            raise _Wrong(f"deadlock: blocked for ever is {actor.name}")

    def _victims(self) -> list[_Actor]:
        return [actor for actor in self.actors.values() if actor.can_be_cancelled()]

    def _decide(self) -> bool:
        """Do one thing; False if nothing can be done, or that was chosen."""
        ready = self._loop.ready()
        late = (self._early or not ready) and self._loop.has_timer()
        time: list[_Choice] = [(self._pass_time, None)] if late else []
        choices: list[_Choice] = [(self._step, step) for step in ready]
        choices = choices or time or [(self._stop, None)]
        choices += [(self._cancel, victim) for victim in self._victims()]
        if ready:
            choices += time
        chosen, number = 0, ""
        if len(choices) > 1:
            number = f"{len(self._run.decisions)}:"
            chosen = self._run.choose(len(choices))
        action, subject = choices[chosen]
        instead = f" (instead of: {self._name(*choices[0])})" if chosen and self._run.tell else ""
        self._do(action, subject, number, instead)
        _right(self._plan.always)
        return action != self._stop

    def _do(
        self, action: Callable[[Any], None], subject: Any, number: str = "", instead: str = ""
    ) -> None:
        self._steps += 1
        if self._steps > _ENDLESS:
            self._run.story[50:] = ["     and so on"] if self._run.tell else []
            raise _Wrong(f"no end after {_ENDLESS} steps")
        line = len(self._run.story)
        if self._run.tell:
            self._run.story.append(f"{number:>4} {self._name(action, subject)}{instead}")
        action(subject)
        if self._run.tell and action == self._step:
            self._run.story[line] += self._where(self._loop.actor(subject))

    # What there is to choose from.

    def _step(self, step: _Step) -> None:
        self._acting = self._loop.actor(step)
        try:
            self._loop.run(step)
        finally:
            self._acting = None

    def _cancel(self, actor: _Actor) -> None:
        actor.cancelled = True
        actor.doomed = self._loop.cancel(actor)

    def _pass_time(self, _: None) -> None:
        if self._loop.ready():
            self._early -= 1
        self._loop.pass_time()

    def _stop(self, _: None) -> None:
        """Leave it at that."""

    def moment(self) -> None:
        victims = [actor for actor in self._victims() if actor.task is not self._acting]
        if self._deciding and victims:
            step = len(self._run.decisions)
            chosen = self._run.choose(len(victims) + 1)
            if chosen:
                victim = victims[chosen - 1]
                if self._run.tell:
                    self._run.story.append(f"{step:>3}: and meanwhile {victim.name} is cancelled")
                self._cancel(victim)

    # The story.

    def _name(self, action: Callable[[Any], None], subject: Any) -> str:
        if action == self._step:
            return self._loop.name(subject)
        if action == self._cancel:
            return f"{subject.name} is cancelled"
        return "time passes" if action == self._pass_time else "nothing happens any more"

    def _where(self, task: _Task | None) -> str:
        """Tell where a task of the plan has got to."""
        for actor in self.actors.values():
            if actor.task is task and task is not None:
                break
        else:
            return ""
        if actor.ended:
            return f", and ends: {actor.end if actor.error is None else repr(actor.error)}"
        coroutine, frame = self._loop.coroutine(task), None
        while coroutine is not None:
            frame = getattr(coroutine, "cr_frame", None) or frame
            coroutine = getattr(coroutine, "cr_await", None)
        return f", to {Path(frame.f_code.co_filename).name}:{frame.f_lineno}" if frame else ""


def _right(check: Callable[[], object]) -> None:
    try:
        check()
    except Exception as error:
        raise _Wrong(f"{type(error).__name__}: {error}") from error


# The stage in use, if there is one.
_current: list[_Stage] = []


@contextmanager
def _stage(backend: str) -> Iterator[_Stage]:
    if backend not in BACKENDS:
        raise ValueError(f"the backend must be one of {BACKENDS}, not {backend!r}")
    loop = _TrioLoop(backend) if backend == "trio" else _AsyncioLoop(backend)
    _current.append(_Stage(loop))
    try:
        yield _current[-1]
    finally:
        _current.pop()
        loop.leave()
