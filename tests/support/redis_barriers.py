"""Parties of distributed barriers: tasks that wait, and what becomes of them."""

from __future__ import annotations

from contextlib import AsyncExitStack, asynccontextmanager
from secrets import token_hex
from typing import TYPE_CHECKING, Any

import anyio

from aiosync import BrokenBarrierError
from aiosync.redis import Redis
from support.helpers import until_async

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Sequence

    from anyio.abc import TaskGroup

    from aiosync.redis import DistributedBarrier

    from .redis_servers import RedisServer

CANCELLED = "cancelled"


class Party:
    """A task that waits once, and what came of it.

    `outcome` is an index, the reason of a BrokenBarrierError, `CANCELLED`, another exception, or
    None while it waits.
    """

    def __init__(self, barrier: DistributedBarrier, timeout: float | None = None) -> None:
        self.barrier = barrier
        self.timeout = timeout
        self.scope = anyio.CancelScope()
        self.outcome: object = None
        self.error: BrokenBarrierError | None = None

    async def __call__(self) -> None:
        outcome: object = CANCELLED
        try:
            with self.scope:
                try:
                    outcome = await self.barrier.wait(self.timeout)
                except BrokenBarrierError as error:
                    outcome, self.error = error.reason, error
                except Exception as error:
                    outcome = error
        finally:
            self.outcome = outcome


def outcomes(parties: Sequence[Party]) -> list[object]:
    return [party.outcome for party in parties]


async def all_done(*parties: Party) -> list[object]:
    """Wait until no party waits any more, and return their outcomes."""
    await until_async(lambda: all(party.outcome is not None for party in parties))
    return outcomes(parties)


class Barriers:
    """The same barrier in several entered `Redis` objects, which are processes to the server."""

    def __init__(self, server: RedisServer, name: str) -> None:
        self.server = server
        self.name = name
        self.redis: list[Redis] = []
        self.barriers: list[DistributedBarrier] = []

    def key(self, suffix: str = "") -> str:
        return f"aiosync:{{{self.name}}}:barrier{suffix}"

    def n_arrived(self) -> int:
        """How many have arrived, as the server says."""
        count: int = self.server.command("HLEN", self.key(":arrivals"))
        return count

    def field(self, name: str) -> str:
        """A field of the state on the server, such as status."""
        value: bytes | None = self.server.command("HGET", self.key(), name)
        return "" if value is None else value.decode()

    async def flush(self) -> None:
        for redis in self.redis:
            await redis.flush()

    async def arrive(self, tasks: TaskGroup, *parties: Party) -> None:
        """Let `parties`, which are not the last, arrive one after the other."""
        for party in parties:
            tasks.start_soon(party)
            await self.wait_arrived(self.n_arrived() + 1)

    async def wait_arrived(self, count: int) -> None:
        """Wait until so many have arrived."""
        await until_async(lambda: self.n_arrived() >= count)

    async def check_works(self) -> None:
        """A round works as in a new barrier."""
        parties = [Party(self.barriers[0]) for _ in range(self.barriers[0].parties)]
        async with anyio.create_task_group() as tasks:
            for party in parties:
                tasks.start_soon(party)
        assert sorted(map(str, outcomes(parties))) == sorted(map(str, range(len(parties))))


@asynccontextmanager
async def entered(
    server: RedisServer,
    parties: int,
    n: int = 2,
    action: Callable[[], object] | None = None,
    *,
    url: str | None = None,
    timeout: float | None = None,
    **options: Any,
) -> AsyncIterator[Barriers]:
    """Enter `n` Redis objects with one barrier.

    :param url: another way to the server for the first of them
    """
    barriers = Barriers(server, token_hex(8))
    async with AsyncExitStack() as stack:
        for index in range(n):
            redis = Redis(url if url is not None and not index else server.url, **options)
            await stack.enter_async_context(redis)
            barriers.redis.append(redis)
            barriers.barriers.append(redis.barrier(barriers.name, parties, action, timeout=timeout))
        yield barriers
