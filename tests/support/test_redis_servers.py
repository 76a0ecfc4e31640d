"""The servers that the tests of `aiosync.redis` start."""

from __future__ import annotations

import os
import signal
import socket
import ssl
import subprocess
import sys
import threading
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from support import redis_servers, resp
from support.redis_servers import (
    Cluster,
    RedisServer,
    Sentinel,
    ServerProgram,
    available_servers,
    wait_until,
)
from support.tls_front import TlsFront

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [pytest.mark.redis, pytest.mark.timeout(60)]


@pytest.fixture
def persistent(server_program: ServerProgram) -> Iterator[RedisServer]:
    """A server with an append-only file in which ``x`` is old."""
    with RedisServer(server_program, appendonly=True) as server:
        server.command("SET", "x", "old")
        yield server


def exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    # A zombie has ended; whoever adopts it reaps it.
    status = Path(f"/proc/{pid}/stat")
    return not status.exists() or status.read_text().rpartition(")")[2].split()[0] != "Z"


# --- replies


def test_replies_of_resp2(redis_server: RedisServer) -> None:
    with redis_server.client() as client:
        client.command("DEL", "list", "number")
        assert client.command("PING") == b"PONG"
        assert client.command("INCR", "number") == 1
        assert client.command("GET", "nothing") is None
        assert client.command("RPUSH", "list", b"\r\n", 2, 0.5) == 3
        assert client.command("LRANGE", "list", 0, -1) == [b"\r\n", b"2", b"0.5"]
        with pytest.raises(resp.ReplyError, match="unknown command"):
            client.command("NONSENSE")
        client.command("MULTI")
        client.command("INCR", "list")
        (error,) = client.command("EXEC")
        assert isinstance(error, resp.ReplyError)
        assert client.command("ECHO", "still in step") == b"still in step"


def test_replies_of_resp3(redis_server: RedisServer) -> None:
    with redis_server.client() as client:
        assert client.command("HELLO", 3)[b"proto"] == 3
        assert client.command("GET", "nothing") is None
        client.command("ZADD", "zset", 1.5, "a")
        assert client.command("ZSCORE", "zset", "a") == 1.5
        script = "redis.setresp(3); return {redis.call('SMEMBERS', KEYS[1]), {double=0.5}}"
        client.command("SADD", "set", "a")
        assert client.command("EVAL", script, 1, "set") == [[b"a"], 0.5]
        client.send("SUBSCRIBE", "channel")
        assert client.receive() == [b"subscribe", b"channel", 1]
        redis_server.command("PUBLISH", "channel", "hello")
        assert client.receive() == [b"message", b"channel", b"hello"]


def test_questions(server_program: ServerProgram) -> None:
    with RedisServer(server_program) as server:
        assert server.calls("incr") == 0
        server.command("INCR", "x")
        assert server.calls("incr") == 1
        assert server.info("server")["process_id"] == str(server.pid)
        assert server.clients() == []
        with resp.RespClient(server.url) as client:
            client.command("CLIENT", "SETNAME", "somebody")
            assert [each["name"] for each in server.clients()] == ["somebody"]


# --- the process


@pytest.mark.slow
def test_restart_keeps_or_loses_the_data(persistent: RedisServer) -> None:
    server = persistent
    port, run_id = server.port, server.info("server")["run_id"]
    server.restart(empty=False)
    assert server.port == port
    assert server.info("server")["run_id"] != run_id
    assert server.command("GET", "x") == b"old"
    server.restart(empty=True)
    assert server.command("GET", "x") is None
    assert resp.command(server.url, "PING") == b"PONG"


@pytest.mark.slow
def test_restart_with_an_old_copy(persistent: RedisServer) -> None:
    old = persistent.save_aof()
    persistent.command("SET", "x", "new")
    new = persistent.save_aof()
    for copy, value in ((old, b"old"), (new, b"new"), (old, b"old")):
        persistent.restore_aof(copy)
        assert persistent.command("GET", "x") == value


@pytest.mark.slow
@pytest.mark.parametrize("how", ["stop", "kill"])
def test_end(persistent: RedisServer, how: str) -> None:
    with resp.RespClient(persistent.url) as client:
        client.command("PING")
        getattr(persistent, how)()
        assert not persistent.is_running
        with pytest.raises(ConnectionError):
            client.command("PING")
        with pytest.raises(ConnectionRefusedError):
            resp.command(persistent.url, "PING")
    persistent.start()
    assert persistent.command("GET", "x") == b"old"


