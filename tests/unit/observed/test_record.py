"""Records of observed objects, as those who listen see them."""

from __future__ import annotations

import gc
import json
import sys
import threading
from pathlib import Path
from typing import Any

import anyio
import pytest
from support.helpers import InThread, until_async

from aiosync import Barrier, BrokenBarrierError, ConnectionPool, Semaphore, as_threading, debug
from aiosync._observed import Attempt, BrokenRound, Record, Records, observe, unobserve
from aiosync._observed._caller import UNKNOWN
from aiosync.redis import Redis


class Heard:
    """A listener that keeps what it is told."""

    def __init__(self) -> None:
        self.told: list[Any] = []

    def wait_began(self, wait: Any) -> None:
        self.told.append("wait began")

    def wait_ended(self, wait: Any, outcome: str) -> None:
        self.told.append(outcome)

    def hold_began(self, hold: Any) -> None:
        self.told.append("hold began")

    def hold_ended(self, hold: Any) -> None:
        self.told.append("hold ended")

    def happened(self, record: Record, event: Any) -> None:
        self.told.append(event)


class TestListeners:
    def test_one_is_told_once_although_it_observes_twice(self) -> None:
        semaphore, heard = Semaphore(), Heard()
        assert observe(semaphore, heard) is observe(semaphore, heard)
        as_threading(semaphore).acquire()
        assert heard.told == ["wait began", "got", "hold began"]

    def test_one_that_has_left_is_told_no_more(self) -> None:
        semaphore, first, second = Semaphore(), Heard(), Heard()
        record = observe(semaphore, first)
        observe(semaphore, second)
        unobserve(record, first)
        semaphore.release()
        as_threading(semaphore).acquire()
        assert not first.told
        assert second.told

    def test_many_threads_may_observe_one_object(self) -> None:
        semaphore = Semaphore()
        listeners = [Heard() for _ in range(20)]
        barrier = threading.Barrier(20)

        def look(listener: Heard) -> Record:
            barrier.wait()
            return observe(semaphore, listener)

        threads = [InThread(lambda heard=heard: look(heard)) for heard in listeners]  # type: ignore[misc]
        assert len({thread.result() for thread in threads}) == 1
        as_threading(semaphore).acquire()
        assert all(heard.told for heard in listeners)

    @pytest.mark.anyio
    async def test_a_call_that_does_not_wait_is_an_attempt(self) -> None:
        semaphore, heard = Semaphore(), Heard()
        observe(semaphore, heard)
        assert await semaphore.acquire(blocking=False)
        assert not await semaphore.acquire(blocking=False)
        semaphore.release()
        semaphore.acquire_nowait()
        attempts = [event.outcome for event in heard.told if isinstance(event, Attempt)]
        assert attempts == ["got", "got"]

    def test_callers_are_found_out_if_a_listener_wants_to_know(self) -> None:
        semaphore = Semaphore(3)
        record = observe(semaphore, Heard(), names_callers=False)
        semaphore.acquire_nowait()
        assert {hold.caller for hold in record.holds} == {UNKNOWN}
        assert str(UNKNOWN) == "thread 'unknown'"
        observe(semaphore, Heard())
        semaphore.acquire_nowait()
        assert [hold.caller is UNKNOWN for hold in record.holds] == [True, False]

    @pytest.mark.parametrize("names_callers", [True, False])
    def test_a_release_ends_as_many_holds(self, names_callers: bool) -> None:
        semaphore, heard = Semaphore(3), Heard()
        record = observe(semaphore, heard, names_callers=names_callers)
        for _ in range(3):
            semaphore.acquire_nowait()
        semaphore.release(2)
        assert len(record.holds) == 1
        assert record.capacity == 3
        semaphore.release(2)
        assert not record.holds
        assert record.capacity == 4
        assert heard.told.count("hold ended") == 3

    def test_what_was_lost_is_not_among_the_holders(self) -> None:
        semaphore, heard = Semaphore(), Heard()
        record = observe(semaphore, heard)
        record.hold(is_kept=lambda: True)
        record.hold(is_kept=lambda: False)
        assert len(debug.holders(semaphore)) == 1
        assert heard.told == ["hold began", "hold began", "hold ended"]

    @pytest.mark.anyio
    async def test_what_the_pool_takes_away_is_held_no_more(self) -> None:
        class Connection:
            pass

        pool, heard = ConnectionPool(Connection, close_timeout=0.01), Heard()
        record = observe(pool, heard)
        async with pool:
            kept = await pool.acquire()
            await pool.acquire()
            lost = list(record.holds)[1]
            gc.collect()
            await until_async(lambda: len(record.holds) == 1)
        assert not record.holds
        record.drop(lost)  # changes nothing
        pool.release(kept)
        assert heard.told.count("hold ended") == 2


class Interruption(BaseException):
    """What a signal handler raises."""


