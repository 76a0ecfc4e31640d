"""What tasks do to one another, in every order of their steps, and cancelled at every point.

What must live here: scenarios, that is a few tasks, what they do to one shared object, and what
must be true afterwards whatever the order; and mutants, which show that a mistake would be found.
How the orders are made is in `stepper`.

``AIOSYNC_EXPLORE=long`` tries more of them, for half an hour.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import trio
from anyio import WouldBlock
from support.explorer import mutated
from support.helpers import LONG
from support.stepper import (
    BACKENDS,
    BLOCKED,
    CANCELLED,
    Ends,
    Found,
    Plan,
    Scenario,
    Work,
    explore,
    has_to_leave,
    moment,
    replay,
    was_cancelled,
)

from aiosync import (
    Barrier,
    BoundedSemaphore,
    BrokenBarrierError,
    ConnectionPool,
    PoolClosed,
    PoolTimeout,
    Semaphore,
)
from aiosync._barrier import _Round, _Rounds
from aiosync._handoff import HandoffQueue
from aiosync._park import checkpoint
from aiosync._pool import _connecting
from aiosync._pool._backoff import Backoff
from aiosync._pool._closing import Closing
from aiosync._pool._entry import State
from aiosync._pool._inventory import Inventory
from aiosync._pool._validation import Validation

# How many schedules: if all of them have to fit in, or else; and how many random walks then.
LIMIT, SOME, WALKS = (50_000, 20_000, 5_000) if LONG else (1_500, 150, 20)
SEED = 20_240_229


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let pools not log that they can't connect, thousands of times."""
    monkeypatch.setattr(logging.getLogger("aiosync.pool"), "disabled", True)


# -- Semaphores.


def empty(queue: HandoffQueue[Any], but: int = 0) -> None:
    """Check that nobody waits any more, but those who are blocked."""
    assert len(queue.waiters) == but, "a stale waiter"
    assert not queue.granted, "an item for a waiter that has left"


class Line:
    """Tasks that want a permit, in the order in which they have come."""

    def __init__(self, semaphore: Semaphore) -> None:
        self.semaphore = semaphore
        self.came: list[str] = []

    def acquire(self, name: str, timeout: float | None = None) -> Work:
        async def work() -> bool:
            self.came.append(name)
            return await self.semaphore.acquire(timeout=timeout)

        return work

    async def release(self) -> None:
        self.semaphore.release()

    def steady(self) -> None:
        queue = self.semaphore._queue
        waiting = [each for each in queue.waiters if not each.done()]
        assert not (waiting and queue.free()), "a permit is free, and somebody waits for it"

    def settled(self, ends: Ends, permits: int) -> None:
        """Check that all of the permits are there, and that nobody was overtaken."""
        ranks = [ends[name] for name in self.came if ends[name] in (True, BLOCKED)]
        assert ranks == sorted(ranks, key=(True, BLOCKED).index), "somebody was overtaken"
        free = permits - ranks.count(True)
        assert self.semaphore.value == free, f"{self.semaphore.value} permits are free, not {free}"
        empty(self.semaphore._queue, but=ranks.count(BLOCKED))


def acquire_against_release() -> Plan:
    line = Line(Semaphore(0))
    tasks = {"acquire": line.acquire("acquire"), "release": line.release}
    return Plan(tasks, lambda ends: line.settled(ends, 1), victims=["acquire"], always=line.steady)


def two_acquires_and_one_release() -> Plan:
    line = Line(Semaphore(0))

    def check(ends: Ends) -> None:
        line.settled(ends, 1)
        assert line.semaphore.value == 0 or list(ends.values()).count(CANCELLED) == 2

    return Plan(
        {"a": line.acquire("a"), "b": line.acquire("b"), "release": line.release},
        check,
        victims=["a", "b"],
        may_block=True,
        always=line.steady,
    )


def timeout_against_release() -> Plan:
    line = Line(Semaphore(0))
    return Plan(
        {"acquire": line.acquire("acquire", timeout=5), "release": line.release},
        lambda ends: line.settled(ends, 1),
        victims=["acquire"],
        always=line.steady,
    )


def timeout_against_release_with_another_in_line() -> Plan:
    line = Line(Semaphore(0))

    def check(ends: Ends) -> None:
        line.settled(ends, 1)
        assert line.semaphore.value == 0

    return Plan(
        {"a": line.acquire("a", timeout=5), "b": line.acquire("b"), "release": line.release},
        check,
        victims=["a"],
        parked=2,
        may_block=True,
        always=line.steady,
    )


def release_of_two_with_three_in_line() -> Plan:
    line = Line(Semaphore(0))

    async def release() -> None:
        line.semaphore.release(2)

    def check(ends: Ends) -> None:
        line.settled(ends, 2)
        stayed = [name for name in line.came if ends[name] is not CANCELLED]
        assert [name for name in stayed if ends[name] is True] == stayed[:2]

    return Plan(
        {**{name: line.acquire(name) for name in "abc"}, "release": release},
        check,
        victims=["a", "b"],
        parked=3,
        may_block=True,
        always=line.steady,
    )


