"""Metrics of pools, semaphores and barriers, read from the SDK."""

from __future__ import annotations

import gc
import importlib.util
import logging
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import anyio
import pytest
from support.helpers import InThread, run_python, until_async

from aiosync import (
    Barrier,
    BoundedSemaphore,
    BrokenBarrierError,
    ConnectionPool,
    PoolClosed,
    PoolTimeout,
    Semaphore,
    _created,
    as_threading,
    debug,
    from_threading,
)

pytest.importorskip("opentelemetry.sdk.metrics", exc_type=ImportError)

from opentelemetry import context
from opentelemetry.metrics import NoOpHistogram, NoOpMeter, NoOpMeterProvider
from support.metrics import Metrics, some_metrics

import aiosync.opentelemetry
from aiosync._observed import record_of
from aiosync._pool import _pool
from aiosync.opentelemetry import (
    _reporter,
    instrument,
    instrument_all,
    uninstrument,
    uninstrument_all,
)
from aiosync.redis import Redis

metrics = pytest.fixture(some_metrics)

POOL, SEMAPHORE, BARRIER = "db.client.connection", "aiosync.semaphore", "aiosync.barrier"


class Connection:
    """A stub that can be collected."""


def pool_of(metrics: Metrics, **options: Any) -> ConnectionPool[Connection]:
    pool = ConnectionPool(Connection, **{"name": "db", "max_size": 2, **options})
    instrument(pool, metrics.provider)
    return pool


