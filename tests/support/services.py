"""The programs in examples/ as processes, a load for them, and the service that they ask."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections import Counter
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.error import HTTPError
from urllib.parse import parse_qsl, urlsplit
from urllib.request import urlopen

from . import watchdog

if TYPE_CHECKING:
    from typing import Self

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
_LOAD = Path(__file__).with_name("load.py")
# Seconds until something that a process does on request must have happened.
DEADLINE = 30.0


class _Process:
    """A Python process that reports by lines of its output. Killed at the end of the block."""

    def __init__(self, log: Path, *command: str | Path, env: dict[str, str] | None = None) -> None:
        self._log = log
        with log.open("ab") as errors:
            self._process = subprocess.Popen(
                [sys.executable, "-W", "error", *command],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                cwd=log.parent,
                env={**os.environ, **(env or {})},
                start_new_session=True,  # Ctrl-C is not meant for it
            )
        watchdog.watch(self._process.pid, str(log.parent / "nothing"))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        watchdog.unwatch(self._process.pid, str(self._log.parent / "nothing"))
        assert self._process.stdout is not None
        self._process.stdout.close()

    def read_line(self) -> str:
        """Return the next line of the output.

        :raises RuntimeError: if there is none, with what the process has logged
        """
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the process has ended early:\n{self.errors()}")
        return line.rstrip("\n")

    def wait(self) -> int:
        """Wait until the process has ended, and return its exit status."""
        return self._process.wait(DEADLINE)

    def terminate(self) -> None:
        """Send SIGTERM."""
        self._process.terminate()

    def kill(self) -> None:
        """Send SIGKILL, and wait until the process has ended."""
        self._process.kill()
        self._process.wait()

    def errors(self) -> str:
        """Return what the process has written to its standard error."""
        return self._log.read_text("utf-8", errors="replace")


class Service(_Process):
    """A program of examples/ on a random port.

    :param folder: where to put its log
    :param environment: its settings
    """

    def __init__(self, program: str, folder: Path, **environment: str) -> None:
        super().__init__(
            folder / f"{program}.log", EXAMPLES / program, "0", env={"DRAIN": "1", **environment}
        )
        try:
            self.url = self.read_line()
        except BaseException:
            self.__exit__()
            raise

    def get(self, path: str) -> str:
        """Return the body of an answer of a HTTP service.

        :raises OSError: if its status is no success
        """
        try:
            with urlopen(self.url + path, timeout=DEADLINE) as response:
                body: bytes = response.read()
        except HTTPError as error:
            error.close()
            raise
        return body.decode()


class Load(_Process):
    """A process whose threads send requests to a service; see load.py.

    :param requests: how many; None: until the service is not ready any more
    """

    def __init__(
        self, service: Service, folder: Path, what: str, *, requests: int | None, first: int = 0
    ) -> None:
        numbers = [str(first), "-" if requests is None else str(requests)]
        super().__init__(folder / "load.log", _LOAD, service.url, what, *numbers)

    def wait_for_answers(self) -> None:
        """Return when a tenth of the requests, or a few, have been answered."""
        assert self.read_line() == "some"

    def report(self) -> dict[str, Any]:
        """Wait for the end. Return ``answers``, ``refused`` and ``lost``, as lists by client."""
        line = self.read_line()
        report: dict[str, Any] = json.loads(self.read_line() if line == "some" else line)
        assert self.wait() == 0
        return report


class Upstream:
    """An HTTP service of the test process, which takes note of how many requests it had at a time.

    The first `together` requests are kept until all of them are there, so `most` is at least that,
    unless the caller sends less at a time.
    """

    def __init__(self, together: int) -> None:
        self.most = 0
        self.asked: Counter[str] = Counter()
        self._now = 0
        self._lock = threading.Lock()
        self._first = threading.Barrier(together)
        self._together = together
        upstream = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                url = urlsplit(self.path)
                body = json.dumps(upstream._answer(url.path, dict(parse_qsl(url.query)))).encode()
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                # One that was killed does not read it.
                with suppress(ConnectionError):
                    self.wfile.write(body)

            do_POST = do_GET

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    @staticmethod
    def price_of(item: str) -> int:
        return sum(item.encode())

    @staticmethod
    def catalog() -> list[str]:
        return [f"item{number}" for number in range(10)]

    def _answer(self, path: str, query: dict[str, str]) -> Any:
        if path == "/catalog":
            return self.catalog()
        with self._lock:
            self._now += 1
            self.most = max(self.most, self._now)
            is_first = sum(self.asked.values()) < self._together
            self.asked[query.get("item") or query["to"]] += 1
        try:
            if is_first:
                with suppress(threading.BrokenBarrierError):
                    self._first.wait(DEADLINE / 2)
            threading.Event().wait(0.005)  # what the work takes
            if path == "/price":
                return {"price": self.price_of(query["item"])}
            return {"receipt": f"{query['to']} {query['fence']}"}
        finally:
            with self._lock:
                self._now -= 1
