"""Connections for pools whose users are cancelled at any step, and what must hold afterwards."""

from __future__ import annotations

import asyncio
import inspect
import logging
import math
import time
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import anyio
import anyio.lowlevel
import pytest
import sniffio

from aiosync import ConnectionPool, PoolClosed
from aiosync._pool import _backoff, _closing
from support.pool_stubs import SteppingBackend, SteppingConnection

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable


# How long something may take that happens at once unless it never happens.
PATIENCE = 15.0


checkpoint = anyio.lowlevel.checkpoint


def count_steps(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Let steps count, not time, which depends on the load of the machine. A fixture of two files.

    After a failed connect the next one comes at once. A reset that was cancelled may take any time.
    """
    caplog.set_level(logging.CRITICAL, "aiosync.pool")
    monkeypatch.setattr(_backoff, "FIRST_DELAY", 0.0)
    monkeypatch.setattr(_closing, "GRACE", PATIENCE)


async def until(condition: Callable[[], bool]) -> None:
    """Let others run until `condition` is true, and fail if that takes too long."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        await checkpoint()


def under_asyncio() -> bool:
    return sniffio.current_async_library() == "asyncio"


async def verify(pool: ConnectionPool[SteppingConnection], backend: SteppingBackend) -> None:
    """Check that the pool is whole, now that nobody uses it."""
    backend.fails.clear()
    # After a resize there may be more for as long as it takes to close them.
    await until(lambda: pool.get_stats()["pool_size"] <= pool.max_size)
    with anyio.fail_after(PATIENCE):
        taken = [await pool.acquire(math.inf) for _ in range(pool.max_size)]
    assert len({id(connection) for connection in taken}) == pool.max_size
    with pytest.raises(anyio.WouldBlock):
        pool.acquire_nowait()
    assert not backend.wrong
    for connection in backend.made:
        assert connection.closed == (connection not in taken)
    for connection in taken:
        pool.release(connection)
    # Resets and checks that are under way end with the connection idle.
    await until(lambda: pool.get_stats()["pool_available"] == pool.max_size)
    stats = pool.get_stats()
    assert stats["pool_size"] == backend.open == pool.max_size
    assert stats["in_use"] == stats["connecting"] == stats["requests_waiting"] == 0
    # A victim that never left would still stand in the line, and make everybody else do so too.
    with anyio.fail_after(PATIENCE):
        async with pool.connection(math.inf):
            pass
    await until(lambda: pool.get_stats()["pool_available"] == pool.max_size)


def verify_closed(pool: ConnectionPool[SteppingConnection], backend: SteppingBackend) -> None:
    """Check that nothing is left of a pool that has been closed."""
    assert all(connection.closed == 1 for connection in backend.made)
    stats = pool.get_stats()
    assert stats["pool_size"] == stats["in_use"] == stats["connecting"] == 0
    assert stats["requests_waiting"] == 0
    with pytest.raises(PoolClosed):
        pool.acquire_nowait()
    if under_asyncio():
        assert not tasks_of(pool)


def tasks_of(pool: ConnectionPool[Any]) -> list[asyncio.Task[Any]]:
    """Return the tasks in the background of `pool`, under asyncio; maintenance comes first."""
    name = pool.name
    found = [task for task in asyncio.all_tasks() if task.get_name().split(" ")[0] == name]
    return sorted(found, key=lambda task: not task.get_name().endswith(" maintain"))


@asynccontextmanager
async def explained(*circumstances: object) -> AsyncIterator[None]:
    """Tell in which of the many rounds of a test it was that something failed."""
    try:
        yield
    except BaseException:
        print("failed:", *circumstances)
        raise


def has_begun(task: asyncio.Task[Any]) -> bool:
    return inspect.getcoroutinestate(task.get_coro()) != inspect.CORO_CREATED  # type: ignore[arg-type]