class TestPools:
    @pytest.mark.anyio
    async def test_connections_are_counted_by_state(self, metrics: Metrics) -> None:
        async with pool_of(metrics, min_size=1) as pool:
            await pool.wait()
            assert metrics.values(f"{POOL}.count") == {"db,idle": 1, "db,used": 0}
            async with pool.connection():
                assert metrics.values(f"{POOL}.count") == {"db,idle": 0, "db,used": 1}
            assert metrics.values(f"{POOL}.count") == {"db,idle": 1, "db,used": 0}

    @pytest.mark.anyio
    async def test_a_connection_that_is_reset_is_in_use(self, metrics: Metrics) -> None:
        began, go_on = anyio.Event(), anyio.Event()

        async def reset(_: object) -> None:
            began.set()
            await go_on.wait()

        async with pool_of(metrics, reset=reset) as pool, anyio.create_task_group() as tasks:
            pool.release(await pool.acquire())
            tasks.start_soon(began.wait)
            await began.wait()
            assert metrics.values(f"{POOL}.count") == {"db,idle": 0, "db,used": 1}
            go_on.set()
            await until_async(lambda: pool.statistics().idle)
            assert metrics.values(f"{POOL}.count") == {"db,idle": 1, "db,used": 0}

    @pytest.mark.anyio
    async def test_limits_are_reported_and_follow_resize(self, metrics: Metrics) -> None:
        async with pool_of(metrics, min_size=1) as pool:
            for name, number in {"idle.min": 1, "idle.max": 2, "max": 2}.items():
                assert metrics.values(f"{POOL}.{name}") == {"db": number}
            await pool.resize(2, 5)
            for name, number in {"idle.min": 2, "idle.max": 5, "max": 5}.items():
                assert metrics.values(f"{POOL}.{name}") == {"db": number}

    @pytest.mark.anyio
    async def test_a_request_is_pending_while_it_waits(self, metrics: Metrics) -> None:
        pool = pool_of(metrics, max_size=1, close_timeout=0)
        async with pool, anyio.create_task_group() as tasks:
            first, view = await pool.acquire(), as_threading(pool)
            thread = InThread(lambda: view.release(view.acquire()))
            await until_async(lambda: pool.statistics().threads_waiting)
            tasks.start_soon(pool.acquire)
            await until_async(lambda: pool.statistics().tasks_waiting)
            assert metrics.values(f"{POOL}.pending_requests") == {"db": 2}
            pool.release(first)
            await until_async(thread.done)
            await until_async(lambda: pool.statistics().in_use)
            assert metrics.values(f"{POOL}.pending_requests") == {"db": 0}

    @pytest.mark.anyio
    async def test_wait_time_includes_connections_that_were_free(self, metrics: Metrics) -> None:
        async with pool_of(metrics, max_size=1) as pool:
            for _ in range(2):
                async with pool.connection():
                    pass
            pool.release(await pool.acquire(0))
            pool.release(pool.acquire_nowait())
            assert metrics.count(f"{POOL}.wait_time") == 4
            assert metrics.count(f"{POOL}.use_time") == 4

    @pytest.mark.anyio
    async def test_wait_time_is_in_seconds(self, metrics: Metrics) -> None:
        pool = pool_of(metrics, max_size=1, close_timeout=0)
        async with pool, anyio.create_task_group() as tasks:
            connection = await pool.acquire()
            before = metrics.sum(f"{POOL}.wait_time")
            tasks.start_soon(pool.acquire)
            await until_async(lambda: pool.statistics().tasks_waiting)
            await anyio.sleep(0.05)
            pool.release(connection)
            await until_async(lambda: metrics.count(f"{POOL}.wait_time") == 2)
            assert 0.04 <= metrics.sum(f"{POOL}.wait_time") - before < 10
        metric = metrics.metrics()[f"{POOL}.wait_time"]
        assert metric.unit == "s"
        assert metric.data.data_points[0].explicit_bounds == (
            0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1, 5, 10,
        )  # fmt: skip

    @pytest.mark.anyio
    async def test_timeouts_begin_at_0_and_have_no_wait_time(self, metrics: Metrics) -> None:
        async with pool_of(metrics, max_size=1) as pool:
            assert metrics.values(f"{POOL}.timeouts") == {"db": 0}
            async with pool.connection():
                with pytest.raises(PoolTimeout):
                    await pool.acquire(0.01)
                with pytest.raises(PoolTimeout):
                    await pool.acquire(0)
                with pytest.raises(anyio.WouldBlock):
                    pool.acquire_nowait()
                with anyio.move_on_after(0.01):
                    await pool.acquire()
            assert metrics.values(f"{POOL}.timeouts") == {"db": 2}
            assert metrics.count(f"{POOL}.wait_time") == 1

    @pytest.mark.anyio
    async def test_create_time_is_that_of_connect(self, metrics: Metrics) -> None:
        async def connect() -> Connection:
            await anyio.sleep(0.02)
            return Connection()

        pool = ConnectionPool(connect, name="db")
        instrument(pool, metrics.provider)
        async with pool, pool.connection():
            assert metrics.count(f"{POOL}.create_time") == 1
            assert 0.01 <= metrics.sum(f"{POOL}.create_time") < 10

    @pytest.mark.anyio
    async def test_use_time_ends_when_the_pool_takes_a_connection(self, metrics: Metrics) -> None:
        async with pool_of(metrics, close_timeout=0.01) as pool:
            kept = await pool.acquire()
            await pool.acquire()  # lost
            gc.collect()
            await until_async(lambda: pool.statistics().leaks)
            await until_async(lambda: metrics.count(f"{POOL}.use_time") == 1)
        assert metrics.count(f"{POOL}.use_time") == 2  # by force
        pool.release(kept)
        assert metrics.count(f"{POOL}.use_time") == 2

    @pytest.mark.anyio
    async def test_a_pool_is_reported_while_it_is_open(self, metrics: Metrics) -> None:
        pool = pool_of(metrics)
        assert not metrics.points(f"{POOL}.max")
        for _ in range(2):
            async with pool:
                assert metrics.values(f"{POOL}.max") == {"db": 2}
            assert not metrics.points(f"{POOL}.max")
        with pytest.raises(PoolClosed):
            await pool.acquire(0)
        assert metrics.values(f"{POOL}.timeouts") == {"db": 0}

    @pytest.mark.anyio
    async def test_one_that_is_in_use_can_be_instrumented(self, metrics: Metrics) -> None:
        events: list[str] = []
        pool = ConnectionPool(
            Connection, name="db", fast_acquire=True, on_event=lambda e: events.append(e.kind)
        )
        async with pool:
            view = as_threading(pool)
            before = await pool.acquire()
            instrument(pool, metrics.provider)
            pool.release(before)
            assert metrics.count(f"{POOL}.use_time") == 0  # not known when it began
            async with pool.connection():
                pass
            await anyio.to_thread.run_sync(lambda: view.release(view.acquire()))
            assert metrics.count(f"{POOL}.wait_time") == 2
            assert metrics.count(f"{POOL}.use_time") == 2
        assert events == ["connected", "closed"]  # they are told as before

    def test_threads_are_counted_exactly(self, metrics: Metrics) -> None:
        pool = pool_of(metrics, max_size=3)

        def work() -> None:
            for _ in range(100):
                with view.connection():
                    pass

        with as_threading(pool) as view:
            threads = [InThread(work) for _ in range(4)]
            while not all(thread.done() for thread in threads):
                metrics.metrics()  # by a thread that collects meanwhile
            assert [thread.result() for thread in threads] == [None] * 4
            assert metrics.count(f"{POOL}.wait_time") == 400
            assert metrics.count(f"{POOL}.use_time") == 400


