"""The demo: ``python -m aiosync`` counts the most frequent names in a tree of text files.

What must live here: a program such as a user of the package might write. It knows anyio and the
public face of aiosync only, never a backend by its module, and nothing else depends on it.

The files are shared out among the workers, which are tasks, and threads if so wished. In the first
phase each worker loads its files; a `Semaphore` bounds how many of them read at once. In the second
phase each counts what it has loaded, and adds that to the common result. A `Barrier` stands at the
end of either phase: nobody counts before everybody has loaded, and nobody leaves before the result
is complete. Threads use the same semaphore and barrier, through the views of `as_threading`.
"""

from __future__ import annotations

import argparse
import io
import logging
import os
import re
import stat
import sys
import sysconfig
import time
from collections import Counter
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn, TextIO

import anyio
from anyio import to_thread
from anyio.lowlevel import checkpoint

from aiosync import Barrier, BrokenBarrierError, Semaphore, as_threading

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

_log = logging.getLogger("aiosync.demo")


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
        self, parts: Sequence[Sequence[Path]], threads: int, limit: int, screen: Screen
    ) -> None:
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
        self.rounds: int = 0
        self.counts: Counter[str] = Counter()

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
        async with self.books:
            self.counts.update(counts)
        _log.info("%s counted %s", name, amount(sum(counts.values()), "word"))
        await self.barrier.wait()

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
        barrier = as_threading(self.barrier)
        with suppress(BrokenBarrierError):  # whoever broke it has the reason to tell
            texts = [self.load_in_thread(path) for path in part]
            _log.info("%s loaded %s", name, amount(len(texts), "file"))
            barrier.wait()
            counts: Counter[str] = Counter()
            for text in texts:
                self.check_wanted()
                counts.update(_NAME.findall(text))
            with as_threading(self.books):
                self.counts.update(counts)
            _log.info("%s counted %s", name, amount(sum(counts.values()), "word"))
            barrier.wait()

    async def run(self) -> None:
        async with anyio.create_task_group() as group:
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
        if limiter is None:
            await self.work(part)
        else:
            await to_thread.run_sync(self.work_in_thread, name, part, limiter=limiter)
        self.busy -= 1
        if not self.busy:
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
    frequent = sorted(crew.counts.items(), key=lambda item: (-item[1], item[0]))[:10]
    rows = [
        ("backend", backend),
        ("files", f"{crew.files:,}"),
        ("words", f"{sum(crew.counts.values()):,}"),
        ("peak of readers", f"{crew.peak}"),
        ("rounds of the barrier", f"{crew.rounds}"),
        ("seconds", f"{seconds:.2f}"),
        *((f"  {name}", f"{count:,}") for name, count in frequent),
    ]
    return "\n".join(f"{label:<24}{value:>12}" for label, value in rows)


def run(argv: Sequence[str] | None, screen: Screen) -> None:
    options = parse(argv)
    if options.progress is not None:
        screen.has_bar = options.progress
    backends = pick_backends(options.backend)
    parts = share_out(choose_files(options.path), options.workers)
    for backend in backends:
        crew = Crew(parts, options.threads, options.limit, screen)
        _log.info(f"{backend}: {amount(crew.files, 'file')} for {amount(len(parts), 'worker')}")
        started = time.perf_counter()
        anyio.run(crew.run, backend=backend)
        write_out(table(backend, crew, time.perf_counter() - started))


def causes(error: BaseException) -> list[BaseException]:
    """Return the exceptions in a group. Known by its attribute: Python 3.10 lacks the class."""
    members: Sequence[BaseException] | None = getattr(error, "exceptions", None)
    return [error] if members is None else [cause for each in members for cause in causes(each)]


def explain(error: BaseException) -> tuple[str, int]:
    """Return the last line for the user and the exit status; raise what is a bug, or an exit."""
    found = causes(error)
    # Ctrl-C; asyncio of Python 3.10 makes CancelledError of it, which is no Exception either. Comes
    # first, since who is interrupted at the barrier breaks it, and so the others fail as well.
    if not all(isinstance(cause, (Exception, SystemExit)) for cause in found):
        return "aiosync: interrupted\n", 130
    # The status of a program that the system ends because nobody reads its pipe.
    if any(isinstance(cause, BrokenPipeError) for cause in found):
        return "", 141
    for cause in found:
        if isinstance(cause, (DemoError, OSError)):
            return f"aiosync: error: {' '.join(str(cause).splitlines())}\n", 2
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
