"""The recipe for TCP, against a real server that echoes lines: streams that can't be used again."""

from __future__ import annotations

import socket
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import anyio
import pytest
from anyio import create_task_group, create_tcp_listener
from anyio.abc import SocketAttribute
from support.helpers import until_async

from aiosync import PoolTimeout
from aiosync.recipes import tcp_pool
from aiosync.recipes.tcp import _is_readable

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from anyio.abc import SocketStream

pytestmark = pytest.mark.anyio

DEADLINE = 20.0


class EchoServer:
    """Answers each line with the same; some lines mean more."""

    def __init__(self) -> None:
        self.port = 0
        self.streams: list[SocketStream] = []

    @asynccontextmanager
    async def run(self) -> AsyncIterator[None]:
        """Listen; by the end of the block neither the listener nor any stream is left."""
        listener = await create_tcp_listener(local_host="127.0.0.1", local_port=self.port)
        self.port = listener.extra(SocketAttribute.local_port)
        async with listener, create_task_group() as tasks:
            tasks.start_soon(listener.serve, self._answer)
            try:
                yield
            finally:
                tasks.cancel_scope.cancel()

    async def _answer(self, stream: SocketStream) -> None:
        self.streams.append(stream)
        try:
            async with stream:
                while True:
                    line = await stream.receive()
                    if line != b"never\n":
                        await stream.send(line * 2 if line == b"twice\n" else line)
        except (anyio.EndOfStream, anyio.BrokenResourceError):
            pass
        finally:
            self.streams.remove(stream)

    async def hang_up(self) -> None:
        """Close all streams from this side."""
        for stream in self.streams:
            await stream.send_eof()
        await until_async(lambda: not self.streams)


async def until_readable(stream: SocketStream) -> None:
    """Wait until something has arrived, be it only the end; without touching it."""
    endpoint: Any = stream.extra(SocketAttribute.raw_socket)
    await until_async(lambda: _is_readable(endpoint))


async def echo(stream: SocketStream, line: bytes = b"hello\n") -> bytes:
    await stream.send(line)
    received = b""
    while not received.endswith(b"\n"):
        received += await stream.receive()
    return received


@pytest.fixture
async def server(anyio_backend: Any) -> EchoServer:
    return EchoServer()


async def test_many_tasks_on_few_streams_each_get_their_own_answers(server: EchoServer) -> None:
    async def work(number: int) -> None:
        for turn in range(5):
            line = b"%d %d\n" % (number, turn)
            async with pool.connection() as stream:
                assert await echo(stream, line) == line

    async with server.run():
        async with tcp_pool("127.0.0.1", server.port, max_size=3, timeout=DEADLINE) as pool:
            async with create_task_group() as tasks:
                for number in range(10):
                    tasks.start_soon(work, number)
            stats = pool.get_stats()
            assert stats["requests_num"] == 50
            assert 1 <= stats["connections_num"] <= 3  # none was replaced
            assert stats["in_use"] == stats["returns_bad"] == stats["connections_lost"] == 0
        await until_async(lambda: not server.streams)


async def test_a_stream_is_used_again(server: EchoServer) -> None:
    local = "127.0.0.1"
    async with server.run(), tcp_pool(local, server.port, max_size=1, local_host=local) as pool:
        async with pool.connection() as first:
            await echo(first)
        async with pool.connection() as second:
            await echo(second)
        assert second is first


async def test_an_idle_stream_that_the_server_has_closed_is_seen_by_nobody(
    server: EchoServer,
) -> None:
    async with server.run(), tcp_pool("127.0.0.1", server.port, max_size=1) as pool:
        async with pool.connection() as first:
            await echo(first)
        await until_async(lambda: pool.get_stats()["pool_available"])
        for stream in server.streams:
            await stream.send_eof()
        await until_readable(first)
        async with pool.connection() as second:
            assert second is not first
            assert await echo(second) == b"hello\n"
        assert pool.get_stats()["connections_lost"] == 1