class TestSemaphores:
    @pytest.mark.anyio
    @pytest.mark.parametrize("cls", [Semaphore, BoundedSemaphore])
    async def test_value_and_waiters(self, metrics: Metrics, cls: type[Semaphore]) -> None:
        semaphore = cls(2, name="s")
        instrument(semaphore, metrics.provider)
        async with semaphore, anyio.create_task_group() as tasks:
            assert metrics.values(f"{SEMAPHORE}.value") == {"s": 1}
            async with semaphore:
                thread = InThread(as_threading(semaphore).acquire)
                tasks.start_soon(semaphore.acquire)
                await until_async(lambda: semaphore.statistics().waiting == 2)
                assert metrics.values(f"{SEMAPHORE}.value") == {"s": 0}
                assert metrics.values(f"{SEMAPHORE}.waiters") == {"s": 2}
                assert metrics.count(f"{SEMAPHORE}.wait_time") == 2
            semaphore.release()
            await until_async(thread.done)
        assert metrics.values(f"{SEMAPHORE}.waiters") == {"s": 0}
        assert metrics.count(f"{SEMAPHORE}.wait_time") == 4

    @pytest.mark.anyio
    async def test_only_waits_can_time_out(self, metrics: Metrics) -> None:
        semaphore = Semaphore(1, name="s")
        instrument(semaphore, metrics.provider)
        assert metrics.values(f"{SEMAPHORE}.timeouts") == {"s": 0}
        assert await semaphore.acquire(blocking=False)
        assert not await semaphore.acquire(blocking=False)
        assert not await semaphore.acquire(timeout=0.01)
        semaphore.release()
        semaphore.acquire_nowait()
        with pytest.raises(anyio.WouldBlock):
            semaphore.acquire_nowait()
        assert metrics.values(f"{SEMAPHORE}.timeouts") == {"s": 1}
        assert metrics.count(f"{SEMAPHORE}.wait_time") == 2

    def test_permits_that_nobody_has_may_be_released(self, metrics: Metrics) -> None:
        semaphore = Semaphore(0, name="s")
        instrument(semaphore, metrics.provider)
        semaphore.release(3)
        semaphore.acquire_nowait()
        semaphore.release(2)
        assert metrics.values(f"{SEMAPHORE}.value") == {"s": 4}


async def broken(barrier: Any, timeout: float | None = None) -> None:
    with suppress(BrokenBarrierError):
        await barrier.wait(timeout)


def broken_rounds(metrics: Metrics) -> dict[str, float]:
    """Return the reasons for which rounds of the barrier "b" were broken, without zeros."""
    rounds = metrics.values(f"{BARRIER}.broken_rounds")
    return {name.removeprefix("b,"): number for name, number in rounds.items() if number}


