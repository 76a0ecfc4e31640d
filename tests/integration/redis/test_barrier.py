"""A barrier on a server, under every event loop, in threads and in other processes."""

from __future__ import annotations

import asyncio
import copy
import math
import os
import pickle
import signal
import threading
from typing import TYPE_CHECKING, Any

import anyio
import pytest
from anyio import create_task_group, to_thread, wait_all_tasks_blocked
from anyio.lowlevel import checkpoint
from support.barrier_process import BarrierProcess
from support.helpers import InThread, until_async
from support.redis_barriers import CANCELLED, Party, all_done, entered, outcomes

from aiosync import BrokenBarrierError, as_threading
from aiosync.redis import BackendUnavailable, DistributedBarrierStatistics, Redis

if TYPE_CHECKING:
    from collections.abc import Callable

    from support.redis_servers import RedisServer

pytestmark = [pytest.mark.redis, pytest.mark.timeout(60)]
anyio_test = pytest.mark.anyio


# --- rounds


@anyio_test
async def test_indices_are_the_order_of_arrival(redis_server: RedisServer) -> None:
    async with entered(redis_server, 3) as all_, create_task_group() as tasks:
        a, b = all_.barriers
        for _ in range(3):
            parties = [Party(barrier) for barrier in (a, b, a)]
            await all_.arrive(tasks, *parties[:2])
            tasks.start_soon(parties[2])
            assert await all_done(*parties) == [0, 1, 2]


@anyio_test
async def test_many_rounds_give_each_index_once(redis_server: RedisServer) -> None:
    rounds: list[list[int]] = [[] for _ in range(20)]
    async with entered(redis_server, 4) as all_, create_task_group() as tasks:

        async def work(barrier: Any) -> None:
            for indices in rounds:
                indices.append(await barrier.wait())

        for barrier in all_.barriers * 2:
            tasks.start_soon(work, barrier)
    assert [sorted(indices) for indices in rounds] == [[0, 1, 2, 3]] * 20


@anyio_test
async def test_a_barrier_of_one_passes_at_once(redis_server: RedisServer) -> None:
    async with entered(redis_server, 1, 1) as all_:
        (barrier,) = all_.barriers
        assert [await barrier.wait() for _ in range(3)] == [0, 0, 0]
        assert not barrier.broken


@anyio_test
async def test_more_parties_than_a_batch_takes(redis_server: RedisServer) -> None:
    async with entered(redis_server, 600) as all_, create_task_group() as tasks:
        called: list[list[Party]] = [[], []]

        async def call(i: int) -> None:
            party = Party(all_.barriers[i])
            called[i].append(party)
            await party()

        for i in range(600):
            tasks.start_soon(call, i % 2)
        await until_async(lambda: sum(map(len, called)) == 600)
        indices: list[Any] = [await all_done(*parties) for parties in called]
        assert sorted(indices[0] + indices[1]) == list(range(600))
        assert [sorted(own) for own in indices] == indices  # in order within a process


@anyio_test
async def test_async_with(redis_server: RedisServer) -> None:
    async with entered(redis_server, 1, 1) as all_:
        async with all_.barriers[0] as index:
            assert index == 0
        with pytest.raises(TypeError, match="async with"):
            all_.barriers[0].__enter__()


@pytest.mark.slow
@anyio_test
async def test_processes_meet(
    redis_server: RedisServer, name: str, anyio_backend_name: str
) -> None:
    def run() -> None:
        children = [
            BarrierProcess(redis_server.url, name, 3, backend=anyio_backend_name) for _ in range(3)
        ]
        a, b, c = children
        try:
            for child in children:
                child.report("child")
            for child in children:
                child.tell("rounds", "rounds", 10)
            passed = [child.report("rounds").value for child in children]
            assert [sorted(indices) for indices in zip(*passed, strict=True)] == [[0, 1, 2]] * 10

            a.tell("wait", "w")
            b.tell("wait", "w")
            c.tell("abort", "abort")
            assert c.report("abort").what == "done"
            assert [child.report("w")[1:] for child in (a, b)] == [("broken", "aborted")] * 2

            b.tell("wait", "again")
            assert b.report("again").value == "aborted"
            b.tell("reset", "reset")
            b.report("reset")
            for child in children:
                child.tell("wait", "w")
            assert sorted(child.report("w").value for child in children) == [0, 1, 2]

            a.tell("wait", "w", 0.05)
            assert a.report("w")[1:] == ("broken", "timeout")
            b.tell("wait", "w")
            assert b.report("w")[1:] == ("broken", "timeout")

            b.tell("reset", "reset")
            b.report("reset")
            c.tell("wait_in_thread", "w")
            for child in (a, b):
                child.tell("wait", "w")
            assert sorted(child.report("w").value for child in children) == [0, 1, 2]
        finally:
            for child in children:
                child.__exit__()

    await to_thread.run_sync(run)


