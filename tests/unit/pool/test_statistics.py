"""Statistics of a pool."""

from __future__ import annotations

import json
from dataclasses import FrozenInstanceError
from typing import Any

import anyio
import anyio.lowlevel
import anyio.to_thread
import pytest
from anyio import create_task_group
from support.helpers import settle
from support.pool_stubs import (
    Backend,
    Connection,
    Virtual,
    give_back,
    some,
    take,
    take_and_keep,
    use,
)

from aiosync import (
    PoolClosed,
    PoolTimeout,
    TooManyRequests,
)

PSYCOPG_KEYS = {
    "pool_min", "pool_max", "pool_size", "pool_available", "requests_waiting", "requests_num",
    "requests_queued", "requests_wait_ms", "requests_errors", "usage_ms", "returns_bad",
    "connections_num", "connections_ms", "connections_errors", "connections_lost",
}  # fmt: skip


REASONS = (
    "lifetime", "idle", "check", "reset", "configure", "discard", "drain", "resize", "collected",
    "shutdown", "forced", "limit",
)  # fmt: skip


OTHER_KEYS = {"in_use", "connecting", "timeouts", "cancelled", "leaks"} | {
    f"closed_{reason}" for reason in REASONS
}


@pytest.mark.anyio
class TestStats(Virtual):
    async def test_the_keys_are_those_of_psycopg_pool_and_some_more(self, backend: Backend) -> None:
        pool = backend.pool()
        assert set(pool.get_stats()) == PSYCOPG_KEYS | OTHER_KEYS
        async with pool:
            await settle()
            assert set(pool.get_stats()) == PSYCOPG_KEYS | OTHER_KEYS
        assert all(type(value) is int for value in pool.get_stats().values())
        assert len(PSYCOPG_KEYS) == 15

    async def test_every_number_of_a_short_story(self, backend: Backend) -> None:
        backend.pause = 0.25
        async with backend.pool(min_size=1, max_size=2, timeout=10) as pool:
            zero = dict.fromkeys(PSYCOPG_KEYS | OTHER_KEYS, 0)
            zero.update(pool_min=1, pool_max=2)
            assert pool.get_stats() == zero
            await settle()
            assert pool.get_stats() == {**zero, "pool_size": 1, "connecting": 1}
            await pool.wait()
            connected = {"connections_num": 1, "connections_ms": 250}
            assert pool.get_stats() == {**zero, **connected, "pool_size": 1, "pool_available": 1}
            one = await pool.acquire()
            two = await pool.acquire()  # after 0.25 seconds
            async with create_task_group() as tg:
                tg.start_soon(take, pool, [])
                await settle()
                assert pool.get_stats()["requests_waiting"] == 1
                await anyio.sleep(0.75)
                tg.cancel_scope.cancel()
            with pytest.raises(PoolTimeout):
                await pool.acquire(0.5)
            with pytest.raises(PoolTimeout):
                await pool.acquire(0)
            now = {
                **zero,
                "pool_size": 2, "in_use": 2,
                "connections_num": 2, "connections_ms": 500,
                "requests_num": 5, "requests_queued": 3, "requests_wait_ms": 1500,
                "requests_errors": 2, "timeouts": 2, "cancelled": 1,
            }  # fmt: skip
            assert pool.get_stats() == now
            pool.release(one)  # after 1.5 seconds
            pool.discard(two)  # after 1.25 seconds
            await settle()
            now.update(
                pool_size=1, pool_available=1, in_use=0, usage_ms=2750, closed_discard=1,
                returns_bad=1,
            )  # fmt: skip
            assert pool.get_stats() == now
        now.update(pool_min=0, pool_max=0, pool_size=0, pool_available=0, closed_shutdown=1)
        assert pool.get_stats() == now

    async def test_errors_of_connecting(self, backend: Backend) -> None:
        backend.refuses = True
        async with backend.pool(min_size=1) as pool:
            await anyio.sleep(1000)
            stats = pool.get_stats()
            assert stats["connections_num"] == stats["connections_errors"] == len(backend.attempts)
            assert stats["connections_ms"] == 0

    async def test_what_info_tells_of_a_connection(self, backend: Backend) -> None:
        async with backend.pool(max_size=1, max_lifetime=1000) as pool:
            connection = await pool.acquire()
            await anyio.sleep(3)
            info = pool.info(connection)
            assert info.age == pytest.approx(3)
            assert info.in_use == pytest.approx(3)
            assert (info.uses, info.usage) == (1, 0)
            assert 947 <= info.expires_in <= 997
            pool.release(connection)
            await anyio.sleep(10)
            info = pool.info(connection)
            assert info.age == pytest.approx(13)
            assert info.in_use is None
            assert info.usage == pytest.approx(3)
            with pytest.raises(ValueError, match="Connection does not belong to"):
                pool.info(Connection(1))
            await pool.drain()
            await settle()
            with pytest.raises(ValueError, match="does not belong"):
                pool.info(connection)


