"""A program with a pool of PostgreSQL connections that count against a limit of several processes.

It is told what to do by lines of its standard input: "work n" has n tasks use the pool, "rest" ends
them, and any other word does nothing. It answers each with a line of JSON: how often a connection
was borrowed since the last answer, which errors there were, and how many connections there are.
"""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

from aiosync import PoolEvent
from aiosync.recipes import asyncpg_pool
from aiosync.redis import Redis

LIMIT = 8
# Long enough for three processes to start on a busy machine.
LEASE = 2.0


class Program:
    def __init__(self) -> None:
        self.loans = 0
        self.errors: list[str] = []
        self.tasks: list[asyncio.Task[None]] = []
        self.rests = False

    def take_note(self, event: PoolEvent) -> None:
        if event.kind == "connect_failed":
            self.errors.append(repr(event.error))

    async def use(self, pool: Any) -> None:
        while not self.rests:
            try:
                async with pool.connection() as connection:
                    await connection.fetchval("SELECT pg_sleep(0.01)")
            except Exception as error:
                self.errors.append(repr(error))
            self.loans += 1
            await asyncio.sleep(0.02)

    async def obey(self, pool: Any, command: str, n: str = "0") -> None:
        if command == "work":
            self.rests = False
            self.tasks = [asyncio.create_task(self.use(pool)) for _ in range(int(n))]
        elif command == "rest":
            self.rests = True
            await asyncio.gather(*self.tasks)
        facts = {"loans": self.loans, "errors": self.errors, "size": pool.statistics().size}
        print(json.dumps(facts), flush=True)
        self.loans, self.errors = 0, []


async def main(url: str, host: str, name: str) -> None:
    program = Program()
    arguments = {
        "host": host,
        "user": "postgres",
        "database": "postgres",
        "server_settings": {"application_name": name},
    }
    redis = Redis(url, lease=LEASE)
    limit = redis.semaphore("connections", LIMIT)
    options: dict[str, Any] = {"max_size": 10, "limit": limit, "on_event": program.take_note}
    async with redis, asyncpg_pool(kwargs=arguments, **options) as pool:
        while command := await asyncio.to_thread(sys.stdin.readline):
            await program.obey(pool, *command.split())


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