# --- timeouts


@anyio_test
@pytest.mark.parametrize("whose", ["wait", "barrier"])
async def test_a_timeout_breaks_the_barrier(redis_server: RedisServer, whose: str) -> None:
    timeout = 0.05 if whose == "barrier" else None
    async with entered(redis_server, 3, timeout=timeout) as all_, create_task_group() as tasks:
        a, b = all_.barriers
        other = Party(a, 30)
        await all_.arrive(tasks, other)
        party = Party(b, 0.05 if whose == "wait" else None)
        tasks.start_soon(party)
        assert await all_done(other, party) == ["timeout", "timeout"]
        assert party.error is not None
        assert (party.error.arrived, party.error.parties) == (2, 3)
        assert all_.name in str(party.error)
        await all_.flush()
        assert b.broken
        with pytest.raises(BrokenBarrierError) as caught:
            await b.wait()
        assert caught.value.reason == "timeout"


@anyio_test
@pytest.mark.parametrize("timeout", [0, -1, 1e-9])
async def test_no_time_breaks_unless_it_is_the_last(
    redis_server: RedisServer, timeout: float
) -> None:
    async with entered(redis_server, 2) as all_, create_task_group() as tasks:
        a, b = all_.barriers
        party = Party(a)
        await all_.arrive(tasks, party)
        assert await b.wait(timeout) == 1
        assert await all_done(party) == [0]
        with pytest.raises(BrokenBarrierError) as caught:
            await b.wait(timeout)
        assert caught.value.reason == "timeout"
        await all_.flush()
        assert b.broken


@anyio_test
async def test_out_of_time_when_all_have_come_passes(redis_server: RedisServer) -> None:
    done = anyio.Event()
    async with entered(redis_server, 2, action=done.wait) as all_, create_task_group() as tasks:
        a, b = all_.barriers
        first, last = Party(a, 0.05), Party(b)
        await all_.arrive(tasks, first)
        tasks.start_soon(last)
        await until_async(lambda: all_.field("status") == "acting")
        await anyio.sleep(0.1)  # longer than the timeout
        assert first.outcome is None
        done.set()
        assert await all_done(first, last) == [0, 1]


@anyio_test
async def test_infinite_timeout(redis_server: RedisServer) -> None:
    async with entered(redis_server, 1, 1) as all_:
        assert await all_.barriers[0].wait(math.inf) == 0


# --- cancellation


@anyio_test
async def test_cancelled_breaks_the_round(redis_server: RedisServer) -> None:
    async with entered(redis_server, 3) as all_, create_task_group() as tasks:
        a, b = all_.barriers
        parties = [Party(a), Party(b)]
        await all_.arrive(tasks, *parties)
        parties[0].scope.cancel()
        assert await all_done(*parties) == [CANCELLED, "cancelled"]
        assert parties[1].error is not None
        assert parties[1].error.arrived == 2


@anyio_test
async def test_cancelled_when_all_have_come_lets_the_others_pass(
    redis_server: RedisServer,
) -> None:
    done = anyio.Event()
    async with entered(redis_server, 3, action=done.wait) as all_, create_task_group() as tasks:
        a, b = all_.barriers
        parties = [Party(a), Party(b), Party(b)]
        await all_.arrive(tasks, *parties[:2])
        tasks.start_soon(parties[2])
        await until_async(lambda: all_.field("status") == "acting")
        parties[0].scope.cancel()
        assert await all_done(parties[0]) == [CANCELLED]
        await all_.flush()
        done.set()
        assert await all_done(*parties) == [CANCELLED, 1, 2]


