"""Links that lose, delay, repeat and reorder what they carry, in front of a real server.

A `Network` runs the scripts of `aiosync.redis` on a real server, but in virtual time: the scripts
are given the clock of the event loop instead of the server's. So a schedule of minutes takes
milliseconds, and the same seed gives the same schedule.

What a link may do to a call is what TCP allows. A call that is lost or late ends its link. Its
command may still reach the server, also after the next link has begun. A command that was done may
come a second time only then.
"""

from __future__ import annotations

from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from math import inf
from typing import TYPE_CHECKING, Any, ClassVar

import anyio
import pytest
from anyio import create_memory_object_stream

from aiosync._park import loop_clock
from aiosync.redis import _carrier, _client, _server
from aiosync.redis._link import SCRIPTS, LinkLost

from .resp import RespClient

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Sequence
    from random import Random

    from anyio.abc import TaskGroup
    from anyio.streams.memory import MemoryObjectReceiveStream, MemoryObjectSendStream

Command = tuple[str, "Sequence[str]", "Sequence[str]"]

# A database of its own, which each network empties.
_DATABASE = 9
# What the server's clock shows when that of the event loop shows 0, in seconds.
_BEGINNING = 1_700_000_000


# Around a script: it returns what it publishes, since the network delivers the messages.
_WRAPPER = """
local published = {}
local function publish_later(_, channel, message)
  published[#published + 1] = channel
  published[#published + 1] = message
end
local function run()
%s
end
local reply = run()
return {reply, published}
"""


class ScriptClient:
    """A synchronous connection to a server that has the scripts, with a clock from outside."""

    def __init__(self, client: RespClient) -> None:
        self._client = client
        client.command("SELECT", _DATABASE)
        self._hashes: dict[str, str] = {}
        for name, source in SCRIPTS.items():
            for old, new in {
                "redis.call('TIME')": "{0, KEYS[#KEYS]}",
                "redis.call(publish,": "publish_later(publish,",
            }.items():
                assert source.count(old) == 1
                source = source.replace(old, new)
            self._hashes[name] = client.command("SCRIPT", "LOAD", _WRAPPER % source).decode()

    def command(self, *arguments: str | bytes | int) -> Any:
        return self._client.command(*arguments)

    def look(self, script: str, keys: Sequence[str]) -> Any:
        """Run a script of the test."""
        return _decoded(self._client.command("EVAL", script, len(keys), *keys))

    def run(
        self, script: str, keys: Sequence[str], arguments: Sequence[str], now_us: int
    ) -> tuple[Any, list[tuple[str, str]]]:
        """Run a script at `now_us`; return its reply, and the messages that it has published."""
        command = ("EVALSHA", self._hashes[script], str(len(keys) + 1), *keys, str(now_us))
        reply, published = _decoded(self._client.command(*command, *arguments))
        return reply, list(zip(published[::2], published[1::2], strict=True))


def _decoded(reply: Any) -> Any:
    if isinstance(reply, list):
        return [_decoded(item) for item in reply]
    return reply.decode() if isinstance(reply, bytes) else reply


class _Clock:
    """The clock of the running event loop; `anyio.current_time` would take most of the time."""

    read: ClassVar[Callable[[], float]] = anyio.current_time


def now() -> float:
    return _Clock.read()


@dataclass
class Faults:
    """How likely each fault is; times are in leases."""

    lost: float = 0.02
    """The command never comes."""
    reply_lost: float = 0.02
    late: float = 0.02
    """The command comes after the call has failed."""
    repeated: float = 0.01
    """The command comes, its reply is lost, and it comes again when the next link has begun."""
    at_once: float = 0.5
    """A call that fails does so at once, not after its timeout."""
    no_connection: float = 0.2
    message_lost: float = 0.2
    message_repeated: float = 0.1
    longest_delay: float = 0.1
    late_by: float = 1.5


@dataclass
class Port:
    """What one process is connected by. Passed as ``connect`` to `Redis`."""

    network: Network
    cut_until: float = -inf
    is_mute: bool = False
    """Whether it connects, but no command passes."""
    links: list[FakeLink] = field(default_factory=list)

    def __call__(self) -> Any:
        return self

    @property
    def is_cut(self) -> bool:
        return now() < self.cut_until

    def cut(self, seconds: float) -> None:
        """Let nothing pass for so long, without a sign of it."""
        self.cut_until = now() + seconds