def acquire_cancelled_in_its_checkpoint() -> Plan:
    line = Line(Semaphore(1))  # no fast_acquire
    return Plan(
        # These two take different ways.
        {"a": line.acquire("a", timeout=5), "b": line.acquire("b")},
        lambda ends: line.settled(ends, 1),
        victims=["a", "b"],
        may_block=True,
        always=line.steady,
    )


def refusal_cancelled_in_its_checkpoint() -> Plan:
    line = Line(Semaphore(0))
    tasks = {"acquire": line.acquire("acquire", timeout=0), "release": line.release}
    return Plan(tasks, lambda ends: line.settled(ends, 1), victims=["acquire"], always=line.steady)


def block_cancelled() -> Plan:
    line = Line(Semaphore(1, fast_acquire=True))
    inside: list[str] = []

    async def enter(name: str) -> None:
        async with line.semaphore:
            inside.append(name)
            try:
                assert inside == [name]
                await checkpoint()
            finally:
                inside.remove(name)

    return Plan(
        {name: partial(enter, name) for name in "abc"},
        lambda ends: line.settled(ends, 1),
        victims=["a"],
        always=line.steady,
    )


def released_too_often() -> Plan:
    semaphore = BoundedSemaphore(1, fast_acquire=True)
    line = Line(semaphore)
    acquired: list[str] = []
    released: list[str] = []

    async def hold(name: str) -> None:
        await line.acquire(name)()
        acquired.append(name)
        await checkpoint()
        await release(name)

    async def release(name: str) -> None:
        try:
            semaphore.release()
            released.append(name)
        except ValueError:
            assert not semaphore._held

    def check(ends: Ends) -> None:
        held = len(acquired) - len(released)
        assert len(semaphore._held) == held
        assert semaphore.value == 1 - held
        empty(semaphore._queue, but=list(ends.values()).count(BLOCKED))

    tasks: dict[str, Work] = {name: partial(hold, name) for name in "ab"}
    return Plan(
        {**tasks, "rogue": partial(release, "rogue")},
        check,
        victims=["a"],
        may_block=True,
        always=line.steady,
    )


def newcomers_with_one_in_line(timeout: float | None = None) -> Plan:
    line = Line(Semaphore(0))

    async def snatch() -> bool:
        nobody_waits = has_to_leave("waiter") and "late" not in line.came
        line.semaphore.release()
        moment()
        try:
            line.semaphore.acquire_nowait()
        except WouldBlock:
            assert not nobody_waits, "a permit is kept for somebody who has been cancelled"
            return False
        # If its time is over, but it has not run since, it may be passed over, or may not.
        assert nobody_waits or timeout is not None, "a waiter was overtaken"
        return True

    def check(ends: Ends) -> None:
        # Whoever has it; the last one to come is never cancelled.
        assert list(ends.values()).count(True) == 1
        assert line.semaphore.value == 0
        empty(line.semaphore._queue, but=list(ends.values()).count(BLOCKED))
        assert ends["waiter"] is not BLOCKED

    return Plan(
        {"waiter": line.acquire("waiter", timeout), "snatch": snatch, "late": line.acquire("late")},
        check,
        victims=["waiter"],
        parked=1,
        may_block=True,
        always=line.steady,
    )


def newcomers_with_one_in_line_for_a_time() -> Plan:
    return newcomers_with_one_in_line(5)


# -- Barriers.


class Parties:
    """The tasks of a barrier, and what `wait` has answered to each."""

    def __init__(self, barrier: Barrier) -> None:
        self.barrier = barrier
        self.came: list[str] = []
        # Whether somebody had been cancelled when the last of the first round came.
        self.cancelled: list[bool] = []
        self.doomed: list[bool] = []

    def wait(self, name: str, timeout: float | None = None) -> Work:
        async def work() -> object:
            self.came.append(name)
            if len(self.came) == self.barrier.parties:
                self.cancelled += map(was_cancelled, self.came)
                self.doomed += map(has_to_leave, self.came)
            try:
                return await self.barrier.wait(timeout)
            except BrokenBarrierError:
                return "broken"

        return work

    async def abort(self) -> None:
        self.barrier.abort()

    def passed(self, ends: Ends) -> bool:
        """Check that there was one outcome for all, and tell whether the round has tripped."""
        answers = [ends[name] for name in self.came]
        indices = [answer for answer in answers if answer in range(self.barrier.parties)]
        others = {answer for answer in answers if answer not in indices}
        assert others <= {"broken", CANCELLED, BLOCKED}
        assert len(set(indices)) == len(indices), "an index was given out twice"
        assert not (indices and "broken" in answers), f"the round was split: {answers}"
        if any(self.doomed):
            assert not indices, "it tripped with somebody who had been cancelled"
        return bool(indices)


def three_parties_two_of_them_cancelled() -> Plan:
    parties = Parties(Barrier(3))

    def check(ends: Ends) -> None:
        passed = parties.passed(ends)
        assert parties.barrier.broken is not passed
        assert parties.barrier.n_waiting == 0
        # Who is cancelled later concerns nobody else.
        assert passed or any(parties.cancelled)

    return Plan({name: parties.wait(name) for name in "abc"}, check, victims=["a", "b"])


