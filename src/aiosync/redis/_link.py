"""A connection to a server, by coredis, which only this module and `_connect` import.

Requests are sent on a bare connection, not by the commands of the client. So no request is repeated
implicitly, each connection belongs to one server process, and messages arrive on the connection
that replies use. docs/redis-protocol.md lists what this relies on.
"""

from __future__ import annotations

import hashlib
from binascii import crc_hqx
from importlib.resources import files
from itertools import count
from math import inf
from typing import TYPE_CHECKING, Any

import coredis
from anyio import current_time
from coredis import exceptions

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence
    from typing import TypeAlias

    Client: TypeAlias = coredis.Redis[Any] | coredis.RedisCluster[Any]
    Reply: TypeAlias = list[Any]
    Node: TypeAlias = tuple[str, int]

_FOLDER = files("aiosync.redis")
_COMMON = _FOLDER.joinpath("common.lua").read_text("utf-8")
SCRIPTS: dict[str, str] = {
    name: _COMMON + _FOLDER.joinpath(f"{name}.lua").read_text("utf-8")
    for name in ("semaphore", "barrier")
}
_HASHES = {
    name: hashlib.sha1(source.encode(), usedforsecurity=False).hexdigest()
    for name, source in SCRIPTS.items()
}


class LinkLost(Exception):  # noqa: N818
    """The connection cannot be used any more; the cause says why."""


class Moved(Exception):  # noqa: N818
    """In a cluster: the name belongs to another server now."""


class Resharding(Exception):  # noqa: N818
    """In a cluster: the keys of the name are being moved to another server."""


class Refused(Exception):  # noqa: N818
    """The server does not allow a command; the cause says which."""


class Link:
    """One connection to one server process.

    :param connection: of coredis
    :param timeout: how many seconds a request may take
    :param layout: of the cluster, or None
    """

    def __init__(self, connection: Any, timeout: float, layout: Any) -> None:
        self._connection = connection
        self._timeout = timeout
        self._layout = layout
        # When the server told its uptime, and how much it was, at least.
        self._told_at = current_time()
        self._uptime = 0.0
        self.run = ""
        self.policy = ""
        self.is_cluster = layout is not None
        # Where the server is, if it belongs to a cluster.
        self.node: Node | None = None
        if self.is_cluster:
            self.node = connection.location.host, connection.location.port

    async def begin(self, prefix: str) -> None:
        """Identify the server process, check rights that are used later, and load the scripts.

        :param prefix: what the keys and channels begin with
        """
        self._learn(_fields(_text(await self.request(b"INFO"))))
        # If SUBSCRIBE is refused, its error is taken for the reply to the next request, and all
        # later replies are shifted. The connection has no other user yet, and is closed then.
        channel = f"{prefix}:{{{self._tag_here()}}}"
        self._connection.send_command(self._subscribe, channel)
        await self.request(b"CLIENT REPLY", "ON")
        self._send(self._unsubscribe, channel)
        await self._load()

    def _learn(self, info: dict[str, str]) -> None:
        if "run_id" not in info:
            raise LinkLost from ValueError("the reply to INFO has no run_id")
        if info.get("role") == "slave":
            raise LinkLost from ValueError("the server is a replica")
        if info.get("redis_mode", info.get("server_mode")) == "cluster" and not self.is_cluster:
            raise TypeError(
                "the server belongs to a cluster: use connect= and return a coredis.RedisCluster"
            )
        self.run = info["run_id"]
        # The difference of two whole seconds: it may be almost a second more than is true, and a
        # gate that opens too early would grant a permit that is still held.
        self._uptime = max(0.0, float(info["uptime_in_seconds"]) - 1)
        self._told_at = current_time()
        self.policy = info.get("maxmemory_policy", "noeviction")

    def _tag_here(self) -> str:
        """Return a hash tag whose keys are on this server."""
        return next(tag for tag in map(str, count()) if self.node_of(tag) == self.node)

    async def _load(self, end: float = inf) -> None:
        for source in SCRIPTS.values():
            timeout = min(self._timeout, _seconds_until(end))
            await self.request(b"SCRIPT LOAD", source, timeout=timeout)

    def close(self) -> None:
        """End the connection; `messages` ends too."""
        self._connection.invalidate()

    @property
    def uptime(self) -> float:
        """The number of seconds for which the server has been running, at least."""
        return self._uptime + current_time() - self._told_at

    # In a cluster, PUBLISH goes to all servers.

    @property
    def publish(self) -> str:
        """The command by which the server sends messages."""
        return "SPUBLISH" if self.is_cluster else "PUBLISH"

    @property
    def _subscribe(self) -> bytes:
        return b"SSUBSCRIBE" if self.is_cluster else b"SUBSCRIBE"

    @property
    def _unsubscribe(self) -> bytes:
        return b"SUNSUBSCRIBE" if self.is_cluster else b"UNSUBSCRIBE"

    def subscribe(self, channel: str) -> None:
        """Have messages of `channel` sent to this connection."""
        self._send(self._subscribe, channel)

    def unsubscribe(self, channel: str) -> None:
        """End what `subscribe` has begun."""
        self._send(self._unsubscribe, channel)

    def _send(self, command: bytes, channel: str) -> None:
        # The confirmation is a message, but an error, such as MOVED, is a reply, and would be taken
        # for the reply to another request. "noreply" suppresses it.
        try:
            self._connection.create_request(command, channel, noreply=True)
        except Exception as error:  # see `request`
            raise LinkLost from root_cause(error)

    def node_of(self, name: str) -> Node | None:
        """Return where the keys of `name` are in a cluster, as far as this link knows."""
        if self._layout is None:
            return None
        try:
            node = self._layout.node_for_slot(slot_of(name))
        except exceptions.RedisClusterError:
            return None
        return node.host, node.port

    async def call(
        self, script: str, keys: Sequence[str], arguments: Sequence[str], timeout: float
    ) -> Reply:
        """Run a script.

        :param timeout: how many seconds the reply may take
        :raises LinkLost: if there is no reply, or none from a server that has the state
        :raises Moved: if the keys are on another server of the cluster
        :raises Resharding: if they are just being moved to another one
        :raises Refused: if the user of the connection lacks a right
        """
        end = current_time() + timeout
        for _ in range(2):
            try:
                reply = await self.request(
                    b"EVALSHA", _HASHES[script], len(keys), *keys, *arguments, timeout=timeout
                )
            except exceptions.NoScriptError:
                await self._load(end)  # SCRIPT FLUSH
                timeout = _seconds_until(end)
            else:
                decoded: Reply = _decoded(reply)
                return decoded
        raise LinkLost("the server forgets scripts at once")

    async def request(
        self, command: bytes, *arguments: str | int, timeout: float | None = None
    ) -> Any:
        """Send one command.

        :param timeout: how many seconds the reply may take; None: the timeout of the link
        :raises: what `call` does, and NoScriptError
        """
        try:
            return await self._connection.create_request(
                command, *arguments, decode=False, timeout=timeout or self._timeout
            )
        except exceptions.NoScriptError:
            raise
        except exceptions.MovedError as error:
            if self._layout is None:  # not in a cluster, so there is nowhere to go
                self.close()
                raise LinkLost from error
            # This updates the layout, so that `node_of` returns the new node.
            self._layout.report_errors(
                self._layout.node_for_location(self._connection.location), error
            )
            raise Moved from error
        except (exceptions.AskError, exceptions.TryAgainError) as error:
            raise Resharding from error
        except Exception as error:
            # An error of coredis, or one that ended a task of its connection, such as EndOfStream
            # under TLS.
            if is_refusal(error):
                raise Refused from error
            self.close()
            raise LinkLost from root_cause(error)

    async def messages(self) -> AsyncIterator[tuple[str, str]]:
        """Iterate over pairs of a channel and a message. Ends with LinkLost."""
        try:
            async for push in self._connection.push_messages:  # pragma: no branch
                # bytes or str: coredis decodes it like the reply to the pending request.
                kind, *fields = (_text(field) for field in push)
                if kind in {"message", "smessage"}:
                    yield fields[0], fields[1]
        except exceptions.ConnectionError as error:
            raise LinkLost from root_cause(error)