class Network:
    """A server, and all links to it.

    :param checked: called after each command
    """

    def __init__(
        self,
        client: ScriptClient,
        tasks: TaskGroup,
        random: Random,
        lease: float,
        faults: Faults,
        checked: Callable[[], object],
    ) -> None:
        _Clock.read = staticmethod(loop_clock())
        client.command("FLUSHDB")
        self.client = client
        self.random = random
        self.lease = lease
        self.faults = faults
        self.is_faulty = True
        self.last_replaced = self.last_revived = -inf
        self.events: list[tuple[object, ...]] = []
        self.calls = 0
        self._tasks = tasks
        self._checked = checked
        self._late = 0
        self._names: set[bytes] = set()
        self._life = 1
        self._started = now() - 1000
        self._snapshot: dict[bytes, tuple[bytes, int]] = {}
        self._links: list[FakeLink] = []

    def new_port(self) -> Port:
        return Port(self)

    def note(self, *event: object) -> None:
        """Take note of what happens, for the report of a schedule that fails."""
        self.events.append((round(now(), 4), *event))

    @property
    def settled(self) -> bool:
        """Whether no command is still on its way without a link."""
        return not self._late

    @property
    def links(self) -> list[FakeLink]:
        self._links = [link for link in self._links if link.alive]
        return self._links

    @property
    def run(self) -> str:
        return f"run{self._life}"

    @property
    def uptime(self) -> float:
        return float(int(now() - self._started))

    def happens(self, likelihood: float) -> bool:
        return self.is_faulty and self.random.random() < likelihood

    @property
    def longest_delay(self) -> float:
        return self.lease * self.faults.longest_delay

    def delay(self) -> float:
        # Mostly short, sometimes none.
        return self.longest_delay * max(0.0, self.random.uniform(-1, 1)) ** 3

    # -- What servers do.

    def execute(self, script: str, keys: Sequence[str], arguments: Sequence[str]) -> Any:
        """Run a command, and deliver its messages."""
        self.calls += 1
        self._names.add(keys[0].encode())
        now_us = round((_BEGINNING + now()) * 1e6)
        reply, messages = self.client.run(script, keys, arguments, now_us)
        self.note(keys[0], *arguments, "->", reply, messages)
        for channel, message in messages:
            for link in self.links:
                if channel in link.channels:
                    self._deliver(link, channel, message)
        self._checked()
        return reply

    def _deliver(self, link: FakeLink, channel: str, message: str) -> None:
        if link.port.is_cut or self.happens(self.faults.message_lost):
            self.note("lost:", message)
            return
        for _ in range(1 + self.happens(self.faults.message_repeated)):
            self._tasks.start_soon(self._carry, link, channel, message, self.delay())

    async def _carry(self, link: FakeLink, channel: str, message: str, delay: float) -> None:
        await anyio.sleep(delay)
        link.receive(channel, message)

    def execute_later(self, command: Command, seconds: float, *, again: bool = False) -> None:
        """Run a command whose link is gone.

        :param again: only when the next link of its process has begun
        """
        self._late += 1
        self._tasks.start_soon(self._come_late, self._life, command, seconds, again)

    async def _come_late(self, life: int, command: Command, seconds: float, again: bool) -> None:
        await anyio.sleep(seconds)
        self._late -= 1
        if life == self._life and (not again or self._is_stale(command)):
            self.note("late:")
            kind, *rest = self.execute(*command)
            if kind == "ok" and rest[0]:
                # The process was dead for the server, which has forgotten its epoch.
                self.last_revived = now()

    def _is_stale(self, command: Command) -> bool:
        _, keys, (_, _, member, epoch, *_) = command
        latest = self.client.command("HGET", keys[0], f"epoch:{member}")
        return latest is not None and int(latest) > int(epoch)

    def take_snapshot(self) -> None:
        """Remember what a replica has."""
        self._snapshot = {
            key: (self.client.command("DUMP", key), self.client.command("PTTL", key))
            for key in sorted(self.client.command("KEYS", "*"))
        }

    def restart(self) -> None:
        """Replace the server by one that has no data."""
        self._replace(now())

    def fail_over(self) -> None:
        """Replace the server by a replica that has the data of the last snapshot.

        A name that the replica does not know of would have no gate. That is not promised to work.
        """
        if self._names <= self._snapshot.keys():
            snapshot = self._snapshot
            self._replace(now() - 1000)
            for key, (value, expiry) in snapshot.items():
                self.client.command("RESTORE", key, expiry, value)

    def _replace(self, started: float) -> None:
        self.note("another server")
        self.last_replaced = now()
        self._life += 1
        self._started = started
        self.client.command("FLUSHDB")
        for link in self.links:
            link.end()


