"""What a pool decides to do, as a pure function of its situation: no event loop, no clock.

First one small case for each rule, then a simulated pool that carries the plans out, in sequences
of operations that hypothesis makes up.
"""

from __future__ import annotations

import ast
import asyncio
import gc
import itertools
import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from operator import attrgetter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import anyio
import anyio.lowlevel
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from support.helpers import LONG
from support.virtual_time import run_virtually

import aiosync
from aiosync import ConnectionPool, PoolTimeout
from aiosync._pool._backoff import (
    FIRST_DELAY,
    LONGEST_DELAY,
    OUTAGE_FAILURES,
    OUTAGE_SECONDS,
    Backoff,
)
from aiosync._pool._entry import FOREVER, IMMEDIATELY, TRANSITIONS, PoolEntry, State
from aiosync._pool._policy import SOON, Plan, Snapshot, plan

Entry = PoolEntry[str]
ACTIVE = (State.IN_USE, State.RETURNING, State.VALIDATING)
NOW = 1000.0


def options(**changed: Any) -> Any:
    """Return the options that decide what is to be done, without limits of time."""
    unlimited = dict.fromkeys(
        ("max_idle", "keepalive", "check_timeout", "max_connecting", "leak_timeout"), FOREVER
    )
    sizes = {"min_size": 0, "max_size": 10}
    return SimpleNamespace(**{**unlimited, **sizes, "overlap": True, "lifo": True, **changed})


def snapshot(
    given: Any, entries: Sequence[Entry] = (), granted: Sequence[Entry] = (), **more: Any
) -> Snapshot:
    """Return a snapshot. All idle entries are available but those that are `granted`."""
    idle = [each for each in entries if each.state is State.IDLE and each not in granted]
    return Snapshot(given, entries, sorted(idle, key=attrgetter("idle_since")), **more)


def entry(
    state: State = State.IDLE,
    *,
    since: float = NOW,
    idle_since: float = NOW,
    expires: float = FOREVER,
    fresh_until: float = FOREVER,
    created: float = 0.0,
    failures: int = 0,
    replaces: Entry | None = None,
    retired: bool = False,
    renewed: bool = False,
) -> Entry:
    made: Entry = PoolEntry(created, failures, replaces=replaces, created=created)
    made.state = state
    made.since = made.taken = since
    made.idle_since = made.keepalive_from = idle_since
    made.expires = expires
    made.fresh_until = fresh_until
    made.renewed = renewed
    if retired:
        made.retire("drain")
    return made


def situation(
    *entries: Entry,
    waiting: int = 0,
    connecting: int = 0,
    backoff: Backoff | None = None,
    connect_time: float = 0.0,
    **limits: Any,
) -> Snapshot:
    """Return a snapshot.

    :param entries: connections, and attempts to connect
    :param connecting: how many more attempts there are
    """
    backoff = backoff or Backoff()
    attempts = [each for each in entries if each.state is State.CONNECTING]
    attempts += [entry(State.CONNECTING, failures=backoff.failures) for _ in range(connecting)]
    return snapshot(
        options(**{"max_size": 3, **limits}),
        [each for each in entries if each.state is not State.CONNECTING],
        attempts=attempts,
        waiting=waiting,
        backoff=backoff,
        connect_time=connect_time,
    )


def todo(found: Plan) -> dict[str, Any]:
    """Return what a plan wants to be done, without what it leaves alone."""
    kinds = ("open", "replace", "close", "check", "admit", "overdue", "leaked")
    return {kind: getattr(found, kind) for kind in kinds if getattr(found, kind)}


def planned(*entries: Entry, **more: Any) -> dict[str, Any]:
    return todo(plan(situation(*entries, **more), NOW))


def next_look(*entries: Entry, **more: Any) -> float:
    return plan(situation(*entries, **more), NOW).look_at


class TestOpening:
    @pytest.mark.parametrize(
        ("number", "more"),
        [
            pytest.param(0, {}, id="nobody waits"),
            pytest.param(2, {"waiting": 2}, id="one for each waiter"),
            pytest.param(3, {"waiting": 5}, id="never above max_size"),
            pytest.param(1, {"waiting": 2, "connecting": 1}, id="one is under way already"),
            pytest.param(0, {"waiting": 1, "connecting": 3}, id="enough are under way"),
            pytest.param(2, {"min_size": 2}, id="min_size"),
            pytest.param(1, {"min_size": 2, "connecting": 1}, id="min_size, one is under way"),
            pytest.param(3, {"min_size": 2, "waiting": 3}, id="waiters and min_size"),
            pytest.param(2, {"waiting": 3, "max_connecting": 2}, id="max_connecting"),
            pytest.param(
                0, {"waiting": 3, "connecting": 2, "max_connecting": 2}, id="max_connecting reached"
            ),
        ],
    )
    def test_an_empty_pool(self, number: int, more: dict[str, Any]) -> None:
        assert planned(**more) == ({"open": number} if number else {})

    @pytest.mark.parametrize("state", [*ACTIVE, State.CLOSING, State.CONFIGURING])
    def test_every_connection_takes_a_place(self, state: State) -> None:
        three = [entry(state) for _ in range(3)]
        assert planned(*three, waiting=5) == {}
        assert planned(*three, waiting=5, max_size=4, connecting=1) == {}
        assert planned(*three, waiting=5, max_size=4) == {"open": 1}

    def test_waiters_rely_on_what_is_returning_for_a_moment(self) -> None:
        for state in (State.RETURNING, State.VALIDATING):
            begun = NOW - SOON / 2
            assert planned(entry(state, since=begun), waiting=1) == {}
            assert next_look(entry(state, since=begun), waiting=1) == begun + SOON
            assert next_look(entry(state, since=begun)) == FOREVER
            assert planned(entry(state, since=NOW - SOON), waiting=1) == {"open": 1}

    def test_waiters_rely_on_what_is_configured(self) -> None:
        assert planned(entry(State.CONFIGURING), waiting=1) == {}
        assert planned(entry(State.CONFIGURING), waiting=2) == {"open": 1}

    def test_waiters_rely_on_a_check_that_begins_now(self) -> None:
        stale = entry(fresh_until=NOW)
        assert planned(stale, waiting=1) == {"check": [stale]}
        assert planned(stale, waiting=2) == {"check": [stale], "open": 1}

    @pytest.mark.parametrize(("number", "expected"), [(1, True), (2, True), (3, False), (4, False)])
    def test_whether_there_is_capacity(self, number: int, expected: bool) -> None:
        used = [entry(State.IN_USE) for _ in range(number)]
        assert plan(situation(*used), NOW).has_capacity is expected
        assert plan(situation(*used, waiting=1), NOW).has_capacity is (number < 2)


