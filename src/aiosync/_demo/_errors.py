"""What the user can put right, and how a run that failed is reported."""

from __future__ import annotations

import sqlite3


class DemoError(Exception):
    """A mistake or a missing file: reported in one line, without a traceback."""


def causes(error: BaseException) -> list[BaseException]:
    """Return the leaves of an exception group, or the error itself."""
    if isinstance(error, BaseExceptionGroup):
        return [cause for member in error.exceptions for cause in causes(member)]
    return [error]


def explain(error: BaseException) -> tuple[str, int]:
    """Return the last line for the user and the exit status; raise what is a bug, or an exit."""
    found = causes(error)
    # Ctrl-C is tested first: other failures may be a consequence of it.
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
