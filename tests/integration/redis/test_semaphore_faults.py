"""Distributed semaphores while processes, connections and servers fail.

Times are bars of the design: a lease, or nine tenths of it, and a tenth of a second; on a busy
machine, what the event loop was late is added.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import pytest
from anyio import create_task_group, fail_after, sleep
from support.helpers import LONG, until_async
from support.permits import Child, FencedFile, Lateness, State, connect
from support.redis_servers import RedisServer, ServerProgram
from support.silent_proxy import Direction, SilentProxy

from aiosync.redis import BackendUnavailable, DistributedSemaphore, LeaseLost, Permit, Redis
from aiosync.redis._link import Link
from aiosync.redis._permits import Permits

pytestmark = [pytest.mark.anyio, pytest.mark.redis, pytest.mark.timeout(300 if LONG else 60)]

# Seconds of a lease, and what may come on top of a bar.
LEASE = 1.0
SLACK = 0.1


class Inside:
    """Holders in this process, and how many of them were inside at the same time, at most."""

    def __init__(self) -> None:
        self.now = self.peak = 0
        self.entered: list[float] = []
        self.fences: list[int] = []
        self.lost: list[float] = []

    async def hold(self, semaphore: DistributedSemaphore, seconds: float = 1e9) -> None:
        """Hold a permit; once more after each loss, until it was held for so long."""
        while True:
            try:
                async with semaphore.hold() as permit:
                    with self.counted(permit):
                        await sleep(seconds)
                return
            except LeaseLost:
                self.lost.append(time.monotonic())

    def counted(self, permit: Permit) -> ExitStack:
        stack = ExitStack()
        self.now += 1
        self.peak = max(self.peak, self.now)
        self.entered.append(time.monotonic())
        self.fences.append(permit.fence)
        stack.callback(self._leave)
        return stack

    def _leave(self) -> None:
        self.now -= 1


class Sent:
    """When the commands were sent that have been answered, on every link of this process."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.last = self.answered = 0.0
        call = Link.call

        async def observed(link: Link, *arguments: Any) -> Any:
            sent = self.last = time.monotonic()
            reply = await call(link, *arguments)
            self.answered = max(self.answered, sent)
            return reply

        monkeypatch.setattr(Link, "call", observed)


@asynccontextmanager
async def entered(*objects: Redis) -> AsyncIterator[None]:
    async with AsyncExitStack() as stack:
        for redis in objects:
            await stack.enter_async_context(redis)
        yield


# --- processes


@pytest.mark.slow
async def test_kill_of_a_holder(
    redis_server: RedisServer, name: str, anyio_backend: tuple[str, Any]
) -> None:
    lateness = Lateness()
    async with connect(redis_server, lease=LEASE) as redis, lateness.observed():
        semaphore = redis.semaphore(name)
        for _ in range(20 if LONG else 3):
            with Child(redis_server.url, name, lease=LEASE, backend=anyio_backend[0]) as child:
                await child.hear("ready")
                child.tell("hold")
                fence, _ = await child.hear("held")
                state = State(redis_server, name)
                async with create_task_group() as tasks:
                    tasks.start_soon(semaphore.acquire)
                    await until_async(lambda: state.waiters)  # noqa: B023
                    start = time.monotonic()
                    child.kill()
                taken = time.monotonic() - start
                assert taken <= LEASE + SLACK + lateness.allowance
                assert int(state.holders[0].rpartition(":")[2]) > int(fence)
                semaphore.release()
                await redis.flush()


@pytest.mark.slow
async def test_kill_of_a_holder_with_a_thousand_waiters_behind_it(
    redis_server: RedisServer, name: str, anyio_backend: tuple[str, Any]
) -> None:
    state, lateness = State(redis_server, name), Lateness()
    async with connect(redis_server, lease=LEASE) as redis, lateness.observed():
        semaphore = redis.semaphore(name)
        with Child(redis_server.url, name, lease=LEASE, backend=anyio_backend[0]) as child:
            await child.hear("ready")
            child.tell("hold")
            await child.hear("held")
            child.tell("wait", 1000)
            await until_async(lambda: len(state.waiters) == 1000)
            async with create_task_group() as tasks:
                tasks.start_soon(semaphore.acquire)
                await until_async(lambda: len(state.waiters) == 1001)
                start = time.monotonic()
                child.kill()
            assert time.monotonic() - start <= LEASE + SLACK + lateness.allowance
            semaphore.release()
            await redis.flush()
    assert state.is_unused


