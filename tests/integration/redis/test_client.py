"""What `Redis` and its session check and do apart from the network."""

from __future__ import annotations

import contextlib
import logging
import threading
from functools import partial
from typing import TYPE_CHECKING, Any

import anyio
import pytest
from anyio import to_thread
from support.helpers import InThread, until_async

from aiosync import as_threading
from aiosync._park import task_waiter
from aiosync.redis import BackendUnavailable, Redis
from aiosync.redis._permits import Permits
from aiosync.redis._ticket import Ticket

if TYPE_CHECKING:
    from support.redis_servers import RedisServer

pytestmark = [pytest.mark.redis, pytest.mark.timeout(60)]

URL = "redis://localhost"


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({}, TypeError, "either a url or connect="),
        ({"url": URL, "connect": print}, TypeError, "either a url or connect="),
        ({"url": 3}, TypeError, "url must be a str, not int"),
        ({"connect": 3}, TypeError, "connect must be callable, not int"),
        ({"url": URL, "prefix": 3}, TypeError, "prefix must be a str, not int"),
        ({"url": URL, "prefix": "{"}, ValueError, "prefix must not contain a brace"),
        ({"url": URL, "lease": "1"}, TypeError, "lease must be a number of seconds, not str"),
        ({"url": URL, "lease": True}, TypeError, "lease must be a number of seconds, not bool"),
        ({"url": URL, "give_up": 0}, ValueError, "give_up must be at least"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        Redis(**arguments)


def test_bad_names_and_values() -> None:
    redis = Redis(URL)
    for name in ("", "}a"):
        with pytest.raises(ValueError, match="must not be empty or begin with a brace"):
            redis.semaphore(name)
    with pytest.raises(TypeError, match="name must be a str, not int"):
        redis.barrier(3, 1)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="action must be callable, not int"):
        redis.barrier("a", 1, 3)  # type: ignore[arg-type]
    semaphore, barrier = redis.semaphore("a", 2), redis.barrier("a", 2)
    assert redis.semaphore("a", 2) is semaphore
    assert redis.barrier("a", 2) is barrier
    with pytest.raises(ValueError, match="created with another value"):
        redis.semaphore("a")
    with pytest.raises(ValueError, match="created with other arguments"):
        redis.barrier("a", 3)


@pytest.mark.anyio
async def test_it_is_entered_once_at_a_time(redis_server: RedisServer) -> None:
    redis = Redis(redis_server.url)
    assert " closed at " in repr(redis)
    await redis.__aexit__(None, None, None)  # not entered: nothing happens
    async with redis:
        assert " open at " in repr(redis)
        with pytest.raises(RuntimeError, match="entered already"):
            await redis.__aenter__()
    async with redis:
        pass


def test_without_an_event_loop(redis_server: RedisServer) -> None:
    redis = Redis(redis_server.url, restart_gate=False)
    semaphore = as_threading(redis.semaphore("threads"))
    with redis, semaphore:
        pass
    redis.__exit__(None, None, None)
    with redis, semaphore:
        pass


def test_a_server_that_is_not_there_without_an_event_loop() -> None:
    with pytest.raises(BackendUnavailable):
        Redis("redis://127.0.0.1:1").__enter__()


@pytest.mark.anyio
async def test_a_plain_with_in_a_task(redis_server: RedisServer) -> None:
    with pytest.raises(TypeError, match="async with"):
        Redis(redis_server.url).__enter__()


@pytest.mark.anyio
async def test_flush_reaches_the_server(redis_server: RedisServer) -> None:
    async with Redis(redis_server.url, restart_gate=False) as redis:
        semaphore = redis.semaphore("flush")
        await semaphore.acquire()
        semaphore.release()
        await redis.flush()
        key = "aiosync:{flush}:semaphore:holders"
        assert redis_server.command("ZCARD", key) == 0


@pytest.mark.anyio
async def test_an_error_in_a_task_ends_the_session(
    redis_server: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    """No caller waits for ever, and the log says why."""
    async with Redis(redis_server.url) as redis:
        session = redis._current.session
        assert session is not None
        semaphore = redis.semaphore("bug")
        await semaphore.statistics()
        (conductor,) = session._conductors.values()

        def fail() -> None:
            raise ZeroDivisionError("a bug")

        conductor.post(fail)
        with pytest.raises(BackendUnavailable):
            await semaphore.statistics()
        await until_async(lambda: session.finished)
        with pytest.raises(RuntimeError, match="not entered"):
            await semaphore.statistics()
        # What is posted just then gets an error too.
        late = session.conductor(Permits, "late", 1)
        ticket = Ticket(task_waiter())
        session.post(late, bool, ticket)
        for each in (ticket, session.flush(task_waiter)[-1]):
            with pytest.raises(BackendUnavailable, match="was closed"):
                each.result()
    (record,) = [each for each in caplog.records if each.levelno == logging.ERROR]
    assert record.getMessage() == "aiosync.redis has failed"


class Racing(dict[Any, Any]):
    """Each `get` is just before somebody else adds the key."""

    def get(self, key: object, default: object = None) -> object:
        return default


@pytest.mark.anyio
async def test_other_threads_and_processes(redis_server: RedisServer) -> None:
    async with Redis(redis_server.url) as redis:
        session = redis._current.session
        assert session is not None
        session.check_loop()
        session.pid += 1  # as if in a child process
        with pytest.raises(RuntimeError, match="before a fork"):
            redis._current.get()
        session.pid -= 1
        semaphore = redis.semaphore("race")
        user = semaphore._calls.user
        conductor = session.conductor(Permits, "race", 1, user)
        session._conductors = Racing(session._conductors)
        assert session.conductor(Permits, "race", 1, user) is conductor
        redis._known = Racing(redis._known)  # type: ignore[assignment]
        assert redis.semaphore("race") is semaphore


@pytest.mark.slow
def test_threads_that_ask_for_a_new_name_at_once_get_one_object() -> None:
    redis = Redis("redis://localhost")
    both = threading.Barrier(2)

    class Slow(type(redis._known)):  # type: ignore[misc]
        """A dictionary in which another thread may come between the look and the addition."""

        def setdefault(self, key: Any, default: Any = None) -> Any:
            known = self.get(key)
            with contextlib.suppress(threading.BrokenBarrierError):
                both.wait(0.2)
            if known is None:
                self[key] = known = default
            return known

    redis._known = Slow()
    found = [InThread(partial(redis.semaphore, "name")) for _ in range(2)]
    first, second = (thread.result() for thread in found)
    assert first is second


def test_a_thread_learns_that_the_event_loop_has_ended(redis_server: RedisServer) -> None:
    redis = Redis(redis_server.url, restart_gate=False)
    semaphore = as_threading(redis.semaphore("ended"))

    async def main() -> None:
        await redis.__aenter__()
        await to_thread.run_sync(semaphore.acquire)

    anyio.run(main)
    session = redis._current.session
    assert session is not None
    with pytest.raises(BackendUnavailable, match="event loop of the Redis object has ended"):
        session.check_loop()
    with pytest.raises((BackendUnavailable, RuntimeError)):
        semaphore.acquire()