class TestBarriers:
    @pytest.fixture
    def barrier(self, metrics: Metrics) -> Barrier:
        barrier = Barrier(3, name="b")
        instrument(barrier, metrics.provider)
        return barrier

    @pytest.mark.anyio
    async def test_parties_and_waiters(self, metrics: Metrics, barrier: Barrier) -> None:
        assert metrics.values(f"{BARRIER}.parties") == {"b": 3}
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(barrier.wait)
            thread = InThread(as_threading(barrier).wait)
            await until_async(lambda: barrier.n_waiting == 2)
            assert metrics.values(f"{BARRIER}.waiters") == {"b": 2}
            tasks.start_soon(barrier.wait)
        await until_async(thread.done)
        assert metrics.values(f"{BARRIER}.waiters") == {"b": 0}
        assert metrics.count(f"{BARRIER}.wait_time") == 3
        assert not broken_rounds(metrics)

    def test_all_reasons_begin_at_0(self, metrics: Metrics, barrier: Barrier) -> None:
        assert metrics.values(f"{BARRIER}.broken_rounds") == dict.fromkeys(
            ["b,aborted", "b,reset", "b,timeout", "b,cancelled", "b,action"], 0
        )

    @pytest.mark.anyio
    async def test_a_timeout_is_one_for_all_parties(
        self, metrics: Metrics, barrier: Barrier
    ) -> None:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(broken, barrier)
            tasks.start_soon(broken, barrier, 0.01)
        await broken(barrier)  # comes later
        barrier.abort()  # is broken already
        assert broken_rounds(metrics) == {"timeout": 1}
        assert metrics.count(f"{BARRIER}.wait_time") == 0

    @pytest.mark.anyio
    async def test_a_party_that_is_cancelled_alone(
        self, metrics: Metrics, barrier: Barrier
    ) -> None:
        with anyio.move_on_after(0.01):
            await barrier.wait()
        assert broken_rounds(metrics) == {"cancelled": 1}

    @pytest.mark.anyio
    async def test_abort_and_reset(self, metrics: Metrics, barrier: Barrier) -> None:
        barrier.reset()  # nobody waits
        assert not broken_rounds(metrics)
        for end in (barrier.reset, as_threading(barrier).abort):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(broken, barrier)
                tasks.start_soon(broken, barrier)
                await until_async(lambda: barrier.n_waiting == 2)
                end()
        barrier.reset()
        assert broken_rounds(metrics) == {"reset": 1, "aborted": 1}

    @pytest.mark.anyio
    async def test_rounds_that_break_at_once_are_counted_one_by_one(
        self, metrics: Metrics, barrier: Barrier
    ) -> None:
        """Before any party of the first one has run."""
        for _ in range(5):
            barrier.abort()
            barrier.reset()
        async with anyio.create_task_group() as tasks:
            for _ in range(2):
                tasks.start_soon(broken, barrier)
            await until_async(lambda: barrier.n_waiting == 2)
            barrier.abort()
            barrier.reset()
            barrier.abort()
            barrier.reset()
        assert broken_rounds(metrics) == {"aborted": 7}

    @pytest.mark.anyio
    async def test_an_action_that_fails(self, metrics: Metrics) -> None:
        def fail() -> None:
            raise ZeroDivisionError

        barrier = Barrier(2, fail, name="b")
        instrument(barrier, metrics.provider)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(broken, barrier)
            await until_async(lambda: barrier.n_waiting)
            with pytest.raises(ZeroDivisionError):
                await barrier.wait()
        assert broken_rounds(metrics) == {"action": 1}

    def test_threads(self, metrics: Metrics, barrier: Barrier) -> None:
        view = as_threading(barrier)

        def wait(timeout: float | None) -> None:
            with suppress(BrokenBarrierError):
                view.wait(timeout)

        for _ in range(20):
            threads = [InThread(lambda: wait(None)), InThread(lambda: wait(0.001))]
            assert [thread.result() for thread in threads] == [None] * 2
            barrier.reset()
        assert sum(broken_rounds(metrics).values()) == 20

    @pytest.mark.anyio
    async def test_rounds_end_with_the_barrier(self, metrics: Metrics, barrier: Barrier) -> None:
        """An error that is kept must not keep the rounds that follow."""
        with pytest.raises(BrokenBarrierError) as kept:
            await barrier.wait(0)
        names = [name for entry in kept.traceback for name in entry.frame.f_locals]
        assert "wait" in names
        assert not {"round", "earlier"} & {*names}


