"""Where the counts are added up, and the pool of connections to it."""

from __future__ import annotations

import sqlite3
import tempfile
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from anyio import to_thread

from .. import ConnectionPool
from ._errors import DemoError

if TYPE_CHECKING:
    from collections import Counter
    from collections.abc import Iterator

CONNECTIONS = 3

_TABLE = "CREATE TABLE words (word TEXT PRIMARY KEY, n INTEGER NOT NULL) WITHOUT ROWID"
_ADD = "INSERT INTO words VALUES (?, ?) ON CONFLICT (word) DO UPDATE SET n = n + excluded.n"
_SUM = "SELECT coalesce(sum(n), 0) FROM words"
_TOP = "SELECT word, n FROM words ORDER BY n DESC, word LIMIT 10"


def connect(path: Path) -> sqlite3.Connection:
    """Return a new connection."""
    # It serves one thread after the other. IMMEDIATE: a transaction locks the database when it
    # begins; two that became writers half way might block each other.
    return sqlite3.connect(path, timeout=600, isolation_level="IMMEDIATE", check_same_thread=False)


@contextmanager
def new_database() -> Iterator[Path]:
    """Create a database for the counts. It is deleted afterwards."""
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
    """Return a pool of `CONNECTIONS`. SQLite blocks, so its functions run in threads."""
    return ConnectionPool(
        connect=lambda: to_thread.run_sync(connect, path),
        # The data need not survive a crash of the machine.
        configure=lambda made: to_thread.run_sync(made.execute, "PRAGMA synchronous = OFF"),
        close=lambda used: to_thread.run_sync(used.close),
        max_size=CONNECTIONS,
        # Every worker gets a turn in the end, so there is no timeout. But if the file can't be
        # opened now, it can't be opened later either.
        timeout=None,
        close_timeout=None,
        fail_fast=True,
        name="connections",
    )


def batches(counts: Counter[str], size: int = 5000) -> Iterator[list[tuple[str, int]]]:
    """Return the counts in pieces, so that no worker has a connection for long."""
    rows = sorted(counts.items())  # in this order SQLite is quicker to store them
    for first in range(0, len(rows), size):
        yield rows[first : first + size]


def add_counts(connection: sqlite3.Connection, batch: list[tuple[str, int]]) -> None:
    """Add to the counts, in one transaction. It blocks."""
    with connection:
        connection.executemany(_ADD, batch)


def sum_up(connection: sqlite3.Connection) -> tuple[int, list[tuple[str, int]]]:
    """Return the number of words, and the most frequent ones. It blocks."""
    (words,) = connection.execute(_SUM).fetchone()
    return words, connection.execute(_TOP).fetchall()
