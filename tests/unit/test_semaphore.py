"""Semaphore and BoundedSemaphore under every event loop: results, order, cancellation, errors."""

from __future__ import annotations

import copy
import math
import pickle
import sys
import weakref
from collections import deque
from typing import Any

import anyio
import anyio.lowlevel
import pytest
from anyio import WouldBlock, create_task_group
from support.helpers import repeat_until_others_run, settle

from aiosync import (
    BoundedSemaphore,
    Semaphore,
    as_threading,
)
from aiosync._handoff import _MAX_COPIES
from aiosync._park import (
    thread_waiter,
)

pytestmark = pytest.mark.anyio

Kind = type[Semaphore]


@pytest.fixture(params=[Semaphore, BoundedSemaphore])
def kind(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.fixture(params=[False, True], ids=["checkpoint", "fast"])
def fast(request: pytest.FixtureRequest) -> Any:
    return request.param


def free(semaphore: Semaphore) -> int:
    """Take all that can be taken, put it back, and tell how much it was: what `value` must say."""
    taken = 0
    while True:
        try:
            semaphore.acquire_nowait()
        except WouldBlock:
            break
        taken += 1
    if taken:
        semaphore.release(taken)
    assert semaphore.value == taken
    return taken


async def _append(others: list[bool]) -> None:
    others.append(True)


class TestResults:
    async def test_three_permits_answer_true_three_times_then_false(
        self, kind: Kind, fast: bool
    ) -> None:
        semaphore = kind(3, fast_acquire=fast)
        assert [await semaphore.acquire(blocking=False) for _ in range(4)] == [
            True,
            True,
            True,
            False,
        ]

    async def test_acquire_returns_true_whether_or_not_it_waits(
        self, kind: Kind, fast: bool
    ) -> None:
        semaphore = kind(1, fast_acquire=fast)
        results = [await semaphore.acquire()]

        async def wait() -> None:
            results.append(await semaphore.acquire())

        async with create_task_group() as tg:
            tg.start_soon(wait)
            await settle()
            assert results == [True]
            semaphore.release()
        assert results == [True, True]
        assert all(result is True for result in results)

    async def test_a_lock_is_a_semaphore_of_one(self, kind: Kind, fast: bool) -> None:
        lock = kind(fast_acquire=fast)
        inside = 0

        async def work() -> None:
            nonlocal inside
            for _ in range(5):
                async with lock as acquired:
                    assert acquired is True
                    inside += 1
                    await anyio.lowlevel.checkpoint()
                    assert inside == 1
                    inside -= 1

        async with create_task_group() as tg:
            for _ in range(5):
                tg.start_soon(work)
        assert free(lock) == 1

    async def test_the_context_manager_releases_when_its_block_raises(self, kind: Kind) -> None:
        semaphore = kind(1)
        with pytest.raises(KeyError):
            async with semaphore:
                assert semaphore.value == 0
                raise KeyError
        assert free(semaphore) == 1

    async def test_acquire_nowait(self, kind: Kind) -> None:
        semaphore = kind(1)
        semaphore.acquire_nowait()
        with pytest.raises(WouldBlock):
            semaphore.acquire_nowait()
        semaphore.release()
        assert free(semaphore) == 1

    @pytest.mark.parametrize("timeout", [0, 0.0, -1, -0.5, -math.inf])
    async def test_no_patience_tries_once(self, kind: Kind, fast: bool, timeout: float) -> None:
        semaphore = kind(1, fast_acquire=fast)
        assert await semaphore.acquire(timeout=timeout) is True
        assert await semaphore.acquire(timeout=timeout) is False
        assert semaphore.statistics().tasks_waiting == 0
        semaphore.release()
        assert free(semaphore) == 1

    async def test_a_timeout_that_runs_out_returns_false_and_leaves_nothing(
        self, kind: Kind, fast: bool
    ) -> None:
        semaphore = kind(1, fast_acquire=fast)
        await semaphore.acquire()
        assert await semaphore.acquire(timeout=0.01) is False
        assert semaphore.statistics().tasks_waiting == 0
        semaphore.release()
        assert free(semaphore) == 1

    @pytest.mark.parametrize("timeout", [60, 1e9, 1e300, math.inf])
    async def test_a_timeout_that_does_not_run_out_returns_true(
        self, kind: Kind, fast: bool, timeout: float
    ) -> None:
        semaphore = kind(1, fast_acquire=fast)
        await semaphore.acquire()
        results = []

        async def wait() -> None:
            results.append(await semaphore.acquire(timeout=timeout))

        async with create_task_group() as tg:
            tg.start_soon(wait)
            await settle()
            semaphore.release()
        assert results == [True]
        semaphore.release()
        assert free(semaphore) == 1

    async def test_release_of_many_serves_waiters_and_keeps_the_rest(self) -> None:
        semaphore = Semaphore(0)
        served: list[int] = []

        async def wait(number: int) -> None:
            await semaphore.acquire()
            served.append(number)

        async with create_task_group() as tg:
            for number in range(4):
                tg.start_soon(wait, number)
                await settle()
            semaphore.release(3)
            await settle()
            assert sorted(served) == [0, 1, 2]  # trio runs those who are ready in any order
            semaphore.release(4)
        assert sorted(served) == [0, 1, 2, 3]
        assert free(semaphore) == 3

    async def test_statistics_locked_value_and_repr(self, kind: Kind) -> None:
        semaphore = kind(2)
        assert (semaphore.value, semaphore.locked()) == (2, False)
        assert f"aiosync.{kind.__name__} value=2 waiters=0" in repr(semaphore)
        await semaphore.acquire()
        await semaphore.acquire()
        assert (semaphore.value, semaphore.locked()) == (0, True)
        async with create_task_group() as tg:
            tg.start_soon(semaphore.acquire)
            await settle()
            assert semaphore.statistics().tasks_waiting == 1
            assert "value=0 waiters=1" in repr(semaphore)
            semaphore.release()
        assert semaphore.statistics().tasks_waiting == 0


class TestOrder:
    async def test_waiters_are_served_in_the_order_in_which_they_came(
        self, kind: Kind, fast: bool
    ) -> None:
        semaphore = kind(1, fast_acquire=fast)
        await semaphore.acquire()
        served: list[int] = []

        async def wait(number: int) -> None:
            async with semaphore:
                served.append(number)

        async with create_task_group() as tg:
            for number in range(20):
                tg.start_soon(wait, number)
                await settle()
            semaphore.release()
        assert served == list(range(20))

    async def test_a_newcomer_does_not_overtake_a_waiter(self, kind: Kind) -> None:
        semaphore = kind(1, fast_acquire=True)
        await semaphore.acquire()
        served: list[str] = []

        async def wait() -> None:
            await semaphore.acquire()
            served.append("waiter")
            semaphore.release()

        async with create_task_group() as tg:
            tg.start_soon(wait)
            await settle()
            # Handed over: neither of these finds it, although the waiter has not run yet.
            semaphore.release()
            with pytest.raises(WouldBlock):
                semaphore.acquire_nowait()
            assert await semaphore.acquire(blocking=False) is False
            assert await semaphore.acquire() is True
            served.append("newcomer")
        assert served == ["waiter", "newcomer"]

    async def test_who_comes_again_goes_to_the_end_of_the_line(self, kind: Kind) -> None:
        semaphore = kind(1, fast_acquire=True)
        turns: list[int] = []

        async def work(number: int) -> None:
            for _ in range(3):
                await semaphore.acquire()
                turns.append(number)
                semaphore.release()

        await semaphore.acquire()
        async with create_task_group() as tg:
            for number in range(3):
                tg.start_soon(work, number)
                await settle()
            semaphore.release()
        assert turns == [0, 1, 2] * 3


class TestCheckpoints:
    @pytest.mark.parametrize("how", [{}, {"blocking": False}, {"timeout": 0}, {"timeout": 5}])
    async def test_it_lets_others_run_even_in_a_loop_that_never_waits(
        self, kind: Kind, how: dict[str, Any]
    ) -> None:
        semaphore = kind(1)

        async def acquire_and_release() -> None:
            if await semaphore.acquire(**how):
                semaphore.release()

        await repeat_until_others_run(acquire_and_release)

    async def test_a_vain_try_lets_others_run_too(self, kind: Kind) -> None:
        semaphore = kind(0)

        async def acquire() -> None:
            assert await semaphore.acquire(blocking=False) is False

        await repeat_until_others_run(acquire)

    @pytest.mark.parametrize("how", [{}, {"blocking": False}, {"timeout": 0}])
    async def test_fast_acquire_does_not_yield(self, kind: Kind, how: dict[str, Any]) -> None:
        semaphore = kind(1, fast_acquire=True)
        others: list[int] = []

        async def other() -> None:
            await anyio.lowlevel.checkpoint()
            others.append(1)

        async with create_task_group() as tg:
            tg.start_soon(other)
            await semaphore.acquire(**how)
            if how:
                assert await semaphore.acquire(**how) is False
            assert others == []

    @pytest.mark.parametrize("how", [{}, {"blocking": False}, {"timeout": 0}, {"timeout": 5}])
    async def test_a_cancel_in_the_checkpoint_undoes_the_acquire(
        self, kind: Kind, how: dict[str, Any]
    ) -> None:
        semaphore = kind(2)
        with anyio.CancelScope() as scope:
            scope.cancel()
            await semaphore.acquire(**how)
            pytest.fail("the checkpoint did not raise")
        assert scope.cancelled_caught
        assert free(semaphore) == 2

    async def test_the_undone_permit_goes_to_the_next_in_line(self, kind: Kind) -> None:
        semaphore = kind(1)
        served: list[bool] = []

        async def wait() -> None:
            served.append(await semaphore.acquire())

        async with create_task_group() as tg:
            with anyio.CancelScope() as scope:
                scope.cancel()
                tg.start_soon(wait)
                # Taken before the checkpoint, so the task that starts meanwhile has to wait.
                await semaphore.acquire()
        assert served == [True]

    @pytest.mark.parametrize("timeout", [None, 60])
    async def test_a_permit_released_just_before_it_waits_is_taken_with_a_checkpoint(
        self, kind: Kind, timeout: float | None
    ) -> None:
        semaphore = kind()
        await semaphore.acquire()
        new_waiter = semaphore._new_waiter

        def release_first() -> Any:  # as another thread may, after the look for a free permit
            semaphore.release()
            return new_waiter()

        semaphore._new_waiter = release_first
        others: list[bool] = []
        async with create_task_group() as tg:
            tg.start_soon(_append, others)
            await semaphore.acquire(timeout=timeout)
            assert others
            with anyio.CancelScope() as scope:
                scope.cancel()
                await semaphore.acquire(timeout=timeout)
                pytest.fail("there was no checkpoint")
        assert free(semaphore) == 1

    async def test_a_cancel_in_the_checkpoint_of_a_vain_try_takes_nothing(self, kind: Kind) -> None:
        semaphore = kind(0)
        with anyio.CancelScope() as scope:
            scope.cancel()
            await semaphore.acquire(blocking=False)
        assert scope.cancelled_caught
        assert free(semaphore) == 0


class TestCancellation:
    @pytest.mark.parametrize("timeout", [None, 60])
    async def test_a_cancelled_waiter_leaves_as_if_it_had_not_come(
        self, kind: Kind, timeout: float | None
    ) -> None:
        semaphore = kind(1)
        await semaphore.acquire()
        async with create_task_group() as tg:
            tg.start_soon(semaphore.acquire, True, timeout)
            await settle()
            assert semaphore.statistics().tasks_waiting == 1
            tg.cancel_scope.cancel()
        assert semaphore.statistics().tasks_waiting == 0
        semaphore.release()
        assert free(semaphore) == 1

    async def test_waiters_may_leave_in_any_order(self, kind: Kind) -> None:
        semaphore = kind(1)
        await semaphore.acquire()
        scopes = [anyio.CancelScope() for _ in range(7)]
        served: list[int] = []

        async def wait(number: int) -> None:
            with scopes[number]:
                await semaphore.acquire()
                served.append(number)
                semaphore.release()

        async with create_task_group() as tg:
            for number in range(7):
                tg.start_soon(wait, number)
                await settle()
            for number in (3, 0, 6, 4):
                scopes[number].cancel()
            await settle()
            assert semaphore.statistics().tasks_waiting == 3
            semaphore.release()
        assert served == [1, 2, 5]
        assert free(semaphore) == 1

    @pytest.mark.parametrize("timeout", [None, 60])
    async def test_cancel_then_release_skips_the_cancelled_waiter(
        self, kind: Kind, timeout: float | None
    ) -> None:
        semaphore = kind(1)
        await semaphore.acquire()
        async with create_task_group() as tg:
            tg.start_soon(semaphore.acquire, True, timeout)
            await settle()
            tg.cancel_scope.cancel()
            semaphore.release()
            semaphore.acquire_nowait()  # in the same step: it was free, not given to the dead
            semaphore.release()
        assert free(semaphore) == 1

    async def test_cancel_then_release_serves_the_next_in_line(self, kind: Kind) -> None:
        semaphore = kind(1)
        await semaphore.acquire()
        first, second = anyio.CancelScope(), anyio.CancelScope()
        served: list[str] = []

        async def wait(name: str, scope: anyio.CancelScope) -> None:
            with scope:
                await semaphore.acquire()
                served.append(name)

        async with create_task_group() as tg:
            for name, scope in (("first", first), ("second", second)):
                tg.start_soon(wait, name, scope)
                await settle()
            first.cancel()
            semaphore.release()
        assert served == ["second"]
        assert semaphore.value == 0

    @pytest.mark.parametrize("timeout", [None, 60])
    async def test_release_then_cancel_loses_no_permit(
        self, kind: Kind, timeout: float | None
    ) -> None:
        # By scope: the grant stands, or it is passed on; either way all is accounted for.
        semaphore = kind(1)
        await semaphore.acquire()
        acquired: list[bool] = []

        async def wait() -> None:
            acquired.append(await semaphore.acquire(timeout=timeout))

        async with create_task_group() as tg:
            tg.start_soon(wait)
            await settle()
            semaphore.release()
            tg.cancel_scope.cancel()
        assert len(acquired) + free(semaphore) == 1

    async def test_an_expired_deadline_around_it_is_a_cancellation(self, kind: Kind) -> None:
        semaphore = kind(1)
        await semaphore.acquire()
        with anyio.move_on_after(0.01) as scope:
            await semaphore.acquire()
        assert scope.cancelled_caught
        semaphore.release()
        assert free(semaphore) == 1

    async def test_a_shield_protects_a_waiter(self, kind: Kind) -> None:
        semaphore = kind(1)
        await semaphore.acquire()
        acquired: list[bool] = []

        async def wait() -> None:
            with anyio.CancelScope(shield=True):
                acquired.append(await semaphore.acquire())

        async with create_task_group() as tg:
            tg.start_soon(wait)
            await settle()
            tg.cancel_scope.cancel()
            semaphore.release()
        assert acquired == [True]


class TestBounded:
    async def test_a_release_too_many_is_refused_and_changes_nothing(self, fast: bool) -> None:
        semaphore = BoundedSemaphore(2, fast_acquire=fast)
        with pytest.raises(
            ValueError, match=r"semaphore released too often \(n=1, held=0, bound=2\)"
        ):
            semaphore.release()
        await semaphore.acquire()
        with pytest.raises(ValueError, match=r"released too often \(n=2, held=1, bound=2\)"):
            semaphore.release(2)
        assert semaphore.value == 1
        semaphore.release()
        with pytest.raises(ValueError, match="released too often"):
            semaphore.release()
        assert free(semaphore) == 2

    async def test_release_of_many(self) -> None:
        semaphore = BoundedSemaphore(5)
        for _ in range(5):
            semaphore.acquire_nowait()
        semaphore.release(4)
        assert semaphore.value == 4
        semaphore.release(1)
        assert free(semaphore) == 5

    async def test_a_permit_handed_over_may_be_released_once(self) -> None:
        semaphore = BoundedSemaphore(1)
        await semaphore.acquire()
        async with create_task_group() as tg:
            tg.start_soon(semaphore.acquire)
            await settle()
            semaphore.release()
        semaphore.release()
        with pytest.raises(ValueError, match="released too often"):
            semaphore.release()
        assert free(semaphore) == 1

    def test_a_claim_that_another_thread_spoils_gives_back_what_it_took(self) -> None:
        semaphore = BoundedSemaphore(3)
        for _ in range(3):
            semaphore.acquire_nowait()

        class Spoiled(deque[bool]):
            """Another thread releases one just after the claim has looked."""

            def __len__(self) -> int:
                return super().__len__() + 1

        semaphore._held = Spoiled(semaphore._held)
        with pytest.raises(ValueError, match="released too often"):
            semaphore.release(4)
        assert len([1 for _ in iter(semaphore._held)]) == 3
        semaphore.release(3)
        assert semaphore.value == 3

    def test_a_waiter_that_comes_as_a_permit_is_released_gets_it(self) -> None:
        semaphore = Semaphore(0)
        waiter = thread_waiter()

        class Late(deque[bool]):
            """Another thread has published its waiter, and has found no permit."""

            def append(self, permit: bool) -> None:
                semaphore._waiters[waiter] = None
                super().append(permit)

        semaphore._items = semaphore._queue.items = Late()
        semaphore.release()
        assert semaphore._queue.leave(waiter) is True
        assert semaphore.value == 0


class TestManyPermits:
    async def test_as_many_permits_as_there_can_be_cost_no_memory(self, kind: Kind) -> None:
        semaphore = kind(sys.maxsize)
        assert semaphore.value == sys.maxsize
        assert sys.getsizeof(semaphore._items) < 10_000
        for _ in range(1000):
            assert await semaphore.acquire(blocking=False) is True
        assert semaphore.value == sys.maxsize - 1000
        semaphore.release(1000)
        assert semaphore.value == sys.maxsize
        assert not semaphore.locked()

    async def test_every_permit_of_a_large_release_can_be_taken_once(self) -> None:
        semaphore = Semaphore(0, fast_acquire=True)
        semaphore.release(1000)
        semaphore.release(700)
        for _ in range(1700):
            assert await semaphore.acquire() is True
        assert await semaphore.acquire(blocking=False) is False
        assert semaphore.value == 0

    async def test_a_large_release_serves_all_who_wait(self) -> None:
        semaphore = Semaphore(0)
        async with create_task_group() as tg:
            for _ in range(600):
                tg.start_soon(semaphore.acquire)
            await settle()
            semaphore.release(1000)
        assert semaphore.value == 400
        assert semaphore.statistics().tasks_waiting == 0


class TestErrors:
    @pytest.mark.parametrize(
        ("value", "error", "match"),
        [
            (-1, ValueError, "value must be 0 or more, not -1"),
            (1.5, TypeError, "value must be an int, not float"),
            ("1", TypeError, "value must be an int, not str"),
            (None, TypeError, "value must be an int, not NoneType"),
            (sys.maxsize + 1, OverflowError, "value must be at most sys.maxsize"),
        ],
    )
    def test_bad_values(self, kind: Kind, value: Any, error: type[Exception], match: str) -> None:
        with pytest.raises(error, match=match):
            kind(value)

    @pytest.mark.parametrize(
        ("n", "error", "match"),
        [
            (0, ValueError, "n must be 1 or more, not 0"),
            (-1, ValueError, "n must be 1 or more, not -1"),
            (2.5, TypeError, "n must be an int, not float"),
            ("1", TypeError, "n must be an int, not str"),
            (sys.maxsize + 1, OverflowError, "n must be at most sys.maxsize"),
        ],
    )
    async def test_bad_releases_release_nothing(
        self, kind: Kind, n: Any, error: type[Exception], match: str
    ) -> None:
        semaphore = kind(3)
        await semaphore.acquire()
        with pytest.raises(error, match=match):
            semaphore.release(n)
        assert semaphore.value == 2

    @pytest.mark.parametrize(
        ("arguments", "error", "match"),
        [
            ({"timeout": "1"}, TypeError, "timeout must be a number of seconds or None, not str"),
            ({"timeout": math.nan}, ValueError, "not NaN"),
            ({"blocking": False, "timeout": 1}, ValueError, "timeout for a non-blocking acquire"),
            ({"blocking": False, "timeout": 0}, ValueError, "timeout for a non-blocking acquire"),
        ],
    )
    async def test_bad_acquires_take_nothing(
        self,
        kind: Kind,
        fast: bool,
        arguments: dict[str, Any],
        error: type[Exception],
        match: str,
    ) -> None:
        semaphore = kind(1, fast_acquire=fast)
        with pytest.raises(error, match=match):
            await semaphore.acquire(**arguments)
        assert semaphore.value == 1

    def test_it_can_be_neither_pickled_nor_copied(self, kind: Kind) -> None:
        semaphore = kind()
        with pytest.raises(TypeError, match=f"cannot pickle or copy '{kind.__name__}' object"):
            pickle.dumps(semaphore)
        with pytest.raises(TypeError, match="cannot pickle or copy"):
            copy.copy(semaphore)
        with pytest.raises(TypeError, match="cannot pickle or copy"):
            copy.deepcopy(semaphore)

    def test_it_has_slots_and_weak_references(self, kind: Kind) -> None:
        semaphore = kind()
        assert weakref.ref(semaphore)() is semaphore
        assert not hasattr(semaphore, "__dict__")
        with pytest.raises(AttributeError):
            semaphore.color = "red"  # type: ignore[attr-defined]


def test_who_sees_somebody_in_line_who_has_just_left_takes_a_free_permit_at_once() -> None:
    semaphore = Semaphore(1, fast_acquire=True)
    semaphore._slow_path = True  # as it was a moment ago
    acquire = semaphore.acquire()
    with pytest.raises(StopIteration) as stop:
        acquire.send(None)
    assert stop.value.value is True
    assert semaphore.value == 0


class TestPermitsThatAreFreeWhileSomebodyWhoWasGrantedOneIsYetToRun:
    """Nobody waits any more, but one who has waited does not know it."""

    @pytest.fixture
    async def semaphore(self, kind: Kind, fast: bool) -> Semaphore:
        semaphore = kind(_MAX_COPIES + 10, fast_acquire=fast)
        for _ in range(_MAX_COPIES + 10):
            semaphore.acquire_nowait()
        return semaphore

    async def test_they_are_taken_with_a_checkpoint(self, semaphore: Semaphore, fast: bool) -> None:
        served = False

        async def wait() -> None:
            nonlocal served
            await semaphore.acquire()
            served = True

        async with create_task_group() as tg:
            tg.start_soon(wait)
            await settle()
            semaphore.release(2)
            assert semaphore.value == 1
            for _ in range(3):  # trio runs the two in any order
                await semaphore.acquire()
                semaphore.release()
            assert served is not fast

    async def test_they_are_taken_by_a_task_that_is_cancelled_no_more_than_others(
        self, semaphore: Semaphore, fast: bool
    ) -> None:
        async with create_task_group() as tg:
            tg.start_soon(semaphore.acquire)
            await settle()
            semaphore.release(2)
            with anyio.CancelScope() as scope:
                scope.cancel()
                await semaphore.acquire()
            assert scope.cancelled_caught is not fast
            assert semaphore.value == (0 if fast else 1)

    @pytest.mark.parametrize("many", [False, True])
    async def test_a_thread_with_a_running_loop_need_not_wait_for_them(
        self, semaphore: Semaphore, many: bool
    ) -> None:
        async with create_task_group() as tg:
            tg.start_soon(semaphore.acquire)
            await settle()
            semaphore.release(_MAX_COPIES + 10 if many else 2)
            if many:  # so that what is left is all in reserve
                for _ in range(_MAX_COPIES - 1):
                    semaphore.acquire_nowait()
            assert as_threading(semaphore).acquire() is True
            assert semaphore.value == (9 if many else 0)


@pytest.mark.anyio
async def test_acquire_does_not_take_what_a_waiter_is_about_to_get(kind: Kind) -> None:
    semaphore = kind(1)
    await semaphore.acquire()
    served: list[str] = []

    async def wait(name: str) -> None:
        await semaphore.acquire()
        served.append(name)
        semaphore.release()

    async with create_task_group() as tg:
        tg.start_soon(wait, "waiter")
        await settle()
        semaphore._queue.items.append(True)  # another thread has begun to release
        tg.start_soon(wait, "newcomer")
        await settle()
        semaphore._queue.dispatch()  # and goes on
    assert served == ["waiter", "newcomer"]


@pytest.mark.anyio
async def test_acquire_waits_if_what_was_free_is_gone_when_it_comes_to_take_it(kind: Kind) -> None:
    semaphore = kind(2)
    semaphore.acquire_nowait()
    semaphore.acquire_nowait()

    class Gone(deque[bool]):
        def __bool__(self) -> bool:
            return True

    async def release_later() -> None:
        await settle()
        semaphore._items = semaphore._queue.items
        semaphore.release()

    async with create_task_group() as tg:
        tg.start_soon(semaphore.acquire)
        await settle()
        tg.start_soon(release_later)
        semaphore.release()  # the waiter is granted it, but does not run before this one waits
        semaphore._items = Gone()
        assert await semaphore.acquire() is True


@pytest.mark.anyio
async def test_it_is_locked_for_others_while_a_waiter_is_about_to_get_what_is_free(
    kind: Kind,
) -> None:
    semaphore = kind(1)
    await semaphore.acquire()
    async with create_task_group() as tg:
        tg.start_soon(semaphore.acquire)
        await settle()
        semaphore._queue.items.append(True)
        assert semaphore.locked()
        semaphore._queue.dispatch()


def test_a_vain_acquire_nowait_is_none_that_may_be_released() -> None:
    semaphore = BoundedSemaphore(1)
    semaphore.acquire_nowait()
    with pytest.raises(WouldBlock):
        semaphore.acquire_nowait()
    semaphore.release()
    with pytest.raises(ValueError, match="released too often"):
        semaphore.release()


def test_more_permits_than_can_be_counted_by_len() -> None:
    semaphore = Semaphore(sys.maxsize)
    semaphore.release(2)
    assert semaphore.value == sys.maxsize + 2
    assert not semaphore.locked()
    assert f"value={sys.maxsize + 2}" in repr(semaphore)