@pytest.mark.stress
@anyio_test
@pytest.mark.parametrize("native", [False, True])
@pytest.mark.parametrize("is_last", [False, True])
async def test_cancelled_at_every_moment_of_a_wait(
    redis_server: RedisServer, anyio_backend_name: str, native: bool, is_last: bool
) -> None:
    """The other party passes or is told, and the barrier is usable again after a reset."""
    if native and anyio_backend_name != "asyncio":
        pytest.skip("trio has no other cancellation")
    async with entered(redis_server, 2) as all_:
        a, b = all_.barriers
        seen = set()
        for steps in [*range(1, 12), *range(12, 150, 12)]:
            victim, other = Party(a), Party(b)
            async with create_task_group() as tasks:
                if is_last:
                    await all_.arrive(tasks, other)
                task = asyncio.create_task(victim()) if native else None
                if task is None:
                    tasks.start_soon(victim)
                for _ in range(steps):
                    await checkpoint()
                if task is None:
                    victim.scope.cancel()
                else:
                    task.cancel()
                    await asyncio.wait([task])
                await all_done(victim)
                await all_.redis[0].flush()
                if not is_last:
                    other.timeout = 0
                    tasks.start_soon(other)
                elif all_.n_arrived():  # the victim had not come yet
                    other.scope.cancel()
                await all_done(other)
            seen.add(str(victim.outcome))
            expected = {
                # (victim, other)
                (CANCELLED, 0),
                (CANCELLED, "cancelled"),
                (CANCELLED, "timeout"),
                (CANCELLED, CANCELLED),
                (1, 0),
            }
            assert (victim.outcome, other.outcome) in expected
            if other.outcome == 0:
                assert is_last
            b.reset()
            await all_.flush()
            assert all_.n_arrived() == 0
        assert CANCELLED in seen
        await all_.check_works()


@anyio_test
@pytest.mark.parametrize("how", ["cancel", "timeout"])
@pytest.mark.parametrize("moment", ["before the call", "before the reply"])
async def test_leaves_while_the_arrival_is_on_its_way(
    redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch, moment: str, how: str
) -> None:
    """Exact moments: the task of the session stands still before and after it calls the server."""
    from aiosync.redis._link import Link

    at, go_on = anyio.Event(), anyio.Event()
    call = Link.call

    async def held(self: Link, *arguments: Any) -> Any:
        is_arrival = "a" in arguments[2] and armed
        if is_arrival and moment == "before the call":
            at.set()
            await go_on.wait()
        reply = await call(self, *arguments)
        if is_arrival and moment == "before the reply":
            at.set()
            await go_on.wait()
        return reply

    monkeypatch.setattr(Link, "call", held)
    armed = False
    for is_last in (False, True):
        at, go_on = anyio.Event(), anyio.Event()
        async with entered(redis_server, 2) as all_, create_task_group() as tasks:
            a, b = all_.barriers
            other = Party(b)
            if is_last:
                await all_.arrive(tasks, other)
            armed = True
            victim = Party(a, 0.02 if how == "timeout" else None)
            tasks.start_soon(victim)
            await at.wait()
            if how == "cancel":
                victim.scope.cancel()
                await all_done(victim)
            else:
                await anyio.sleep(0.05)
            armed = False
            go_on.set()
            if not is_last:
                await all_.redis[0].flush()
                tasks.start_soon(other)
            await all_done(victim, other)
            if is_last:
                assert outcomes([victim, other]) == [CANCELLED if how == "cancel" else 1, 0]
            else:
                reason = "cancelled" if how == "cancel" else "timeout"
                assert outcomes([victim, other]) == [
                    CANCELLED if how == "cancel" else "timeout",
                    reason,
                ]


@anyio_test
async def test_cancelled_before_it_has_begun(redis_server: RedisServer) -> None:
    async with entered(redis_server, 2, 1) as all_, create_task_group() as tasks:
        (barrier,) = all_.barriers
        party = Party(barrier)
        party.scope.cancel()
        tasks.start_soon(party)
        assert await all_done(party) == [CANCELLED]
        await all_.flush()
        assert not all_.n_arrived()
        assert not barrier.broken
        await all_.check_works()


# --- abort and reset