@pytest.mark.parametrize("by", ["server", "borrower"])
async def test_an_idle_stream_that_is_closed_is_not_lent_although_nobody_checks(
    server: EchoServer, by: str
) -> None:
    options: Any = {"max_size": 1, "check_idle": None}
    async with server.run(), tcp_pool("127.0.0.1", server.port, **options) as pool:
        async with pool.connection() as first:
            await echo(first)
        if by == "server":
            await server.streams[0].send_eof()
            await until_readable(first)
        else:
            await first.aclose()
        async with pool.connection() as second:
            assert second is not first
            assert await echo(second) == b"hello\n"
    assert pool.get_stats()["closed_check"] == 1


@pytest.mark.parametrize(
    ("host", "port", "options", "error"),
    [
        (5, 80, {}, TypeError),
        (b"127.0.0.1", 80, {}, TypeError),
        ("127.0.0.1", "80", {}, TypeError),
        ("127.0.0.1", 80.0, {}, TypeError),
        ("127.0.0.1", 80, {"local_host": 5}, TypeError),
        ("127.0.0.1", -1, {}, ValueError),
        ("127.0.0.1", 65536, {}, ValueError),
    ],
)
async def test_a_wrong_host_or_port_is_refused_when_the_pool_is_made(
    host: Any, port: Any, options: Any, error: type[Exception]
) -> None:
    with pytest.raises(error, match=r"host must be|port must be"):
        tcp_pool(host, port, **options)


async def test_an_answer_that_comes_when_the_stream_is_idle_spoils_it(server: EchoServer) -> None:
    async with server.run(), tcp_pool("127.0.0.1", server.port, max_size=1) as pool:
        async with pool.connection() as first:
            await echo(first)
        await until_async(lambda: pool.get_stats()["pool_available"])
        await server.streams[0].send(b"by the way\n")
        await until_readable(first)
        async with pool.connection() as second:
            assert await echo(second) == b"hello\n"
        assert pool.get_stats()["connections_lost"] == 1


async def test_an_answer_that_is_unread_on_return_spoils_the_stream(server: EchoServer) -> None:
    async with server.run(), tcp_pool("127.0.0.1", server.port, max_size=1) as pool:
        async with pool.connection() as first:
            await first.send(b"hello\n")
            await until_readable(first)
        async with pool.connection() as second:
            assert second is not first
            assert await echo(second, b"other\n") == b"other\n"
        stats = pool.get_stats()
        assert (stats["returns_bad"], stats["closed_reset"]) == (1, 1)


async def test_half_an_answer_left_in_the_buffer_of_the_stream_spoils_it(
    server: EchoServer,
) -> None:
    async with server.run(), tcp_pool("127.0.0.1", server.port, max_size=1) as pool:
        async with pool.connection() as first:
            await first.send(b"hello\n")
            await until_readable(first)
            assert await first.receive(1) == b"h"
            # Under asyncio the rest is nowhere to be seen in the socket.
        async with pool.connection() as second:
            assert second is not first
            assert await echo(second, b"other\n") == b"other\n"


async def test_a_stream_that_its_borrower_has_closed_is_replaced(server: EchoServer) -> None:
    async with server.run(), tcp_pool("127.0.0.1", server.port, max_size=1) as pool:
        async with pool.connection() as first:
            await first.aclose()
        async with pool.connection() as second:
            assert await echo(second) == b"hello\n"
        assert pool.get_stats()["returns_bad"] == 1


async def test_who_was_cancelled_before_the_answer_came_discards_the_stream(
    server: EchoServer,
) -> None:
    async with server.run(), tcp_pool("127.0.0.1", server.port, max_size=1) as pool:
        with anyio.CancelScope() as scope:
            async with pool.connection() as first:
                await first.send(b"never\n")
                scope.cancel()
                try:
                    await first.receive()
                except BaseException:
                    pool.discard(first)
                    raise
        async with pool.connection() as second:
            assert second is not first
            assert await echo(second, b"other\n") == b"other\n"
        assert pool.get_stats()["closed_discard"] == 1


