"""Semaphores and barriers on a Redis or Valkey Cluster of three primaries."""

from __future__ import annotations

from contextlib import AsyncExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import anyio
import coredis
import pytest
from coredis import exceptions
from coredis.connection import TCPLocation
from support.helpers import until_async
from support.redis_servers import Cluster, RedisServer, ServerProgram

from aiosync.redis import BackendUnavailable, Redis
from aiosync.redis._link import Link, slot_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from aiosync.redis._session import Session

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.redis,
    pytest.mark.slow,
    pytest.mark.timeout(60),
]


@pytest.fixture(scope="module")
def cluster(server_program: ServerProgram) -> Iterator[Cluster]:
    with Cluster(server_program) as cluster:
        for node in cluster.nodes:
            node.command("CONFIG", "SET", "cluster-require-full-coverage", "no")
        yield cluster


def clustered(cluster: Cluster, **settings: Any) -> Redis:
    def connect() -> Any:
        nodes = [TCPLocation(*node.address) for node in cluster.nodes]
        return coredis.RedisCluster(startup_nodes=nodes)

    return Redis(connect=connect, restart_gate=False, **settings)


def session_of(redis: Redis) -> Session:
    session = redis._current.session
    assert session is not None
    return session


def names_on(cluster: Cluster, node: RedisServer, count: int) -> list[str]:
    """Return names that no test has used yet, whose keys are on `node`."""
    found: list[str] = []
    while len(found) < count:
        name = f"name-{next(_numbers)}"
        if cluster.node_of(f"{{{name}}}") is node:
            found.append(name)
    return found


_numbers = iter(range(10**6))


def connections(cluster: Cluster) -> list[int]:
    """Return how many clients of ours each node has. Those of MIGRATE speak RESP2."""
    return [sum(each["resp"] == "3" for each in node.clients()) for node in cluster.nodes]


class Move:
    """Moves the slot of a name from one node to another, step by step."""

    def __init__(self, cluster: Cluster, name: str, source: RedisServer, to: RedisServer) -> None:
        self.cluster = cluster
        self.slot = slot_of(name)
        self.source = source
        self.to = to

    def begin(self) -> None:
        self.to.command("CLUSTER", "SETSLOT", self.slot, "IMPORTING", node_id(self.source))
        self.source.command("CLUSTER", "SETSLOT", self.slot, "MIGRATING", node_id(self.to))

    def keys(self) -> list[bytes]:
        keys: list[bytes] = self.source.command("CLUSTER", "GETKEYSINSLOT", self.slot, 100)
        return sorted(keys)

    def move(self, *keys: bytes) -> None:
        self.source.command("MIGRATE", *self.to.address, "", 0, 5000, "KEYS", *keys)

    def end(self) -> None:
        if keys := self.keys():
            self.move(*keys)
        others = [each for each in self.cluster.nodes if each not in {self.to, self.source}]
        for node in (self.to, self.source, *others):
            node.command("CLUSTER", "SETSLOT", self.slot, "NODE", node_id(self.to))


def node_id(node: RedisServer) -> bytes:
    identity: bytes = node.command("CLUSTER", "MYID")
    return identity


@contextmanager
def moving(cluster: Cluster, name: str, to: int = 1) -> Iterator[Move]:
    """Begin to move a name to another node, and at the end move it back."""
    source = cluster.node_of(f"{{{name}}}")
    target = cluster.nodes[(cluster.nodes.index(source) + to) % 3]
    move = Move(cluster, name, source, target)
    move.begin()
    try:
        yield move
    finally:
        move.end()
        back = Move(cluster, name, target, source)
        back.begin()
        back.end()


async def test_names_spread_over_the_nodes(cluster: Cluster) -> None:
    names = [name for node in cluster.nodes for name in names_on(cluster, node, 10)]
    one, two = clustered(cluster, lease=60), clustered(cluster, lease=60)

    async def use(name: str) -> None:
        """Hand a permit over, and meet, all by messages: the next audit is far away."""
        mine, theirs = one.semaphore(name), two.semaphore(name)
        await mine.acquire()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(theirs.acquire)
            await until_async(lambda: waiting(cluster, name))
            mine.release()
        theirs.release()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(one.barrier(name, 2).wait)
            tasks.start_soon(two.barrier(name, 2).wait)

    with anyio.fail_after(15):
        async with one, two:
            used = [one.semaphore(name) for name in names]  # which stay subscribed
            async with anyio.create_task_group() as tasks:
                for name in names:
                    tasks.start_soon(use, name)
            # One a node and process, and those by which the layout was found are closed.
            await until_async(lambda: connections(cluster) == [2, 2, 2])
            for node in cluster.nodes:
                assert sum(int(each["ssub"]) for each in node.clients()) >= 10
            del used
    await until_async(lambda: connections(cluster) == [0, 0, 0])


