"""What `aiosync.debug` costs: nothing while it is disabled, and how much while it is enabled.

What must live here: the same work with and without debugging.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Iterator
from functools import partial
from typing import Any

import aiosync

from ..loops import run
from ..model import US, Contender, Effort, Row
from .semaphore import free_permit, hand_off

NOTE = "'after disable()' has to be 1.00, within the noise"


async def checkouts(pool: Any, effort: Effort) -> float:
    """Seconds for one block with a connection of a pool that no other task uses."""
    times = effort.times(3000)
    async with pool:
        async with pool.connection():
            pass
        begin = time.perf_counter()
        for _ in range(times):
            async with pool.connection():
                pass
        return (time.perf_counter() - begin) / times


def _semaphore() -> Any:
    return aiosync.Semaphore(1, fast_acquire=True)


def _pool() -> Any:
    return aiosync.ConnectionPool(object, max_size=1, fast_acquire=True)


WORK: dict[str, tuple[Callable[[], Any], Callable[[Any, Effort], Awaitable[float]]]] = {
    "free permit": (_semaphore, free_permit),
    "hand-off": (_semaphore, hand_off),
    "pool": (_pool, checkouts),
}


def measure(backend: str, work: str, debugging: bool, effort: Effort) -> float:
    from aiosync import debug

    make, use = WORK[work]

    async def main() -> float:
        debug.enable(watchdog=None)
        if not debugging:
            debug.disable()
        shared = make()
        debug.disable()
        return await use(shared, effort)

    return run(backend, main)


def measure_plain(backend: str, work: str, effort: Effort) -> float:
    make, use = WORK[work]

    async def main() -> float:
        return await use(make(), effort)

    return run(backend, main)


def rows(backend: str, effort: Effort) -> Iterator[Row]:
    if backend in {"asyncio", "trio"}:
        for work in WORK:
            yield Row(
                "debug",
                backend,
                work,
                [
                    Contender(US, partial(measure_plain, backend, work, effort)),
                    Contender("after disable()", partial(measure, backend, work, False, effort)),
                    Contender("debugging enabled", partial(measure, backend, work, True, effort)),
                ],
            )
