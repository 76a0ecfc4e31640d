"""Facts of the client library that `aiosync.redis` relies on; if a new release changes one, this
says so.

Each test names a behaviour that the connections of `aiosync.redis` either use or have to survive.
A test that fails here does not mean a bug of coredis: it means that the module `_link` may have a
rule too many, or one too few.
"""

from __future__ import annotations

import gc
import inspect
import itertools
import warnings
from contextlib import asynccontextmanager, contextmanager
from typing import TYPE_CHECKING, Any, cast

import anyio
import pytest
from support.helpers import until_async
from support.redis_servers import Cluster, RedisServer, ServerProgram
from support.silent_proxy import SilentProxy

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

coredis = pytest.importorskip("coredis")
exceptions = pytest.importorskip("coredis.exceptions")

pytestmark = [pytest.mark.anyio, pytest.mark.redis, pytest.mark.timeout(60)]

_numbers = itertools.count()
# Seconds until a silent connection counts as one that stays silent.
SILENCE = 0.05


@pytest.fixture
def key() -> str:
    """A key, or channel, that no other test uses."""
    return f"facts:{next(_numbers)}"


@pytest.fixture(scope="module")
def freezable_server(server_program: ServerProgram) -> Iterator[RedisServer]:
    """A server that a test may freeze."""
    with RedisServer(server_program) as server:
        yield server


@pytest.fixture(scope="module")
def replica(server_program: ServerProgram, redis_server: RedisServer) -> Iterator[RedisServer]:
    with RedisServer(server_program, replica_of=redis_server) as replica:
        yield replica


def new_client(url: str, **options: Any) -> Any:
    """Return a client as `aiosync.redis` makes it."""
    options = {"retry_policy": coredis.retry.NoRetryPolicy(), "max_connections": 1, **options}
    return coredis.Redis.from_url(url, **options)


@asynccontextmanager
async def bare_connection(url: str, **options: Any) -> AsyncIterator[Any]:
    """Yield a connection of a pool of its own."""
    client = new_client(url, **options)
    async with client:
        yield await client.connection_pool.get_connection()


def leaf(error: BaseException) -> BaseException:
    """Return the only exception in nested groups."""
    while isinstance(error, BaseExceptionGroup):
        assert len(error.exceptions) == 1
        error = error.exceptions[0]
    return error


@contextmanager
def expect_unclosed_streams() -> Iterator[None]:
    """Fail unless the block leaves garbage that warns about not being closed."""
    gc.collect()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
        gc.collect()
    assert "Unclosed <MemoryObject" in " ".join(str(each.message) for each in caught)


# --- commands that run more often than they were called, or in spite of a cancellation


async def lose_reply(proxy: SilentProxy, server: RedisServer, key: str) -> None:
    """Close the connection as soon as the server has run INCR; its reply is lost."""
    await until_async(lambda: server.command("GET", key) == b"1")
    proxy.mend()
    proxy.close_all()


async def test_default_policy_sends_a_write_again(
    redis_server: RedisServer, proxy: SilentProxy, key: str
) -> None:
    async with coredis.Redis.from_url(proxy.url) as client:
        await client.ping()
        proxy.cut("to_client")
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(lose_reply, proxy, redis_server, key)
            with anyio.fail_after(10):
                assert await client.incr(key) == 2
    assert redis_server.command("GET", key) == b"2"


async def test_no_retry_policy_does_not(
    redis_server: RedisServer, proxy: SilentProxy, key: str
) -> None:
    async with new_client(proxy.url) as client:
        await client.ping()
        proxy.cut("to_client")
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(lose_reply, proxy, redis_server, key)
            with anyio.fail_after(10), pytest.raises(exceptions.ConnectionError):
                await client.incr(key)
        await client.ping()
    assert redis_server.command("GET", key) == b"1"


async def test_command_that_is_cancelled_under_way_runs(
    freezable_server: RedisServer, key: str
) -> None:
    async with new_client(freezable_server.url) as client:
        await client.ping()
        freezable_server.freeze()
        try:
            with anyio.move_on_after(SILENCE) as scope:
                await client.incr(key)
            assert scope.cancelled_caught
        finally:
            freezable_server.thaw()
        await until_async(lambda: freezable_server.command("GET", key) == b"1")