async def test_a_cancelled_look_at_a_stream_leaves_it_usable(server: EchoServer) -> None:
    async with server.run(), tcp_pool("127.0.0.1", server.port, min_size=1, max_size=1) as pool:
        await pool.wait()
        for _ in range(20):
            await pool.check()
        async with pool.connection() as stream:
            assert await echo(stream, b"twice\n") == b"twice\ntwice\n"
        stats = pool.get_stats()
        assert (stats["connections_num"], stats["connections_lost"]) == (1, 0)


@pytest.mark.slow
async def test_the_pool_recovers_when_the_server_comes_back(server: EchoServer) -> None:
    async with server.run():
        pool = tcp_pool("127.0.0.1", server.port, max_size=2, max_connecting=1)
        await pool.__aenter__()
        async with pool.connection() as stream:
            await echo(stream)
    try:
        with pytest.raises(PoolTimeout) as caught:
            await pool.acquire(0.5)
        assert isinstance(caught.value.__cause__, OSError)
        async with server.run():
            async with pool.connection(timeout=DEADLINE) as stream:
                assert await echo(stream) == b"hello\n"
            stats = pool.get_stats()
            assert stats["closed_check"] + stats["closed_reset"] == 1
            assert stats["connections_errors"] >= 1
            await pool.__aexit__(None, None, None)
            await until_async(lambda: not server.streams)
    finally:
        await pool.__aexit__(None, None, None)


async def test_nobody_waits_for_a_server_that_is_down_if_told_to_fail_fast(
    server: EchoServer,
) -> None:
    async with server.run():
        pass
    async with tcp_pool("127.0.0.1", server.port, fail_fast=True) as pool:
        with pytest.raises(PoolTimeout) as caught:
            await pool.acquire(DEADLINE)
    assert isinstance(caught.value.__cause__, OSError)


async def test_the_check_may_be_done_less_often(server: EchoServer) -> None:
    checked: list[SocketStream] = []
    options: Any = {"check": checked.append, "check_idle": None}
    async with server.run(), tcp_pool("127.0.0.1", server.port, **options) as pool:
        async with pool.connection() as stream:
            await echo(stream)
        async with pool.connection() as same:
            assert same is stream
        assert checked == []
        await pool.check()
        assert checked == [stream]


async def test_the_hooks_of_the_caller_run_too(server: EchoServer) -> None:
    calls: list[str] = []

    async def close(stream: SocketStream) -> None:
        assert await echo(stream) == b"hello\n"
        calls.append("close")
        raise OSError("mine")

    async with server.run():
        pool = tcp_pool(
            "127.0.0.1",
            server.port,
            max_size=1,
            reset=lambda _: calls.append("reset"),
            check=lambda _: calls.append("check"),
            close=close,
        )
        async with pool:
            for _ in range(2):
                async with pool.connection() as stream:
                    await echo(stream)
            await until_async(lambda: pool.get_stats()["pool_available"])
        assert calls == ["reset", "check", "reset", "close"]
        assert pool.statistics().failed_closes == 1
        await until_async(lambda: not server.streams)


@pytest.mark.parametrize("outcome", [False, OSError("no")], ids=str)
async def test_a_check_of_the_caller_that_fails_replaces_the_stream(
    server: EchoServer, outcome: object
) -> None:
    def check(_: SocketStream) -> object:
        if isinstance(outcome, OSError):
            raise outcome
        return outcome

    async with server.run(), tcp_pool("127.0.0.1", server.port, min_size=1, check=check) as pool:
        await pool.wait()
        await pool.check()
        assert pool.get_stats()["connections_lost"] == 1


async def test_a_stream_that_broke_in_a_block_is_discarded(server: EchoServer) -> None:
    async with server.run(), tcp_pool("127.0.0.1", server.port, max_size=1) as pool:
        with pytest.raises(anyio.EndOfStream):
            async with pool.connection() as first:
                await echo(first)
                await server.streams[0].send_eof()
                await first.receive()
        async with pool.connection() as second:
            assert second is not first
        assert pool.get_stats()["closed_discard"] == 1


def test_a_socket_is_readable_where_there_is_no_poll_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("select.poll", raising=False)
    near, far = socket.socketpair()
    with near, far:
        assert not _is_readable(near)
        far.send(b"x")
        assert _is_readable(near)
    assert _is_readable(near)
