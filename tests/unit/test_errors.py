"""Arguments that can only be mistakes are refused at once, with a message that says what to do."""

from __future__ import annotations

import inspect
import pickle
import time
from collections.abc import Callable
from datetime import timedelta
from decimal import Decimal
from fractions import Fraction
from typing import Any
from unittest.mock import create_autospec

import pytest
from anyio import create_task_group
from support.helpers import InThread, settle, until

import aiosync
from aiosync import (
    Barrier,
    BoundedSemaphore,
    BrokenBarrierError,
    Semaphore,
    SemaphoreStatistics,
    as_threading,
)
from aiosync._errors import (
    check_count,
    check_name,
    check_timeout,
    normalize_timeout,
)

Kind = type[Semaphore]


class Index:
    """An integer of another library."""

    def __init__(self, value: int) -> None:
        self.value = value

    def __index__(self) -> int:
        return self.value


@pytest.fixture(params=[Semaphore, BoundedSemaphore])
def kind(request: pytest.FixtureRequest) -> Any:
    return request.param


class TestCounts:
    @pytest.mark.parametrize(("value", "number"), [(3, 3), (True, 1), (Index(2), 2)])
    def test_any_integer_is_accepted(self, value: Any, number: int) -> None:
        found = check_count("n", value, 0)
        assert (type(found), found) == (int, number)

    @pytest.mark.parametrize("value", [1.0, "1", None, Decimal(1)])
    def test_anything_else_is_refused(self, value: Any) -> None:
        match = f"^n must be an int, not {type(value).__name__}$"
        with pytest.raises(TypeError, match=match):
            check_count("n", value, 0)

    @pytest.mark.parametrize("value", [0, Index(0)])
    def test_one_that_is_too_small_is_refused(self, value: Any) -> None:
        with pytest.raises(ValueError, match=r"^n must be 1 or more, not 0$"):
            check_count("n", value, 1)

    def test_semaphores_take_any_integer_and_no_float(self, kind: Kind) -> None:
        semaphore = kind(Index(3))
        assert semaphore.value == 3
        for _ in range(3):
            semaphore.acquire_nowait()
        semaphore.release(Index(2))
        semaphore.release(True)
        assert semaphore.value == 3
        wrong: Any = 1.0
        with pytest.raises(TypeError, match=r"^n must be an int, not float$"):
            semaphore.release(wrong)
        with pytest.raises(TypeError, match=r"^value must be an int, not float$"):
            kind(wrong)
        assert semaphore.value == 3

    def test_a_bound_is_an_int(self) -> None:
        semaphore = BoundedSemaphore(Index(1))
        with pytest.raises(ValueError, match=r"\(n=1, held=0, bound=1\)$"):
            semaphore.release()


class TestTimeouts:
    @pytest.mark.parametrize("timeout", [Decimal("0.5"), Fraction(1, 2), 0.5])
    def test_any_real_number_is_accepted(self, timeout: Any) -> None:
        assert check_timeout(timeout) == 0.5

    def test_an_integer_of_another_library_is_accepted(self) -> None:
        assert check_timeout(Index(2)) == 2

    @pytest.mark.parametrize("timeout", [float("inf"), 1e30, 10**30])
    def test_what_nobody_lives_to_see_is_no_limit(self, timeout: float) -> None:
        assert check_timeout(timeout) is None

    def test_a_timedelta_is_refused_with_a_hint(self) -> None:
        with pytest.raises(TypeError, match=r"not timedelta: pass timeout\.total_seconds\(\)$"):
            check_timeout(timedelta(seconds=1))

    @pytest.mark.parametrize("timeout", ["1", 1j, object()])
    def test_anything_else_is_refused(self, timeout: Any) -> None:
        match = f"^timeout must be a number of seconds or None, not {type(timeout).__name__}$"
        with pytest.raises(TypeError, match=match):
            check_timeout(timeout)

    def test_nan_is_refused(self) -> None:
        with pytest.raises(ValueError, match=r"not NaN$"):
            check_timeout(float("nan"))


class TestBlocking:
    @pytest.mark.parametrize("blocking", [True, False, 0, 1])
    def test_bools_and_what_callers_of_threading_pass_are_accepted(self, blocking: Any) -> None:
        assert normalize_timeout(blocking, None) == (None if blocking else 0)

    @pytest.mark.parametrize("blocking", [0.5, 1.0, 2, "x", None, timedelta(1)])
    def test_a_timeout_in_its_place_is_refused_with_a_hint(self, blocking: Any) -> None:
        match = (
            f"^blocking must be a bool, not {type(blocking).__name__}: "
            "pass a number of seconds as timeout=$"
        )
        with pytest.raises(TypeError, match=match):
            normalize_timeout(blocking, None)

    def test_a_timeout_for_a_non_blocking_call_is_refused(self) -> None:
        with pytest.raises(
            ValueError, match=r"^can't specify a timeout for a non-blocking acquire"
        ):
            normalize_timeout(False, 1)

    @pytest.mark.anyio
    @pytest.mark.parametrize("blocking", [0.5, "x", None])
    async def test_acquire_refuses_it_and_takes_nothing(self, kind: Kind, blocking: Any) -> None:
        semaphore = kind(1)
        with pytest.raises(TypeError, match="timeout="):
            await semaphore.acquire(blocking)
        with pytest.raises(TypeError, match="total_seconds"):
            wrong: Any = timedelta(seconds=1)
            await semaphore.acquire(timeout=wrong)
        assert semaphore.value == 1

    @pytest.mark.anyio
    async def test_zero_and_one_do_what_they_do_in_threading(self, kind: Kind) -> None:
        semaphore = kind(1)
        one: Any = 1
        zero: Any = 0
        assert await semaphore.acquire(one) is True
        assert await semaphore.acquire(zero) is False


