"""The demo: ``python -m aiosync`` counts the most frequent names in a tree of text files.

What must live here: a program such as a user of the package might write. It knows anyio and the
public face of aiosync only, never a backend by its module, and nothing else depends on it.

The files are shared out among the workers, which are tasks, and threads if so wished. In the first
phase each worker loads its files; a `Semaphore` bounds how many of them read at once. In the second
phase each counts what it has loaded, and adds that to the common result: a database, whose few
connections they share by a `ConnectionPool`. A `Barrier` stands at the end of either phase: nobody
counts before everybody has loaded, and nobody leaves before the result is complete. Threads use the
same semaphore, barrier and pool, through the views of `as_threading`.
"""

from __future__ import annotations

import argparse
import io
import logging
import os
import re
import sqlite3
import stat
import sys
import sysconfig
import tempfile
import time
from collections import Counter
from contextlib import closing, contextmanager, nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn, TextIO

import anyio
from anyio import to_thread
from anyio.lowlevel import checkpoint

from aiosync import Barrier, BrokenBarrierError, ConnectionPool, Semaphore, as_threading

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

_BACKENDS = ("asyncio", "trio")
# More workers than this show nothing new, and far more of them do not fit into the memory.
_MOST = 10_000
_NAME = re.compile(r"\b[^\W\d]\w*")
_TEXT = re.compile(
    r"(?i)\.(adoc|bat|c|cc|cfg|conf|cpp|cs|css|csv|go|h|hpp|html?|ini|java|jsx?|json|kt|lua|md|php"
    r"|pl|ps1|pyi?|pyx|rb?|rs|rst|scala|sh|sql|swift|tex|toml|tsx?|txt|xml|ya?ml)"
)
_TABLE = "CREATE TABLE names (name TEXT PRIMARY KEY, n INTEGER NOT NULL) WITHOUT ROWID"
_ADD = "INSERT INTO names VALUES (?, ?) ON CONFLICT (name) DO UPDATE SET n = n + excluded.n"
_SUM = "SELECT coalesce(sum(n), 0) FROM names"
_TOP = "SELECT name, n FROM names ORDER BY n DESC, name LIMIT 10"

_log = logging.getLogger("aiosync")  # of the package, since the pool has its warnings to tell too


class DemoError(Exception):
    """What the user can put right: told in one line, without a traceback."""


@contextmanager
def readable(path: str | Path) -> Iterator[None]:
    """Turn an error of the file system into one line that names the file."""
    try:
        yield
    except OSError as error:
        name = repr(str(error.filename or path))  # it may contain anything, even a line end
        raise DemoError(f"cannot read {name}: {error.strerror or error}") from error


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise DemoError(message)

    def print_help(self, file: object = None) -> None:
        write_out(self.format_help().rstrip())


def whole_number(text: str, least: int = 1) -> int:
    with suppress(ValueError):
        if least <= int(text) <= _MOST:
            return int(text)
    raise argparse.ArgumentTypeError(
        f"must be a whole number from {least} to {_MOST}, not {text!r}"
    )


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser("aiosync", description="Count the most frequent names.", allow_abbrev=False)
    add = parser.add_argument
    add("path", nargs="?", metavar="FILE_OR_FOLDER", help="default: Python's standard library")
    add("--backend", choices=[*_BACKENDS, "both"], help="default: both, if trio is installed")
    add("--workers", type=whole_number, default=8, metavar="N", help="default: 8")
    threads = "how many of the workers are threads; the others are tasks; default: 0"
    add("--threads", type=partial(whole_number, least=0), default=0, metavar="M", help=threads)
    add("--limit", type=whole_number, default=3, metavar="K", help="readers at once; default: 3")
    shown = "draw a progress bar; default: if stderr is a terminal"
    add("--progress", action=argparse.BooleanOptionalAction, help=shown)
    options = parser.parse_args(argv)
    if options.threads > options.workers:
        parser.error(f"of {options.workers} workers {options.threads} can't be threads")
    return options


def pick_backends(wish: str | None) -> list[str]:
    there = anyio.get_available_backends()
    wanted = [name for name in _BACKENDS if wish in (name, "both") or (not wish and name in there)]
    for name in wanted:
        if name not in there:
            raise DemoError(f"{name} is not installed, so the demo cannot run on it")
    return wanted