class TestTheEndOfAConnection:
    def test_an_idle_one_goes_after_max_idle(self) -> None:
        old, young = entry(idle_since=NOW - 60), entry(idle_since=NOW - 59)
        assert planned(old, young, max_idle=60) == {"close": [(old, "idle")]}
        assert NOW < next_look(young, max_idle=60) <= NOW + 1

    def test_any_other_one_goes_when_it_is_idle(self) -> None:
        for state in ACTIVE:
            assert planned(entry(state, idle_since=NOW - 100), max_idle=60) == {}
            # It may become idle at any time without a word.
            assert next_look(entry(state), max_idle=60) <= NOW + 60

    def test_an_idle_one_goes_at_the_end_of_its_life(self) -> None:
        old = entry(expires=NOW)
        assert planned(old) == {"close": [(old, "lifetime")]}
        assert next_look(entry(expires=NOW + 5)) <= NOW + 5

    def test_one_that_is_borrowed_at_the_end_of_its_life_is_left_alone(self) -> None:
        assert planned(entry(State.IN_USE, expires=NOW)) == {}

    def test_an_idle_one_that_was_retired_goes_for_the_reason_it_was_retired_for(self) -> None:
        drained = entry(retired=True)
        assert planned(drained) == {"close": [(drained, "drain")]}
        assert planned(entry(State.IN_USE, retired=True)) == {}

    def test_the_place_of_a_drained_one_is_not_filled_before_it_is_closed(self) -> None:
        drained = entry(retired=True)
        assert planned(drained, max_size=1, min_size=1) == {"close": [(drained, "drain")]}
        drained.state = State.CLOSING
        assert planned(drained, max_size=1, min_size=1) == {}

    @pytest.mark.parametrize("state", [State.CLOSING, State.CLOSED])
    def test_one_that_is_closing_is_left_alone(self, state: State) -> None:
        gone = entry(state, idle_since=0, expires=NOW - 1, fresh_until=0)
        assert planned(gone, max_idle=1, waiting=0, max_size=1) == {}


class TestShrinking:
    def test_the_idle_ones_go_first_and_of_them_the_oldest(self) -> None:
        used = entry(State.IN_USE)
        old, young = entry(idle_since=NOW - 2), entry(idle_since=NOW - 1)
        assert planned(used, young, old, max_size=2) == {"close": [(old, "resize")]}
        assert planned(used, young, old, max_size=1) == {
            "close": [(old, "resize"), (young, "resize")]
        }

    def test_then_those_in_use(self) -> None:
        first, second = entry(State.IN_USE), entry(State.IN_USE)
        assert planned(first, second, max_size=1) == {"close": [(first, "resize")]}

    def test_one_that_goes_anyway_counts(self) -> None:
        assert planned(entry(State.IN_USE, retired=True), entry(), max_size=1) == {}
        old = entry(expires=NOW)
        assert planned(old, entry(), max_size=1) == {"close": [(old, "lifetime")]}
        assert planned(entry(State.CLOSING), entry(), max_size=1) == {}

    def test_those_that_are_being_made_count(self) -> None:
        idle = entry()
        assert planned(idle, connecting=1, max_size=1) == {"close": [(idle, "resize")]}
        assert planned(idle, entry(State.CONFIGURING), max_size=1) == {"close": [(idle, "resize")]}

    def test_a_replacement_does_not_count(self) -> None:
        old = entry(expires=NOW + 0.1, renewed=True)
        assert planned(old, entry(State.CONNECTING, replaces=old), max_size=1) == {}
        assert planned(old, entry(State.CONFIGURING, replaces=old), max_size=1) == {}

    def test_nothing_is_opened_as_long_as_there_are_too_many(self) -> None:
        used = [entry(State.IN_USE, retired=True) for _ in range(3)]
        assert planned(*used, waiting=4, max_size=1) == {}

    def test_a_replacement_that_finds_the_pool_full_goes(self) -> None:
        gone = entry(State.CLOSED)
        ready = entry(State.STANDBY, replaces=gone)
        found = planned(entry(State.IN_USE), ready, max_size=1)
        assert found == {"close": [(ready, "resize")]}


