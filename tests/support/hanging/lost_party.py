"""A worker waits for a file while another one, which has it open, waits for the worker."""

import anyio

from aiosync import Barrier, Semaphore

files = Semaphore(1, name="open files")
phase = Barrier(2, name="end of phase")


async def careless() -> None:
    await phase.wait()
    async with files:
        await phase.wait()  # with a file open


async def careful() -> None:
    await phase.wait()
    await anyio.sleep(0.05)
    async with files:
        pass
    await phase.wait()


async def main() -> None:
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(careless, name="careless worker")
        tasks.start_soon(careful, name="careful worker")


if __name__ == "__main__":
    import sys

    anyio.run(main, backend=sys.argv[1])