def find_files(top: str, suffix: re.Pattern[str], skip: frozenset[str]) -> list[Path]:
    """Return the text files in a tree, sorted. Links to folders are not followed: no loops."""
    files: list[Path] = []
    errors: list[OSError] = []
    for folder, folders, names in os.walk(top, onerror=errors.append):
        folders[:] = [name for name in folders if name not in skip]
        paths = [Path(folder, name) for name in names]
        # No pipes and devices: to read one may take forever.
        files += [path for path in paths if suffix.fullmatch(path.suffix) and path.is_file()]
    for error in errors:
        raise error  # a folder that can't be read would otherwise pass for an empty one
    return sorted(files)


def choose_files(path: str | None) -> list[Path]:
    """Return what to count: one file, those in a folder, or the standard library."""
    suffix, skip = _TEXT, frozenset[str]()
    if path is None:
        path, suffix = sysconfig.get_path("stdlib"), re.compile(r"\.py")
        skip = frozenset(["site-packages", "dist-packages"])
    with readable(path):
        mode = os.stat(path).st_mode
        if stat.S_ISREG(mode):
            return [Path(path)]
        if not stat.S_ISDIR(mode):
            raise DemoError(f"{path!r} is neither a file nor a folder")
        files = find_files(path, suffix, skip)
    if not files:
        raise DemoError(f"there are no text files in {path!r}")
    return files


def share_out(files: Sequence[Path], workers: int) -> list[Sequence[Path]]:
    """Deal the files like cards; with more workers than files some get none."""
    return [files[first::workers] for first in range(workers)]


def read_text(path: Path) -> str:
    with readable(path):
        return path.read_text(encoding="utf-8", errors="replace")


def connect(path: Path) -> sqlite3.Connection:
    # It serves one thread after the other. IMMEDIATE: transactions take turns from their beginning;
    # those that become writers half way might block each other.
    return sqlite3.connect(path, timeout=600, isolation_level="IMMEDIATE", check_same_thread=False)


@contextmanager
def new_database() -> Iterator[Path]:
    """Make a database for the counts. It is gone afterwards."""
    try:
        folder = tempfile.TemporaryDirectory(prefix="aiosync-")
    except OSError as error:
        raise DemoError(f"cannot store the counts: {error}") from error
    with folder:
        path = Path(folder.name, "counts.db")
        with closing(connect(path)) as connection:
            connection.execute(_TABLE)
        yield path


def new_pool(path: Path) -> ConnectionPool[sqlite3.Connection]:
    """Return a pool of three connections. SQLite blocks, so all of its functions run in threads."""
    return ConnectionPool(
        connect=lambda: to_thread.run_sync(connect, path),
        # Nobody needs the data if the machine should fail.
        configure=lambda made: to_thread.run_sync(made.execute, "PRAGMA synchronous = OFF"),
        close=lambda used: to_thread.run_sync(used.close),
        max_size=3,
        # Everybody gets a turn in the end, so there is no timeout; but if the file can't be opened
        # now it can't be opened later either.
        timeout=None,
        close_timeout=None,
        fail_fast=True,
    )


def batches(counts: Counter[str], size: int = 5000) -> Iterator[list[tuple[str, int]]]:
    """Return the counts in pieces, so that nobody has a connection for long."""
    rows = sorted(counts.items())  # which SQLite is quicker to store
    for first in range(0, len(rows), size):
        yield rows[first : first + size]


class Screen(logging.Handler):
    """Writes log lines, and below them a progress bar, so that neither garbles the other."""

    def __init__(self, stream: TextIO) -> None:
        super().__init__()
        self._stream, self._bar = stream, ""
        self.has_bar: bool = stream.isatty()

    def emit(self, record: logging.LogRecord) -> None:
        self.paint(self.format(record) + "\n", self._bar)

    def show(self, bar: str) -> None:
        """Replace the progress bar; an empty one takes it away."""
        if self.has_bar:
            with self.lock or nullcontext():  # the lock under which `emit` is called
                self.paint("", bar)

    def paint(self, line: str, bar: str) -> None:
        # Blanks do what an escape code would do, and every terminal understands them.
        wipe = "\r" + " " * len(self._bar) + "\r" if self._bar else ""
        self._bar = bar
        with suppress(OSError):  # nobody is left to read it, or to be told so
            self._stream.write(wipe + line + bar)
            self._stream.flush()


def draw_bar(done: int, total: int, width: int = 30) -> str:
    full = width * done // total
    return f"[{'#' * full}{'.' * (width - full)}] {done:>{len(str(total))}}/{total} files"