@anyio_test
async def test_abort_and_reset(redis_server: RedisServer) -> None:
    async with entered(redis_server, 3) as all_, create_task_group() as tasks:
        a, b = all_.barriers
        parties = [Party(a), Party(b)]
        await all_.arrive(tasks, *parties)
        a.abort()
        assert await all_done(*parties) == ["aborted", "aborted"]
        assert (a.broken, b.broken) == (True, True)
        a.abort()  # again: nothing more
        await all_.flush()  # or else it may reach the server after the reset of the other
        with pytest.raises(BrokenBarrierError, match=r"aborted.*reset\(\)"):
            await b.wait()
        b.reset()
        await b.statistics()
        assert not b.broken
        await until_async(lambda: not a.broken)
        await all_.check_works()


@anyio_test
async def test_reset_with_and_without_parties(redis_server: RedisServer) -> None:
    async with entered(redis_server, 3) as all_, create_task_group() as tasks:
        a, b = all_.barriers
        a.reset()
        await all_.flush()
        assert not a.broken
        await all_.check_works()
        parties = [Party(a), Party(b)]
        await all_.arrive(tasks, *parties)
        b.reset()
        assert await all_done(*parties) == ["reset", "reset"]
        await all_.flush()
        assert not a.broken
        assert not b.broken
        await all_.check_works()


@pytest.mark.slow
@anyio_test
async def test_plain_calls_are_in_order_with_own_waits(redis_server: RedisServer) -> None:
    """As if each call were made at once: the last party decides what became of the first."""
    async with entered(redis_server, 2, 1) as all_, create_task_group() as tasks:
        (barrier,) = all_.barriers
        parties = [Party(barrier) for _ in range(6)]
        order: list[Callable[[], object]] = [
            lambda: tasks.start_soon(parties[0]),
            barrier.abort,
            lambda: tasks.start_soon(parties[1]),
            barrier.reset,
            lambda: tasks.start_soon(parties[2]),
            barrier.reset,
            lambda: tasks.start_soon(parties[3]),
            lambda: tasks.start_soon(parties[4]),
            lambda: tasks.start_soon(parties[5]),
            barrier.abort,
        ]
        for step in order:
            step()
            await wait_all_tasks_blocked()
        assert (await all_done(*parties))[:3] == ["aborted", "aborted", "reset"]
        assert sorted(map(str, outcomes(parties[3:]))) == ["0", "1", "aborted"]


@anyio_test
async def test_properties_and_statistics(redis_server: RedisServer) -> None:
    async with entered(redis_server, 3) as all_, create_task_group() as tasks:
        a, b = all_.barriers
        assert (a.parties, a.name) == (3, all_.name)
        assert (a.n_waiting, a.broken) == (0, False)
        assert repr(a) == f"<aiosync.redis.DistributedBarrier {all_.name!r} parties=3>"
        party = Party(a)
        await all_.arrive(tasks, party)
        assert await b.statistics() == DistributedBarrierStatistics(3, 1, False, 2)
        assert b.n_waiting == 1
        await until_async(lambda: a.n_waiting == 1)
        b.abort()
        assert await b.statistics() == DistributedBarrierStatistics(3, 0, True, 2)
        assert (b.n_waiting, b.broken) == (0, True)
        assert await all_done(party) == ["aborted"]
        assert (a.n_waiting, a.broken) == (0, True)


# --- action


@anyio_test
@pytest.mark.parametrize("is_async", [False, True])
async def test_the_action_is_run_once_by_the_last_before_anybody_passes(
    redis_server: RedisServer, is_async: bool
) -> None:
    log: list[str] = []

    async def act_async() -> None:
        await anyio.sleep(0.01)
        act()

    def act() -> None:
        assert all(party.outcome is None for party in parties)
        log.append("action")

    action = act_async if is_async else act
    async with entered(redis_server, 3, action=action) as all_, create_task_group() as tasks:
        a, b = all_.barriers
        for _ in range(2):
            parties = [Party(a), Party(b), Party(a)]
            await all_.arrive(tasks, *parties[:2])
            tasks.start_soon(parties[2])
            assert await all_done(*parties) == [0, 1, 2]
    assert log == ["action", "action"]


@anyio_test
async def test_only_the_action_of_the_last_to_arrive_is_run(redis_server: RedisServer) -> None:
    log: list[str] = []
    async with (
        entered(redis_server, 2) as all_,
        create_task_group() as tasks,
        Redis(redis_server.url) as redis,
    ):
        other = redis.barrier(all_.name, 2, lambda: log.append("other"))
        party = Party(other)
        await all_.arrive(tasks, party)
        assert await all_.barriers[0].wait() == 1
        assert await all_done(party) == [0]
        assert log == []
        party = Party(all_.barriers[0])
        await all_.arrive(tasks, party)
        assert await other.wait() == 1
        assert await all_done(party) == [0]
        assert log == ["other"]