async def test_request_that_is_never_awaited_runs(redis_server: RedisServer, key: str) -> None:
    async with bare_connection(redis_server.url) as connection:
        connection.create_request(b"INCR", key)
        await until_async(lambda: redis_server.command("GET", key) == b"1")
        assert await connection.create_request(b"INCR", key) == 2


# --- silence


async def test_there_is_no_timeout_by_default(proxy: SilentProxy) -> None:
    parameters = inspect.signature(coredis.Redis).parameters
    assert parameters["stream_timeout"].default is None
    async with bare_connection(proxy.url) as connection:
        proxy.cut()
        with anyio.move_on_after(SILENCE) as scope:
            await connection.create_request(b"PING")
        assert scope.cancelled_caught


async def test_timeout_leaves_the_connection_usable_until_it_is_invalidated(
    proxy: SilentProxy,
) -> None:
    async with bare_connection(proxy.url) as connection:
        proxy.cut()
        with anyio.fail_after(10), pytest.raises(TimeoutError, match="PING"):
            await connection.create_request(b"PING", timeout=SILENCE)
        assert connection.usable
        connection.invalidate()
        assert not connection.usable
        with pytest.raises(exceptions.ConnectionError):
            connection.create_request(b"PING")


async def get_connection_and_cancel(
    pool: Any, proxy: SilentProxy, backend: str, seconds: float = 0
) -> None:
    """Cancel `get_connection` when it has waited so long for the reply to HELLO, which is lost.

    asyncio sees the cancellation; under trio, coredis turns it into a ConnectionError.
    """
    scope = anyio.CancelScope()

    async def cancel() -> None:
        await until_async(lambda: proxy.dropped)
        await anyio.sleep(seconds)
        scope.cancel()

    proxy.cut()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(cancel)
        with scope:
            if backend == "trio":
                with pytest.raises(exceptions.ConnectionError):
                    await pool.get_connection()
            else:
                await pool.get_connection()
        assert scope.cancel_called
        assert scope.cancelled_caught == (backend != "trio")


@pytest.mark.slow
async def test_connect_timeout_does_not_cover_the_handshake(
    proxy: SilentProxy, anyio_backend_name: str
) -> None:
    """The connection itself succeeds: it is the reply to HELLO that does not come."""
    async with new_client(proxy.url, connect_timeout=0.5) as client:
        await get_connection_and_cancel(client.connection_pool, proxy, anyio_backend_name, 0.6)


async def test_stream_timeout_covers_the_handshake(proxy: SilentProxy) -> None:
    proxy.cut()
    client = new_client(proxy.url, stream_timeout=SILENCE)
    async with client:
        with anyio.fail_after(10), pytest.raises(exceptions.ConnectionError):
            await client.connection_pool.get_connection()


# --- bare connections


async def test_script_by_bare_requests(redis_server: RedisServer, key: str) -> None:
    script = "return {redis.call('INCRBY', KEYS[1], ARGV[1]), ARGV[2]}"
    async with bare_connection(redis_server.url) as connection:
        sha = await connection.create_request(b"SCRIPT LOAD", script)
        # Requests are sent in the order of their creation, and may be awaited in any.
        first = connection.create_request(b"EVALSHA", sha, 1, key, 2, b"\xff")
        second = connection.create_request(b"EVALSHA", sha, 1, key, 3, "text")
        assert await second == [5, b"text"]
        assert await first == [2, b"\xff"]
        with pytest.raises(exceptions.NoScriptError):
            await connection.create_request(b"EVALSHA", b"0" * 40, 1, key)
        error = await connection.create_request(
            b"EVALSHA", b"0" * 40, 1, key, raise_exceptions=False
        )
        assert isinstance(error, exceptions.NoScriptError)
        assert await connection.create_request(b"PING") == b"PONG"


async def test_requests_fail_when_the_connection_is_lost(
    redis_server: RedisServer, key: str
) -> None:
    async with bare_connection(redis_server.url) as connection:
        request = connection.create_request(b"BLPOP", key, 0)
        await until_async(lambda: kill(redis_server, connection))
        with anyio.fail_after(10), pytest.raises(exceptions.ConnectionError):
            await request
        with pytest.raises(exceptions.ConnectionError):
            connection.create_request(b"PING")


