"""A TCP proxy that can lose bytes without a word, as a cut cable or a broken firewall does."""

from __future__ import annotations

import selectors
import socket
import struct
import threading
import time
from collections import deque
from contextlib import suppress
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from typing import Self

HOST = "127.0.0.1"
Direction = Literal["both", "to_server", "to_client"]

_CHUNK = 65536
# Bytes that wait in one direction before the proxy stops reading: it is no infinite buffer.
_MOST_PENDING = 1 << 20


class _Pipe:
    """One direction of one connection."""

    def __init__(self, source: socket.socket, sink: socket.socket, is_cut: bool) -> None:
        self.source = source
        self.sink = sink
        # For good: what was lost would be missing in the stream, so nothing may follow it.
        self.is_cut = is_cut
        self.ended = False  # no more can be read from `source`
        self.shut = False  # `sink` has been told so
        self.pending: deque[tuple[float, bytes]] = deque()  # with the time when they are due
        self.size = 0

    @property
    def wants_to_read(self) -> bool:
        return not self.ended and self.size < _MOST_PENDING

    def put(self, data: bytes, due: float) -> None:
        if self.pending:
            due = max(due, self.pending[-1][0])
        self.pending.append((due, data))
        self.size += len(data)

    def cut(self) -> int:
        """Lose everything from here on; return how many bytes were under way."""
        self.is_cut = True
        lost, self.size = self.size, 0
        self.pending.clear()
        return lost

    def send(self, now: float) -> None:
        """Send what is due, as far as `sink` takes it at once."""
        while self.pending and self.pending[0][0] <= now:
            due, data = self.pending.popleft()
            try:
                sent = self.sink.send(data)
            except BlockingIOError:
                sent = 0
            except OSError:  # the other end is gone: what is for it is lost
                self.ended = True
                self.cut()
                return
            self.size -= sent
            if sent < len(data):
                self.pending.appendleft((due, data[sent:]))
                return
        if self.ended and not self.pending and not self.shut and not self.is_cut:
            self.shut = True
            with suppress(OSError):
                self.sink.shutdown(socket.SHUT_WR)