@anyio_test
@pytest.mark.parametrize("is_async", [False, True])
async def test_an_action_that_raises(redis_server: RedisServer, is_async: bool) -> None:
    error = LookupError("action")

    async def fail_async() -> None:
        await checkpoint()
        raise error

    def fail() -> None:
        raise error

    action = fail_async if is_async else fail
    async with entered(redis_server, 2, action=action) as all_, create_task_group() as tasks:
        a, b = all_.barriers
        party = Party(a)
        await all_.arrive(tasks, party)
        with pytest.raises(LookupError) as caught:
            await b.wait()
        assert caught.value is error
        assert await all_done(party) == ["action"]
        await all_.flush()
        assert a.broken
        assert b.broken


@anyio_test
async def test_cancelled_while_it_runs_the_action(redis_server: RedisServer) -> None:
    async with (
        entered(redis_server, 2, action=anyio.sleep_forever) as all_,
        create_task_group() as tasks,
    ):
        a, b = all_.barriers
        parties = [Party(a), Party(b)]
        await all_.arrive(tasks, parties[0])
        tasks.start_soon(parties[1])
        await until_async(lambda: all_.field("status") == "acting")
        parties[1].scope.cancel()
        assert await all_done(*parties) == ["action", CANCELLED]


@anyio_test
async def test_a_newcomer_while_the_action_runs_joins_the_next_round(
    redis_server: RedisServer,
) -> None:
    done = anyio.Event()
    async with entered(redis_server, 2, action=lambda: done.wait()) as all_:
        a, b = all_.barriers
        async with create_task_group() as tasks:
            parties = [Party(a), Party(b)]
            newcomers = [Party(a), Party(b), Party(b, 0.05)]
            await all_.arrive(tasks, parties[0])
            tasks.start_soon(parties[1])
            await until_async(lambda: all_.field("status") == "acting")
            for newcomer in newcomers:
                tasks.start_soon(newcomer)
            # It has not arrived, so being out of time breaks nothing for the others.
            assert await all_done(newcomers[2]) == ["timeout"]
            await all_.flush()
            assert all_.n_arrived() == 2
            assert outcomes([*parties, *newcomers[:2]]) == [None] * 4
            done.set()
            assert await all_done(*parties) == [0, 1]
            assert sorted(map(str, await all_done(*newcomers[:2]))) == ["0", "1"]


@anyio_test
@pytest.mark.parametrize("end", ["abort", "reset"])
async def test_abort_and_reset_while_the_action_runs(redis_server: RedisServer, end: str) -> None:
    done = anyio.Event()
    async with entered(redis_server, 2, action=lambda: done.wait()) as all_:
        a, b = all_.barriers
        async with create_task_group() as tasks:
            parties = [Party(a), Party(b)]
            newcomer = Party(a)
            await all_.arrive(tasks, parties[0])
            tasks.start_soon(parties[1])
            await until_async(lambda: all_.field("status") == "acting")
            tasks.start_soon(newcomer)
            await all_.redis[0].flush()
            getattr(a, end)()
            reason = "aborted" if end == "abort" else "reset"
            assert await all_done(parties[0]) == [reason]
            assert parties[1].outcome is None  # runs the action still
            if end == "abort":
                assert await all_done(newcomer) == ["aborted"]
            else:
                await until_async(lambda: all_.n_arrived() == 1)
            done.set()
            assert await all_done(parties[1]) == [reason]
            if end == "reset":
                tasks.start_soon(Party(b))
                assert await all_done(newcomer) == [0]


# --- arguments


@anyio_test
async def test_other_settings_elsewhere(redis_server: RedisServer) -> None:
    async with entered(redis_server, 2, 1) as all_:
        await all_.barriers[0].statistics()
        async with Redis(redis_server.url) as redis:
            barrier = redis.barrier(all_.name, 3)
            with pytest.raises(ValueError, match=r"parties=2, lease=10 s there; parties=3") as got:
                await barrier.wait()
            assert all_.name in str(got.value)
            with pytest.raises(ValueError, match="other settings"):
                await barrier.statistics()
            barrier.abort()
            with pytest.raises(ValueError, match="other settings"):
                await barrier.statistics()
        async with Redis(redis_server.url, lease=5) as redis:
            barrier = redis.barrier(all_.name, 2)
            with pytest.raises(ValueError, match=r"lease=10 s there; parties=2, lease=5 s here"):
                await barrier.wait()
        assert not (await all_.barriers[0].statistics()).broken


