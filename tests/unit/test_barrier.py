"""Barrier under every event loop: rounds, indices, action, every way to break it, errors."""

from __future__ import annotations

import asyncio
import copy
import gc
import inspect
import math
import pickle
import threading
import weakref
from collections.abc import Awaitable, Callable
from typing import Any
from unittest.mock import create_autospec

import anyio
import anyio.lowlevel
import pytest
import trio
import trio.testing
from anyio import create_task_group
from support.helpers import (
    PATIENCE,
    Indices,
    InThread,
    join,
    repeat_until_others_run,
    settle,
    until,
    wait_in_threads,
)

from aiosync import Barrier, BrokenBarrierError, _barrier, as_threading
from aiosync._barrier import BarrierStatistics
from aiosync._errors import BrokenReason, broken_barrier
from aiosync._park import ThreadWaiter

pytestmark = pytest.mark.anyio

BROKEN = "broken"
CANCELLED = "cancelled"


class Party:
    """Someone who waits once, and what came of it: an index, BROKEN, CANCELLED or an exception."""

    def __init__(self, barrier: Barrier, timeout: float | None = None) -> None:
        self.barrier = barrier
        self.timeout = timeout
        self.scope = anyio.CancelScope()
        self.outcome: object = None
        self.error: BrokenBarrierError | None = None

    async def __call__(self) -> None:
        self.outcome = CANCELLED
        with self.scope:
            try:
                self.outcome = await self.barrier.wait(self.timeout)
            except BrokenBarrierError as error:
                self.outcome = BROKEN
                self.error = error
            except Exception as error:
                self.outcome = error


def check_error(
    error: BaseException | object,
    reason: BrokenReason,
    arrived: int,
    parties: int,
    *,
    name: str | None = None,
    cause: BaseException | None = None,
) -> None:
    """`error` has the message and all attributes of a barrier that broke for `reason`."""
    assert isinstance(error, BrokenBarrierError)
    assert (error.reason, error.arrived, error.parties) == (reason, arrived, parties)
    assert str(error) == str(broken_barrier(name, reason, arrived, parties))
    assert error.__cause__ is cause


def outcomes(parties: list[Party]) -> list[object]:
    return [party.outcome for party in parties]


async def arrive(tg: Any, *parties: Party) -> None:
    """Let each of `parties` begin to wait, one after the other."""
    for party in parties:
        tg.start_soon(party)
        await settle()


async def check_works(barrier: Barrier) -> None:
    """A round of the barrier works as in a new one."""
    assert not barrier.broken
    assert barrier.n_waiting == 0
    parties = [Party(barrier) for _ in range(barrier.parties)]
    async with create_task_group() as tg:
        await arrive(tg, *parties)
    assert outcomes(parties) == list(range(barrier.parties))
    assert barrier.n_waiting == 0


class TestRounds:
    async def test_each_party_gets_its_index_in_the_order_of_arrival(self) -> None:
        barrier = Barrier(3)
        parties = [Party(barrier) for _ in range(3)]
        async with create_task_group() as tg:
            for count, party in enumerate(parties):
                assert barrier.n_waiting == count
                await arrive(tg, party)
        assert outcomes(parties) == [0, 1, 2]
        assert barrier.n_waiting == 0

    @pytest.mark.parametrize("parties", [2, 3, 10, 100])
    async def test_many_rounds_give_each_index_once(self, parties: int) -> None:
        barrier = Barrier(parties)
        rounds: list[list[int]] = [[] for _ in range(10)]

        async def work() -> None:
            for indices in rounds:
                indices.append(await barrier.wait())
                # Nobody is a round ahead: all of this one have arrived.
                assert barrier.n_waiting < parties

        async with create_task_group() as tg:
            for _ in range(parties):
                tg.start_soon(work)
        assert [sorted(indices) for indices in rounds] == [list(range(parties))] * 10

    async def test_nobody_passes_before_the_last_has_arrived(self) -> None:
        barrier = Barrier(3)
        parties = [Party(barrier) for _ in range(3)]
        async with create_task_group() as tg:
            await arrive(tg, *parties[:2])
            assert [party.outcome for party in parties[:2]] == [CANCELLED] * 2  # not yet set
            await arrive(tg, parties[2])
            assert outcomes(parties) == [0, 1, 2]

    async def test_a_barrier_of_one_never_waits_but_lets_others_run(self) -> None:
        barrier = Barrier(1)

        async def wait() -> None:
            assert await barrier.wait() == 0

        await repeat_until_others_run(wait)

    async def test_the_context_manager_gives_the_index(self) -> None:
        barrier = Barrier(2)
        indices: list[int] = []

        async def work() -> None:
            async with barrier as index:
                indices.append(index)

        async with create_task_group() as tg:
            tg.start_soon(work)
            tg.start_soon(work)
        assert sorted(indices) == [0, 1]
        assert not barrier.broken

    async def test_properties_and_repr(self) -> None:
        barrier = Barrier(2)
        assert (barrier.parties, barrier.n_waiting, barrier.broken) == (2, 0, False)
        assert "<aiosync.Barrier parties=2 waiting=0 at 0x" in repr(barrier)
        async with create_task_group() as tg:
            await arrive(tg, Party(barrier))
            assert (barrier.parties, barrier.n_waiting, barrier.broken) == (2, 1, False)
            assert "waiting=1" in repr(barrier)
            barrier.abort()
            assert (barrier.parties, barrier.n_waiting, barrier.broken) == (2, 0, True)
            assert "parties=2 broken" in repr(barrier)


