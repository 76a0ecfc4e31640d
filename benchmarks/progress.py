"""The progress of a run: on stderr, and only if that is a terminal.

What must live here: rich's progress bar, and a line of plain text for when rich is not installed.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

# Called with the title of the next step.
Step = Callable[[str], None]


@contextmanager
def progress(total: int) -> Iterator[Step]:
    if not sys.stderr.isatty():
        yield lambda title: None
        return
    try:
        from rich.console import Console
        from rich.progress import Progress
    except ImportError:
        yield from _plain(total)
        return
    with Progress(
        console=Console(stderr=True), transient=True, redirect_stdout=sys.stdout.isatty()
    ) as bar:
        task = bar.add_task("", total=total)
        started = iter(range(total + 1))
        yield lambda title: bar.update(task, completed=next(started), description=title)


def _plain(total: int) -> Iterator[Step]:
    started = iter(range(1, total + 1))

    def step(title: str) -> None:
        print(f"\r\033[K{next(started)}/{total} {title}\r", end="", file=sys.stderr, flush=True)

    yield step
    print("\r\033[K", end="", file=sys.stderr, flush=True)