def the_last_arrival_against_a_timeout() -> Plan:
    parties = Parties(Barrier(2))

    def check(ends: Ends) -> None:
        assert parties.barrier.broken is not parties.passed(ends)

    return Plan({"a": parties.wait("a", 5), "b": parties.wait("b")}, check, victims=["a", "b"])


def the_last_arrival_against_abort() -> Plan:
    parties = Parties(Barrier(2))

    def check(ends: Ends) -> None:
        parties.passed(ends)
        assert parties.barrier.broken

    tasks = {"a": parties.wait("a"), "b": parties.wait("b"), "abort": parties.abort}
    return Plan(tasks, check, victims=["a"])


def the_last_arrival_against_reset() -> Plan:
    parties = Parties(Barrier(2))

    async def reset() -> None:
        parties.barrier.reset()

    def check(ends: Ends) -> None:
        parties.passed(ends)
        blocked = list(ends.values()).count(BLOCKED)
        assert blocked == 0 or "broken" in ends.values()
        assert parties.barrier.n_waiting == blocked
        assert not parties.barrier.broken

    tasks = {"a": parties.wait("a"), "b": parties.wait("b"), "reset": reset}
    return Plan(tasks, check, may_block=True)


def a_cancel_while_the_action_runs(timeout: float | None = None) -> Plan:
    log: list[str] = []

    async def action() -> None:
        log.append("begun")
        await checkpoint()
        log.append("done")

    parties = Parties(Barrier(2, action))

    def check(ends: Ends) -> None:
        passed = parties.passed(ends)
        assert log in ([], ["begun"], ["begun", "done"])
        assert parties.barrier.broken is ("done" not in log)
        assert not passed or "done" in log
        # Who is cancelled, or late, while another one runs the action does not stop it.
        runner = parties.came[-1]
        assert log != ["begun"] or ends[runner] is CANCELLED

    tasks = {name: parties.wait(name, timeout) for name in "ab"}
    return Plan(tasks, check, victims=["a", "b"] if timeout is None else [])


def a_timeout_while_the_action_runs() -> Plan:
    return a_cancel_while_the_action_runs(5)


def abort_while_the_action_runs() -> Plan:
    parties = Parties(Barrier(2, checkpoint))

    def check(ends: Ends) -> None:
        parties.passed(ends)
        assert parties.barrier.broken

    tasks = {"a": parties.wait("a"), "b": parties.wait("b"), "abort": parties.abort}
    return Plan(tasks, check)


def a_party_too_many_while_the_action_runs() -> Plan:
    parties = Parties(Barrier(2, checkpoint))

    def check(ends: Ends) -> None:
        assert ends["c"] is CANCELLED or list(ends.values()).count(BLOCKED) == 1
        answers = [end for end in ends.values() if end not in (BLOCKED, CANCELLED)]
        # Some party is left over, but no round is split.
        assert set(answers) in ({0, 1}, {0}, {1}, {"broken"})
        assert parties.barrier.broken or parties.barrier.n_waiting == list(ends.values()).count(
            BLOCKED
        )

    tasks = {name: parties.wait(name) for name in "abc"}
    return Plan(tasks, check, victims=["c"], may_block=True)


def two_rounds_with_a_cancel() -> Plan:
    barrier = Barrier(2)
    answers: dict[str, list[object]] = {"a": [], "b": []}
    came: dict[str, int] = {"a": 0, "b": 0}

    async def wait_twice(name: str) -> None:
        for _ in range(2):
            came[name] += 1
            try:
                answers[name].append(await barrier.wait())
            except BrokenBarrierError:
                answers[name].append("broken")

    def check(ends: Ends) -> None:
        a, b = answers["a"], answers["b"]
        for first, second in zip(a, b, strict=False):
            assert {first, second} == {0, 1} or first == second == "broken"
        if ends["a"] is not CANCELLED:
            assert len(a) == len(b) == 2
            assert "broken" not in a
        elif ends["b"] is BLOCKED:
            assert came["a"] == 1, "it came, and nobody was told that it has left"
            assert b[0] in (0, 1)
            assert not barrier.broken
            assert barrier.n_waiting == 1
        elif came["a"] == 1:
            assert b == ["broken", "broken"]
        else:
            assert b[0] in (0, 1)

    return Plan(
        {name: partial(wait_twice, name) for name in "ab"}, check, victims=["a"], may_block=True
    )


# -- Pools. Their own tasks take part.


class Connection:
    pass