class TestReplacing:
    """`max_lifetime` is 100 s in these cases, so the margin is 2.5 s."""

    def old(self, state: State = State.IN_USE, left: float = 2.5, **more: Any) -> Entry:
        return entry(state, expires=NOW + left, created=NOW + left - 100, **more)

    def test_one_in_use_is_replaced_in_time(self) -> None:
        old = self.old()
        assert planned(old, max_size=1) == {"replace": [old]}
        early = self.old(left=3)
        assert planned(early, max_size=1) == {}
        assert next_look(early, max_size=1) == NOW + 0.5

    def test_the_margin_grows_with_the_time_that_it_takes_to_connect(self) -> None:
        old = self.old(left=8)
        assert planned(old, connect_time=4) == {"replace": [old]}
        assert planned(old, connect_time=3.9) == {}

    def test_but_it_is_at_most_half_of_the_life(self) -> None:
        old = self.old(left=51)
        assert planned(old, connect_time=1000) == {}
        assert next_look(old, connect_time=1000) == NOW + 1

    def test_it_is_replaced_once(self) -> None:
        assert planned(self.old(renewed=True), max_size=1) == {}

    def test_an_idle_one_within_min_size_is_replaced_too(self) -> None:
        old = self.old(State.IDLE)
        assert planned(old, min_size=1) == {"replace": [old]}
        assert planned(old, min_size=0) == {}

    def test_so_it_is_if_somebody_waits(self) -> None:
        stale = self.old(State.IDLE, fresh_until=0)
        assert planned(stale, waiting=1) == {"check": [stale], "replace": [stale]}

    def test_an_idle_one_within_min_size_is_replaced_before_max_idle(self) -> None:
        old = entry(idle_since=NOW - 97.5)
        assert planned(old, min_size=1, max_idle=100) == {"replace": [old]}
        assert planned(old, min_size=0, max_idle=100) == {}
        assert next_look(entry(idle_since=NOW), min_size=1, max_idle=100) == NOW + 97.5

    def test_the_oldest_idle_ones_are_those_that_nobody_needs(self) -> None:
        first = entry(idle_since=NOW - 99)
        second = entry(idle_since=NOW - 98)
        assert planned(first, second, min_size=1, max_idle=100) == {"replace": [second]}

    def test_an_idle_one_that_is_not_needed_may_be_borrowed_by_then(self) -> None:
        # Nobody tells when it is borrowed, so there has to be a look.
        early = self.old(State.IDLE, left=3)
        assert next_look(early, max_idle=1000) == NOW + 0.5
        # During the margin too, but not all the time.
        late = self.old(State.IDLE, left=2)
        assert NOW + 0.5 <= next_look(late, max_idle=1000) < NOW + 2

    def test_without_overlap_only_if_there_is_room(self) -> None:
        old = self.old()
        assert planned(old, max_size=1, overlap=False) == {}
        assert planned(old, max_size=2, overlap=False) == {"replace": [old]}

    def test_with_overlap_there_is_one_more_and_only_one(self) -> None:
        first, second = self.old(left=2), self.old(left=1)
        assert planned(first, second, max_size=2) == {"replace": [second]}
        second.renewed = True
        on_its_way = entry(State.CONNECTING, replaces=second)
        assert planned(first, second, on_its_way, max_size=2) == {}
        standing_by = entry(State.STANDBY, replaces=second)
        assert "replace" not in planned(first, second, standing_by, max_size=2)

    def test_as_many_as_there_is_room_for_and_the_most_urgent_first(self) -> None:
        ends = [2.0, 0.5, 1.0, 1.5]
        old = [self.old(left=left) for left in ends]
        urgent = sorted(old, key=lambda each: each.expires)
        assert planned(*old, max_size=6, overlap=False) == {"replace": urgent[:2]}
        assert planned(*old, max_size=6) == {"replace": urgent[:3]}

    def test_waiters_come_first(self) -> None:
        old = self.old()
        assert planned(old, max_size=2, waiting=1) == {"open": 1, "replace": [old]}
        assert planned(old, max_size=2, waiting=1, overlap=False) == {"open": 1}

    def test_max_connecting_holds(self) -> None:
        old = self.old()
        assert planned(old, max_size=3, waiting=1, max_connecting=1) == {"open": 1}
        assert planned(old, max_size=3, connecting=1, max_connecting=1) == {}

    def test_not_while_connecting_fails(self) -> None:
        backoff = failing(1)
        assert backoff.limit(0, NOW) > 1
        assert planned(self.old(), backoff=backoff) == {"open": 1}

    @pytest.mark.parametrize("state", ACTIVE)
    def test_when_the_replacement_is_ready_the_old_one_is_retired(self, state: State) -> None:
        old = self.old(state, renewed=True)
        ready = entry(State.STANDBY, replaces=old)
        assert planned(old, ready, max_size=1) == {"close": [(old, "lifetime")]}
        old.retire("lifetime")
        assert planned(old, ready, max_size=1) == {}

    @pytest.mark.parametrize("state", [State.CLOSING, State.CLOSED])
    def test_when_the_old_one_is_gone_the_replacement_is_admitted(self, state: State) -> None:
        old = self.old(state, renewed=True)
        ready = entry(State.STANDBY, replaces=old)
        assert planned(old, ready, max_size=1) == {"admit": [ready]}

    def test_no_more_are_admitted_than_there_is_room_for(self) -> None:
        used = entry(State.IN_USE)
        first, second = (entry(State.STANDBY, replaces=entry(State.CLOSED)) for _ in range(2))
        assert planned(used, first, second, max_size=2) == {
            "admit": [first], "close": [(second, "resize")]
        }  # fmt: skip

    def test_when_the_pool_is_closed_it_does_not_wait_for_the_old_one(self) -> None:
        old = self.old(State.IN_USE, renewed=True)
        old.retire("shutdown")
        ready = entry(State.STANDBY, replaces=old)
        assert planned(old, ready, max_size=0) == {"close": [(ready, "shutdown")]}

    def test_where_there_is_room_it_is_admitted_at_once(self) -> None:
        old = self.old(renewed=True)
        ready = entry(State.STANDBY, replaces=old)
        assert planned(old, ready, max_size=2) == {
            "close": [(old, "lifetime")], "admit": [ready]
        }  # fmt: skip

    def test_one_that_was_idle_for_long_goes_for_that_reason(self) -> None:
        old = entry(idle_since=NOW - 99, renewed=True)
        ready = entry(State.STANDBY, replaces=old)
        found = planned(old, ready, max_size=1, min_size=1, max_idle=100)
        assert found["close"] == [(old, "idle")]

    @pytest.mark.parametrize("max_idle", [50, FOREVER])
    def test_one_whose_time_is_over_is_closed_once(self, max_idle: float) -> None:
        old = entry(idle_since=NOW - 50, expires=NOW + (1 if max_idle == 50 else 0), renewed=True)
        ready = entry(State.STANDBY, replaces=old)
        closed = planned(old, ready, max_size=1, max_idle=max_idle)["close"]
        assert [each for each, _ in closed] == [old]


