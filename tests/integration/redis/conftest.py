"""Fixtures of the tests with a Redis or Valkey server."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from support.fake_link import ScriptClient
from support.permits import connect, new_name
from support.redis_servers import RedisServer, ServerProgram
from support.silent_proxy import SilentProxy

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from aiosync.redis import Redis


@pytest.fixture
def name() -> str:
    """Return a name that no other test uses."""
    return new_name()


@pytest.fixture
async def redis(redis_server: RedisServer) -> AsyncIterator[Redis]:
    async with connect(redis_server) as redis:
        yield redis


@pytest.fixture
def own_server(server_program: ServerProgram) -> Iterator[RedisServer]:
    """Return a server that only this test uses, so that it may be stopped and frozen."""
    with RedisServer(server_program, appendonly=True) as server:
        yield server


@pytest.fixture
def proxy(redis_server: RedisServer) -> Iterator[SilentProxy]:
    """Return a proxy in front of the server, which can lose bytes."""
    with SilentProxy(redis_server.address) as proxy:
        yield proxy


@pytest.fixture
def scripts(redis_server: RedisServer) -> Iterator[ScriptClient]:
    """Return a client that calls the scripts as a link does."""
    with redis_server.client() as client:
        yield ScriptClient(client)