class TestAction:
    async def test_it_runs_once_a_round_before_anybody_passes(self) -> None:
        log: list[object] = []
        barrier = Barrier(3, lambda: log.append("action"))

        async def work() -> None:
            for _ in range(3):
                await barrier.wait()
                log.append("passed")

        async with create_task_group() as tg:
            for _ in range(3):
                tg.start_soon(work)
        assert log == ["action", "passed", "passed", "passed"] * 3

    async def test_it_sees_all_parties_waiting(self) -> None:
        seen: list[int] = []
        barrier = Barrier(3, lambda: seen.append(barrier.n_waiting))
        await check_works(barrier)
        assert seen == [3]

    async def test_it_is_run_by_the_last_to_arrive(self) -> None:
        runners: list[int] = []
        barrier = Barrier(2, lambda: runners.append(anyio.get_current_task().id))
        ids: list[int] = []

        async def work() -> None:
            ids.append(anyio.get_current_task().id)
            await barrier.wait()

        async with create_task_group() as tg:
            tg.start_soon(work)
            await settle()
            tg.start_soon(work)
        assert runners == [ids[1]]

    async def test_an_async_action_is_awaited_before_anybody_passes(self) -> None:
        proceed = anyio.Event()
        log: list[str] = []

        async def action() -> None:
            log.append("begin")
            await proceed.wait()
            log.append("end")

        barrier = Barrier(2, action)
        parties = [Party(barrier), Party(barrier)]
        async with create_task_group() as tg:
            await arrive(tg, *parties)
            assert log == ["begin"]
            assert outcomes(parties) == [CANCELLED] * 2  # neither has passed
            assert barrier.n_waiting == 2
            proceed.set()
        assert log == ["begin", "end"]
        assert outcomes(parties) == [0, 1]

    async def test_one_that_raises_breaks_the_barrier(self) -> None:
        error = LookupError("no luck")

        def action() -> None:
            raise error

        barrier = Barrier(3, action)
        parties = [Party(barrier) for _ in range(3)]
        async with create_task_group() as tg:
            await arrive(tg, *parties)
        assert outcomes(parties) == [BROKEN, BROKEN, error]
        check_error(parties[0].error, "action", 3, 3, cause=error)
        check_error(parties[1].error, "action", 3, 3, cause=error)
        assert parties[0].error is not parties[1].error
        assert barrier.broken
        with pytest.raises(BrokenBarrierError) as caught:
            await barrier.wait()
        check_error(caught.value, "action", 3, 3, cause=error)
        barrier.reset()
        error.__traceback__ = None
        del caught
        parties.clear()
        gc.collect()
        assert not [
            found
            for found in gc.get_referrers(error)
            if type(found).__module__.startswith("aiosync")
        ]

    async def test_an_async_one_that_is_cancelled_breaks_the_barrier(self) -> None:
        barrier = Barrier(2, anyio.sleep_forever)
        parties = [Party(barrier), Party(barrier)]
        async with create_task_group() as tg:
            await arrive(tg, *parties)
            parties[1].scope.cancel()
        assert outcomes(parties) == [BROKEN, CANCELLED]
        assert parties[0].error is not None
        cancellation = parties[0].error.__cause__
        assert isinstance(cancellation, anyio.get_cancelled_exc_class())
        check_error(parties[0].error, "action", 2, 2, cause=cancellation)
        assert barrier.broken

    async def test_nobody_runs_out_of_time_while_it_runs(self) -> None:
        proceed = anyio.Event()
        barrier = Barrier(2, proceed.wait)
        patient, hasty = Party(barrier), Party(barrier, timeout=0.02)
        async with create_task_group() as tg:
            await arrive(tg, hasty, patient)
            with anyio.move_on_after(0.1):
                await anyio.sleep_forever()
            assert not barrier.broken
            proceed.set()
        assert outcomes([hasty, patient]) == [0, 1]
        await check_works(Barrier(2))

    @pytest.mark.parametrize("timeout", [None, 0.02])
    async def test_one_who_is_cancelled_while_it_runs_concerns_nobody_else(
        self, timeout: float | None
    ) -> None:
        proceed = anyio.Event()
        barrier = Barrier(3, proceed.wait)
        parties = [Party(barrier, timeout), Party(barrier), Party(barrier)]
        async with create_task_group() as tg:
            await arrive(tg, *parties)
            if timeout:  # it is asleep for the second time then
                with anyio.move_on_after(0.1):
                    await anyio.sleep_forever()
            parties[0].scope.cancel()
            await settle()
            proceed.set()
        assert outcomes(parties) == [CANCELLED, 1, 2]
        assert not barrier.broken

    @pytest.mark.parametrize("how", ["abort", "reset"])
    async def test_abort_and_reset_break_the_round_while_it_runs(self, how: str) -> None:
        proceed = anyio.Event()
        barrier = Barrier(2, proceed.wait)
        parties = [Party(barrier), Party(barrier)]
        async with create_task_group() as tg:
            await arrive(tg, *parties)
            getattr(barrier, how)()
            await settle()
            assert outcomes(parties) == [BROKEN, CANCELLED]  # the second runs the action still
            assert barrier.broken is (how == "abort")
            proceed.set()
        assert outcomes(parties) == [BROKEN, BROKEN]
        assert barrier.broken is (how == "abort")
        barrier.reset()
        await check_works(barrier)

    async def test_who_comes_while_it_runs_belongs_to_the_next_round(self) -> None:
        events = [anyio.Event(), anyio.Event()]
        runs: list[int] = []

        async def action() -> None:
            runs.append(len(runs))
            await events[runs[-1]].wait()

        barrier = Barrier(2, action)
        parties = [Party(barrier) for _ in range(4)]
        async with create_task_group() as tg:
            await arrive(tg, *parties)
            assert runs == [0]  # the second action waits for the end of the first
            assert barrier.n_waiting == 2
            events[0].set()
            await settle()
            assert outcomes(parties[:2]) == [0, 1]
            assert runs == [0, 1]
            events[1].set()
        # Who of the two went first was up to the event loop.
        assert sorted(outcomes(parties[2:]), key=str) == [0, 1]

    async def test_who_comes_while_it_runs_hears_of_its_failure(self) -> None:
        proceed = anyio.Event()

        async def action() -> None:
            await proceed.wait()
            raise LookupError

        barrier = Barrier(2, action)
        parties = [Party(barrier) for _ in range(3)]
        async with create_task_group() as tg:
            await arrive(tg, *parties)
            proceed.set()
        assert outcomes(parties[:1] + parties[2:]) == [BROKEN, BROKEN]

    async def test_who_comes_while_it_runs_may_leave_again(self) -> None:
        proceed = anyio.Event()
        barrier = Barrier(2, proceed.wait)
        parties = [Party(barrier) for _ in range(3)]
        async with create_task_group() as tg:
            await arrive(tg, *parties)
            parties[2].scope.cancel()
            await settle()
            assert parties[2].outcome == CANCELLED
            proceed.set()
        assert outcomes(parties) == [0, 1, CANCELLED]
        assert (barrier.n_waiting, barrier.broken) == (0, False)


