"""The figures of a run, and what the demo says about itself."""

from __future__ import annotations

import pytest

from aiosync import ConnectionPool
from aiosync._demo._summary import amount, introduce, list_unread, summarize
from aiosync._demo._workers import Crew


def test_the_first_line_says_what_is_shown() -> None:
    text = introduce(4, 4, 1790, 3, 3, 79)
    assert text.splitlines() == [
        "aiosync: tasks and threads share a semaphore, a barrier and a pool.",
        "4 tasks and 4 threads count the words in 1,790 files: at most 3 of them read at",
        "once (Semaphore), none counts before all have read (Barrier), and they add",
        "their counts to a database through 3 connections (ConnectionPool).",
    ]
    assert all(len(line) <= 39 for line in introduce(4, 4, 1790, 3, 3, 39).splitlines())


@pytest.mark.parametrize(
    ("tasks", "threads", "who"),
    [(1, 0, "1 task "), (0, 2, "2 threads "), (10, 1, "10 tasks and 1 ")],
)
def test_who_takes_part(tasks: int, threads: int, who: str) -> None:
    assert introduce(tasks, threads, 1, 3, 3, 79).splitlines()[1].startswith(f"{who}")


def test_a_summary() -> None:
    crew = Crew([[]] * 2, 1, 3, ConnectionPool(connect=object))  # type: ignore[arg-type]
    crew.crowds += [1, 2, 1]
    crew.rounds = 2
    crew.words, crew.frequent = 1234, [("spam", 1000), ("a-b", 234)]
    crew.unread += ["why"]
    assert summarize("trio", crew, 2000, 1.234, 40).splitlines() == [
        "trio:          1,234 words in 2,000",
        "               files, 1.23 s",
        "most frequent  spam 1,000, a-b 234",
        "semaphore      3 permits, at most 2 in",
        "               use",
        "barrier        2 rounds of 2 workers",
        "pool           0 connections, at most 0",
        "               in use; 0 loans, 0 had to",
        "               wait",
        "not read       1 file",
    ]
    crew.frequent.clear()
    crew.unread.clear()
    assert summarize("trio", crew, 1, 0, 80).splitlines()[1] == "most frequent  none"
    assert "not read" not in summarize("trio", crew, 1, 0, 80)


def test_amount() -> None:
    assert [amount(number, "file") for number in [0, 1, 1000]] == [
        "0 files",
        "1 file",
        "1,000 files",
    ]


def test_some_files_are_named() -> None:
    lines = [str(number) for number in range(7)]
    assert list_unread([]) == []
    assert list_unread(lines[:5]) == lines[:5]
    assert list_unread(lines) == [*lines[:5], "and 2 more that cannot be read"]
