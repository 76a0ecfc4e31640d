"""A program that uses one semaphore. It is told what to do by lines of its standard input.

Started by `support.permits.Child`. The first word of each line that it prints says what happened.
Times are those of `time.monotonic`, which all processes of a machine share.
"""

from __future__ import annotations

import json
import random
import sys
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio
import anyio.to_thread
from anyio import create_task_group, move_on_after, sleep, sleep_forever

sys.path.insert(0, str(Path(__file__).parents[1]))

from aiosync.redis import LeaseLost, Redis
from support.permits import FencedFile
from support.resp import RespClient

if TYPE_CHECKING:
    from aiosync.redis import DistributedSemaphore


def say(*words: object) -> None:
    print(*words, flush=True)


class Program:
    def __init__(self, semaphore: DistributedSemaphore, settings: dict[str, Any]) -> None:
        self.semaphore = semaphore
        self.settings = settings

    async def hold(self, path: str = "") -> None:
        """Hold a permit until "kill" or a loss. With a path: write to that fenced file then."""
        permit = None
        try:
            async with self.semaphore.hold() as permit:
                say("held", permit.fence, time.monotonic())
                await sleep_forever()
        except LeaseLost:
            say("lost", time.monotonic())
        if path and permit is not None:
            say("wrote", FencedFile(Path(path)).write(permit.fence, "stale"))

    async def wait(self, n: str) -> None:
        async with create_task_group() as tasks:
            for _ in range(int(n)):
                tasks.start_soon(self.semaphore.acquire)

    async def work(self, rounds: str) -> None:
        """Count the holders, on the server at `counter`."""
        with RespClient(self.settings["counter"]) as counter:
            peak = 0
            for _ in range(int(rounds)):
                async with self.semaphore:
                    peak = max(peak, counter.command("INCR", "inside"))
                    await sleep(0.001)
                    counter.command("DECR", "inside")
        say("worked", peak)

    async def storm(self, seconds: str, n: str, seed: str) -> None:
        """Run many tasks that take permits, run out of time and are cancelled."""
        rng = random.Random(int(seed))
        end = time.monotonic() + float(seconds)
        peak = 0

        async def take(counter: RespClient) -> None:
            nonlocal peak
            while time.monotonic() < end:
                with move_on_after(rng.choice([0.001, 0.01, 0.1, 1])):
                    how = rng.randrange(3)
                    if how == 0:
                        async with self.semaphore:
                            peak = max(peak, counter.command("INCR", "inside"))
                            try:
                                await sleep(rng.uniform(0, 0.01))
                            finally:
                                counter.command("DECR", "inside")
                    elif await self.semaphore.acquire(
                        timeout=rng.choice([None, 0, 0.001, 0.05]) if how == 1 else 0.2
                    ):
                        try:
                            peak = max(peak, counter.command("INCR", "inside"))
                            try:
                                await sleep(rng.uniform(0, 0.01))
                            finally:
                                counter.command("DECR", "inside")
                        finally:
                            self.semaphore.release()
                await sleep(0)

        with RespClient(self.settings["counter"]) as counter:
            async with create_task_group() as tasks:
                for _ in range(int(n)):
                    tasks.start_soon(take, counter)
        say("stormed", peak)


async def main(settings: dict[str, Any]) -> None:
    redis = Redis(
        settings["url"], lease=settings.get("lease", 10.0), restart_gate=settings.get("gate", False)
    )
    async with redis, create_task_group() as tasks:
        program = Program(redis.semaphore(settings["name"], settings["value"]), settings)
        say("ready")
        while line := await anyio.to_thread.run_sync(
            partial(sys.stdin.readline), abandon_on_cancel=True
        ):
            command, *arguments = line.split()
            if command == "end":
                break
            tasks.start_soon(getattr(program, command), *arguments)
        tasks.cancel_scope.cancel()
    say("ended")


if __name__ == "__main__":
    _settings = json.loads(sys.argv[1])
    anyio.run(main, _settings, backend=_settings.get("backend", "asyncio"))