class TestBreaking:
    async def test_parties_that_leave_a_broken_round_wake_nobody_again(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        wake = _barrier._Round.wake
        woken: list[object] = []

        def count(round: _barrier._Round) -> None:
            woken.append(round)
            wake(round)

        monkeypatch.setattr(_barrier._Round, "wake", count)
        barrier = Barrier(4)
        async with create_task_group() as tg:
            await arrive(tg, *(Party(barrier) for _ in range(3)))
            barrier.abort()
        assert len(woken) == 1

    async def test_abort_sends_an_error_to_all_until_reset(self) -> None:
        barrier = Barrier(3)
        parties = [Party(barrier), Party(barrier)]
        async with create_task_group() as tg:
            await arrive(tg, *parties)
            barrier.abort()
        assert outcomes(parties) == [BROKEN, BROKEN]
        check_error(parties[0].error, "aborted", 2, 3)
        for _ in range(3):
            with pytest.raises(BrokenBarrierError) as caught:
                await barrier.wait()
            check_error(caught.value, "aborted", 2, 3)
        barrier.abort()
        assert barrier.broken
        barrier.reset()
        await check_works(barrier)

    async def test_reset_sends_an_error_to_those_who_wait_only(self) -> None:
        barrier = Barrier(3)
        parties = [Party(barrier), Party(barrier)]
        async with create_task_group() as tg:
            await arrive(tg, *parties)
            barrier.reset()
            assert (barrier.n_waiting, barrier.broken) == (0, False)
        assert outcomes(parties) == [BROKEN, BROKEN]
        check_error(parties[0].error, "reset", 2, 3)
        await check_works(barrier)

    async def test_reset_of_a_new_barrier_changes_nothing(self) -> None:
        barrier = Barrier(2)
        barrier.reset()
        barrier.reset()
        await check_works(barrier)

    @pytest.mark.parametrize("own", [True, False], ids=["of wait", "of the barrier"])
    async def test_a_timeout_raises_and_breaks_the_barrier_for_all(self, own: bool) -> None:
        barrier = Barrier(3, timeout=None if own else 0.01)
        patient = Party(barrier, 60)
        async with create_task_group() as tg:
            await arrive(tg, patient)
            with pytest.raises(BrokenBarrierError) as caught:
                await barrier.wait(0.01 if own else None)
        check_error(caught.value, "timeout", 2, 3)
        check_error(patient.error, "timeout", 2, 3)
        with pytest.raises(BrokenBarrierError):
            await barrier.wait()
        barrier.reset()

    @pytest.mark.parametrize("timeout", [0, -1, -math.inf])
    async def test_no_patience_breaks_the_barrier_at_once(self, timeout: float) -> None:
        barrier = Barrier(2)
        with pytest.raises(BrokenBarrierError) as caught:
            await barrier.wait(timeout)
        check_error(caught.value, "timeout", 1, 2)
        assert barrier.broken

    @pytest.mark.parametrize("timeout", [0, -1])
    async def test_the_last_to_arrive_needs_no_patience(self, timeout: float) -> None:
        barrier = Barrier(2)
        first, last = Party(barrier), Party(barrier, timeout)
        async with create_task_group() as tg:
            await arrive(tg, first, last)
        assert outcomes([first, last]) == [0, 1]

    @pytest.mark.parametrize("timeout", [60, 1e300, math.inf])
    async def test_a_timeout_that_does_not_run_out_changes_nothing(self, timeout: float) -> None:
        barrier = Barrier(2)
        parties = [Party(barrier, timeout), Party(barrier, timeout)]
        async with create_task_group() as tg:
            await arrive(tg, *parties)
        assert outcomes(parties) == [0, 1]

    @pytest.mark.parametrize("timeout", [None, 60])
    async def test_a_cancelled_party_breaks_the_barrier_for_all(
        self, timeout: float | None
    ) -> None:
        barrier = Barrier(3)
        parties = [Party(barrier, timeout), Party(barrier, timeout)]
        async with create_task_group() as tg:
            await arrive(tg, *parties)
            parties[0].scope.cancel()
        assert outcomes(parties) == [CANCELLED, BROKEN]
        check_error(parties[1].error, "cancelled", 2, 3)
        assert barrier.broken
        barrier.reset()
        await check_works(barrier)

    async def test_a_cancel_that_has_not_run_yet_breaks_the_round_it_was_in(self) -> None:
        barrier = Barrier(3)
        parties = [Party(barrier), Party(barrier)]
        async with create_task_group() as tg:
            await arrive(tg, *parties)
            parties[0].scope.cancel()
            with pytest.raises(BrokenBarrierError) as caught:
                await barrier.wait()  # in the same step
        check_error(caught.value, "cancelled", 3, 3)
        assert outcomes(parties) == [CANCELLED, BROKEN]
        assert barrier.broken

    async def test_a_cancel_after_the_trip_concerns_nobody_else(self) -> None:
        barrier = Barrier(3)
        parties = [Party(barrier), Party(barrier)]
        async with create_task_group() as tg:
            await arrive(tg, *parties)
            assert await barrier.wait() == 2
            parties[0].scope.cancel()
            assert (barrier.n_waiting, barrier.broken) == (0, False)
        assert parties[0].outcome in (0, CANCELLED)
        assert parties[1].outcome == 1
        await check_works(barrier)

    @pytest.mark.parametrize("how", ["abort", "reset"])
    async def test_a_round_that_has_tripped_is_never_untripped(self, how: str) -> None:
        barrier = Barrier(3)
        parties = [Party(barrier), Party(barrier)]
        async with create_task_group() as tg:
            await arrive(tg, *parties)
            assert await barrier.wait() == 2
            getattr(barrier, how)()  # in the same step: the others have not run yet
            assert barrier.broken is (how == "abort")
        assert outcomes(parties) == [0, 1]
        barrier.reset()
        await check_works(barrier)

    async def test_a_timeout_that_ends_in_the_step_of_the_trip_passes(self) -> None:
        barrier = Barrier(2)
        party = Party(barrier, 0.01)
        async with create_task_group() as tg:
            await arrive(tg, party)
            # Keep the event loop from running anything until the time is certainly over.
            deadline = anyio.current_time() + 0.05
            while anyio.current_time() < deadline:
                pass
            assert await barrier.wait() == 1
        assert party.outcome == 0
        await check_works(barrier)

    async def test_who_broke_it_does_not_break_the_next_round_when_it_runs_at_last(self) -> None:
        barrier = Barrier(3)
        parties = [Party(barrier), Party(barrier)]
        async with create_task_group() as tg:
            await arrive(tg, *parties)
            barrier.abort()
            barrier.reset()
            parties[0].scope.cancel()  # it was broken before, but has not run since
        assert parties[1].outcome == BROKEN
        assert parties[0].outcome in (BROKEN, CANCELLED)
        await check_works(barrier)

    async def test_who_wakes_from_a_broken_round_after_the_reset_is_told(self) -> None:
        barrier = Barrier(2)
        old = Party(barrier)
        async with create_task_group() as tg:
            await arrive(tg, old)
            barrier.reset()
            barrier.reset()
        assert old.outcome == BROKEN
        await check_works(barrier)


class TestName:
    def test_it_is_shown_by_repr_and_in_messages(self) -> None:
        barrier = Barrier(3, name="start")
        view = as_threading(barrier)
        assert barrier.name == view.name == "start"
        assert repr(barrier).startswith("<aiosync.Barrier 'start' parties=3 waiting=0 at 0x")
        assert repr(view).startswith("<as_threading.Barrier at 0x")
        barrier.abort()
        with pytest.raises(BrokenBarrierError) as caught:
            view.wait()
        check_error(caught.value, "aborted", 0, 3, name="start")

    def test_there_is_none_by_default(self) -> None:
        barrier = Barrier(1)
        assert barrier.name is None
        assert as_threading(barrier).name is None

    def test_an_empty_one_is_a_name(self) -> None:
        assert "Barrier '' parties=1" in repr(Barrier(1, name=""))

    @pytest.mark.parametrize("name", [1, b"start"])
    def test_anything_but_a_str_is_refused(self, name: Any) -> None:
        match = f"^name must be a str or None, not {type(name).__name__}$"
        with pytest.raises(TypeError, match=match):
            Barrier(1, name=name)


class TestStatistics:
    async def test_tasks_and_threads_are_counted_apart(self) -> None:
        barrier = Barrier(4)
        view = as_threading(barrier)
        assert barrier.statistics() == BarrierStatistics(4, 0, 0, False)
        thread = InThread(view.wait)
        until(lambda: barrier.statistics().threads_waiting)
        async with create_task_group() as tg:
            await arrive(tg, Party(barrier), Party(barrier, 60))
            assert barrier.statistics() == BarrierStatistics(4, 2, 1, False)
            assert view.statistics() == barrier.statistics()
            barrier.abort()
            assert barrier.statistics() == BarrierStatistics(4, 0, 0, True)
        check_error(thread.result(), "aborted", 3, 4)
        barrier.reset()
        assert barrier.statistics() == BarrierStatistics(4, 0, 0, False)

    @pytest.mark.slow
    async def test_the_party_that_runs_the_action_and_those_that_left_are_not_counted(self) -> None:
        proceed = anyio.Event()
        barrier = Barrier(3, proceed.wait)
        parties = [Party(barrier, 0.5), Party(barrier), Party(barrier)]
        async with create_task_group() as tg:
            await arrive(tg, *parties)
            assert barrier.n_waiting == 3
            # The first sleeps for the second time after a while, and is counted once all the same.
            round = barrier._rounds.latest
            while len(round.waiters) < 3:
                await anyio.sleep(0.001)
            assert barrier.statistics().tasks_waiting == 2
            parties[1].scope.cancel()
            await settle()
            assert barrier.statistics().tasks_waiting == 1
            proceed.set()
        assert outcomes(parties) == [0, CANCELLED, 2]

    def test_it_can_not_be_changed(self) -> None:
        statistics = Barrier(2).statistics()
        assert not hasattr(statistics, "__dict__")
        with pytest.raises(AttributeError):
            statistics.broken = True  # type: ignore[misc]


class TestContextManager:
    def test_a_plain_with_names_the_alternatives(self) -> None:
        barrier = Barrier(1)
        with pytest.raises(TypeError, match=r"^Barrier needs 'async with' in a task; "), barrier:
            pass
        assert barrier.n_waiting == 0

    def test_its_methods_are_coroutine_functions(self) -> None:
        assert inspect.iscoroutinefunction(Barrier.wait)
        assert inspect.iscoroutinefunction(Barrier.__aenter__)
        assert inspect.iscoroutinefunction(Barrier.__aexit__)

    async def test_a_mock_of_it_works(self) -> None:
        barrier = create_autospec(Barrier, instance=True)
        barrier.__aenter__.return_value = 3
        barrier.wait.return_value = 4
        async with barrier as index:
            assert index == 3
        assert await barrier.wait(timeout=1) == 4
        barrier.wait.assert_awaited_once_with(timeout=1)
        barrier.__aexit__.assert_awaited_once()


class TestErrors:
    @pytest.mark.parametrize(
        ("name", "reason", "message"),
        [
            ("start", "timeout", "barrier 'start' is broken: timeout (arrived=2, parties=3)"),
            (None, "cancelled", "barrier is broken: cancelled (arrived=2, parties=3)"),
            (None, "reset", "barrier is broken: reset (arrived=2, parties=3)"),
            ("it's", "action", 'barrier "it\'s" is broken: action (arrived=2, parties=3)'),
            (
                None,
                "aborted",
                "barrier is broken: aborted (arrived=2, parties=3); call reset() to use it again",
            ),
        ],
    )
    def test_messages(self, name: str | None, reason: BrokenReason, message: str) -> None:
        assert str(broken_barrier(name, reason, 2, 3)) == message

    def test_a_broken_barrier_error_can_be_made_of_a_message_alone(self) -> None:
        error = BrokenBarrierError("gone")
        assert (str(error), error.reason, error.arrived, error.parties) == ("gone", None, 0, 0)
        assert str(BrokenBarrierError()) == ""

    def test_a_broken_barrier_error_can_be_pickled_and_copied(self) -> None:
        error = broken_barrier("start", "timeout", 2, 3)
        for twin in (pickle.loads(pickle.dumps(error)), copy.copy(error), copy.deepcopy(error)):
            assert type(twin) is BrokenBarrierError
            assert twin is not error
            check_error(twin, "timeout", 2, 3, name="start")

    def test_threads_are_told_the_exception_of_the_action(self) -> None:
        failure = LookupError()

        def action() -> None:
            raise failure

        barrier = Barrier(3, action)
        view = as_threading(barrier)
        others = []
        for number in range(2):
            others.append(InThread(view.wait))
            until(lambda number=number: barrier.statistics().threads_waiting > number)  # type: ignore[misc]
        with pytest.raises(LookupError) as caught:
            view.wait()
        assert caught.value is failure
        errors = [other.result() for other in others]
        for error in errors:
            check_error(error, "action", 3, 3, cause=failure)
        assert errors[0] is not errors[1]

    async def test_a_party_of_the_next_round_hears_nothing_of_an_old_failure(self) -> None:
        failures = [LookupError()]

        def action() -> None:
            if failures:
                raise failures.pop()

        barrier = Barrier(1, action)
        with pytest.raises(LookupError):
            await barrier.wait()
        barrier.reset()
        barrier.abort()
        with pytest.raises(BrokenBarrierError) as caught:
            await barrier.wait()
        check_error(caught.value, "aborted", 0, 1)
        barrier.reset()
        await check_works(barrier)

    def test_broken_barrier_error_is_caught_by_old_except_clauses(self) -> None:
        assert issubclass(BrokenBarrierError, threading.BrokenBarrierError)
        assert issubclass(BrokenBarrierError, RuntimeError)
        assert issubclass(BrokenBarrierError, asyncio.BrokenBarrierError)

    @pytest.mark.parametrize(
        ("arguments", "error", "match"),
        [
            ((0,), ValueError, "parties must be 1 or more, not 0"),
            ((-1,), ValueError, "parties must be 1 or more, not -1"),
            ((2.0,), TypeError, "parties must be an int, not float"),
            (("2",), TypeError, "parties must be an int, not str"),
            ((2, "action"), TypeError, "action must be callable or None, not str"),
            ((2, None, "1"), TypeError, "timeout must be a number of seconds or None, not str"),
            ((2, None, math.nan), ValueError, "not NaN"),
        ],
    )
    def test_bad_arguments(
        self, arguments: tuple[Any, ...], error: type[Exception], match: str
    ) -> None:
        with pytest.raises(error, match=match):
            Barrier(*arguments)

    @pytest.mark.parametrize(
        ("timeout", "error"), [("1", TypeError), (math.nan, ValueError), ([], TypeError)]
    )
    async def test_a_bad_timeout_has_not_arrived(
        self, timeout: Any, error: type[Exception]
    ) -> None:
        barrier = Barrier(2)
        with pytest.raises(error):
            await barrier.wait(timeout)
        await check_works(barrier)

    def test_it_can_be_neither_pickled_nor_copied(self) -> None:
        barrier = Barrier(2)
        attempts: list[Callable[[Barrier], object]] = [pickle.dumps, copy.copy, copy.deepcopy]
        for attempt in attempts:
            with pytest.raises(TypeError, match="cannot pickle or copy 'Barrier' object"):
                attempt(barrier)

    def test_it_has_slots_and_weak_references(self) -> None:
        barrier = Barrier(2)
        assert weakref.ref(barrier)() is barrier
        assert not hasattr(barrier, "__dict__")

    async def test_an_awaitable_that_an_action_returns_is_awaited(self) -> None:
        awaited: list[int] = []

        async def later() -> None:
            awaited.append(1)

        def action() -> Awaitable[None]:
            return later()

        await check_works(Barrier(2, action))
        assert awaited == [1]


@pytest.mark.anyio
@pytest.mark.parametrize("parties", [2, 3])
async def test_the_last_to_arrive_goes_on_without_a_checkpoint(parties: int) -> None:
    barrier = Barrier(parties)
    async with create_task_group() as tg:
        for _ in range(parties - 1):
            tg.start_soon(barrier.wait)
        await settle()
        with pytest.raises(StopIteration) as stop:
            barrier.wait().send(None)
        assert stop.value.value == parties - 1


@pytest.mark.anyio
@pytest.mark.parametrize("timeout", [0, -0.5, -1])
async def test_no_patience_breaks_the_barrier_without_a_checkpoint(timeout: float) -> None:
    with pytest.raises(BrokenBarrierError, match="broken: timeout"):
        Barrier(2).wait(timeout).send(None)


def test_a_thread_without_patience_that_comes_while_the_action_runs_waits_for_its_end() -> None:
    began, proceed = threading.Event(), threading.Event()

    def action() -> None:
        began.set()
        assert proceed.wait(PATIENCE)

    view = as_threading(Barrier(2, action))
    parties = [InThread(view.wait), InThread(view.wait)]
    assert began.wait(PATIENCE)
    late = InThread(lambda: view.wait(0))
    until(lambda: "latecomers" in view._shared._rounds.latest.decided)
    assert not late.done()
    proceed.set()
    assert {party.result() for party in parties} == {0, 1}
    assert isinstance(late.result(), BrokenBarrierError)


def test_who_is_interrupted_before_it_has_arrived_does_not_end_the_action_of_others() -> None:
    began, proceed = threading.Event(), threading.Event()

    def action() -> None:
        began.set()
        assert proceed.wait(PATIENCE)

    class Interrupt(BaseException):
        pass

    class Indices(list[int]):
        def pop(self, index: Any = -1) -> int:
            raise Interrupt

    view = as_threading(Barrier(2, action))
    parties = [InThread(view.wait), InThread(view.wait)]
    assert began.wait(PATIENCE)
    view._shared._rounds.latest.indices = Indices()
    with pytest.raises(Interrupt):
        view.wait()
    assert not view.broken
    proceed.set()
    assert {party.result() for party in parties} == {0, 1}


def test_a_thread_that_is_interrupted_while_the_action_runs_keeps_no_other_asleep() -> None:
    class Interrupt(BaseException):
        pass

    class Interrupted(ThreadWaiter):
        def __await__(self) -> Any:
            assert acting.wait(PATIENCE)
            raise Interrupt

    def action() -> None:
        acting.set()
        until(lambda: parties[1].done())  # nobody leaves after that before the round trips

    acting = threading.Event()
    barrier = Barrier(4, action)
    round = barrier._rounds.latest
    parties: list[InThread] = []
    for number in range(4):
        view = as_threading(barrier)
        if number == 1:
            view._shared._new_waiter = Interrupted
        parties.append(InThread(view.wait))
        if number < 3:
            until(lambda number=number: len(round.threads) == number + 1)  # type: ignore[misc]
    assert isinstance(parties[1].result(), Interrupt)
    assert [parties[index].result() for index in (0, 2, 3)] == [0, 2, 3]
    assert not barrier.broken


def test_a_thread_without_patience_and_too_late_to_give_up_is_woken_after_the_action() -> None:
    acting = threading.Event()

    def action() -> None:
        acting.set()
        until(lambda: bool(round.threads))  # it lies down

    def come_last() -> None:
        last.append(InThread(as_threading(barrier).wait))
        assert acting.wait(PATIENCE)

    barrier = Barrier(2, action)
    round = barrier._rounds.latest
    round.indices = Indices(round.indices, come_last)
    last: list[InThread] = []
    first = InThread(lambda: as_threading(barrier).wait(0))
    assert first.result() == 0
    assert last[0].result() == 1


@pytest.mark.parametrize("how", ["reset", "trip"])
def test_a_round_that_is_over_leads_to_the_current_one(how: str) -> None:
    barrier = Barrier(2)
    rounds = barrier._rounds
    old = rounds.latest
    for _ in range(2):
        if how == "trip":
            party = InThread(as_threading(barrier).wait)
            until(lambda: barrier.n_waiting == 1)
            assert as_threading(barrier).wait() == 1
            assert party.result() == 0
        else:
            barrier.abort()
            barrier.reset()
    new = rounds.current()
    rounds.latest = old  # a slow thread does now what it was about to do then
    assert (barrier.broken, barrier.n_waiting) == (False, 0)
    assert rounds.current() is new
    rounds.latest = old
    barrier.abort()
    assert barrier.broken
    assert new.outcome is not None


def test_an_error_that_is_kept_keeps_no_later_round() -> None:
    barrier = Barrier(2)
    kept: list[BaseException] = []

    async def party() -> None:
        try:
            await barrier.wait()
        except BrokenBarrierError as error:
            kept.append(error)

    async def main() -> None:
        for how in (barrier.reset, barrier.abort):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(party)
                await trio.testing.wait_all_tasks_blocked()
                how()
        await party()  # raises at once
        barrier.reset()
        for _ in range(50):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(party)
                nursery.start_soon(party)

    trio.run(main)
    assert len(kept) == 3
    gc.collect()
    rounds = [found for found in gc.get_objects() if isinstance(found, _barrier._Round)]
    latest = barrier._rounds.latest
    assert [found for found in rounds if found is not latest and found.indices == []] == []


def test_a_latecomer_is_no_party_and_may_leave() -> None:
    barrier = Barrier(2)
    threads, outcomes = wait_in_threads(barrier, 1)
    round = barrier._rounds.latest

    class Cancelled:
        """A task that found no place just before the last party fills the round, and left."""

        def done(self) -> bool:
            return True

        def get_loop(self) -> object:
            return None

        def set_result(self, result: None) -> None:
            pass

    round.decided.setdefault("latecomers", []).append(Cancelled())
    assert as_threading(barrier).wait() == 1
    join(threads)
    assert outcomes == [0]


def test_a_barrier_of_one_runs_no_action_outside_of_an_event_loop() -> None:
    ran: list[int] = []
    barrier = Barrier(1, lambda: ran.append(1))
    coroutine = barrier.wait()
    with pytest.raises(RuntimeError, match="no asyncio or trio event loop is running"):
        coroutine.send(None)
    assert ran == []
    assert as_threading(barrier).wait() == 0
    assert ran == [1]


def test_a_newcomer_that_finds_a_round_tripping_joins_the_next() -> None:
    barrier = Barrier(2)
    view = as_threading(barrier)
    first = barrier._rounds.latest

    class Contested(list[int]):
        def pop(self, index: Any = -1) -> int:
            # Two other threads pass, just before we arrive.
            first.indices = list(self)
            others = [InThread(view.wait), InThread(view.wait)]
            assert {other.result() for other in others} == {0, 1}
            return first.indices.pop(index)

    first.indices = Contested(first.indices)
    newcomer = InThread(view.wait)
    until(lambda: barrier._rounds.latest is not first and barrier.n_waiting == 1)
    assert view.wait() == 1
    assert newcomer.result() == 0
