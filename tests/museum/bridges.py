"""The hall of bridges between threads and tasks, and of what threads have of their own."""

from __future__ import annotations

import asyncio
import signal
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeoutError
from functools import partial
from typing import Any, ClassVar, Protocol

import anyio
import pytest
from support.helpers import PATIENCE, Aim, InThread, until, until_async, wait_for_moment

import aiosync
from museum.exhibits import PYTHON, Control, exhibit
from museum.stage import expect


class Shared(Protocol):
    """A semaphore without permits, shared by a thread and the tasks of an event loop."""

    def acquire_in_thread(self, timeout: float) -> bool: ...

    def release(self) -> None: ...

    def waiting(self) -> bool:
        """Tell whether the thread stands in line."""

    def take_all(self) -> int:
        """Take what is free, and tell how much it was."""


class OurShared:
    def __init__(self) -> None:
        self.semaphore = aiosync.Semaphore(0)
        self.view = aiosync.as_threading(self.semaphore)

    def acquire_in_thread(self, timeout: float) -> bool:
        return self.view.acquire(timeout=timeout)

    def release(self) -> None:
        self.semaphore.release()

    def waiting(self) -> bool:
        return self.semaphore.statistics().waiting > 0

    def take_all(self) -> int:
        taken = 0
        while self.view.acquire(blocking=False):
            taken += 1
        return taken


class ByFuture:
    """A semaphore of the event loop; a thread waits for the future of its coroutine."""

    def __init__(self) -> None:
        self.semaphore = asyncio.Semaphore(0)
        self.loop = asyncio.get_running_loop()
        self.waiters = 0

    async def acquire(self) -> None:
        self.waiters += 1
        await self.semaphore.acquire()
        self.waiters -= 1

    def acquire_in_thread(self, timeout: float) -> bool:
        future = asyncio.run_coroutine_threadsafe(self.acquire(), self.loop)
        try:
            future.result(timeout)
        except FutureTimeoutError:
            future.cancel()
            return False
        return True

    def release(self) -> None:
        self.semaphore.release()

    def waiting(self) -> bool:
        return self.waiters > 0

    def take_all(self) -> int:
        taken = 0
        while not self.semaphore.locked():
            try:
                self.semaphore.acquire().send(None)
            except StopIteration:
                taken += 1
        return taken


@exhibit(
    "`run_coroutine_threadsafe(acquire()).result(timeout)`",
    "a thread times out while it is given a permit: the permit is lost",
    reports="ls1intum/edutelligence#858",
    seen="CPython 3.11 to 3.13",
    ours=OurShared,
    controls=[Control("future.result(timeout)", ByFuture, PYTHON)],
)
def permit_of_nobody(make: Callable[[], Shared]) -> None:
    async def main() -> None:
        aim = Aim(0.002)
        for _ in range(150):
            shared = make()
            start = time.perf_counter()
            thread = InThread(partial(shared.acquire_in_thread, 0.002))
            while not thread.done() and not shared.waiting():
                await asyncio.sleep(0)
            # The event loop does nothing else until the thread has got its answer.
            wait_for_moment(aim.moment(start))
            shared.release()
            told = thread.result()
            for _ in range(10):
                await asyncio.sleep(0)
            permits = shared.take_all() + (told is True)
            expect(permits == 1, f"the thread was told {told}, and {permits} permits exist")
            aim.learn(told is True)

    interval = sys.getswitchinterval()
    # Otherwise the thread waits 5 ms for the event loop that spins until the moment.
    sys.setswitchinterval(1e-4)
    try:
        asyncio.run(main())
    finally:
        sys.setswitchinterval(interval)


class Borrowed(Protocol):
    """What lets tasks acquire a semaphore that threads own."""

    backends: ClassVar[list[str]]

    def __init__(self, semaphore: threading.Semaphore) -> None: ...

    async def acquire(self) -> object: ...


class OurBorrowed:
    backends: ClassVar = ["asyncio", "trio"]

    def __init__(self, semaphore: threading.Semaphore) -> None:
        self.semaphore = aiosync.from_threading(semaphore)

    async def acquire(self) -> object:
        return await self.semaphore.acquire()


class ByWorkerThread:
    """A worker thread blocks in the semaphore; what asyncio.to_thread does."""

    backends: ClassVar = ["asyncio"]

    def __init__(self, semaphore: threading.Semaphore) -> None:
        self.semaphore = semaphore

    async def acquire(self) -> object:
        executor = ThreadPoolExecutor(1)
        loop = asyncio.get_running_loop()
        future = loop.run_in_executor(executor, self.semaphore.acquire)
        executor.shutdown(wait=False)  # the thread ends when it is done
        return await future


@exhibit(
    "`to_thread(semaphore.acquire)`",
    "a task is cancelled, but its thread goes on waiting and takes a later permit",
    reports="dabeaz/curio#153 tox-dev/filelock#640",
    seen="CPython 3.11 to 3.13",
    ours=OurBorrowed,
    controls=[Control("to_thread(acquire)", ByWorkerThread, PYTHON)],
)
def zombie_eats(make: type[Borrowed]) -> None:
    async def main() -> None:
        semaphore = threading.Semaphore(0)
        threads = set(threading.enumerate())
        in_line: Any = semaphore._cond._waiters  # type: ignore[attr-defined]
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(make(semaphore).acquire)
            await until_async(lambda: in_line)
            tasks.cancel_scope.cancel()
        semaphore.release()
        for thread in set(threading.enumerate()) - threads:
            thread.join(PATIENCE)
        expect(semaphore.acquire(blocking=False), "nobody waits, and the permit is gone")

    for backend in make.backends:
        anyio.run(main, backend=backend)


class ThreadBarrierLike(Protocol):
    def wait(self, timeout: float) -> int: ...

    def abort(self) -> None: ...

    @property
    def n_waiting(self) -> int: ...

    @property
    def broken(self) -> bool: ...


def our_view(parties: int) -> ThreadBarrierLike:
    return aiosync.as_threading(aiosync.Barrier(parties))


class Interrupt(Exception):
    """Raised by a signal handler; as KeyboardInterrupt is."""


def _interrupt(number: int, frame: object) -> None:
    raise Interrupt


@exhibit(
    "threading.Barrier",
    "a signal handler raises in a waiting party (Ctrl-C): the others wait forever",
    seen="CPython 3.11 to 3.13",
    ours=our_view,
    controls=[Control("threading.Barrier", threading.Barrier, PYTHON)],
)
def interrupted_party(make: Callable[[int], ThreadBarrierLike]) -> None:
    if not hasattr(signal, "pthread_kill"):
        pytest.skip("no signal can be sent to a thread here")
    barrier = make(3)
    here = threading.get_ident()

    def strike() -> None:
        until(lambda: barrier.n_waiting == 2)
        signal.pthread_kill(here, signal.SIGUSR1)

    previous = signal.signal(signal.SIGUSR1, _interrupt)
    other, striker = InThread(partial(barrier.wait, PATIENCE)), InThread(strike)
    try:
        with pytest.raises(Interrupt):
            barrier.wait(PATIENCE)
        expect(barrier.broken, "nobody tells the others")
    finally:
        barrier.abort()
        assert striker.result() is None
        assert isinstance(other.result(), threading.BrokenBarrierError)
        signal.signal(signal.SIGUSR1, previous)