def _seconds_until(end: float) -> float:
    return max(0.001, end - current_time())


def is_refusal(error: BaseException) -> bool:
    """Return whether `error` means that the user of the connection lacks a right."""
    if isinstance(error, exceptions.ResponseError):
        # The error of a command in a script: Redis since 7.2 and Valkey; older Redis.
        text = str(error)
        if "ACL failure in script" in text or "The user executing the script can't" in text:
            return True
    return isinstance(error, (exceptions.AuthenticationError, exceptions.AuthorizationError))


def _fields(info: str) -> dict[str, str]:
    return dict(line.split(":", 1) for line in info.splitlines() if ":" in line)


def _text(field: object) -> str:
    return field.decode() if isinstance(field, bytes) else str(field)


def _decoded(reply: Any) -> Any:
    if isinstance(reply, list):
        return [_decoded(item) for item in reply]
    return reply.decode() if isinstance(reply, bytes) else reply


def slot_of(name: str) -> int:
    """Return the slot of a cluster in which the keys of `name` are.

    The hash tag of ``prefix:{name}:...`` ends at the first closing brace.
    """
    return crc_hqx(name.partition("}")[0].encode(), 0) % 16384


def root_cause(error: BaseException) -> BaseException:
    """Return the error that explains `error`.

    Task groups wrap an error in groups, and coredis in its own ConnectionError, which only
    contains the address.
    """
    while True:
        if isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        elif _is_wrapper(error) and isinstance(error.__cause__, _EXPLANATIONS):
            error = error.__cause__
        else:
            return error


# EndOfStream is not included: the error of coredis about it is clearer.
_EXPLANATIONS = (OSError, exceptions.RedisError, BaseExceptionGroup)


def _is_wrapper(error: BaseException) -> bool:
    if type(error) is OSError and error.errno is None:
        return True  # of anyio: no address of the host could be connected to
    return isinstance(error, (exceptions.ConnectionError, exceptions.RedisClusterError))