def waiting(cluster: Cluster, name: str) -> int:
    """Return how many wait for a semaphore."""
    key = f"aiosync:{{{name}}}:semaphore:waiters"
    count: int = cluster.node_of(key).command("ZCARD", key.encode())
    return count


@pytest.mark.parametrize("name", ["a}b", "{x", "a{b}c", "{", "ü}", "x}}", "a{b", "a:b c\r\n"])
async def test_hash_tags_of_odd_names(cluster: Cluster, name: str) -> None:
    key = f"aiosync:{{{name}}}:semaphore"
    assert slot_of(name) == cluster.nodes[0].command("CLUSTER", "KEYSLOT", key.encode())
    async with clustered(cluster, lease=60) as redis:
        semaphore = redis.semaphore(name)
        async with semaphore:
            server = next(each for each in session_of(redis)._servers if each.conductors)
            # On the right one at once: no message was lost on the way.
            assert server.link is not None
            assert server.link.node == cluster.node_of(key).address
        async with semaphore, anyio.create_task_group() as tasks:
            tasks.start_soon(semaphore.acquire)
            await until_async(lambda: waiting(cluster, name))
            tasks.cancel_scope.cancel()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(redis.barrier(name, 2).wait)
            tasks.start_soon(redis.barrier(name, 2).wait)


@pytest.mark.parametrize("to", [1, 2])
async def test_a_slot_that_moves_while_in_use(cluster: Cluster, to: int) -> None:
    """What is held stays held, waiters are served, other names notice nothing."""
    source = cluster.nodes[0]
    name, other = names_on(cluster, source, 2)
    async with AsyncExitStack() as stack:
        one, two = [await stack.enter_async_context(clustered(cluster, lease=3)) for _ in range(2)]
        await one.semaphore(other).statistics()
        (server,) = [each for each in session_of(one)._servers if each.conductors]
        link = server.link
        tasks = await stack.enter_async_context(anyio.create_task_group())
        async with one.semaphore(name).hold() as permit:
            taken: list[str] = []
            tasks.start_soon(take, two, name, taken)
            await until_async(lambda: waiting(cluster, name))
            with moving(cluster, name, to) as move:
                # One key less: TRYAGAIN.
                move.move(move.keys()[0])
                with anyio.fail_after(1):
                    async with one.semaphore(other):
                        pass
                await anyio.sleep(0.3)
                # No key left: ASK, and TRYAGAIN from the other one.
                move.move(*move.keys())
                await anyio.sleep(0.3)
                move.end()
                with anyio.fail_after(4):
                    statistics = await one.semaphore(name).statistics()
                    assert statistics.held == 1
                    assert not permit.lost
                    # The waiter follows with the next heartbeat of its process.
                    while not statistics.waiting:
                        await anyio.sleep(0.05)
                        statistics = await one.semaphore(name).statistics()
                assert (statistics.held, statistics.waiting) == (1, 1)
                with anyio.fail_after(1):
                    async with one.semaphore(other):
                        pass
                assert server.link is link
                permit.release()
                with anyio.fail_after(4):  # the gate
                    await until_async(lambda: taken)
                two.semaphore(name).release()
                await two.flush()
    await until_async(lambda: connections(cluster) == [0, 0, 0])


async def take(redis: Redis, name: str, taken: list[str]) -> None:
    await redis.semaphore(name).acquire()
    taken.append(name)


async def test_a_new_name_in_a_slot_that_moves(cluster: Cluster) -> None:
    (name,) = names_on(cluster, cluster.nodes[1], 1)
    async with clustered(cluster, lease=3) as redis, anyio.create_task_group() as tasks:
        with moving(cluster, name) as move:
            taken: list[str] = []
            tasks.start_soon(take, redis, name, taken)
            await anyio.sleep(0.2)
            assert not taken
            move.end()
            with anyio.fail_after(4):
                await until_async(lambda: taken)


