"""What the commands of aiosync cost a server: its CPU time, and its memory.

What must live here: the loads that are measured for `benchmarks.simulation`. CPU time does not
depend on what else the machine does, unlike the time of a clock.
"""

from __future__ import annotations

import statistics
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial

import anyio

from aiosync.redis import DistributedSemaphore, Redis

from ..capacity import BEATS, Costs, Load, predict
from ..loops import crowd, run
from ._redis_locks import ours
from ._redis_server import memory_of_clients, new_name, scripts_run, server, used_memory

# As from many processes: the server finds the commands of several when it looks.
CONNECTIONS = 20


def cpu_time() -> float:
    """Return how many seconds of CPU time the main thread of the server has used."""
    info = server().info("cpu")
    return float(info["used_cpu_user_main_thread"]) + float(info["used_cpu_sys_main_thread"])


@asynccontextmanager
async def _connections(count: int, lease: float = 60.0) -> AsyncIterator[list[Redis]]:
    async with AsyncExitStack() as stack:
        yield [await stack.enter_async_context(ours(server().url, lease)) for _ in range(count)]


async def _per_command(work: Callable[[], Awaitable[object]]) -> float:
    """Return the microseconds that the server spends on each command of aiosync in `work`."""
    commands, seconds = scripts_run(), cpu_time()
    await work()
    return (cpu_time() - seconds) / (scripts_run() - commands) * 1e6


async def _pairs(semaphore: DistributedSemaphore, times: int) -> None:
    for _ in range(times):
        await semaphore.acquire()
        semaphore.release()


async def _in_crowd(semaphores: list[DistributedSemaphore], times: int) -> None:
    async with crowd() as spawn:
        for semaphore in semaphores:
            spawn(partial(_pairs, semaphore, times))


async def _pair_cost(connections: int, same_name: bool, times: int) -> float:
    name = new_name()
    async with _connections(connections) as redis:
        semaphores = [one.semaphore(name if same_name else new_name(), 1) for one in redis]
        await _in_crowd(semaphores, 2)
        return await _per_command(partial(_in_crowd, semaphores, times))


async def _batched_cost(tasks: int, times: int) -> float:
    """Return the microseconds of each pair where commands carry many."""
    async with _connections(1) as (redis,):
        semaphore = redis.semaphore(new_name(), tasks)
        await _in_crowd([semaphore], 2)
        seconds = cpu_time()
        await _in_crowd([semaphore] * tasks, times)
        return (cpu_time() - seconds) / (tasks * times) * 1e6


async def _heartbeat_cost(names: int, lease: float, seconds: float) -> float:
    async with _connections(CONNECTIONS, lease) as redis:
        held = [one.semaphore(new_name()) for one in redis for _ in range(names)]
        async with crowd() as spawn:
            for semaphore in held:
                spawn(semaphore.acquire)
        return await _per_command(partial(anyio.sleep, seconds))


async def _memory_costs(names: int, tasks: int) -> dict[str, float]:
    """Return the bytes of a name, a member, a holder and a waiter."""
    before = memory_of_clients()
    async with _connections(CONNECTIONS) as redis:

        async def growth(work: Callable[[], Awaitable[object]], count: int) -> float:
            before = used_memory()
            await work()
            return (used_memory() - before) / count

        async def use(connections: list[Redis]) -> None:
            async with crowd() as spawn:
                for one in connections:
                    for key in keys:
                        spawn(one.semaphore(key, limit).acquire)

        keys, limit = [new_name() for _ in range(names)], CONNECTIONS + tasks
        first = await growth(partial(use, redis[:1]), names)
        # Fewer: one process runs all of these connections.
        keys, few = keys[: len(keys) // 10], names // 10
        others = await growth(partial(use, redis[1:]), few * (CONNECTIONS - 1))
        semaphore = redis[0].semaphore(keys[0], limit)

        async def hold() -> None:
            async with crowd() as spawn:
                for _ in range(tasks):
                    spawn(semaphore.acquire)

        holder = await growth(hold, tasks)
        async with crowd() as spawn:
            cancels: list[Callable[[], object]] = []

            async def wait() -> None:
                cancels.extend(spawn(semaphore.acquire) for _ in range(tasks))
                while (await semaphore.statistics()).waiting < tasks:
                    pass

            waiter = await growth(wait, tasks)
            connection = (memory_of_clients() - before) / CONNECTIONS
            for cancel in cancels:
                cancel()
    return {
        "connection": connection,
        "name": first - holder,
        "member": others - holder,
        "holder": holder,
        "waiter": waiter,
    }


def measure(scale: float = 1.0, rounds: int = 5) -> Costs:
    """Return the costs on a server of our own.

    :param scale: less than 1 measures for a shorter time
    :param rounds: how often each time is measured; the median counts
    """
    times = max(2, round(100 * scale))
    heartbeat = partial(_heartbeat_cost, max(2, round(12 * scale)), 4.0, max(1.5, 4 * scale))
    works: dict[str, Callable[[], Awaitable[float]]] = {
        "heartbeat": heartbeat,
        "pair": partial(_pair_cost, CONNECTIONS, False, times),
        "batched": partial(_batched_cost, 200, times),
        # Commands that each give the permit to another process.
        "hand_off": partial(_pair_cost, 10, True, times),
    }
    bytes_of = partial(_memory_costs, max(10, round(1000 * scale)), max(100, round(3000 * scale)))
    memory = run("asyncio", bytes_of)
    samples: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(rounds):
        for name, work in works.items():
            samples[name].append(run("asyncio", work))
    medians = {name: statistics.median(found) for name, found in samples.items()}
    return Costs(**medians, **memory)


async def _under(load: Load, seconds: float) -> tuple[float, float]:
    """Return the commands a second under `load`, and the part of its time the server is busy."""
    async with _connections(load.processes, load.lease) as redis:
        keys = [new_name() for _ in range(load.names)]
        limit = load.processes * load.holders
        async with crowd() as spawn:
            for one in redis:
                for key in keys:
                    for _ in range(load.holders):
                        spawn(one.semaphore(key, limit).acquire)
        await anyio.sleep(load.lease / BEATS)
        commands, cpu, begin = scripts_run(), cpu_time(), anyio.current_time()
        await anyio.sleep(seconds)
        seconds = anyio.current_time() - begin
        return (scripts_run() - commands) / seconds, (cpu_time() - cpu) / seconds


def verify(costs: Costs, seconds: float = 6.0) -> Iterator[str]:
    """Put a load on the server, and yield what was predicted beside what was counted."""
    load = Load(names=50, processes=10, waiters=0, holders=2, lease=3.0)
    predicted = predict(load, costs)
    commands, share = run("asyncio", partial(_under, load, seconds))
    yield f"Verified with {load}:"
    yield f"    commands a second: predicted {predicted.heartbeats:,.0f}, counted {commands:,.0f}"
    yield f"    busy: predicted {predicted.share:.2%}, measured {share:.2%}"
