"""A function that takes a lock calls another one that takes it too."""

import anyio

from aiosync import Semaphore

cache_lock = Semaphore(name="cache lock")
cache: dict[str, str] = {}


async def load(key: str) -> str:
    async with cache_lock:
        if key not in cache:
            await store(key, key.upper())
        return cache[key]


async def store(key: str, value: str) -> None:
    async with cache_lock:  # its caller has the lock already
        cache[key] = value


async def main() -> None:
    async with anyio.create_task_group() as tasks:
        for key in ("a", "b", "c"):
            tasks.start_soon(load, key, name=f"load {key}")


if __name__ == "__main__":
    import sys

    anyio.run(main, backend=sys.argv[1])
