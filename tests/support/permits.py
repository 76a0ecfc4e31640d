"""What tests of distributed semaphores look at from the side: the server, and other processes."""

from __future__ import annotations

import itertools
import json
import os
import queue
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio
import anyio.to_thread
from anyio import create_task_group

from aiosync.redis import Redis

from . import watchdog

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from typing import Self

    from .redis_servers import RedisServer

# Seconds until something that happens at once must have happened.
PATIENCE = 20.0

_numbers = itertools.count(1)


def new_name() -> str:
    """Return a name that no other test uses."""
    return f"test-{os.getpid()}-{next(_numbers)}"


def connect(server: RedisServer, **options: Any) -> Redis:
    """Return a `Redis` for `server`. Not gated by default: the servers of tests are young."""
    return Redis(server.url, **{"restart_gate": False, **options})


class State:
    """What a server knows about one semaphore."""

    def __init__(self, server: RedisServer, name: str) -> None:
        self._server = server
        self.key = f"aiosync:{{{name}}}:semaphore"

    def all_keys(self) -> list[str]:
        pattern = self.key.replace("[", "\\[")
        return sorted(key.decode() for key in self._server.command("KEYS", f"{pattern}*"))

    def _zset(self, kind: str) -> list[str]:
        found = self._server.command("ZRANGE", f"{self.key}:{kind}", 0, -1)
        return [item.decode() for item in found]

    @property
    def holders(self) -> list[str]:
        """The permits that are held, as member:ticket:fence."""
        return self._zset("holders")

    @property
    def waiters(self) -> list[str]:
        """The tickets that wait, as member:ticket, in the order in which they are served."""
        return self._zset("waiters")

    @property
    def members(self) -> list[str]:
        return self._zset("members")

    @property
    def is_unused(self) -> bool:
        return not self.holders and not self.waiters

    def time_to_live(self) -> list[int]:
        """Milliseconds until each key expires; -1: never."""
        return [self._server.command("PTTL", key) for key in self.all_keys()]


class Lateness:
    """How late the event loop runs what is due, at worst: what a busy machine adds to a bar."""

    def __init__(self) -> None:
        self.seconds = 0.0

    @asynccontextmanager
    async def observed(self) -> AsyncIterator[Self]:
        async with create_task_group() as tasks:
            tasks.start_soon(self._observe)
            yield self
            tasks.cancel_scope.cancel()

    async def _observe(self) -> None:
        while True:
            start = time.monotonic()
            await anyio.sleep(0.01)
            self.seconds = max(self.seconds, time.monotonic() - start - 0.01)

    @property
    def allowance(self) -> float:
        """What to add to a bar. Other processes are late too, and not at the same time."""
        return 3 * self.seconds


class FencedFile:
    """A file that refuses a write whose fence is smaller than one that it has seen."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def write(self, fence: int, text: str) -> bool:
        """Return whether the write was accepted."""
        seen = int(self._path.read_text().partition(" ")[0]) if self._path.exists() else 0
        if fence < seen:
            return False
        self._path.write_text(f"{fence} {text}")
        return True


class Child:
    """A process that uses a semaphore. Use it as a context manager; see `permit_process`."""

    def __init__(self, url: str, name: str, value: int = 1, **options: Any) -> None:
        self._folder = tempfile.mkdtemp(prefix="child-")
        arguments = {"url": url, "name": name, "value": value, **options}
        with Path(self._folder, "log").open("wb") as log:
            self._process = subprocess.Popen(
                [
                    sys.executable,
                    str(Path(__file__).with_name("permit_process.py")),
                    json.dumps(arguments),
                ],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                start_new_session=True,  # Ctrl-C is not meant for it
            )
        self.pid = self._process.pid
        watchdog.watch(self.pid, self._folder)
        self._lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line)
        self._lines.put("")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            try:
                pipe.close()
            except BrokenPipeError:
                pass
        watchdog.unwatch(self.pid, self._folder)
        shutil.rmtree(self._folder, ignore_errors=True)

    def tell(self, *words: object) -> None:
        """Send a command."""
        assert self._process.stdin is not None
        self._process.stdin.write(" ".join(map(str, words)) + "\n")
        self._process.stdin.flush()

    async def hear(self, word: str, seconds: float = PATIENCE) -> list[str]:
        """Wait for the next line, which must begin with `word`; return its other words."""

        def get() -> str:
            try:
                return self._lines.get(timeout=seconds)
            except queue.Empty:
                return "nothing"

        line = await anyio.to_thread.run_sync(get)
        first, *others = line.split() or ["the end"]
        if first != word:
            log = Path(self._folder, "log").read_text()
            raise AssertionError(f"expected {word!r} from the process, not {line!r}\n{log}")
        return others

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def freeze(self) -> None:
        """Stop the process by SIGSTOP."""
        self._process.send_signal(signal.SIGSTOP)
        os.waitpid(self.pid, os.WUNTRACED)

    def thaw(self) -> None:
        self._process.send_signal(signal.SIGCONT)
