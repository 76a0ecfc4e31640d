"""What distributed semaphores do while nothing fails, on a real server. Faults have a file of
their own.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import gc
import importlib
import importlib.util
import os
import pickle
import random
import signal
import threading
import time
import warnings
from collections.abc import AsyncIterator, Awaitable, Callable, Generator
from functools import partial
from typing import Any

import anyio
import anyio.to_thread
import coredis
import pytest
from anyio import CancelScope, create_task_group, fail_after, move_on_after, sleep
from anyio.lowlevel import checkpoint
from support.helpers import InThread, until_async
from support.permits import Child, State, connect, new_name
from support.redis_servers import RedisServer, wait_until

import aiosync.redis
from aiosync import as_threading
from aiosync.redis import (
    BackendUnavailable,
    DistributedSemaphore,
    DistributedSemaphoreStatistics,
    LeaseLost,
    Permit,
    Redis,
)
from aiosync.redis._permits import PermitTicket

pytestmark = [pytest.mark.anyio, pytest.mark.redis, pytest.mark.timeout(60)]


@pytest.fixture
async def elsewhere(redis_server: RedisServer) -> AsyncIterator[Redis]:
    """The same as another process would have: the server cannot tell."""
    async with connect(redis_server) as redis:
        yield redis


@pytest.fixture
def state(redis_server: RedisServer, name: str) -> State:
    return State(redis_server, name)


def channels(server: RedisServer, name: str) -> int:
    """Return to how many channels of `name` somebody listens."""
    return len(server.command("PUBSUB", "CHANNELS", f"*{{{name}}}*"))


# --- acquire and release


async def test_acquire_and_release(redis: Redis, name: str, state: State) -> None:
    semaphore = redis.semaphore(name, 2)
    assert await semaphore.acquire() is True
    assert await semaphore.acquire() is True
    assert len(state.holders) == 2
    assert await semaphore.acquire(blocking=False) is False
    semaphore.release()
    assert await semaphore.acquire() is True
    semaphore.release(2)
    await redis.flush()
    assert state.is_unused


async def test_the_first_call_for_a_name_may_be_one_that_does_not_wait(
    redis: Redis, name: str
) -> None:
    semaphore = redis.semaphore(name)
    assert await semaphore.acquire(blocking=False) is True
    assert await semaphore.acquire(timeout=0) is False
    semaphore.release()


async def test_a_task_may_enter_a_semaphore_twice(redis: Redis, name: str) -> None:
    semaphore = redis.semaphore(name, 2)
    async with semaphore:
        async with semaphore:
            assert await semaphore.acquire(blocking=False) is False
        assert (await semaphore.statistics()).held == 1
    assert (await semaphore.statistics()).held == 0


async def test_of_three_permits_the_fourth_is_refused(
    redis: Redis, elsewhere: Redis, name: str
) -> None:
    here, there = redis.semaphore(name, 3), elsewhere.semaphore(name, 3)
    assert [await s.acquire(blocking=False) for s in (here, there, here, there)] == [
        True,
        True,
        True,
        False,
    ]
    here.release(2)
    there.release()


async def test_a_pair_takes_one_command(redis_server: RedisServer, redis: Redis, name: str) -> None:
    semaphore = redis.semaphore(name)
    async with semaphore:
        pass
    await redis.flush()
    before = redis_server.calls("evalsha")
    for _ in range(50):
        async with semaphore:
            pass
    await redis.flush()
    # One more for the last release, or two: `flush` asks for an answer.
    assert redis_server.calls("evalsha") - before <= 52


async def test_fifty_tasks_share_commands(
    redis_server: RedisServer, redis: Redis, name: str
) -> None:
    semaphore = redis.semaphore(name, 50)
    await semaphore.statistics()

    async def work() -> None:
        for _ in range(20):
            async with semaphore:
                pass

    before = redis_server.calls("evalsha")
    async with create_task_group() as tasks:
        for _ in range(50):
            tasks.start_soon(work)
    await redis.flush()
    assert redis_server.calls("evalsha") - before <= 0.05 * 50 * 20


async def test_a_hand_off_takes_one_command_of_each_process(
    redis_server: RedisServer, redis: Redis, elsewhere: Redis, name: str
) -> None:
    async def work(semaphore: DistributedSemaphore) -> None:
        for _ in range(50):
            async with semaphore:
                pass

    before = redis_server.calls("evalsha")
    async with create_task_group() as tasks:
        for somewhere in (redis, elsewhere):
            tasks.start_soon(work, somewhere.semaphore(name))
    # The first and the last ones are alone.
    assert redis_server.calls("evalsha") - before <= 100 + 6


@pytest.mark.slow
async def test_a_thousand_waiters(redis_server: RedisServer, name: str, state: State) -> None:
    lease = 1.0
    async with connect(redis_server, lease=lease) as redis, create_task_group() as tasks:
        semaphore = redis.semaphore(name)
        served: list[int] = []

        async def take(i: int) -> None:
            async with semaphore:
                served.append(i)

        await semaphore.acquire()
        for i in range(1000):
            tasks.start_soon(take, i)
            if i % 100 == 0:
                await checkpoint()  # trio shuffles tasks that start at the same time
        await until_async(lambda: len(state.waiters) == 1000)
        assert channels(redis_server, name) == 1
        usage = redis_server.command("MEMORY", "USAGE", f"{state.key}:waiters", "SAMPLES", 0)
        assert usage <= 200 * 1000
        # A third of a lease between heartbeats, and one more for an expiry.
        before, start = redis_server.calls("evalsha"), time.monotonic()
        await sleep(lease)
        leases = (time.monotonic() - start) / lease
        assert redis_server.calls("evalsha") - before <= 4 * leases + 1
        places = [waiter.rpartition(":")[2] for waiter in state.waiters]
        assert places == sorted(places, key=int)
        semaphore.release()
    assert len(served) == 1000
    assert state.is_unused


@pytest.mark.slow
async def test_ten_thousand_permits_in_one_process(
    redis_server: RedisServer, name: str, state: State
) -> None:
    lease, n = 2.0, 10_000
    async with connect(redis_server, lease=lease) as redis:
        semaphore = redis.semaphore(name, n)
        async with create_task_group() as tasks:
            for _ in range(n):
                tasks.start_soon(semaphore.acquire)
        assert len(state.holders) == n
        before, start = redis_server.calls("evalsha"), time.monotonic()
        await sleep(lease)
        leases = (time.monotonic() - start) / lease
        assert redis_server.calls("evalsha") - before <= 4 * leases
        semaphore.release(n)
        await redis.flush()
        assert state.is_unused


@pytest.mark.slow
async def test_a_process_that_has_left_is_forgotten_after_a_lease(
    redis_server: RedisServer, name: str, state: State
) -> None:
    lease = 0.5
    for _ in range(3):
        async with connect(redis_server, lease=lease) as redis, redis.semaphore(name):
            pass
    async with connect(redis_server, lease=lease) as redis:
        semaphore = redis.semaphore(name)
        assert (await semaphore.statistics()).members == 4
        await sleep(lease)
        assert (await semaphore.statistics()).members == 1
        fields = redis_server.command("HKEYS", state.key)
        assert sum(field.startswith(b"epoch:") for field in fields) == 1


async def test_waiters_of_all_processes_are_served_in_fifo_order(
    redis: Redis, elsewhere: Redis, name: str, state: State
) -> None:
    semaphores = [redis.semaphore(name), elsewhere.semaphore(name)]
    served: list[int] = []

    def waits(n: int) -> bool:
        return len(state.waiters) == n

    async def take(i: int) -> None:
        async with semaphores[i % 2]:
            served.append(i)

    await semaphores[0].acquire()
    async with create_task_group() as tasks:
        for i in range(10):
            tasks.start_soon(take, i)
            await until_async(partial(waits, i + 1))
        semaphores[0].release()
    assert served == list(range(10))


async def test_acquire_with_a_timeout(
    redis: Redis, elsewhere: Redis, name: str, state: State
) -> None:
    semaphore = elsewhere.semaphore(name)
    assert await redis.semaphore(name).acquire(timeout=5)
    start = time.monotonic()
    assert await semaphore.acquire(timeout=0.05) is False
    assert 0.04 < time.monotonic() - start < 5
    assert await semaphore.acquire(timeout=-1) is False
    await elsewhere.flush()
    assert not state.waiters
    redis.semaphore(name).release()
    assert await semaphore.acquire(timeout=5) is True
    semaphore.release()


async def test_releases_that_are_too_many_are_refused_as_a_whole(
    redis: Redis, elsewhere: Redis, name: str, state: State
) -> None:
    semaphore = redis.semaphore(name, 3)
    with pytest.raises(ValueError, match=r"released too often \(n=1, held=0\)"):
        semaphore.release()
    await semaphore.acquire()
    await semaphore.acquire()
    with pytest.raises(ValueError, match=r"released too often \(n=3, held=2\)"):
        semaphore.release(3)
    with pytest.raises(ValueError, match="too often"):
        elsewhere.semaphore(name, 3).release()
    await redis.flush()
    assert len(state.holders) == 2
    semaphore.release(2)
    with pytest.raises(ValueError, match="too often"):
        semaphore.release()


@pytest.mark.parametrize(("n", "error"), [(0, ValueError), (-1, ValueError), ("1", TypeError)])
async def test_release_and_resize_check_n(
    redis: Redis, name: str, n: Any, error: type[Exception]
) -> None:
    semaphore = redis.semaphore(name)
    with pytest.raises(error):
        semaphore.release(n)
    with pytest.raises(error):
        await semaphore.resize(n)


async def test_the_oldest_permit_is_released_first(redis: Redis, name: str, state: State) -> None:
    semaphore = redis.semaphore(name, 2)
    await semaphore.acquire()
    (oldest,) = state.holders
    await semaphore.acquire()
    semaphore.release()
    await redis.flush()
    assert len(state.holders) == 1
    assert oldest not in state.holders
    semaphore.release()


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"blocking": False, "timeout": 1}, ValueError),
        ({"timeout": float("nan")}, ValueError),
        ({"timeout": "1"}, TypeError),
        ({"blocking": "no"}, TypeError),
    ],
)
async def test_acquire_checks_its_arguments(
    redis: Redis, name: str, arguments: dict[str, Any], error: type[Exception]
) -> None:
    with pytest.raises(error):
        await redis.semaphore(name).acquire(**arguments)


# --- hold


async def test_hold_gives_a_permit(redis: Redis, name: str, state: State) -> None:
    async with redis.semaphore(name).hold() as permit:
        assert isinstance(permit, Permit)
        (holder,) = state.holders
        assert holder.endswith(f":{permit.fence}")
        assert not permit.lost
        assert f"fence={permit.fence}" in repr(permit)
        assert "lost" not in repr(permit)
    await redis.flush()
    assert state.is_unused


async def test_async_with_takes_a_permit(redis: Redis, name: str, state: State) -> None:
    semaphore = redis.semaphore(name, 2)
    async with semaphore as value:
        assert value is True
        async with semaphore:
            assert len(state.holders) == 2
        with pytest.raises(ValueError, match="too often"):
            semaphore.release()  # what a block has taken belongs to the block
    await redis.flush()
    assert state.is_unused


async def test_fences_grow(redis: Redis, elsewhere: Redis, name: str) -> None:
    fences = []
    for _ in range(5):
        for somewhere in (redis, elsewhere):
            async with somewhere.semaphore(name).hold() as permit:
                fences.append(permit.fence)
    assert fences == sorted(set(fences))
    assert fences[0] > 1_000_000 * time.time() * 0.99


async def test_hold_with_a_timeout(redis: Redis, elsewhere: Redis, name: str, state: State) -> None:
    async with redis.semaphore(name).hold(timeout=5):
        for timeout in (0.02, 0, -1):
            with pytest.raises(TimeoutError, match="no permit within"):
                async with elsewhere.semaphore(name).hold(timeout=timeout):
                    pytest.fail("two are inside")
    await redis.flush()
    await elsewhere.flush()
    assert state.is_unused


async def test_hold_checks_its_timeout(redis: Redis, name: str) -> None:
    with pytest.raises(ValueError, match="timeout"):
        redis.semaphore(name).hold(timeout=float("nan"))
    with pytest.raises(TypeError, match="timeout"):
        redis.semaphore(name).hold(timeout="1")  # type: ignore[arg-type]


async def test_a_hold_is_for_one_block(redis: Redis, name: str) -> None:
    hold = redis.semaphore(name, 2).hold()
    async with hold:
        with pytest.raises(RuntimeError, match="call hold"):
            await hold.__aenter__()
    with pytest.raises(RuntimeError, match="call hold"):
        await hold.__aenter__()


async def test_a_permit_released_early(redis: Redis, name: str, state: State) -> None:
    semaphore = redis.semaphore(name)
    async with semaphore.hold() as permit:
        permit.release()
        permit.release()
        async with semaphore.hold(timeout=5) as other:
            assert other.fence > permit.fence
            permit.release()
            await redis.flush()
            assert len(state.holders) == 1
    await redis.flush()
    assert state.is_unused


async def test_an_exception_passes_through(redis: Redis, name: str, state: State) -> None:
    with pytest.raises(ZeroDivisionError):
        async with redis.semaphore(name):
            _ = 1 / 0
    with pytest.raises(ZeroDivisionError):
        async with redis.semaphore(name).hold():
            _ = 1 / 0
    await redis.flush()
    assert state.is_unused


async def test_wait_lost_waits_for_ever_unless_the_permit_is_lost(redis: Redis, name: str) -> None:
    async with redis.semaphore(name).hold() as permit:
        with move_on_after(0.02) as scope:
            await permit.wait_lost()
        assert scope.cancelled_caught
        permit.release()
        with move_on_after(0.02) as scope:
            await permit.wait_lost()
        assert scope.cancelled_caught


@pytest.mark.slow
@pytest.mark.parametrize("cancel", [True, False])
async def test_a_permit_that_the_server_has_forgotten(
    redis_server: RedisServer, name: str, state: State, cancel: bool
) -> None:
    heard = []
    async with connect(redis_server, lease=0.5) as redis:
        semaphore = redis.semaphore(name)

        async def listen(permit: Permit) -> None:
            await permit.wait_lost()
            heard.append(permit.lost)
            await permit.wait_lost()  # returns at once now

        async with create_task_group() as tasks:
            with pytest.raises(LeaseLost, match=name), fail_after(20):
                async with semaphore.hold(cancel=cancel) as permit:
                    tasks.start_soon(listen, permit)
                    await until_async(lambda: len(state.holders) == 1)
                    redis_server.command("DEL", f"{state.key}:holders")
                    if cancel:
                        await anyio.sleep_forever()
                    await permit.wait_lost()
                    await sleep(0.01)
        assert heard == [True]
        assert "lost" in repr(permit)
        permit.release()

        # The same for a permit of `acquire`; the one that is left is given back.
        await semaphore.resize(2)
        await semaphore.acquire()
        (first,) = state.holders
        await semaphore.acquire()
        redis_server.command("ZREM", f"{state.key}:holders", first)
        await until_async(lambda: semaphore._calls.permits[0].lost)
        with pytest.raises(LeaseLost, match="1 permit"):
            semaphore.release(2)
        await redis.flush()
        assert state.is_unused


async def test_an_exception_of_a_block_that_has_lost_its_permit_gets_a_note(
    redis_server: RedisServer, name: str, state: State
) -> None:
    async with connect(redis_server, lease=0.5) as redis:
        with pytest.raises(ZeroDivisionError) as caught:
            async with redis.semaphore(name).hold(cancel=False) as permit:
                redis_server.command("DEL", f"{state.key}:holders")
                await permit.wait_lost()
                _ = 1 / 0
        assert caught.value.__notes__ == [f"the permit of semaphore {name!r} was lost"]


async def test_a_group_of_exceptions_of_a_cancelled_block_gets_a_note(
    redis_server: RedisServer, name: str, state: State
) -> None:
    """Under trio the group is another one without the cancellation, which got no note."""

    async def fail() -> None:
        try:
            await anyio.sleep_forever()
        finally:
            raise ArithmeticError

    async with connect(redis_server, lease=0.5) as redis:
        with pytest.raises(ExceptionGroup) as caught:
            async with redis.semaphore(name), anyio.create_task_group() as tasks:
                tasks.start_soon(fail)
                await anyio.wait_all_tasks_blocked()
                redis_server.command("DEL", f"{state.key}:holders")
                await anyio.sleep_forever()
        assert [type(error) for error in caught.value.exceptions] == [ArithmeticError]
        assert caught.value.__notes__ == [f"the permit of semaphore {name!r} was lost"]


# --- resize and statistics


async def test_resize(redis: Redis, elsewhere: Redis, name: str) -> None:
    semaphore, other = redis.semaphore(name), elsewhere.semaphore(name)
    await semaphore.acquire()
    async with create_task_group() as tasks:
        tasks.start_soon(other.acquire)
        while (await other.statistics()).waiting == 0:
            await checkpoint()
        await semaphore.resize(2)
    assert (await semaphore.statistics()).limit == 2
    await semaphore.resize(1)
    assert (await other.statistics()).held == 2  # nothing is taken away
    semaphore.release()
    await redis.flush()
    assert await semaphore.acquire(blocking=False) is False
    other.release()
    assert await semaphore.acquire(timeout=5)
    semaphore.release()


async def test_after_resize_either_number_may_be_the_value(
    redis: Redis, redis_server: RedisServer, name: str
) -> None:
    await redis.semaphore(name, 2).resize(4)
    for value in (2, 4):
        async with connect(redis_server) as other, other.semaphore(name, value):
            pass
    async with connect(redis_server) as other:
        with pytest.raises(ValueError, match=r"value=4, .* there; value=3, .* here"):
            await other.semaphore(name, 3).acquire()


async def test_statistics(redis: Redis, elsewhere: Redis, name: str, state: State) -> None:
    semaphore = redis.semaphore(name, 2)
    assert await semaphore.statistics() == DistributedSemaphoreStatistics(
        limit=2, held=0, waiting=0, members=1, gated=False
    )
    await semaphore.acquire()
    await semaphore.acquire()
    async with create_task_group() as tasks:
        tasks.start_soon(elsewhere.semaphore(name, 2).acquire)
        await until_async(lambda: state.waiters)
        assert await semaphore.statistics() == DistributedSemaphoreStatistics(
            limit=2, held=2, waiting=1, members=2, gated=False
        )
        semaphore.release(2)
    elsewhere.semaphore(name, 2).release()


# --- names, values and arguments


async def test_the_same_name_gives_the_same_object(redis: Redis, name: str) -> None:
    semaphore = redis.semaphore(name, 3)
    assert redis.semaphore(name, 3) is semaphore
    assert semaphore.name == name
    assert name in repr(semaphore)
    assert redis.semaphore(name + "x", 3) is not semaphore
    with pytest.raises(ValueError, match=r"value=3 there, value=4 here"):
        redis.semaphore(name, 4)


async def test_another_value_elsewhere(redis: Redis, elsewhere: Redis, name: str) -> None:
    async with redis.semaphore(name, 3):
        with pytest.raises(ValueError, match=r"value=3, .* there; value=4, .* here"):
            await elsewhere.semaphore(name, 4).acquire()
        with pytest.raises(ValueError, match=r"value=3, .* there; value=4, .* here"):
            await elsewhere.semaphore(name, 4).statistics()


async def test_another_lease_elsewhere(redis: Redis, redis_server: RedisServer, name: str) -> None:
    async with redis.semaphore(name), connect(redis_server, lease=2.5) as other:
        with pytest.raises(ValueError, match=r"lease=10 s there; value=1, lease=2\.5 s here"):
            await other.semaphore(name).acquire()


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({}, TypeError, "either a url or connect"),
        ({"url": "redis://x", "connect": print}, TypeError, "either a url or connect"),
        ({"url": b"redis://x"}, TypeError, "url must be a str"),
        ({"connect": 1}, TypeError, "connect must be callable"),
        ({"url": "redis://x", "prefix": 1}, TypeError, "prefix must be a str"),
        ({"url": "redis://x", "prefix": "a{b"}, ValueError, "prefix must not contain a brace"),
        ({"url": "redis://x", "lease": "1"}, TypeError, "lease must be a number"),
        ({"url": "redis://x", "lease": True}, TypeError, "lease must be a number"),
        ({"url": "redis://x", "lease": 0}, ValueError, "lease must be at least"),
        ({"url": "redis://x", "lease": float("inf")}, ValueError, "lease must be at least"),
        ({"url": "redis://x", "give_up": -1}, ValueError, "give_up must be at least"),
        ({"url": "redis://x", "give_up": float("nan")}, ValueError, "give_up must be at least"),
    ],
)
def test_wrong_arguments_of_redis(
    arguments: dict[str, Any], error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match=match):
        Redis(**arguments)


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        (("",), ValueError, "name must not be empty"),
        (("}x",), ValueError, "begin with a brace"),
        ((b"x",), TypeError, "name must be a str"),
        (("x", 0), ValueError, "value"),
        (("x", 1.5), TypeError, "value"),
    ],
)
def test_wrong_arguments_of_semaphore(
    arguments: tuple[Any, ...], error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match=match):
        Redis("redis://localhost").semaphore(*arguments)


async def test_a_connect_that_returns_something_else(redis_server: RedisServer) -> None:
    with pytest.raises(TypeError, match="must return a new client of coredis, not int"):
        async with Redis(connect=lambda: 1):  # type: ignore[arg-type,return-value]
            pass


async def test_the_prefix_of_the_keys(redis_server: RedisServer, name: str) -> None:
    async with (
        connect(redis_server, prefix="other") as redis,
        connect(redis_server) as usual,
        redis.semaphore(name),
        usual.semaphore(name),
    ):
        assert redis_server.command("EXISTS", f"other:{{{name}}}:semaphore") == 1


async def test_a_client_of_ones_own(redis_server: RedisServer, name: str) -> None:
    def client() -> Any:
        return coredis.Redis.from_url(redis_server.url)

    async def client_later() -> Any:
        await checkpoint()
        return client()

    for new in (client, client_later):
        async with Redis(connect=new, restart_gate=False) as redis, redis.semaphore(name):
            pass
    async with Redis(redis_server.unix_url, restart_gate=False) as redis, redis.semaphore(name):
        pass


async def test_names_of_any_characters(redis: Redis, redis_server: RedisServer, name: str) -> None:
    for odd in (f"{name} ä:{{}}%n", f"{name}\n\t!", f"{name}:1:2"):
        async with redis.semaphore(odd):
            with move_on_after(0.05):
                await redis.semaphore(odd).acquire()
        async with redis.semaphore(odd).hold(timeout=5):
            pass


def test_semaphores_are_not_copied() -> None:
    semaphore = Redis("redis://localhost").semaphore("x")
    for method in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="cannot pickle or copy"):
            method(semaphore)
    with pytest.raises(TypeError, match="async with"), semaphore:
        pass


# --- entering and leaving


def calls(semaphore: DistributedSemaphore) -> list[Callable[[], Awaitable[object]]]:
    return [
        semaphore.acquire,
        partial(semaphore.acquire, blocking=False),
        semaphore.hold().__aenter__,
        semaphore.__aenter__,
        semaphore.statistics,
        partial(semaphore.resize, 2),
    ]


async def test_not_entered(redis_server: RedisServer, name: str) -> None:
    redis = connect(redis_server)
    semaphore = redis.semaphore(name)
    for _ in range(2):
        for call in [*calls(semaphore), redis.flush]:
            with pytest.raises(RuntimeError, match="not entered"):
                await call()
        assert "closed" in repr(redis)
        async with redis:
            assert "open" in repr(redis)


async def test_entered_twice(redis: Redis, name: str) -> None:
    with pytest.raises(RuntimeError, match="entered already"):
        await redis.__aenter__()
    async with redis.semaphore(name):
        pass


async def test_no_server() -> None:
    redis = Redis("redis://127.0.0.1:1", lease=1)
    for _ in range(2):
        with pytest.raises(BackendUnavailable) as caught:
            async with redis:
                pass
        assert isinstance(caught.value.__cause__, Exception)
        assert not isinstance(caught.value.__cause__, BaseExceptionGroup)


async def test_entered_again_later(redis_server: RedisServer, name: str) -> None:
    redis = connect(redis_server)
    semaphore = redis.semaphore(name)
    members = set()
    for _ in range(3):
        async with redis, semaphore:
            (holder,) = State(redis_server, name).holders
            members.add(holder.partition(":")[0])
    assert len(members) == 3


def test_entered_again_on_another_loop(redis_server: RedisServer, name: str) -> None:
    redis = connect(redis_server)
    semaphore = redis.semaphore(name)

    async def use() -> None:
        async with redis, semaphore:
            pass

    for backend in ("asyncio", "trio", "asyncio"):
        anyio.run(use, backend=backend)
    with redis, as_threading(semaphore):
        pass
    assert State(redis_server, name).is_unused


async def test_closed_with_waiters_and_holders(
    redis_server: RedisServer, name: str, state: State
) -> None:
    redis = connect(redis_server)
    semaphore = redis.semaphore(name, 2)
    ends: list[str] = []

    async def hold() -> None:
        try:
            async with semaphore.hold():
                await anyio.sleep_forever()
        except LeaseLost:
            ends.append("lost")

    async def wait() -> None:
        try:
            await semaphore.acquire()
        except BackendUnavailable as error:
            assert "closed" in str(error)  # noqa: PT017
            ends.append("closed")

    async with create_task_group() as tasks:
        async with redis:
            await semaphore.acquire()
            tasks.start_soon(hold)
            await until_async(lambda: len(state.holders) == 2)
            tasks.start_soon(wait)
            await until_async(lambda: state.waiters)
        assert state.is_unused
    assert sorted(ends) == ["closed", "lost"]
    with pytest.raises(LeaseLost):
        semaphore.release()
    async with redis:
        for _ in range(2):
            assert await semaphore.acquire(blocking=False)
        semaphore.release(2)


async def test_flush_waits_until_the_server_has_heard_of_releases(
    redis: Redis, name: str, state: State
) -> None:
    semaphore = redis.semaphore(name, 5)
    await redis.flush()  # nothing to tell
    for _ in range(10):
        for _ in range(5):
            await semaphore.acquire()
        semaphore.release(5)
        await redis.flush()
        assert state.is_unused


async def test_flush_waits_for_semaphores_that_were_dropped_too(
    redis: Redis, redis_server: RedisServer
) -> None:
    for _ in range(20):
        name = new_name()
        async with redis.semaphore(name):
            pass
        gc.collect()
        await redis.flush()
        assert State(redis_server, name).is_unused


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
async def test_after_a_fork_the_child_is_refused(redis: Redis, name: str) -> None:
    semaphore = redis.semaphore(name)
    async with semaphore:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # there are other threads
            pid = os.fork()
        if pid == 0:
            status = 1
            try:
                for call in [*calls(semaphore), redis.flush, redis.__aenter__]:
                    coroutine: Any = call()
                    with pytest.raises(RuntimeError, match="before a fork"):
                        coroutine.send(None)
                with pytest.raises(RuntimeError, match="before a fork"):
                    semaphore.release()
                status = 0
            finally:
                os._exit(status)
        _, status = await anyio.to_thread.run_sync(os.waitpid, pid, 0)
        assert status == 0
    async with semaphore:
        pass


# --- objects that are dropped


async def test_a_dropped_semaphore_is_forgotten(
    redis: Redis, redis_server: RedisServer, name: str
) -> None:
    semaphore = redis.semaphore(name)
    async with semaphore:
        assert channels(redis_server, name) == 1
    del semaphore
    gc.collect()
    await until_async(lambda: channels(redis_server, name) == 0)
    async with redis.semaphore(name):
        pass


async def test_a_semaphore_need_not_be_kept(
    redis: Redis, elsewhere: Redis, redis_server: RedisServer, name: str, state: State
) -> None:
    """Each object is dropped while its last release is on its way, and the next one begins."""
    holder = elsewhere.semaphore(name)

    async def take() -> None:
        async with redis.semaphore(name):
            pass

    with fail_after(20):
        for _ in range(50):
            await take()
    # Messages still arrive: far sooner than an audit would find the permit.
    with fail_after(3):
        for _ in range(3):
            await holder.acquire()
            async with create_task_group() as tasks:
                tasks.start_soon(take)
                await until_async(lambda: state.waiters)
                holder.release()
    del holder
    gc.collect()
    await until_async(lambda: channels(redis_server, name) == 0)
    assert state.is_unused


async def test_a_semaphore_with_permits_is_not_forgotten(
    redis: Redis, name: str, state: State
) -> None:
    await redis.semaphore(name, 2).acquire()
    gc.collect()
    assert await redis.semaphore(name, 2).acquire()
    gc.collect()
    redis.semaphore(name, 2).release(2)
    await redis.flush()
    assert state.is_unused


async def test_requests_that_were_cancelled_leave_nothing_behind(
    redis: Redis, redis_server: RedisServer, name: str
) -> None:
    semaphore = redis.semaphore(name)
    async with semaphore:
        pass
    for call in (semaphore.statistics, partial(semaphore.resize, 1), redis.flush):
        for rounds in range(4):
            async with create_task_group() as tasks:
                tasks.start_soon(semaphore.statistics)
                tasks.start_soon(call)
                for _ in range(rounds):
                    await checkpoint()
                tasks.cancel_scope.cancel()
    session = redis._current.session
    assert session is not None
    await until_async(lambda: all(known.is_idle for known in session._conductors.values()))
    del semaphore
    gc.collect()
    await until_async(lambda: channels(redis_server, name) == 0)


# --- keys


async def test_at_most_four_keys_each_with_a_time_to_live(
    redis: Redis, elsewhere: Redis, name: str, state: State
) -> None:
    semaphore, other = redis.semaphore(name, 2), elsewhere.semaphore(name, 2)

    async def check(keys: int) -> None:
        await redis.flush()
        await elsewhere.flush()
        lifetimes = state.time_to_live()
        assert len(lifetimes) == keys
        assert all(90_000 < lifetime <= 100_000 for lifetime in lifetimes), lifetimes

    await semaphore.acquire()
    await check(3)
    await semaphore.acquire()
    await check(3)
    async with create_task_group() as tasks:
        tasks.start_soon(other.acquire)
        await until_async(lambda: state.waiters)
        await check(4)
        with move_on_after(0.02):
            await semaphore.acquire()
        await check(4)
        semaphore.release()
    await check(3)
    other.release()
    semaphore.release()
    await check(2)
    for _ in range(3):
        async with semaphore:  # release and acquire travel together
            await check(3)
        async with other:
            await check(3)
    await semaphore.resize(3)
    await semaphore.statistics()
    await check(2)


async def test_the_time_to_live_is_renewed(
    redis: Redis, redis_server: RedisServer, name: str, state: State
) -> None:
    semaphore = redis.semaphore(name)
    await semaphore.acquire()
    async with create_task_group() as tasks:
        tasks.start_soon(semaphore.acquire)
        await until_async(lambda: state.waiters)
        # As if four tenths of it had passed.
        touched = int(redis_server.command("HGET", state.key, "touched"))
        redis_server.command("HSET", state.key, "touched", touched - 40_000)
        for key in state.all_keys():
            redis_server.command("PEXPIRE", key, 60_000)
        await semaphore.statistics()
        lifetimes = state.time_to_live()
        assert len(lifetimes) == 4
        assert all(90_000 < lifetime <= 100_000 for lifetime in lifetimes), lifetimes
        semaphore.release()
    semaphore.release()


# --- threads, other event loops, other processes


async def test_threads_use_it_through_as_threading(redis: Redis, name: str, state: State) -> None:
    semaphore = redis.semaphore(name)
    view = as_threading(semaphore)
    assert name in repr(view)

    def use() -> int:
        assert view.acquire() is True
        assert view.acquire(blocking=False) is False
        assert view.acquire(timeout=0.02) is False
        view.release()
        with pytest.raises(ValueError, match="too often"):
            view.release()
        with view as value:
            assert value is True
            with pytest.raises(TimeoutError, match="no permit"), view.hold(timeout=0.02):
                pass
        hold = view.hold(timeout=5)
        with hold as permit:
            assert view.statistics().held == 1
            with pytest.raises(RuntimeError, match="call hold"):
                hold.__enter__()
            permit.release()
            permit.release()
            with view.hold(timeout=5) as other:
                assert other.fence > permit.fence
        view.resize(2)
        assert view.acquire(timeout=5)
        assert view.acquire(timeout=5)
        view.release(2)
        view.resize(1)
        return permit.fence

    fence = await anyio.to_thread.run_sync(use)
    async with semaphore.hold(timeout=5) as permit:
        assert permit.fence > fence
    with pytest.raises(RuntimeError, match="would block the event loop"):
        view.acquire()
    with pytest.raises(TypeError, match="with"):
        await view.__aenter__()
    await redis.flush()
    assert state.is_unused


@pytest.mark.slow
async def test_a_thread_hears_of_a_lost_permit(
    redis_server: RedisServer, name: str, state: State
) -> None:
    async with connect(redis_server, lease=0.5) as redis:
        view = as_threading(redis.semaphore(name))

        def use() -> None:
            with view.hold() as permit:
                redis_server.command("DEL", f"{state.key}:holders")
                wait_until(lambda: permit.lost, "the loss")

        def fail() -> None:
            with view.hold() as permit:
                redis_server.command("DEL", f"{state.key}:holders")
                wait_until(lambda: permit.lost, "the loss")
                _ = 1 / 0

        with pytest.raises(LeaseLost):
            await anyio.to_thread.run_sync(use)
        with pytest.raises(ZeroDivisionError) as caught:
            await anyio.to_thread.run_sync(fail)
        assert "was lost" in caught.value.__notes__[0]


async def test_threads_and_tasks_wait_in_one_line(redis: Redis, name: str, state: State) -> None:
    semaphore = redis.semaphore(name)
    view = as_threading(semaphore)
    inside = peak = 0

    def thread() -> None:
        nonlocal inside, peak
        for _ in range(20):
            with view:
                inside += 1
                peak = max(peak, inside)
                inside -= 1

    async def task() -> None:
        nonlocal inside, peak
        for _ in range(20):
            async with semaphore:
                inside += 1
                peak = max(peak, inside)
                await checkpoint()
                inside -= 1

    async with create_task_group() as tasks:
        for _ in range(3):
            tasks.start_soon(task)
            tasks.start_soon(anyio.to_thread.run_sync, thread)
    assert peak == 1
    await redis.flush()
    assert state.is_unused


def test_with_redis_for_programs_without_an_event_loop(
    redis_server: RedisServer, name: str, state: State
) -> None:
    redis = connect(redis_server)
    view = as_threading(redis.semaphore(name))
    for _ in range(2):
        with redis:
            with pytest.raises(RuntimeError, match="entered already"):
                redis.__enter__()
            with view:
                assert len(state.holders) == 1
            other = InThread(view.acquire)
            assert other.result() is True
            view.release()
        assert state.is_unused
        with pytest.raises(RuntimeError, match="not entered"):
            view.acquire()
    with pytest.raises(BackendUnavailable), Redis("redis://127.0.0.1:1", lease=1):
        pass


async def test_a_plain_with_is_refused_in_a_task(redis_server: RedisServer) -> None:
    with pytest.raises(TypeError, match="async with"), connect(redis_server):
        pass


def test_a_thread_that_waits_hears_that_the_redis_was_closed(
    redis_server: RedisServer, name: str, state: State
) -> None:
    redis = connect(redis_server)
    view = as_threading(redis.semaphore(name))
    with redis:
        view.acquire()
        waiting = InThread(view.acquire)
        wait_until(lambda: state.waiters, "the thread to wait")
    assert isinstance(waiting.result(), BackendUnavailable)
    assert state.is_unused


def test_a_thread_that_waits_hears_that_the_event_loop_has_ended(
    redis_server: RedisServer, name: str, state: State
) -> None:
    redis = connect(redis_server, lease=1)
    view = as_threading(redis.semaphore(name))
    waiting: list[InThread] = []

    async def leave_it_open() -> None:
        await redis.__aenter__()
        await redis.semaphore(name).acquire()
        waiting.append(InThread(view.acquire))
        await until_async(lambda: state.waiters)

    anyio.run(leave_it_open)
    assert isinstance(waiting[0].result(), BackendUnavailable)


def test_threads_use_it_while_it_is_entered_and_left(
    redis_server: RedisServer, name: str, state: State
) -> None:
    redis = connect(redis_server)
    view = as_threading(redis.semaphore(name, 2))
    done = threading.Event()
    entries = 0

    def use() -> None:
        nonlocal entries
        while not done.is_set():
            try:
                with view:
                    entries += 1
            except (RuntimeError, BackendUnavailable):
                time.sleep(0.001)  # not entered, closed meanwhile, lost by that

    threads = [InThread(use) for _ in range(4)]
    try:
        for _ in range(10):
            before = entries
            with redis:
                wait_until(lambda: entries > before + 4, "an entry")  # noqa: B023
            assert state.is_unused
    finally:
        done.set()
    assert [thread.result() for thread in threads] == [None] * 4


@pytest.mark.skipif(not hasattr(signal, "pthread_kill"), reason="there are no such signals")
@pytest.mark.parametrize("how", ["acquire", "hold"])
def test_ctrl_c_in_a_thread_that_waits(
    redis_server: RedisServer, name: str, state: State, how: str
) -> None:
    redis = connect(redis_server)
    view = as_threading(redis.semaphore(name))
    main = threading.get_ident()

    def interrupt() -> None:
        wait_until(lambda: state.waiters, "the thread to wait")
        signal.pthread_kill(main, signal.SIGINT)

    with redis:
        view.acquire()
        thread = InThread(interrupt)
        with pytest.raises(KeyboardInterrupt):
            view.acquire() if how == "acquire" else view.hold().__enter__()
        thread.result()
        wait_until(lambda: not state.waiters, "the waiter to leave")
        view.release()
        with view.hold(timeout=5):
            pass
    assert state.is_unused


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
async def test_another_event_loop_waits(
    redis: Redis, name: str, state: State, backend: str
) -> None:
    semaphore = redis.semaphore(name)
    seen: list[object] = []

    async def there() -> None:
        async with semaphore.hold() as permit:
            seen.append(permit.fence)
        with move_on_after(0.01):
            async with semaphore:
                await semaphore.acquire()  # in vain
        assert await semaphore.acquire(blocking=False)
        semaphore.release()
        seen.append((await semaphore.statistics()).limit)
        await redis.flush()
        assert state.is_unused

    await semaphore.acquire()
    async with create_task_group() as tasks:
        tasks.start_soon(anyio.to_thread.run_sync, partial(anyio.run, there, backend=backend))
        await until_async(lambda: state.waiters)
        semaphore.release()
    assert len(seen) == 2
    assert seen[1] == 1


@pytest.mark.slow
async def test_a_block_on_another_event_loop_is_cancelled_by_a_loss(
    redis_server: RedisServer, name: str, state: State
) -> None:
    async with connect(redis_server, lease=0.5) as redis:
        semaphore = redis.semaphore(name)

        async def there() -> None:
            with fail_after(20):
                async with semaphore:
                    redis_server.command("DEL", f"{state.key}:holders")
                    await anyio.sleep_forever()

        for backend in ("asyncio", "trio"):
            with pytest.raises(LeaseLost):
                await anyio.to_thread.run_sync(partial(anyio.run, there, backend=backend))


@pytest.mark.slow
async def test_five_processes_share_three_permits(
    redis_server: RedisServer, name: str, state: State, anyio_backend: tuple[str, Any]
) -> None:
    redis_server.command("DEL", "inside")
    with contextlib.ExitStack() as stack:
        children = [
            stack.enter_context(
                Child(
                    redis_server.url,
                    name,
                    3,
                    backend=anyio_backend[0],
                    counter=redis_server.unix_url,
                )
            )
            for _ in range(5)
        ]
        for child in children:
            await child.hear("ready")
        for child in children:
            child.tell("work", 50)
        peaks = [int((await child.hear("worked"))[0]) for child in children]
        for child in children:
            child.tell("end")
            await child.hear("ended")
    assert max(peaks) == 3
    assert state.is_unused


# --- cancellation at every await point


class _Stepped:
    """Await `coroutine`, and call `cancel` when it is about to sleep for the n-th time."""

    def __init__(self, coroutine: Any, n: int, cancel: Callable[[], object]) -> None:
        self._coroutine = coroutine
        self._n = n
        self._cancel = cancel
        self.reached = False

    def __await__(self) -> Generator[Any, Any, Any]:
        iterator = self._coroutine.__await__()
        advance = partial(iterator.send, None)
        steps = 0
        while True:
            try:
                yielded = advance()
            except StopIteration as stop:
                return stop.value
            steps += 1
            if steps == self._n:
                self.reached = True
                self._cancel()
            try:
                advance = partial(iterator.send, (yield yielded))
            except BaseException as error:
                advance = partial(iterator.throw, error)


async def _nested(semaphore: DistributedSemaphore) -> None:
    async with semaphore:
        await checkpoint()


async def _hold(semaphore: DistributedSemaphore) -> None:
    async with semaphore.hold() as permit:
        await checkpoint()
        with move_on_after(0.005):
            await permit.wait_lost()


async def _hold_with_timeout(semaphore: DistributedSemaphore) -> None:
    with contextlib.suppress(TimeoutError):
        async with semaphore.hold(timeout=0.05):
            await checkpoint()


async def _acquire(semaphore: DistributedSemaphore, **arguments: Any) -> None:
    if await semaphore.acquire(**arguments):
        try:
            await checkpoint()
        finally:
            semaphore.release()


WORKS: dict[str, Callable[[DistributedSemaphore], Awaitable[object]]] = {
    "acquire": _acquire,
    "timeout": partial(_acquire, timeout=0.05),
    "blocking=False": partial(_acquire, blocking=False),
    "hold": _hold,
    "hold-timeout": _hold_with_timeout,
    "async-with": _nested,
    "statistics": DistributedSemaphore.statistics,
    "resize": lambda semaphore: semaphore.resize(1),
}


@pytest.fixture(params=["scope", "task"])
def how(request: pytest.FixtureRequest) -> str:
    """How a task is cancelled: by a scope of its own; natively, or under trio by its nursery."""
    return str(request.param)


async def cancelled_at(
    how: str, work: Callable[[], Awaitable[object]], step: Callable[[Any, Any], Any]
) -> tuple[Any, bool]:
    """Run `work` in a task that `step` may cancel; return its result, and if it was cancelled."""
    stepped: Any = None
    if how == "scope":
        with CancelScope() as scope:
            stepped = step(work(), scope.cancel)
            await stepped
        return stepped, scope.cancelled_caught

    cancelled = False

    async def run(cancel: Callable[[], object]) -> None:
        nonlocal stepped, cancelled
        stepped = step(work(), cancel)
        try:
            await stepped
        except anyio.get_cancelled_exc_class():
            cancelled = True
            raise

    if "trio" in str(anyio.get_cancelled_exc_class()):
        async with create_task_group() as tasks:
            tasks.start_soon(run, tasks.cancel_scope.cancel)
    else:
        task = asyncio.get_running_loop().create_task(run(lambda: task.cancel()))
        await asyncio.wait([task])
        assert task.cancelled() is cancelled
        if not cancelled:
            await task
    return stepped, cancelled


async def check_nothing_is_lost(
    redis: Redis, semaphore: DistributedSemaphore, state: State
) -> None:
    await redis.flush()
    assert state.is_unused
    assert not semaphore._entered
    assert await semaphore.acquire(timeout=5)
    semaphore.release()
    await redis.flush()


@pytest.mark.stress
@pytest.mark.parametrize("contended", [False, True], ids=["free", "contended"])
@pytest.mark.parametrize("work", WORKS)
async def test_cancelled_at_each_await_point(
    redis: Redis, elsewhere: Redis, name: str, state: State, how: str, work: str, contended: bool
) -> None:
    semaphore, other = redis.semaphore(name), elsewhere.semaphore(name)
    n = 0
    while True:
        n += 1
        if contended:
            assert await other.acquire(timeout=5)

        def step(coroutine: Any, cancel: Any, n: int = n) -> _Stepped:
            return _Stepped(coroutine, n, cancel)

        async with create_task_group() as tasks:
            if contended:
                tasks.start_soon(_release_when_seen, other, state)
            with fail_after(20):
                stepped, cancelled = await cancelled_at(how, partial(WORKS[work], semaphore), step)
            tasks.cancel_scope.cancel()
        if contended:
            with contextlib.suppress(ValueError):
                other.release()
            await elsewhere.flush()
        assert cancelled is stepped.reached
        await check_nothing_is_lost(redis, semaphore, state)
        if not stepped.reached:
            break
        assert n < 20
    assert n > 1


async def _release_when_seen(other: DistributedSemaphore, state: State) -> None:
    await until_async(lambda: state.waiters)
    other.release()


@pytest.mark.parametrize("work", ["acquire", "timeout", "blocking=False", "hold", "async-with"])
async def test_cancelled_when_the_permit_was_just_granted(
    redis: Redis,
    name: str,
    state: State,
    how: str,
    work: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    semaphore = redis.semaphore(name)
    cancels: list[Callable[[], object]] = []
    settle = PermitTicket.settle

    def settle_and_cancel(ticket: PermitTicket, outcome: object) -> bool:
        settled = settle(ticket, outcome)
        while cancels:
            cancels.pop()()
        return settled

    monkeypatch.setattr(PermitTicket, "settle", settle_and_cancel)

    def step(coroutine: Any, cancel: Any) -> Any:
        cancels.append(cancel)
        return coroutine

    for _ in range(3):
        _, cancelled = await cancelled_at(how, partial(WORKS[work], semaphore), step)
        assert cancelled
        assert not cancels
        await check_nothing_is_lost(redis, semaphore, state)


@pytest.mark.parametrize("n", range(1, 8))
async def test_entering_is_cancelled(
    redis_server: RedisServer, name: str, state: State, how: str, n: int
) -> None:
    redis = connect(redis_server)

    async def enter_and_leave() -> None:
        async with redis:
            await redis.semaphore(name).acquire()
            await redis.flush()
        await checkpoint()  # leaving is shielded

    stepped, cancelled = await cancelled_at(
        how, enter_and_leave, lambda coroutine, cancel: _Stepped(coroutine, n, cancel)
    )
    assert cancelled is stepped.reached
    assert redis._current.session is None
    assert state.is_unused
    async with redis, redis.semaphore(name).hold(timeout=5):
        pass


async def test_cancelled_and_lost_at_the_same_time(
    redis: Redis, name: str, state: State, how: str
) -> None:
    semaphore = redis.semaphore(name)

    def step(coroutine: Any, cancel: Any) -> Any:
        cancels.append(cancel)
        return coroutine

    for order in (1, -1):
        cancels: list[Callable[[], object]] = []

        async def hold(cancels: list[Callable[[], object]] = cancels, order: int = order) -> None:
            with contextlib.suppress(LeaseLost):
                async with semaphore.hold() as permit, create_task_group() as tasks:
                    ticket = permit._ticket

                    async def end() -> None:
                        ticket.conductor.give_back(ticket)
                        for happen in [cancels[0], ticket.lose][::order]:
                            happen()

                    tasks.start_soon(end)
                    await anyio.sleep_forever()
            await checkpoint()

        with fail_after(20):
            _, cancelled = await cancelled_at(how, hold, step)
        assert cancelled
        await check_nothing_is_lost(redis, semaphore, state)


async def test_hold_in_a_cancelled_scope_takes_nothing(
    redis: Redis, name: str, state: State
) -> None:
    semaphore = redis.semaphore(name)
    with CancelScope() as scope:
        scope.cancel()
        async with semaphore.hold():
            pytest.fail("it was cancelled")
    assert scope.cancelled_caught
    with CancelScope() as scope:
        async with semaphore.hold():
            scope.cancel()
            await checkpoint()
    assert scope.cancelled_caught
    await check_nothing_is_lost(redis, semaphore, state)


@pytest.mark.slow
async def test_many_tasks_are_cancelled_at_random(
    redis: Redis, elsewhere: Redis, name: str, state: State
) -> None:
    rng = random.Random(7)
    inside = peak = 0

    async def use(semaphore: DistributedSemaphore) -> None:
        nonlocal inside, peak
        for _ in range(5):
            with move_on_after(rng.choice([0, 0.001, 0.01, 0.1, 2])):
                async with semaphore:
                    inside += 1
                    peak = max(peak, inside)
                    try:
                        await sleep(rng.choice([0, 0.001]))
                    finally:
                        inside -= 1

    async with create_task_group() as tasks:
        for _ in range(50):
            for somewhere in (redis, elsewhere):
                tasks.start_soon(use, somewhere.semaphore(name, 3))
    await redis.flush()
    await elsewhere.flush()
    assert 1 <= peak <= 3
    assert state.is_unused


# --- losses that the event loop could not notice, and misuse


@pytest.mark.slow
@pytest.mark.parametrize("cancel", [True, False])
async def test_a_block_that_blocks_the_event_loop_for_a_lease_knows_that_its_permit_is_lost(
    redis_server: RedisServer, name: str, cancel: bool
) -> None:
    async with Redis(redis_server.url, lease=0.3) as redis:
        semaphore = redis.semaphore(name)
        hold = semaphore.hold(cancel=cancel)
        with pytest.raises(LeaseLost):
            async with hold as permit:
                before = permit.lost
                time.sleep(0.35)
                assert (before, permit.lost) == (False, True)
                assert " lost>" in repr(hold)
        await semaphore.acquire()
        time.sleep(0.35)
        with pytest.raises(LeaseLost):
            semaphore.release()
        async with semaphore.hold() as permit:
            pass
        time.sleep(0.35)
        assert not permit.lost  # it was released before


def test_without_the_client_library_the_error_names_the_extra(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ImportError, match=r"pip install 'aiosync\[redis\]'"):
        importlib.reload(aiosync.redis)


async def test_a_plain_with_in_a_task_names_the_alternative(redis_server: RedisServer) -> None:
    with pytest.raises(TypeError, match=r"^Redis needs 'async with' in a task; "):
        Redis(redis_server.url).__enter__()


async def test_a_thread_view_on_an_event_loop_says_that_it_would_block(
    redis: Redis, name: str
) -> None:
    view = as_threading(redis.semaphore(name))
    with pytest.raises(RuntimeError, match="until the server answers"):
        view.acquire(blocking=False)


def test_a_hold_that_was_not_entered_shows_it() -> None:
    hold = Redis("redis://localhost").semaphore("name").hold()
    assert repr(hold) == "<aiosync.redis.Hold of 'name': not entered>"


async def test_blocks_of_one_task_and_of_one_thread_may_be_nested(redis: Redis, name: str) -> None:
    semaphore = redis.semaphore(name, 2)
    async with semaphore:
        async with semaphore:
            assert (await semaphore.statistics()).held == 2
        assert (await semaphore.statistics()).held == 1

    def nest() -> list[int]:
        view = as_threading(semaphore)
        with view:
            with view:
                held = [view.statistics().held]
            return [*held, view.statistics().held]

    assert await anyio.to_thread.run_sync(nest) == [2, 1]
    assert (await semaphore.statistics()).held == 0
    assert name in repr(as_threading(redis.barrier(name, 2)))