class TestChecking:
    def test_a_stale_one_only_if_somebody_waits(self) -> None:
        stale = entry(fresh_until=NOW)
        assert planned(stale) == {}
        assert planned(stale, waiting=1) == {"check": [stale]}
        assert planned(entry(fresh_until=NOW + 1), max_size=1, waiting=1) == {}

    @pytest.mark.parametrize("lifo", [True, False])
    def test_not_more_than_are_waited_for_in_the_order_of_use(self, lifo: bool) -> None:
        old = entry(idle_since=NOW - 2, fresh_until=NOW)
        young = entry(idle_since=NOW - 1, fresh_until=NOW)
        assert planned(old, young, waiting=1, lifo=lifo) == {"check": [young if lifo else old]}

    def test_not_those_that_one_that_is_being_checked_will_do_for(self) -> None:
        checking = entry(State.VALIDATING, since=NOW)
        stale = entry(fresh_until=NOW)
        assert planned(checking, stale, waiting=1) == {}
        assert planned(checking, stale, waiting=2) == {"check": [stale]}
        checking.since = NOW - SOON  # it may hang
        assert planned(checking, stale, waiting=1) == {"check": [stale]}

    def test_not_one_that_is_closed(self) -> None:
        old = entry(fresh_until=0, idle_since=NOW - 10)
        assert planned(old, waiting=1, max_idle=10, max_size=1) == {"close": [(old, "idle")]}

    def test_keepalive(self) -> None:
        used, checked = entry(idle_since=NOW - 10), entry(idle_since=NOW - 10)
        checked.keepalive_from = NOW - 4
        assert planned(used, checked, keepalive=10) == {"check": [used]}
        assert next_look(checked, keepalive=10) == NOW + 6
        # It may have been idle for any time when it is looked at next.
        assert next_look(entry(State.IN_USE), keepalive=10) <= NOW + 10


class TestSupervising:
    def test_a_reset_that_takes_too_long(self) -> None:
        late, early = (entry(State.RETURNING, since=NOW - ago) for ago in (5, 4))
        assert planned(late, early, check_timeout=5) == {"overdue": [late]}
        assert next_look(early, check_timeout=5) == NOW + 1

    def test_a_check_has_a_deadline_of_its_own(self) -> None:
        assert planned(entry(State.VALIDATING, since=0), check_timeout=5) == {}

    def test_a_leak_is_reported_once(self) -> None:
        leaked = entry(State.IN_USE, since=NOW - 5)
        assert planned(leaked, leak_timeout=5) == {"leaked": [leaked]}
        leaked.reported = True
        assert planned(leaked, leak_timeout=5) == {}
        assert next_look(entry(State.IN_USE, since=NOW - 4), leak_timeout=5) == NOW + 1

    def test_an_idle_one_may_leak_next(self) -> None:
        assert next_look(entry(), leak_timeout=5) == NOW + 5


def failing(times: int, *, at: float = NOW, chance: float = 1.0) -> Backoff:
    """Return what is known after so many failures in a row."""
    backoff = Backoff()
    for failures in range(times):
        backoff.failed(failures, at, at, chance)
    return backoff


class TestOutages:
    @pytest.mark.parametrize(
        ("failures", "under_way", "limit"),
        [(0, 9, FOREVER), (1, 0, 3), (1, 1, 2), (1, 3, 0), (1, 5, 0), (2, 0, 1), (2, 1, 0)],
    )
    def test_how_many_may_try_before_it_is_an_outage(
        self, failures: int, under_way: int, limit: float
    ) -> None:
        backoff = failing(failures)
        assert not backoff.is_outage
        assert backoff.limit(under_way, NOW) == limit

    def test_the_third_failure_in_a_row_begins_one(self) -> None:
        backoff = Backoff()
        begins = [backoff.failed(failures, NOW, NOW, 1.0) for failures in range(5)]
        assert begins == [False, False, True, False, False]
        assert begins.index(True) + 1 == OUTAGE_FAILURES

    @pytest.mark.parametrize(
        ("seconds", "begins"), [(OUTAGE_SECONDS - 0.1, False), (OUTAGE_SECONDS, True)]
    )
    def test_so_does_a_row_that_lasts(self, seconds: float, begins: bool) -> None:
        backoff = Backoff()
        assert not backoff.failed(0, NOW, NOW + 0.1, 1.0)
        assert backoff.failed(1, NOW + 0.1, NOW + seconds, 1.0) is begins
        assert backoff.is_outage is begins
        assert (backoff.limit(0, NOW + seconds) == 0) is begins

    def test_a_success_that_came_meanwhile_cuts_the_row_short(self) -> None:
        backoff = Backoff()
        backoff.succeeded(NOW + 9.5)
        # This one has hung for ten seconds while others connected.
        assert not backoff.failed(0, NOW, NOW + 10, 1.0)
        assert backoff.failed(1, NOW + 10, NOW + 10.5, 1.0)

    def test_attempts_under_way_together_count_as_one(self) -> None:
        backoff = Backoff()
        for _ in range(5):
            assert not backoff.failed(0, NOW, NOW, 1.0)
        assert backoff.failures == 1
        backoff.failed(1, NOW, NOW, 1.0)
        backoff.failed(0, NOW, NOW, 1.0)
        backoff.failed(1, NOW, NOW, 1.0)
        assert backoff.failures == 2

    def test_one_that_began_during_a_row_that_is_over_counts_anew(self) -> None:
        backoff = failing(2)
        backoff.succeeded(NOW)
        backoff.failed(2, NOW, NOW, 1.0)
        assert backoff.failures == 1

    @pytest.mark.parametrize("chance", [0.0, 1.0])
    def test_the_delays_double_up_to_a_bound_and_are_jittered(self, chance: float) -> None:
        expected = FIRST_DELAY
        for failures in range(OUTAGE_FAILURES, 2000):
            backoff = Backoff(failures - 1)
            backoff.failed(failures - 1, NOW, NOW, chance)
            factor = 0.5 + chance / 2
            assert backoff.next_attempt == pytest.approx(NOW + expected * factor)
            expected = min(2 * expected, LONGEST_DELAY)

    def test_a_success_ends_it(self) -> None:
        backoff = failing(4)
        assert backoff.succeeded(NOW)
        assert not backoff.succeeded(NOW)
        assert not failing(2).succeeded(NOW)
        assert not backoff.is_outage
        assert backoff.limit(9, NOW) == FOREVER

    def test_nothing_is_opened_before_the_delay_is_over(self) -> None:
        backoff = failing(3)
        assert planned(waiting=3, backoff=backoff) == {}
        assert next_look(waiting=3, backoff=backoff) == backoff.next_attempt
        later = situation(waiting=3, backoff=backoff)
        assert todo(plan(later, backoff.next_attempt)) == {"open": 1}

    def test_one_attempt_at_a_time(self) -> None:
        backoff = failing(3, at=NOW - 1)
        assert planned(waiting=3, backoff=backoff, connecting=1) == {}

    def test_an_attempt_that_began_before_the_failure_does_not_count(self) -> None:
        backoff = failing(3, at=NOW - 1)
        slow = entry(State.CONNECTING, failures=0)
        assert planned(slow, waiting=3, backoff=backoff) == {"open": 1}

    def test_somebody_tries_even_if_nobody_waits(self) -> None:
        for failures in (1, 2, 3):
            assert planned(backoff=failing(failures, at=NOW - 1)) == {"open": 1}

    def test_one_who_tries_is_enough_if_nobody_waits(self) -> None:
        assert planned(backoff=failing(1), connecting=1) == {}
        assert planned(backoff=failing(1), connecting=1, waiting=3) == {"open": 2}

    def test_not_if_the_pool_is_full(self) -> None:
        backoff = failing(3, at=NOW - 1)
        assert planned(*(entry(State.IN_USE) for _ in range(3)), backoff=backoff) == {}


