"""Opens links: checks clients of coredis, and connects to a server."""

from __future__ import annotations

from contextlib import AsyncExitStack, asynccontextmanager
from inspect import isawaitable
from math import inf
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit
from weakref import WeakSet

import coredis
from anyio import CancelScope, current_time
from coredis import exceptions
from coredis.pool import ClusterConnectionPool, ConnectionPool, SentinelConnectionPool
from coredis.retry import NoRetryPolicy

from ._link import Link, LinkLost, Moved, Refused, Resharding, is_refusal, root_cause, slot_of

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from ._link import Client


# A pool of coredis must not be entered again: it has lost a slot for each connection that ended.
_used_pools: WeakSet[Any] = WeakSet()


def check_url(url: str) -> None:
    """Raise ValueError if `url` is not the URL of a server."""
    parts = urlsplit(url)
    if parts.scheme == "unix" and parts.path:
        return
    if parts.scheme not in {"redis", "rediss"} or not parts.hostname:
        # The message does not contain the URL, which may include a password.
        raise ValueError("url must be redis://host, rediss://host or unix:///path")


def client_for(url: str, timeout: float) -> Client:
    """Return a new client for `url`.

    :param timeout: how many seconds it may take to connect
    """
    return coredis.Redis.from_url(
        url,
        decode_components=True,
        max_connections=1,
        stream_timeout=timeout,
        connect_timeout=timeout,
        retry_policy=NoRetryPolicy(),
        decode_responses=False,
    )


@asynccontextmanager
async def open_link(
    connect: Callable[[], Client | Awaitable[Client]],
    timeout: float,
    tag: str | None,
    prefix: str = "aiosync",
) -> AsyncIterator[Link]:
    """Connect, and yield the link; the end of the block closes it.

    Errors of the connection may be wrapped in an ExceptionGroup; see `root_cause`.

    :param timeout: how many seconds it may take to connect, and then each request
    :param tag: in a cluster, connect to the server that has the keys of this name
    :param prefix: what the keys and channels begin with
    :raises LinkLost: if there is no such server, or it does not answer in time
    :raises Refused: if the user of the connection lacks a right
    :raises TypeError: if `connect` does not return a new client of coredis
    """
    too_late = TimeoutError(f"no connection within {timeout:g} s")
    # The scope encloses the whole block, since task groups are entered inside of it.
    with CancelScope(deadline=current_time() + timeout) as scope:
        async with AsyncExitStack() as stack:
            try:
                link = await _new_link(stack, connect, timeout, tag)
                await link.begin(prefix)
            except (exceptions.RedisError, OSError, ExceptionGroup) as error:
                # A connection of coredis that is cancelled may end with an error of its own.
                cause = too_late if scope.cancel_called else root_cause(error)
                raise (Refused if is_refusal(cause) else LinkLost) from cause
            except (Moved, Resharding) as error:
                raise LinkLost from error.__cause__
            scope.deadline = inf
            yield link
    if scope.cancelled_caught:
        raise LinkLost from too_late


async def _new_link(
    stack: AsyncExitStack,
    connect: Callable[[], Client | Awaitable[Client]],
    timeout: float,
    tag: str | None,
) -> Link:
    client: Any = connect()
    if isawaitable(client):
        client = await client
    pool: Any = getattr(client, "connection_pool", None)
    _check_pool(client, pool)
    if isinstance(pool, SentinelConnectionPool):
        await stack.enter_async_context(pool.sentinel_manager)
    # Entered by the task that uses it, as coredis demands.
    await stack.enter_async_context(pool)
    if not isinstance(pool, ClusterConnectionPool):
        return Link(await pool.get_connection(), timeout, None)
    layout = pool.cluster_layout
    node = layout.random_node() if tag is None else layout.node_for_slot(slot_of(tag))
    return Link(await pool.get_connection(node=node), timeout, layout)


def _check_pool(client: object, pool: Any) -> None:
    if not isinstance(pool, (ConnectionPool, ClusterConnectionPool)):
        raise TypeError(
            f"connect() must return a new client of coredis, not {type(client).__name__}"
        )
    if pool in _used_pools:
        raise TypeError("connect() must return a new client of coredis each time")
    _used_pools.add(pool)
    if pool.encoding.lower() not in {"utf-8", "utf8"}:
        raise TypeError(f"connect() must return a client with encoding utf-8, not {pool.encoding}")
