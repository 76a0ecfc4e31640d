"""A worker returns early and forgets its permit. A thread waits for it."""

import threading

import anyio
import anyio.to_thread

from aiosync import Semaphore, as_threading

slots = Semaphore(1, name="upload slots")


async def upload(size: int) -> None:
    await slots.acquire()
    if size == 0:
        return  # without a release
    slots.release()


def report() -> None:
    with as_threading(slots):
        pass


async def main() -> None:
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(upload, 0, name="upload of nothing")
    thread = threading.Thread(target=report, name="reporter", daemon=True)
    thread.start()
    while thread.is_alive():
        await anyio.sleep(0.05)


if __name__ == "__main__":
    import sys

    anyio.run(main, backend=sys.argv[1])
