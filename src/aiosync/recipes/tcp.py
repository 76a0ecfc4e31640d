"""The recipe for plain TCP."""

from __future__ import annotations

import select
from contextlib import suppress
from ipaddress import IPv4Address, IPv6Address
from typing import TYPE_CHECKING, Any

from anyio import (
    BrokenResourceError,
    ClosedResourceError,
    EndOfStream,
    connect_tcp,
    create_task_group,
)
from anyio.abc import SocketAttribute
from anyio.lowlevel import checkpoint

from .._errors import check_count
from .._pool import ConnectionPool
from ._hooks import combine

if TYPE_CHECKING:
    from typing import Unpack

    from anyio.abc import SocketStream

    from .._pool import PoolOptions

# After how many turns of the event loop a task has certainly received what is in a stream's buffer.
# It takes 2 of asyncio to do so; and 3 until it has what only the socket has.
_TURNS = 4
_LAST_PORT = 65535


def tcp_pool(
    host: str,
    port: int,
    *,
    local_host: str | None = None,
    happy_eyeballs_delay: float = 0.25,
    **options: Unpack[PoolOptions[SocketStream]],
) -> ConnectionPool[SocketStream]:
    """Return a pool of TCP connections, which are byte streams of anyio. Under asyncio and trio.

    A stream that comes back, or is to be handed out, must be open and must have nothing to be read;
    otherwise it is replaced. Nothing is sent for that, so by default it is done each time:
    `check_idle` is 0. With another one, a stream that the socket knows to be closed is still never
    lent. It can't tell that an answer is still on its way: a caller that has asked,
    but has not read the whole answer, calls ``pool.discard(stream)``. No other state of a stream is
    restored, for instance socket options.

    :param host: name or address of the peer
    :param port: its port
    :param local_host: the address of this machine to connect from
    :param happy_eyeballs_delay: how many seconds until the next address of `host` is tried as well
    :param options: those of `ConnectionPool`; see `aiosync.recipes`
    :raises TypeError: if `host` is no address, or `port` no integer; see also `ConnectionPool`
    :raises ValueError: if `port` is not from 0 to 65535; see also `ConnectionPool`
    """
    for name, address in {"host": host, "local_host": local_host or host}.items():
        if not isinstance(address, (str, IPv4Address, IPv6Address)):
            raise TypeError(f"{name} must be a str, not {type(address).__name__}")
    port = check_count("port", port, 0)
    if port > _LAST_PORT:
        raise ValueError(f"port must be {_LAST_PORT} or less, not {port}")
    options.setdefault("check_idle", 0.0)

    async def connect() -> SocketStream:
        return await connect_tcp(
            host, port, local_host=local_host, happy_eyeballs_delay=happy_eyeballs_delay
        )

    async def close(stream: SocketStream) -> None:
        await stream.aclose()

    async def check(stream: SocketStream) -> None:
        if not await _is_quiet(stream):
            raise ConnectionError("the peer has closed the stream, or left something unread in it")

    combine(
        options, check=check, reset=check, close=close, is_closed=_is_closed, is_fatal=_is_fatal
    )
    return ConnectionPool(connect, **options)


def _is_closed(stream: SocketStream) -> bool:
    """Return whether a stream is closed, or its socket has something to be read.

    asyncio may have received something already, which only `_is_quiet` finds.
    """
    return _is_readable(stream.extra(SocketAttribute.raw_socket))  # noqa: S610


def _is_fatal(error: Exception) -> bool:
    return isinstance(error, (BrokenResourceError, ClosedResourceError, EndOfStream))


async def _is_quiet(stream: SocketStream) -> bool:
    """Return whether a stream is open, and has nothing to be read.

    That is to be found out from the socket: asyncio might not have looked at it for long. But it
    may also be in the buffer that a stream of asyncio has, and the only way to look there is to
    receive it. So if there is something, it is lost, with the stream.
    """
    if _is_closed(stream):
        return False
    found = False

    async def receive() -> None:
        nonlocal found
        with suppress(EndOfStream, BrokenResourceError, ClosedResourceError):
            await stream.receive(1)
        found = True

    async with create_task_group() as tasks:
        tasks.start_soon(receive)
        for _ in range(_TURNS):
            await checkpoint()
        tasks.cancel_scope.cancel()
    return not found


def _is_readable(endpoint: Any) -> bool:
    """Return whether a socket has bytes to be read, or its end; also if it is closed here."""
    number = endpoint.fileno()
    if number < 0:
        return True
    if hasattr(select, "poll"):
        poll = select.poll()  # which takes any number, not only those below 1024
        poll.register(number, select.POLLIN)
        return bool(poll.poll(0))
    return bool(select.select([number], [], [], 0)[0])  # Windows