class Pool:
    """A pool with connections that take a step to make, and those who borrow them."""

    def __init__(
        self,
        *,
        warm: int = 0,
        fails: int = 0,
        max_size: int = 1,
        timeout: float | None = None,
        resets: bool = False,
        slow_close: bool = False,
        **options: Any,
    ) -> None:
        _connecting._chance.seed(SEED)
        self.warm = warm
        self.fails = fails
        self.made: list[Connection] = []
        # Those that are being reset, and those that have to be.
        self.resetting: list[Connection] = []
        self.dirty: list[Connection] = []
        # Whether a cancel scope has reached a reset.
        self.interrupted = False
        self.closed: list[Connection] = []
        # Those that are borrowed now; and who came, and who was served, in that order.
        self.lent: list[Connection] = []
        self.came: list[str] = []
        self.served: list[str] = []
        self.pool: ConnectionPool[Connection] = ConnectionPool(
            self.connect,
            close=self.close_slowly if slow_close else self.closed.append,
            name="pool",
            max_size=max_size,
            # No timers but those that a scenario asks for.
            timeout=timeout,
            connect_timeout=float("inf"),
            max_lifetime=None,
            max_idle=None,
            close_timeout=1,
            reset=self.reset if resets else None,
            **options,
        )
        self.resets = resets

    async def connect(self) -> Connection:
        await checkpoint()
        if self.fails:
            self.fails -= 1
            raise ConnectionError("down")
        self.made.append(Connection())
        return self.made[-1]

    async def close_slowly(self, connection: Connection) -> None:
        self.closed.append(connection)
        await checkpoint()

    async def reset(self, connection: Connection) -> None:
        assert connection not in self.lent
        assert connection not in self.resetting
        self.resetting.append(connection)
        try:
            await checkpoint()
            await checkpoint()
            self.dirty.remove(connection)
        except trio.Cancelled:
            self.interrupted = True
            raise
        finally:
            self.resetting.remove(connection)

    def borrow(self, name: str, timeout: float | None = None, *, discard: bool = False) -> Work:
        async def work() -> str:
            self.came.append(name)
            try:
                async with self.pool.connection(timeout) as connection:
                    assert connection not in self.closed
                    assert connection not in self.lent
                    is_dirty = connection in self.dirty
                    assert not is_dirty, "it was not reset"
                    self.served.append(name)
                    self.lent.append(connection)
                    if self.resets:
                        self.dirty.append(connection)
                    try:
                        await checkpoint()
                        if discard:
                            self.pool.discard(connection)
                    finally:
                        self.lent.remove(connection)
            except PoolClosed:
                return "closed"
            except PoolTimeout:
                return "late"
            return "served"

        return work

    async def close(self) -> None:
        await self.pool.__aexit__(None, None, None)
        # Here a cancellation comes through that was held off before.
        await checkpoint()

    async def begin(self) -> None:
        await self.pool.__aenter__()
        connections = [await self.pool.acquire() for _ in range(self.warm)]
        if self.resets:
            self.dirty += connections
        for connection in connections:
            self.pool.release(connection)

    async def end(self) -> None:
        await self.close()
        assert len(self.closed) == len(self.made) == len(set(self.closed)), "not all were closed"
        pending = self.pool._maintenance.core.tasks.pending
        assert len(pending) <= 1, "a task has not ended, besides the main one"

    def steady(self) -> None:
        inventory, core = self.pool._inventory, self.pool._maintenance.core
        waiting = [each for each in inventory.waiters if not each.done()]
        assert not (waiting and inventory.items), "a connection is idle, and somebody waits for it"
        # No new ones before there is capacity.
        assert core.size <= max(self.pool.max_size, len(self.made) - len(self.closed))

    def settled(self) -> None:
        """Check that the pool, still open, has all of its connections, and that they are idle."""
        core = self.pool._maintenance.core
        assert core.tasks.crash is None
        assert not self.pool._in_use
        assert not core.attempts
        assert {entry.state for entry in core.inventory.entries.values()} <= {State.IDLE}
        assert len(self.pool._items) == len(self.made) - len(self.closed) == core.size
        assert core.size <= self.pool.max_size
        assert not self.resetting
        idle = [entry.connection for entry in core.inventory.entries.values()]
        assert not any(connection in self.dirty for connection in idle), "an idle one is dirty"
        empty(core.inventory)

    def plan(
        self, tasks: dict[str, Work], check: Callable[[Ends], object] | None = None, **more: Any
    ) -> Plan:
        def all_are_served(ends: Ends) -> None:
            assert {ends[name] for name in self.came} <= {"served", CANCELLED}
            self.settled()

        def check_order_too(ends: Ends) -> None:
            (check or all_are_served)(ends)
            if self.pool.max_size <= 1:
                fair = [name for name in self.came if name in self.served]
                assert self.served == fair, "somebody was overtaken"

        return Plan(
            tasks, check_order_too, begin=self.begin, end=self.end, always=self.steady, **more
        )


def two_borrowers_of_one_connection() -> Plan:
    pool = Pool(warm=1)
    return pool.plan({name: pool.borrow(name) for name in "ab"}, victims=["a", "b"])


def a_timeout_of_the_pool_against_release() -> Plan:
    pool = Pool(warm=1, timeout=5)

    def check(ends: Ends) -> None:
        assert set(ends.values()) <= {"served", "late", CANCELLED}
        pool.settled()

    return pool.plan({name: pool.borrow(name) for name in "ab"}, check, victims=["b"])


def a_cancel_while_a_connect_is_under_way() -> Plan:
    pool = Pool()
    return pool.plan({name: pool.borrow(name) for name in "ab"}, victims=["a"])