@pytest.mark.slow
async def test_a_holder_is_stopped_for_two_leases(
    redis_server: RedisServer, name: str, tmp_path: Path, anyio_backend: tuple[str, Any]
) -> None:
    path = tmp_path / "fenced"
    file, lateness = FencedFile(path), Lateness()
    async with connect(redis_server, lease=LEASE) as redis, lateness.observed():
        with Child(redis_server.url, name, lease=LEASE, backend=anyio_backend[0]) as child:
            await child.hear("ready")
            child.tell("hold", path)
            fence = int((await child.hear("held"))[0])
            assert file.write(fence, "first")
            start = time.monotonic()
            child.freeze()
            async with redis.semaphore(name).hold() as permit:
                assert time.monotonic() - start <= LEASE + SLACK + lateness.allowance
                assert permit.fence > fence
                assert file.write(permit.fence, "second")
                await sleep(start + 2 * LEASE - time.monotonic())
                resumed = time.monotonic()
                child.thaw()
                lost = float((await child.hear("lost"))[0])
                assert lost - resumed <= SLACK + lateness.allowance
                assert (await child.hear("wrote")) == ["False"]
                assert not permit.lost
    assert path.read_text().endswith("second")


@pytest.mark.slow
async def test_a_waiter_is_stopped_while_it_is_granted_a_permit(
    redis_server: RedisServer, name: str, anyio_backend: tuple[str, Any]
) -> None:
    """When it goes on, the message tells it of a permit that has passed on."""
    state, lateness = State(redis_server, name), Lateness()
    async with connect(redis_server, lease=LEASE) as redis, lateness.observed():
        semaphore = redis.semaphore(name)
        with Child(redis_server.url, name, lease=LEASE, backend=anyio_backend[0]) as child:
            await child.hear("ready")
            async with semaphore:
                child.tell("hold")
                await until_async(lambda: state.waiters)
                (waiter,) = state.waiters
                child.freeze()
            await redis.flush()
            start = time.monotonic()
            assert state.holders[0].startswith(waiter)
            async with semaphore.hold() as permit:
                assert time.monotonic() - start <= LEASE + SLACK + lateness.allowance
                child.thaw()
                await until_async(lambda: state.waiters)  # it has noticed
                assert not permit.lost
                released = time.monotonic()
            fence, entered = await child.hear("held")
            assert float(entered) >= released
            assert int(fence) > permit.fence


@pytest.mark.slow
async def test_the_event_loop_is_blocked_for_longer_than_a_lease(
    redis_server: RedisServer, name: str
) -> None:
    lateness = Lateness()
    async with connect(redis_server, lease=LEASE) as redis:
        semaphore = redis.semaphore(name)
        with pytest.raises(LeaseLost), fail_after(20):
            async with semaphore.hold() as permit:
                time.sleep(1.2 * LEASE)
                resumed = time.monotonic()
                async with lateness.observed():
                    await anyio.sleep_forever()
        assert permit.lost
        assert time.monotonic() - resumed <= SLACK + lateness.allowance
        await semaphore.acquire()
        time.sleep(1.2 * LEASE)
        await until_async(lambda: semaphore._calls.permits[0].lost)
        with pytest.raises(LeaseLost):
            semaphore.release()
        await redis.flush()
    assert State(redis_server, name).is_unused