class Interrupted(Heard):
    """A listener that a signal handler interrupts at the end of each wait."""

    def wait_ended(self, wait: Any, outcome: str) -> None:
        super().wait_ended(wait, outcome)
        raise Interruption


class TestInterruptions:
    @pytest.mark.anyio
    async def test_a_semaphore_keeps_its_permits(self) -> None:
        semaphore = Semaphore(1)
        record = observe(semaphore, Interrupted())
        for timeout in (None, 1):
            with pytest.raises(Interruption):
                await semaphore.acquire(timeout=timeout)
            assert semaphore.value == 1
        semaphore.acquire_nowait()
        with pytest.raises(Interruption):
            await semaphore.acquire(timeout=0.01)
        semaphore.release()
        assert semaphore.value == 1
        assert not record.waits
        assert not record.holds

    @pytest.mark.anyio
    async def test_an_attempt_that_is_cancelled_keeps_no_permit(self) -> None:
        semaphore, heard = Semaphore(1), Heard()
        observe(semaphore, heard)
        with anyio.CancelScope() as scope:
            scope.cancel()
            await semaphore.acquire(blocking=False)
        assert semaphore.value == 1
        assert not heard.told

    @pytest.mark.anyio
    async def test_a_pool_keeps_its_connections(self) -> None:
        pool = ConnectionPool(object, max_size=1)
        observe(pool, Interrupted())
        async with pool:
            with pytest.raises(Interruption):
                await pool.acquire()
            connection = await pool.acquire(0)
            with pytest.raises(Interruption):
                await pool.acquire(0.01)
            pool.release(connection)
            assert pool.statistics().in_use == 0

    @pytest.mark.anyio
    @pytest.mark.redis
    async def test_a_distributed_semaphore_keeps_its_permits(self, redis_server: Any) -> None:
        redis = Redis(redis_server.url, prefix="observed", restart_gate=False)
        semaphore = redis.semaphore("s", 1)
        async with redis:
            async with semaphore:
                observe(semaphore._calls, Interrupted())
                with pytest.raises(Interruption):
                    await semaphore.acquire(timeout=0.01)
            for _ in range(2):
                with pytest.raises(Interruption):
                    await semaphore.acquire(timeout=10)


class TestRounds:
    @pytest.mark.anyio
    async def test_a_broken_round_is_told_before_its_waits_end(self) -> None:
        barrier, heard = Barrier(2), Heard()
        observe(barrier, heard)
        with pytest.raises(BrokenBarrierError):
            await barrier.wait(0)
        with pytest.raises(BrokenBarrierError):
            await barrier.wait()
        assert heard.told == [
            "wait began", BrokenRound("timeout"), "timeout", "wait began", "timeout",
        ]  # fmt: skip

    def test_a_barrier_is_one_whatever_the_name_of_its_class(self) -> None:
        class Gate(Barrier):
            pass

        assert observe(Gate(2), Heard()).is_barrier


class TestRecords:
    def test_one_is_forgotten_with_its_object(self) -> None:
        records, semaphore = Records(), Semaphore()
        record = observe(semaphore, Heard())
        records.add(record)
        records.add(record)
        assert record in records
        assert list(records) == [record]
        del record, semaphore
        gc.collect()
        assert not list(records)

    def test_objects_may_be_created_during_a_report(self) -> None:
        debug.enable(watchdog=None)
        begun, stop = threading.Event(), threading.Event()

        def create() -> list[Semaphore]:
            created: list[Semaphore] = [Semaphore() for _ in range(1000)]
            begun.set()
            while not stop.is_set():
                created.append(Semaphore())
            return created

        interval = sys.getswitchinterval()
        sys.setswitchinterval(1e-6)
        try:
            thread = InThread(create)
            begun.wait()
            for _ in range(200):
                list(debug._tracking.records)
        finally:
            sys.setswitchinterval(interval)
            stop.set()
            debug.disable()
        assert isinstance(thread.result(), list)


class TestTimeline:
    """`debug.record` writes what concerns it."""

    @pytest.mark.anyio
    async def test_events_of_all_kinds_of_objects(self, tmp_path: Path) -> None:
        class Pool(ConnectionPool[object]):
            """A pool of a class of its own, as those of `aiosync.recipes`."""

        path = tmp_path / "trace.json"
        with debug.record(path):
            try:
                semaphore, barrier, pool = Semaphore(), Barrier(2), Pool(object, name="db")
            finally:
                debug.disable()
            semaphore.acquire_nowait()
            semaphore.release()
            barrier.abort()
            async with pool:
                async with pool.connection():
                    pass
                pool.release(pool.acquire_nowait())
        events = json.loads(path.read_text("utf-8"))
        groups = [event["args"]["name"] for event in events if event["name"] == "process_name"]
        assert groups[1:] == ["barriers", "connections of db"]
        uses = [event for event in events if event["name"].startswith("used by")]
        assert len(uses) == 2
