"""Any sequence of operations does what a plain model does, in which one thing happens at a time.

What must live here: for each primitive a model, a few dozen lines without a task or a thread, and a
machine of `hypothesis`, which makes up sequences of operations, does the same to the model and to
the real object, and compares all that can be observed after each. The event loop stands still
meanwhile, in the middle of a step of a task (see `stepping`), so several operations can happen
before anybody runs whom the first of them has woken. Time is virtual.

A failure ends with what leads to it, as short as possible: the arguments of `create`, and the calls
that were drawn. To see it again, give both to `replay`. ``AIOSYNC_EXPLORE=long`` tries many more,
for minutes, from a seed that it prints.
"""

from __future__ import annotations

import logging
import math
import random
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Generic, TypeVar
from weakref import WeakValueDictionary

import anyio
import pytest
from anyio import WouldBlock
from hypothesis import HealthCheck, Phase, reject, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    rule,
    run_state_machine_as_test,
)
from support.helpers import LONG
from support.stepping import CANCELLED, STEPPERS, Job

from aiosync import (
    Barrier,
    BoundedSemaphore,
    BrokenBarrierError,
    ConnectionPool,
    PoolClosed,
    PoolTimeout,
    Semaphore,
    TooManyRequests,
    as_threading,
)
from aiosync._pool import _connecting
from aiosync._pool._entry import State

SEED = random.SystemRandom().getrandbits(32) if LONG else 20_240_229
EXAMPLES, STEPS = (1_500, 80) if LONG else (60, 50)

T = TypeVar("T")

# To make a failure short takes minutes.
pytestmark = [pytest.mark.stress, pytest.mark.timeout(3600 if LONG else 600)]

both_loops = pytest.mark.parametrize("loop", list(STEPPERS))

# A method of a machine, and its arguments.
Call = tuple[Any, ...]

# Who makes a plain call: a task, or a thread that runs no event loop.
TASK, THREAD = PLACES = ("task", "thread")


def run(new_machine: Callable[[], RuleBasedStateMachine], examples: int = EXAMPLES) -> None:
    print(f"seed: {SEED}")
    new: Any = seed(SEED)(lambda: new_machine())
    run_state_machine_as_test(
        new,
        settings=settings(
            max_examples=examples,
            stateful_step_count=STEPS,
            deadline=None,
            database=None,
            print_blob=True,
            report_multiple_bugs=False,
            phases=[Phase.generate, Phase.shrink],
            suppress_health_check=list(HealthCheck),
        ),
    )


def replay(machine: Any, calls: list[Call], **created: Any) -> None:
    """Make `calls`, one after the other, on a machine that was just made."""
    try:
        machine.create(**created)
        for call in calls:
            machine.make(call)
    finally:
        machine.teardown()


def answer(call: Callable[[], object]) -> object:
    """Return what `call` returns, or the type of what it raises."""
    try:
        return call()
    except Exception as error:
        return type(error)


def at_once(coroutine: Coroutine[Any, Any, object]) -> object:
    """Run what never has to wait."""
    try:
        coroutine.send(None)
    except StopIteration as stop:
        return stop.value
    coroutine.close()
    raise AssertionError("it waits")


def begin_only(coroutine: Coroutine[Any, Any, object]) -> None:
    """Run what does its work at once, but for the checkpoint that follows."""
    coroutine.send(None)
    coroutine.close()


# -- What the models have in common.


@dataclass(eq=False)
class Waiter:
    """A task that waits; what it will find when it runs again."""

    number: int
    deadline: float = math.inf
    # How its bell was rung since it last ran: "direct" by a task of its own loop, or "afar".
    bell: str = ""
    # It will raise a cancellation: as soon as it runs, or at its next checkpoint.
    cancelled: bool = False
    doomed: bool = False

    def ring(self, direct: bool) -> None:
        if self.bell != "direct":
            self.bell = "direct" if direct else "afar"

    def cancel(self, natively: bool) -> None:
        # A scope takes no notice of who is certain to run already: it is too late to disturb it
        # there. Native cancellation, and any that comes before the bell was heard, does.
        if natively or self.bell != "direct":
            self.cancelled = True
        self.doomed = True


S = TypeVar("S", bound=Waiter)


class Model(Generic[S]):
    def __init__(self) -> None:
        self.now = 0.0
        # All tasks that have not ended, in the order in which they began.
        self.asleep: dict[int, S] = {}
        self.outcomes: dict[int, object] = {}

    def end(self, sleeper: S, outcome: object) -> None:
        del self.asleep[sleeper.number]
        self.outcomes[sleeper.number] = outcome


M = TypeVar("M", bound=Model[Any])