# -- A simulated pool.


class Simulation:
    """Carries plans out as `Maintenance` does, on a clock of its own.

    It is woken when maintenance is: at the time that the plan has named, and when a task has ended
    or a caller begins to wait; not when an idle connection is borrowed or given back.
    """

    def __init__(self, chance: Callable[[], float], **limits: Any) -> None:
        self.chance = chance
        self.limits = options(**limits)
        self.now = NOW
        self.backoff = Backoff()
        self.entries: list[Entry] = []
        self.attempts: list[Entry] = []
        self.waiting = 0
        self.connect_time = 0.0
        self.look_at = FOREVER
        self.wake()

    @property
    def size(self) -> int:
        return len(self.entries) + len(self.attempts)

    def among(self, *states: State) -> list[Entry]:
        return [each for each in self.entries if each.state in states]

    # -- What maintenance does.

    def plan(self) -> Plan:
        given = snapshot(
            self.limits,
            self.entries.copy(),
            attempts=self.attempts.copy(),
            waiting=self.waiting,
            backoff=self.backoff,
            connect_time=self.connect_time,
        )
        before = described(given)
        found = plan(given, self.now)
        assert described(given) == before, "plan has changed what it was given"
        return found

    def wake(self) -> None:
        """Carry out a plan. Whatever may be done after that has to wait for something."""
        found = self.plan()
        self.check(found)
        for each, reason in found.close:
            if each.state in (State.IDLE, State.STANDBY):
                each.enter(State.CLOSING, self.now)
            elif reason != "idle" or each.renewed:
                each.retire(reason)
        for each in found.check:
            each.enter(State.VALIDATING, self.now)
        for each in found.overdue:
            each.enter(State.CLOSING, self.now)
        for each in found.leaked:
            each.reported = True
        for each in found.admit:
            each.replaces = None
            self.make_idle(each)
        for old in [None] * found.open + found.replace:
            if old is not None:
                old.renewed = True
            self.attempts.append(PoolEntry(self.now, self.backoff.failures, replaces=old))
        self.look_at = found.look_at
        if found.close or found.check:
            self.wake()
        else:
            assert todo(self.plan()) == {}, "a plan has left something to do"

    def check(self, found: Plan) -> None:
        """Check a plan against the situation."""
        assert found.look_at > self.now, "no time passes until the next look"
        closed = [each for each, _ in found.close]
        chosen = [*closed, *found.check, *found.admit, *found.overdue]
        assert len({id(each) for each in chosen}) == len(chosen), "two things for one connection"
        assert {each.state for each in closed} <= {State.IDLE, State.STANDBY, *ACTIVE}
        assert {each.state for each in found.check} <= {State.IDLE}
        assert {each.state for each in found.admit} <= {State.STANDBY}
        assert {each.state for each in found.overdue} <= {State.RETURNING}
        assert not [each for each in found.replace if each.renewed or each in closed]
        extra = 1 if self.limits.overlap and found.replace else 0
        if found.open or found.replace:
            opened = found.open + len(found.replace)
            assert self.size + opened <= self.limits.max_size + extra
            assert len(self.coming) + opened <= self.limits.max_connecting
        assert found.open <= max(0, self.limits.max_size - self.size)
        lent = [each for each in self.among(State.IDLE, *ACTIVE) if each not in closed]
        retiring = [each for each in closed if each.state in ACTIVE]
        if found.admit:
            assert len(lent) + len(retiring) + len(found.admit) <= self.limits.max_size

    @property
    def coming(self) -> list[Entry]:
        return [*self.attempts, *self.among(State.CONFIGURING)]

    def make_idle(self, each: Entry) -> None:
        each.enter(State.IDLE, self.now)
        each.idle_since = each.keepalive_from = self.now
        self.serve(each)

    def serve(self, each: Entry) -> None:
        """Give an idle connection to a waiter, or leave it idle."""
        if each.evict_at(self.limits.max_idle) <= self.now:
            each.enter(State.CLOSING, self.now)
            return
        each.fresh_until = min(self.now + 5, each.evict_at(self.limits.max_idle))
        if self.waiting:
            self.waiting -= 1
            self.lend(each)

    def lend(self, each: Entry) -> None:
        each.enter(State.IN_USE, self.now)
        each.taken = self.now
        each.reported = False

    # -- What happens.

    def pass_time(self, seconds: float) -> None:
        end = self.now + seconds
        for looks in itertools.count():
            assert looks < 10_000, "maintenance never sleeps"
            if self.look_at > end:
                break
            self.now = self.look_at
            self.wake()
        self.now = max(self.now, end)

    def borrow(self) -> None:
        for each in self.among(State.IDLE):
            if each.fresh_until > self.now and not self.waiting:
                self.lend(each)
                return
        self.waiting += 1
        self.wake()

    def give_up(self) -> None:
        self.waiting -= 1  # without a word

    def release(self, each: Entry, *, resets: bool) -> None:
        each.idle_since = self.now
        if resets:
            each.enter(State.RETURNING, self.now)
        elif each.expires <= self.now:
            each.enter(State.CLOSING, self.now)
            self.wake()
        else:
            each.enter(State.IDLE, self.now)
            self.serve(each)

    def end_reset(self, each: Entry, *, ok: bool) -> None:
        if ok and each.expires > self.now:
            self.make_idle(each)
        else:
            each.enter(State.CLOSING, self.now)
            self.wake()

    def end_check(self, each: Entry, *, ok: bool) -> None:
        if ok:
            each.enter(State.IDLE, self.now)
            each.keepalive_from = self.now
            self.serve(each)
        else:
            each.enter(State.CLOSING, self.now)
        self.wake()

    def end_close(self, each: Entry) -> None:
        each.enter(State.CLOSED, self.now)
        self.entries.remove(each)
        self.wake()

    def connected(self, each: Entry, lifetime: float) -> None:
        self.attempts.remove(each)
        each.created = self.now
        each.expires = self.now + lifetime
        each.enter(State.CONFIGURING, self.now)
        self.entries.append(each)

    def configured(self, each: Entry) -> None:
        self.connect_time = self.now - each.created
        self.backoff.succeeded(self.now)
        if each.replaces is None:
            self.make_idle(each)
        else:
            each.enter(State.STANDBY, self.now)
        self.wake()

    def connect_failed(self, each: Entry) -> None:
        if each in self.attempts:
            self.attempts.remove(each)
        else:
            each.enter(State.CLOSING, self.now)
        if each.replaces is None:
            self.backoff.failed(each.failures, each.created, self.now, self.chance())
        self.wake()

    def resize(self, min_size: int, max_size: int) -> None:
        self.limits.min_size, self.limits.max_size = min_size, max_size
        self.wake()

    def drain(self) -> None:
        for each in self.entries:
            each.retire("drain")
        self.wake()

    def step(self) -> bool:
        """Let one task of the pool, or one borrower, end well. Return whether there was one."""
        for each in self.attempts:
            self.connected(each, FOREVER)
            return True
        ends: dict[State, Callable[[Entry], object]] = {
            State.CONFIGURING: self.configured,
            State.VALIDATING: lambda each: self.end_check(each, ok=True),
            State.RETURNING: lambda each: self.end_reset(each, ok=True),
            State.CLOSING: self.end_close,
            State.IN_USE: lambda each: self.release(each, resets=False),
        }
        for each in self.entries:
            if each.state in ends:
                ends[each.state](each)
                return True
        return False


