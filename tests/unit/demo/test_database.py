"""Where the demo adds up its counts."""

from __future__ import annotations

import re
import sqlite3
import tempfile
from collections import Counter
from contextlib import closing
from typing import TYPE_CHECKING

import pytest
from support.demo import main

from aiosync._demo import _database
from aiosync._demo._database import add_counts, batches, connect, new_database, sum_up

if TYPE_CHECKING:
    from pathlib import Path


def test_the_counts_are_added_up() -> None:
    with new_database() as path, closing(connect(path)) as connection:
        assert sum_up(connection) == (0, [])
        add_counts(connection, [("eggs", 1), ("spam", 2)])
        add_counts(connection, [("spam", 3)])
        assert sum_up(connection) == (6, [("spam", 5), ("eggs", 1)])


def test_batches() -> None:
    counts = Counter({"c": 1, "a": 2, "b": 3})
    assert list(batches(counts, 2)) == [[("a", 2), ("b", 3)], [("c", 1)]]
    assert list(batches(counts, 3)) == [[("a", 2), ("b", 3), ("c", 1)]]
    assert list(batches(Counter())) == []


def test_a_temporary_folder_that_cannot_be_used(
    tree: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tree / "nowhere"))
    assert main(tree) == 2
    message = r"aiosync: error: cannot store the counts: .+nowhere.+\n"
    assert re.fullmatch(message, capsys.readouterr().err)


def test_a_database_that_cannot_be_made(
    tree: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def connect_nowhere(path: Path) -> sqlite3.Connection:
        return sqlite3.connect(path.parent / "nowhere" / "counts.db")

    monkeypatch.setattr(_database, "connect", connect_nowhere)
    assert main(tree) == 2
    message = "aiosync: error: cannot store the counts: unable to open database file\n"
    assert capsys.readouterr().err == message
