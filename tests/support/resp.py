"""A synchronous client for Redis and Valkey: one socket, no pool, no retries.

Tests use it to look at a server from the side, and child processes to count.
"""

from __future__ import annotations

import socket
import ssl
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, unquote, urlsplit

if TYPE_CHECKING:
    from typing import Self

# Seconds until a reply must have arrived.
TIMEOUT = 10.0

Argument = bytes | str | int | float


class ReplyError(Exception):
    """The server answered with an error. Inside an array it is returned instead of raised."""


class RespClient:
    """One connection to the server at `url`: redis://, rediss:// or unix://, with credentials.

    Replies are bytes, int, float, bool, None, list, dict; simple strings are bytes too.
    A connection starts with RESP2; ``command("HELLO", 3)`` switches to RESP3.

    :raises OSError: if the server is not reachable or does not answer in time
    """

    def __init__(self, url: str, timeout: float = TIMEOUT) -> None:
        parts = urlsplit(url)
        self._socket = _connect(url, timeout)
        self._reader = self._socket.makefile("rb")
        if parts.password is not None:
            try:
                self.command("AUTH", unquote(parts.username or "default"), unquote(parts.password))
            except BaseException:
                self.close()
                raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._reader.close()
        self._socket.close()

    def command(self, *arguments: Argument) -> Any:
        """Send one command and return its reply.

        :raises ReplyError: if the reply is an error
        """
        self.send(*arguments)
        return self.receive()

    def send(self, *arguments: Argument) -> None:
        """Send one command without waiting for its reply."""
        self._socket.sendall(encode(*arguments))

    def receive(self) -> Any:
        """Return the next reply or push message.

        :raises ReplyError: if it is an error
        """
        reply = self._parse()
        if isinstance(reply, ReplyError):
            raise reply
        return reply

    def _parse(self) -> Any:
        line = self._reader.readline()
        if not line.endswith(b"\r\n"):
            raise ConnectionError("the server closed the connection")
        kind, rest = line[:1], line[1:-2]
        match kind:
            case b"+":
                return rest
            case b"-":
                return ReplyError(rest.decode())
            case b":" | b"(":
                return int(rest)
            case b",":
                return float(rest)
            case b"#":
                return rest == b"t"
            case b"_":
                return None
        size = int(rest)
        if size < 0:  # the null of RESP2
            return None
        match kind:
            case b"$":
                return self._read_bytes(size)
            case b"=":
                return self._read_bytes(size)[4:]  # after "txt:"
            case b"!":
                return ReplyError(self._read_bytes(size).decode())
            case b"*" | b"~" | b">":
                return [self._parse() for _ in range(size)]
            case b"%":
                return {self._parse(): self._parse() for _ in range(size)}
        raise ValueError(f"not RESP: {line!r}")

    def _read_bytes(self, size: int) -> bytes:
        data = self._reader.read(size + 2)
        if len(data) != size + 2:
            raise ConnectionError("the server closed the connection")
        return data[:-2]


def command(url: str, *arguments: Argument, timeout: float = TIMEOUT) -> Any:
    """Run one command on a connection of its own."""
    with RespClient(url, timeout) as client:
        return client.command(*arguments)


def encode(*arguments: Argument) -> bytes:
    """Return a command as it goes over the wire."""
    parts = [b"*%d\r\n" % len(arguments)]
    for argument in arguments:
        data = argument if isinstance(argument, bytes) else str(argument).encode()
        parts.append(b"$%d\r\n%b\r\n" % (len(data), data))
    return b"".join(parts)


def parse_info(text: bytes) -> dict[str, str]:
    """Return the fields of a reply to INFO or CLUSTER INFO."""
    lines = text.decode().splitlines()
    return dict(line.split(":", 1) for line in lines if ":" in line and line[0] != "#")


def _connect(url: str, timeout: float) -> socket.socket:
    parts = urlsplit(url)
    if parts.scheme == "unix":
        client = socket.socket(socket.AF_UNIX)
        try:
            client.settimeout(timeout)
            client.connect(unquote(parts.path))
        except BaseException:
            client.close()
            raise
        return client
    assert parts.hostname is not None
    plain = socket.create_connection((parts.hostname, parts.port or 6379), timeout)
    plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if parts.scheme != "rediss":
        return plain
    try:
        authority = parse_qs(parts.query).get("ssl_ca_certs", [None])[0]
        context = ssl.create_default_context(cafile=authority)
        return context.wrap_socket(plain, server_hostname=parts.hostname)
    except BaseException:
        plain.close()
        raise