@anyio_test
async def test_other_arguments_here(redis_server: RedisServer, name: str) -> None:
    redis = Redis(redis_server.url)
    barrier = redis.barrier(name, 2, print, timeout=1)
    assert redis.barrier(name, 2, print, timeout=1.0) is barrier
    for parties, action, timeout in [(3, print, 1), (2, None, 1), (2, print, 2), (2, print, None)]:
        with pytest.raises(ValueError, match=f"barrier '{name}' was created with other arguments"):
            redis.barrier(name, parties, action, timeout=timeout)


@anyio_test
async def test_wrong_arguments(redis_server: RedisServer, name: str) -> None:
    redis = Redis(redis_server.url)
    for parties in (0, -1):
        with pytest.raises(ValueError, match="parties"):
            redis.barrier(name, parties)
    wrong: Any
    for wrong in (2.0, "2", None):
        with pytest.raises(TypeError):
            redis.barrier(name, wrong)
    wrong = 1
    with pytest.raises(TypeError, match="action must be callable"):
        redis.barrier(name, 2, wrong)
    with pytest.raises(TypeError, match="name must be a str"):
        redis.barrier(wrong, 2)
    for bad in ("", "}x"):
        with pytest.raises(ValueError, match="name"):
            redis.barrier(bad, 2)
    wrong = "1"
    with pytest.raises(TypeError):
        redis.barrier(name, 2, timeout=wrong)
    with pytest.raises(ValueError, match=r"NaN|nan"):
        redis.barrier(name, 2, timeout=math.nan)
    async with redis:
        barrier = redis.barrier(name, 2)
        with pytest.raises(TypeError):
            await barrier.wait(wrong)
        with pytest.raises(ValueError, match=r"NaN|nan"):
            await barrier.wait(math.nan)
        assert (await barrier.statistics()).waiting == 0
        for copied in (copy.copy, copy.deepcopy, pickle.dumps):
            with pytest.raises(TypeError):
                copied(barrier)


@anyio_test
async def test_not_entered(redis_server: RedisServer, name: str) -> None:
    redis = Redis(redis_server.url)
    barrier = redis.barrier(name, 1)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="not entered"):
            await barrier.wait()
        with pytest.raises(RuntimeError, match="not entered"):
            await barrier.statistics()
        plain: list[Callable[[], object]] = [
            barrier.abort,
            barrier.reset,
            lambda: barrier.n_waiting,
            lambda: barrier.broken,
        ]
        for call in plain:
            with pytest.raises(RuntimeError, match="not entered"):
                call()
        assert barrier.parties == 1
        async with redis:
            assert await barrier.wait() == 0


# --- the end of the session


@anyio_test
async def test_closed_while_parties_wait(redis_server: RedisServer) -> None:
    async with entered(redis_server, 4, 1) as all_, create_task_group() as tasks:
        other = Party(all_.barriers[0])
        await all_.arrive(tasks, other)
        async with Redis(redis_server.url) as redis:
            party = Party(redis.barrier(all_.name, 4))
            await all_.arrive(tasks, party)
        assert isinstance((await all_done(party))[0], BackendUnavailable)
        assert await all_done(other) == ["cancelled"]


@anyio_test
async def test_closed_while_the_action_runs(redis_server: RedisServer) -> None:
    done = anyio.Event()
    async with entered(redis_server, 2, 1) as all_, create_task_group() as tasks:
        other = Party(all_.barriers[0])
        await all_.arrive(tasks, other)
        async with Redis(redis_server.url) as redis:
            party = Party(redis.barrier(all_.name, 2, done.wait))
            tasks.start_soon(party)
            await until_async(lambda: all_.field("status") == "acting")
        assert await all_done(other) == ["action"]
        done.set()
        (outcome,) = await all_done(party)
        assert isinstance(outcome, BackendUnavailable) or outcome == "action"