def kill(server: RedisServer, connection: Any) -> bool:
    return bool(server.command("CLIENT", "KILL", "ID", connection.client_id))


# --- pushes


async def test_pushes_come_in_order_on_the_same_connection(
    redis_server: RedisServer, key: str
) -> None:
    async with bare_connection(redis_server.url) as connection:
        connection.send_command(b"SUBSCRIBE", key)
        # The server has carried out SUBSCRIBE when it answers the next request.
        await connection.create_request(b"PING")
        for number in range(3):
            assert redis_server.command("PUBLISH", key, number) == 1
        with anyio.fail_after(10):
            pushes = connection.push_messages
            received = [await anext(pushes) for _ in range(4)]
            await pushes.aclose()
    channel = key.encode()
    assert received == [
        [b"subscribe", channel, 1],
        [b"message", channel, b"0"],
        [b"message", channel, b"1"],
        [b"message", channel, b"2"],
    ]


@pytest.mark.parametrize("decode", [False, True])
async def test_push_is_decoded_as_the_pending_request_wants(
    redis_server: RedisServer, key: str, decode: bool
) -> None:
    async with bare_connection(redis_server.url) as connection:
        connection.send_command(b"SUBSCRIBE", key)
        await connection.create_request(b"PING")
        pushes = connection.push_messages
        await anext(pushes)
        pending = connection.create_request(b"BLPOP", f"{key}:list", 0, decode=decode)
        await until_async(lambda: redis_server.info("clients")["blocked_clients"] == "1")
        redis_server.command("PUBLISH", key, "hello")
        with anyio.fail_after(10):
            push = await anext(pushes)
            await pushes.aclose()
            redis_server.command("RPUSH", f"{key}:list", "item")
            await pending
    expected = ["message", key, "hello"]
    assert push == (expected if decode else [each.encode() for each in expected])


async def test_end_of_the_connection_ends_its_pushes(redis_server: RedisServer, key: str) -> None:
    async with bare_connection(redis_server.url) as connection:
        connection.send_command(b"SUBSCRIBE", key)
        await connection.create_request(b"PING")
        assert kill(redis_server, connection)
        pushes = connection.push_messages
        with anyio.fail_after(10):
            assert await anext(pushes) == [b"subscribe", key.encode(), 1]
            with pytest.raises(exceptions.ConnectionError):
                await anext(pushes)


async def test_connection_with_unread_pushes_is_not_used_again(
    redis_server: RedisServer, key: str
) -> None:
    client = new_client(redis_server.url)
    async with client:
        pool = client.connection_pool
        connection = await pool.get_connection()
        connection.send_command(b"SUBSCRIBE", key)
        await connection.create_request(b"PING")
        assert connection.usable
        assert not connection.reusable
        pool.release(connection)
        assert await pool.get_connection() is not connection


# --- the pool


async def test_pool_that_nobody_has_entered(redis_server: RedisServer) -> None:
    async def use() -> None:
        client = new_client(redis_server.url)
        with pytest.raises(RuntimeError, match="not initialized"):
            await client.connection_pool.get_connection()

    with expect_unclosed_streams():
        await use()


async def test_pool_must_be_entered_by_the_task_that_uses_it(redis_server: RedisServer) -> None:
    client = new_client(redis_server.url)

    async def enter() -> None:
        with pytest.raises(RuntimeError, match="sharing"):
            await client.connection_pool.__aenter__()

    async def use() -> None:
        connection = await client.connection_pool.get_connection()
        assert await connection.create_request(b"PING") == b"PONG"

    async with anyio.create_task_group() as outside:
        entered = anyio.Event()

        async def sibling() -> None:
            await entered.wait()
            await enter()

        outside.start_soon(sibling)
        async with client, anyio.create_task_group() as inside:
            entered.set()
            inside.start_soon(use)


