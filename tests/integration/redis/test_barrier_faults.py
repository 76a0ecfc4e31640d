"""A barrier on a server, and what can go wrong: processes, cables, replies, messages, servers.

`test_arrivals` has the exact moments, with calls carried by hand; here all is real.
"""

from __future__ import annotations

import random
import time
from secrets import token_hex
from typing import TYPE_CHECKING, Any

import anyio
import pytest
from anyio import create_task_group, to_thread
from support.barrier_process import BarrierProcess
from support.barrier_storm import Entry, check
from support.helpers import until_async
from support.redis_barriers import CANCELLED, Barriers, Party, all_done, entered, outcomes
from support.redis_servers import RedisServer
from support.silent_proxy import SilentProxy

from aiosync.redis import BackendUnavailable
from aiosync.redis._arrivals import Arrivals

if TYPE_CHECKING:
    from anyio.abc import TaskGroup
    from support.silent_proxy import Direction

pytestmark = [pytest.mark.redis, pytest.mark.timeout(60), pytest.mark.anyio]

LEASE = 1.0
# Of a loaded machine, on top of what must be.
SLACK = 0.1


async def usable_again(all_: Barriers) -> None:
    """After a reset, a round of all processes works as in a new barrier."""
    all_.barriers[-1].reset()
    with anyio.fail_after(20):
        while True:
            try:
                await all_.redis[-1].flush()
                break
            except BackendUnavailable:  # not connected again yet
                await anyio.sleep(0.01)
    n = all_.barriers[0].parties
    parties = [Party(all_.barriers[i % len(all_.barriers)], 30) for i in range(n)]
    async with create_task_group() as tasks:
        for party in parties:
            tasks.start_soon(party)
    assert sorted(map(str, outcomes(parties))) == list(map(str, range(n)))


def is_unknown(outcome: object) -> bool:
    return isinstance(outcome, BackendUnavailable) and "may have passed" in str(outcome)


# --- processes


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["waits", "acts"])
async def test_a_process_is_killed(
    redis_server: RedisServer, victim: str, anyio_backend_name: str
) -> None:
    lease = 2.0
    n = 3 if victim == "acts" else 4
    async with entered(redis_server, n, lease=lease) as all_, create_task_group() as tasks:
        child = await to_thread.run_sync(
            lambda: BarrierProcess(
                redis_server.url,
                all_.name,
                n,
                lease=lease,
                action="hang",
                backend=anyio_backend_name,
            )
        )
        try:
            await to_thread.run_sync(child.report, "child")
            await kill(all_, tasks, child, victim, lease)
        finally:
            child.__exit__()


async def kill(
    all_: Barriers, tasks: TaskGroup, child: BarrierProcess, victim: str, lease: float
) -> None:
    parties = [Party(barrier) for barrier in all_.barriers]
    await all_.arrive(tasks, *parties)
    child.tell("wait", "w")
    if victim == "acts":
        await to_thread.run_sync(child.report, "action")
    else:
        await all_.wait_arrived(3)
    await anyio.sleep(0.3 * lease)  # at some moment between two heartbeats
    child.kill()
    start = time.monotonic()
    assert await all_done(*parties) == ["lost", "lost"]
    assert time.monotonic() - start <= lease + SLACK
    error = parties[0].error
    assert error is not None
    assert error.arrived == 3


# --- cables


