"""TLS in front of a server that was built without it."""

from __future__ import annotations

import asyncio
import shutil
import ssl
import tempfile
import threading
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from .certificates import make_certificate

if TYPE_CHECKING:
    from typing import Self

HOST = "127.0.0.1"


class TlsFront:
    """Accept TLS connections and forward their contents to `target`. Use it as a context manager.

    While `target` is down, connections are accepted and closed at once.
    """

    def __init__(self, target: tuple[str, int]) -> None:
        self._target = target
        self._folder = Path(tempfile.mkdtemp(prefix="tls-"))
        self._loop = asyncio.new_event_loop()
        self._tasks: set[asyncio.Task[None]] = set()
        self._thread = threading.Thread(target=self._loop.run_forever, name="TLS", daemon=True)
        try:
            self.certificate = make_certificate(self._folder, HOST)
            self._context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
            self._context.load_cert_chain(self.certificate.chain, self.certificate.key)
            self._server = self._loop.run_until_complete(
                asyncio.start_server(self._serve, HOST, 0, ssl=self._context)
            )
        except BaseException:
            self._loop.close()
            shutil.rmtree(self._folder)
            raise
        self.address: tuple[str, int] = self._server.sockets[0].getsockname()
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        asyncio.run_coroutine_threadsafe(self._close(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        shutil.rmtree(self._folder)

    @property
    def url(self) -> str:
        """The URL for a server without a password. It names the certificate's authority."""
        query = f"ssl_cert_reqs=required&ssl_ca_certs={self.certificate.authority}"
        return f"rediss://{HOST}:{self.address[1]}/?{query}"

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        writers = [writer]
        try:
            from_target, to_target = await asyncio.open_connection(*self._target)
            writers.append(to_target)
            # The end of one direction is the end of the connection: TLS knows no half of one.
            forwarding = {
                asyncio.ensure_future(_forward(reader, to_target)),
                asyncio.ensure_future(_forward(from_target, writer)),
            }
            try:
                await asyncio.wait(forwarding, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for each in forwarding:
                    each.cancel()
                await asyncio.gather(*forwarding, return_exceptions=True)
        except (OSError, asyncio.CancelledError):
            pass
        finally:
            for end in writers:
                end.transport.abort()
                with suppress(OSError):
                    await end.wait_closed()
            self._tasks.discard(task)

    async def _close(self) -> None:
        self._server.close()
        while self._tasks:
            for task in self._tasks:
                task.cancel()
            await asyncio.wait(set(self._tasks))


async def _forward(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with suppress(OSError):
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
