"""What threads do to one another, in every order in which their bytecodes can run.

What must live here: scenarios, that is a few threads, what they do to one shared object, and what
must be true afterwards whatever the order; and mutants, which show that a mistake would be found.
How the orders are made is in `explorer`.

``AIOSYNC_EXPLORE=long`` tries more of them, for minutes.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from contextlib import ExitStack
from itertools import repeat
from types import SimpleNamespace
from typing import Any

import pytest
from anyio import WouldBlock
from support import explorer
from support.explorer import Found, Plan, Scenario, explore, mutated, replay
from support.helpers import LONG

from aiosync import (
    Barrier,
    BoundedSemaphore,
    BrokenBarrierError,
    ConnectionPool,
    Semaphore,
    as_threading,
)
from aiosync._barrier import _Round, _Rounds
from aiosync._handoff import HandoffQueue
from aiosync._park import run_in_thread, thread_waiter
from aiosync._pool._entry import FOREVER, Failure, PoolEntry, State
from aiosync._pool._inventory import Inventory

LIMIT, WALKS, PREEMPTIONS = (30_000, 5_000, 3) if LONG else (1_500, 100, 2)
SEED = 20_240_229


# -- Semaphores.


def settled(semaphore: Semaphore, free: int) -> None:
    """Check that so many permits are free, and that nobody stands in line any more."""
    queue = semaphore._queue
    assert semaphore.value == free, f"{semaphore.value} permits are free, not {free}"
    assert not queue.waiters, "a stale waiter"
    assert not queue.granted, "an item for a waiter that has left"


def acquire_against_release() -> Plan:
    semaphore = Semaphore(0)
    view = as_threading(semaphore)
    got: list[bool] = []

    def acquire() -> None:
        got.append(view.acquire())

    def release() -> None:
        view.release()

    def check(_: list[int]) -> None:
        assert got == [True]
        settled(semaphore, 0)

    return Plan([acquire, release], check)


def two_acquires_and_one_release() -> Plan:
    semaphore = Semaphore(0)
    view = as_threading(semaphore)
    got: list[int] = []

    def first() -> None:
        view.acquire()
        got.append(0)

    def second() -> None:
        view.acquire()
        got.append(1)

    def release() -> None:
        view.release()

    def check(blocked: list[int]) -> None:
        assert len(got) == 1
        assert blocked == [1 - got[0]]
        assert semaphore.value == 0
        assert len(semaphore._queue.waiters) == 1

    return Plan([first, second, release], check, may_block=True)


def two_acquires_and_one_release_in_the_order_in_which_they_came() -> Plan:
    plan = two_acquires_and_one_release()
    genuine = plan.check

    def check(blocked: list[int]) -> None:
        genuine(blocked)
        assert blocked == [1], "the one who came later was served first"

    plan.check = check
    plan.parked = 1
    return plan


def two_threads_take_turns() -> Plan:
    semaphore = Semaphore()
    view = as_threading(semaphore)
    inside: list[int] = []
    most: list[int] = []

    def enter() -> None:
        with view:
            inside.append(1)
            most.append(len(inside))
            inside.pop()

    def enter_too() -> None:
        enter()

    def check(_: list[int]) -> None:
        assert most == [1, 1]
        settled(semaphore, 1)

    return Plan([enter, enter_too], check)


def timeout_against_grant() -> Plan:
    semaphore = Semaphore(0)
    view = as_threading(semaphore)
    got: list[bool] = []

    def acquire() -> None:
        got.append(view.acquire(timeout=5))

    def release() -> None:
        view.release()

    def check(_: list[int]) -> None:
        assert len(got) == 1
        settled(semaphore, 0 if got[0] else 1)

    return Plan([acquire, release], check)


def timeout_against_grant_with_another_in_line() -> Plan:
    semaphore = Semaphore(0)
    view = as_threading(semaphore)
    got: list[tuple[str, bool]] = []

    def acquire_in_time() -> None:
        got.append(("first", view.acquire(timeout=5)))

    def acquire() -> None:
        got.append(("second", view.acquire()))

    def release() -> None:
        view.release()

    def check(blocked: list[int]) -> None:
        if blocked:
            assert blocked == [1]
            assert got == [("first", True)]
        else:
            assert sorted(got) == [("first", False), ("second", True)]
            settled(semaphore, 0)
        assert semaphore.value == 0

    return Plan([acquire_in_time, acquire, release], check, parked=2, may_block=True)


def release_of_two_against_two_acquires() -> Plan:
    semaphore = Semaphore(0)
    view = as_threading(semaphore)
    got: list[bool] = []

    def acquire() -> None:
        got.append(view.acquire())

    def acquire_too() -> None:
        got.append(view.acquire())

    def release() -> None:
        view.release(2)

    def check(_: list[int]) -> None:
        assert got == [True, True]
        settled(semaphore, 0)

    return Plan([acquire, acquire_too, release], check)


def acquire_nowait_against_release_with_a_waiter() -> Plan:
    semaphore = Semaphore(0)
    view = as_threading(semaphore)
    got: list[str] = []

    def wait() -> None:
        view.acquire()
        got.append("waiter")

    def release() -> None:
        view.release()

    def snatch() -> None:
        try:
            semaphore.acquire_nowait()
            got.append("newcomer")
        except WouldBlock:
            pass

    def check(_: list[int]) -> None:
        assert got == ["waiter"]
        settled(semaphore, 0)

    return Plan([wait, release, snatch], check, parked=1)


def two_releases_against_a_waiter() -> Plan:
    semaphore = Semaphore(0)
    view = as_threading(semaphore)
    got: list[bool] = []

    def acquire() -> None:
        got.append(view.acquire())

    def release() -> None:
        view.release()

    def release_too() -> None:
        view.release()

    def check(_: list[int]) -> None:
        assert got == [True]
        settled(semaphore, 1)

    return Plan([acquire, release, release_too], check, parked=1)


def two_releases_of_one_permit() -> Plan:
    semaphore = BoundedSemaphore(2)
    view = as_threading(semaphore)
    view.acquire()
    outcomes: list[str] = []

    def release() -> None:
        try:
            view.release()
            outcomes.append("released")
        except ValueError:
            outcomes.append("refused")

    def release_too() -> None:
        release()

    def check(_: list[int]) -> None:
        assert sorted(outcomes) == ["refused", "released"]
        assert not semaphore._held
        settled(semaphore, 2)

    return Plan([release, release_too], check)


def releases_of_two_and_of_one_with_two_held() -> Plan:
    semaphore = BoundedSemaphore(2)
    view = as_threading(semaphore)
    view.acquire()
    view.acquire()
    released: list[int] = []

    def release_two() -> None:
        try:
            view.release(2)
            released.append(2)
        except ValueError:
            pass

    def release_one() -> None:
        try:
            view.release()
            released.append(1)
        except ValueError:
            pass

    def check(_: list[int]) -> None:
        # Both may be refused; see BoundedSemaphore.release.
        assert released in ([], [1], [2])
        assert len(semaphore._held) == 2 - sum(released)
        settled(semaphore, sum(released))

    return Plan([release_two, release_one], check)


# -- Barriers.


def rounds_from(first: _Round) -> list[_Round]:
    found: list[_Round] = []
    following: _Round | None = first
    while following is not None:
        found.append(following)
        following = following.decided.get("next")
    return found


class Parties:
    """The threads of a barrier, and what `wait` has answered to each."""

    def __init__(self, barrier: Barrier) -> None:
        self.barrier = barrier
        self.view = as_threading(barrier)
        self.first = barrier._rounds.latest
        self.outcomes: dict[str, list[int | str]] = {}

    def wait(self, name: str, timeout: float | None = None) -> None:
        answers = self.outcomes.setdefault(name, [])
        try:
            answers.append(self.view.wait(timeout))
        except BrokenBarrierError:
            answers.append("broken")

    def party(self, name: str, timeout: float | None = None) -> Callable[[], None]:
        """Return what a thread does that waits once."""

        def wait() -> None:
            self.wait(name, timeout)

        return wait

    def abort(self) -> None:
        self.view.abort()

    def reset(self) -> None:
        self.view.reset()

    def of_round(self, number: int) -> list[int | str]:
        return sorted(
            (answers[number] for answers in self.outcomes.values() if len(answers) > number),
            key=str,
        )

    def settled(self, waiting: int = 0) -> None:
        *over, last = rounds_from(self.first)
        assert not any(round.threads or round.waiters for round in over), "a stale sleeper"
        assert not last.waiters
        assert len(last.threads) == self.barrier.n_waiting == waiting


def two_parties_arrive_together() -> Plan:
    parties = Parties(Barrier(2))

    def check(_: list[int]) -> None:
        assert parties.of_round(0) == [0, 1]
        assert not parties.barrier.broken
        parties.settled()

    return Plan([parties.party("a"), parties.party("b")], check)


def three_parties_arrive_together() -> Plan:
    parties = Parties(Barrier(3))

    def check(_: list[int]) -> None:
        assert parties.of_round(0) == [0, 1, 2]
        parties.settled()

    return Plan([parties.party("a"), parties.party("b"), parties.party("c")], check)


def wait_against_abort() -> Plan:
    parties = Parties(Barrier(2))

    def check(_: list[int]) -> None:
        assert parties.of_round(0) == ["broken"]
        assert parties.barrier.broken
        parties.settled()

    return Plan([parties.party("a"), parties.abort], check)


def two_waits_against_abort() -> Plan:
    parties = Parties(Barrier(2))

    def check(_: list[int]) -> None:
        assert parties.of_round(0) in ([0, 1], ["broken", "broken"])
        assert parties.barrier.broken
        parties.settled()

    return Plan([parties.party("a"), parties.party("b"), parties.abort], check)


def wait_against_reset() -> Plan:
    parties = Parties(Barrier(2))

    def check(blocked: list[int]) -> None:
        assert parties.of_round(0) == ([] if blocked else ["broken"])
        assert not parties.barrier.broken
        parties.settled(len(blocked))

    return Plan([parties.party("a"), parties.reset], check, may_block=True)


def two_waits_against_reset() -> Plan:
    parties = Parties(Barrier(2))

    def check(blocked: list[int]) -> None:
        if blocked:  # one came before, one afterwards
            assert len(blocked) == 1
            assert parties.of_round(0) == ["broken"]
        else:
            assert parties.of_round(0) in ([0, 1], ["broken", "broken"])
        assert not parties.barrier.broken
        parties.settled(len(blocked))

    return Plan(
        [parties.party("a"), parties.party("b"), parties.reset],
        check,
        may_block=True,
    )


def the_last_arrival_against_a_timeout() -> Plan:
    parties = Parties(Barrier(2))

    def check(_: list[int]) -> None:
        outcomes = parties.of_round(0)
        assert outcomes in ([0, 1], ["broken", "broken"])
        assert parties.barrier.broken is (outcomes != [0, 1])
        parties.settled()

    return Plan([parties.party("a", 5), parties.party("b")], check)


def the_last_arrival_and_its_action_against_a_timeout() -> Plan:
    ran: list[int] = []
    parties = Parties(Barrier(2, lambda: ran.append(1)))

    def check(_: list[int]) -> None:
        outcomes = parties.of_round(0)
        assert (outcomes, ran) in (([0, 1], [1]), (["broken", "broken"], []))
        parties.settled()

    return Plan([parties.party("a", 5), parties.party("b")], check)


def an_action_against_abort() -> Plan:
    ran: list[int] = []
    parties = Parties(Barrier(2, lambda: ran.append(1)))

    def check(_: list[int]) -> None:
        outcomes = parties.of_round(0)
        assert outcomes in ([0, 1], ["broken", "broken"])
        assert len(ran) <= 1
        assert outcomes != [0, 1] or ran == [1]
        assert parties.barrier.broken
        parties.settled()

    return Plan(
        [parties.party("a"), parties.party("b"), parties.abort],
        check,
        parked=1,
    )


def a_party_too_many_while_the_action_runs() -> Plan:
    ran: list[int] = []
    parties = Parties(Barrier(2, lambda: ran.append(1)))

    def check(blocked: list[int]) -> None:
        assert len(blocked) == 1
        assert parties.of_round(0) == [0, 1]
        assert ran == [1]
        parties.settled(1)

    return Plan(
        [parties.party("a"), parties.party("b"), parties.party("c")],
        check,
        parked=1,
        may_block=True,
    )


def two_rounds_and_abort() -> Plan:
    parties = Parties(Barrier(2))

    def arrive_twice() -> None:
        parties.wait("a")
        parties.wait("a")

    def arrive_twice_too() -> None:
        parties.wait("b")
        parties.wait("b")

    def check(_: list[int]) -> None:
        first, second = parties.of_round(0), parties.of_round(1)
        assert first in ([0, 1], ["broken", "broken"])
        assert second in ([0, 1], ["broken", "broken"])
        assert first == [0, 1] or second != [0, 1], "a broken barrier has mended itself"
        assert parties.barrier.broken
        parties.settled()

    return Plan([arrive_twice, arrive_twice_too, parties.abort], check, parked=1)


def three_threads_in_rounds_of_two_and_abort() -> Plan:
    parties = Parties(Barrier(2))

    def arrive_twice() -> None:
        parties.wait("a")
        parties.wait("a")

    def arrive_and_abort() -> None:
        parties.wait("c")
        parties.view.abort()

    def check(blocked: list[int]) -> None:
        answers = [answer for each in parties.outcomes.values() for answer in each]
        passed = [answer for answer in answers if answer != "broken"]
        # Each round that tripped gave each place once.
        assert sorted(passed, key=str) in ([0, 1], [0, 0, 1, 1])
        if blocked:  # the one that should abort has found nobody to wait with
            assert blocked == [2]
        else:
            assert parties.barrier.broken
        parties.settled(len(blocked))

    return Plan(
        [arrive_twice, parties.party("b"), arrive_and_abort],
        check,
        parked=1,
        may_block=True,
    )


# -- The queue on its own.


def empty(queue: HandoffQueue[Any]) -> None:
    assert not queue.waiters, "a stale waiter"
    assert not queue.granted, "an item for a waiter that has left"


def put_against_take_or() -> Plan:
    queue: HandoffQueue[str] = HandoffQueue()
    got: list[str | None] = []

    def put() -> None:
        queue.put("item")

    def take() -> None:
        got.append(queue.get_nowait(None))

    def check(_: list[int]) -> None:
        assert (got, list(queue.items)) in ((["item"], []), ([None], ["item"]))
        empty(queue)

    return Plan([put, take], check)


def put_many_against_get_nowait_with_a_waiter() -> Plan:
    queue: HandoffQueue[bool] = HandoffQueue()
    got: list[str] = []

    def wait() -> None:
        run_in_thread(queue.wait(thread_waiter(), None, False))
        got.append("waiter")

    def put() -> None:
        queue.put_many(True, 1)

    def snatch() -> None:
        if queue.get_nowait(False):
            got.append("newcomer")

    def check(_: list[int]) -> None:
        assert got == ["waiter"]
        empty(queue)

    return Plan([wait, put, snatch], check, parked=1)


def put_against_join() -> Plan:
    queue: HandoffQueue[str] = HandoffQueue()
    got: list[str | None] = []

    def put() -> None:
        queue.put("item")

    def wait() -> None:
        got.append(run_in_thread(queue.wait(thread_waiter(), None, None)))

    def check(_: list[int]) -> None:
        assert got == ["item"]
        assert not queue.free()
        empty(queue)

    return Plan([put, wait], check)


def put_against_leave() -> Plan:
    """A cancellation against a grant: `leave` is all that who is cancelled does."""
    queue: HandoffQueue[str] = HandoffQueue()
    left: list[str | None] = []

    def put() -> None:
        queue.put("item")

    def join_and_leave() -> None:
        waiter = thread_waiter()
        queue.join(waiter)
        left.append(queue.leave(waiter))

    def check(_: list[int]) -> None:
        assert (left, list(queue.items)) in (([None], ["item"]), (["item"], []))
        empty(queue)

    return Plan([put, join_and_leave], check)


def put_against_leave_and_a_latecomer() -> Plan:
    """The dispatcher finds the only waiter over, and puts the item back as another one joins."""
    queue: HandoffQueue[str] = HandoffQueue()
    got: list[str | None] = []

    def wait_in_time() -> None:
        got.append(run_in_thread(queue.wait(thread_waiter(), 5, None)))

    def put() -> None:
        queue.put("item")

    def wait() -> None:
        got.append(run_in_thread(queue.wait(thread_waiter(), None, None)))

    def check(blocked: list[int]) -> None:
        assert got.count("item") == 1
        assert blocked == ([] if len(got) == 2 else [2])
        assert not blocked or got == ["item"]
        assert not queue.free()
        assert not queue.granted

    return Plan([wait_in_time, put, wait], check, parked=1, may_block=True)


def put_against_leave_with_another_in_line() -> Plan:
    queue: HandoffQueue[str] = HandoffQueue()
    got: list[str | None] = []

    def wait_in_time() -> None:
        got.append(run_in_thread(queue.wait(thread_waiter(), 5, None)))

    def wait() -> None:
        got.append(run_in_thread(queue.wait(thread_waiter(), 5, None)))

    def put() -> None:
        queue.put("item")

    def check(_: list[int]) -> None:
        assert len(got) == 2
        assert got.count("item") + queue.free() == 1
        empty(queue)

    return Plan([wait_in_time, wait, put], check, parked=2)


def two_puts_against_two_waiters() -> Plan:
    queue: HandoffQueue[str] = HandoffQueue(["a"])
    got: list[str | None] = []

    def wait() -> None:
        got.append(run_in_thread(queue.wait(thread_waiter(), None, None)))

    def wait_too() -> None:
        wait()

    def put() -> None:
        queue.put("b")

    def check(_: list[int]) -> None:
        assert sorted(map(str, got)) == ["a", "b"]
        assert not queue.free()
        empty(queue)

    return Plan([wait, wait_too, put], check)


def two_puts_against_join_with_a_waiter() -> Plan:
    """Each `put` gives one item only, which may be that of the other."""
    queue: HandoffQueue[str] = HandoffQueue()
    first = thread_waiter()
    queue.join(first)
    got: list[str | None] = []

    def put_a() -> None:
        queue.put("a")

    def put_b() -> None:
        queue.put("b")

    def wait() -> None:
        got.append(run_in_thread(queue.wait(thread_waiter(), None, None)))

    def check(_: list[int]) -> None:
        assert {*got, queue.leave(first)} == {"a", "b"}
        assert not queue.free()
        empty(queue)

    return Plan([put_a, put_b, wait], check)


def two_takers_from_a_bulk() -> Plan:
    queue: HandoffQueue[bool] = HandoffQueue()
    queue.bulk.append(repeat(True, 2))
    got: list[bool] = []

    def take() -> None:
        got.append(queue.get_nowait(False))

    def wait() -> None:
        got.append(run_in_thread(queue.wait(thread_waiter(), None, False)))

    def check(_: list[int]) -> None:
        # The one who does not wait is refused if it sees the other waiting.
        assert True in got
        assert got.count(True) + queue.free() == 2
        empty(queue)

    return Plan([take, wait], check)


def expiry_against_grant() -> Plan:
    queue: HandoffQueue[str] = HandoffQueue()
    got: list[str | None] = []
    woken: list[float] = []

    def wait() -> None:
        got.append(run_in_thread(queue.wait(thread_waiter(), None, None, deadline=1.0)))

    def expire() -> None:
        woken.append(queue.expire(2.0))

    def put() -> None:
        queue.put("item")

    def check(_: list[int]) -> None:
        assert len(woken) == 1
        assert (got, queue.free()) in ((["item"], 0), ([None], 1))
        empty(queue)

    return Plan([wait, expire, put], check, parked=1)


# -- The inventory of a pool.


class Idle:
    """An open `Inventory`, an entry, and a note of what maintenance would see when it is told."""

    def __init__(self) -> None:
        # How many were idle when maintenance was told, and whether the inventory was closed.
        self.calls: list[tuple[int, bool]] = []
        self.reason = Failure(RuntimeError)
        options: Any = SimpleNamespace(max_idle=FOREVER, fresh=FOREVER, lifo=True, is_closed=None)
        self.queue: Inventory[str] = Inventory(options, self.reason)
        jobs: Any = SimpleNamespace(post=self.tell)
        self.queue.jobs = jobs
        self.queue.closed = None
        self.entry: PoolEntry[str] = PoolEntry(0.0)
        self.entry.connection = self.entry.kept = "connection"
        self.entry.state = State.IDLE
        self.entry.fresh_until = FOREVER
        self.got: list[object] = []

    def tell(self, _: object) -> None:
        self.calls.append((self.queue.idle(), self.queue.closed is not None))

    def borrow(self) -> None:
        entry: object = self.queue.pick(0.0, True)
        if entry is None:
            entry = run_in_thread(self.queue.wait(thread_waiter(), None, None))
        self.got.append(entry)

    def pick(self) -> None:
        self.got.append(self.queue.pick(0.0, False))

    def put(self) -> None:
        self.queue.put(self.entry)

    def lay_aside(self) -> None:
        self.queue.lay_aside(self.entry)

    def close(self) -> None:
        self.queue.close(self.reason)

    def fail(self) -> None:
        self.queue.fail(self.reason)

    def settled(self, idle: int) -> None:
        everything = [*self.queue.items, *self.queue.stale]
        assert self.reason not in everything, "a failure is left in the queue"
        assert len(everything) == idle, f"{len(everything)} connections are idle, not {idle}"
        empty(self.queue)


def put_against_pick() -> Plan:
    idle = Idle()

    def check(_: list[int]) -> None:
        assert idle.got in ([None], [idle.entry])
        idle.settled(1 if idle.got == [None] else 0)

    return Plan([idle.put, idle.pick], check)


def put_against_a_borrower() -> Plan:
    idle = Idle()

    def check(_: list[int]) -> None:
        assert idle.got == [idle.entry]
        idle.settled(0)

    return Plan([idle.put, idle.borrow], check)


def pick_against_maintenance() -> Plan:
    idle = Idle()
    idle.queue.stale.append(idle.entry)

    def maintain() -> None:
        idle.got.append(idle.entry if idle.queue.take(idle.entry) else None)

    def check(_: list[int]) -> None:
        assert len(idle.got) == 2
        assert idle.got.count(idle.entry) == 1
        idle.settled(0)

    return Plan([idle.pick, maintain], check)


def capacity_against_join() -> Plan:
    """A pool that is resized against a checkout: what other threads see of `resize`."""
    idle = Idle()
    seen: list[bool] = []

    def make_capacity() -> None:
        idle.queue.has_capacity = True
        seen.append(bool(idle.queue.waiters))

    def check(blocked: list[int]) -> None:
        assert blocked == [0]
        assert seen == [True] or idle.calls, "maintenance does not know of the waiter"

    return Plan([idle.borrow, make_capacity], check, may_block=True)


def lay_aside_against_join() -> Plan:
    idle = Idle()

    def check(blocked: list[int]) -> None:
        assert blocked == [0]
        assert idle.calls, "maintenance does not know of a waiter, or of an entry to be checked"
        assert list(idle.queue.stale) == [idle.entry]

    return Plan([idle.borrow, idle.lay_aside], check, may_block=True)


def close_against_lay_aside() -> Plan:
    idle = Idle()

    def check(_: list[int]) -> None:
        assert (1, True) in idle.calls, "maintenance does not know that there is one to be closed"
        idle.settled(1)

    return Plan([idle.lay_aside, idle.close], check)


def close_against_join() -> Plan:
    idle = Idle()

    def check(_: list[int]) -> None:
        assert idle.got == [idle.reason]
        assert any(closed for _, closed in idle.calls)
        idle.settled(0)

    return Plan([idle.borrow, idle.close], check)


def close_against_two_who_join() -> Plan:
    idle = Idle()

    def check(_: list[int]) -> None:
        assert idle.got == [idle.reason, idle.reason]
        idle.settled(0)

    return Plan([idle.borrow, idle.borrow, idle.close], check)


def an_outage_against_put_with_a_borrower() -> Plan:
    idle = Idle()

    def check(_: list[int]) -> None:
        assert idle.got in ([idle.entry], [idle.reason])
        idle.settled(0 if idle.got == [idle.entry] else 1)

    return Plan([idle.borrow, idle.put, idle.fail], check, parked=1)


def close_against_put() -> Plan:
    idle = Idle()

    def check(_: list[int]) -> None:
        assert (1, True) in idle.calls, "maintenance does not know that there is one to be closed"
        idle.settled(1)

    return Plan([idle.put, idle.close], check)


def close_against_put_with_a_borrower() -> Plan:
    idle = Idle()

    def check(_: list[int]) -> None:
        assert idle.got in ([idle.entry], [idle.reason])
        left = 0 if idle.got == [idle.entry] else 1
        assert not left or (1, True) in idle.calls
        idle.settled(left)

    return Plan([idle.borrow, idle.put, idle.close], check, parked=1)


def borrowed_from_a_pool(**options: Any) -> tuple[ConnectionPool[Any], PoolEntry[Any]]:
    """Return a pool that has no event loop, and its only entry, which is borrowed."""
    pool: ConnectionPool[Any] = ConnectionPool(object, **options)
    pool._inventory.closed = None
    entry: PoolEntry[Any] = PoolEntry(0.0)
    entry.connection = entry.kept = object()
    entry.key = id(entry.connection)
    entry.state = State.IN_USE
    entry.uses = 1
    pool._inventory.entries[entry.key] = pool._in_use[entry.key] = entry
    return pool, entry


def _release_against_drain(**options: Any) -> Plan:
    pool, entry = borrowed_from_a_pool(**options)

    def release() -> None:
        pool.release(entry.kept)

    def drain() -> None:
        pool._maintenance.drain()

    def check(_: list[int]) -> None:
        assert pool._inventory.pick(pool._clock(), True) is None, "a drained connection is lent"

    return Plan([release, drain], check)


def release_against_drain() -> Plan:
    return _release_against_drain()


def release_of_one_that_is_checked_against_drain() -> Plan:
    return _release_against_drain(check=bool, is_closed=lambda _: False)


SCENARIOS: list[Scenario] = [
    release_against_drain,
    release_of_one_that_is_checked_against_drain,
    acquire_against_release,
    two_acquires_and_one_release,
    two_acquires_and_one_release_in_the_order_in_which_they_came,
    two_threads_take_turns,
    timeout_against_grant,
    timeout_against_grant_with_another_in_line,
    release_of_two_against_two_acquires,
    acquire_nowait_against_release_with_a_waiter,
    two_releases_against_a_waiter,
    two_releases_of_one_permit,
    releases_of_two_and_of_one_with_two_held,
    two_parties_arrive_together,
    three_parties_arrive_together,
    wait_against_abort,
    two_waits_against_abort,
    wait_against_reset,
    two_waits_against_reset,
    the_last_arrival_against_a_timeout,
    the_last_arrival_and_its_action_against_a_timeout,
    an_action_against_abort,
    a_party_too_many_while_the_action_runs,
    two_rounds_and_abort,
    three_threads_in_rounds_of_two_and_abort,
    put_against_take_or,
    put_against_join,
    put_against_leave,
    put_many_against_get_nowait_with_a_waiter,
    put_against_leave_and_a_latecomer,
    put_against_leave_with_another_in_line,
    two_puts_against_two_waiters,
    two_puts_against_join_with_a_waiter,
    two_takers_from_a_bulk,
    expiry_against_grant,
    put_against_pick,
    put_against_a_borrower,
    pick_against_maintenance,
    capacity_against_join,
    lay_aside_against_join,
    close_against_lay_aside,
    close_against_join,
    close_against_two_who_join,
    an_outage_against_put_with_a_borrower,
    close_against_put,
    close_against_put_with_a_borrower,
]


@pytest.mark.stress
@pytest.mark.timeout(1200 if LONG else 60)
@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.__name__)
def test_in_every_order_it_comes_out_right(scenario: Scenario) -> None:
    report = explore(scenario, limit=LIMIT, walks=WALKS, preemptions=PREEMPTIONS, seed=SEED)
    print(f"{scenario.__name__}: {report}")
    # All that takes one preemption fits into the budget, whatever the scenario.
    assert report.complete >= 1


# -- Mistakes, each of which must be found.

Change = tuple[Callable[..., Any], list[tuple[str, str]]]

JOIN_LOOKS_FIRST: list[Change] = [
    (
        HandoffQueue.join,
        [
            ("        self.waiters[waiter] = deadline\n", ""),
            (
                "            self.dispatch()\n",
                "            self.dispatch()\n        self.waiters[waiter] = deadline\n",
            ),
        ],
    )
]
LEAVE_LOOKS_BEFORE_IT_IS_OVER: list[Change] = [
    (
        HandoffQueue.leave,
        [
            (
                "        item: T | None = end_wait(waiter)\n",
                "        item = self.granted.pop(id(waiter), None)\n        end_wait(waiter)\n",
            ),
            ("self.granted.pop(id(waiter), None) if item is None else item", "item"),
        ],
    )
]
GRANT_WAKES_BEFORE_IT_PUBLISHES: list[Change] = [
    (
        HandoffQueue._grant,
        [
            ("        granted[key] = item\n", ""),
            ("not wake(waiter):\n", "(not wake(waiter), granted.update({key: item}))[0]:\n"),
        ],
    )
]
GRANT_DOES_NOT_LOOK_AGAIN: list[Change] = [
    (HandoffQueue._grant, [("if waiter.done() or not wake(waiter):", "if not wake(waiter):")])
]
GRANT_TAKES_BACK_WHAT_WAS_TAKEN: list[Change] = [
    (
        HandoffQueue._grant,
        [("return granted.pop(key, None) is None", "return granted.pop(key, 0) is None")],
    )
]
PUT_LOOKS_FIRST: list[Change] = [
    (
        HandoffQueue.put,
        [
            (
                "        self.items.append(item)\n        if self.waiters:\n",
                "        seen = bool(self.waiters)\n"
                "        self.items.append(item)\n        if seen:\n",
            )
        ],
    )
]
GIVE_DROPS_WHAT_NOBODY_WAITS_FOR: list[Change] = [
    (HandoffQueue.give, [("self.put_back(item)", "pass")])
]
PUT_BACK_DOES_NOT_LOOK: list[Change] = [
    (HandoffQueue.put_back, [("        if self.waiters:\n            self.dispatch()\n", "")])
]
GIVE_SERVES_THE_YOUNGEST: list[Change] = [
    (HandoffQueue.give, [("waiters.popitem(False)", "waiters.popitem()")])
]
NEWCOMERS_DO_NOT_LOOK_AT_THE_WAITERS: list[Change] = [
    (HandoffQueue.get_nowait, [("while not self.waiters:", "while True:")])
]
TRIP_ASSIGNS: list[Change] = [
    (
        _Rounds.trip,
        [
            (
                "if round.decided.setdefault(decision, _TRIPPED) is not _TRIPPED:",
                "if round.decided.get(decision) is None:\n"
                "            round.decided[decision] = _TRIPPED\n"
                "        if round.decided[decision] is not _TRIPPED:",
            )
        ],
    )
]
BREAK_ASSIGNS: list[Change] = [
    (
        _Round.break_,
        [
            (
                'decided = self.decided.setdefault("outcome", broken)',
                'decided = self.decided.get("outcome")\n        if decided is None:\n'
                '            decided = self.decided["outcome"] = broken',
            )
        ],
    )
]
THE_NEXT_ROUND_IS_ASSIGNED: list[Change] = [
    (
        _Rounds.trip,
        [
            (
                'round.decided.setdefault("next", _Round(self._indices.copy()))',
                'round.decided["next"] = _Round(self._indices.copy())',
            )
        ],
    )
]
A_PARTY_LOOKS_FIRST: list[Change] = [
    (
        Barrier.wait,
        [
            (
                "                if waiter is not None:\n",
                "                seen = round.outcome\n                if waiter is not None:\n",
            ),
            (
                "if round.outcome is not None:\n" + " " * 24 + "break\n                    if",
                "if seen is not None:\n" + " " * 24 + "break\n                    if",
            ),
        ],
    )
]
BREAK_WAKES_BEFORE_IT_TELLS: list[Change] = [
    (
        _Round.break_,
        [
            ("            self.outcome = decided\n", ""),
            (
                "                self.wake()\n",
                "                self.wake()\n            self.outcome = decided\n",
            ),
        ],
    )
]
A_THREAD_LEAVES_WITHOUT_A_WORD: list[Change] = [(_Round.leave, [("self.wake_a_thread()", "pass")])]
CLOSE_TELLS_BEFORE_IT_CLOSES: list[Change] = [
    (
        Inventory.close,
        [
            ("        self.closed = reason\n", "        self.fail(reason)\n"),
            (
                "        self.dispatch()\n",
                "        self.wake()\n        self.closed = reason\n",
            ),
        ],
    )
]
JOIN_DOES_NOT_ASK_WHETHER_IT_IS_CLOSED: list[Change] = [
    (Inventory.join, [("if self.items or self.closed is not None:", "if self.items:")])
]
IDLE_JOIN_LOOKS_FIRST: list[Change] = [
    (
        Inventory.join,
        [
            ("        self.waiters[waiter] = deadline\n", "        capacity = self.has_capacity\n"
             "        self.waiters[waiter] = deadline\n"),
            ("if self.has_capacity or", "if capacity or"),
        ],
    )
]  # fmt: skip
IDLE_PUT_LOOKS_FIRST: list[Change] = [
    (
        Inventory.put,
        [
            (
                "        if self.lifo or",
                "        waited_for = bool(self.waiters)\n        if self.lifo or",
            ),
            ("        if self.waiters or", "        if waited_for or"),
        ],
    )
]

LAY_ASIDE_LOOKS_FIRST: list[Change] = [
    (
        Inventory.lay_aside,
        [
            (
                "        self.stale.append(entry)\n",
                "        tell = self.waiters or self.closed is not None\n"
                "        self.stale.append(entry)\n",
            ),
            ("        if self.waiters or self.closed is not None:", "        if tell:"),
        ],
    )
]
JOIN_DOES_NOT_ASK_FOR_A_CHECK: list[Change] = [
    (Inventory.join, [("if self.has_capacity or self.stale:", "if self.has_capacity:")])
]
A_PUT_BACK_IS_NOT_TOLD: list[Change] = [(Inventory.put_back, [("self.wake()", "pass")])]
RELEASE_LOOKS_FIRST: list[Change] = [
    (
        ConnectionPool.release,
        [
            (
                "        entry.fresh_until = now + self._fresh\n",
                "        entry.fresh_until = min(now + self._fresh, entry.expires)\n",
            ),
            ("        if entry.fresh_until > entry.expires:\n", "        if False:\n"),
        ],
    )
]

MUTANTS: list[Any] = [
    pytest.param(changes, scenario, id=name)
    for name, changes, scenario in [
        ("join looks before it publishes", JOIN_LOOKS_FIRST, put_against_join),
        ("leave looks before it is over", LEAVE_LOOKS_BEFORE_IT_IS_OVER, timeout_against_grant),
        (
            "grant wakes before it publishes",
            GRANT_WAKES_BEFORE_IT_PUBLISHES,
            acquire_against_release,
        ),
        ("grant does not look again", GRANT_DOES_NOT_LOOK_AGAIN, put_against_leave),
        (
            "grant takes back what was taken",
            GRANT_TAKES_BACK_WHAT_WAS_TAKEN,
            put_against_leave,
        ),
        ("put looks before it publishes", PUT_LOOKS_FIRST, put_against_join),
        (
            "give drops what nobody waits for",
            GIVE_DROPS_WHAT_NOBODY_WAITS_FOR,
            timeout_against_grant,
        ),
        ("put_back does not look", PUT_BACK_DOES_NOT_LOOK, put_against_leave_and_a_latecomer),
        (
            "give serves the youngest",
            GIVE_SERVES_THE_YOUNGEST,
            two_acquires_and_one_release_in_the_order_in_which_they_came,
        ),
        (
            "newcomers do not look at the waiters",
            NEWCOMERS_DO_NOT_LOOK_AT_THE_WAITERS,
            put_many_against_get_nowait_with_a_waiter,
        ),
        ("trip assigns the outcome", TRIP_ASSIGNS, two_waits_against_abort),
        ("break assigns the outcome", BREAK_ASSIGNS, the_last_arrival_against_a_timeout),
        ("the next round is assigned", THE_NEXT_ROUND_IS_ASSIGNED, two_rounds_and_abort),
        ("a party looks before it shows itself", A_PARTY_LOOKS_FIRST, wait_against_abort),
        ("break wakes before it tells", BREAK_WAKES_BEFORE_IT_TELLS, wait_against_abort),
        (
            "a thread leaves without a word",
            A_THREAD_LEAVES_WITHOUT_A_WORD,
            three_parties_arrive_together,
        ),
        ("close tells before it closes", CLOSE_TELLS_BEFORE_IT_CLOSES, close_against_join),
        (
            "join does not ask whether it is closed",
            JOIN_DOES_NOT_ASK_WHETHER_IT_IS_CLOSED,
            close_against_join,
        ),
        ("join looks for capacity too early", IDLE_JOIN_LOOKS_FIRST, capacity_against_join),
        ("a stale entry is laid aside unseen", LAY_ASIDE_LOOKS_FIRST, lay_aside_against_join),
        ("a stale entry is kept from close", LAY_ASIDE_LOOKS_FIRST, close_against_lay_aside),
        (
            "a put back is kept from close",
            A_PUT_BACK_IS_NOT_TOLD,
            close_against_put_with_a_borrower,
        ),
        ("join does not ask for a check", JOIN_DOES_NOT_ASK_FOR_A_CHECK, lay_aside_against_join),
        (
            "release looks whether it is drained too early",
            RELEASE_LOOKS_FIRST,
            release_against_drain,
        ),
        ("a connection is put back unseen", IDLE_PUT_LOOKS_FIRST, put_against_a_borrower),
    ]
]


@pytest.mark.stress
@pytest.mark.parametrize(("changes", "scenario"), MUTANTS)
def test_a_mistake_is_found(changes: list[Change], scenario: Scenario) -> None:
    with ExitStack() as stack:
        for function, pieces in changes:
            stack.enter_context(mutated(function, *pieces))
        with pytest.raises(Found) as found:
            explore(scenario, limit=LIMIT, seed=SEED)
        with pytest.raises(Found) as again:
            replay(scenario, found.value.schedule)
    assert again.value.story == found.value.story
    print(found.value)
    # The mistake is gone.
    replay(scenario, [])


# -- The explorer itself.


def test_a_random_walk_finds_a_mistake_and_prints_how_to_see_it_again() -> None:
    with mutated(*_pairs(JOIN_LOOKS_FIRST)):
        with pytest.raises(Found) as found:
            explore(put_against_join, limit=0, walks=5_000, seed=SEED)
        assert f"replay(put_against_join, {found.value.schedule})" in str(found.value)
        assert f"seed: {SEED}" in str(found.value)
        with pytest.raises(Found, match="deadlock"):
            replay(put_against_join, found.value.schedule)


def _pairs(changes: list[Change]) -> tuple[Any, ...]:
    ((function, pieces),) = changes
    return function, *pieces


def test_the_same_seed_explores_the_same() -> None:
    reports = [
        explore(two_puts_against_two_waiters, limit=200, walks=20, seed=SEED) for _ in range(2)
    ]
    assert reports[0].schedules == reports[1].schedules
    assert reports[0].decisions == reports[1].decisions


def test_a_schedule_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="there is no decision 10000"):
        replay(put_against_take_or, [(10_000, 1)])
    with pytest.raises(ValueError, match="thread 2 can't go on at decision 1"):
        replay(put_against_take_or, [(1, 2)])


def test_the_story_tells_who_went_on_where() -> None:
    story = replay(put_against_take_or, [(3, 1)])
    assert [line.partition(":")[0].strip() for line in story] == [
        "thread 0 goes on",
        "3",
        "thread 1 goes on",
        "thread 0 goes on",
    ]


def unprotected_counter() -> Plan:
    """Two threads that lose an update if one is stopped between its read and its write."""
    total = [0]

    def add() -> None:
        total[0] = total[0] + 1

    def add_too() -> None:
        total[0] = total[0] + 1

    def check(_: list[int]) -> None:
        assert total == [2]

    return Plan([add, add_too], check)


def test_two_threads_that_only_know_plain_python_are_explored_too() -> None:
    with pytest.raises(Found, match=r"assert \[1\] == \[2\]"):
        explore(unprotected_counter, limit=100)


def test_it_stops_before_each_opcode_that_may_touch_what_is_shared() -> None:
    plan = unprotected_counter()
    stops = explorer.stops(plan.threads[0])
    # The read of the item and the write, not the load of the list.
    assert len(stops) >= 2
    assert "STORE_SUBSCR" in stops
    assert not {"LOAD_DEREF", "LOAD_CONST", "RETURN_VALUE", "RETURN_CONST"} & set(stops)
    # And one decision who begins; none when only one thread is left.
    report = explore(unprotected_counter, limit=1)
    assert report.decisions == 1 + len(stops)


def test_to_stop_before_the_other_opcodes_makes_no_difference() -> None:
    outcomes: set[tuple[int, ...]] = set()

    def scenario() -> Plan:
        board = [0, 0, 0]

        def one() -> None:
            seen = board[0]
            board[1] = seen + 1 if board[2] else 10
            board[0] = board[1]
            board.append(len(board))

        def other() -> None:
            board[2] = board[1]
            board[0] += 5
            board.append(board[0] + len(board))

        return Plan([one, other], lambda _: outcomes.add(tuple(board)))

    report = explore(scenario, limit=10_000)
    found = outcomes.copy()
    outcomes.clear()
    with explorer.stopping_everywhere():
        full = explore(scenario, limit=10_000)
    assert report.complete == full.complete == 2
    assert sum(full.schedules) > 2 * sum(report.schedules)
    assert found == outcomes
    assert len(found) > 5


@pytest.mark.slow
def test_nor_does_it_in_the_package() -> None:
    with explorer.stopping_everywhere():
        explore(put_against_leave, limit=LIMIT, seed=SEED)
        with mutated(*_pairs(GRANT_DOES_NOT_LOOK_AGAIN)), pytest.raises(Found):
            explore(put_against_leave, limit=LIMIT, seed=SEED)


def endless_loop() -> Plan:
    flag = [False]

    def spin() -> None:
        while not flag[0]:
            pass

    def set_it() -> None:
        flag[0] = True

    return Plan([spin, set_it], lambda _: None)


def test_a_thread_that_spins_for_ever_is_an_error() -> None:
    with pytest.raises(Found, match="no end after"):
        explore(endless_loop, limit=1)


def test_an_exception_of_a_thread_is_an_error() -> None:
    def scenario() -> Plan:
        def fail() -> None:
            raise KeyError("here")

        return Plan([fail], lambda _: None)

    with pytest.raises(Found, match=r"thread 0 raised KeyError\('here'\)"):
        explore(scenario, limit=1)


def test_a_thread_that_rebinds_the_variable_of_another_is_refused() -> None:
    def scenario() -> Plan:
        total = 0

        def add() -> None:
            nonlocal total
            total += 1

        return Plan([add], lambda _: None)

    with pytest.raises(TypeError, match="add rebinds total"):
        explore(scenario, limit=1)


def test_nothing_is_left_of_an_exploration() -> None:
    def tracer(frame: Any, event: str, arg: object) -> None:
        return None

    before, threads = sys.gettrace(), threading.active_count()
    sys.settrace(tracer)
    try:
        explore(put_against_take_or, limit=10)
        assert sys.gettrace() is tracer
    finally:
        sys.settrace(before)
    assert threading.active_count() == threads
    assert as_threading(Semaphore(1)).acquire(timeout=1)
    monitoring: Any = getattr(sys, "monitoring", None)
    assert monitoring is None or monitoring.get_tool(explorer.TOOL) is None