@pytest.mark.slow
@pytest.mark.parametrize("direction", ["both", "to_server", "to_client"])
@pytest.mark.parametrize("acts", [False, True])
async def test_a_cable_is_cut(
    redis_server: RedisServer, proxy: SilentProxy, direction: Direction, acts: bool
) -> None:
    done = anyio.Event()
    async with (
        entered(
            redis_server,
            3 if acts else 4,
            3,
            done.wait,
            url=proxy.url,
            lease=LEASE,
            give_up=2 * LEASE,
        ) as all_,
        create_task_group() as tasks,
    ):
        cut, b, c = all_.barriers
        parties = [Party(b), Party(c), Party(cut)]
        await all_.arrive(tasks, *parties[:2])
        tasks.start_soon(parties[2])
        await all_.wait_arrived(3)
        await until_async(lambda: not acts or done.statistics().tasks_waiting == 1)
        proxy.cut(direction)
        start = time.monotonic()
        assert await all_done(*parties[:2]) == ["lost", "lost"]
        # What is sent before the loss is noticed may still arrive.
        most = LEASE * (4 / 3 if direction == "to_client" else 1)
        assert time.monotonic() - start <= most + 2 * SLACK
        done.set()
        (outcome,) = await all_done(parties[2])
        assert outcome == "lost" or is_unknown(outcome)
        proxy.mend()
        await usable_again(all_)


@pytest.mark.slow
async def test_a_cable_is_cut_for_a_moment(redis_server: RedisServer, proxy: SilentProxy) -> None:
    """For less than a lease, so nobody notices."""
    async with (
        entered(redis_server, 2, url=proxy.url, lease=2 * LEASE) as all_,
        create_task_group() as tasks,
    ):
        party = Party(all_.barriers[0])
        await all_.arrive(tasks, party)
        proxy.cut()
        await anyio.sleep(0.3 * LEASE)
        proxy.mend()
        assert await all_.barriers[1].wait() == 1
        assert await all_done(party) == [0]


@pytest.mark.slow
async def test_cancelled_and_out_of_time_without_a_connection(
    redis_server: RedisServer, proxy: SilentProxy
) -> None:
    async with (
        entered(redis_server, 5, url=proxy.url, lease=LEASE) as all_,
        create_task_group() as tasks,
    ):
        cut, other = all_.barriers
        parties = [Party(cut), Party(cut, 1.0), Party(other)]
        await all_.arrive(tasks, *parties)
        proxy.cut()
        proxy.close_all()
        parties[0].scope.cancel()
        late = Party(cut, 0.05)
        tasks.start_soon(late)
        for outcome in await all_done(parties[1], late):
            assert isinstance(outcome, BackendUnavailable)
        assert is_unknown(parties[1].outcome)
        assert await all_done(parties[0]) == [CANCELLED]
        proxy.mend()
        (reason,) = await all_done(parties[2])
        assert reason in {"cancelled", "timeout", "lost"}
        await usable_again(all_)


# --- replies


async def lose(proxy: SilentProxy, what: str, happened: Any) -> None:
    """Lose what is now sent, or the reply to it, and with it the connection."""
    if what == "request":
        before = proxy.dropped
        proxy.cut("to_server")
        await until_async(lambda: proxy.dropped > before)
    else:
        proxy.cut("to_client")
        await until_async(happened)
    proxy.mend()
    proxy.close_all()


@pytest.mark.parametrize("what", ["request", "reply"])
@pytest.mark.parametrize("is_last", [False, True])
async def test_an_arrival_or_its_reply_is_lost(
    redis_server: RedisServer, proxy: SilentProxy, what: str, is_last: bool
) -> None:
    async with entered(redis_server, 2, url=proxy.url) as all_, create_task_group() as tasks:
        a, b = all_.barriers
        party, other = Party(a), Party(b)
        await a.statistics()
        if is_last:
            await all_.arrive(tasks, other)
        n = all_.n_arrived()
        tasks.start_soon(party)
        await lose(proxy, what, lambda: all_.n_arrived() != n)
        if not is_last:
            await all_.redis[0].flush()
            assert all_.n_arrived() == 1
            tasks.start_soon(other)
        assert await all_done(party, other) == ([1, 0] if is_last else [0, 1])
        assert all_.n_arrived() == 0


