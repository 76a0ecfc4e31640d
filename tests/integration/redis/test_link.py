"""One connection to a server, and how it is kept: `_link`, `_server`, `_session`, `_carrier`."""

from __future__ import annotations

import asyncio
import gc
import logging
import re
import socket
import time
from contextlib import asynccontextmanager
from functools import partial
from math import inf
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import anyio
import coredis
import pytest
from coredis import exceptions
from coredis.connection import TCPLocation
from support.helpers import until_async
from support.redis_servers import Cluster, RedisServer, ServerProgram
from support.silent_proxy import SilentProxy

from aiosync import BrokenBarrierError
from aiosync.redis import BackendUnavailable, Redis, _client, _link, _server
from aiosync.redis._conductor import Stale
from aiosync.redis._connect import client_for, open_link
from aiosync.redis._link import LinkLost, root_cause
from aiosync.redis._server import Server

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterator

    from aiosync.redis._link import Client, Link

pytestmark = [pytest.mark.anyio, pytest.mark.redis, pytest.mark.timeout(60)]

LOGGER = "aiosync.redis"


@asynccontextmanager
async def linked(
    connect: str | Callable[[], Client | Awaitable[Client]],
    timeout: float = 5,
    prefix: str = "aiosync",
) -> AsyncIterator[Link]:
    if isinstance(connect, str):
        url = connect
        connect = lambda: client_for(url, timeout)  # noqa: E731
    async with open_link(connect, timeout, None, prefix) as link:
        yield link


async def failure(
    connect: str | Callable[[], Client | Awaitable[Client]], timeout: float = 5
) -> BaseException:
    """Return what `open_link` raises."""
    try:
        async with linked(connect, timeout):
            pytest.fail("connected")
    except Exception as error:
        return root_cause(error)


def link_of(redis: Redis) -> Link | None:
    session = redis._current.session
    assert session is not None
    return session._servers[0].link


async def no_connection_left(server: RedisServer) -> None:
    await until_async(lambda: not server.clients())


def waiting(server: RedisServer, name: str) -> int:
    """Return how many wait for a permit."""
    count: int = server.command("ZCARD", keys(name)[3])
    return count


def arguments(run: str, *operations: str) -> list[str]:
    """Return the arguments of the script of a semaphore with one permit."""
    return ["1", "2000", "me", "1", run, "0", "0", "PUBLISH", *operations]


def keys(name: str) -> list[str]:
    stem = f"aiosync:{{{name}}}:semaphore"
    return [stem, f"{stem}:members", f"{stem}:holders", f"{stem}:waiters"]


# --- what a link learns, and its requests


async def test_it_learns_which_server_it_is(redis_server: RedisServer) -> None:
    async with linked(redis_server.url) as link:
        info = redis_server.info()
        assert link.run == info["run_id"]
        assert int(info["uptime_in_seconds"]) - 1 <= link.uptime
        assert link.policy == "noeviction"
        assert not link.is_cluster
        assert link.publish == "PUBLISH"
        assert link.node_of("a") is link.node is None
    await no_connection_left(redis_server)


async def test_the_uptime_grows(redis_server: RedisServer) -> None:
    """Otherwise a new name waits for the gate of a server that has run for long."""
    async with linked(redis_server.url) as link:
        before = link.uptime
        await anyio.sleep(0.02)
        assert before + 0.02 <= link.uptime < before + 5


@pytest.mark.slow
async def test_the_uptime_is_never_more_than_is_true(server_program: ServerProgram) -> None:
    """Servers count whole seconds: one that starts just before a second ends tells 1 too early."""
    await anyio.sleep((0.8 - time.time()) % 1)
    start = time.monotonic()
    with RedisServer(server_program) as server:
        for _ in range(5):
            async with linked(server.url) as link:
                assert link.uptime <= time.monotonic() - start
            await anyio.sleep(0.1)


