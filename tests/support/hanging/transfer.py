"""Two transfers between the same accounts, in opposite directions."""

import anyio

from aiosync import Semaphore

accounts = {name: Semaphore(name=f"account {name}") for name in ("alice", "bob", "carol")}


async def transfer(source: str, target: str) -> None:
    async with accounts[source]:
        await anyio.sleep(0.05)
        async with accounts[target]:  # in another order than the other transfer
            pass


async def main() -> None:
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(transfer, "alice", "bob", name="alice pays bob")
        tasks.start_soon(transfer, "bob", "alice", name="bob pays alice")
        tasks.start_soon(transfer, "carol", "alice", name="carol pays alice")


if __name__ == "__main__":
    import sys

    anyio.run(main, backend=sys.argv[1])
