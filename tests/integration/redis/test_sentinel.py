"""Semaphores and barriers while a replica takes the place of its primary."""

from __future__ import annotations

from contextlib import AsyncExitStack, suppress
from typing import TYPE_CHECKING, Any

import anyio
import coredis
import pytest
from anyio import to_thread
from coredis import exceptions
from coredis.connection import TCPLocation
from support.helpers import until_async
from support.redis_servers import RedisServer, Sentinel, ServerProgram, wait_until
from support.silent_proxy import SilentProxy

from aiosync import BrokenBarrierError
from aiosync.redis import BackendUnavailable, LeaseLost, Redis
from aiosync.redis._connect import client_for

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.redis,
    pytest.mark.slow,
    pytest.mark.timeout(60),
]

LIMIT = 2


class Users:
    """Tasks of several processes that take and release permits, and count the holders."""

    def __init__(self) -> None:
        self.inside = 0
        self.most = 0
        self.entries = 0
        self.lost = 0

    async def use(self, redis: Redis, name: str) -> None:
        semaphore = redis.semaphore(name, LIMIT)
        while True:
            with suppress(BackendUnavailable):
                try:
                    async with semaphore:
                        await self.stay(0.02)
                except LeaseLost:
                    self.lost += 1

    async def stay(self, seconds: float) -> None:
        self.inside += 1
        self.entries += 1
        self.most = max(self.most, self.inside)
        try:
            await anyio.sleep(seconds)
        finally:
            self.inside -= 1

    async def go_on(self, seconds: float) -> None:
        """Wait until permits are granted again."""
        before = self.entries
        with anyio.fail_after(seconds):
            await until_async(lambda: self.entries > before + 20)


async def entered(stack: AsyncExitStack, count: int, connect: Callable[[], Any]) -> list[Redis]:
    return [
        await stack.enter_async_context(
            Redis(connect=connect, lease=4, give_up=30, restart_gate=False)
        )
        for _ in range(count)
    ]


async def meet(redis: Redis, outcomes: list[object]) -> None:
    """Wait at a barrier to which nobody else comes."""
    try:
        await redis.barrier("alone", 2).wait()
    except BrokenBarrierError as error:
        outcomes.append(error)


async def take(redis: Redis, taken: list[object]) -> None:
    taken.append(await redis.semaphore("held", 1).acquire())


@pytest.mark.parametrize("how", ["kill", "command"])
async def test_failover_by_sentinel(server_program: ServerProgram, how: str) -> None:
    """What is held stays held, since the replica knows of it; and rounds break."""
    with Sentinel(server_program, down_after=1) as sentinel:

        def connect() -> Any:
            location = TCPLocation(*sentinel.address)
            return coredis.Sentinel([location]).primary_for(sentinel.name)

        users = Users()
        outcomes: list[object] = []
        async with AsyncExitStack() as stack:
            redises = await entered(stack, 3, connect)
            async with anyio.create_task_group() as tasks:
                for redis in redises:
                    for _ in range(3):
                        tasks.start_soon(users.use, redis, "mail")
                tasks.start_soon(meet, redises[0], outcomes)
                await users.go_on(10)
                async with redises[0].semaphore("held", 1).hold() as permit:
                    taken: list[object] = []
                    tasks.start_soon(take, redises[1], taken)
                    await to_thread.run_sync(fail_over, sentinel, how)
                    # One lease for the gate, and half of one to find the new primary.
                    await users.go_on(4 + 2 + 1)
                    assert not permit.lost
                    assert not taken
                with anyio.fail_after(5):
                    await until_async(lambda: taken)
                with anyio.fail_after(5):
                    await until_async(lambda: outcomes)
                tasks.cancel_scope.cancel()
        assert users.most <= LIMIT
        assert users.lost == 0


def fail_over(sentinel: Sentinel, how: str) -> None:
    if how == "kill":
        sentinel.kill_primary()
    else:
        # Connections to the old primary end when it becomes a replica.
        sentinel.failover()
        sentinel.wait_for_rejoin()


async def test_no_sentinel_and_no_primary(server_program: ServerProgram) -> None:
    with RedisServer(server_program) as server:
        address = server.address
    redis = Redis(connect=lambda: coredis.Sentinel([TCPLocation(*address)]).primary_for("main"))
    with pytest.raises(BackendUnavailable, match="No primary found for 'main'") as caught:
        await redis.__aenter__()
    assert isinstance(caught.value.__cause__, exceptions.PrimaryNotFoundError)


async def test_a_replica_from_sentinel(server_program: ServerProgram) -> None:
    with Sentinel(server_program) as sentinel:

        def connect() -> Any:
            location = TCPLocation(*sentinel.address)
            return coredis.Sentinel([location]).replica_for(sentinel.name)

        with pytest.raises(BackendUnavailable, match="the server is a replica"):
            await Redis(connect=connect).__aenter__()


async def test_failover_to_a_stale_replica(server_program: ServerProgram) -> None:
    """The new primary lacks the last grants and knows of permits that were given back."""
    with (
        RedisServer(server_program) as primary,
        SilentProxy(primary.address) as proxy,
        RedisServer(server_program, replica_of=primary) as replica,
    ):
        replica.command("REPLICAOF", *proxy.address)
        replica.wait_for_replication()
        current = primary
        users, others = Users(), Users()
        outcomes: list[object] = []
        async with AsyncExitStack() as stack:
            redises = await entered(stack, 3, lambda: client_for(current.url, 1))
            async with anyio.create_task_group() as tasks:
                for redis in redises:
                    for _ in range(3):
                        tasks.start_soon(users.use, redis, "mail")
                tasks.start_soon(meet, redises[0], outcomes)
                await users.go_on(10)
                late = redises[0].semaphore("late", LIMIT)
                await late.statistics()
                await to_thread.run_sync(wait_until_in_step, primary, replica)
                proxy.cut()
                # What the replica does not know of, although it is held at the failover.
                await late.acquire()
                await late.acquire()
                tasks.start_soon(others.use, redises[1], "late")
                await users.go_on(10)
                primary.kill()
                replica.command("REPLICAOF", "NO", "ONE")
                current = replica
                await users.go_on(4 + 1)
                # These were claimed in time, before anything was granted.
                assert others.entries == 0
                statistics = await redises[2].semaphore("late", LIMIT).statistics()
                assert statistics.held == LIMIT
                late.release(2)
                with anyio.fail_after(5):
                    await until_async(lambda: outcomes)
                await others.go_on(5)
                tasks.cancel_scope.cancel()
            assert users.most <= LIMIT
            assert others.most <= LIMIT
            # Permits of the past do not stay.
            for redis in redises:
                await redis.flush()
            with anyio.fail_after(10):
                while (await redises[0].semaphore("mail", LIMIT).statistics()).held:
                    await anyio.sleep(0.05)


def wait_until_in_step(primary: RedisServer, replica: RedisServer) -> None:
    """Wait until the replica has heard of something that happens from now on."""
    primary.command("SET", "step", "1")
    wait_until(lambda: replica.command("GET", "step") == b"1", "the replica to be in step")
