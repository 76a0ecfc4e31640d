"""What many tests need: to wait for something, to do something in a thread, to provoke a race.

What must live here: what two test files would have to write twice. What must not: what stands for
one subject only, such as the stub connections of a pool.
"""

from __future__ import annotations

import asyncio
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterable
from functools import partial
from typing import Any

import anyio
import anyio.lowlevel
import pytest
import sniffio
import trio.testing

from aiosync import Barrier, BrokenBarrierError, Semaphore, as_threading

# How long, in seconds, something may take that happens at once unless it never happens.
PATIENCE = 20.0
# Whether to try far more schedules, programs and sequences than the gate has time for.
LONG = os.environ.get("AIOSYNC_EXPLORE") == "long"


def spin_until(condition: Callable[[], object], pause: Callable[[], object] = bool) -> None:
    """Block until `condition` is true, and notice it as soon as possible."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        pause()


def until(condition: Callable[[], object]) -> None:
    """Block until `condition` is true, and fail if that takes too long."""
    spin_until(condition, lambda: time.sleep(0.0005))


async def until_async(condition: Callable[[], object], seconds: float = PATIENCE) -> None:
    """Do the same, but let the event loop run."""
    with anyio.fail_after(seconds):
        while not condition():
            await anyio.sleep(0.0005)


async def settle() -> None:
    """Wait until every other task is blocked.

    `anyio.wait_all_tasks_blocked` does the same, but takes 0.1 seconds under asyncio.
    """
    if sniffio.current_async_library() == "trio":
        await trio.testing.wait_all_tasks_blocked()
        return
    me, calm = asyncio.current_task(), 0
    while calm < 3:
        await asyncio.sleep(0)
        others: list[Any] = [task for task in asyncio.all_tasks() if task is not me]
        waits_for = [task._fut_waiter for task in others]
        calm = 0 if any(waiter is None or waiter.done() for waiter in waits_for) else calm + 1


async def repeat_until_others_run(call: Callable[[], Awaitable[object]]) -> None:
    """Await `call` again and again until another task has run meanwhile.

    This never ends if `call` does not let the event loop run.
    """
    has_run = False

    async def run() -> None:
        nonlocal has_run
        await anyio.lowlevel.checkpoint()
        has_run = True

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(run)
        while not has_run:
            await call()


def assert_free(semaphore: Semaphore, value: int) -> None:
    """Check that `value` permits are free, that nobody waits, and that they can be had."""
    assert semaphore.statistics().waiting == 0
    assert semaphore.value == value
    for _ in range(value):
        semaphore.acquire_nowait()
    with pytest.raises(anyio.WouldBlock):
        semaphore.acquire_nowait()
    if value:
        semaphore.release(value)


def run_python(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run this Python in a process of its own, to its end."""
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        timeout=PATIENCE * 2,
        check=False,
    )


class Interrupt(BaseException):
    """What a handler of SIGINT might raise."""


class InThread:
    """A call in a thread of its own."""

    def __init__(self, call: Callable[[], object]) -> None:
        self._call = call
        self._result: object = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._result = self._call()
        except BaseException as error:
            self._result = error

    def done(self) -> bool:
        return not self._thread.is_alive()

    def result(self) -> object:
        """Wait for the end, and return what the call returned or the exception it raised."""
        self._thread.join(PATIENCE)
        assert self.done(), "the thread hangs"
        return self._result


def wait_in_threads(barrier: Barrier, count: int) -> tuple[list[threading.Thread], list[object]]:
    """Let `count` threads wait at a barrier, one after the other.

    Return them, and a list to which each adds its index, or "broken", when it ends.
    """
    outcomes: list[object] = []

    def wait() -> None:
        try:
            outcomes.append(as_threading(barrier).wait())
        except BrokenBarrierError:
            outcomes.append("broken")

    def have_arrived(number: int) -> bool:
        return barrier.n_waiting == number

    threads = [threading.Thread(target=wait, daemon=True) for _ in range(count)]
    for number, thread in enumerate(threads, 1):
        thread.start()
        until(partial(have_arrived, number))
    return threads, outcomes


def join(threads: list[threading.Thread]) -> None:
    for thread in threads:
        thread.join(PATIENCE)
        assert not thread.is_alive()


def helper_threads() -> int:
    """Return how many threads wait in objects of `threading` on behalf of tasks."""
    return sum(thread.name == "aiosync.from_threading" for thread in threading.enumerate())


class Indices(list[int]):
    """The free indices of a round of a barrier.

    :param arrived: called when the first party has arrived, before it does anything else
    """

    def __init__(self, indices: Iterable[int], arrived: Callable[[], object]) -> None:
        super().__init__(indices)
        self._arrived = arrived

    def pop(self, index: Any = -1) -> int:
        taken = super().pop(index)
        if taken == 0:
            self._arrived()
        return taken


class Aim:
    """Finds out when to release so that the timeout and the grant are at the same time.

    It goes back and forth in steps that grow for as long as the outcome stays the same: so it
    arrives soon, however late a busy machine is, and stays near.

    :param timeout: that of who waits, in seconds
    :param step: the smallest step, in seconds
    """

    def __init__(self, timeout: float, step: float = 2e-6) -> None:
        self._rng = random.Random(0)
        self._timeout = timeout
        self._least = self._step = step
        self._offset = 0.0
        self._later = True
        self.outcomes = [0, 0]

    def moment(self, start: float) -> float:
        """Return when to release, on the clock of `time.perf_counter`."""
        blur = self._rng.uniform(-10, 10) * self._least
        return start + self._timeout + self._offset + blur

    def learn(self, granted: int, of: int = 1) -> None:
        """Take note that of so many who waited so many were granted what they waited for."""
        self.outcomes[True] += granted
        self.outcomes[False] += of - granted
        # Later if it was granted, earlier if not.
        later = 2 * granted > of
        if granted in (0, of) and later is self._later:
            self._step = min(self._step * 1.3, 100 * self._least)
        else:
            self._step = self._least
        self._later = later
        self._offset += self._step * (2 * granted - of) / of


def wait_for_moment(moment: float, pause: Callable[[], object] = bool) -> None:
    while time.perf_counter() < moment:
        pause()
