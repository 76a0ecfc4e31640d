"""Processes whose tasks wait at a barrier on a server, as a test tells them line by line.

`BarrierProcess` is the end of the test. The rest of the file is what the child runs.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import anyio
from anyio import to_thread

if TYPE_CHECKING:
    from typing import Self

# Seconds until something that a child does at once has happened.
DEADLINE = 30.0


class Report(NamedTuple):
    """What became of a wait, or another word of a child."""

    tag: str
    """Which wait it is about."""
    what: str
    """"passed", "broken", "cancelled", "acting", "done", or the name of an exception."""
    value: Any = None
    """The index, or the reason."""


class BarrierProcess:
    """A child process that has entered a `Redis`. Use it as a context manager.

    :param url: of the server
    :param name: of the barrier
    :param action: None, "hang" (for ever) or "run" (at once); reports "acting"
    :param backend: "asyncio" or "trio"
    """

    def __init__(
        self,
        url: str,
        name: str,
        parties: int,
        *,
        lease: float = 10.0,
        action: str | None = None,
        backend: str = "asyncio",
    ) -> None:
        options = {
            "url": url,
            "name": name,
            "parties": parties,
            "lease": lease,
            "action": action,
            "backend": backend,
        }
        self.reports: list[tuple[float, Report]] = []
        self._changed = threading.Condition()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "support.barrier_process", json.dumps(options)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[1],
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._reader.join()
        self._process.stdin.close()
        self._process.stdout.close()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            with self._changed:
                self.reports.append((time.monotonic(), Report(*json.loads(line))))
                self._changed.notify_all()

    def tell(self, *words: object) -> None:
        """Tell the child to do something; see `_Child`."""
        assert self._process.stdin is not None
        self._process.stdin.write(" ".join(map(str, words)) + "\n")
        self._process.stdin.flush()

    def report(self, tag: str, seconds: float = DEADLINE) -> Report:
        """Wait for the next report about `tag`, and remove it."""
        return self.timed_report(tag, seconds)[1]

    def timed_report(self, tag: str, seconds: float = DEADLINE) -> tuple[float, Report]:
        """Do the same, and return when it came."""
        found: list[tuple[float, Report]] = []

        def find() -> bool:
            found[:] = [item for item in self.reports if item[1].tag == tag][:1]
            return bool(found)

        with self._changed:
            assert self._changed.wait_for(find, seconds), f"no report about {tag}"
            self.reports.remove(found[0])
        return found[0]

    def kill(self) -> None:
        """End the process at once."""
        self._process.kill()
        self._process.wait()


class _Child:
    """What the child does. The commands are its public methods, each in a task of its own."""

    def __init__(self, options: dict[str, Any]) -> None:
        from aiosync.redis import Redis

        self.redis = Redis(options["url"], lease=options["lease"])
        action = {"hang": self._hang, "run": self._act}.get(options["action"])
        self.barrier = self.redis.barrier(options["name"], options["parties"], action)
        self._scopes: dict[str, anyio.CancelScope] = {}

    async def _hang(self) -> None:
        self._say("action", "acting")
        await anyio.sleep_forever()

    def _act(self) -> None:
        self._say("action", "acting")

    def _say(self, tag: str, what: str, value: object = None) -> None:
        sys.stdout.write(json.dumps([tag, what, value]) + "\n")
        sys.stdout.flush()

    async def wait(self, tag: str, timeout: str = "") -> None:
        from aiosync import BrokenBarrierError

        with anyio.CancelScope() as scope:
            self._scopes[tag] = scope
            try:
                index = await self.barrier.wait(float(timeout) if timeout else None)
            except BrokenBarrierError as error:
                self._say(tag, "broken", error.reason)
            except Exception as error:
                self._say(tag, type(error).__name__, str(error))
            else:
                self._say(tag, "passed", index)
        if scope.cancelled_caught:
            self._say(tag, "cancelled")

    async def wait_in_thread(self, tag: str) -> None:
        from aiosync import as_threading

        wait = as_threading(self.barrier).wait
        self._say(tag, "passed", await to_thread.run_sync(wait))

    async def cancel(self, tag: str) -> None:
        self._scopes[tag].cancel()

    async def abort(self, tag: str) -> None:
        self.barrier.abort()
        await self.flush(tag)

    async def reset(self, tag: str) -> None:
        self.barrier.reset()
        await self.flush(tag)

    async def flush(self, tag: str) -> None:
        await self.redis.flush()
        self._say(tag, "done")

    async def rounds(self, tag: str, n: str) -> None:
        """Pass `n` rounds; say which indices."""
        self._say(tag, "passed", [await self.barrier.wait() for _ in range(int(n))])

    async def storm(self, tag: str, seed: str, seconds: str, tasks: str) -> None:
        """Wait, cancel, abort and reset at random; say what became of each wait."""
        from support.barrier_storm import Storm

        entries = await Storm(self.barrier, int(seed)).run(float(seconds), int(tasks))
        await self.redis.flush()
        self._say(tag, "done", entries)

    async def run(self) -> None:
        async with self.redis, anyio.create_task_group() as tasks:
            self._say("child", "done")
            while line := await to_thread.run_sync(sys.stdin.readline, abandon_on_cancel=True):
                command, *arguments = line.split()
                tasks.start_soon(getattr(self, command), *arguments)
            tasks.cancel_scope.cancel()


if __name__ == "__main__":
    _options = json.loads(sys.argv[1])
    anyio.run(_Child(_options).run, backend=_options["backend"])