class FakeLink:
    """Takes the place of `aiosync.redis._link.Link`."""

    is_cluster = False
    policy = "noeviction"
    publish = "PUBLISH"

    def __init__(self, port: Port, timeout: float) -> None:
        self.port = port
        self.run = port.network.run
        self.uptime = port.network.uptime
        self.channels: set[str] = set()
        self._network = port.network
        self._timeout = timeout
        self._ended = anyio.Event()
        streams: tuple[
            MemoryObjectSendStream[tuple[str, str]], MemoryObjectReceiveStream[tuple[str, str]]
        ] = create_memory_object_stream(inf)
        self._inbox, self._messages = streams
        self._network.links.append(self)

    @property
    def alive(self) -> bool:
        return not self._ended.is_set()

    def node_of(self, _name: str) -> None:
        return None  # there is no cluster

    def close(self) -> None:
        self.end()

    def end(self) -> None:
        self._ended.set()
        self._inbox.close()

    def subscribe(self, channel: str) -> None:
        if not self.alive:
            raise LinkLost
        self.channels.add(channel)

    def unsubscribe(self, channel: str) -> None:
        if not self.alive:
            raise LinkLost
        self.channels.discard(channel)

    def receive(self, channel: str, message: str) -> None:
        if self.alive and channel in self.channels and not self.port.is_cut:
            self._inbox.send_nowait((channel, message))

    async def messages(self) -> AsyncIterator[tuple[str, str]]:
        with self._messages:
            async for message in self._messages:
                yield message
        raise LinkLost

    async def call(
        self,
        script: str,
        keys: Sequence[str],
        arguments: Sequence[str],
        timeout: float | None = None,
    ) -> Any:
        timeout = self._timeout if timeout is None else timeout
        give_up_at = now() + timeout
        network, faults, command = self._network, self._network.faults, (script, keys, arguments)
        late_by = network.random.uniform(0, faults.late_by) * network.lease
        if self.port.is_cut or self.port.is_mute or network.happens(faults.lost):
            await self._fail(give_up_at)
        if network.happens(faults.late):
            network.execute_later(command, late_by)
            await self._fail(give_up_at)
        await self._pass(network.delay(), give_up_at)
        life, reply = network.run, network.execute(*command)
        if network.happens(faults.repeated):
            self.end()
            network.execute_later(command, late_by, again=True)
        if self.port.is_cut or network.happens(faults.reply_lost):
            await self._fail(give_up_at)
        await self._pass(network.delay(), give_up_at)
        assert life == network.run
        return reply

    async def _pass(self, seconds: float, give_up_at: float) -> None:
        """Let time pass, unless the link ends or the caller gives up."""
        seconds = min(seconds, give_up_at - now())
        if seconds > 0:
            with anyio.move_on_after(seconds):
                await self._ended.wait()
        else:
            await anyio.sleep(0)
        if now() >= give_up_at:
            self.end()
        if not self.alive:
            raise LinkLost

    async def _fail(self, give_up_at: float) -> None:
        silent = self.port.is_cut or self.port.is_mute
        if self._network.random.random() >= self._network.faults.at_once or silent:
            with anyio.move_on_after(give_up_at - now()):
                await self._ended.wait()
        self.end()
        raise LinkLost from TimeoutError("no reply")


@asynccontextmanager
async def _open_link(
    connect: Callable[[], Any], timeout: float, tag: str | None, _prefix: str
) -> AsyncIterator[Any]:
    port: Port = connect()
    assert tag is None
    network = port.network
    if port.is_cut:
        await anyio.sleep(timeout)
        raise LinkLost from TimeoutError("no connection")
    await anyio.sleep(network.delay())
    if network.happens(network.faults.no_connection):
        raise LinkLost from OSError("refused")
    link = FakeLink(port, timeout)
    port.links.append(link)
    try:
        yield link
    finally:
        link.end()
        port.links.remove(link)


@pytest.fixture
def fake_links(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have `Redis` use links of `Port` and the clock of the event loop."""
    monkeypatch.setattr(_server, "open_link", _open_link)
    for module in (_server, _carrier, _client):
        monkeypatch.setattr(module, "clock", now)