def a_connect_fails_while_somebody_waits() -> Plan:
    pool = Pool(fails=1)

    def check(ends: Ends) -> None:
        assert ends["a"] in ("served", "late", CANCELLED)
        assert ends["b"] == "served"
        pool.settled()

    # The next attempt is made after 0.05 seconds, or later.
    tasks = {"a": pool.borrow("a", timeout=0.01), "b": pool.borrow("b")}
    return pool.plan(tasks, check, victims=["a"])


def close_against_borrowers() -> Plan:
    pool = Pool(warm=1)

    def check(ends: Ends) -> None:
        assert {ends["a"], ends["b"]} <= {"served", "closed", CANCELLED}
        assert ends["close"] in (None, CANCELLED)
        assert pool.pool._maintenance.finished
        assert not pool.pool._inventory.waiters

    tasks = {"a": pool.borrow("a"), "b": pool.borrow("b"), "close": pool.close}
    return pool.plan(tasks, check, victims=["b", "close"])


def resize_against_borrowers() -> Plan:
    pool = Pool(warm=2, max_size=2)

    async def resize() -> None:
        await pool.pool.resize(0, 1)

    def check(ends: Ends) -> None:
        assert {ends["a"], ends["b"]} <= {"served", CANCELLED}
        pool.settled()

    tasks = {"a": pool.borrow("a"), "b": pool.borrow("b"), "resize": resize}
    plan = pool.plan(tasks, victims=["a"])
    plan.check = check  # with two connections there is no order to speak of
    return plan


def drain_against_borrowers() -> Plan:
    pool = Pool(warm=1)

    async def drain() -> None:
        await pool.pool.drain()

    tasks = {"a": pool.borrow("a"), "b": pool.borrow("b"), "drain": drain}
    return pool.plan(tasks, victims=["b"])


def a_dead_connection_with_one_in_line() -> Plan:
    pool = Pool(warm=1, slow_close=True)
    tasks = {"a": pool.borrow("a", discard=True), "b": pool.borrow("b")}
    return pool.plan(tasks, victims=["a", "b"])


def a_reset_at_the_end_of_a_block() -> Plan:
    pool = Pool(warm=1, resets=True, check_timeout=None)

    def check(ends: Ends) -> None:
        assert set(ends.values()) <= {"served", CANCELLED}
        assert not pool.interrupted, "the reset was not shielded"
        pool.settled()

    return pool.plan({name: pool.borrow(name) for name in "ab"}, check, victims=["a", "b"])


def a_reset_that_takes_too_long() -> Plan:
    pool = Pool(warm=1, resets=True, check_timeout=5)
    return pool.plan({name: pool.borrow(name) for name in "ab"}, victims=["a"], early=1)


def a_reset_against_drain() -> Plan:
    pool = Pool(warm=1, resets=True)

    async def drain() -> None:
        await pool.pool.drain()

    tasks = {"a": pool.borrow("a"), "b": pool.borrow("b"), "drain": drain}
    return pool.plan(tasks, victims=["a"])


def a_reset_against_close() -> Plan:
    pool = Pool(warm=1, resets=True)

    def check(ends: Ends) -> None:
        assert {ends["a"], ends["b"]} <= {"served", "closed", CANCELLED}
        assert ends["close"] in (None, CANCELLED)
        assert pool.pool._maintenance.finished
        assert not pool.resetting

    tasks = {"a": pool.borrow("a"), "b": pool.borrow("b"), "close": pool.close}
    return pool.plan(tasks, check, victims=["a", "close"])


SCENARIOS: list[Scenario] = [
    acquire_against_release,
    two_acquires_and_one_release,
    timeout_against_release,
    timeout_against_release_with_another_in_line,
    release_of_two_with_three_in_line,
    acquire_cancelled_in_its_checkpoint,
    refusal_cancelled_in_its_checkpoint,
    block_cancelled,
    released_too_often,
    newcomers_with_one_in_line,
    newcomers_with_one_in_line_for_a_time,
    three_parties_two_of_them_cancelled,
    the_last_arrival_against_a_timeout,
    the_last_arrival_against_abort,
    the_last_arrival_against_reset,
    a_cancel_while_the_action_runs,
    a_timeout_while_the_action_runs,
    abort_while_the_action_runs,
    a_party_too_many_while_the_action_runs,
    two_rounds_with_a_cancel,
]
POOLS: list[Scenario] = [
    two_borrowers_of_one_connection,
    a_timeout_of_the_pool_against_release,
    a_cancel_while_a_connect_is_under_way,
    a_connect_fails_while_somebody_waits,
    close_against_borrowers,
    resize_against_borrowers,
    drain_against_borrowers,
    a_dead_connection_with_one_in_line,
    a_reset_at_the_end_of_a_block,
    a_reset_that_takes_too_long,
    a_reset_against_drain,
    a_reset_against_close,
]


@pytest.mark.stress
@pytest.mark.timeout(1200 if LONG else 60)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scenario", SCENARIOS + POOLS, ids=lambda scenario: scenario.__name__)
def test_in_every_order_it_comes_out_right(scenario: Scenario, backend: str) -> None:
    # Of pools a schedule takes longer; and a scope under asyncio that is cancelled, but has not got
    # through to its task, is one choice more at each decision.
    some = scenario in POOLS or backend == "asyncio+scope"
    report = explore(scenario, backend, limit=SOME if some else LIMIT, walks=WALKS, seed=SEED)
    print(f"{scenario.__name__}, {backend}: {report}")
    assert report.everything or (some and report.complete >= 1)