class TestObjects:
    def test_one_without_a_name_has_no_attribute(self, metrics: Metrics) -> None:
        one, two = Semaphore(1), Semaphore(2)
        instrument(one, metrics.provider)
        assert metrics.values(f"{SEMAPHORE}.value") == {"": 1}
        instrument(two, metrics.provider)
        assert metrics.values(f"{SEMAPHORE}.value") == {"": 3}

    def test_those_of_one_name_are_added_up(self, metrics: Metrics) -> None:
        some = [Semaphore(2, name="s"), Semaphore(3, name="s"), Semaphore(4, name="t")]
        for semaphore in some:
            instrument(semaphore, metrics.provider)
        assert metrics.values(f"{SEMAPHORE}.value") == {"s": 5, "t": 4}

    def test_one_that_is_collected_is_not_reported_any_more(self, metrics: Metrics) -> None:
        semaphore = Semaphore(2, name="s")
        instrument(semaphore, metrics.provider)
        assert metrics.values(f"{SEMAPHORE}.value") == {"s": 2}
        del semaphore
        gc.collect()
        assert not metrics.points(f"{SEMAPHORE}.value")

    def test_one_whose_record_lives_on_is_not_reported(self, metrics: Metrics) -> None:
        semaphore = Semaphore(2, name="s")
        instrument(semaphore, metrics.provider)
        record = record_of(semaphore)
        del semaphore
        gc.collect()
        assert record is not None
        assert record.shared is None
        assert not metrics.points(f"{SEMAPHORE}.value")

    @pytest.mark.anyio
    async def test_one_that_is_instrumented_twice_counts_once(self, metrics: Metrics) -> None:
        semaphore = Semaphore(2, name="s")
        instrument(semaphore, metrics.provider)
        instrument(semaphore, metrics.provider)
        async with semaphore:
            pass
        assert metrics.count(f"{SEMAPHORE}.wait_time") == 1
        assert metrics.values(f"{SEMAPHORE}.value") == {"s": 2}

    @pytest.mark.anyio
    async def test_a_second_provider_works_beside_the_first(self, metrics: Metrics) -> None:
        semaphore, second = Semaphore(2, name="s"), Metrics()
        instrument(semaphore, metrics.provider)
        instrument(semaphore, second.provider)
        async with semaphore:
            pass
        uninstrument(semaphore, metrics.provider)
        async with semaphore:
            pass
        assert metrics.count(f"{SEMAPHORE}.wait_time") == 1
        assert not metrics.points(f"{SEMAPHORE}.value")
        assert second.count(f"{SEMAPHORE}.wait_time") == 2
        assert second.values(f"{SEMAPHORE}.value") == {"s": 2}
        second.provider.shutdown()

    def test_one_that_is_not_instrumented_can_be_uninstrumented(self, metrics: Metrics) -> None:
        uninstrument(Semaphore(), metrics.provider)

    @pytest.mark.parametrize(
        "make",
        [
            lambda: as_threading(Semaphore()),
            lambda: as_threading(ConnectionPool(Connection)),
            lambda: from_threading(threading.Semaphore()),
            lambda: threading.Lock(),
            object,
        ],
    )
    def test_anything_else_is_refused(self, metrics: Metrics, make: Callable[[], object]) -> None:
        with pytest.raises(TypeError, match="reports semaphores, barriers and pools of aiosync"):
            instrument(make(), metrics.provider)

    @pytest.mark.anyio
    async def test_all_are_the_pools_that_are_open_and_what_is_created(
        self, metrics: Metrics
    ) -> None:
        before = Semaphore(1, name="before")
        async with ConnectionPool(Connection, name="db", max_size=7):
            closed = ConnectionPool(Connection, name="closed")
            instrument_all(metrics.provider)
            instrument_all(metrics.provider)  # changes nothing
            pool = ConnectionPool(Connection, name="new", max_size=8)
            semaphore, barrier = Semaphore(2, name="s"), Barrier(3, name="b")
            event = from_threading(threading.Event())
            async with closed, pool, semaphore:
                assert metrics.values(f"{POOL}.max") == {"db": 7, "new": 8}
                assert metrics.values(f"{SEMAPHORE}.value") == {"s": 1}
                assert metrics.values(f"{BARRIER}.parties") == {"b": 3}
            assert metrics.count(f"{SEMAPHORE}.wait_time") == 1
            uninstrument_all(metrics.provider)
            kept = [before, barrier, event, Semaphore(1, name="later")]
            for name in (f"{POOL}.max", f"{SEMAPHORE}.value", f"{BARRIER}.parties"):
                assert not metrics.points(name)
            uninstrument_all(metrics.provider)
        assert kept
        assert not _created.watchers

    @pytest.mark.anyio
    async def test_another_thread_may_open_a_pool_meanwhile(
        self, metrics: Metrics, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        async with ConnectionPool(Connection, name="db", max_size=7) as pool:

            class Changed(list[Any]):
                def __iter__(self) -> Any:
                    monkeypatch.undo()
                    raise RuntimeError("Set changed size during iteration")

            monkeypatch.setattr(_pool, "_open_pools", Changed([pool]))
            instrument_all(metrics.provider)
            assert metrics.values(f"{POOL}.max") == {"db": 7}

    def test_objects_may_be_created_while_metrics_are_collected(self, metrics: Metrics) -> None:
        instrument_all(metrics.provider)
        stop = threading.Event()

        def create() -> None:
            while not stop.is_set():
                Semaphore(1, name="s")

        threads = [InThread(create) for _ in range(2)]
        for _ in range(200):
            metrics.metrics()
        stop.set()
        assert [thread.result() for thread in threads] == [None] * 2


class _Failing(NoOpHistogram):
    """A histogram that runs `at_record`."""

    at_record: Callable[[float], None]
    contexts: list[object]

    def record(self, amount: float, attributes: Any = None, context: Any = None) -> None:
        self.contexts.append(context)
        self.at_record(amount)


class Provider(NoOpMeterProvider):
    """A provider whose histograms run `at_record` with each value."""

    def __init__(self, at_record: Callable[[float], None]) -> None:
        super().__init__()
        self.contexts: list[Any] = []
        provider = self

        class Meter(NoOpMeter):
            def create_histogram(self, name: str, *args: Any, **options: Any) -> Any:
                histogram = _Failing(name)
                histogram.contexts = provider.contexts
                histogram.at_record = at_record
                return histogram

        self._meter = Meter("aiosync")

    def get_meter(self, *args: Any, **options: Any) -> Any:
        return self._meter


class Interruption(BaseException):
    """What a signal handler raises."""


def interrupt(_: float) -> None:
    raise Interruption


class TestProviders:
    @pytest.mark.anyio
    async def test_an_error_is_logged_once_and_not_raised(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        def fail(_: float) -> None:
            raise OSError("the collector is gone")

        caplog.set_level(logging.INFO, "aiosync.opentelemetry")
        semaphore, provider = Semaphore(1), Provider(fail)
        instrument(semaphore, provider)
        for _ in range(3):
            async with semaphore:
                pass
        assert len(provider.contexts) == 3
        assert [record.message for record in caplog.records] == [
            "cannot record metrics; this is logged once"
        ]
        assert caplog.records[0].exc_info

    @pytest.mark.anyio
    async def test_an_interruption_of_the_recording_loses_nothing(self) -> None:
        pool, semaphore, provider = ConnectionPool(Connection), Semaphore(1), Provider(interrupt)
        instrument(pool, provider)
        instrument(semaphore, provider)
        async with pool:
            for _ in range(2):
                with pytest.raises(Interruption):
                    await pool.acquire()
                assert pool.statistics().in_use == 0
                with pytest.raises(Interruption):
                    await semaphore.acquire()
                assert semaphore.value == 1

    @pytest.mark.anyio
    async def test_objects_that_cannot_be_observed_are_created_all_the_same(
        self,
        metrics: Metrics,
        caplog: pytest.LogCaptureFixture,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        def refuse(*_: object, **__: object) -> None:
            raise TypeError("its class cannot be extended")

        monkeypatch.setattr(_reporter, "observe", refuse)
        instrument_all(metrics.provider)
        async with Semaphore():
            pass
        assert [record.name for record in caplog.records] == ["aiosync.opentelemetry"]

    @pytest.mark.anyio
    async def test_a_release_that_interrupts_the_recording_waits_for_no_lock(self) -> None:
        """As a signal handler or a finalizer would, while the SDK holds a lock."""
        locked = threading.Lock()
        values: list[float] = []

        def record(value: float) -> None:
            assert locked.acquire(blocking=False)
            if len(values) == 1:
                pool.release(pool.acquire_nowait())
                view.acquire()  # a call that waits, too
            values.append(value)
            locked.release()

        pool = ConnectionPool(Connection, min_size=2)
        semaphore = Semaphore(2)
        provider = Provider(record)
        instrument(pool, provider)
        instrument(semaphore, provider)
        view = as_threading(semaphore)
        async with pool:
            await pool.wait()  # creates two
            async with pool.connection():
                pass
            view.acquire()
            # create, create, wait, use, wait, and what was added meanwhile
            assert len(values) == 8

    @pytest.mark.anyio
    async def test_a_value_is_recorded_in_the_context_that_it_belongs_to(self) -> None:
        provider = Provider(lambda _: None)
        async with ConnectionPool(Connection) as pool:
            connection = await pool.acquire()
            instrument(pool, provider)
            pool.release(connection)
            connection = await pool.acquire()
            token = context.attach(context.set_value("span", "mine"))
            pool.release(connection)
            context.detach(token)
            pool.release(await pool.acquire())
        spans = [context.get_value("span", found) for found in provider.contexts]
        assert spans == [None, "mine", None]

    def test_values_that_nobody_collects_are_bounded(self, monkeypatch: Any) -> None:
        from aiosync.opentelemetry import _reporter

        monkeypatch.setattr(_reporter, "_MOST_PENDING", 10)
        values: list[float] = []
        semaphore = Semaphore()
        instrument(semaphore, Provider(values.append))
        for _ in range(30):
            semaphore.acquire_nowait()
            semaphore.release()
        as_threading(semaphore).acquire()
        assert len(values) == 10

    def test_the_global_one_may_be_set_later(self) -> None:
        program = """if True:
            from aiosync import Semaphore, as_threading
            from aiosync.opentelemetry import instrument, instrument_all
            from opentelemetry.metrics import get_meter_provider, set_meter_provider
            from opentelemetry.sdk.metrics import MeterProvider
            from opentelemetry.sdk.metrics.export import InMemoryMetricReader

            instrument_all()
            semaphore = Semaphore(3, name="s")
            reader = InMemoryMetricReader()
            provider = MeterProvider([reader])
            set_meter_provider(provider)
            instrument_all()
            instrument(semaphore)
            instrument(semaphore, provider)
            instrument(semaphore, get_meter_provider())
            as_threading(semaphore).acquire()
            metrics = {
                metric.name: metric.data.data_points[0]
                for metric in reader.get_metrics_data().resource_metrics[0].scope_metrics[0].metrics
            }
            print(metrics["aiosync.semaphore.value"].value)
            print(metrics["aiosync.semaphore.wait_time"].count)
            """
        result = run_python("-c", program)
        assert (result.stdout, result.stderr) == ("2\n1\n", "")

    def test_without_one_nothing_is_reported(self) -> None:
        program = """if True:
            from aiosync import Semaphore, as_threading
            from aiosync.opentelemetry import instrument
            semaphore = Semaphore()
            instrument(semaphore)
            as_threading(semaphore).acquire()
            import sys
            print(any(name.startswith("opentelemetry.sdk") for name in sys.modules))
            """
        assert run_python("-c", program).stdout == "False\n"


class TestWithoutThePackage:
    def test_the_error_is_raised_at_import(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
        with pytest.raises(ImportError, match=r"pip install 'aiosync\[opentelemetry\]'"):
            importlib.reload(aiosync.opentelemetry)

    def test_an_error_names_the_extra(self) -> None:
        program = """if True:
            import sys
            sys.modules["opentelemetry"] = None
            import aiosync.opentelemetry
            """
        result = run_python("-c", program)
        assert "ImportError: aiosync.opentelemetry needs opentelemetry-api" in result.stderr
        assert "pip install 'aiosync[opentelemetry]'" in result.stderr

    def test_aiosync_alone_does_not_import_it(self) -> None:
        program = "import sys, aiosync; print('opentelemetry' in sys.modules)"
        assert run_python("-c", program).stdout == "False\n"


class TestDebugging:
    """`aiosync.debug` keeps its own records of the same objects."""

    def test_metrics_alone_name_no_callers(self, metrics: Metrics) -> None:
        semaphore = Semaphore(2)
        instrument(semaphore, metrics.provider)
        semaphore.acquire_nowait()
        with pytest.raises(ValueError, match="keeps no record"):
            debug.holders(semaphore)

    @pytest.mark.parametrize("debug_first", [True, False])
    @pytest.mark.anyio
    async def test_both_at_once(self, metrics: Metrics, debug_first: bool) -> None:
        enablers: list[Callable[[], None]] = [
            lambda: debug.enable(watchdog=None),
            lambda: instrument_all(metrics.provider),
        ]
        for enable in enablers if debug_first else enablers[::-1]:
            enable()
        try:
            semaphore = Semaphore(2, name="s")
        finally:
            debug.disable()
        async with semaphore:
            (holder,) = debug.holders(semaphore)
            assert holder.file == __file__
        assert not debug.holders(semaphore)
        assert metrics.count(f"{SEMAPHORE}.wait_time") == 1


@pytest.mark.redis
class TestDistributed:
    @pytest.fixture
    def anyio_backend(self) -> str:
        return "asyncio"

    @pytest.mark.anyio
    async def test_a_semaphore(self, metrics: Metrics, redis_server: Any) -> None:
        redis = Redis(redis_server.url, prefix="metrics-1", restart_gate=False)
        semaphore = redis.semaphore("s", 1)
        instrument(semaphore, metrics.provider)
        async with redis, anyio.create_task_group() as tasks:
            async with semaphore:
                assert not await semaphore.acquire(timeout=0.05)
                assert not await semaphore.acquire(blocking=False)
                tasks.start_soon(semaphore.acquire)
                await until_async(lambda: metrics.values(f"{SEMAPHORE}.waiters") == {"s": 1})
            await until_async(lambda: metrics.count(f"{SEMAPHORE}.wait_time") == 2)
            semaphore.release()
        assert metrics.values(f"{SEMAPHORE}.timeouts") == {"s": 1}
        assert not metrics.points(f"{SEMAPHORE}.value")  # only the server knows

    @pytest.mark.anyio
    async def test_a_round_is_counted_once_for_the_process(
        self, metrics: Metrics, redis_server: Any
    ) -> None:
        redis = Redis(redis_server.url, prefix="metrics-2", restart_gate=False)
        barriers = [redis.barrier("b", 3) for _ in range(2)]
        for barrier in barriers:
            instrument(barrier, metrics.provider)
        async with redis:
            for _ in range(2):
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(broken, barriers[0])
                    tasks.start_soon(broken, barriers[1], 0.05)
                await broken(barriers[0])  # has arrived in no round
                barriers[0].reset()
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(barriers[0].wait)
                await until_async(lambda: barriers[0].n_waiting)
                tasks.cancel_scope.cancel()
            await until_async(lambda: broken_rounds(metrics) == {"timeout": 2, "cancelled": 1})
            assert metrics.values(f"{BARRIER}.waiters") == {"b": 0}
            assert metrics.values(f"{BARRIER}.broken_rounds")["b,lost"] == 0
            barriers[0].reset()
            async with anyio.create_task_group() as tasks:
                for barrier in (*barriers, barriers[0]):
                    tasks.start_soon(barrier.wait)
            assert metrics.count(f"{BARRIER}.wait_time") == 3
            assert broken_rounds(metrics) == {"timeout": 2, "cancelled": 1}
