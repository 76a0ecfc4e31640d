"""Stub connections for the tests of the pool, and what else several of these tests need.

What must live here: what two of these test files would have to write twice. What must not: helpers
that have nothing to do with pools; see `helpers`.
"""

from __future__ import annotations

import math
import threading
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any

import anyio
import anyio.lowlevel
import pytest

from aiosync import ConnectionPool, PoolEvent
from aiosync._pool import Loan
from support.helpers import PATIENCE
from support.virtual_time import spun, virtual


class Connection:
    """A stub. Nobody but the pool and its borrowers keeps it, so that it can be collected."""

    def __init__(self, number: int) -> None:
        self.number = number


class BareConnection:
    """A connection to nothing. It can be collected, which a pool notices."""


class ClosableConnection:
    """Counts how often it was closed by its own method, as the pool does without a hook."""

    def __init__(self) -> None:
        self.closings = 0

    async def aclose(self) -> None:
        self.closings += 1


Pool = ConnectionPool[Connection]


class Backend:
    """Where connections lead to. It notes what happens, and fails or hangs when told to."""

    def __init__(self) -> None:
        self.opened = 0
        self.closings: list[int] = []
        self.closed_at: list[float] = []
        self.attempts: list[float] = []
        self.connecting = self.most_connecting = 0
        self.most_open = 0
        self.refuses = False
        # How long connect takes, and what it waits for besides.
        self.pause = 0.0
        self.gate: anyio.Event | None = None
        # What else to await or raise at each step.
        self.at_close: Callable[[], Awaitable[object]] | None = None
        # Connections that nobody closes: they were collected.
        self.lost: set[int] = set()

    async def connect(self) -> Connection:
        self.attempts.append(anyio.current_time())
        self.connecting += 1
        self.most_connecting = max(self.most_connecting, self.connecting)
        try:
            await anyio.sleep(self.pause)
            if self.gate is not None:
                await self.gate.wait()
        finally:
            self.connecting -= 1
        if self.refuses:
            raise ConnectionRefusedError("no")
        self.opened += 1
        self.most_open = max(self.most_open, len(self.open()))
        return Connection(self.opened)

    async def close(self, connection: Connection) -> None:
        self.closings.append(connection.number)
        self.closed_at.append(anyio.current_time())
        await anyio.lowlevel.checkpoint()
        if self.at_close is not None:
            await self.at_close()

    def open(self) -> set[int]:
        return set(range(1, self.opened + 1)) - set(self.closings) - self.lost

    def pool(self, **options: Any) -> Pool:
        return ConnectionPool(self.connect, close=self.close, **options)

    def verify(self) -> None:
        twice = [number for number, times in Counter(self.closings).items() if times > 1]
        assert not twice, f"closed more than once: {twice}"
        assert not self.open(), f"left open: {self.open()}"
        assert not self.connecting


class SteppingConnection:
    """Notices if two use it at once, or somebody after it was closed."""

    def __init__(self) -> None:
        self.closed = 0
        self.users = 0
        # Whether a hook is at work on it.
        self.busy = False

    @contextmanager
    def used(self) -> Iterator[None]:
        assert not self.closed
        self.users += 1
        assert self.users == 1
        yield
        assert self.users == 1
        self.users -= 1

    def reset(self) -> None:
        assert not self.users
        assert not self.closed


class SteppingBackend:
    """What a pool connects to. It takes steps over everything, counts, and fails on demand.

    :param pause: how many steps each function takes
    :param keep: whether connections stay in `made`, or may be collected
    """

    def __init__(self, pause: int = 2, *, keep: bool = True) -> None:
        self.pause = pause
        self.keep = keep
        self.made: list[SteppingConnection] = []
        self.number_made = 0
        self.open = self.peak = 0
        self.calls: Counter[str] = Counter()
        # The threads on which something was called.
        self.threads: set[int] = set()
        # How often the next calls of each function fail.
        self.fails: Counter[str] = Counter()
        # Those of which a reset never ends, unless it is cancelled; and how many steps it takes it
        # to end then.
        self.hangs: set[SteppingConnection] = set()
        self.cleanup = 0
        # How many were closed while a hook was at work on them.
        self.wrong = 0

    async def _step(self, name: str) -> None:
        self.calls[name] += 1
        self.threads.add(threading.get_ident())
        fails = self.fails[name] > 0
        self.fails[name] -= fails
        await steps(self.pause)
        if fails:
            raise ConnectionError(name)

    async def _serve(self, name: str, connection: SteppingConnection) -> None:
        assert not connection.users
        assert not connection.closed
        assert not connection.busy
        connection.busy = True
        try:
            await self._step(name)
            if connection in self.hangs:
                await anyio.sleep_forever()
        finally:
            try:
                with anyio.CancelScope(shield=True):
                    await steps(self.cleanup)
            finally:
                connection.busy = False

    async def connect(self) -> SteppingConnection:
        connection = SteppingConnection()
        self.number_made += 1
        if self.keep:
            self.made.append(connection)
        self.open += 1
        self.peak = max(self.peak, self.open)
        try:
            await self._step("connect")
        except BaseException:
            self._note_close(connection)  # as a driver does, that owns what it has not yet returned
            raise
        return connection

    async def configure(self, connection: SteppingConnection) -> None:
        await self._step("configure")

    async def check(self, connection: SteppingConnection) -> None:
        await self._serve("check", connection)

    async def reset(self, connection: SteppingConnection) -> None:
        await self._serve("reset", connection)

    async def close(self, connection: SteppingConnection) -> None:
        self.wrong += connection.busy
        try:
            await self._step("close")
        finally:
            self._note_close(connection)

    def _note_close(self, connection: SteppingConnection) -> None:
        connection.closed += 1
        self.open -= connection.closed == 1

    def pool(self, *hooks: str, **settings: Any) -> ConnectionPool[SteppingConnection]:
        for hook in hooks:
            settings[hook] = getattr(self, hook)
        settings.setdefault("max_size", 1)
        return ConnectionPool(self.connect, close=self.close, **settings)

    def check_all_closed(self) -> None:
        assert self.open == 0
        assert all(connection.closed == 1 for connection in self.made)