# -- Mistakes, each of which must be found.


def mistake(
    name: str,
    function: Callable[..., Any],
    old: str,
    new: str,
    scenario: Scenario,
    *backends: str,
) -> list[Any]:
    """Return the arguments of a test for each of the `backends` where it can be found."""
    return [
        pytest.param(function, old, new, scenario, backend, id=f"{name}, {backend}")
        for backend in backends or BACKENDS
    ]


# What a scope does to a task that has been granted something waits for its next await. So only the
# native cancellation can come after a grant.
MISTAKES: list[Any] = [
    *mistake(
        "a grant that comes too late is dropped",
        Semaphore.acquire,
        "if self._queue.leave(waiter):\n                self._queue.put(_PERMIT)",
        "pass",
        acquire_against_release,
        "asyncio",
    ),
    *mistake(
        "a connection that comes too late is dropped",
        ConnectionPool._take,
        "inventory.put(found)",
        "pass",
        two_borrowers_of_one_connection,
        "asyncio",
    ),
    *mistake(
        "who is cancelled is served",
        HandoffQueue.give,
        "continue  # cancelled",
        "return  # cancelled",
        newcomers_with_one_in_line,
    ),
    *mistake(
        "the youngest is served",
        HandoffQueue.give,
        "waiters.popitem(False)",
        "waiters.popitem()",
        two_acquires_and_one_release,
    ),
    *mistake(
        "who leaves stays in line",
        HandoffQueue.leave,
        "self.waiters.pop(waiter, _ABSENT)",
        "self.waiters.get(waiter, _ABSENT)",
        two_acquires_and_one_release,
    ),
    *mistake(
        "a cancelled task does not ask what it was given",
        HandoffQueue.leave,
        "item: T | None = end_wait(waiter)",
        "item = end_wait(waiter) and None",
        acquire_against_release,
        "asyncio",
    ),
    *mistake(
        "a checkpoint keeps the permit",
        Semaphore._checkpoint,
        "self._queue.put(_PERMIT)",
        "pass",
        acquire_cancelled_in_its_checkpoint,
    ),
    *mistake(
        "a refusal gives a permit",
        Semaphore._checkpoint,
        "if acquired:",
        "if True:",
        refusal_cancelled_in_its_checkpoint,
    ),
    *mistake(
        "a block keeps the permit",
        Semaphore.__aexit__,
        "self.release()",
        "if exc_type is None:\n            self.release()",
        block_cancelled,
    ),
    *mistake(
        "release claims nothing",
        BoundedSemaphore.release,
        "self._held.pop()",
        "self._held[-1]",
        released_too_often,
    ),
    *mistake(
        "a bounded release wakes nobody",
        BoundedSemaphore.release,
        "self._queue.put(_PERMIT)",
        "self._items.append(_PERMIT)",
        released_too_often,
    ),
    *mistake(
        "who came while the action ran is not told",
        _Round.wake,
        "wake_all(latecomers)",
        "pass",
        a_party_too_many_while_the_action_runs,
    ),
    *mistake(
        "a round trips with who is gone",
        Barrier.wait,
        "if any(",
        "if False and any(",
        three_parties_two_of_them_cancelled,
    ),
    *mistake(
        "who ran the action is not told of abort",
        _Rounds.trip,
        "is not _TRIPPED:\n            return False",
        "is not _TRIPPED:\n            return True",
        abort_while_the_action_runs,
    ),
    *mistake(
        "nobody is told of a break",
        _Round.break_,
        "            if not self.woken:\n                self.wake()\n",
        "",
        the_last_arrival_against_abort,
    ),
    *mistake(
        "reset forgets who waits",
        Barrier.reset,
        '        round.break_("reset", although_full=True)\n',
        "",
        the_last_arrival_against_reset,
    ),
    *mistake(
        "a cancel breaks the next round",
        Barrier.wait,
        'round.break_("cancelled")\n                round.leave',
        'rounds.current().break_("cancelled")\n                round.leave',
        two_rounds_with_a_cancel,
        "asyncio",
    ),
    *mistake(
        "a cancel breaks a full round",
        Barrier.wait,
        'round.break_("cancelled")\n                round.leave',
        'round.break_("cancelled", although_full=True)\n                round.leave',
        a_cancel_while_the_action_runs,
    ),
    *mistake(
        "a timeout breaks a full round",
        Barrier.wait,
        'round.break_("timeout")',
        'round.break_("timeout", although_full=True)',
        a_timeout_while_the_action_runs,
    ),
    *mistake(
        "an idle connection is dropped",
        ConnectionPool._take,
        "self._undo(entry)",
        "pass",
        two_borrowers_of_one_connection,
    ),
    *mistake(
        "a retired connection is dropped",
        Inventory.put,
        "self.hand_over(item)",
        "pass",
        drain_against_borrowers,
        "asyncio",
    ),
    *mistake(
        "close tells nobody",
        Inventory.close,
        "self.dispatch()",
        "self.wake()",
        close_against_borrowers,
    ),
    *mistake(
        "nobody looks after a close",
        Closing._forget,
        "self._core.wake()",
        "pass",
        a_dead_connection_with_one_in_line,
    ),
    *mistake(
        "a connection whose reset was cancelled is lent",
        Validation._finish_reset,
        'ConnectionError("reset() was cancelled")',
        "None",
        a_reset_at_the_end_of_a_block,
        "asyncio",
    ),
    *mistake(
        "a connection whose reset was cancelled is lost",
        Validation._finish_reset,
        'self._core.post(partial(self._validated, entry, "reset", error))',
        "pass",
        a_reset_at_the_end_of_a_block,
        "asyncio",
    ),
    *mistake(
        "a reset is not shielded",
        Validation._finish_reset,
        "with shielded_scope() as scope:",
        "from anyio import CancelScope\n            with CancelScope() as scope:",
        a_reset_at_the_end_of_a_block,
        "trio",
    ),
    *mistake(
        "an outage lasts",
        Backoff.limit,
        "return max(0, retries - under_way)",
        "return 0",
        a_connect_fails_while_somebody_waits,
    ),
]


