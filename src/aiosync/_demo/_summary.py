"""The figures of a run, and what the demo shows, as text."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ._workers import Crew

_LABEL = 15
# How many files that can't be read are named.
_NAMED = 5


def amount(number: int, noun: str) -> str:
    """Return a number of things."""
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def introduce(
    tasks: int, threads: int, files: int, permits: int, connections: int, width: int
) -> str:
    """Return what the demo shows; its first line is a sentence of its own."""
    kinds = [amount(number, noun) for number, noun in [(tasks, "task"), (threads, "thread")]]
    who = " and ".join(kind for kind in kinds if not kind.startswith("0 "))
    text = (
        f"{who} count the words in {amount(files, 'file')}: at most {permits} of them read at once "
        f"(Semaphore), none counts before all have read (Barrier), and they add their counts to a "
        f"database through {amount(connections, 'connection')} (ConnectionPool)."
    )
    first = "aiosync: tasks and threads share a semaphore, a barrier and a pool."
    return "\n".join([*textwrap.wrap(first, width), *textwrap.wrap(text, width)])


def summarize(backend: str, crew: Crew, files: int, seconds: float, width: int) -> str:
    """Return the result and the figures of a run."""
    pool = crew.pool.statistics()
    workers = len(crew.tasks) + len(crew.threads)
    frequent = ", ".join(f"{word} {count:,}" for word, count in crew.frequent)
    permits = crew.permits.value  # all are free again
    rows = [
        (f"{backend}:", f"{crew.words:,} words in {amount(files, 'file')}, {seconds:.2f} s"),
        ("most frequent", frequent or "none"),
        ("semaphore", f"{amount(permits, 'permit')}, at most {max(crew.crowds)} in use"),
        ("barrier", f"{amount(crew.rounds, 'round')} of {amount(workers, 'worker')}"),
        (
            "pool",
            f"{amount(pool.connects, 'connection')}, at most {max(crew.loans, default=0)} in use; "
            f"{amount(pool.loans, 'loan')}, {pool.queued:,} had to wait",
        ),
    ]
    if crew.unread:
        rows.append(("not read", amount(len(crew.unread), "file")))
    return "\n".join(line for label, text in rows for line in _entry(label, text, width))


def _entry(label: str, text: str, width: int) -> list[str]:
    return textwrap.wrap(
        text,
        width,
        initial_indent=label.ljust(_LABEL),
        subsequent_indent=" " * _LABEL,
        break_long_words=False,
        break_on_hyphens=False,
    )


def list_unread(unread: list[str]) -> list[str]:
    """Return a line for each of the first files that can't be read, and one for the others."""
    more = len(unread) - _NAMED
    return unread[:_NAMED] + ([f"and {more:,} more that cannot be read"] if more > 0 else [])
