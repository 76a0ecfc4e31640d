"""Each request borrows a connection, and then calls a helper that borrows another one."""

import anyio

from aiosync import ConnectionPool

pool: ConnectionPool[object] = ConnectionPool(object, max_size=2, timeout=None, name="database")


async def handle(request: int) -> None:
    async with pool.connection():
        await anyio.sleep(0.05)
        await audit(request)


async def audit(request: int) -> None:
    async with pool.connection():  # while its caller has one
        pass


async def main() -> None:
    async with pool, anyio.create_task_group() as tasks:
        for request in range(3):
            tasks.start_soon(handle, request, name=f"request {request}")


if __name__ == "__main__":
    import sys

    anyio.run(main, backend=sys.argv[1])