@pytest.mark.parametrize("what", ["request", "reply"])
async def test_a_leave_or_its_reply_is_lost(
    redis_server: RedisServer, proxy: SilentProxy, what: str
) -> None:
    async with entered(redis_server, 3, url=proxy.url) as all_, create_task_group() as tasks:
        parties = [Party(barrier) for barrier in all_.barriers]
        await all_.arrive(tasks, *parties)
        await all_.redis[0].flush()
        parties[0].scope.cancel()
        await lose(proxy, what, lambda: all_.field("status") == "broken")
        assert await all_done(*parties) == [CANCELLED, "cancelled"]
        await usable_again(all_)


@pytest.mark.parametrize("what", ["request", "reply"])
@pytest.mark.parametrize("fails", [False, True])
async def test_the_end_of_an_action_or_its_reply_is_lost(
    redis_server: RedisServer, proxy: SilentProxy, what: str, fails: bool
) -> None:
    done = anyio.Event()
    log = []

    async def act() -> None:
        log.append("action")
        await done.wait()
        if fails:
            raise LookupError

    async with (
        entered(redis_server, 2, 2, act, url=proxy.url) as all_,
        create_task_group() as tasks,
    ):
        a, b = all_.barriers
        actor, other = Party(a), Party(b)
        await all_.arrive(tasks, other)
        tasks.start_soon(actor)
        await until_async(lambda: bool(log))
        done.set()
        await lose(proxy, what, lambda: all_.field("status") != "acting")
        outcome, others = await all_done(actor, other)
        if fails:
            assert isinstance(outcome, LookupError)
            assert others == "action"
        else:
            assert [outcome, others] == [1, 0]
        assert log == ["action"]


@pytest.mark.parametrize("what", ["request", "reply"])
@pytest.mark.parametrize("call", ["abort", "reset"])
async def test_an_abort_or_reset_or_its_reply_is_lost(
    redis_server: RedisServer, proxy: SilentProxy, what: str, call: str
) -> None:
    """It is done once: it does not break a later round."""
    async with entered(redis_server, 2, url=proxy.url) as all_, create_task_group() as tasks:
        a, b = all_.barriers
        party = Party(b)
        await all_.arrive(tasks, party)
        await a.statistics()
        getattr(a, call)()
        if what == "request":
            await lose(proxy, what, None)
            assert await all_done(party) == ["aborted" if call == "abort" else "reset"]
            return
        proxy.cut("to_client")
        assert await all_done(party) == ["aborted" if call == "abort" else "reset"]
        b.reset()
        later = Party(b)
        await all_.redis[1].flush()
        await all_.arrive(tasks, later)
        proxy.mend()
        proxy.close_all()
        await all_.flush()
        assert later.outcome is None
        assert await a.wait() == 1
        assert await all_done(later) == [0]


# --- messages