async def test_cancelled_wait_for_a_connection_may_lose_its_place(
    proxy: SilentProxy, anyio_backend_name: str
) -> None:
    """It does under asyncio: then nobody gets a connection any more."""
    async with new_client(proxy.url) as client:
        pool = client.connection_pool
        await get_connection_and_cancel(pool, proxy, anyio_backend_name)
        proxy.mend()
        if anyio_backend_name == "trio":
            with anyio.fail_after(10):
                await pool.get_connection()
        else:
            with anyio.move_on_after(SILENCE * 3) as scope:
                await pool.get_connection()
            assert scope.cancelled_caught


async def test_leaving_the_pool_ends_its_connections(redis_server: RedisServer) -> None:
    async with bare_connection(redis_server.url) as connection:
        pass
    assert not connection.usable
    await until_async(
        lambda: str(connection.client_id) not in {each["id"] for each in redis_server.clients()}
    )


async def test_error_leaves_the_client_as_a_group(redis_server: RedisServer) -> None:
    error = ValueError("from the body")
    with pytest.raises(ExceptionGroup) as caught:
        async with new_client(redis_server.url):
            raise error
    assert leaf(caught.value) is error


async def test_server_that_is_not_there(proxy: SilentProxy) -> None:
    proxy.close()

    async def use() -> None:
        with pytest.raises(ExceptionGroup) as caught:
            async with new_client(proxy.url) as client:
                await client.connection_pool.get_connection()
        error = leaf(caught.value)
        assert isinstance(error, exceptions.ConnectionError)
        assert not isinstance(error, ConnectionError)  # that of Python
        assert isinstance(error.__cause__, OSError)

    with expect_unclosed_streams():
        await use()


# --- replicas and clusters


class ManagerThatNames:
    """A manager of sentinels that takes `server` for the primary."""

    def __init__(self, server: RedisServer) -> None:
        self._address = server.address

    async def discover_primary(self, name: str) -> tuple[str, int]:
        return self._address


def sentinel_pool(server: RedisServer) -> Any:
    from coredis.pool import SentinelConnectionPool

    return SentinelConnectionPool("main", cast(Any, ManagerThatNames(server)))


@pytest.mark.slow
async def test_sentinel_pool_asks_a_primary_for_its_role(
    redis_server: RedisServer, replica: RedisServer
) -> None:
    async with sentinel_pool(redis_server) as pool:
        connection = await pool.get_connection()
        assert await connection.create_request(b"PING") == b"PONG"
    async with sentinel_pool(replica) as pool:
        with pytest.raises(exceptions.StalePrimaryError, match="slave"):
            await pool.get_connection()


@pytest.mark.slow
async def test_write_to_a_replica(replica: RedisServer, key: str) -> None:
    async with bare_connection(replica.url) as connection:
        with pytest.raises(exceptions.ReadOnlyError):
            await connection.create_request(b"INCR", key)
        assert connection.usable


@pytest.mark.slow
async def test_wrong_node_of_a_cluster(cluster: Cluster, key: str) -> None:
    owner = cluster.node_of(key)
    wrong = next(node for node in cluster.nodes if node is not owner)
    async with bare_connection(wrong.url) as connection:
        with pytest.raises(exceptions.MovedError) as caught:
            await connection.create_request(b"INCR", key)
        assert (caught.value.host, caught.value.port) == owner.address
        assert connection.usable


@pytest.fixture(scope="module")
def cluster(server_program: ServerProgram) -> Iterator[Cluster]:
    with Cluster(server_program) as cluster:
        yield cluster


@pytest.mark.slow
async def test_publish_from_a_script_to_a_sharded_channel(cluster: Cluster, key: str) -> None:
    """On the node that owns the channel; any two bare connections to it will do."""
    owner = cluster.node_of(key)
    script = "return redis.call('SPUBLISH', KEYS[1], ARGV[1])"
    async with (
        bare_connection(owner.url) as listener,
        bare_connection(owner.url) as publisher,
    ):
        listener.send_command(b"SSUBSCRIBE", key)
        await listener.create_request(b"PING")
        assert await publisher.create_request(b"EVAL", script, 1, key, "hello") == 1
        with anyio.fail_after(10):
            pushes = listener.push_messages
            received = [await anext(pushes) for _ in range(2)]
            await pushes.aclose()
    assert received == [[b"ssubscribe", key.encode(), 1], [b"smessage", key.encode(), b"hello"]]