_fields = attrgetter(*(name for name in PoolEntry.__slots__ if name != "samples"))


def described(given: Snapshot) -> object:
    """Return all that is in a snapshot, to be compared later."""
    return (
        dict(vars(given.options)),
        given.waiting,
        replace(given.backoff),
        given.connect_time,
        [_fields(each) for each in given.entries],
        [_fields(each) for each in given.attempts],
    )


SECONDS = st.sampled_from([0.01, SOON, 0.3, 1.0, 2.5, 5.0, 19.0, 100.0])
PICK = st.integers(0, 5)


class PlanMachine(RuleBasedStateMachine):
    """Operations on a simulated pool, and its tasks, in any order."""

    pool: Simulation

    @initialize(
        min_size=st.integers(0, 3),
        more=st.integers(0, 3),
        overlap=st.booleans(),
        lifo=st.booleans(),
        max_idle=st.sampled_from([FOREVER, 20.0, 3.0]),
        keepalive=st.sampled_from([FOREVER, 4.0]),
        leak_timeout=st.sampled_from([FOREVER, 2.0]),
        max_connecting=st.sampled_from([FOREVER, 1, 2]),
        chances=st.randoms(use_true_random=False),
    )
    def begin(self, min_size: int, more: int, chances: Any, **limits: Any) -> None:
        self.pool = Simulation(
            chances.random,
            min_size=min_size,
            max_size=max(1, min_size + more),
            check_timeout=5.0,
            **limits,
        )

    def one_of(self, entries: list[Entry], number: int) -> Entry | None:
        return entries[number % len(entries)] if entries else None

    @rule(seconds=SECONDS)
    def time_passes(self, seconds: float) -> None:
        self.pool.pass_time(seconds)

    @rule()
    def borrow(self) -> None:
        self.pool.borrow()

    @precondition(lambda self: self.pool.waiting)
    @rule()
    def give_up(self) -> None:
        self.pool.give_up()

    @precondition(lambda self: self.pool.among(State.IN_USE))
    @rule(number=PICK, resets=st.booleans())
    def release(self, number: int, resets: bool) -> None:
        each = self.one_of(self.pool.among(State.IN_USE), number)
        assert each is not None
        self.pool.release(each, resets=resets)

    @precondition(lambda self: self.pool.attempts)
    @rule(number=PICK, lifetime=st.sampled_from([FOREVER, 4.0, 40.0]))
    def connected(self, number: int, lifetime: float) -> None:
        each = self.one_of(self.pool.attempts, number)
        assert each is not None
        self.pool.connected(each, lifetime)

    @precondition(lambda self: self.pool.among(State.CONFIGURING))
    @rule(number=PICK)
    def configured(self, number: int) -> None:
        each = self.one_of(self.pool.among(State.CONFIGURING), number)
        assert each is not None
        self.pool.configured(each)

    @precondition(lambda self: self.pool.coming)
    @rule(number=PICK)
    def connect_failed(self, number: int) -> None:
        each = self.one_of(self.pool.coming, number)
        assert each is not None
        self.pool.connect_failed(each)

    @precondition(lambda self: self.pool.among(State.VALIDATING, State.RETURNING, State.CLOSING))
    @rule(number=PICK, ok=st.booleans())
    def step_ends(self, number: int, ok: bool) -> None:
        working = self.pool.among(State.VALIDATING, State.RETURNING, State.CLOSING)
        each = self.one_of(working, number)
        assert each is not None
        if each.state is State.VALIDATING:
            self.pool.end_check(each, ok=ok)
        elif each.state is State.RETURNING:
            self.pool.end_reset(each, ok=ok)
        else:
            self.pool.end_close(each)

    @rule(min_size=st.integers(0, 3), more=st.integers(0, 3))
    def resize(self, min_size: int, more: int) -> None:
        self.pool.resize(min_size, max(1, min_size + more))

    @rule()
    def drain(self) -> None:
        self.pool.drain()

    @invariant()
    def one_more_at_most_and_only_as_a_replacement(self) -> None:
        pool = getattr(self, "pool", None)
        if pool is None:
            return
        replacements = [
            each
            for each in (*pool.attempts, *pool.among(State.CONFIGURING, State.STANDBY))
            if each.replaces is not None
        ]
        if not replacements:
            # Of those that are too many, all that can go at once have gone.
            staying = [
                each
                for each in pool.among(State.IDLE, *ACTIVE)
                if each.expires > pool.now and each.evict_at(pool.limits.max_idle) > pool.now
            ]
            assert len(staying) <= pool.limits.max_size

    def teardown(self) -> None:
        """Let all go well, and time pass: then there is nothing to do any more."""
        if not hasattr(self, "pool"):
            return
        pool = self.pool
        end = pool.now + 200
        for _ in range(1000):
            if pool.step():
                continue
            calm = not pool.waiting and not pool.backoff.failures
            if not calm or pool.now < end:
                pool.pass_time(60.0)
                continue
            pool.wake()
            if not pool.step():
                break
        else:
            raise AssertionError("it does not come to rest")
        # `wake` has checked that the next plan is empty, and the next look in the future.
        assert {each.state for each in pool.entries} <= {State.IDLE}
        assert pool.limits.min_size <= pool.size <= pool.limits.max_size