class TestNames:
    @pytest.mark.parametrize("name", [None, "", "mail"])
    def test_a_str_or_none_is_accepted(self, name: str | None) -> None:
        assert check_name(name) == name

    @pytest.mark.parametrize("name", [1, b"mail"])
    def test_anything_else_is_refused(self, name: Any) -> None:
        match = f"^name must be a str or None, not {type(name).__name__}$"
        with pytest.raises(TypeError, match=match):
            Semaphore(name=name)
        with pytest.raises(TypeError, match=match):
            Barrier(1, name=name)

    def test_it_is_in_the_repr_and_in_errors(self, kind: Kind) -> None:
        semaphore = kind(2, name="mail")
        assert semaphore.name == "mail"
        assert repr(semaphore).startswith(f"<aiosync.{kind.__name__} 'mail' value=2 waiters=0 at ")
        assert "'mail'" in repr(as_threading(semaphore))
        assert kind().name is None
        bounded = BoundedSemaphore(name="mail")
        with pytest.raises(ValueError, match=r"^semaphore 'mail' released too often"):
            bounded.release()


class TestPlainWith:
    def test_it_names_the_alternatives(self, kind: Kind) -> None:
        semaphore = kind()
        match = (
            f"^{kind.__name__} needs 'async with' in a task; "
            r"in a thread use 'with as_threading\(\.\.\.\)'$"
        )
        with pytest.raises(TypeError, match=match), semaphore:
            pass
        assert semaphore.value == 1


PUBLIC_CLASSES = [getattr(aiosync, name) for name in aiosync.__all__]


@pytest.mark.anyio
@pytest.mark.parametrize("instance", [True, False])
@pytest.mark.parametrize(
    "cls",
    [
        found
        for found in PUBLIC_CLASSES
        if hasattr(found, "__enter__" if found.__name__.startswith("Thread") else "__aenter__")
    ],
    ids=lambda found: found.__name__,
)
async def test_a_double_of_every_public_class_works_in_its_kind_of_with(
    cls: Any, instance: bool
) -> None:
    double = create_autospec(cls, instance=instance)
    if not instance:
        double = double.return_value
    if cls.__name__.startswith("Thread"):
        with double:
            pass
        double.__exit__.assert_called_once()
    else:
        async with double:
            pass
        double.__aexit__.assert_awaited_once()


class TestMocks:
    @pytest.mark.parametrize("name", ["acquire", "__aenter__", "__aexit__"])
    def test_what_is_awaited_is_a_coroutine_function(self, kind: Kind, name: str) -> None:
        assert inspect.iscoroutinefunction(getattr(kind, name))

    @pytest.mark.anyio
    async def test_a_double_works_in_async_with(self, kind: Kind) -> None:
        double = create_autospec(kind, instance=True)
        async with double:
            await double.acquire(timeout=1)
        double.acquire.assert_awaited_once_with(timeout=1)

    @pytest.mark.anyio
    async def test_a_subclass_that_overrides_acquire_and_release_is_heeded(self, kind: Any) -> None:
        calls: list[str] = []

        class Logged(kind):  # type: ignore[misc]
            async def acquire(self, blocking: bool = True, timeout: float | None = None) -> bool:
                calls.append("acquire")
                return bool(await super().acquire(blocking, timeout))

            def release(self, n: Any = 1) -> None:
                calls.append("release")
                super().release(n)

        async with Logged():
            pass
        assert calls == ["acquire", "release"]


class TestStatistics:
    @pytest.mark.anyio
    async def test_tasks_and_threads_are_told_apart(self, kind: Kind) -> None:
        semaphore = kind(2)
        assert semaphore.statistics() == SemaphoreStatistics(2, 0, 0)
        semaphore.acquire_nowait()
        semaphore.acquire_nowait()
        threads = [InThread(as_threading(semaphore).acquire) for _ in range(2)]
        until(lambda: semaphore.statistics().threads_waiting == 2)
        async with create_task_group() as tasks:
            for _ in range(3):
                tasks.start_soon(semaphore.acquire)
            await settle()
            statistics = semaphore.statistics()
            assert statistics == SemaphoreStatistics(0, 3, 2)
            assert statistics.waiting == 5
            semaphore.release(2)
            assert [thread.result() for thread in threads] == [True, True]
            for _ in range(3):
                semaphore.release()
                await settle()
        assert semaphore.statistics() == SemaphoreStatistics(0, 0, 0)

    def test_they_are_read_only(self) -> None:
        statistics: Any = Semaphore().statistics()
        with pytest.raises(AttributeError):
            statistics.value = 3


def test_a_broken_barrier_error_survives_a_pickle() -> None:
    error = BrokenBarrierError("text", reason="timeout", arrived=1, parties=2)
    copy = pickle.loads(pickle.dumps(error))
    assert (str(copy), copy.reason, copy.arrived, copy.parties) == ("text", "timeout", 1, 2)


@pytest.mark.parametrize(
    "wait",
    [
        lambda: as_threading(Semaphore(0)).acquire(timeout=0.02),
        lambda: as_threading(BoundedSemaphore(0)).acquire(timeout=0.02),
    ],
)
def test_a_thread_does_not_wait_for_a_frozen_clock(
    wait: Callable[[], bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    frozen = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: frozen)
    assert wait() is False