@pytest.mark.slow
async def test_messages_are_lost(
    redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The audit finds the end of a round within a third of a lease."""
    monkeypatch.setattr(Arrivals, "take_message", lambda self, message: None)
    lease = 1.5
    async with entered(redis_server, 2, lease=lease) as all_, create_task_group() as tasks:
        a, b = all_.barriers
        for end in ("trip", "abort"):
            party = Party(a)
            await all_.arrive(tasks, party)
            start = time.monotonic()
            if end == "trip":
                assert await b.wait() == 1
                assert await all_done(party) == [0]
            else:
                b.abort()
                assert await all_done(party) == ["aborted"]
            assert time.monotonic() - start <= lease / 3 + SLACK


# --- servers


@pytest.mark.slow
@pytest.mark.parametrize("acts", [False, True])
@pytest.mark.parametrize("comes_back", ["empty", "with its data", "old", "frozen"])
async def test_the_server_is_gone_for_a_while(
    own_server: RedisServer, comes_back: str, acts: bool
) -> None:
    done = anyio.Event()
    async with (
        entered(own_server, 2 if acts else 3, 2, lambda: done.wait(), lease=LEASE) as all_,
        create_task_group() as tasks,
    ):
        a, b = all_.barriers
        done.set()
        await usable_again(all_)
        done = anyio.Event()
        copy = await to_thread.run_sync(own_server.save_aof)
        parties = [Party(a), Party(b)]
        await all_.arrive(tasks, parties[0])
        tasks.start_soon(parties[1])
        await all_.wait_arrived(2)
        await until_async(lambda: not acts or done.statistics().tasks_waiting == 1)
        match comes_back:
            case "empty":
                await to_thread.run_sync(lambda: own_server.restart(empty=True))
            case "with its data":
                await to_thread.run_sync(lambda: own_server.restart(empty=False))
            case "old":
                await to_thread.run_sync(own_server.restore_aof, copy)
            case _:
                own_server.freeze()
                await anyio.sleep(1.5 * LEASE)
                own_server.thaw()
        done.set()
        for outcome in await all_done(*parties):
            assert outcome == "lost" or is_unknown(outcome)
        await usable_again(all_)
        await usable_again(all_)


@pytest.mark.slow
async def test_the_server_stays_away(own_server: RedisServer) -> None:
    """Parties that wait, and those that come, are told after `give_up`."""
    async with (
        entered(own_server, 4, lease=LEASE, give_up=0.5) as all_,
        create_task_group() as tasks,
    ):
        a, b = all_.barriers
        parties = [Party(a), Party(b)]
        await all_.arrive(tasks, *parties)
        await to_thread.run_sync(own_server.kill)
        late = Party(a)
        tasks.start_soon(late)
        for outcome in await all_done(*parties, late):
            assert isinstance(outcome, BackendUnavailable)
            assert outcome.__cause__ is not None
        with pytest.raises(BackendUnavailable):
            await a.statistics()
        await to_thread.run_sync(own_server.start)
        await usable_again(all_)


@pytest.mark.slow
@pytest.mark.parametrize("acts", [False, True])
async def test_the_server_forgets_everything(redis_server: RedisServer, acts: bool) -> None:
    done = anyio.Event()
    async with (
        entered(redis_server, 2 if acts else 3, 2, lambda: done.wait(), lease=LEASE) as all_,
        create_task_group() as tasks,
    ):
        parties = [Party(barrier) for barrier in all_.barriers]
        await all_.arrive(tasks, parties[0])
        tasks.start_soon(parties[1])
        await all_.wait_arrived(2)
        await until_async(lambda: not acts or done.statistics().tasks_waiting == 1)
        redis_server.command("FLUSHALL")
        done.set()
        assert await all_done(*parties) == ["lost", "lost"]
        await usable_again(all_)


# --- all at once


@pytest.mark.slow
@pytest.mark.parametrize("faults", [False, True])
@pytest.mark.parametrize("action", [None, "run"])
async def test_storm(
    redis_server: RedisServer,
    proxy: SilentProxy,
    faults: bool,
    action: str | None,
    anyio_backend_name: str,
) -> None:
    name, parties, seconds, tasks = token_hex(8), 5, 3.0, 20

    def run() -> int:
        children = [
            BarrierProcess(
                proxy.url if faults and not i else redis_server.url,
                name,
                parties,
                lease=LEASE if faults else 10.0,
                action=action,
                backend=anyio_backend_name,
            )
            for i in range(2)
        ]
        try:
            for child in children:
                child.report("child")
            for seed, child in enumerate(children):
                child.tell("storm", "storm", seed, seconds, tasks)
            end = time.monotonic() + seconds
            rng = random.Random(0)
            while time.monotonic() < end:
                time.sleep(rng.uniform(0.02, 0.3))
                if faults:
                    if rng.random() < 0.5:
                        proxy.cut(rng.choice(["to_server", "to_client", "both"]))
                        time.sleep(rng.uniform(0, 0.1))
                        proxy.mend()
                    proxy.close_all()
            reports = [child.report("storm", 30).value for child in children]
        finally:
            for child in children:
                child.__exit__()
        entries = [Entry(*entry) for report in reports for entry in report]
        return check(entries, parties, faults=faults)

    assert await to_thread.run_sync(run) > 10