TestSimulation = PlanMachine.TestCase
TestSimulation.settings = settings(
    max_examples=2000 if LONG else 60,
    stateful_step_count=30,
    deadline=None,
    derandomize=not LONG,
    suppress_health_check=[HealthCheck.too_slow],  # on a busy machine
)


# -- The states of a connection.


class TestStates:
    @pytest.mark.parametrize("new", State)
    @pytest.mark.parametrize("old", State)
    def test_enter_refuses_what_is_not_in_the_table(self, old: State, new: State) -> None:
        each = entry(old, since=1)
        if new in TRANSITIONS[old]:
            each.enter(new, 2)
            assert (each.state, each.since) == (new, 2)
        else:
            with pytest.raises(AssertionError, match=f"is {old.value} can't be {new.value}"):
                each.enter(new, 2)
            assert (each.state, each.since) == (old, 1)

    def test_every_state_can_be_reached_and_left_and_the_end_is_the_end(self) -> None:
        assert TRANSITIONS.keys() == set(State)
        assert set().union(*TRANSITIONS.values()) == set(State) - {State.CONNECTING}
        assert [state for state, following in TRANSITIONS.items() if not following] == [
            State.CLOSED
        ]

    def test_an_entry_that_is_retired_keeps_the_first_reason(self) -> None:
        each = entry()
        each.retire("drain")
        each.retire("lifetime")
        assert (each.retired, each.expires, each.fresh_until) == (
            "drain", IMMEDIATELY, IMMEDIATELY,
        )  # fmt: skip

    def test_where_the_state_is_written_without_enter(self) -> None:
        """On the hot paths, and for the states that the table leaves out, nowhere else."""
        found: set[tuple[str, str]] = set()
        package = Path(aiosync.__file__).parent / "_pool"
        for file in package.glob("*.py"):
            for node in ast.walk(ast.parse(file.read_text("utf-8"))):
                if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                    found |= {
                        (f"{file.stem}.{node.name}", ast.unparse(statement.value))
                        for statement in ast.walk(node)
                        if isinstance(statement, ast.Assign)
                        and ast.unparse(statement.targets[0]) == "entry.state"
                    }
        assert found == {
            ("_pool.acquire", "_IN_USE"),
            ("_pool._lend", "_IN_USE"),
            ("_pool.release", "_IDLE"),
            ("_pool._return", "_IDLE"),
            ("_pool._return", "_RETURNING"),
            ("_pool._reset_and_release", "_RETURNING"),
            ("_validation._finish_return", "State.IDLE"),
            ("_closing._forget", "State.CLOSED"),
        }


class Connection:
    async def aclose(self) -> None:
        await anyio.lowlevel.checkpoint()


@pytest.fixture
def transitions(monkeypatch: pytest.MonkeyPatch) -> set[tuple[State, State]]:
    """Return the transitions that are made from now on, by `enter` or without it."""
    made: set[tuple[State, State]] = set()
    slot: Any = vars(PoolEntry)["state"]

    def write(each: Entry, new: State) -> None:
        if each in known:
            made.add((slot.__get__(each), new))
        known.add(each)
        slot.__set__(each, new)

    known: set[Entry] = set()
    monkeypatch.setattr(PoolEntry, "state", property(slot.__get__, write))
    return made