async def steps(number: int) -> None:
    """Let the event loop go round `number` times."""
    for _ in range(number):
        await anyio.lowlevel.checkpoint()


def verified_backend() -> Iterator[Backend]:
    """Yield a backend, and then see that everything was closed. A fixture of several files."""
    backend = Backend()
    yield backend
    backend.verify()


class Virtual:
    """A base of test classes whose async tests run in virtual time."""

    @pytest.fixture(params=["asyncio", "trio"])
    def anyio_backend(self, request: pytest.FixtureRequest) -> Any:
        return virtual(request.param)

    @pytest.fixture(autouse=True)
    def time_must_pass(self) -> Iterator[None]:
        spun()
        yield
        assert not spun(), "some task ran all the time"


in_virtual_asyncio = pytest.mark.parametrize(
    "anyio_backend", [virtual("asyncio")], ids=["asyncio"]
)  # which, unlike trio, runs tasks in an order that is known


async def never() -> None:
    await anyio.sleep(math.inf)


def nothing(*args: object) -> None:
    pass


async def take(pool: Pool, into: list[Connection], timeout: float | None = None) -> None:
    into.append(await pool.acquire(timeout))


async def some(pool: Pool, number: int) -> list[Connection]:
    return [await pool.acquire() for _ in range(number)]


def give_back(pool: Pool, connections: list[Connection]) -> None:
    while connections:
        pool.release(connections.pop())


async def lose_one(pool: Pool) -> int:
    """Borrow a connection, and forget it. Return its number."""
    connection = await pool.acquire()
    return connection.number


def kinds(events: list[PoolEvent]) -> list[str]:
    return [event.kind for event in events]


def closed_for(events: list[PoolEvent]) -> list[str]:
    return [event.reason for event in events if event.kind == "closed"]


async def use(pool: Pool, timeout: float | None = PATIENCE) -> int:
    """Borrow a connection for a moment. Return its number."""
    async with pool.connection(timeout) as connection:
        return connection.number


def is_borrowed(checkout: Loan[Connection]) -> bool:
    """Return `borrowed`, which type checkers take for a value that does not change."""
    return checkout.borrowed


async def borrow_for(pool: Pool, seconds: float) -> float:
    """Borrow a connection again and again for so long. Return the longest wait, in seconds."""
    longest = 0.0
    end = anyio.current_time() + seconds
    while anyio.current_time() < end:
        began = anyio.current_time()
        async with pool.connection():
            longest = max(longest, anyio.current_time() - began)
            await anyio.sleep(0.01)
        await anyio.sleep(0.04)
    return longest


async def take_and_keep(pool: Pool, seconds: float) -> None:
    async with pool.connection():
        await anyio.sleep(seconds)


def messages(caplog: pytest.LogCaptureFixture) -> list[tuple[str, str]]:
    """Return (level, message) of what pools have logged."""
    return [
        (record.levelname, record.getMessage())
        for record in caplog.records
        if record.name == "aiosync.pool"
    ]


class FailingHook:
    """A hook that does something bad while it is told to."""

    def __init__(self, how: str) -> None:
        self.how = how
        self.bad = True

    async def __call__(self, _: object = None) -> bool:
        await anyio.lowlevel.checkpoint()
        if self.bad:
            if self.how == "hangs":
                await never()
            if self.how == "raises":
                raise KeyError("bad")
        return not self.bad or self.how != "returns False"


class Emptied(deque[Any]):
    """Another thread takes the last one between the look and the removal."""

    def remove(self, value: Any) -> None:
        super().clear()
        super().remove(value)