@anyio_test
async def test_plain_calls_are_sent_before_the_end(redis_server: RedisServer) -> None:
    async with entered(redis_server, 2, 1) as all_, create_task_group() as tasks:
        party = Party(all_.barriers[0])
        await all_.arrive(tasks, party)
        async with Redis(redis_server.url) as redis:
            redis.barrier(all_.name, 2).abort()  # nobody keeps the object
        assert await all_done(party) == ["aborted"]


@anyio_test
async def test_an_object_that_nobody_keeps_is_made_again(redis_server: RedisServer) -> None:
    """Two of them, one after the other, have something to say on the same name."""
    async with (
        entered(redis_server, 2, 1) as all_,
        create_task_group() as tasks,
        Redis(redis_server.url) as redis,
    ):
        for _ in range(20):
            redis.barrier(all_.name, 2).abort()
            redis.barrier(all_.name, 2).reset()
        party = Party(redis.barrier(all_.name, 2))
        await all_.arrive(tasks, party)
        await redis.flush()
        assert await all_.barriers[0].wait(5) == 1
        assert await all_done(party) == [0]


# --- threads and other event loops


@pytest.mark.slow
@anyio_test
async def test_tasks_threads_and_processes_in_one_round(
    redis_server: RedisServer, anyio_backend_name: str
) -> None:
    async with entered(redis_server, 4) as all_, create_task_group() as tasks:
        child = await to_thread.run_sync(
            lambda: BarrierProcess(redis_server.url, all_.name, 4, backend=anyio_backend_name)
        )
        try:
            await to_thread.run_sync(child.report, "child")
            for _ in range(3):
                party = Party(all_.barriers[1])
                tasks.start_soon(party)
                threads = [InThread(as_threading(b).wait) for b in all_.barriers]
                child.tell("wait", "w")
                report = await to_thread.run_sync(child.report, "w")
                await all_done(party)
                indices: list[Any] = [report.value, party.outcome]
                indices += [await to_thread.run_sync(thread.result) for thread in threads]
                assert sorted(indices) == [0, 1, 2, 3]
        finally:
            child.__exit__()


@anyio_test
async def test_the_view_for_threads(redis_server: RedisServer) -> None:
    log: list[int] = []
    async with entered(
        redis_server, 2, 1, action=lambda: log.append(threading.get_ident())
    ) as all_:
        (barrier,) = all_.barriers
        view = as_threading(barrier)
        with pytest.raises(RuntimeError, match="event loop"):
            view.wait()

        def run() -> None:
            assert (view.parties, view.n_waiting, view.broken) == (2, 0, False)
            with pytest.raises(BrokenBarrierError) as caught:
                view.wait(0.02)
            assert caught.value.reason == "timeout"
            assert view.statistics().broken
            view.reset()
            threads = [InThread(view.wait), InThread(view.wait)]
            assert sorted(str(thread.result()) for thread in threads) == ["0", "1"]
            (acted_in,) = log
            assert acted_in != threading.get_ident()
            waiting = InThread(view.wait)
            while view.statistics().waiting == 0:
                pass
            view.abort()
            error = waiting.result()
            assert isinstance(error, BrokenBarrierError)
            assert error.reason == "aborted"
            assert view.broken

        await to_thread.run_sync(run)


@anyio_test
async def test_a_thread_cannot_run_an_async_action(redis_server: RedisServer) -> None:
    async with entered(redis_server, 2, action=lambda: anyio.sleep(0.01)) as all_:
        a, b = all_.barriers
        async with create_task_group() as tasks:
            party = Party(a)
            await all_.arrive(tasks, party)
            thread = InThread(as_threading(b).wait)
            assert await all_done(party) == ["action"]
            assert isinstance(await to_thread.run_sync(thread.result), RuntimeError)


@pytest.mark.parametrize("other", [False, True])
def test_ctrl_c_in_a_waiting_thread(redis_server: RedisServer, name: str, other: bool) -> None:
    """The round is broken for the others, or the barrier for those to come."""
    with Redis(redis_server.url) as redis:
        view = as_threading(redis.barrier(name, 3))
        thread = InThread(view.wait) if other else None
        n = 2 if other else 1

        def interrupt() -> None:
            key = f"aiosync:{{{name}}}:barrier:arrivals"
            while redis_server.command("HLEN", key) < n:
                pass
            os.kill(os.getpid(), signal.SIGINT)

        interrupter = InThread(interrupt)
        with pytest.raises(KeyboardInterrupt):
            view.wait()
        interrupter.result()
        if thread is not None:
            error = thread.result()
            assert isinstance(error, BrokenBarrierError)
            assert error.reason == "cancelled"
        with pytest.raises(BrokenBarrierError):
            view.wait()
        view.reset()
        threads = [InThread(view.wait) for _ in range(3)]
        assert sorted(str(thread.result()) for thread in threads) == ["0", "1", "2"]


