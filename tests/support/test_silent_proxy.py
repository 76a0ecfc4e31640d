"""The proxy that loses bytes, between two sockets that the test holds."""

from __future__ import annotations

import socket
import time
from typing import TYPE_CHECKING

import pytest

from support.helpers import until
from support.silent_proxy import Direction, SilentProxy

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.timeout(30)

# Seconds in which nothing must arrive.
SILENCE = 0.03


class Line:
    """A listener, a proxy before it, and the sockets of both ends."""

    def __init__(self) -> None:
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.listener.settimeout(10)
        self.proxy = SilentProxy(self.listener.getsockname())
        self.sockets = [self.listener]

    def connect(self) -> tuple[socket.socket, socket.socket]:
        """Return both ends of a new connection through the proxy."""
        client = self.dial()
        server, _ = self.listener.accept()
        server.settimeout(10)
        self.sockets.append(server)
        return client, server

    def dial(self) -> socket.socket:
        client = socket.create_connection(self.proxy.address, 10)
        self.sockets.append(client)
        return client


@pytest.fixture
def line() -> Iterator[Line]:
    line = Line()
    with line.proxy:
        yield line
    for sock in line.sockets:
        sock.close()


def send_byte(source: socket.socket, sink: socket.socket, *, arrives: bool = True) -> None:
    """Send a byte and check whether it arrives."""
    source.sendall(b"!")
    if arrives:
        assert sink.recv(10) == b"!"
    else:
        assert is_silent(sink)


def is_silent(sock: socket.socket) -> bool:
    """Return whether neither a byte nor the end arrives for a while."""
    sock.settimeout(SILENCE)
    try:
        sock.recv(1)
    except TimeoutError:
        return True
    finally:
        sock.settimeout(10)
    return False


def test_forward(line: Line) -> None:
    client, server = line.connect()
    data = bytes(range(256)) * 20_000  # more than fits into the buffers of sockets
    client.setblocking(False)
    sent = client.send(data)
    client.settimeout(10)
    received = b""
    while len(received) < sent:
        received += server.recv(65536)
    assert received == data[:sent]
    send_byte(server, client)
    assert (line.proxy.accepted, line.proxy.connected, line.proxy.dropped) == (1, 1, 0)


def test_end_of_each_side_is_passed_on(line: Line) -> None:
    client, server = line.connect()
    client.sendall(b"bye")
    client.shutdown(socket.SHUT_WR)
    assert server.recv(10) == b"bye"
    assert server.recv(10) == b""
    send_byte(server, client)
    server.close()
    assert client.recv(10) == b""
    until(lambda: line.proxy.connected == 0)


def test_server_that_does_not_listen(line: Line) -> None:
    line.listener.close()
    with pytest.raises(ConnectionError):  # the reset may come while it is being opened
        line.dial().recv(1)


@pytest.mark.parametrize("direction", ["both", "to_server", "to_client"])
def test_cut_and_mend(line: Line, direction: Direction) -> None:
    client, server = line.connect()
    line.proxy.cut(direction)
    send_byte(client, server, arrives=direction == "to_client")
    send_byte(server, client, arrives=direction == "to_server")
    until(lambda: line.proxy.dropped == (2 if direction == "both" else 1))
    line.proxy.mend()
    # It stays dead where it was cut, since a byte is missing.
    send_byte(client, server, arrives=direction == "to_client")
    send_byte(server, client, arrives=direction == "to_server")
    new_client, new_server = line.connect()
    send_byte(new_client, new_server)
    send_byte(new_server, new_client)


@pytest.mark.parametrize("direction", ["both", "to_server"])
def test_server_hears_nothing_of_a_connection_while_cut(line: Line, direction: Direction) -> None:
    line.proxy.cut(direction)
    client = line.dial()
    client.sendall(b"hello")
    until(lambda: line.proxy.dropped == 5)
    line.proxy.mend()
    assert is_silent(client)
    line.listener.settimeout(SILENCE)
    with pytest.raises(TimeoutError):
        line.listener.accept()
    client.close()
    until(lambda: line.proxy.connected == 0)


def test_end_is_lost_while_cut(line: Line) -> None:
    client, server = line.connect()
    line.proxy.cut()
    client.close()
    server.settimeout(SILENCE)
    with pytest.raises(TimeoutError):
        server.recv(1)
    assert line.proxy.connected == 1
    server.close()
    until(lambda: line.proxy.connected == 0)


@pytest.mark.slow
def test_delay(line: Line) -> None:
    client, server = line.connect()
    line.proxy.delay(0.2)
    started = time.monotonic()
    client.sendall(b"a")
    assert server.recv(10) == b"a"
    assert time.monotonic() - started >= 0.2
    line.proxy.delay(1)
    client.sendall(b"b")
    until(lambda: line.proxy.held == 1)
    line.proxy.delay(0)
    client.sendall(b"c")  # which does not overtake
    received = b""
    while len(received) < 2:
        received += server.recv(10)
    assert received == b"bc"


def test_what_is_delayed_is_lost_by_a_cut(line: Line) -> None:
    client, server = line.connect()
    line.proxy.delay(60)
    client.sendall(b"abc")
    client.shutdown(socket.SHUT_WR)
    until(lambda: line.proxy.held == 3)
    line.proxy.cut("to_server")
    until(lambda: line.proxy.dropped == 3)
    assert is_silent(server)
    line.proxy.delay(0)
    send_byte(server, client)


@pytest.mark.parametrize("reset", [True, False])
def test_close_all(line: Line, reset: bool) -> None:
    ends = line.connect() + line.connect()
    line.proxy.cut()
    line.proxy.close_all(reset=reset)
    assert line.proxy.connected == 0
    for end in ends:
        if reset:
            with pytest.raises(ConnectionResetError):
                end.recv(1)
        else:
            assert end.recv(1) == b""
    line.proxy.mend()
    client, server = line.connect()
    send_byte(client, server)