@pytest.mark.slow
async def test_a_holder_that_the_server_takes_for_dead(
    redis_server: RedisServer, name: str
) -> None:
    """As after a jump of its clock."""
    state, lateness, inside = State(redis_server, name), Lateness(), Inside()
    async with (
        connect(redis_server, lease=LEASE) as redis,
        connect(redis_server, lease=LEASE) as other,
        lateness.observed(),
        create_task_group() as tasks,
    ):
        tasks.start_soon(inside.hold, redis.semaphore(name))
        await until_async(lambda: inside.now)
        (member,) = state.members
        redis_server.command("ZADD", f"{state.key}:members", 1, member)
        start = time.monotonic()
        async with other.semaphore(name).hold() as permit:
            assert permit.fence > inside.fences[0]
            await until_async(lambda: inside.lost)
            assert inside.lost[0] - start <= LEASE / 3 + SLACK + lateness.allowance
            await until_async(lambda: state.waiters)
            assert not permit.lost
        await until_async(lambda: inside.now)
        tasks.cancel_scope.cancel()


# --- the cable


@pytest.mark.slow
@pytest.mark.parametrize("direction", ["both", "to_server", "to_client"])
async def test_the_cable_is_cut(
    redis_server: RedisServer,
    proxy: SilentProxy,
    name: str,
    direction: Direction,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sent, lateness, inside = Sent(monkeypatch), Lateness(), Inside()
    far = Redis(proxy.url, lease=LEASE, restart_gate=False)
    near = connect(redis_server, lease=LEASE)
    async with far, lateness.observed(), create_task_group() as tasks:
        semaphore = far.semaphore(name)
        tasks.start_soon(inside.hold, semaphore)
        await until_async(lambda: inside.now)
        await sleep(0.4 * LEASE)  # so that there was a heartbeat
        proxy.cut(direction)
        cut_at = sent.answered
        await until_async(lambda: inside.lost)
        assert sent.answered == cut_at
        assert inside.lost[0] - cut_at <= 0.9 * LEASE + SLACK + lateness.allowance
        assert inside.lost[0] - cut_at >= 0.9 * LEASE - 0.01
        async with near:
            # The one at the other end of the cut cable enters later, and comes back.
            successor = near.semaphore(name)
            assert await successor.acquire(timeout=5)
            assert time.monotonic() > inside.lost[0]
            proxy.mend()
            await until_async(lambda: len(State(redis_server, name).waiters) == 1)
            successor.release()
            await until_async(lambda: inside.now)
        assert len(inside.lost) == 1
        tasks.cancel_scope.cancel()


@pytest.mark.slow
async def test_a_successor_that_waits_while_the_cable_is_cut_enters_after_the_loss(
    redis_server: RedisServer, proxy: SilentProxy, name: str
) -> None:
    inside, state = Inside(), State(redis_server, name)
    far = Redis(proxy.url, lease=LEASE, restart_gate=False)
    async with far, connect(redis_server, lease=LEASE) as near, create_task_group() as tasks:
        tasks.start_soon(inside.hold, far.semaphore(name))
        await until_async(lambda: inside.now)
        tasks.start_soon(inside.hold, near.semaphore(name))
        await until_async(lambda: state.waiters)
        proxy.cut()
        await until_async(lambda: len(inside.entered) == 2)
        assert inside.peak == 1
        assert inside.fences == sorted(inside.fences)
        proxy.mend()
        await until_async(lambda: state.waiters)
        tasks.cancel_scope.cancel()


@pytest.mark.slow
async def test_a_call_that_hangs_does_not_delay_the_loss(
    redis_server: RedisServer, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that lets everybody connect, and answers no call of a script."""
    sent, lateness, inside = Sent(monkeypatch), Lateness(), Inside()
    async with (
        connect(redis_server, lease=LEASE) as redis,
        lateness.observed(),
        create_task_group() as tasks,
    ):
        tasks.start_soon(inside.hold, redis.semaphore(name))
        await until_async(lambda: inside.now)
        await sleep(0.4 * LEASE)
        redis_server.command("CLIENT", "PAUSE", 60_000, "WRITE")
        try:
            answered = sent.answered
            await until_async(lambda: inside.lost)
        finally:
            redis_server.command("CLIENT", "UNPAUSE")
        assert sent.answered == answered
        assert inside.lost[0] - answered <= 0.9 * LEASE + SLACK + lateness.allowance
        await until_async(lambda: inside.now)  # recovers by itself
        tasks.cancel_scope.cancel()


@pytest.mark.slow
async def test_a_release_whose_answer_is_lost(
    redis_server: RedisServer, proxy: SilentProxy, name: str
) -> None:
    state = State(redis_server, name)
    async with Redis(proxy.url, lease=LEASE, restart_gate=False) as redis:
        semaphore = redis.semaphore(name)
        directions: list[Direction] = ["to_client", "to_server"]
        for direction in directions:
            await semaphore.acquire()
            await redis.flush()
            proxy.cut(direction)
            semaphore.release()
            async with create_task_group() as tasks:
                tasks.start_soon(redis.flush)
                await until_async(lambda: proxy.dropped)
                proxy.mend()
            assert state.is_unused
            assert await semaphore.acquire(timeout=5)
            assert len(state.holders) == 1
            semaphore.release()
            await redis.flush()


@pytest.mark.parametrize("direction", ["to_server", "to_client"])
@pytest.mark.slow
async def test_an_acquire_whose_answer_is_lost(
    redis_server: RedisServer, proxy: SilentProxy, name: str, direction: Direction
) -> None:
    state = State(redis_server, name)
    async with Redis(proxy.url, lease=LEASE, restart_gate=False) as redis:
        semaphore = redis.semaphore(name, 2)
        await semaphore.statistics()
        for _ in range(2):
            before = proxy.dropped
            proxy.cut(direction)
            async with create_task_group() as tasks:
                tasks.start_soon(semaphore.acquire)
                await until_async(lambda: proxy.dropped > before)  # noqa: B023
                proxy.mend()
        assert len(state.holders) == 2
        semaphore.release(2)
        await redis.flush()
        assert state.is_unused

        # The same, but nobody waits for the answer any more.
        proxy.cut(direction)
        before = proxy.dropped
        async with create_task_group() as tasks:
            tasks.start_soon(semaphore.acquire)
            await until_async(lambda: proxy.dropped > before)
            tasks.cancel_scope.cancel()
        proxy.mend()
        await redis.flush()
        await until_async(lambda: state.is_unused)


# --- the server


async def two_of_three(
    own_server: RedisServer,
    name: str,
    fault: Callable[[], object],
    again_within: float,
    **options: Any,
) -> Inside:
    """Have three processes share two permits while `fault` happens, and check what must hold."""
    inside, state = Inside(), State(own_server, name)
    objects = [connect(own_server, **{"lease": LEASE, **options}) for _ in range(3)]
    async with entered(*objects), create_task_group() as tasks:

        async def use(semaphore: DistributedSemaphore) -> None:
            while True:
                await inside.hold(semaphore, 0.05)

        # One holds for good, so that something is held while it happens.
        tasks.start_soon(inside.hold, objects[0].semaphore(name, 2))
        await until_async(lambda: inside.now)
        for redis in objects[1:]:
            tasks.start_soon(use, redis.semaphore(name, 2))
        await until_async(lambda: len(inside.entered) > 5)
        await anyio.to_thread.run_sync(fault)
        entries = len(inside.entered)
        with fail_after(again_within + SLACK + 2):
            await until_async(lambda: len(inside.entered) > entries + 5)
        tasks.cancel_scope.cancel()
    assert inside.peak == 2
    assert state.is_unused
    return inside


@pytest.mark.slow
@pytest.mark.parametrize("data", ["empty", "complete"])
async def test_the_server_is_killed_and_restarted(
    own_server: RedisServer, name: str, data: str
) -> None:
    lease = 3.0  # long enough for a restart on a busy machine
    inside = await two_of_three(
        own_server,
        name,
        lambda: own_server.restart(empty=data == "empty"),
        lease + 1,
        restart_gate=True,
        lease=lease,
    )
    assert not inside.lost


@pytest.mark.slow
async def test_the_server_is_restarted_with_an_old_state(
    own_server: RedisServer, name: str
) -> None:
    """In that state other permits are held, which nobody knows any more."""
    state = State(own_server, name)
    async with connect(own_server, lease=LEASE) as redis:
        semaphore = redis.semaphore(name, 2)
        await semaphore.acquire()
        await semaphore.acquire()
        old = state.holders
        copy = own_server.save_aof()
        semaphore.release(2)
        async with semaphore.hold() as permit:
            await anyio.to_thread.run_sync(own_server.restore_aof, copy)
            await until_async(lambda: state.holders != old)
            async with semaphore.hold(timeout=5) as other:
                assert other.fence > permit.fence
                assert not permit.lost
                assert len(state.holders) == 2
        await redis.flush()
        assert state.is_unused


@pytest.mark.slow
async def test_old_permits_of_other_processes_do_not_let_anybody_in(
    own_server: RedisServer, name: str
) -> None:
    copies: list[Path] = []

    def fault() -> None:
        time.sleep(0.3)
        own_server.restore_aof(copies[0])

    async with connect(own_server, lease=LEASE) as redis, redis.semaphore(name, 2):
        copies.append(own_server.save_aof())
    await two_of_three(own_server, name, fault, 2 * LEASE, restart_gate=True)


@pytest.mark.slow
async def test_the_server_is_frozen_for_one_and_a_half_leases(
    own_server: RedisServer, name: str
) -> None:
    def fault() -> None:
        own_server.freeze()
        time.sleep(1.5 * LEASE)
        own_server.thaw()

    inside = await two_of_three(own_server, name, fault, LEASE)
    assert inside.lost


@pytest.mark.slow
async def test_nobody_waits_for_a_frozen_server_without_need(
    own_server: RedisServer, name: str
) -> None:
    lateness = Lateness()
    async with lateness.observed(), connect(own_server, lease=3) as redis:
        semaphore = redis.semaphore(name, 2)
        await semaphore.acquire()
        async with semaphore:
            await redis.flush()
            own_server.freeze()
            start = time.monotonic()
        semaphore.release()
        with anyio.move_on_after(0.05):
            await semaphore.acquire()
        assert await semaphore.acquire(timeout=0.05) is False
        assert time.monotonic() - start <= 0.1 + SLACK + lateness.allowance
        start = time.monotonic()
        # Leaving tries for a third of a lease.
    assert time.monotonic() - start <= 1 + SLACK + lateness.allowance
    own_server.thaw()


@pytest.mark.slow
async def test_flushall_while_permits_are_held(own_server: RedisServer, name: str) -> None:
    inside, state = Inside(), State(own_server, name)
    async with connect(own_server, lease=LEASE) as redis, connect(own_server, lease=LEASE) as other:
        async with create_task_group() as tasks:
            tasks.start_soon(inside.hold, redis.semaphore(name))
            await until_async(lambda: inside.now)
            tasks.start_soon(inside.hold, other.semaphore(name), 0.05)
            await until_async(lambda: state.waiters)
            for _ in range(3):
                entries = len(inside.entered)
                own_server.command("FLUSHALL")
                await until_async(lambda: len(inside.entered) > entries)  # noqa: B023
            tasks.cancel_scope.cancel()
        # The last one may be lost, too.
        assert await other.semaphore(name).acquire(timeout=5)
        assert inside.fences == sorted(set(inside.fences))
        other.semaphore(name).release()


async def test_script_flush_is_not_noticed(
    redis_server: RedisServer, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with connect(redis_server, lease=LEASE) as redis:
        semaphore = redis.semaphore(name)
        for _ in range(3):
            async with semaphore:
                redis_server.command("SCRIPT", "FLUSH")
            await redis.flush()
            redis_server.command("SCRIPT", "FLUSH")
            assert (await semaphore.statistics()).held == 0
    assert not caplog.records


@pytest.mark.slow
async def test_waiters_keep_their_place_over_a_restart(own_server: RedisServer, name: str) -> None:
    state = State(own_server, name)
    served: list[int] = []
    objects = [connect(own_server, lease=LEASE, restart_gate=True) for _ in range(3)]

    async def take(i: int) -> None:
        async with objects[i % 3].semaphore(name):
            served.append(i)

    def waits(n: int) -> bool:
        return len(state.waiters) == n

    def restart() -> None:
        own_server.restart(empty=True)

    async with entered(*objects), create_task_group() as tasks:
        async with objects[0].semaphore(name).hold() as permit:
            for i in range(9):
                tasks.start_soon(take, i)
                await until_async(lambda i=i: waits(i + 1))  # type: ignore[misc]
            await anyio.to_thread.run_sync(restart)
            await until_async(lambda: waits(9))
            assert not permit.lost
        await until_async(lambda: len(served) == 9, 5)
    assert served == list(range(9))


@pytest.mark.slow
async def test_a_server_that_was_just_started_grants_nothing_for_a_lease(
    own_server: RedisServer, name: str
) -> None:
    lease, lateness = 4.0, Lateness()
    async with (
        connect(own_server, lease=lease, restart_gate=True) as gated,
        connect(own_server, lease=lease, restart_gate=False) as open_,
        lateness.observed(),
    ):
        start = time.monotonic()
        await anyio.to_thread.run_sync(partial(own_server.restart, empty=True))
        # The first to use a name decides.
        assert not (await open_.semaphore(name).statistics()).gated
        semaphore = gated.semaphore(name + "-gated")
        assert (await semaphore.statistics()).gated
        closed = time.monotonic()
        assert await semaphore.acquire(blocking=False) is False
        assert await semaphore.acquire(timeout=20)
        granted = time.monotonic()
        assert start + lease <= granted <= closed + lease + SLACK + lateness.allowance
        assert not (await semaphore.statistics()).gated
        semaphore.release()
        # Neither a name that is new now nor one that the server has forgotten is gated any more.
        await gated.flush()
        for key in State(own_server, semaphore.name).all_keys():
            own_server.command("DEL", key)
        for other in (gated.semaphore(name + "-new"), semaphore):
            start = time.monotonic()
            async with other.hold(timeout=5):
                assert time.monotonic() - start < lease / 2


# --- messages, audits


@pytest.mark.slow
async def test_a_lost_message_is_found_by_the_audit(
    redis_server: RedisServer, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    state, lateness = State(redis_server, name), Lateness()
    async with (
        connect(redis_server, lease=LEASE) as redis,
        connect(redis_server, lease=LEASE) as other,
        lateness.observed(),
    ):
        here, there, lost = redis.semaphore(name), other.semaphore(name), list[str]()
        monkeypatch.setattr(Permits, "take_message", lambda self, text: lost.append(text))
        await there.acquire()
        async with create_task_group() as tasks:
            tasks.start_soon(here.acquire)
            await until_async(lambda: state.waiters)
            there.release()
            await until_async(lambda: lost)
            start = time.monotonic()
        assert time.monotonic() - start <= LEASE / 3 + SLACK + lateness.allowance
        here.release()
        await redis.flush()
    assert state.is_unused


@pytest.mark.slow
async def test_a_permit_that_the_process_does_not_know_is_given_back_by_the_audit(
    redis_server: RedisServer, name: str
) -> None:
    state, lateness = State(redis_server, name), Lateness()
    async with connect(redis_server, lease=LEASE) as redis, lateness.observed():
        semaphore = redis.semaphore(name, 2)
        async with semaphore:
            (known,) = state.holders
            member = known.partition(":")[0]
            start = time.monotonic()
            redis_server.command("ZADD", f"{state.key}:holders", 0, f"{member}:999999:1")
            await until_async(lambda: state.holders == [known])
            assert time.monotonic() - start <= LEASE / 3 + SLACK + lateness.allowance


# --- no server, no permission


@pytest.mark.slow
async def test_no_server_for_too_long(own_server: RedisServer, name: str) -> None:
    async with connect(own_server, lease=LEASE, give_up=0.5) as redis:
        semaphore = redis.semaphore(name)
        async with semaphore:
            pass
        await redis.flush()
        own_server.kill()
        for call in (semaphore.acquire, semaphore.statistics, semaphore.hold().__aenter__):
            with pytest.raises(BackendUnavailable) as caught:
                await call()
            assert isinstance(caught.value.__cause__, Exception)
            assert not isinstance(caught.value.__cause__, BaseExceptionGroup)
        start = time.monotonic()
        with pytest.raises(BackendUnavailable):
            await semaphore.acquire(blocking=False)
        assert time.monotonic() - start < 0.5
        assert await semaphore.acquire(timeout=0.05) is False
        await anyio.to_thread.run_sync(own_server.start)
        assert await semaphore.acquire(timeout=10)
        semaphore.release()


@pytest.mark.slow
async def test_a_server_that_becomes_a_replica(own_server: RedisServer, name: str) -> None:
    async with connect(own_server, lease=LEASE, give_up=0.7) as redis:
        semaphore = redis.semaphore(name)
        async with semaphore:
            pass
        await redis.flush()
        own_server.command("REPLICAOF", "127.0.0.1", 1)
        before = own_server.calls("hello")
        start = time.monotonic()
        with fail_after(10), pytest.raises(BackendUnavailable) as caught:
            await semaphore.acquire()
        assert isinstance(caught.value.__cause__, Exception)
        assert time.monotonic() - start < 3
        assert own_server.calls("hello") - before < 15  # it backs off
        own_server.command("REPLICAOF", "NO", "ONE")
        assert await semaphore.acquire(timeout=10)
        semaphore.release()


async def test_a_user_who_may_not_use_the_keys_or_channels(
    server_program: ServerProgram, name: str
) -> None:
    users = {
        "keys": "on >secret ~other:* &* +@all",
        "channels": "on >secret ~* resetchannels +@all",
    }
    with RedisServer(server_program, users=users) as server:
        for user in users:
            redis = Redis(server.url_of(user, "secret"), lease=LEASE, restart_gate=False)
            with fail_after(10), pytest.raises(PermissionError):
                async with redis:
                    await redis.semaphore(name).acquire()


@pytest.mark.slow
async def test_the_least_that_a_user_must_be_allowed(
    server_program: ServerProgram, name: str
) -> None:
    commands = (
        "+hello +ping +info +script|load +evalsha +subscribe +unsubscribe +publish +time +del "
        "+hmget +hset +hdel +zadd +zrem +zcard +zscore +zrange +zrangebyscore +zrangebylex "
        "+zlexcount +zpopmin +pexpire +client"
    )
    users = {"ann": f"on >secret ~aiosync:* &aiosync:* {commands}"}
    with RedisServer(server_program, users=users) as server:
        redis = Redis(server.url_of("ann", "secret"), lease=LEASE, restart_gate=False)
        async with redis, create_task_group() as tasks, redis.semaphore(name).hold():
            tasks.start_soon(redis.semaphore(name).acquire)
            await until_async(lambda: State(server, name).waiters)
            await sleep(LEASE / 2)


# --- long and busy


@pytest.mark.slow
async def test_idle_for_several_leases_and_then_used(
    redis_server: RedisServer, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    lease = 0.9
    async with connect(redis_server, lease=lease) as redis:
        semaphore = redis.semaphore(name)
        async with semaphore:
            pass
        await redis.flush()
        session = redis._current.session
        assert session is not None
        link = session._servers[0].link
        commands = redis_server.calls("evalsha")
        await sleep(3 * lease)
        assert redis_server.calls("evalsha") == commands  # idle: no heartbeats
        async with semaphore.hold() as permit:
            await sleep(0.5 * lease)
            assert not permit.lost
        await semaphore.acquire()
        await sleep(3 * lease)
        semaphore.release()  # raises if it was lost
        await redis.flush()
        assert session._servers[0].link is link
    assert not caplog.records


@pytest.mark.slow
async def test_a_storm_of_two_processes(
    redis_server: RedisServer, name: str, anyio_backend: tuple[str, Any]
) -> None:
    state = State(redis_server, name)
    seconds, tasks = (60, 1000) if LONG else (3, 200)
    redis_server.command("DEL", "inside")
    with ExitStack() as stack:
        children = [
            stack.enter_context(
                Child(
                    redis_server.url,
                    name,
                    5,
                    lease=10 if LONG else 2,  # a thousand tasks are late
                    backend=anyio_backend[0],
                    counter=redis_server.unix_url,
                )
            )
            for _ in range(2)
        ]
        for child in children:
            await child.hear("ready")
        for seed, child in enumerate(children):
            child.tell("storm", seconds, tasks, seed)
        peaks = [int((await child.hear("stormed", seconds + 60))[0]) for child in children]
        await until_async(lambda: state.is_unused)
        for child in children:
            child.tell("end")
            await child.hear("ended")
    assert max(peaks) == 5
    assert int(redis_server.command("GET", "inside")) == 0
