"""The event loops: how to run a function on one, and how to start many tasks there.

What must live here: the differences between asyncio, uvloop and trio that are not measured.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial
from typing import Any, TypeVar

import anyio

T = TypeVar("T")

# The module that each backend needs.
BACKENDS = {"asyncio": "asyncio", "uvloop": "uvloop", "trio": "trio"}

# Starts a task, and returns a function that cancels it.
Spawn = Callable[[Callable[[], Awaitable[Any]]], Callable[[], object]]


def run(backend: str, main: Callable[[], Awaitable[T]]) -> T:
    if backend == "trio":
        return anyio.run(main, backend="trio")
    return anyio.run(main, backend_options={"use_uvloop": backend == "uvloop"})


def under_trio() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return True
    return False


def checkpoint() -> Callable[[], Awaitable[Any]]:
    """Return the loop's own function that only lets other tasks run."""
    if under_trio():
        import trio

        return trio.lowlevel.checkpoint
    return partial(asyncio.sleep, 0)


def crowd() -> AbstractAsyncContextManager[Spawn]:
    """Return a context manager that waits for all tasks started in it, by the loop's own means."""
    return _crowd_of_trio() if under_trio() else _crowd_of_asyncio()


@asynccontextmanager
async def _crowd_of_asyncio() -> AsyncIterator[Spawn]:
    tasks: list[asyncio.Future[Any]] = []

    def spawn(work: Callable[[], Awaitable[Any]]) -> Callable[[], object]:
        task = asyncio.ensure_future(work())
        tasks.append(task)
        return task.cancel

    yield spawn
    for task in tasks:
        try:
            await task
        except asyncio.CancelledError:
            pass


@asynccontextmanager
async def _crowd_of_trio() -> AsyncIterator[Spawn]:
    import trio

    async with trio.open_nursery() as nursery:

        def spawn(work: Callable[[], Awaitable[Any]]) -> Callable[[], object]:
            scope = trio.CancelScope()

            async def inside() -> None:
                with scope:
                    await work()

            nursery.start_soon(inside)
            return scope.cancel

        yield spawn


async def settle() -> None:
    """Let all tasks run until they wait."""
    for _ in range(3):
        await anyio.sleep(0)
