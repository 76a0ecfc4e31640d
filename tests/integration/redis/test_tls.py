"""Connections by TLS: of the server itself, or of what stands in front of it."""

from __future__ import annotations

import ssl
from typing import TYPE_CHECKING, Any, NamedTuple

import coredis
import pytest
from support.certificates import make_certificate
from support.helpers import until_async
from support.redis_servers import RedisServer, ServerProgram
from support.tls_front import TlsFront

from aiosync.redis import BackendUnavailable, Redis

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = [pytest.mark.anyio, pytest.mark.redis, pytest.mark.timeout(60)]


class Secured(NamedTuple):
    server: RedisServer
    url: str
    authority: Path
    address: tuple[str, int]


@pytest.fixture(scope="module")
def secured(server_program: ServerProgram) -> Iterator[Secured]:
    if server_program.has_tls:
        with RedisServer(server_program, tls=True) as server:
            yield Secured(server, server.url, server.certificate.authority, server.address)
    else:
        with RedisServer(server_program) as server, TlsFront(server.address) as front:
            yield Secured(server, front.url, front.certificate.authority, front.address)


async def use(redis: Redis, server: RedisServer) -> None:
    async with redis:
        semaphore = redis.semaphore("tls")
        async with semaphore:
            assert (await semaphore.statistics()).held == 1
            # It is lost and comes back as one without TLS does.
            assert server.command("CLIENT", "KILL", "TYPE", "pubsub") == 1
            assert (await semaphore.statistics()).held == 1
    await until_async(lambda: not server.clients())


async def test_a_url(secured: Secured) -> None:
    await use(Redis(secured.url, restart_gate=False), secured.server)


async def test_a_url_that_checks_the_name(secured: Secured) -> None:
    url = f"{secured.url}&ssl_check_hostname=true"
    await use(Redis(url, restart_gate=False), secured.server)


async def test_a_context(secured: Secured) -> None:
    context = ssl.create_default_context(cafile=secured.authority)
    host, port = secured.address

    def connect() -> Any:
        return coredis.Redis(host, port, ssl_context=context)

    await use(Redis(connect=connect, restart_gate=False), secured.server)


async def test_another_authority(secured: Secured, tmp_path: Path) -> None:
    other = make_certificate(tmp_path, "127.0.0.1").authority
    url = secured.url.replace(str(secured.authority), str(other))
    with pytest.raises(BackendUnavailable, match="CERTIFICATE_VERIFY_FAILED") as caught:
        await Redis(url).__aenter__()
    assert isinstance(caught.value.__cause__, ssl.SSLError)


async def test_another_name(secured: Secured) -> None:
    host, port = secured.address
    url = secured.url.replace(host, "localhost") + "&ssl_check_hostname=true"
    assert str(port) in url
    with pytest.raises(BackendUnavailable, match="CERTIFICATE_VERIFY_FAILED"):
        await Redis(url).__aenter__()


@pytest.mark.slow
async def test_a_server_without_tls(redis_server: RedisServer) -> None:
    with pytest.raises(BackendUnavailable, match=r"no server: .+"):
        await Redis(redis_server.url.replace("redis:", "rediss:"), lease=1).__aenter__()


async def test_a_client_without_tls(secured: Secured) -> None:
    host, port = secured.address
    with pytest.raises(BackendUnavailable, match=r"no server: .+"):
        await Redis(f"redis://{host}:{port}", lease=3).__aenter__()
