"""The hall of semaphores, and of what is one by another name: limiters, conditions."""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque
from collections.abc import Callable
from typing import Any, Protocol

import anyio

import aiosync
from museum.exhibits import PYTHON, Control, exhibit
from museum.stage import Fate, Stage, Symptom, expect


class SemaphoreLike(Protocol):
    async def acquire(self) -> object: ...

    def try_acquire(self) -> bool:
        """Take a permit if there is one, without a step in between."""

    def release(self) -> None: ...


# Makes one with so many permits.
Maker = Callable[[int], SemaphoreLike]


class Ours:
    def __init__(self, value: int) -> None:
        self.semaphore = aiosync.Semaphore(value)

    async def acquire(self) -> object:
        return await self.semaphore.acquire()

    def try_acquire(self) -> bool:
        try:
            self.semaphore.acquire_nowait()
        except anyio.WouldBlock:
            return False
        return True

    def release(self) -> None:
        self.semaphore.release()


# -- What others have.


class OfAsyncio:
    def __init__(self, value: int) -> None:
        self.semaphore = asyncio.Semaphore(value)

    async def acquire(self) -> object:
        return await self.semaphore.acquire()

    def try_acquire(self) -> bool:
        if self.semaphore.locked():
            return False
        try:
            self.semaphore.acquire().send(None)
        except StopIteration:
            return True
        raise AssertionError("it waits although it is not locked")

    def release(self) -> None:
        self.semaphore.release()


class OfAnyio:
    def __init__(self, value: int) -> None:
        self.semaphore = anyio.Semaphore(value)

    async def acquire(self) -> object:
        await self.semaphore.acquire()
        return True

    def try_acquire(self) -> bool:
        try:
            self.semaphore.acquire_nowait()
        except anyio.WouldBlock:
            return False
        return True

    def release(self) -> None:
        self.semaphore.release()


class _OnBehalf:
    """A semaphore over a limiter, whose tokens have owners."""

    def __init__(self, limiter: Any) -> None:
        self.limiter = limiter
        self.owners: deque[object] = deque()

    async def acquire(self) -> object:
        owner = object()
        await self.limiter.acquire_on_behalf_of(owner)
        self.owners.append(owner)
        return owner

    def try_acquire(self) -> bool:
        owner = object()
        try:
            self.limiter.acquire_on_behalf_of_nowait(owner)
        except anyio.WouldBlock:
            return False
        self.owners.append(owner)
        return True

    def release(self) -> None:
        self.limiter.release_on_behalf_of(self.owners.popleft())


def limiter_of_anyio(value: int) -> SemaphoreLike:
    return _OnBehalf(anyio.CapacityLimiter(value))


class ConditionOfAnyio:
    """To acquire is to wait for a notification, to release is to notify one."""

    def __init__(self, value: int) -> None:
        self.condition = anyio.Condition()
        self.value = value

    async def acquire(self) -> object:
        if not self.try_acquire():
            async with self.condition:
                await self.condition.wait()
        return True

    def try_acquire(self) -> bool:
        self.value -= 1
        return self.value >= 0

    def release(self) -> None:
        self.condition.acquire_nowait()
        self.condition.notify()
        self.condition.release()


# -- What others had, rebuilt.


class OldLimiter:
    """What the CapacityLimiter of anyio once was, on asyncio.

    A token is not booked before its waiter runs. Until then anybody may take it; and if the waiter
    is cancelled, nobody else is told.
    """

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens
        self.borrowers: set[object] = set()
        self.queue: OrderedDict[object, asyncio.Event] = OrderedDict()

    def acquire_on_behalf_of_nowait(self, borrower: object) -> None:
        if self.queue or len(self.borrowers) >= self.tokens:
            raise anyio.WouldBlock
        self.borrowers.add(borrower)

    async def acquire_on_behalf_of(self, borrower: object) -> None:
        try:
            self.acquire_on_behalf_of_nowait(borrower)
        except anyio.WouldBlock:
            event = self.queue[borrower] = asyncio.Event()
            try:
                await event.wait()
            except BaseException:
                self.queue.pop(borrower, None)
                raise
            self.borrowers.add(borrower)

    def release_on_behalf_of(self, borrower: object) -> None:
        self.borrowers.remove(borrower)
        if self.queue and len(self.borrowers) < self.tokens:
            self.queue.popitem(last=False)[1].set()


def old_limiter(value: int) -> SemaphoreLike:
    return _OnBehalf(OldLimiter(value))


class SkippingSemaphore:
    """What anyio.Semaphore once was: who was cancelled stays in line until it has run."""

    def __init__(self, value: int) -> None:
        self.value = value
        self.waiters: deque[asyncio.Future[None]] = deque()

    async def acquire(self) -> object:
        if self.try_acquire():
            return True
        future = asyncio.get_running_loop().create_future()
        self.waiters.append(future)
        try:
            await future
        except asyncio.CancelledError:
            if future.cancelled():
                self.waiters.remove(future)
            else:
                self.release()
            raise
        return True

    def try_acquire(self) -> bool:
        if not self.value or self.waiters:
            return False
        self.value -= 1
        return True

    def release(self) -> None:
        for future in self.waiters:
            if not future.cancelled():
                future.set_result(None)
                self.waiters.remove(future)
                return
        self.value += 1


