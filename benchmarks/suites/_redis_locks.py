"""The locks on a Redis server that are compared, each used as its documentation says.

What must live here: adapters, one for each library. The work with them is in `redis`.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any, NamedTuple

from aiosync.redis import Redis

from ..model import US

# Seconds without a sign of life after which a lock passes on, where nothing else is said.
LEASE = 10.0


class Lock(NamedTuple):
    """A mutex of all processes."""

    acquire: Callable[[], Awaitable[Any]]
    release: Callable[[], Awaitable[Any] | None]


# Takes the URL of the server, a name, and the lease in seconds.
Maker = Callable[[str, str, float], AbstractAsyncContextManager[Lock]]


class Subject(NamedTuple):
    name: str
    make: Maker
    needs: str = ""
    any_backend: bool = False  # or asyncio only
    fifo: bool = False  # whether the lock passes from one process to the next in order
    expires: bool = True  # whether the lock of a dead process passes on, in time for a benchmark


def ours(url: str, lease: float = LEASE) -> Redis:
    """Return our connection. The server was started by us, so nobody holds old permits."""
    return Redis(url, lease=lease, restart_gate=False)


@asynccontextmanager
async def of_aiosync(url: str, name: str, lease: float) -> AsyncIterator[Lock]:
    async with ours(url, lease) as redis:
        semaphore = redis.semaphore(name, 1)
        yield Lock(semaphore.acquire, semaphore.release)


@asynccontextmanager
async def of_aiosync_by_hold(url: str, name: str, lease: float) -> AsyncIterator[Lock]:
    async with ours(url, lease) as redis:
        semaphore = redis.semaphore(name, 1)
        yield Lock(semaphore.__aenter__, lambda: semaphore.__aexit__(None, None, None))


@asynccontextmanager
async def of_redis_py(url: str, name: str, lease: float) -> AsyncIterator[Lock]:
    from redis.asyncio import Redis as Client

    async with Client.from_url(url) as client:
        lock = client.lock(name, timeout=lease)
        yield Lock(lock.acquire, lock.release)


@asynccontextmanager
async def of_fifo_lock(url: str, name: str, lease: float) -> AsyncIterator[Lock]:
    from redis.asyncio import Redis as Client
    from redis_fifo_lock import FifoLock

    async with Client.from_url(url) as client:
        # By default it polls twice a lease.
        lock = FifoLock(client, name, lease_ms=round(lease * 1000), poll_ms=round(lease * 500))
        held: list[Any] = []

        async def acquire() -> None:
            held.append(await lock.acquire())

        yield Lock(acquire, lambda: lock.release(held.pop()))


@asynccontextmanager
async def of_semaphore(url: str, name: str, lease: float) -> AsyncIterator[Lock]:
    """Yield the mutex of py-redis-semaphore."""
    from redis.asyncio import Redis as Client
    from redis_semaphore import Mutex

    async with Client.from_url(url) as client:
        # By default it polls six times a lease.
        mutex = Mutex(client, name, lock_timeout=lease, blpop_timeout=lease / 6)
        yield Lock(mutex.aacquire, mutex.arelease)


@asynccontextmanager
async def of_self_limiters(url: str, name: str, lease: float) -> AsyncIterator[Lock]:
    """Yield a semaphore that is written in Rust."""
    from self_limiters import Semaphore

    semaphore = Semaphore(name, capacity=1, expiry=max(1, round(lease)), redis_url=url)
    yield Lock(semaphore.__aenter__, lambda: semaphore.__aexit__(None, None, None))


SUBJECTS = (
    Subject(US, of_aiosync, "aiosync.redis", any_backend=True, fifo=True),
    Subject("redis.asyncio Lock", of_redis_py, "redis.asyncio"),
    Subject("redis-fifo-lock", of_fifo_lock, "redis_fifo_lock", fifo=True),
    Subject("py-redis-semaphore", of_semaphore, "redis_semaphore", fifo=True),
    Subject("self-limiters", of_self_limiters, "self_limiters", expires=False),
)