@pytest.mark.slow
def test_freeze(persistent: RedisServer) -> None:
    with resp.RespClient(persistent.url, timeout=0.1) as client:
        client.command("PING")
        persistent.freeze()
        assert persistent.is_running
        client.send("APPEND", "x", "er")
        with pytest.raises(TimeoutError):
            client.receive()
        persistent.thaw()
        wait_until(lambda: persistent.command("GET", "x") == b"older", "the thawed command")


@pytest.mark.slow
@pytest.mark.parametrize("how", ["stop", "kill", "close"])
def test_end_of_a_frozen_server(persistent: RedisServer, how: str) -> None:
    persistent.freeze()
    getattr(persistent, how)()
    assert not persistent.is_running


@pytest.mark.slow
def test_port_that_is_taken(server_program: ServerProgram, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the choice and the start somebody else may take it."""
    ports = [redis_servers._choose_port(), redis_servers._choose_port()]
    monkeypatch.setattr(redis_servers, "_choose_port", iter(ports).__next__)
    with socket.create_server(("127.0.0.1", ports[0])):
        assert not redis_servers._is_free(ports[0])
        with RedisServer(server_program) as server:
            assert server.port == ports[1]


def test_server_that_does_not_start(server_program: ServerProgram) -> None:
    with pytest.raises(RuntimeError, match="maxmemory"):
        RedisServer(server_program, settings={"maxmemory": "nonsense"})


@pytest.mark.slow
def test_server_survives_the_thread_that_started_it(server_program: ServerProgram) -> None:
    servers: list[RedisServer] = []
    thread = threading.Thread(target=lambda: servers.append(RedisServer(server_program)))
    thread.start()
    thread.join()
    with servers[0] as server:
        assert server.command("PING") == b"PONG"


_CHILD = """
import sys, time
from support.redis_servers import RedisServer, available_servers
program = next(each for each in available_servers() if each.id == sys.argv[1])
server = RedisServer(program)
print(server.pid, server.folder, flush=True)
if sys.argv[2] == "exit":
    sys.exit()
time.sleep(60)
"""


@pytest.mark.slow
@pytest.mark.parametrize("how", ["exit", "kill"])
def test_no_server_survives_its_process(server_program: ServerProgram, how: str) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", _CHILD, server_program.id, how],
        cwd=Path(__file__).parents[1],
        stdout=subprocess.PIPE,
        text=True,
    ) as child:
        assert child.stdout is not None
        pid, folder = child.stdout.readline().split()
        if how == "kill":
            child.send_signal(signal.SIGKILL)
        child.wait(20)
        wait_until(lambda: not exists(int(pid)), "the end of the server")
        wait_until(lambda: not Path(folder).exists(), "the end of its files")


def test_files_are_removed(server_program: ServerProgram) -> None:
    with RedisServer(server_program) as server:
        pid = server.pid
        assert server.folder.exists()
    assert not server.folder.exists()
    assert not exists(pid)


# --- options


@pytest.mark.slow
def test_password_and_users(server_program: ServerProgram) -> None:
    users = {"ann": "on >secret ~a:* +get +ping"}
    with RedisServer(server_program, password="pass-word", users=users) as server:
        assert server.command("SET", "b", 1) == b"OK"
        assert resp.command(server.url, "GET", "b") == b"1"
        assert resp.command(server.unix_url, "GET", "b") == b"1"
        ann = server.url_of("ann", "secret")
        assert resp.command(ann, "GET", "a:x") is None
        with pytest.raises(resp.ReplyError, match="NOPERM"):
            resp.command(ann, "GET", "b")
        with pytest.raises(resp.ReplyError, match="WRONGPASS"):
            resp.command(server.url_of("ann", "wrong"), "PING")
        with pytest.raises(resp.ReplyError, match="NOAUTH"):
            resp.command(f"redis://127.0.0.1:{server.port}", "PING")
        with RedisServer(server_program, replica_of=server) as replica:
            assert replica.command("GET", "b") == b"1"


@pytest.mark.slow
def test_replica(server_program: ServerProgram) -> None:
    with (
        RedisServer(server_program) as primary,
        RedisServer(server_program, replica_of=primary) as replica,
    ):
        primary.command("SET", "x", 1)
        wait_until(lambda: replica.command("GET", "x") == b"1", "the replica to hear of it")
        with pytest.raises(resp.ReplyError, match="READONLY"):
            replica.command("SET", "x", 2)
        assert replica.command("REPLICAOF", "NO", "ONE") == b"OK"
        assert replica.command("SET", "x", 2) == b"OK"


def test_tls(server_program: ServerProgram) -> None:
    if not server_program.has_tls:
        pytest.skip(f"{server_program.id} was built without TLS")
    if find_spec("trustme") is None:
        pytest.skip("trustme is not installed")
    with RedisServer(server_program, tls=True, password="secret") as server:
        assert server.url.startswith("rediss://")
        assert resp.command(server.url, "PING") == b"PONG"
        with pytest.raises(ConnectionError):
            resp.command(f"redis://127.0.0.1:{server.port}", "PING")
        port = server.port
        server.restart(empty=True)
        assert server.port == port
        assert resp.command(server.url, "PING") == b"PONG"


@pytest.mark.slow
def test_tls_before_a_server_without_it(server_program: ServerProgram) -> None:
    if find_spec("trustme") is None:
        pytest.skip("trustme is not installed")
    with RedisServer(server_program) as server, TlsFront(server.address) as front:
        with resp.RespClient(front.url) as client, resp.RespClient(front.url):
            assert client.command("ECHO", "x" * 1_000_000) == b"x" * 1_000_000
            with pytest.raises(ConnectionError):
                resp.command(f"redis://127.0.0.1:{front.address[1]}", "PING")
            server.kill()
            with pytest.raises(ConnectionError):
                client.command("PING")
        with pytest.raises((ConnectionError, ssl.SSLError)):
            resp.command(front.url, "PING")
        server.start()
        with resp.RespClient(front.url) as client:  # which is still open at the end
            assert client.command("PING") == b"PONG"
    assert not front.certificate.authority.exists()


# --- several servers


@pytest.mark.slow
def test_failover_on_command(server_program: ServerProgram) -> None:
    with Sentinel(server_program) as sentinel:
        old = sentinel.primary
        assert sentinel.primary_address() == old.address
        sentinel.failover()
        assert sentinel.replica is old
        assert sentinel.primary_address() == sentinel.primary.address != old.address
        assert sentinel.primary.command("ROLE")[0] == b"master"
        sentinel.wait_for_rejoin()
        assert old.command("ROLE")[0] == b"slave"


@pytest.mark.slow
def test_failover_after_a_crash(server_program: ServerProgram) -> None:
    with Sentinel(server_program) as sentinel:
        old = sentinel.primary
        sentinel.kill_primary()
        assert sentinel.primary_address() == sentinel.primary.address != old.address
        old.start()
        assert old.command("ROLE")[0] == b"master"
        sentinel.wait_for_rejoin()
        assert old.command("ROLE")[0] == b"slave"


@pytest.mark.slow
def test_cluster(server_program: ServerProgram) -> None:
    with Cluster(server_program) as cluster:
        owner = cluster.node_of("{tag}key")
        assert owner is cluster.node_of("{tag}other")
        assert owner.command("SET", "{tag}key", 1) == b"OK"
        for node in cluster.nodes:
            if node is not owner:
                with pytest.raises(resp.ReplyError, match=f"MOVED .*:{owner.port}$"):
                    node.command("GET", "{tag}key")


# --- where the programs are found


@pytest.fixture
def fresh_search(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Search PATH, which is empty, and no package."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(redis_servers, "find_spec", lambda name: None)
    available_servers.cache_clear()
    yield
    available_servers.cache_clear()


def install(folder: Path, name: str, output: str) -> str:
    program = folder / name
    program.write_text(f"#!/bin/sh\necho '{output}'\n")
    program.chmod(0o755)
    return str(program)


@pytest.mark.skipif(sys.platform == "win32", reason="no server is looked for on Windows")
@pytest.mark.usefixtures("fresh_search")
class TestSearch:
    def test_nothing(self) -> None:
        assert available_servers() == ()

    def test_path(self, tmp_path: Path) -> None:
        valkey = install(tmp_path, "valkey-server", "Valkey server v=8.0.10 sha=0 bits=64")
        redis = install(tmp_path, "redis-server", "Redis server v=7.4.2 sha=0 bits=64")
        first, second = available_servers()
        assert first == ("valkey", valkey, "8.0.10")
        assert first.id == "valkey-8.0"
        assert second == ("redis", redis, "7.4.2")
        assert second.id == "redis-7.4"

    def test_valkey_in_place_of_redis(self, tmp_path: Path) -> None:
        """Some distributions install the one as the other: it is the same server."""
        valkey = install(tmp_path, "valkey-server", "Valkey server v=8.0.10 sha=0 bits=64")
        install(tmp_path, "redis-server", "Valkey server v=8.0.10 sha=0 bits=64")
        assert available_servers() == (("valkey", valkey, "8.0.10"),)

    def test_broken_program(self, tmp_path: Path) -> None:
        install(tmp_path, "redis-server", "no such library")
        tmp_path.joinpath("valkey-server").write_text("#!/nowhere")
        tmp_path.joinpath("valkey-server").chmod(0o755)
        assert available_servers() == ()