async def test_scripts_are_loaded_once(server_program: ServerProgram) -> None:
    with RedisServer(server_program) as server:
        async with linked(server.url) as link:
            for _ in range(3):
                reply = await link.call("semaphore", keys("a"), arguments(link.run, "S"), 5)
                assert reply[0] == "ok"
                assert reply[6] == ["1 0 0 1 0"]
            assert server.calls("script|load") == 2
            server.command("SCRIPT", "FLUSH")
            reply = await link.call("semaphore", keys("a"), arguments(link.run, "a", "1"), 5)
            assert reply[0] == "ok"
            assert server.calls("script|load") == 4
            await link.call("semaphore", keys("a"), arguments(link.run, "S"), 5)
            assert server.calls("script|load") == 4


@pytest.mark.slow
async def test_loading_scripts_again_takes_part_of_the_time_of_the_call(
    redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise a holder hears too late that its permit is lost."""
    async with linked(redis_server.url) as link:
        timeouts: list[float] = []

        async def slow(command: bytes, *_: object, timeout: float, **__: object) -> None:
            timeouts.append(timeout)
            await anyio.sleep(0.1)
            if command == b"EVALSHA":
                raise exceptions.NoScriptError("NOSCRIPT")

        monkeypatch.setattr(link._connection, "create_request", slow)
        with pytest.raises(LinkLost):
            await link.call("semaphore", keys("a"), arguments(link.run, "S"), 1)
        assert len(timeouts) == 6
        assert timeouts[0] == 1
        for number, timeout in enumerate(timeouts):
            assert timeout <= 1 - 0.09 * number


async def test_a_server_that_forgets_scripts_is_given_up(
    redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with linked(redis_server.url) as link:
        monkeypatch.setitem(_link._HASHES, "semaphore", "0" * 40)
        with pytest.raises(LinkLost, match="forgets"):
            await link.call("semaphore", keys("a"), arguments(link.run, "S"), 5)


@pytest.mark.parametrize("decode", [False, True])
async def test_messages_are_text(redis_server: RedisServer, decode: bool) -> None:
    """A message is decoded as the pending request wants its reply: bytes or str."""

    def connect() -> Any:
        options: Any = {"decode_responses": decode}
        return coredis.Redis.from_url(redis_server.url, **options)

    async with linked(connect) as link:
        messages = link.messages()
        link.subscribe("é")
        await link.request(b"ECHO", "a")
        redis_server.command("PUBLISH", "é".encode(), "ü".encode())
        assert await anext(messages) == ("é", "ü")
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(link.request, b"EVAL", "redis.call('PUBLISH', 'é', 'ä')", 0)
        assert await anext(messages) == ("é", "ä")
        link.unsubscribe("é")
        await link.request(b"ECHO", "a")
        assert redis_server.command("PUBLISH", "é".encode(), "x") == 0
        link.close()
        with pytest.raises(LinkLost):
            await anext(messages)
        with pytest.raises(LinkLost):
            link.subscribe("a")
        with pytest.raises(LinkLost):
            await link.request(b"ECHO", "a")


async def test_a_refused_subscription_does_not_shift_replies(server_program: ServerProgram) -> None:
    """The error is a reply that nobody waits for."""
    users = {"ann": "on >pw ~* resetchannels &aiosync:* +@all"}
    with RedisServer(server_program, users=users) as server:
        async with linked(server.url_of("ann", "pw")) as link:
            replies: dict[str, bytes] = {}

            async def echo(text: str) -> None:
                link.subscribe(f"forbidden:{text}")
                replies[text] = await link.request(b"ECHO", text)

            async with anyio.create_task_group() as tasks:
                for number in range(20):
                    tasks.start_soon(echo, str(number))
            assert replies == {str(number): str(number).encode() for number in range(20)}


async def test_an_error_of_the_server_ends_the_link(redis_server: RedisServer) -> None:
    redis_server.command("SET", keys("text")[0], "a text")
    async with linked(redis_server.url) as link:
        with pytest.raises(LinkLost) as caught:
            await link.call("semaphore", keys("text"), arguments(link.run, "S"), 5)
        assert isinstance(caught.value.__cause__, exceptions.ResponseError)
        with pytest.raises(LinkLost):
            await anext(link.messages())


@pytest.mark.parametrize(
    "error",
    [
        anyio.EndOfStream(),
        anyio.ClosedResourceError(),
        AssertionError("a bug of coredis"),
        exceptions.MovedError("1 somewhere:6379"),
    ],
)
async def test_whatever_ends_a_request_ends_the_link(
    redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """Under TLS a connection may end with an error of anyio, which ended the whole session."""
    async with linked(redis_server.url) as link:

        def fail(*_: object, **__: object) -> None:
            raise error

        monkeypatch.setattr(link._connection, "create_request", fail)
        with pytest.raises(LinkLost) as caught:
            await link.call("semaphore", keys("a"), arguments(link.run, "S"), 5)
        assert caught.value.__cause__ is error
        with pytest.raises(LinkLost) as caught:
            link.subscribe("a")
        assert caught.value.__cause__ is error
        with pytest.raises(LinkLost):
            await anext(link.messages())


@pytest.mark.slow
async def test_a_silent_link_ends_after_the_timeout(redis_server: RedisServer) -> None:
    with SilentProxy(redis_server.address) as proxy:
        async with linked(proxy.url, timeout=1) as link:
            proxy.cut("to_client")
            begun = anyio.current_time()
            with pytest.raises(LinkLost) as caught:
                await link.request(b"ECHO", "a")
            assert 0.9 < anyio.current_time() - begun < 2
            assert isinstance(caught.value.__cause__, TimeoutError)
            with pytest.raises(LinkLost):
                await anext(link.messages())


# --- connections that fail


async def test_a_server_that_refuses_connections() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    error = await failure(f"redis://127.0.0.1:{port}")
    assert isinstance(error, LinkLost)
    assert isinstance(error.__cause__, ConnectionRefusedError)
    with pytest.raises(BackendUnavailable, match="ConnectionRefusedError") as caught:
        await Redis(f"redis://127.0.0.1:{port}").__aenter__()
    assert isinstance(caught.value.__cause__, ConnectionRefusedError)


async def test_a_server_that_does_not_answer() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        error = await failure(f"redis://127.0.0.1:{listener.getsockname()[1]}", timeout=0.1)
    assert isinstance(error, LinkLost)
    assert isinstance(error.__cause__, TimeoutError)


async def test_a_connect_that_hangs() -> None:
    redis = Redis(connect=lambda: anyio.sleep(inf), lease=0.3)  # type: ignore[arg-type, return-value]
    with pytest.raises(BackendUnavailable, match=r"no connection within 0.1 s") as caught:
        await redis.__aenter__()
    assert isinstance(caught.value.__cause__, TimeoutError)


async def test_a_connect_that_fails() -> None:
    def connect() -> Any:
        raise OSError("no credentials today")

    with pytest.raises(BackendUnavailable, match="no credentials today"):
        await Redis(connect=connect).__aenter__()

    def fail() -> Any:
        raise ExceptionGroup("many", [ValueError("why")])

    with pytest.raises(BackendUnavailable, match="ValueError: why"):
        await Redis(connect=fail).__aenter__()


async def test_a_connect_that_is_async(redis_server: RedisServer) -> None:
    async def connect() -> Any:
        await anyio.sleep(0)
        return client_for(redis_server.url, 1)

    async with Redis(connect=connect) as redis:
        assert (await redis.semaphore("async").statistics()).limit == 1


@pytest.mark.parametrize("nonsense", [None, 3, "redis://localhost", coredis.Sentinel([])])
async def test_a_connect_that_returns_nonsense(nonsense: Any) -> None:
    with pytest.raises(TypeError, match=f"not {type(nonsense).__name__}$"):
        await Redis(connect=lambda: nonsense).__aenter__()


async def test_a_connect_that_returns_a_client_twice(redis_server: RedisServer) -> None:
    client = client_for(redis_server.url, 1)
    redis = Redis(connect=lambda: client)
    async with redis:
        pass
    with pytest.raises(TypeError, match="new client of coredis each time"):
        await redis.__aenter__()


async def test_a_client_that_encodes_otherwise(redis_server: RedisServer) -> None:
    """Other processes would see other names."""
    redis = Redis(connect=lambda: coredis.Redis.from_url(redis_server.url, encoding="latin-1"))
    with pytest.raises(TypeError, match="encoding utf-8, not latin-1"):
        await redis.__aenter__()


async def test_a_client_without_replies(redis_server: RedisServer) -> None:
    error = await failure(lambda: coredis.Redis.from_url(redis_server.url, noreply=True))
    assert isinstance(error, LinkLost)
    assert "run_id" in str(error.__cause__)


@pytest.mark.slow
async def test_a_replica_is_refused(server_program: ServerProgram) -> None:
    with (
        RedisServer(server_program) as primary,
        RedisServer(server_program, replica_of=primary) as replica,
        pytest.raises(BackendUnavailable, match="the server is a replica"),
    ):
        await Redis(replica.url).__aenter__()


@pytest.mark.slow
async def test_a_node_of_a_cluster_needs_its_client(server_program: ServerProgram) -> None:
    with (
        Cluster(server_program, size=1) as cluster,
        pytest.raises(TypeError, match=r"coredis\.RedisCluster"),
    ):
        await Redis(cluster.urls[0]).__aenter__()


async def test_a_cluster_client_for_a_single_server(redis_server: RedisServer) -> None:
    def connect() -> Any:
        return coredis.RedisCluster(startup_nodes=[TCPLocation(*redis_server.address)])

    with pytest.raises(BackendUnavailable, match="cluster support disabled"):
        await Redis(connect=connect).__aenter__()


# --- addresses


@pytest.mark.parametrize(
    "url", ["", "localhost", "redis://", "redis:///1", "http://localhost", "unix://", "rediss:x"]
)
def test_bad_urls(url: str) -> None:
    with pytest.raises(ValueError, match="url must be redis://host"):
        Redis(url)


async def test_a_unix_socket(redis_server: RedisServer) -> None:
    async with Redis(redis_server.unix_url) as redis:
        assert (await redis.semaphore("unix").statistics()).limit == 1
    redis_server.command("DEL", *keys("unix"))


@pytest.mark.parametrize("suffix", ["/3", "?db=3"])
async def test_the_number_of_a_database(redis_server: RedisServer, suffix: str) -> None:
    async with Redis(redis_server.url + suffix, restart_gate=False) as redis:
        await redis.semaphore("db").acquire()
        with redis_server.client() as client:
            assert client.command("EXISTS", keys("db")[0]) == 0
            client.command("SELECT", 3)
            assert client.command("EXISTS", keys("db")[0]) == 1
            client.command("FLUSHDB")


async def test_a_password_with_special_characters(server_program: ServerProgram) -> None:
    users = {"a/b": "on >p@ss:w%rd/ ~* &* +@all"}
    with RedisServer(server_program, users=users) as server:
        async with Redis(server.url_of(quote("a/b", safe=""), quote("p@ss:w%rd/", safe=""))):
            pass


# --- rights


def documented_rules() -> str:
    """Return the rules that the docstring of `Redis` names."""
    assert Redis.__doc__ is not None
    block = re.search(r"``::\n\n(.*?)\n\n", Redis.__doc__, re.DOTALL)
    assert block
    return " ".join(block[1].split())


@pytest.mark.parametrize("url", ["redis://{}:wrong@{}:{}", "redis://{1}:{2}"])
async def test_a_wrong_password(server_program: ServerProgram, url: str) -> None:
    with (
        RedisServer(server_program, password="right") as server,
        pytest.raises(PermissionError, match=r"Authentication.*Error"),
    ):
        await Redis(url.format("default", *server.address)).__aenter__()


@pytest.mark.slow
async def test_a_password_that_has_changed(server_program: ServerProgram) -> None:
    with RedisServer(server_program, password="right") as server:
        async with Redis(server.url, lease=2, give_up=0.2) as redis:
            server.command("CONFIG", "SET", "requirepass", "other")
            server.password = "other"
            server.command("CLIENT", "KILL", "TYPE", "normal")
            await until_async(lambda: link_of(redis) is None)
            with pytest.raises(BackendUnavailable) as caught:
                await redis.semaphore("a").acquire()
            assert isinstance(caught.value.__cause__, PermissionError)


async def use_everything(server: RedisServer, user: str) -> None:
    """Have a server run every command that it may ever be asked for."""
    url, number = server.url_of(user, "pw"), user
    settings: dict[str, Any] = {"restart_gate": False, "lease": 3}
    async with Redis(url, **settings) as one, Redis(url, **settings) as two:
        mine, theirs = (each.semaphore(f"s{number}", 2) for each in (one, two))
        await mine.acquire()
        await theirs.acquire()
        await mine.resize(1)
        mine.release()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(mine.acquire)
            await until_async(lambda: waiting(server, f"s{number}"))
            theirs.release()
        mine.release()
        await mine.statistics()
        barriers = [each.barrier(f"b{number}", 2) for each in (one, two)]
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(barriers[0].wait)
            tasks.start_soon(barriers[1].wait)
        with pytest.raises(BrokenBarrierError):
            await barriers[0].wait(timeout=0)
        server.command("ZADD", f"aiosync:{{s{number}}}:semaphore:members", 1, "dead")
        await mine.statistics()
        server.command("ZADD", f"aiosync:{{b{number}}}:barrier:members", 1, "dead")
        barriers[1].reset()
        await barriers[1].statistics()
        # What is asked after a loss of the connection.
        async with mine:
            session = one._current.session
            assert session is not None
            session._servers[0].lose(Stale())
            await mine.statistics()


def conductors(redis: Redis) -> list[Any]:
    assert redis._current.session is not None
    return list(redis._current.session._conductors.values())


async def test_the_documented_rights_are_enough(server_program: ServerProgram) -> None:
    with RedisServer(server_program, users={"ann": f"on >pw {documented_rules()}"}) as server:
        await use_everything(server, "ann")
        denied = [entry[7] for entry in server.command("ACL", "LOG")]
        # Of coredis, which does without.
        assert set(denied) <= {b"client|setinfo"}


ENTRY = ["+info", "+script|load", "+client|reply", "+subscribe"]


NEEDED = [*ENTRY, "+evalsha", "+time", "+zadd"]


@pytest.fixture(scope="module")
def restricted_server(server_program: ServerProgram) -> Iterator[RedisServer]:
    """Return a server with a user for each right in `NEEDED`; the user has all other rights."""
    users: dict[str, str] = {}
    for number, missing in enumerate(NEEDED):
        rules = documented_rules().split()
        rules.remove(missing)
        users[f"user{number}"] = f"on >pw {' '.join(rules)}"
    with RedisServer(server_program, users=users) as server:
        yield server


@pytest.mark.parametrize("missing", NEEDED)
async def test_a_right_that_is_missing(restricted_server: RedisServer, missing: str) -> None:
    url = restricted_server.url_of(f"user{NEEDED.index(missing)}", "pw")
    # Redis 7.0 does not say which command of a script it is.
    named = missing[1:].partition("|")[0] if missing in ENTRY else ""
    with pytest.raises(PermissionError, match=f"(?i){named}"):
        async with Redis(url, restart_gate=False) as redis:
            assert missing not in ENTRY
            await redis.semaphore("a").acquire()


async def test_a_right_that_no_caller_misses(
    server_program: ServerProgram, caplog: pytest.LogCaptureFixture
) -> None:
    """Who releases a permit is not told that the next waiter was not served; the log is."""
    rules = " ".join(rule for rule in documented_rules().split() if rule != "+zpopmin")
    with RedisServer(server_program, users={"ann": f"on >pw {rules}"}) as server:
        async with Redis(server.url_of("ann", "pw"), lease=1, restart_gate=False) as redis:
            semaphore = redis.semaphore("a")
            await semaphore.acquire()
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(semaphore.acquire)
                await until_async(lambda: waiting(server, "a"))
                semaphore.release()
                await until_async(lambda: "semaphore 'a': the server refuses" in caplog.text)
                tasks.cancel_scope.cancel()


@pytest.mark.slow
async def test_each_documented_right_is_needed(server_program: ServerProgram) -> None:
    rules = documented_rules().split()
    limiter = anyio.CapacityLimiter(4)

    async def use(user: str) -> None:
        async with limiter:
            try:
                with anyio.move_on_after(2):
                    await use_everything(server, user)
            except (PermissionError, BackendUnavailable, ExceptionGroup):
                pass

    with RedisServer(server_program, settings={"acllog-max-len": "100000"}) as server:
        async with anyio.create_task_group() as tasks:
            for number, missing in enumerate(rules):
                left = [rule for rule in rules if rule != missing]
                user = f"user{number}"
                server.command("ACL", "SETUSER", user, "resetchannels", "on", ">pw", *left)
                tasks.start_soon(use, user)
        denied = {
            entry[9].decode(): entry[7]
            for entry in server.command("ACL", "LOG", 100000)
            if entry[7] != b"client|setinfo"
        }
    not_needed = [rule for number, rule in enumerate(rules) if f"user{number}" not in denied]
    assert not_needed == []


# --- loss of the connection


async def test_the_server_comes_back(
    server_program: ServerProgram, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, LOGGER)
    with RedisServer(server_program) as server:
        async with Redis(server.url, lease=1, give_up=30, restart_gate=False) as redis:
            semaphore = redis.semaphore("a")
            await semaphore.statistics()
            for _ in range(2):
                caplog.clear()
                server.kill()
                await until_async(lambda: link_of(redis) is None)
                server.start()
                with anyio.fail_after(5):
                    await semaphore.statistics()
                messages = [each.getMessage() for each in caplog.records if each.name == LOGGER]
                assert len(messages) == 2
                assert messages[0].startswith("lost the connection to the server: ")
                assert messages[1] == "connected to the server again"


async def test_a_loss_with_two_requests_under_way(
    server_program: ServerProgram, caplog: pytest.LogCaptureFixture
) -> None:
    with RedisServer(server_program) as server:
        async with Redis(server.url, lease=9, restart_gate=False) as redis:
            semaphores = [redis.semaphore("a"), redis.semaphore("b")]
            for semaphore in semaphores:
                await semaphore.statistics()
            server.freeze()
            async with anyio.create_task_group() as tasks:
                for semaphore in semaphores:
                    tasks.start_soon(semaphore.statistics)
                await anyio.wait_all_tasks_blocked()
                server.restart(empty=True)
    assert caplog.text.count("lost the connection") == 1


async def test_a_name_that_is_used_again_before_it_is_idle(server_program: ServerProgram) -> None:
    with RedisServer(server_program) as server:
        async with Redis(server.url, lease=30, restart_gate=False) as redis:
            semaphore = redis.semaphore("busy")
            await semaphore.acquire()
            server.freeze()
            semaphore.release()
            del semaphore
            gc.collect()
            held: list[int] = []

            async def ask() -> None:
                held.append((await redis.semaphore("busy").statistics()).held)

            async with anyio.create_task_group() as tasks:
                tasks.start_soon(ask)
                await anyio.wait_all_tasks_blocked()
                server.thaw()
            assert held == [0]


@pytest.mark.slow
async def test_the_reason_of_a_loss_is_kept(
    server_program: ServerProgram, caplog: pytest.LogCaptureFixture
) -> None:
    """The request that has failed knows more than the iterator over messages, which ends too."""
    with (
        RedisServer(server_program) as primary,
        RedisServer(server_program) as server,
    ):
        async with Redis(server.url, lease=6, give_up=0.3) as redis:
            semaphore = redis.semaphore("a")
            await semaphore.statistics()
            server.command("REPLICAOF", *primary.address)
            with pytest.raises(BackendUnavailable, match="no server could be reached") as caught:
                await semaphore.statistics()
            assert "replica" in str(caught.value.__cause__)
            (lost,) = [each for each in caplog.records if "lost the connection" in each.message]
            assert "ReadOnlyError" in lost.message


async def test_a_link_that_is_given_up_is_closed(redis_server: RedisServer) -> None:
    """It was kept open, and never replaced, after a reply that the link has been superseded."""
    async with Redis(redis_server.url) as redis:
        semaphore = redis.semaphore("given-up")
        await semaphore.statistics()
        before = link_of(redis)
        assert redis._current.session is not None
        redis._current.session._servers[0].lose(Stale())
        assert link_of(redis) is None
        with anyio.fail_after(5):
            await semaphore.statistics()
        assert link_of(redis) is not before
        assert len(redis_server.clients()) == 1
    await no_connection_left(redis_server)


async def test_eviction_is_warned_of_once(
    server_program: ServerProgram, caplog: pytest.LogCaptureFixture
) -> None:
    with RedisServer(server_program, settings={"maxmemory-policy": "allkeys-lru"}) as server:
        async with Redis(server.url, restart_gate=False) as redis:
            before = link_of(redis)
            server.command("CLIENT", "KILL", "TYPE", "normal")
            await until_async(lambda: link_of(redis) not in {before, None})
        async with redis:
            pass
    warnings = [each for each in caplog.records if "maxmemory_policy" in each.getMessage()]
    assert len(warnings) == 2  # once each time that it was entered
    assert "maxmemory_policy=allkeys-lru" in warnings[0].getMessage()


def test_the_clock_of_other_systems(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_server, "_SUSPENDED_CLOCK", None)
    before = time.monotonic()
    assert before <= _server.clock() <= time.monotonic()


def test_jitter() -> None:
    delays = {_server.with_jitter(1) for _ in range(100)}
    assert len(delays) > 1
    assert 0.5 <= min(delays) <= max(delays) <= 1


async def test_attempts_to_connect_become_rarer(monkeypatch: pytest.MonkeyPatch) -> None:
    now, delays, lasts = 0.0, [], iter([0.0] * 10 + [10.0, 0.0, 0.0])

    def no_link(*_: object) -> None:
        nonlocal now
        now += next(lasts)
        raise LinkLost from OSError("refused")

    async def sleep(delay: float) -> None:
        delays.append(delay)
        if len(delays) == 13:
            server.duplicate_of = server

    monkeypatch.setattr(_server, "open_link", no_link)
    monkeypatch.setattr(_server, "sleep", sleep)
    monkeypatch.setattr(_server, "clock", lambda: now)
    monkeypatch.setattr(_server, "with_jitter", lambda delay: delay)
    server = Server(lambda: client_for("redis://unused", 1), 1, "aiosync", None, lambda _: None)
    await server.keep_connected()
    assert delays[:7] == pytest.approx([0.02, 0.04, 0.08, 0.16, 0.32, 0.5, 0.5])
    assert max(delays) == 0.5
    # After a link that has lasted for a while.
    assert delays[10:] == pytest.approx([0.02, 0.04, 0.08])
    assert isinstance(server.error, OSError)


# --- names that come and go


async def test_a_name_that_is_dropped_and_used_again(redis_server: RedisServer) -> None:
    """Its two conductors shared a subscription, which the end of the first one ended."""
    one, two = (Redis(redis_server.url, lease=60, restart_gate=False) for _ in range(2))
    async with one, two:
        for _ in range(3):
            semaphore = one.semaphore("again")
            await semaphore.statistics()
            del semaphore
            gc.collect()
            semaphore = one.semaphore("again")
            other = two.semaphore("again")
            await other.acquire()
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(semaphore.acquire)
                await until_async(lambda: waiting(redis_server, "again"))
                other.release()
                with anyio.fail_after(10):  # not at the next audit
                    await other.acquire(timeout=0)
            semaphore.release()
            del semaphore
            gc.collect()
        await until_async(lambda: not conductors(one))
        assert (await two.semaphore("again").statistics()).held == 0


async def test_a_permit_keeps_its_semaphore(redis_server: RedisServer) -> None:
    async with Redis(redis_server.url, restart_gate=False) as redis:
        await redis.semaphore("kept").acquire()
        gc.collect()
        redis.semaphore("kept").release()
        gc.collect()
        assert (await redis.semaphore("kept").statistics()).held == 0


async def test_a_name_that_is_first_used_at_the_end(redis_server: RedisServer) -> None:
    redis = Redis(redis_server.url)
    barrier = redis.barrier("at-the-end", 2)
    async with redis:
        barrier.abort()
    async with redis:
        assert (await barrier.statistics()).broken
        barrier.reset()


@pytest.mark.slow
async def test_a_name_that_is_used_again_although_no_server_heard_of_its_last_use(
    server_program: ServerProgram,
) -> None:
    """Its next conductor begins when the last one ends, so nobody told the waiters."""

    def is_dropped() -> bool:
        gc.collect()
        return not conductors(redis)

    with RedisServer(server_program) as server:
        async with Redis(server.url, lease=1.5, give_up=0.3, restart_gate=False) as redis:
            await redis.semaphore("a").acquire()
            server.freeze()
            redis.semaphore("a").release()
            await until_async(is_dropped)
            with anyio.fail_after(10):
                for blocking in (True, True, False):  # each has a conductor of its own
                    with pytest.raises(BackendUnavailable):
                        await redis.semaphore("a").acquire(blocking)
                    await until_async(is_dropped)
            server.thaw()
            await until_async(lambda: link_of(redis) is not None)
            assert (await redis.semaphore("a").statistics()).held == 0


async def test_a_name_that_is_used_again_before_it_is_retired(
    redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The finalizer of the old object, in another thread, retired the conductor of the new one."""
    late: list[Callable[[], object]] = []
    retire = _client._retire
    monkeypatch.setattr(_client, "_retire", lambda *args: late.append(partial(retire, *args)))
    async with Redis(redis_server.url, restart_gate=False) as redis:
        await redis.semaphore("not-retired", 2).statistics()
        gc.collect()
        semaphore = redis.semaphore("not-retired", 2)
        with anyio.fail_after(5):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(semaphore.acquire)
                await anyio.sleep(0.1)
                late.pop(0)()
            await semaphore.acquire()
        semaphore.release(2)
        await redis.flush()
        del semaphore
        gc.collect()
        while late:
            late.pop()()
        assert not conductors(redis)


@pytest.mark.slow
async def test_a_server_that_cannot_write(server_program: ServerProgram) -> None:
    """It accepts each connection and refuses each script. The waiters waited for ever."""
    settings = {"min-replicas-to-write": "1"}
    with RedisServer(server_program, settings=settings) as server:
        async with Redis(server.url, lease=9, give_up=1, restart_gate=False) as redis:
            with anyio.fail_after(10):
                for wait in redis.semaphore("a").acquire, redis.barrier("a", 2).wait:
                    with pytest.raises(BackendUnavailable) as caught:
                        await wait()
                    assert "NOREPLICAS" in str(caught.value.__cause__)
                server.command("CONFIG", "SET", "min-replicas-to-write", "0")
                semaphore = redis.semaphore("a")
                assert await semaphore.acquire()
                semaphore.release()
                # The time of the next outage does not count from this one.
                down_since = redis._current.session._servers[0].down_since  # type: ignore[union-attr]
                server.command("CLIENT", "KILL", "TYPE", "pubsub")
                await until_async(
                    lambda: redis._current.session._servers[0].down_since > down_since  # type: ignore[union-attr]
                )


# --- cancellation


async def enter_and_exit(redis: Redis) -> None:
    async with redis:
        await redis.semaphore("cancelled").statistics()


@pytest.mark.slow
@pytest.mark.parametrize("how", ["scope", "native"])
async def test_cancelled_at_each_await(
    redis_server: RedisServer, how: str, anyio_backend_name: str
) -> None:
    """Neither a task nor a connection is left, no group is raised, and it can be entered again."""
    if how == "native" and anyio_backend_name == "trio":
        pytest.skip("trio has scopes only")
    redis = Redis(redis_server.url, lease=5, restart_gate=False)
    finished = 0
    for step in range(400):
        scope = anyio.CancelScope()
        outcome: list[BaseException | None] = []

        async def run(scope: anyio.CancelScope, outcome: list[BaseException | None]) -> None:
            with scope:
                try:
                    await enter_and_exit(redis)
                except BaseException as raised:
                    outcome.append(raised)
                    raise
                outcome.append(None)

        if how == "native":
            task = asyncio.create_task(run(scope, outcome))
            for _ in range(step):
                await asyncio.sleep(0)
            task.cancel()
            await asyncio.wait([task])
        else:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(run, scope, outcome)
                for _ in range(step):
                    await anyio.sleep(0)
                scope.cancel()
        for error in outcome:
            assert error is None or isinstance(error, anyio.get_cancelled_exc_class())
        assert redis._current.session is None
        finished += outcome == [None]
        if finished == 3:
            break
    else:
        pytest.fail("it never finished")
    await enter_and_exit(redis)
    await no_connection_left(redis_server)