@pytest.mark.stress
@pytest.mark.parametrize(("function", "old", "new", "scenario", "backend"), MISTAKES)
def test_a_mistake_is_found(
    function: Callable[..., Any], old: str, new: str, scenario: Scenario, backend: str
) -> None:
    # While it is still right, trio takes note of the code that it must not interrupt.
    replay(scenario, backend, [])
    with mutated(function, (old, new)):
        with pytest.raises(Found) as found:
            explore(scenario, backend, limit=LIMIT, seed=SEED)
        with pytest.raises(Found) as again:
            replay(scenario, backend, found.value.schedule)
    assert again.value.story == found.value.story
    print(found.value)
    # The mistake is gone.
    replay(scenario, backend, [])


# -- The explorer itself.


def plain_tasks(names: str, steps: int, seen: list[str], **more: Any) -> Plan:
    """Tasks with so many steps that have nothing to do with one another."""
    log: list[str] = []

    async def work(name: str) -> None:
        for _ in range(steps - 1):
            log.append(name)
            await checkpoint()
        log.append(name)

    return Plan(
        {name: partial(work, name) for name in names},
        lambda _: seen.append("".join(log)),
        **more,
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_all_orders_are_tried_and_each_only_once(backend: str) -> None:
    seen: list[str] = []
    report = explore(partial(plain_tasks, "ab", 3, seen), backend, limit=1000)
    assert report.everything
    assert len(seen) == len(set(seen)) == 20  # 6! / (3! 3!)
    seen.clear()
    report = explore(partial(plain_tasks, "abc", 2, seen), backend, limit=1000, walks=10)
    assert report.everything
    assert report.walks == 0
    assert sum(report.schedules) == len(seen) == len(set(seen)) == 90  # 6! / (2! 2! 2!)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_victim_is_cancelled_at_each_point(backend: str) -> None:
    seen: list[str] = []
    report = explore(partial(plain_tasks, "a", 4, seen, victims="a"), backend, limit=1000)
    assert report.everything
    assert set(seen) == {"a", "aa", "aaa", "aaaa"}


def test_the_empty_schedule_is_what_asyncio_does() -> None:
    seen: list[str] = []
    plan = plain_tasks("abc", 3, seen)

    async def main() -> None:
        await asyncio.gather(*(work() for work in plan.tasks.values()))

    asyncio.run(main())
    plan.check({})
    replay(partial(plain_tasks, "abc", 3, seen), "asyncio", [])
    assert seen == ["abcabcabc", "abcabcabc"]


@pytest.mark.parametrize("backend", BACKENDS)
def test_time_passes_only_so_often_while_somebody_could_go_on(backend: str) -> None:
    late: list[int] = []

    def scenario(early: int) -> Plan:
        async def wait() -> bool:
            return await Semaphore(0).acquire(timeout=3600)

        async def work() -> None:
            await checkpoint()

        def check(ends: Ends) -> None:
            assert ends == {"wait": False, "work": None}
            late.append(1)

        return Plan({"wait": wait, "work": work}, check, early=early)

    counts = []
    for early in range(2):
        assert explore(partial(scenario, early), backend, limit=10_000).everything
        counts.append(len(late))
        late.clear()
    assert counts == sorted(set(counts))


@pytest.mark.parametrize("backend", BACKENDS)
def test_in_the_middle_of_a_step_others_can_be_cancelled(backend: str) -> None:
    seen: list[str] = []

    def scenario() -> Plan:
        semaphore = Semaphore(0)

        async def work() -> None:
            before = was_cancelled("waiter")
            moment()
            seen.append(f"{before} {was_cancelled('waiter')} {has_to_leave('waiter')}")
            semaphore.release()

        async def wait() -> None:
            await semaphore.acquire()

        return Plan({"waiter": wait, "work": work}, bool, victims=["waiter"], parked=1)

    explore(scenario, backend, limit=100)
    assert set(seen) == {"False False False", "False True True", "True True True"}
    story = replay(scenario, backend, [(1, 1)])
    assert any(line.startswith("  1: and meanwhile waiter is cancelled") for line in story)


def wrong(backend: str, match: str, **more: Any) -> list[str]:
    """Explore a scenario in which something is wrong; return the story."""

    def scenario() -> Plan:
        return Plan(**{"check": bool, **more})

    with pytest.raises(Found, match=match) as found:
        explore(scenario, backend, limit=200)
    with pytest.raises(Found, match=match) as again:
        replay(scenario, backend, found.value.schedule)
    assert again.value.story == found.value.story
    assert f'replay(scenario, "{backend}", {found.value.schedule})' in str(found.value)
    assert asyncio._get_running_loop() is None
    assert not trio.lowlevel.in_trio_run()
    return found.value.story


async def sleep_forever() -> None:
    await Semaphore(0).acquire()


async def swallow() -> str:
    try:
        await sleep_forever()
    except BaseException:
        return "not me"
    return "never"


async def spin() -> None:
    while True:
        await checkpoint()


async def fail() -> None:
    raise KeyError("here")


def refuse(_: object = None) -> None:
    raise ValueError("no")


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_found(backend: str) -> None:
    wrong(backend, "deadlock: blocked for ever is a", tasks={"a": sleep_forever})
    wrong(backend, r"a raised KeyError\('here'\)", tasks={"a": fail})
    wrong(backend, "ValueError: no", tasks={"a": checkpoint_only}, check=refuse)
    wrong(backend, "ValueError: no", tasks={"a": checkpoint_only}, always=refuse)
    wrong(backend, r"begin raised KeyError", tasks={}, begin=fail)
    wrong(backend, "the end does not end", tasks={}, end=sleep_forever, may_block=True)
    story = wrong(backend, "no end after", tasks={"a": spin})
    assert len(story) < 100
    story = wrong(
        backend,
        "the cancellation of a was swallowed, it ended: not me",
        tasks={"a": swallow},
        victims=["a"],
        may_block=True,
    )
    assert "a is cancelled (instead of: nothing happens any more)" in story[1]
    assert story[2].endswith("a goes on, and ends: not me")


async def checkpoint_only() -> None:
    await checkpoint()


def test_who_is_cancelled_by_nobody_is_an_error() -> None:
    async def cancel() -> None:
        raise asyncio.CancelledError

    wrong("asyncio", "a was cancelled by nobody", tasks={"a": cancel})


def test_a_complaint_of_the_event_loop_is_an_error() -> None:
    async def work() -> None:
        asyncio.get_running_loop().call_soon(refuse)
        await checkpoint()

    wrong("asyncio", "the event loop complains: .*ValueError", tasks={"a": work})


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_schedule_that_does_not_fit_is_refused(backend: str) -> None:
    scenario = partial(plain_tasks, "ab", 2, [])
    with pytest.raises(ValueError, match="there is no decision 1000"):
        replay(scenario, backend, [(1000, 1)])
    with pytest.raises(ValueError, match="there is no choice 2 at decision 1"):
        replay(scenario, backend, [(1, 2)])
    with pytest.raises(ValueError, match="the backend must be one of"):
        replay(scenario, "curio", [])


def test_a_scenario_that_does_not_do_the_same_each_time_is_to_blame() -> None:
    runs: list[int] = []

    def scenario() -> Plan:
        runs.append(1)
        check = refuse if len(runs) == 1 else bool
        return Plan({"a": checkpoint_only}, check)

    with pytest.raises(Found, match="but not when it was done again"):
        explore(scenario, "asyncio", limit=1)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_same_seed_explores_the_same(backend: str) -> None:
    seen: list[str] = []
    scenario = partial(plain_tasks, "abcd", 3, seen)
    runs = []
    for _ in range(2):
        report = explore(scenario, backend, limit=50, walks=10, seed=SEED)
        assert not report.everything
        assert report.complete == 1
        assert sum(report.schedules) == 50
        assert report.walks == 10
        runs.append(seen.copy())
        seen.clear()
    assert runs[0] == runs[1]
    assert len(set(runs[0])) > 50


def test_a_random_walk_finds_a_mistake_and_prints_how_to_see_it_again() -> None:
    with mutated(HandoffQueue.give, ("continue  # cancelled", "return  # cancelled")):
        with pytest.raises(Found) as found:
            explore(newcomers_with_one_in_line, "asyncio", limit=0, walks=1000, seed=SEED)
        assert f'replay(newcomers_with_one_in_line, "asyncio", {found.value.schedule})' in str(
            found.value
        )
        assert f"seed: {SEED}" in str(found.value)
        with pytest.raises(Found, match="CANCELLED"):
            replay(newcomers_with_one_in_line, "asyncio", found.value.schedule)


def test_the_story_tells_who_went_on_and_how_far() -> None:
    story = replay(acquire_against_release, "asyncio", [(1, 1)])
    assert [re.sub(r":\d+$", "", line) for line in story] == [
        "  0: acquire goes on, to _semaphore.py",
        "  1: acquire is cancelled (instead of: release goes on)",
        "  2: release goes on, and ends: None",
        "     acquire goes on, and ends: CANCELLED",
    ]