def amount(number: int, noun: str) -> str:
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def write_out(text: str) -> None:
    try:
        print(text, flush=True)
    except UnicodeEncodeError:
        write_out(text.encode("ascii", "backslashreplace").decode())
    except OSError:
        # Python flushes once more at exit. That would fail as well, and end in a traceback.
        with open(os.devnull, "w") as sink:
            os.dup2(sink.fileno(), sys.stdout.fileno())
        raise


class Crew:
    """What the workers of one run share, be they tasks or threads."""

    def __init__(
        self,
        parts: Sequence[Sequence[Path]],
        threads: int,
        limit: int,
        screen: Screen,
        pool: ConnectionPool[sqlite3.Connection],
    ) -> None:
        self.pool: ConnectionPool[sqlite3.Connection] = pool
        self.permits: Semaphore = Semaphore(limit)
        self.barrier: Barrier = Barrier(len(parts), self.next_phase)
        # A lock for the figures below, which threads change as well.
        self.books: Semaphore = Semaphore(fast_acquire=True)
        self.parts: Sequence[Sequence[Path]] = parts
        self.threads: int = threads
        self.screen: Screen = screen
        self.files: int = sum(map(len, parts))
        self.busy: int = len(parts)
        self.loaded: int = 0
        self.reading: int = 0
        self.peak: int = 0
        self.peak_in_use: int = 0
        self.rounds: int = 0
        self.words: int = 0
        self.frequent: list[tuple[str, int]] = []

    def next_phase(self) -> None:
        """Run by the barrier when all have arrived, before it opens."""
        self.screen.show("")
        done = ("loaded: counting", "counted: done")[self.rounds]
        self.rounds += 1
        _log.info("all %s have %s", amount(len(self.parts), "worker"), done)

    def begin_to_read(self) -> None:
        self.reading += 1
        self.peak = max(self.peak, self.reading)

    def end_to_read(self) -> None:
        self.reading -= 1
        self.loaded += 1
        self.screen.show(draw_bar(self.loaded, self.files))

    async def load(self, path: Path) -> str:
        async with self.permits:
            async with self.books:
                self.begin_to_read()
            text = await to_thread.run_sync(read_text, path)
            async with self.books:
                self.end_to_read()
        return text

    async def work(self, part: Sequence[Path]) -> None:
        name = anyio.get_current_task().name
        texts = [await self.load(path) for path in part]
        _log.info("%s loaded %s", name, amount(len(texts), "file"))
        await self.barrier.wait()
        counts: Counter[str] = Counter()
        for text in texts:
            counts.update(_NAME.findall(text))
            await checkpoint()  # a chance for Ctrl-C, and for the other workers
        for batch in batches(counts):
            async with self.pool.connection() as connection:
                # If it is cancelled it ends when the thread does: nobody else uses the connection.
                await to_thread.run_sync(self.store, connection, batch)
        _log.info("%s counted %s", name, amount(sum(counts.values()), "word"))
        await self.barrier.wait()

    def store(self, connection: sqlite3.Connection, batch: list[tuple[str, int]]) -> None:
        """Add to the common counts, in one transaction. It blocks: not to be called by a task."""
        with as_threading(self.books):
            self.peak_in_use = max(self.peak_in_use, self.pool.get_stats()["in_use"])
        with connection:
            connection.executemany(_ADD, batch)

    def sum_up(self, connection: sqlite3.Connection) -> None:
        """Read the result. It blocks too."""
        (self.words,) = connection.execute(_SUM).fetchone()
        self.frequent = connection.execute(_TOP).fetchall()

    def load_in_thread(self, path: Path) -> str:
        self.check_wanted()
        with as_threading(self.permits):
            with as_threading(self.books):
                self.begin_to_read()
            text = read_text(path)
            with as_threading(self.books):
                self.end_to_read()
        return text

    def check_wanted(self) -> None:
        """Send a thread home between two pieces of work, as a checkpoint does with a task."""
        if self.barrier.broken:
            raise BrokenBarrierError

    def work_in_thread(self, name: str, part: Sequence[Path]) -> None:
        """Do what `work` does; the same calls, without their ``await``."""
        texts = [self.load_in_thread(path) for path in part]
        _log.info("%s loaded %s", name, amount(len(texts), "file"))
        as_threading(self.barrier).wait()
        counts: Counter[str] = Counter()
        for text in texts:
            self.check_wanted()
            counts.update(_NAME.findall(text))
        for batch in batches(counts):
            with as_threading(self.pool).connection() as connection:
                self.check_wanted()
                self.store(connection, batch)
        _log.info("%s counted %s", name, amount(sum(counts.values()), "word"))
        as_threading(self.barrier).wait()

    async def run(self) -> None:
        async with self.pool, anyio.create_task_group() as group:
            group.start_soon(self.guard)
            limiter = anyio.CapacityLimiter(max(1, self.threads))
            tasks = len(self.parts) - self.threads
            for number, part in enumerate(self.parts, 1):
                kind, own = ("worker", None) if number <= tasks else ("thread", limiter)
                name = f"{kind}-{number}"
                group.start_soon(self.employ, name, part, own, group.cancel_scope, name=name)

    async def employ(
        self,
        name: str,
        part: Sequence[Path],
        limiter: anyio.CapacityLimiter | None,
        scope: anyio.CancelScope,
    ) -> None:
        """Run a worker, as a thread if there is a `limiter` for those."""
        with suppress(BrokenBarrierError):  # whoever broke it has the reason to tell
            if limiter is None:
                await self.work(part)
            else:
                await to_thread.run_sync(self.work_in_thread, name, part, limiter=limiter)
        self.busy -= 1
        if not self.busy:
            async with self.pool.connection() as connection:
                await to_thread.run_sync(self.sum_up, connection)
            scope.cancel()  # for the guard

    async def guard(self) -> None:
        """When the run is over, for whatever reason, send home the threads at the barrier.

        Tasks are cancelled in the usual way, but there is none if all workers are threads.
        """
        try:
            await anyio.sleep_forever()
        finally:
            self.barrier.abort()