class OldAsyncioSemaphore:
    """What asyncio.Semaphore once was: a flag says that somebody was woken and has not run.

    If that somebody is cancelled, and nobody else waits, the flag stays up.
    """

    def __init__(self, value: int) -> None:
        self.value = value
        self.waiters: deque[asyncio.Future[None]] = deque()
        self.wakeup_scheduled = False

    async def acquire(self) -> object:
        while self.wakeup_scheduled or self.value <= 0:
            future = asyncio.get_running_loop().create_future()
            self.waiters.append(future)
            try:
                await future
                self.wakeup_scheduled = False
            except asyncio.CancelledError:
                self.wake_up_next()
                raise
        self.value -= 1
        return True

    def try_acquire(self) -> bool:
        if self.wakeup_scheduled or self.value <= 0:
            return False
        self.value -= 1
        return True

    def release(self) -> None:
        self.value += 1
        self.wake_up_next()

    def wake_up_next(self) -> None:
        while self.waiters:
            waiter = self.waiters.popleft()
            if not waiter.done():
                waiter.set_result(None)
                self.wakeup_scheduled = True
                return


ASYNCIO = Control("asyncio.Semaphore", OfAsyncio, PYTHON)
ANYIO = Control("anyio.Semaphore", OfAnyio, "anyio")
LIMITER = Control("anyio.CapacityLimiter", limiter_of_anyio, "anyio")
CONDITION = Control("anyio.Condition", ConditionOfAnyio, "anyio")
OLD_LIMITER = Control("the old limiter of anyio", old_limiter)


@exhibit(
    "anyio.CapacityLimiter, anyio.Condition",
    "a waiter is cancelled just after it is given a token: the token is lost",
    reports="agronholm/anyio#947 agronholm/anyio#1075",
    ours=Ours,
    controls=[OLD_LIMITER, LIMITER, CONDITION, ANYIO, ASYNCIO],
)
async def token_is_lost(stage: Stage, make: Maker) -> None:
    semaphore = make(1)
    await semaphore.acquire()
    first = await stage.start(semaphore.acquire)
    second = await stage.start(semaphore.acquire)
    semaphore.release()
    first.cancel()
    await stage.settle()
    if await first.outcome() is not Fate.CANCELLED:  # trio: it has got it before
        semaphore.release()
    expect(await second.outcome() is not Fate.HANGS, "the next in line waits for ever")


@exhibit(
    "anyio.CapacityLimiter, anyio.Semaphore",
    "a newcomer takes a token that belongs to a waiter: more are lent than exist",
    reports="agronholm/anyio#1170 agronholm/anyio#253",
    ours=Ours,
    controls=[OLD_LIMITER, LIMITER, ANYIO],
)
async def oversubscribed(stage: Stage, make: Maker) -> None:
    semaphore = make(1)
    await semaphore.acquire()
    waiter = await stage.start(semaphore.acquire)
    semaphore.release()
    newcomer = semaphore.try_acquire()
    outcome = await waiter.outcome()
    holders = newcomer + (outcome is not Fate.HANGS)
    expect(holders == 1, f"{holders} hold the only token")
    expect(not newcomer, "the newcomer was served first")


@exhibit(
    "anyio.Lock, anyio.Semaphore",
    "the only waiter is cancelled, then a release: a task that acquires in that step hangs",
    reports="agronholm/anyio#1145",
    ours=Ours,
    controls=[Control("the old semaphore of anyio", SkippingSemaphore), ANYIO],
)
async def cancelled_stay_in_line(stage: Stage, make: Maker) -> None:
    semaphore = make(1)
    await semaphore.acquire()
    waiter = await stage.start(semaphore.acquire)
    waiter.cancel()
    semaphore.release()
    expect(semaphore.try_acquire(), "the free permit can't be had")
    semaphore.release()
    outcome = await stage.try_it(semaphore.acquire())
    expect(outcome is not Fate.HANGS, "nobody ever gets the free permit")
    expect(await waiter.outcome() is Fate.CANCELLED, "the cancelled one was served")


@exhibit(
    "asyncio.Semaphore",
    "a waiter is cancelled as the holder releases: nobody can acquire any more",
    reports="python/cpython#90155",
    ours=Ours,
    controls=[Control("the old semaphore of asyncio", OldAsyncioSemaphore), ASYNCIO],
)
async def fresh_acquire_hangs(stage: Stage, make: Maker) -> None:
    semaphore = make(1)
    await semaphore.acquire()
    waiter = await stage.start(semaphore.acquire)
    semaphore.release()
    waiter.cancel()
    await stage.settle()
    if await waiter.outcome() is not Fate.CANCELLED:  # trio: it has got it before
        semaphore.release()
    outcome = await stage.try_it(semaphore.acquire())
    expect(outcome is not Fate.HANGS, "nobody holds it, and nobody gets it")


# -- One object, several event loops.


@exhibit(
    "anyio.Semaphore",
    "created outside an event loop, it works only under the library that uses it first",
    seen="anyio 4.16.0",
    ours=Ours,
    controls=[ANYIO],
)
def bound_to_the_first_loop(make: Maker) -> None:
    semaphore = make(1)
    holders: list[int] = []

    async def contend() -> None:
        await semaphore.acquire()
        holders.append(1)
        await anyio.lowlevel.checkpoint()
        assert len(holders) == 1
        holders.clear()
        semaphore.release()

    async def main() -> None:
        with anyio.fail_after(20):
            async with anyio.create_task_group() as tasks:
                for _ in range(3):
                    tasks.start_soon(contend)

    for backend in ("asyncio", "trio", "asyncio", "trio"):
        try:
            anyio.run(main, backend=backend)
        except Exception as error:
            raise Symptom(f"under {backend}: {error!r}") from error
    expect(semaphore.try_acquire(), "the permit is lost")
