"""The command line."""

from __future__ import annotations

import argparse
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, NoReturn

import anyio

from ._errors import DemoError
from ._terminal import write_out

if TYPE_CHECKING:
    from collections.abc import Sequence

BACKENDS = ("asyncio", "trio")
_DESCRIPTION = "Show tasks and threads that share a semaphore, a barrier and a pool to count words."
# How many of the workers are threads by default, at most.
_THREADS = 50
# More workers than this show nothing new, and far more of them do not fit into the memory.
_MOST = 10_000


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise DemoError(message)

    def print_help(self, file: object = None) -> None:
        write_out(self.format_help().rstrip())


def whole_number(text: str, least: int = 1) -> int:
    """Return the number that an argument stands for."""
    with suppress(ValueError):
        if least <= int(text) <= _MOST:
            return int(text)
    raise argparse.ArgumentTypeError(
        f"must be a whole number from {least} to {_MOST}, not {text!r}"
    )


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the options.

    :param argv: the arguments; None: those of the process
    :raises DemoError: if they are wrong
    """
    parser = Parser("aiosync", description=_DESCRIPTION, allow_abbrev=False)
    add = parser.add_argument
    add("path", nargs="?", metavar="FILE_OR_FOLDER", help="default: Python's standard library")
    add("--backend", choices=[*BACKENDS, "both"], help="default: both, if trio is installed")
    add("--workers", type=whole_number, default=8, metavar="N", help="default: 8")
    threads = "how many of the workers are threads; the others are tasks; default: half"
    add("--threads", type=partial(whole_number, least=0), metavar="M", help=threads)
    add("--limit", type=whole_number, default=3, metavar="K", help="readers at once; default: 3")
    add("--trace", metavar="FILE", help="record what happens, for ui.perfetto.dev")
    shown = "redraw the workers while they run; default: if stdout is a terminal that can do it"
    add("--live", action=argparse.BooleanOptionalAction, help=shown)
    options = parser.parse_args(argv)
    if options.threads is None:
        options.threads = min(options.workers // 2, _THREADS)
    if options.threads > options.workers:
        parser.error(f"of {options.workers} workers {options.threads} can't be threads")
    return options


def pick_backends(wanted: str | None) -> list[str]:
    """Return the backends to run on.

    :param wanted: the value of ``--backend``
    :raises DemoError: if one of them is not installed
    """
    there = anyio.get_available_backends()
    picked = [
        name for name in BACKENDS if wanted in (name, "both") or (not wanted and name in there)
    ]
    for name in picked:
        if name not in there:
            raise DemoError(f"{name} is not installed, so the demo cannot run on it")
    return picked