async def lives_of_connections() -> None:
    """Use pools in all ways that there are."""
    fails: list[bool] = []

    async def check_or_reset(_: Connection) -> None:
        await anyio.lowlevel.checkpoint()
        if fails:
            raise ConnectionError

    def connect() -> Connection:
        if fails:
            raise ConnectionError
        return Connection()

    pool = ConnectionPool(connect, min_size=1, max_size=1, max_lifetime=100)
    async with pool:
        await pool.wait()
        await anyio.sleep(99)  # an idle one was replaced
        pool.release(await pool.acquire())
        connection = await pool.acquire()
        await anyio.sleep(99)  # one in use is to be, and its replacement stands by
        pool.discard(connection)
        connection = await pool.acquire()
        await anyio.sleep(98)
    # It was closed by force, with a replacement that stood by.
    fails.append(True)
    async with ConnectionPool(connect, min_size=1, configure=check_or_reset) as pool:
        await anyio.sleep(0.01)
        fails.clear()
        await pool.wait()
        fails.append(True)
        await pool.drain()
        await anyio.sleep(0.01)
    fails.clear()
    async with ConnectionPool(
        Connection, configure=check_or_reset, reset=check_or_reset, check=check_or_reset,
        check_idle=0, max_size=1,
    ) as pool:  # fmt: skip
        for good in (True, False, True):
            fails[:] = [] if good else [True]
            with suppress(PoolTimeout):
                async with pool.connection(1):
                    pass
                connection = await pool.acquire(1)
                pool.release(connection)
                await anyio.sleep(1)
        fails.clear()
        connection = await pool.acquire()
        await pool.drain()
        pool.release(connection)
        await anyio.sleep(0.01)
        await pool.acquire()
        del connection
        gc.collect()  # nobody has the last one


async def a_reset_that_never_starts() -> None:
    """Cancel natively, before it begins, the task of a reset."""

    async def reset(_: Connection) -> None:
        await anyio.lowlevel.checkpoint()

    async with ConnectionPool(Connection, reset=reset, name="db") as pool:
        connection = await pool.acquire()
        pool.release(connection)
        resets: list[asyncio.Task[Any]] = []
        while not resets:
            await asyncio.sleep(0)
            resets = [each for each in asyncio.all_tasks() if each.get_name() == "db reset"]
        resets[0].cancel()
        assert await pool.acquire() is connection
        pool.release(connection)


# A connection that is garbage collected is closed without a word.
COLLECTED = (State.IN_USE, State.CLOSED)


def test_the_table_has_the_transitions_that_are_made_and_no_others(
    transitions: set[tuple[State, State]],
) -> None:
    for backend_name in ("asyncio", "trio"):
        run_virtually(backend_name, lives_of_connections)
    run_virtually("asyncio", a_reset_that_never_starts)
    table = {(old, new) for old, following in TRANSITIONS.items() for new in following}
    assert transitions - {COLLECTED} == table


def plain_entry(state: State, **facts: Any) -> PoolEntry[Any]:
    """Return an entry that was made at 0, with these attributes."""
    made: PoolEntry[Any] = PoolEntry(0.0)
    made.state = state
    made.fresh_until = math.inf
    for name, value in facts.items():
        setattr(made, name, value)
    return made


class TestReplacementsAndChecks:
    def test_closes_a_replacement_whose_place_was_taken_away(self) -> None:
        spare = plain_entry(State.STANDBY, replaces=plain_entry(State.CLOSED))
        used = plain_entry(State.IN_USE)
        todo = plan(snapshot(options(max_size=1), [used, spare]), 1.0)
        assert todo.close == [(spare, "resize")]
        assert not todo.admit

    @pytest.mark.parametrize(("state", "reason"), [("IN_USE", "lifetime"), ("IDLE", "idle")])
    def test_says_why_a_connection_was_replaced(self, state: str, reason: str) -> None:
        old = plain_entry(State[state], expires=100.0, idle_since=50.0)
        new = plain_entry(State.STANDBY, replaces=old)
        todo = plan(snapshot(options(max_size=1, max_idle=49.0), [old, new]), 98.0)
        assert todo.close == [(old, reason)]

    def test_looks_at_an_idle_connection_in_time_to_replace_it_if_it_is_in_use_by_then(
        self,
    ) -> None:
        spare = plain_entry(State.IDLE, expires=100.0)
        limits = options(max_idle=1000.0)
        assert plan(snapshot(limits, [spare]), 1.0).look_at == 97.5
        todo = plan(snapshot(limits, [spare]), 98.0)
        assert todo.replace == []
        assert 98.0 < todo.look_at <= 100.0
        spare.state = State.IN_USE
        assert plan(snapshot(limits, [spare]), 98.0).replace == [spare]

    def test_tries_once_if_nobody_wants_a_connection(self) -> None:
        backoff = Backoff(failures=1, began=0.0)
        assert plan(snapshot(options(), backoff=backoff), 0.0).open == 1
        attempt: PoolEntry[Any] = PoolEntry(0.0, failures=1)
        assert plan(snapshot(options(), attempts=[attempt], backoff=backoff), 0.0).open == 0

    def test_does_not_rely_on_a_check_of_what_somebody_else_will_get(self) -> None:
        stale = plain_entry(State.IDLE, fresh_until=0.0)
        todo = plan(snapshot(options(max_size=2), [stale], waiting=1, granted=[stale]), 1.0)
        assert (todo.check, todo.open) == ([], 1)

    def test_relies_on_a_check_for_a_moment_only(self) -> None:
        stale = plain_entry(State.IDLE, fresh_until=0.0)
        todo = plan(snapshot(options(max_size=2), [stale], waiting=1), 1.0)
        assert (todo.check, todo.open, todo.look_at) == ([stale], 0, 1.0 + SOON)