class SilentProxy:
    """Forward connections to `target`, until told otherwise. Use it as a context manager.

    Every method has taken full effect when it returns: no byte that was not yet forwarded passes
    after `cut`. All methods may be called from any thread. One thread does the work.
    """

    def __init__(self, target: tuple[str, int]) -> None:
        self._target = target
        self._lock = threading.Lock()
        self._cut: set[Direction] = set()
        self._delay = 0.0
        self._closed = False
        self._dropped = 0
        self._accepted = 0
        self._connections: list[tuple[_Pipe, _Pipe]] = []  # to the server, to the client
        self._listener = socket.create_server((HOST, 0), backlog=128)
        self._listener.setblocking(False)
        self.address: tuple[str, int] = self._listener.getsockname()
        self._waker, self._wakened = socket.socketpair()
        self._wakened.setblocking(False)
        self._thread = threading.Thread(target=self._run, name="silent proxy", daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def port(self) -> int:
        return self.address[1]

    @property
    def url(self) -> str:
        """The URL for a server without a password."""
        return f"redis://{HOST}:{self.port}"

    @property
    def dropped(self) -> int:
        """How many bytes were lost so far. A test can wait for a request to be among them."""
        with self._lock:
            return self._dropped

    @property
    def held(self) -> int:
        """How many bytes have arrived and are not forwarded yet."""
        with self._lock:
            return sum(pipe.size for pipes in self._connections for pipe in pipes)

    @property
    def accepted(self) -> int:
        """How many connections clients have opened so far."""
        with self._lock:
            return self._accepted

    @property
    def connected(self) -> int:
        """How many connections are open now, dead ones included."""
        with self._lock:
            return len(self._connections)

    def cut(self, direction: Direction = "both") -> None:
        """Lose all bytes in one direction or both, also the ends of connections.

        The connections of now are dead in that direction for good. New ones are accepted, and dead
        too until `mend`; with ``to_server`` or ``both`` the server never hears of them.
        """
        with self._changing():
            self._cut.add(direction)
            for to_server, to_client in self._connections:
                if direction != "to_client":
                    self._dropped += to_server.cut()
                if direction != "to_server":
                    self._dropped += to_client.cut()

    def mend(self) -> None:
        """Let new connections pass. Those that were cut stay dead, and open."""
        with self._changing():
            self._cut.clear()

    def delay(self, seconds: float) -> None:
        """Hold what arrives from now on for so long, in each direction; 0: no more."""
        with self._changing():
            self._delay = seconds

    def close_all(self, *, reset: bool = True) -> None:
        """Close all connections, on both sides: with a reset, or in good order."""
        with self._changing():
            for to_server, to_client in self._connections:
                _close(to_server.source, reset)
                _close(to_client.source, reset)
            self._connections.clear()

    def close(self) -> None:
        """Close all connections and the listener, and wait for the thread. May be repeated."""
        if self._closed:
            return
        self.close_all()
        with self._changing():
            self._closed = True
        self._thread.join()
        for end in (self._listener, self._waker, self._wakened):
            end.close()

    def _changing(self) -> _Changing:
        return _Changing(self._lock, self._waker)

    # --- the thread

    def _run(self) -> None:
        while True:
            with self._lock:
                if self._closed:
                    return
                selector, timeout = self._what_to_wait_for()
            with selector:
                selector.select(timeout)
            # What is ready is found by trying: under the lock the sockets may be other ones.
            with suppress(BlockingIOError):
                self._wakened.recv(_CHUNK)
            with self._lock:
                self._accept()
                for pipes in self._connections:
                    for pipe in pipes:
                        self._forward(pipe)
                self._discard_ended()

    def _what_to_wait_for(self) -> tuple[selectors.BaseSelector, float | None]:
        events = {self._listener: selectors.EVENT_READ, self._wakened: selectors.EVENT_READ}
        now = time.monotonic()
        next_due: float | None = None
        for pipes in self._connections:
            for pipe in pipes:
                if pipe.wants_to_read:
                    events[pipe.source] = events.get(pipe.source, 0) | selectors.EVENT_READ
                if not pipe.pending:
                    continue
                due = pipe.pending[0][0]
                if due <= now:  # `sink` did not take it
                    events[pipe.sink] = events.get(pipe.sink, 0) | selectors.EVENT_WRITE
                else:
                    next_due = due if next_due is None else min(due, next_due)
        selector = selectors.DefaultSelector()
        for sock, mask in events.items():
            selector.register(sock, mask)
        return selector, None if next_due is None else max(0.0, next_due - now)

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except BlockingIOError:
                return
            self._accepted += 1
            to_server_cut = not self._cut.isdisjoint({"both", "to_server"})
            to_client_cut = not self._cut.isdisjoint({"both", "to_client"})
            server = socket.socket()
            if not to_server_cut:
                try:
                    server.connect(self._target)
                except OSError:
                    server.close()
                    _close(client, reset=True)
                    continue
            for sock in (client, server):
                sock.setblocking(False)
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            to_server = _Pipe(client, server, to_server_cut)
            to_client = _Pipe(server, client, to_client_cut or to_server_cut)
            to_client.ended = to_server_cut  # `server` is not connected
            self._connections.append((to_server, to_client))

    def _forward(self, pipe: _Pipe) -> None:
        now = time.monotonic()
        while pipe.wants_to_read:
            try:
                data = pipe.source.recv(_CHUNK)
            except BlockingIOError:
                break
            except OSError:  # a reset, which is passed on as an end
                data = b""
            if not data:
                pipe.ended = True
            elif pipe.is_cut:
                self._dropped += len(data)
            else:
                pipe.put(data, now + self._delay)
        pipe.send(now)

    def _discard_ended(self) -> None:
        remaining = []
        for to_server, to_client in self._connections:
            if all(pipe.ended and not pipe.pending for pipe in (to_server, to_client)):
                _close(to_server.source, reset=False)
                _close(to_client.source, reset=False)
            else:
                remaining.append((to_server, to_client))
        self._connections = remaining


class _Changing:
    """Hold the lock, then have the thread look at what has changed."""

    def __init__(self, lock: threading.Lock, waker: socket.socket) -> None:
        self._lock = lock
        self._waker = waker

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()
        self._waker.send(b"!")


def _close(sock: socket.socket, reset: bool) -> None:
    if reset:
        with suppress(OSError):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()
