"""One run of the demo, from the command line to the timeline."""

from __future__ import annotations

import io
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING

import anyio

from .. import debug
from ._database import CONNECTIONS, new_database, new_pool
from ._errors import DemoError
from ._files import choose_files, share_out
from ._frame import Frames
from ._history import History
from ._live import Live, Notes
from ._options import parse, pick_backends
from ._summary import introduce, list_unread, summarize
from ._terminal import Terminal, write_error, write_out
from ._timeline import choose_rows, draw_timeline
from ._workers import Crew

if TYPE_CHECKING:
    from argparse import Namespace
    from collections.abc import Iterator, Sequence
    from pathlib import Path


@contextmanager
def tracing(path: str | None) -> Iterator[None]:
    """Record what happens in the block, if there is a file for that."""
    if path is None:
        yield
        return
    was_enabled = debug.enabled()
    if not was_enabled:
        debug.enable(watchdog=None)
    try:
        try:
            recording = debug.record(path)
        except OSError as error:
            raise DemoError(f"cannot write {path!r}: {error.strerror}") from error
        with recording:
            yield
    finally:
        if not was_enabled:
            debug.disable()


def run_on(
    backend: str,
    parts: Sequence[Sequence[Path]],
    options: Namespace,
    screen: Terminal,
    notes: Notes,
) -> list[str]:
    """Run the workers on one backend, and print the result and the timeline.

    :return: a line for each file that can't be read
    """
    files = sum(map(len, parts))
    with new_database() as database:
        crew = Crew(parts, options.threads, options.limit, new_pool(database))
        shown = choose_rows(list(crew.tasks), list(crew.threads), screen.rows())
        history = History(shown, crew.permits, crew.barrier, crew.pool)
        notes.live = Live(screen, Frames(backend, files, crew, history).draw)
        try:
            with notes.live:
                anyio.run(crew.run, backend=backend)
        finally:
            notes.live = None
    seconds = history.close()
    width = screen.size()[0]
    write_out("\n" + summarize(backend, crew, files, seconds, width))
    write_out("\n".join(draw_timeline(history, seconds, len(parts) - len(shown), screen)))
    return crew.unread


def run(argv: Sequence[str] | None, notes: Notes) -> int:
    """Run the demo, and return the exit status: 1 if there are files that can't be read."""
    options = parse(argv)
    backends = pick_backends(options.backend)
    files, unread = choose_files(options.path)
    parts = share_out(files, options.workers)
    screen = Terminal.of(sys.stdout or io.StringIO(), options.live)
    tasks = options.workers - options.threads
    width = screen.size()[0]
    write_out(introduce(tasks, options.threads, len(files), options.limit, CONNECTIONS, width))
    failed: list[str] = []
    with tracing(options.trace):
        for backend in backends:
            failed = run_on(backend, parts, options, screen, notes)
    if options.trace is not None:
        write_out(f"\nThe trace is in {options.trace}: open it in https://ui.perfetto.dev")
    unread += failed
    for line in list_unread(unread):
        write_error(f"aiosync: {line}\n")
    return 1 if unread else 0