async def test_a_slot_that_moves_for_too_long(cluster: Cluster) -> None:
    (name,) = names_on(cluster, cluster.nodes[2], 1)
    async with clustered(cluster, lease=3, give_up=0.5) as redis:
        semaphore = redis.semaphore(name)
        await semaphore.acquire()
        with moving(cluster, name) as move:
            move.move(move.keys()[0])
            with pytest.raises(BackendUnavailable) as caught:
                await redis.barrier(name, 2).wait()
            assert isinstance(caught.value.__cause__, exceptions.AskError)
            with pytest.raises(BackendUnavailable) as caught:
                await semaphore.statistics()
            assert isinstance(caught.value.__cause__, exceptions.TryAgainError)


async def test_a_slot_that_has_moved_meanwhile(cluster: Cluster) -> None:
    """An idle name learns by MOVED; the connection that it opens to find it is closed again."""
    name, other = names_on(cluster, cluster.nodes[0], 2)
    async with clustered(cluster, lease=2) as redis:
        for used in [name, other, *names_on(cluster, cluster.nodes[1], 1)]:
            await redis.semaphore(used).statistics()
        with moving(cluster, name) as move:
            move.end()
            with anyio.fail_after(5):
                async with redis.semaphore(name):
                    pass
            await until_async(lambda: connections(cluster) in ([1, 1, 0], [1, 1, 1]))
        # And back.
        with anyio.fail_after(5):
            async with redis.semaphore(name), redis.semaphore(other):
                pass
        await until_async(lambda: connections(cluster) in ([1, 1, 0], [1, 1, 1]))


async def test_two_connections_to_one_node(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of them is closed, and its names go on with the other one."""
    name, other = names_on(cluster, cluster.nodes[0], 2)
    async with clustered(cluster, lease=6) as redis:
        session = session_of(redis)
        semaphore = redis.semaphore(name)
        await semaphore.statistics()
        first = session._server_for(name, None)
        second = session._add_server(other)
        monkeypatch.setattr(session, "_server_for", lambda *_: second)
        with anyio.fail_after(5):
            async with redis.semaphore(other):
                assert second.duplicate_of is first
                assert len(first.conductors) == 2
                assert second not in session._servers
                await until_async(lambda: sum(connections(cluster)) == len(session._servers))
                assert first.tag in {name, other}


async def test_a_slot_that_moves_while_connecting(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    (name,) = names_on(cluster, cluster.nodes[0], 1)
    (wrong,) = names_on(cluster, cluster.nodes[1], 1)
    async with clustered(cluster, lease=6) as redis:
        with monkeypatch.context() as patch:
            # As if the layout said that the keys of another node were here.
            patch.setattr(Link, "_tag_here", lambda _: wrong)
            server = session_of(redis)._add_server(name)
            await until_async(lambda: isinstance(server.error, exceptions.MovedError))
        await until_async(lambda: server.link is not None or server.duplicate_of is not None)
        assert (await redis.semaphore(name).statistics()).limit == 1


async def test_a_slot_that_no_node_has(cluster: Cluster) -> None:
    """A server object of its own looks for it."""
    (name,) = names_on(cluster, cluster.nodes[0], 1)
    async with clustered(cluster) as redis:
        session = session_of(redis)
        await redis.semaphore(name).statistics()
        link = session._layout_link
        assert link is not None
        link._layout._slots[slot_of(name)].clear()
        assert link.node_of(name) is None
        assert session._server_for(name, None).link is None


async def test_a_dead_primary(cluster: Cluster) -> None:
    """It takes its own names with it, and no others; they come back with it."""
    dead, alive = cluster.nodes[1], cluster.nodes[2]
    name, new = names_on(cluster, dead, 2)
    other, another = names_on(cluster, alive, 2)
    async with clustered(cluster, lease=2, give_up=1) as redis:
        await redis.semaphore(name).statistics()
        await redis.semaphore(other).statistics()
        dead.kill()
        try:
            for _ in range(2):
                with anyio.fail_after(5), pytest.raises(BackendUnavailable) as caught:
                    await redis.semaphore(name).acquire()
                assert isinstance(caught.value.__cause__, OSError | exceptions.RedisError)
                with anyio.fail_after(5), pytest.raises(BackendUnavailable):
                    await redis.barrier(new, 2).wait()
                with anyio.fail_after(1):
                    async with redis.semaphore(other):
                        pass
                with anyio.fail_after(3):
                    async with redis.semaphore(another):
                        pass
        finally:
            dead.start()
        await until_async(lambda: dead.command("CLUSTER", "INFO").startswith(b"cluster_state:ok"))
        with anyio.fail_after(15):
            while True:
                try:
                    async with redis.semaphore(name), redis.semaphore(new):
                        break
                except BackendUnavailable:
                    pass