def table(backend: str, crew: Crew, seconds: float) -> str:
    stats = crew.pool.get_stats()
    rows = [
        ("backend", backend),
        ("files", f"{crew.files:,}"),
        ("words", f"{crew.words:,}"),
        ("peak of readers", f"{crew.peak}"),
        ("rounds of the barrier", f"{crew.rounds}"),
        ("seconds", f"{seconds:.2f}"),
        *((f"  {name}", f"{count:,}") for name, count in crew.frequent),
        ("connections made", f"{stats['connections_num']}"),
        ("peak of connections in use", f"{crew.peak_in_use}"),
        ("checkouts", f"{stats['requests_num']:,}"),
        ("had to wait", f"{stats['requests_queued']:,}"),
    ]
    return "\n".join(f"{label:<28}{value:>12}" for label, value in rows)


def run(argv: Sequence[str] | None, screen: Screen) -> None:
    options = parse(argv)
    if options.progress is not None:
        screen.has_bar = options.progress
    backends = pick_backends(options.backend)
    parts = share_out(choose_files(options.path), options.workers)
    for backend in backends:
        with new_database() as database:
            pool = new_pool(database)
            crew = Crew(parts, options.threads, options.limit, screen, pool)
            _log.info(f"{backend}: {amount(crew.files, 'file')} for {amount(len(parts), 'worker')}")
            started = time.perf_counter()
            anyio.run(crew.run, backend=backend)
        write_out(table(backend, crew, time.perf_counter() - started))


def causes(error: BaseException) -> list[BaseException]:
    """Return the leaves of an exception group, or the error itself."""
    if isinstance(error, BaseExceptionGroup):
        return [cause for member in error.exceptions for cause in causes(member)]
    return [error]


def explain(error: BaseException) -> tuple[str, int]:
    """Return the last line for the user and the exit status; raise what is a bug, or an exit."""
    found = causes(error)
    # Ctrl-C is tested first: what failed besides may be a consequence of it.
    if not all(isinstance(cause, (Exception, SystemExit)) for cause in found):
        return "aiosync: interrupted\n", 130
    # The status of a program that the system ends because nobody reads its pipe.
    if any(isinstance(cause, BrokenPipeError) for cause in found):
        return "", 141
    for cause in found:
        if isinstance(cause, (DemoError, OSError, sqlite3.Error)):
            where = "cannot store the counts: " if isinstance(cause, sqlite3.Error) else ""
            return f"aiosync: error: {where}{' '.join(str(cause).splitlines())}\n", 2
    raise error


def main(argv: Sequence[str] | None = None) -> int:
    screen = Screen(sys.stderr or io.StringIO())  # a service has no stderr
    _log.addHandler(screen)
    _log.setLevel(logging.INFO)
    try:
        run(argv, screen)
    except BaseException as error:
        line, status = explain(error)
        screen.paint(line, "")
        return status
    finally:
        _log.removeHandler(screen)
    return 0


if __name__ == "__main__":
    sys.exit(main())