def in_bucket(histogram: Any) -> dict[float, int]:
    """Return the counts of the buckets that are not empty, by their upper bounds."""
    bounds = (*histogram.bounds, float("inf"))
    return {bound: count for bound, count in zip(bounds, histogram.counts, strict=True) if count}


@pytest.mark.anyio
class TestStatistics(Virtual):
    async def test_the_present(self, backend: Backend) -> None:
        backend.pause = 1
        async with backend.pool(min_size=1, max_size=3) as pool:
            await pool.wait()
            async with create_task_group() as tg:
                tg.start_soon(take_and_keep, pool, 5)
                await settle()
                connections = await some(pool, 1)
                tg.start_soon(take, pool, connections)
                tg.start_soon(take, pool, connections)
                await settle()
                found = pool.statistics()
                assert (found.min_size, found.max_size) == (1, 3)
                assert (found.size, found.idle, found.in_use, found.connecting) == (3, 0, 2, 1)
                assert (found.tasks_waiting, found.threads_waiting) == (2, 0)
                await anyio.sleep(6)
            give_back(pool, connections)
            found = pool.statistics()
            assert (found.size, found.idle, found.in_use, found.connecting) == (3, 3, 0, 0)
            assert (found.tasks_waiting, found.threads_waiting) == (0, 0)

    async def test_times(self, backend: Backend) -> None:
        backend.pause = 0.2
        async with backend.pool(max_size=1) as pool:
            async with create_task_group() as tg:
                tg.start_soon(take_and_keep, pool, 2)
                await anyio.sleep(0.2)
                tg.start_soon(take_and_keep, pool, 40)
            await use(pool)
            found = pool.statistics()
        # Each but the last one had to wait: for the connect, and for the one before.
        assert in_bucket(found.wait_time) == {0.25: 1, 2.5: 1}
        assert found.wait_time.sum == pytest.approx(0.2 + 2)
        assert in_bucket(found.use_time) == {0.0001: 1, 2.5: 1, 60: 1}
        assert found.use_time.count == 3
        assert found.use_time.sum == pytest.approx(42)
        assert in_bucket(found.connect_time) == {0.25: 1}
        assert found.connect_time.sum == pytest.approx(0.2)
        assert (found.loans, found.queued, found.connects) == (3, 2, 1)

    async def test_a_duration_falls_into_the_bucket_of_its_bound(self, backend: Backend) -> None:
        async with backend.pool(max_size=1) as pool:
            bounds = pool.statistics().use_time.bounds
            assert list(bounds) == sorted(bounds)
            for seconds in (5, 5.1, 61):
                async with pool.connection():
                    await anyio.sleep(seconds)
            found = in_bucket(pool.statistics().use_time)
        assert found == {5: 1, 10: 1, float("inf"): 1}

    async def test_times_of_many_uses_are_all_counted(self, backend: Backend) -> None:
        async with backend.pool(max_size=1) as pool:
            for number in range(1000):
                assert pool.statistics().use_time.count == number
                async with pool.connection():
                    await anyio.sleep(0.002)
            assert in_bucket(pool.statistics().use_time) == {0.0025: 1000}
        assert in_bucket(pool.statistics().use_time) == {0.0025: 1000}

    async def test_times_of_those_who_waited_in_vain(self, backend: Backend) -> None:
        async with backend.pool(max_size=1) as pool, pool.connection():
            with pytest.raises(PoolTimeout):
                await pool.acquire(3)
            with anyio.move_on_after(7):
                await pool.acquire(20)
            found = pool.statistics()
        # The first one waited for the connect, which took no time.
        assert in_bucket(found.wait_time) == {0.0001: 1, 5: 1, 10: 1}
        assert (found.loans, found.timeouts, found.cancelled, found.queued) == (1, 1, 1, 3)

    async def test_requests_by_their_outcome(self, backend: Backend) -> None:
        errors: list[object] = []

        async def wait() -> None:
            with pytest.raises(PoolClosed) as caught:
                await pool.acquire()
            errors.append(caught.value)

        pool = backend.pool(max_size=1, max_waiting=1, close_timeout=0)
        async with pool, create_task_group() as tg:
            connection = await pool.acquire()
            with pytest.raises(PoolTimeout):
                await pool.acquire(0)
            tg.start_soon(wait)
            await settle()
            for _ in range(3):
                with pytest.raises(TooManyRequests):
                    await pool.acquire()
            tg.start_soon(pool.close)
        found = pool.statistics()
        assert len(errors) == 1
        assert (found.loans, found.queued, found.refusals, found.timeouts) == (1, 2, 3, 1)
        assert (found.cancelled, found.errors) == (0, 1)
        assert found.closed["forced"] == 1
        pool.release(connection)

    async def test_those_that_fail_fast_are_refused(self, backend: Backend) -> None:
        backend.refuses = True
        async with backend.pool(fail_fast=True) as pool:
            for _ in range(4):
                with pytest.raises(PoolTimeout):
                    await pool.acquire()
            found = pool.statistics()
            # The first one waited for the outage; the others for nothing.
            assert (found.errors, found.refusals, found.queued) == (1, 3, 1)
            assert (found.loans, found.connects, found.connect_errors) == (0, 3, 3)

    async def test_what_fails_between_loans(self, backend: Backend) -> None:
        async def fail(_: Connection) -> None:
            raise KeyError("no")

        async def fail_to_close() -> None:
            raise OSError("no")

        backend.at_close = fail_to_close
        async with backend.pool(reset=fail, min_size=1, check=lambda _: False) as pool:
            await pool.wait()
            await pool.check()
            await pool.wait()
            await use(pool)
            await settle()
            found = pool.statistics()
            assert (found.failed_checks, found.failed_resets, found.failed_closes) == (1, 1, 2)
            assert {reason: n for reason, n in found.closed.items() if n} == {
                "check": 1,
                "reset": 1,
            }

    async def test_as_dict_is_plain(self, backend: Backend) -> None:
        async with backend.pool() as pool:
            await use(pool)
            found = pool.statistics()
        plain = found.as_dict()
        assert json.loads(json.dumps(plain)) == plain
        assert plain["loans"] == 1
        assert plain["closed"]["shutdown"] == 0
        assert sum(plain["use_time"]["counts"]) == 1
        assert len(plain["use_time"]["counts"]) == len(plain["use_time"]["bounds"]) + 1
        assert plain["use_time"] == found.use_time.as_dict()
        plain["closed"]["shutdown"] = 7
        assert found.closed["shutdown"] == 0

    async def test_a_snapshot_does_not_change(self, backend: Backend) -> None:
        async with backend.pool() as pool:
            before = pool.statistics()
            await use(pool)
            assert (before.loans, before.use_time.count) == (0, 0)
            with pytest.raises(FrozenInstanceError):
                before.loans = 5  # type: ignore[misc]
            with pytest.raises(FrozenInstanceError):
                before.use_time.sum = 5  # type: ignore[misc]