class Machine(RuleBasedStateMachine, Generic[M]):
    """A model, and tasks that do the same for real."""

    model: M

    def __init__(self, loop: str) -> None:
        super().__init__()
        self.stepper = STEPPERS[loop]()
        self.jobs: dict[int, Job] = {}
        # Whether time has passed in this step, so that some may be out of time and not know it yet.
        self.jumped = False
        # Nothing has gone wrong.
        self.sound = True

    @initialize(order=st.random_module())
    def let_trio_run_its_tasks_in_some_order(self, order: object) -> None:
        """Trio shuffles them, by chance that depends on a seed."""

    def teardown(self) -> None:
        ended = self.stepper.close()
        assert ended or not self.sound, "some task waits for what never comes"

    def start(self, work: Callable[[], Awaitable[object]], cancelled: bool = False) -> None:
        number = len(self.jobs)
        self.jobs[number] = self.stepper.start(work, cancelled=cancelled)

    def run_model(self) -> None:
        raise NotImplementedError

    def plain(self, where: str, call: Callable[[], object]) -> object:
        """Make a call in the present step, or at the same moment in another thread."""
        self.stepper.enter()
        return self.stepper.call(lambda: answer(call)) if where == TASK else answer(call)

    def agree(self, found: object, expected: object) -> None:
        assert found == expected, f"{found!r}, but the model says {expected!r}"

    def pick_to_cancel(self, number: int) -> S | None:
        """Return a task that may be cancelled."""
        candidates = [one for one in self.model.asleep.values() if not one.cancelled]
        return candidates[number % len(candidates)] if candidates else None

    @rule(data=st.data())
    def go_on(self, data: st.DataObject) -> None:
        calls = self.possible()
        if self.stepper.in_step:
            calls = [("rest",)] * (1 + len(calls) // 5) + calls
        self.make(data.draw(st.sampled_from(calls)))

    def make(self, call: Call) -> None:
        name, *arguments = call
        self.sound = False
        getattr(self, name)(*arguments)
        self.all_agrees()
        self.sound = True

    def possible(self) -> list[Call]:
        """Return what may be called next; what is to be called often more than once."""
        raise NotImplementedError

    def rest(self) -> None:
        """Let everybody run, here and in the model."""
        self.stepper.rest()
        self.run_model()
        self.jumped = False

    def cancels(self) -> list[Call]:
        if self.jumped:
            return []  # what it leaves to the next, that may be out of time or not
        ways = [True, False] if self.stepper.name == "asyncio" else [False]
        asleep = [one for one in self.model.asleep.values() if self.may_be_cancelled(one)]
        # Rather those that were woken, but have not run since.
        return [
            ("cancel", one.number, way)
            for one in asleep
            for way in ways
            for _ in range(6 if one.bell else 2)
        ]

    def may_be_cancelled(self, sleeper: Any) -> bool:
        return not sleeper.doomed

    def cancel(self, number: int, natively: bool) -> None:
        job = self.jobs[number]
        self.stepper.call(job.cancel_natively if natively else job.cancel)
        self.model.asleep[number].cancel(natively)

    def jumps(self) -> list[Call]:
        if any(sleeper.cancelled for sleeper in self.model.asleep.values()):
            return []  # see `cancels`
        sleepers = [one for one in self.model.asleep.values() if one.deadline > self.model.now]
        waits = {one.deadline - self.model.now for one in sleepers} - {math.inf}
        return [("let_time_pass", 1), *(("let_time_pass", wait) for wait in sorted(waits))] * 3

    def let_time_pass(self, seconds: float) -> None:
        self.stepper.jump(seconds)
        self.jumped = True
        self.model.now = self.stepper.time()

    def state_agrees(self) -> None:
        raise NotImplementedError

    def all_agrees(self) -> None:
        found = {number: job.outcome for number, job in self.jobs.items() if job.done}
        self.agree(found, self.model.outcomes)
        self.state_agrees()


# -- Semaphores.


@dataclass(eq=False)
class Acquirer(Waiter):
    granted: bool = False


class SemaphoreModel(Model[Acquirer]):
    def __init__(self, value: int, bounded: bool, fast: bool) -> None:
        super().__init__()
        self.free, self.bounded, self.fast = value, bounded, fast
        self.held = 0
        self.line: list[Acquirer] = []

    def acquire(self, number: int, timeout: float, cancelled: bool) -> None:
        got = self.free > 0
        if got or timeout <= 0:
            checkpoint = not self.fast
        else:
            checkpoint = True
            if not cancelled:
                sleeper = self.asleep[number] = Acquirer(number, self.now + timeout)
                self.line.append(sleeper)
                return
        self.outcomes[number] = CANCELLED if cancelled and checkpoint else got and self.take()

    def take(self) -> bool:
        if self.line or not self.free:
            return False
        self.free -= 1
        self.held += 1
        return True

    def release(self, n: int, direct: bool) -> object:
        if n < 1 or (self.bounded and n > self.held):
            return ValueError
        self.held -= n
        self.hand_over(n, direct)
        return None

    def hand_over(self, n: int, direct: bool) -> None:
        self.free += n
        while self.free and self.line:
            sleeper = self.line.pop(0)
            if not sleeper.cancelled:
                self.free -= 1
                sleeper.granted = True
                sleeper.ring(direct)

    def run(self) -> None:
        passed_on = 0
        for sleeper in list(self.asleep.values()):
            if sleeper.cancelled:
                passed_on += sleeper.granted
                self.end(sleeper, CANCELLED)
            elif sleeper.granted:
                self.held += 1
                self.end(sleeper, True)
            elif sleeper.deadline <= self.now:
                self.end(sleeper, False)
        self.line = [sleeper for sleeper in self.line if sleeper.number in self.asleep]
        if passed_on:
            self.hand_over(passed_on, True)
            self.run()


class SemaphoreMachine(Machine[SemaphoreModel]):
    def __init__(self, loop: str, new: type[Semaphore]) -> None:
        super().__init__(loop)
        self.new = new

    @initialize(value=st.sampled_from([0, 0, 1, 2]), fast=st.booleans())
    def create(self, value: int, fast: bool) -> None:
        self.semaphore = self.new(value, fast_acquire=fast)
        self.view = as_threading(self.semaphore)
        self.model = SemaphoreModel(value, self.new is BoundedSemaphore, fast)
        self.model.now = self.stepper.time()

    def run_model(self) -> None:
        self.model.run()

    def possible(self) -> list[Call]:
        model = self.model
        calls: list[Call] = [("acquire", True, timeout, False) for timeout in (None, 2, 5)]
        if model.line:
            calls += [("release", n, where) for n in (1, 1, 2, 3) for where in PLACES]
        else:
            calls *= 5
            calls += [("release", n, TASK) for n in (1, 2) if model.free < 3]
        calls += [("take", how, where) for how in ("nowait", "no", "zero") for where in PLACES]
        calls += [("acquire", True, timeout, False) for timeout in (0, -1)]
        calls += [("acquire", True, timeout, True) for timeout in (None, 1)]
        calls += [("acquire", False, None, False), ("release", 0, TASK)]
        return calls + self.cancels() + self.jumps()

    def acquire(self, blocking: bool, timeout: float | None, cancelled: bool) -> None:
        self.rest()
        patience = 0 if not blocking else math.inf if timeout is None else timeout
        self.model.acquire(len(self.jobs), patience, cancelled)
        self.start(partial(self.semaphore.acquire, blocking, timeout), cancelled)
        self.rest()

    def take(self, how: str, where: str) -> None:
        if how == "nowait":
            found = self.plain(where, self.semaphore.acquire_nowait)
            self.agree(found, None if self.model.take() else WouldBlock)
        else:
            arguments = (False, None) if how == "no" else (True, 0)
            found = self.plain(where, lambda: self.view.acquire(*arguments))
            self.agree(found, self.model.take())

    def release(self, n: int, where: str) -> None:
        found = self.plain(where, lambda: self.semaphore.release(n))
        self.agree(found, self.model.release(n, where == TASK))

    def state_agrees(self) -> None:
        semaphore, model = self.semaphore, self.model
        waiting = len(model.line)
        self.agree(semaphore.value, model.free)
        self.agree(semaphore.locked(), bool(model.line) or not model.free)
        self.agree(semaphore.statistics().waiting, waiting)
        assert f"value={model.free} waiters={waiting} " in repr(semaphore)
        assert f"value={model.free}" in repr(self.view)
        assert len(semaphore._queue.granted) <= len(model.asleep) - waiting, "a stale grant"
        if not self.stepper.in_step:
            self.agree(waiting, len(model.asleep))


@both_loops
@pytest.mark.parametrize("new", [Semaphore, BoundedSemaphore])
def test_semaphore(loop: str, new: type[Semaphore]) -> None:
    run(partial(SemaphoreMachine, loop, new))


# -- Barriers.


class ActionError(Exception):
    """What an action raises."""


@dataclass(eq=False)
class Party(Waiter):
    timeout: float = math.inf
    # The round it has arrived in, or waits for the end of.
    round: Round = field(default_factory=lambda: Round())
    index: int = -1
    late: bool = False
    # What the action that it runs will do; None: it runs none.
    action: str | None = None


class Round:
    def __init__(self) -> None:
        self.arrived = 0
        # None, "full" while the action runs, "tripped" or "broken".
        self.outcome: str | None = None


class BarrierModel(Model[Party]):
    def __init__(self, parties: int, action: str | None, timeout: float) -> None:
        super().__init__()
        self.parties, self.action, self.timeout = parties, action, timeout
        self.round = Round()
        self.actions = 0

    def is_last(self) -> bool:
        return self.round.arrived == self.parties - 1

    def of_round(self, round: Round) -> list[Party]:
        return [party for party in self.asleep.values() if party.round is round]

    def decide(self, round: Round, outcome: str, direct: bool) -> None:
        if round.outcome not in (None, "full"):
            return  # all have been woken
        round.outcome = outcome
        if outcome == "tripped":
            self.round = Round()
        for party in self.of_round(round):
            if party.action is None:
                party.ring(direct)

    def arrive(self, party: Party, direct: bool) -> object:
        """Return what `wait` returns or raises; None if it sleeps."""
        round = party.round = self.round
        if round.outcome == "broken":
            return BrokenBarrierError
        party.late = round.outcome == "full"
        if party.late:
            return None
        party.index = round.arrived
        round.arrived += 1
        party.deadline = self.now + party.timeout
        if round.arrived == self.parties:
            return self.complete(party, direct)
        if party.timeout <= 0:
            self.decide(round, "broken", direct)
            return BrokenBarrierError
        return None

    def complete(self, party: Party, direct: bool) -> object:
        round = party.round
        if any(other.cancelled for other in self.of_round(round)):
            self.decide(round, "broken", direct)
            return BrokenBarrierError
        if self.action is not None:
            self.actions += 1
        if self.action == "async":
            round.outcome = "full"
            party.action = "running"
            return None
        self.decide(round, "broken" if self.action == "fails" else "tripped", direct)
        return ActionError if self.action == "fails" else party.index

    def wait(self, party: Party, cancelled: bool) -> None:
        """What a task does that begins when all others are blocked."""
        outcome = self.arrive(party, True)
        if outcome is None:
            self.asleep[party.number] = party
            party.cancelled = cancelled
        else:
            checkpoint = self.parties == 1 and isinstance(outcome, int)
            self.outcomes[party.number] = CANCELLED if cancelled and checkpoint else outcome
        self.run()

    def abort(self, direct: bool) -> None:
        self.decide(self.round, "broken", direct)

    def reset(self, direct: bool) -> None:
        self.decide(self.round, "broken", direct)
        self.round = Round()

    def run(self) -> None:
        before = None
        while before != (
            state := [(p.number, p.round, p.round.outcome) for p in self.asleep.values()]
        ):
            before = state
            for party in list(self.asleep.values()):
                self.run_one(party)
        for party in self.asleep.values():
            party.bell = ""

    def run_one(self, party: Party) -> None:
        round = party.round
        if party.cancelled:
            self.end(party, CANCELLED)
            if party.action is not None or (round.outcome is None and not party.late):
                self.decide(round, "broken", True)
        elif party.action is not None:
            if party.action == "running":
                return
            fails = party.action == "fails"
            if round.outcome == "full":
                self.decide(round, "broken" if fails else "tripped", True)
            if fails:
                self.end(party, ActionError)
            elif round.outcome == "broken":
                self.end(party, BrokenBarrierError)
            else:  # who is the only party makes a checkpoint
                self.end(party, CANCELLED if party.doomed and self.parties == 1 else party.index)
        elif party.late:
            if round.outcome != "full":
                outcome = self.arrive(party, True)
                if outcome is not None:
                    self.end(party, outcome)
        elif round.outcome is None:
            if party.deadline <= self.now:
                self.decide(round, "broken", True)
        elif round.outcome != "full":
            self.end(party, party.index if round.outcome == "tripped" else BrokenBarrierError)


class Action:
    """Runs until it is told what to do."""

    def __init__(self) -> None:
        self.event = anyio.Event()
        self.fails = False

    async def run(self) -> None:
        await self.event.wait()
        if self.fails:
            raise ActionError

    def end(self, fails: bool) -> None:
        self.fails = fails
        self.event.set()


class BarrierMachine(Machine[BarrierModel]):
    @initialize(
        parties=st.sampled_from([2, 3, 3, 1]),
        action=st.sampled_from([None, "works", "fails", "async", "async"]),
        timeout=st.sampled_from([None, None, 2]),
    )
    def create(self, parties: int, action: str | None, timeout: float | None) -> None:
        self.actions = 0
        self.running: list[Action] = []
        act = {None: None, "works": self.works, "fails": self.fails, "async": self.waits}[action]
        self.barrier = Barrier(parties, act, timeout)
        self.view = as_threading(self.barrier)
        self.model = BarrierModel(parties, action, math.inf if timeout is None else timeout)
        self.model.now = self.stepper.time()

    def works(self) -> None:
        self.actions += 1

    def fails(self) -> None:
        self.actions += 1
        raise ActionError

    async def waits(self) -> None:
        self.actions += 1
        action = Action()
        self.running.append(action)
        try:
            await action.run()
        finally:
            self.running.remove(action)

    def run_model(self) -> None:
        self.model.run()

    def may_be_cancelled(self, sleeper: Any) -> bool:
        # Else it may be on its way to the next round, and would break that.
        return super().may_be_cancelled(sleeper) and not (sleeper.late and sleeper.bell)

    def possible(self) -> list[Call]:
        model = self.model
        late = [party for party in model.asleep.values() if party.late]
        running = [party for party in model.asleep.values() if party.action is not None]
        busy = bool(self.model.of_round(model.round))
        calls: list[Call] = []
        # Under trio two that are late would arrive at once afterwards, in any order.
        if len(late) < (1 if self.stepper.name == "trio" else 3):
            calls += [("wait", timeout, False) for timeout in (None, 2, 5)] * (2 if busy else 6)
            calls += [("wait", 0, False), ("wait", None, True), ("wait", 0, True)]
        calls += [
            ("end_action", index, fails)
            for index, party in enumerate(running)
            for fails in (False, False, True)
            if party.action == "running"
        ] * 2
        for where in PLACES:
            if model.round.outcome == "broken":
                calls += [("reset", where)] * len(calls)
            elif busy:
                calls += [("reset", where), ("abort", where)]
            if model.round.outcome == "full" or (model.is_last() and model.action == "async"):
                continue  # it would have to wait
            calls += [("arrive", where)] * (5 if model.is_last() else 1)
        return calls + self.cancels() + self.jumps()

    def wait(self, timeout: float | None, cancelled: bool) -> None:
        self.rest()
        seconds = self.model.timeout if timeout is None else timeout
        self.start(lambda: self.barrier.wait(timeout), cancelled)
        self.stepper.rest()
        self.model.wait(Party(len(self.jobs) - 1, timeout=seconds), cancelled)

    def arrive(self, where: str) -> None:
        """Arrive within the step. Who is not the last one breaks the barrier."""
        if where == TASK and self.model.parties > 1:
            found = self.plain(where, lambda: at_once(self.barrier.wait(0)))
        else:
            found = self.plain(where, lambda: self.view.wait(0))
        self.agree(found, self.model.arrive(Party(-1, timeout=0), where == TASK))

    def abort(self, where: str) -> None:
        self.plain(where, self.barrier.abort)
        self.model.abort(where == TASK)

    def reset(self, where: str) -> None:
        self.plain(where, self.barrier.reset)
        self.model.reset(where == TASK)

    def end_action(self, index: int, fails: bool) -> None:
        self.stepper.call(partial(self.running[index].end, fails))
        party = [party for party in self.model.asleep.values() if party.action][index]
        party.action = "fails" if fails else "works"
        party.ring(True)

    def state_agrees(self) -> None:
        barrier, model = self.barrier, self.model
        waiting = 0 if model.round.outcome == "broken" else model.round.arrived
        self.agree(barrier.parties, model.parties)
        self.agree((barrier.n_waiting, self.view.n_waiting), (waiting, waiting))
        broken = model.round.outcome == "broken"
        self.agree((barrier.broken, self.view.broken), (broken, broken))
        known = barrier.statistics()
        self.agree((known.parties, known.broken), (model.parties, broken))
        there = [p for p in model.of_round(model.round) if not (p.cancelled or p.late or p.action)]
        self.agree((known.tasks_waiting, known.threads_waiting), (len(there) * (not broken), 0))
        self.agree(self.actions, model.actions)
        self.agree(len(self.running), len([p for p in model.asleep.values() if p.action]))
        assert ("broken" if broken else f"waiting={waiting} ") in repr(barrier)
        # Nothing stale: one sleeper for each who has arrived, and the old rounds are gone.
        round = barrier._rounds.current()
        assert round is barrier._rounds.latest
        assert "next" not in round.decided
        assert not round.threads
        if model.round.outcome is None:
            self.agree(len(round.waiters), len(model.of_round(model.round)))


@both_loops
def test_barrier(loop: str) -> None:
    run(partial(BarrierMachine, loop))


# -- Pools.

NEVER = -math.inf

# How long it takes to close a connection. If it took no time, it would be up to chance whether
# there is room for another one before somebody looks.
CLOSING = 0.4127
# After that nobody relies any more on a connection that is being reset or checked.
SOON = 0.1


@dataclass(eq=False)
class Link:
    """A connection, as the model sees it."""

    number: int
    created: float
    expires: float
    idle_since: float
    fresh_until: float = NEVER
    retired: str = "lifetime"
    dead: bool = False
    taken: float = 0.0
    # A replacement has been started; and the one that this one replaces.
    renewed: bool = False
    replaces: Link | None = None
    # Whether the block that had it last has failed, so that it is to be checked.
    suspect: bool = False

    def retire(self, reason: str) -> None:
        if self.expires != NEVER:
            self.retired = reason
            self.expires = self.fresh_until = NEVER


@dataclass(eq=False)
class Borrower(Waiter):
    began: float = 0.0
    # What it was handed.
    link: Link | None = None
    error: type[Exception] | None = None
    # It borrows for the length of a block; it is in that, or at its end.
    block: bool = False
    stage: str = "waiting"


@dataclass(eq=False)
class Attempt:
    began: float
    generation: int
    failures: int
    replaces: Link | None = None


@dataclass(eq=False)
class Service:
    """A check or a reset that hangs, until when; and who does it, unless it is the pool."""

    until: float
    link: Link
    step: str
    borrower: Borrower | None = None


@dataclass
class Options:
    """Those of the pool, or rather those that machines vary."""

    min_size: int
    max_size: int
    lifo: bool
    fast_acquire: bool
    fail_fast: bool
    max_waiting: int
    max_connecting: int | None
    # Whether there is a `reset`; there is a `check` if `check_idle` is not None.
    resets: bool
    check_idle: float | None
    # No sum of some of these is close to another, so that nothing is due at once by chance.
    timeout: float = 3.0713
    max_idle: float = 7.1357
    max_lifetime: float = 11.2931
    check_timeout: float = 2.2193
    connect_timeout: float = 4.4371
    close_timeout: float = 2.8517
    # With one connection more, how many there are depends on who runs first.
    overlap: bool = False

    @property
    def fresh(self) -> float:
        return self.max_idle if self.check_idle is None else min(self.max_idle, self.check_idle)


class PoolModel(Model[Borrower]):
    """A pool whose functions take no time, unless they hang until somebody ends them; but `close`.

    By `run` the pool does at once all that it would do in the background.
    """

    def __init__(self, options: Options) -> None:
        super().__init__()
        self.options = options
        # How the backend behaves: whether it "works", "refuses" or "hangs"; so does whoever checks.
        self.connecting, self.hooks_hang = "works", False
        self.made = 0
        self.lent: dict[int, Link] = {}
        self.forced: set[int] = set()
        self.counts: Counter[str] = Counter()
        self.waited = self.usage = 0.0
        # Whether who runs first has decided which connection replaces another one.
        self.is_ambiguous = False
        # They last beyond the end: a pool that is opened again has them.
        self.sizes = self.options.min_size, self.options.max_size
        self.open()

    def open(self) -> None:
        self.min_size, self.max_size = self.sizes
        self.links: dict[int, Link] = {}
        # The next to be taken is the last one; `stale` are to be checked before; `standby` are
        # not available before those that they replace are gone.
        self.idle: list[Link] = []
        self.stale: list[Link] = []
        self.standby: list[Link] = []
        # Not to be used again as they are; and those being closed: until when, why.
        self.returned: list[Link] = []
        self.leaving: list[tuple[float, Link, str]] = []
        self.line: list[Borrower] = []
        # What hangs.
        self.opening: list[Attempt] = []
        self.serving: list[Service] = []
        # Failures in a row; when the first of them began, and the last success ended.
        self.failures, self.next_attempt, self.outage = 0, NEVER, False
        self.row_began, self.last_success = math.inf, NEVER
        self.connect_time = 0.0
        self.generation = 0
        self.wish = False
        # When those that are still borrowed are closed by force; None: the pool is open.
        self.closing: float | None = None
        self.closer: int | None = None

    @property
    def size(self) -> int:
        return len(self.links) + len(self.opening)

    @property
    def is_closed(self) -> bool:
        return self.closing is not None and self.closer is None

    def is_plain(self, link: Link, now: float) -> bool:
        """Tell whether it can be handed on as it is, when it comes back."""
        options = self.options
        return not (options.resets or options.check_idle == 0 or link.expires <= now)

    def next_fresh(self) -> Link | None:
        fresh = (link for link in reversed(self.idle) if link.fresh_until > self.now)
        return None if self.line else next(fresh, None)

    def spoils_at(self, link: Link) -> float:
        return min(link.expires, link.idle_since + self.options.max_idle)

    def freshen(self, link: Link) -> None:
        link.fresh_until = min(self.spoils_at(link), self.now + self.options.fresh)

    # -- Borrowing.

    def pick(self, patient: bool) -> Link | None:
        while self.idle and not self.line:
            link = self.idle.pop()
            if link.fresh_until > self.now:
                if patient and self.stale and not self.options.lifo:
                    self.wish = True  # to check one, or else they would be passed over for ever
                return link
            self.stale.append(link)
        if patient or self.line:
            return None
        stale = sorted(self.stale, key=lambda link: link.idle_since, reverse=self.options.lifo)
        good = [link for link in stale if not link.suspect]
        return next((link for link in good if self.spoils_at(link) > self.now), None)

    def lend(self, link: Link) -> int:
        if link in self.stale:
            self.stale.remove(link)
        self.counts["uses"] += 1
        link.taken = self.now
        self.lent[link.number] = link
        return link.number

    def acquire(self, number: int, timeout: float | None, cancelled: bool, block: bool) -> None:
        seconds = self.options.timeout if timeout is None else timeout
        if self.closing is not None:
            self.outcomes[number] = PoolClosed
        elif (link := self.pick(seconds > 0)) is not None:
            if cancelled and not self.options.fast_acquire:
                self.outcomes[number] = CANCELLED
                self.put(link, True, first=True)
            elif block:
                self.asleep[number] = Borrower(number, block=True)
                self.enter_block(self.asleep[number], link)
            else:
                self.outcomes[number] = self.lend(link)
        elif seconds <= 0:
            self.outcomes[number] = self.refuse(PoolTimeout)
            self.wish = True
        elif self.fails_fast():
            self.outcomes[number] = self.refuse(PoolTimeout)
        elif 0 < self.options.max_waiting <= len(self.line):
            self.outcomes[number] = self.refuse(TooManyRequests)
        else:
            borrower = Borrower(number, self.now + seconds, began=self.now, block=block)
            self.asleep[number] = borrower
            self.line.append(borrower)

    def refuse(self, error: type[Exception]) -> type[Exception]:
        self.counts["requests_errors"] += 1
        self.counts["timeouts"] += error is PoolTimeout
        return error

    def take(self, how: str) -> object:
        if self.closing is not None:
            return PoolClosed
        link = self.pick(False)
        if link is not None:
            return self.lend(link)
        self.wish = True
        return self.refuse(PoolTimeout) if how == "zero" else WouldBlock

    def take_back(self, number: int) -> Link | None:
        link = self.lent.pop(number, None)
        if link is not None:
            self.usage += self.now - link.taken
            link.idle_since = self.now
        return link

    def release(self, number: int, direct: bool) -> object:
        link = self.take_back(number)
        if link is None:
            if number not in self.forced:
                return ValueError
            self.forced.remove(number)
        elif self.is_plain(link, self.now):
            self.freshen(link)
            if link.suspect:
                self.stale.append(link)
            else:
                self.put(link, direct)
        else:
            self.returned.append(link)
        return None

    def discard(self, number: int, direct: bool) -> object:
        if number in self.lent:
            self.lent[number].retire("discard")
        return self.release(number, direct)

    def put(self, link: Link, direct: bool, first: bool = False) -> None:
        if link.expires == NEVER:
            self.returned.append(link)
            return
        self.idle.insert(len(self.idle) if self.options.lifo or first else 0, link)
        while self.idle and self.line:
            borrower = self.line.pop(0)
            if not borrower.cancelled:
                borrower.link = self.idle.pop()
                borrower.ring(direct)

    def fail_all(self, error: type[Exception]) -> None:
        for borrower in self.line:
            borrower.error = error
            borrower.ring(True)
        self.line.clear()

    # -- Blocks that borrow.

    def enter_block(self, borrower: Borrower, link: Link) -> None:
        self.lend(link)
        borrower.link, borrower.stage, borrower.deadline = link, "block", math.inf
        borrower.bell = ""
        if borrower.doomed:  # it is cancelled where it sleeps in the block
            self.leave_block(borrower, "cancelled")

    def leave_block(self, borrower: Borrower, how: str) -> None:
        """End the block because it is "over", has "failed", or is "cancelled"."""
        link = borrower.link
        assert link is not None
        outcomes = {"over": link.number, "failed": ActionError, "cancelled": CANCELLED}
        resets = how == "over" and self.options.resets and link.number in self.lent
        if resets and link.expires > self.now and self.closing is None:
            self.take_back(link.number)
            borrower.stage = "reset"
            self.serve(link, "reset", borrower)
        else:
            checks = self.options.check_idle is not None
            link.suspect = checks and how == "failed" and link.number in self.lent
            self.release(link.number, True)
            self.end(borrower, outcomes[how])

    def cancel_block(self, borrower: Borrower, natively: bool) -> None:
        """Cancel a borrower in a block, or in its reset, which only `task.cancel()` interrupts."""
        if borrower.stage == "block":
            self.leave_block(borrower, "cancelled")
        elif natively:
            service = next(one for one in self.serving if one.borrower is borrower)
            self.serving.remove(service)
            self.close(service.link, "reset")
            self.end(borrower, CANCELLED)

    # -- What happens in the background.

    def run(self) -> None:
        before = None
        while before != (state := self.fingerprint()):
            before = state
            self.run_borrowers()
            self.run_hooks()
            self.review()
        if self.closer is not None and not self.links:
            self.outcomes[self.closer], self.closer = None, None

    def fingerprint(self) -> object:
        piles = self.idle, self.stale, self.standby, self.line, self.links
        busy = self.opening, self.serving, self.leaving
        return dict(self.counts), list(self.asleep), [len(pile) for pile in (*piles, *busy)]

    def run_borrowers(self) -> None:
        for borrower in list(self.asleep.values()):
            if borrower.stage != "waiting":
                continue
            if borrower.cancelled:
                self.end_wait(borrower, "cancelled")
                self.end(borrower, CANCELLED)
                if borrower.link is not None:
                    self.put(borrower.link, True)
            elif borrower.link is not None:
                self.end_wait(borrower, "")
                if borrower.block:
                    self.enter_block(borrower, borrower.link)
                else:
                    self.end(borrower, self.lend(borrower.link))
            elif borrower.error is not None or borrower.deadline <= self.now:
                self.end_wait(borrower, "")
                self.end(borrower, self.refuse(borrower.error or PoolTimeout))

    def end_wait(self, borrower: Borrower, count: str) -> None:
        if borrower in self.line:
            self.line.remove(borrower)
        if count:
            self.counts[count] += 1
        self.counts["requests_queued"] += 1
        self.waited += self.now - borrower.began

    def run_hooks(self) -> None:
        for until, link, reason in self.leaving:
            if until <= self.now:
                self.forget(link, reason)
        self.leaving = [leaving for leaving in self.leaving if leaving[0] > self.now]
        while self.returned:
            link = self.returned.pop(0)
            if self.spoils_at(link) <= self.now:
                self.close_spoiled(link)
            else:
                self.serve(link, "reset")
        for service in self.serving[::-1]:
            if service.until <= self.now:
                self.end_service(service, False)
        for attempt in self.opening[::-1]:
            if attempt.began + self.options.connect_timeout <= self.now:
                self.end_connect(attempt, False)

    def review(self) -> None:
        if self.closing is not None:
            self.shut_down()
            return
        waiting = max(len(self.line), self.wish)
        self.wish = False
        for link in [*self.stale, *self.idle]:
            if self.spoils_at(link) <= self.now:
                self.close_spoiled(link)
        self.shrink()
        self.admit()
        soon = len(self.soon())
        checks = self.to_check()[: max(0, waiting - soon)]
        renewals = self.to_renew(waiting)
        number = self.to_open(waiting - soon - len(checks))
        for link in checks:
            self.take_out(link)
            self.serve(link, "check")
        self.connect(number, renewals)

    def snapshot(self) -> list[Link]:
        piles = self.stale, self.idle
        links = [link for pile in piles for link in (pile if self.options.lifo else pile[::-1])]
        return sorted(links, key=lambda link: link.idle_since)

    def to_check(self) -> list[Link]:
        stale = [
            link for link in self.oldest_first() if link.suspect or link.fresh_until <= self.now
        ]
        return sorted(stale, key=lambda link: link.idle_since, reverse=self.options.lifo)

    def oldest_first(self) -> list[Link]:
        """Return the idle ones; of those that became idle at the same time, the first made."""
        idle = [link for link in self.links.values() if link in self.idle or link in self.stale]
        return sorted(idle, key=lambda link: link.idle_since)

    def in_use(self) -> list[Link]:
        """Return those that are neither idle nor closed nor on standby: borrowed, or served."""
        unused = [*self.snapshot(), *self.standby, *(link for _, link, _ in self.leaving)]
        return [link for link in self.links.values() if link not in unused]

    def lendable(self) -> list[Link]:
        in_use = [link for link in self.in_use() if link.expires > self.now]
        return [*self.oldest_first(), *in_use]

    def shrink(self) -> None:
        lendable = self.lendable()
        opening = [attempt for attempt in self.opening if attempt.replaces is None]
        surplus = len(lendable) + len(opening) - self.max_size
        for link in lendable[: max(0, surplus)]:
            self.close_or_retire(link, "resize")

    def close_or_retire(self, link: Link, reason: str) -> None:
        if link in self.idle or link in self.stale:
            self.close(link, reason)
        else:
            link.retire(reason)

    def admit(self) -> None:
        """Let those on standby take the place of those that they replace."""
        for link in list(self.standby):
            old = link.replaces
            is_idle = old in self.idle or old in self.stale
            if old is not None and old.expires > self.now and (is_idle or old in self.in_use()):
                by_age = not is_idle or self.spoils_at(old) == old.expires
                self.close_or_retire(old, "lifetime" if by_age else "idle")
            if len(self.snapshot()) + len(self.in_use()) < self.max_size:
                self.standby.remove(link)
                link.replaces = None
                self.give(link, "open")
            elif old is None or old not in self.lendable() + self.in_use():
                self.standby.remove(link)
                self.close(link, "resize")

    def soon(self) -> list[float]:
        """Return until when those that are served just now may be relied on."""
        timeout = self.options.check_timeout
        ends = [service.until - timeout + SOON for service in self.serving]
        return [end for end in ends if end > self.now]

    def renew_at(self, link: Link) -> float:
        """Return when a replacement of a connection that is needed is to be started."""
        is_idle = link in self.idle or link in self.stale
        end = self.spoils_at(link) if is_idle else link.expires
        lifetime = end - (link.created if end == link.expires else link.idle_since)
        return end - min(lifetime / 2, max(lifetime * 0.025, 2 * self.connect_time))

    def to_renew(self, waiting: int) -> list[Link]:
        lendable = self.lendable()
        idle = self.oldest_first()
        spare = 0 if waiting else min(len(idle), max(0, len(lendable) - self.min_size))
        due = [
            link
            for link in lendable[spare:]
            if not link.renewed and link.expires != NEVER and self.renew_at(link) <= self.now
        ]
        return sorted(due, key=lambda one: self.spoils_at(one) if one in idle else one.expires)

    def is_to_renew(self) -> bool:
        """Tell whether it is time to replace a connection before it has to go."""
        if self.closing is not None:
            return False
        known = [link for link in self.links.values() if not link.renewed]
        return any(link.expires != NEVER and self.renew_at(link) <= self.now for link in known)

    def may_try(self) -> int:
        """Return how many attempts may begin after a failure, if it is time for some."""
        most = 1 if self.outage else {1: 3, 2: 1}.get(self.failures, 1)
        limit = self.options.max_connecting or math.inf
        return int(max(0, min(most - self.begun(), limit - len(self.opening))))

    def begun(self) -> int:
        """Return how many attempts are under way that have begun after the last failure."""
        return sum(attempt.failures == self.failures for attempt in self.opening)

    def limit(self) -> float:
        if not self.failures:
            return (self.options.max_connecting or math.inf) - len(self.opening)
        return self.may_try() if self.now >= self.next_attempt else 0

    def to_open(self, wanted: int) -> int:
        number = max(self.min_size - self.size, wanted - len(self.opening), 0)
        if self.failures and not self.begun():
            number = max(number, 1)
        return int(max(0, min(number, self.max_size - self.size, self.limit())))

    def connect(self, number: int, renewals: list[Link]) -> None:
        if not self.failures:
            most = int(min(self.max_size - self.size, self.limit(), 1000)) - number
            renewals = renewals[: max(0, most)]
        else:
            renewals = []
        attempts = [Attempt(self.now, self.generation, self.failures) for _ in range(number)]
        for old in renewals:
            old.renewed = True
            attempts.append(Attempt(self.now, self.generation, self.failures, old))
        self.opening += attempts
        if number and renewals:
            self.is_ambiguous = True
        for attempt in attempts:
            if self.connecting != "hangs":
                self.end_connect(attempt, self.connecting == "works")

    def end_connect(self, attempt: Attempt, works: bool) -> None:
        self.opening.remove(attempt)
        self.counts["connections_num"] += 1
        if not works:
            self.fail_to_connect(attempt)
            return
        self.made += 1
        link = Link(self.made, self.now, self.now + self.options.max_lifetime, self.now)
        self.links[link.number] = link
        if attempt.generation != self.generation:
            link.retire("drain")
        self.connect_time = self.now - attempt.began
        self.failures, self.next_attempt, self.outage = 0, NEVER, False
        self.row_began, self.last_success = math.inf, self.now
        if attempt.replaces is None:
            self.give(link, "open")
        else:
            link.replaces = attempt.replaces
            self.standby.append(link)

    def fail_to_connect(self, attempt: Attempt) -> None:
        self.counts["connections_errors"] += 1
        if attempt.replaces is not None:
            return
        self.row_began = min(self.row_began, max(attempt.began, self.last_success))
        lasts = self.now - self.row_began >= 1
        if self.failures in (0, attempt.failures):
            self.failures += 1
            if self.failures >= 3 or lasts:
                delay = min(0.1 * 2 ** max(0, self.failures - 3), 10)
                self.next_attempt = self.now + delay * NoChance.share
        self.outage = self.outage or lasts or self.failures >= 3
        if self.fails_fast():
            self.fail_all(PoolTimeout)

    def fails_fast(self) -> bool:
        return self.options.fail_fast and self.outage and not self.has_hope()

    def has_hope(self) -> bool:
        return bool(self.stale or self.serving) or self.size >= self.max_size

    def give(self, link: Link, step: str) -> None:
        """Make a connection available that has come through a step."""
        if step == "check":
            link.suspect = False
        else:
            link.idle_since = self.now
        if self.spoils_at(link) <= self.now:
            self.close_spoiled(link)
            return
        self.freshen(link)
        if step != "reset" or (self.options.check_idle != 0 and not link.suspect):
            self.put(link, True, first=step == "check")
        else:
            self.stale.append(link)

    def serve(self, link: Link, step: str, borrower: Borrower | None = None) -> None:
        if step == "reset" and not self.options.resets:
            self.give(link, step)
            return
        service = Service(self.now + self.options.check_timeout, link, step, borrower)
        self.serving.append(service)
        if not self.hooks_hang:
            self.end_service(service, not link.dead)

    def end_service(self, service: Service, works: bool) -> None:
        self.serving.remove(service)
        if works:
            self.give(service.link, service.step)
        else:
            self.close(service.link, service.step)
        if service.borrower is not None:
            self.end(service.borrower, service.link.number)

    def close_spoiled(self, link: Link) -> None:
        self.close(link, link.retired if link.expires <= self.now else "idle")

    def take_out(self, link: Link) -> None:
        for pile in self.idle, self.stale:
            if link in pile:
                pile.remove(link)

    def close(self, link: Link, reason: str) -> None:
        self.take_out(link)
        self.leaving.append((self.now + CLOSING, link, reason))
        self.counts["connections_lost"] += reason == "check"

    def forget(self, link: Link, reason: str) -> None:
        del self.links[link.number]
        self.counts[f"closed_{reason}"] += 1
        self.counts["returns_bad"] += reason in ("reset", "discard")

    def check_all(self) -> None:
        idle = self.snapshot()[:: 1 if self.options.lifo else -1]
        for link in idle if self.options.check_idle is not None else ():
            self.take_out(link)
            self.serve(link, "check")

    def drain(self) -> None:
        self.generation += 1
        for link in self.links.values():
            link.retire("drain")

    def lose(self, number: int) -> None:
        self.counts["leaks"] += 1
        self.usage += self.now - self.lent[number].taken
        self.forget(self.lent.pop(number), "collected")

    def begin_to_close(self, closer: int) -> None:
        self.closing, self.closer = self.now + self.options.close_timeout, closer
        self.min_size = self.max_size = 0
        self.fail_all(PoolClosed)

    def shut_down(self) -> None:
        for link in self.snapshot():
            if self.spoils_at(link) <= self.now:
                self.close_spoiled(link)
        for link in [*self.snapshot(), *self.standby]:
            self.close(link, "shutdown")
        self.standby.clear()
        for link in self.links.values():
            if link.expires > self.now:
                link.retire("shutdown")
        self.counts["connections_num"] += len(self.opening)
        self.opening.clear()
        if self.closing is not None and self.closing <= self.now:
            for link in list(self.lent.values()):
                self.usage += self.now - link.taken
                self.close(link, "forced")
            self.forced |= self.lent.keys()
            self.lent.clear()

    def events(self) -> list[float]:
        """Return when what happens next happens by itself, and then what comes after that."""
        times = [borrower.deadline for borrower in self.line]
        times += [self.spoils_at(link) for link in self.snapshot()]
        times += [attempt.began + self.options.connect_timeout for attempt in self.opening]
        times += [service.until for service in self.serving]
        times += [until for until, _, _ in self.leaving]
        times += self.soon() if self.line else []
        if self.failures and self.may_try() and self.size < self.max_size:
            times.append(self.next_attempt)
        if self.closing is None:
            times += [self.renew_at(link) for link in self.lendable() if not link.renewed]
        elif self.lent:
            times.append(self.closing)
        return sorted(time for time in times if time > self.now)

    def stats(self) -> dict[str, int]:
        counts = {name: count for name, count in self.counts.items() if count and name != "uses"}
        requests = sum(self.counts[name] for name in ("uses", "requests_errors", "cancelled"))
        return {
            "pool_min": self.min_size,
            "pool_max": self.max_size,
            "pool_size": self.size,
            "pool_available": len(self.idle) + len(self.stale),
            "in_use": len(self.lent),
            "connecting": len(self.opening),
            "requests_waiting": len(self.line),
            **({"requests_num": requests} if requests else {}),
            **counts,
        }


def by_time(counts: dict[str, int]) -> dict[str, int]:
    """Add up what was closed for its age and what for having been idle.

    Which of them it was depends on whether the old connection was in use at the very look at which
    its replacement was ready. The pool looks more often than the model.
    """
    closed = sum(counts.get(f"closed_{reason}", 0) for reason in ("lifetime", "idle"))
    rest = {name: n for name, n in counts.items() if name not in ("closed_lifetime", "closed_idle")}
    return {**rest, "closed by time": closed}


class NoChance:
    """Instead of a generator of random numbers: connections live long, attempts come soon."""

    share = 0.5

    def random(self) -> float:
        return 0.0


class ModelledConnection:
    def __init__(self, number: int) -> None:
        self.number = number
        self.dead = False


class Gate:
    """Lets who hangs go on, or fail."""

    def __init__(self) -> None:
        self.event = anyio.Event()
        self.works = True

    async def passed(self) -> bool:
        await self.event.wait()
        return self.works

    def open(self, works: bool) -> None:
        self.works = works
        self.event.set()


class ModelledBackend:
    """Does what the model is told that it does."""

    def __init__(self, model: PoolModel) -> None:
        self.model = model
        self.made = 0
        self.all: WeakValueDictionary[int, ModelledConnection] = WeakValueDictionary()
        self.open: set[int] = set()
        self.wrong: list[str] = []
        self.connecting: list[Gate] = []
        self.serving: dict[int, Gate] = {}

    async def connect(self) -> ModelledConnection:
        works = self.model.connecting == "works"
        if self.model.connecting == "hangs":
            gate = Gate()
            self.connecting.append(gate)
            try:
                works = await gate.passed()
            finally:
                self.connecting.remove(gate)
        if not works:
            raise ConnectionRefusedError
        self.made += 1
        connection = self.all[self.made] = ModelledConnection(self.made)
        self.open.add(self.made)
        return connection

    async def close(self, connection: ModelledConnection) -> None:
        if connection.number in self.open:
            self.open.remove(connection.number)
        else:
            self.wrong.append(f"{connection.number} is closed twice")
        await anyio.sleep(CLOSING)

    async def check(self, connection: ModelledConnection) -> bool:
        return await self._serve(connection)

    async def reset(self, connection: ModelledConnection) -> None:
        if not await self._serve(connection):
            raise ConnectionResetError

    async def _serve(self, connection: ModelledConnection) -> bool:
        if self.model.hooks_hang:
            gate = self.serving[connection.number] = Gate()
            try:
                return await gate.passed()
            finally:
                del self.serving[connection.number]
        return not connection.dead


class Block:
    """A task that borrows for the length of an ``async with`` block, until that is ended."""

    def __init__(self, pool: ConnectionPool[ModelledConnection], timeout: float | None) -> None:
        self.checkout = pool.connection(timeout)
        self.over = anyio.Event()
        self.fails = False

    async def run(self) -> int:
        async with self.checkout as connection:
            number = connection.number
            del connection  # or else the traceback of a cancel would keep it
            await self.over.wait()
            if self.fails:
                raise ActionError
        return number

    def end(self, fails: bool) -> None:
        self.fails = fails
        self.over.set()


class PoolMachine(Machine[PoolModel]):
    @initialize(
        sizes=st.sampled_from([(0, 1), (0, 2), (1, 2), (2, 3), (0, 3)]),
        lifo=st.booleans(),
        fast=st.booleans(),
        fail_fast=st.sampled_from([False, False, True]),
        max_waiting=st.sampled_from([0, 0, 2]),
        max_connecting=st.sampled_from([None, None, 1, 2]),
        resets=st.sampled_from([False, False, True]),
        check_idle=st.sampled_from([None, None, 1.9173, 0]),
        connecting=st.sampled_from(["works", "works", "works", "hangs", "refuses"]),
        hooks_hang=st.booleans(),
    )
    def create(
        self,
        sizes: tuple[int, int],
        lifo: bool,
        fast: bool,
        fail_fast: bool,
        max_waiting: int,
        max_connecting: int | None,
        resets: bool,
        check_idle: float | None,
        connecting: str,
        hooks_hang: bool,
    ) -> None:
        options = Options(
            *sizes,
            lifo,
            fast,
            fail_fast,
            max_waiting,
            max_connecting,
            resets,
            check_idle,
        )
        self.model = PoolModel(options)
        self.model.connecting, self.model.hooks_hang = connecting, hooks_hang
        self.backend = ModelledBackend(self.model)
        self.ticks = 0
        given = {**vars(options)}
        del given["resets"]
        self.pool: ConnectionPool[ModelledConnection] = ConnectionPool(
            self.backend.connect,
            close=self.backend.close,
            check=None if check_idle is None else self.backend.check,
            reset=self.backend.reset if resets else None,
            **given,
        )
        self.view = as_threading(self.pool)
        self.held: dict[int, ModelledConnection] = {}
        self.lost: set[int] = set()
        self.model.now = self.stepper.time()
        self.blocks: dict[int, Block] = {}
        self.start(self.pool.open)
        self.model.outcomes[0] = None
        self.rest()

    def run_model(self) -> None:
        self.model.run()

    def rest(self) -> None:
        if self.stepper.in_step and self.model.is_to_renew():
            # Who borrows or gives back does not tell the pool that one is needed now, or not.
            self.stepper.call(self.pool._maintenance.core.wake)
        super().rest()

    def possible(self) -> list[Call]:
        model = self.model
        line, idle = len(model.line), len(model.idle) + len(model.stale)
        calls: list[Call] = []
        calls += [("acquire", timeout, False) for timeout in (None, 1.6177)] * max(1, 3 - line)
        if model.next_fresh() is not None:
            # Or else it is up to chance whether a connection is made for who leaves at once.
            calls += [("acquire", None, True), ("acquire", 0, True)]
        calls += [("take", "zero", TASK), ("take", "pool", THREAD), ("acquire", 0, False)]
        if idle:
            calls += [("take", how, where) for how in ("pool", "view", "zero") for where in PLACES]
        calls += [("begin_block", timeout) for timeout in (None, 1.6177)] * max(1, 2 - line)
        calls += [("reopen",)] * (5 if model.is_closed else 0)
        for number in self.blocks:
            stage = model.asleep[number].stage
            ways = [True, False] if self.stepper.name == "asyncio" else [False]
            if stage == "block":
                calls += [("end_block", number, fails) for fails in (False, False, True)]
            if stage != "waiting" and not model.asleep[number].doomed:
                often = 4 if stage == "reset" else 1
                calls += [("cancel_block", number, natively) for natively in ways] * often
        for number in self.held:
            calls += [("give_back", "release", number, where) for where in PLACES] * 2
            calls += [("give_back", "discard", number, PLACES[number % 2])]
            calls += [("give_back_in_the_last_moment", number)] * (3 if line else 0)
        for number in list(self.held)[:1]:
            calls += [("give_back_twice", number)]
            calls += [("lose", number)] * (number in model.lent)
        calls += [("kill", number) for number, link in model.links.items() if not link.dead]
        for index in range(len(model.opening)):
            calls += [("end_connect", index, works) for works in (True, False, True)] * 2
        for service in model.serving:
            number = service.link.number
            calls += [("end_service", number, works) for works in (True, False, True)] * 2
        calls += [("behave", "works")] * 3 if model.connecting != "works" else [("behave", "hangs")]
        calls += [("behave", "refuses"), ("behave", not model.hooks_hang)]
        if model.closing is None:
            busy = model.serving or any(one.link for one in model.asleep.values())
            calls += [("drain",)] * (6 if busy else 1)
            calls += [("check",)] * (2 * idle + 1 if not model.hooks_hang else 0)
            calls += [("resize", least, most) for least, most in ((0, 1), (1, 2), (2, 4))]
            calls += [("close",)] * (self.ticks > 25)
        calls += [("wait_a_little",)] * 3 + self.cancels()
        soon = bool(model.failures or model.leaving)
        return calls + [("let_time_pass",)] * (len(calls) // (2 if soon else 8))

    # -- Time. Nothing is due at the same time as anything else, so each step is a little later.

    def begin(self) -> None:
        """Go on to the next step, unless we are in one."""
        if not self.stepper.in_step:
            time = self.model.now + self.tick()
            if not any(event <= time for event in self.model.events()):
                self.jump_to(time)
            self.stepper.enter()

    def tick(self) -> float:
        """Return a short time; each time another one."""
        self.ticks += 1
        return 1e-3 * (1 + self.ticks * math.sqrt(5) % 1)

    def jump_to(self, time: float) -> None:
        self.stepper.jump(time - self.model.now)
        self.model.now = self.stepper.time()

    def jump_past(self, event: float) -> None:
        """Let time pass, until just after `event`."""
        later = [other - event for other in self.model.events() if other > event + 1e-9]
        self.jump_to(event + min([self.tick(), *(wait / 2 for wait in later)]))

    def let_time_pass(self, seconds: float = math.nan) -> None:
        """Let happen what happens next if nobody does anything; and not earlier."""
        self.rest()
        events = self.model.events()
        if events and events[0] - self.model.now > 0.01:
            self.jump_to(events[0] - self.tick())
            self.rest()
            self.all_agrees()
        if events:
            self.jump_past(events[0])
            self.rest()

    def wait_a_little(self) -> None:
        self.rest()
        left = min([2.0, *(event - self.model.now for event in self.model.events())])
        self.jump_to(self.model.now + 0.6 * left)
        self.rest()

    # -- What happens.

    def alone(self, change: Callable[[], object]) -> None:
        """Let something happen in a step of its own, that the pool itself has to do with."""
        self.rest()
        self.begin()
        change()
        self.rest()

    def do(self, work: Callable[[], Awaitable[object]], change: Callable[[], None]) -> None:
        """Let a task do something that does not take long."""
        self.rest()
        self.begin()
        self.model.outcomes[len(self.jobs)] = None
        self.start(work)
        change()
        self.rest()

    async def borrow(self, timeout: float | None) -> int:
        return self.keep(await self.pool.acquire(timeout))

    def keep(self, connection: ModelledConnection) -> int:
        self.held[connection.number] = connection
        return connection.number

    def acquire(self, timeout: float | None, cancelled: bool) -> None:
        self.rest()
        self.begin()
        self.model.acquire(len(self.jobs), timeout, cancelled, block=False)
        self.start(partial(self.borrow, timeout), cancelled)
        self.rest()

    # -- Blocks.

    def begin_block(self, timeout: float | None) -> None:
        self.rest()
        self.begin()
        number = len(self.jobs)
        self.model.acquire(number, timeout, cancelled=False, block=True)
        block = self.blocks[number] = Block(self.pool, timeout)
        self.start(block.run)
        self.rest()

    def end_block(self, number: int, fails: bool) -> None:
        def change() -> None:
            self.stepper.call(partial(self.blocks[number].end, fails))
            self.model.leave_block(self.model.asleep[number], "failed" if fails else "over")

        self.alone(change)

    def cancel_block(self, number: int, natively: bool) -> None:
        def change() -> None:
            borrower = self.model.asleep[number]
            job = self.jobs[number]
            self.stepper.call(job.cancel_natively if natively else job.cancel)
            borrower.doomed = True
            self.model.cancel_block(borrower, natively)

        self.rest()
        if number in self.model.asleep and self.model.asleep[number].stage != "waiting":
            self.alone(change)

    def may_be_cancelled(self, sleeper: Any) -> bool:
        return super().may_be_cancelled(sleeper) and sleeper.stage == "waiting"

    def take(self, how: str, where: str) -> None:
        self.begin()
        ways: dict[str, Callable[[], ModelledConnection]] = {
            "pool": self.pool.acquire_nowait,
            "view": self.view.acquire_nowait,
            "zero": lambda: self.view.acquire(0),
        }
        self.agree(self.plain(where, lambda: self.keep(ways[how]())), self.model.take(how))

    def give_back(self, how: str, number: int, where: str) -> None:
        link = self.model.lent.get(number)
        self.begin()
        if how == "discard" or (link is not None and not self.model.is_plain(link, self.model.now)):
            self.alone(partial(self.give_back_now, how, number, where))
        else:
            self.give_back_now(how, number, where)

    def give_back_now(self, how: str, number: int, where: str, times: int = 1) -> None:
        connection = self.held.pop(number)
        target: Any = self.pool if where == TASK else self.view
        for _ in range(times):
            found = self.plain(where, lambda: getattr(target, how)(connection))
            self.agree(found, getattr(self.model, how)(number, where == TASK))

    def give_back_twice(self, number: int) -> None:
        self.alone(partial(self.give_back_now, "release", number, TASK, 2))

    def give_back_in_the_last_moment(self, number: int) -> None:
        """Give back when the time of somebody is over, that does not know it yet."""
        self.rest()
        self.begin()
        link, events = self.model.lent.get(number), self.model.events()
        deadlines = [borrower.deadline for borrower in self.model.line]
        if link is None or not deadlines or events[0] not in deadlines:
            return
        if self.model.is_plain(link, events[0] + 0.01):
            self.jump_past(events[0])
            self.give_back_now("release", number, TASK)
            self.rest()

    def lose(self, number: int) -> None:
        def forget() -> None:
            self.lost.add(number)
            self.model.lose(number)
            del self.held[number]

        self.alone(forget)

    def kill(self, number: int) -> None:
        self.backend.all[number].dead = self.model.links[number].dead = True

    def behave(self, how: str | bool) -> None:
        if isinstance(how, bool):
            self.model.hooks_hang = how
        else:
            self.model.connecting = how

    def end_connect(self, index: int, works: bool) -> None:
        def change() -> None:
            self.stepper.call(partial(self.backend.connecting[index].open, works))
            self.model.end_connect(self.model.opening[index], works)

        self.alone(change)

    def end_service(self, number: int, works: bool) -> None:
        def change() -> None:
            self.stepper.call(partial(self.backend.serving[number].open, works))
            links = [service.link.number for service in self.model.serving]
            self.model.end_service(self.model.serving[links.index(number)], works)

        self.alone(change)

    def resize(self, least: int, most: int) -> None:
        def change() -> None:
            self.model.min_size, self.model.max_size = self.model.sizes = least, most

        self.do(lambda: self.pool.resize(least, most), change)

    def drain(self) -> None:
        """Within the step: who was handed a connection that moment may not have run since."""
        self.begin()
        self.stepper.call(lambda: begin_only(self.pool.drain()))
        self.model.drain()

    def check(self) -> None:
        self.do(self.pool.check, self.model.check_all)

    def close(self) -> None:
        def change() -> None:
            self.start(self.pool.close)
            self.model.begin_to_close(len(self.jobs) - 1)

        self.alone(change)

    def reopen(self) -> None:
        self.do(self.pool.open, self.model.open)

    # -- What can be observed.

    def all_agrees(self) -> None:
        if self.model.is_ambiguous:
            reject()
        super().all_agrees()

    def state_agrees(self) -> None:
        model, pool = self.model, self.pool
        stats = pool.get_stats()
        assert abs(stats.pop("requests_wait_ms") - 1000 * model.waited) <= 2
        assert abs(stats.pop("usage_ms") - 1000 * model.usage) <= 1
        del stats["connections_ms"]
        found = {name: number for name, number in stats.items() if number}
        expected = {name: number for name, number in model.stats().items() if number}
        self.agree(by_time(found), by_time(expected))
        self.agree(self.view.get_stats()["pool_size"], model.size)
        assert not self.backend.wrong
        for number in model.lent:
            if number in self.held:
                info = pool.info(self.held[number])
                assert info.in_use == pytest.approx(model.now - model.lent[number].taken)
        self.blocks = {number: one for number, one in self.blocks.items() if number in model.asleep}
        if not self.stepper.in_step:
            self.nothing_is_stale()

    def nothing_is_stale(self) -> None:
        model, inventory = self.model, self.pool._inventory
        in_blocks = {
            one.link.number for one in model.asleep.values() if one.link and one.stage == "block"
        }
        self.agree(self.held.keys() | in_blocks, model.lent.keys() | model.forced)
        leaving = {link.number for _, link, _ in model.leaving}
        self.agree(self.backend.open - self.lost, model.links.keys() - leaving)
        self.agree(self.backend.made, model.made)
        self.agree(len(inventory.waiters), len(model.line))
        self.agree(len(inventory.reclaimed), len(model.forced))
        self.agree(len(inventory.entries), len(model.links))
        self.agree(inventory.count(State.CLOSING), len(leaving))
        self.agree(inventory.count(State.STANDBY), len(model.standby))
        self.agree(self.pool.closed, model.closing is not None)
        if model.closing is None:
            self.agree(self.pool.healthy, not model.outage)
            assert not self.pool._inventory.jobs.items
            served = sum(service.borrower is None for service in model.serving)
            tasks = 1 + len(model.opening) + served + len(leaving)
            self.agree(len(self.pool._maintenance.core.tasks.pending), tasks)


class OverlapMachine(Machine[PoolModel]):
    """A pool that may have one connection more, to replace another one. There is no model for it.

    How many there are depends on who runs first; but never too many, and all goes on.
    """

    @initialize(
        sizes=st.sampled_from([(0, 1), (1, 1), (1, 2), (2, 2), (0, 3), (3, 3)]),
        lifo=st.booleans(),
        resets=st.booleans(),
        hooks_hang=st.booleans(),
    )
    def create(self, sizes: tuple[int, int], lifo: bool, resets: bool, hooks_hang: bool) -> None:
        options = Options(*sizes, lifo, False, False, 0, None, resets, None, overlap=True)
        self.model = PoolModel(options)
        self.model.hooks_hang = hooks_hang
        self.backend = ModelledBackend(self.model)
        self.pool: ConnectionPool[ModelledConnection] = ConnectionPool(
            self.backend.connect,
            close=self.backend.close,
            reset=self.backend.reset if resets else None,
            min_size=options.min_size,
            max_size=options.max_size,
            timeout=math.inf,
            max_idle=options.max_idle,
            max_lifetime=options.max_lifetime,
            check_timeout=options.check_timeout,
            connect_timeout=options.connect_timeout,
            lifo=lifo,
        )
        self.held: dict[int, ModelledConnection] = {}
        self.start(self.pool.open)
        self.rest()

    def rest(self) -> None:
        self.stepper.rest()

    def possible(self) -> list[Call]:
        calls: list[Call] = [("acquire",)] * 4
        calls += [("let_time_pass", seconds) for seconds in (0.3, 0.3, 2.7, 7.1, 10.9)] * 2
        calls += [("behave", how) for how in ("works", "works", "refuses", "hangs")]
        calls += [("give_back", number, how) for number in self.held for how in ("release",) * 3]
        calls += [("give_back", number, "discard") for number in self.held]
        calls += [("end_connect", works) for works in (True, True, False)] * bool(
            self.backend.connecting
        )
        calls += [("end_service", number) for number in self.backend.serving] * 3
        return calls

    def acquire(self) -> None:
        async def borrow() -> None:
            connection = await self.pool.acquire()
            assert connection.number in self.backend.open
            assert connection.number not in self.held
            self.held[connection.number] = connection

        self.start(borrow)
        self.rest()

    def give_back(self, number: int, how: str) -> None:
        connection = self.held.pop(number)
        self.stepper.call(partial(getattr(self.pool, how), connection))
        self.rest()

    def behave(self, how: str) -> None:
        self.model.connecting = how

    def end_connect(self, works: bool) -> None:
        self.stepper.call(partial(self.backend.connecting[0].open, works))
        self.rest()

    def end_service(self, number: int) -> None:
        self.stepper.call(partial(self.backend.serving[number].open, works=True))
        self.rest()

    def let_time_pass(self, seconds: float) -> None:
        self.stepper.jump(seconds)
        self.rest()

    def all_agrees(self) -> None:
        stats = self.pool.get_stats()
        most = self.model.options.max_size
        assert stats["in_use"] == len(self.held)
        assert stats["in_use"] + stats["pool_available"] <= most, stats
        assert stats["pool_size"] <= most + 1, stats
        assert self.held.keys() <= self.backend.open
        assert len(self.backend.open) <= most + 1
        assert not self.backend.wrong

    def teardown(self) -> None:
        try:
            if self.sound and self.jobs:
                self.check_that_all_goes_on()
        finally:
            super().teardown()

    def check_that_all_goes_on(self) -> None:
        options = self.model.options
        self.model.connecting, self.model.hooks_hang = "works", False
        for _ in range(len(self.jobs) + 1):
            for number in list(self.held):
                self.give_back(number, "release")
            self.let_time_pass(5.0)  # more than any attempt takes that hangs, or any delay
        assert all(job.done for job in self.jobs.values())
        assert not [job.outcome for job in self.jobs.values() if job.outcome is not None]
        inventory = self.pool._inventory
        for _ in range(2):  # some may just have been replaced
            if len(inventory.entries) > inventory.idle():
                self.let_time_pass(1.5 * CLOSING)
        assert len(inventory.entries) == inventory.idle()
        assert options.min_size <= len(inventory.entries) <= options.max_size


@both_loops
@pytest.mark.usefixtures("_no_chance")
def test_pool_with_one_more(loop: str) -> None:
    run(partial(OverlapMachine, loop))


@pytest.fixture
def _no_chance(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(_connecting, "_chance", NoChance())
    caplog.set_level(logging.CRITICAL, "aiosync.pool")


@both_loops
@pytest.mark.usefixtures("_no_chance")
def test_pool(loop: str) -> None:
    run(partial(PoolMachine, loop), 2 * EXAMPLES)


@both_loops
@pytest.mark.usefixtures("_no_chance")
def test_an_attempt_that_fails_after_others_did_is_not_followed_by_others_without_end(
    loop: str,
) -> None:
    """All of them in the same moment, if the clock stands still meanwhile, as virtual ones do."""
    calls: list[Call] = [
        ("acquire", None, False),
        ("acquire", None, False),
        ("end_connect", 0, False),
        ("behave", "refuses"),
        ("wait_a_little",),
        ("end_connect", 0, False),
        ("let_time_pass",),
    ]
    replay(
        PoolMachine(loop),
        calls,
        sizes=(0, 2),
        lifo=True,
        fast=False,
        fail_fast=False,
        max_waiting=0,
        max_connecting=2,
        resets=False,
        check_idle=None,
        connecting="hangs",
        hooks_hang=False,
    )