@anyio_test
@pytest.mark.parametrize("backend", ["asyncio", "trio"])
async def test_another_event_loop_waits(redis_server: RedisServer, backend: str) -> None:
    async with entered(redis_server, 2, 1, action=checkpoint) as all_:
        (barrier,) = all_.barriers

        async def elsewhere() -> list[object]:
            indices: list[object] = [await barrier.wait() for _ in range(5)]
            with pytest.raises(BrokenBarrierError):
                await barrier.wait(0.02)
            barrier.reset()
            await barrier.statistics()
            with anyio.move_on_after(0.02):
                await barrier.wait()
            return indices

        thread = InThread(lambda: anyio.run(elsewhere, backend=backend))
        indices = [await barrier.wait() for _ in range(5)]
        others: Any = await to_thread.run_sync(thread.result)
        assert [a + b for a, b in zip(indices, others, strict=True)] == [1] * 5
        await all_.flush()
        await until_async(lambda: barrier.broken)


# --- the server


@anyio_test
@pytest.mark.parametrize(("parties", "n", "most"), [(2, 2, 2.0), (2, 1, 2.0), (100, 2, 6.0)])
async def test_commands_of_a_round(
    redis_server: RedisServer, parties: int, n: int, most: float
) -> None:
    rounds = 20
    async with entered(redis_server, parties, n, lease=600) as all_:

        async def work(barrier: Any) -> None:
            for _ in range(rounds):
                await barrier.wait()

        async def run() -> None:
            async with create_task_group() as tasks:
                for index in range(parties):
                    tasks.start_soon(work, all_.barriers[index % n])

        await run()
        before = redis_server.calls("evalsha")
        await run()
        assert redis_server.calls("evalsha") - before <= most * rounds


@anyio_test
async def test_all_keys_expire_at_any_time(redis_server: RedisServer) -> None:
    async with entered(redis_server, 2, action=checkpoint) as all_, create_task_group() as tasks:
        a, b = all_.barriers

        async def check() -> None:
            await all_.flush()
            for key in redis_server.command("KEYS", f"*{all_.name}*"):
                left = redis_server.command("PTTL", key)
                assert 0 < left <= 100_000, key

        async def fail() -> None:
            with pytest.raises(BrokenBarrierError):
                await b.wait(0)

        for _ in range(2):
            await check()
            party = Party(a)
            await all_.arrive(tasks, party)
            await check()
            await b.wait()
            await all_done(party)
            await check()
            await fail()
            await check()
            a.reset()
            await check()
            party = Party(a)
            await all_.arrive(tasks, party)
            a.reset()
            await check()
            a.abort()
            await check()
            a.reset()
            await check()
        assert len(redis_server.command("KEYS", f"*{all_.name}*")) == 4  # nobody waits now


@anyio_test
async def test_taken_for_an_older_connection(redis_server: RedisServer) -> None:
    """It connects again, until its connection counts as the newest."""
    async with entered(redis_server, 2, 1) as all_, create_task_group() as tasks:
        (barrier,) = all_.barriers
        party = Party(barrier)
        await all_.arrive(tasks, party)
        (member,) = redis_server.command("ZRANGE", all_.key(":members"), 0, 0)
        epoch = int(all_.field(f"epoch:{member.decode()}"))
        redis_server.command("HSET", all_.key(), b"epoch:" + member, epoch + 5)
        assert await barrier.wait(10) == 1
        assert await all_done(party) == [0]


@anyio_test
async def test_the_server_forgets_scripts(redis_server: RedisServer) -> None:
    async with entered(redis_server, 2) as all_, create_task_group() as tasks:
        a, b = all_.barriers
        party = Party(a)
        await all_.arrive(tasks, party)
        redis_server.command("SCRIPT", "FLUSH")
        assert await b.wait() == 1
        assert await all_done(party) == [0]
