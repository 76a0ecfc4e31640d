"""What the workers of the demo count, and how a run ends if one of them fails."""

from __future__ import annotations

import sqlite3
import stat
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from support.demo import OTHERS, PATIENCE, TEXTS, Result, each_backend, each_mixture, main

from aiosync import BrokenBarrierError
from aiosync._demo import _database, _workers
from aiosync._demo._workers import Crew

pytestmark = pytest.mark.slow


@each_backend
def test_counts_what_is_there(tree: Path, backend: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(tree, "--backend", backend, "--workers", 3, "--limit", 2) == 0
    (result,) = Result.all(capsys.readouterr().out)
    result.check(backend, TEXTS)
    assert (result.workers, result.limit) == (3, 2)


@each_backend
def test_one_file_whatever_its_suffix(
    tree: Path, backend: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(tree / "six.bin", "--backend", backend, "--workers", 1, "--limit", 1) == 0
    out, err = capsys.readouterr()
    (result,) = Result.all(out)
    result.check(backend, {"six.bin": OTHERS["six.bin"]})
    # It waits for the connection to be made, and uses it once more for the result.
    assert result.lines[1:5] == [
        "most frequent  spam 50",
        "semaphore      1 permit, at most 1 in use",
        "barrier        2 rounds of 1 worker",
        "pool           1 connection, at most 1 in use; 2 loans, 1 had to wait",
    ]
    assert err == ""


@each_backend
def test_more_workers_than_files(
    tree: Path, backend: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(tree, "--backend", backend, "--workers", 20, "--limit", 50) == 0
    Result.all(capsys.readouterr().out)[0].check(backend, TEXTS)


@each_backend
@each_mixture
@pytest.mark.parametrize("limit", [1, 2, 5])
def test_as_many_read_at_once_as_may_and_no_more(
    many: Path,
    backend: str,
    threads: int,
    limit: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    # No read ends before `limit` of them overlap. More than that would show in `most`. (Not so for
    # the last ones: most of the workers may be through with their files before one is.)
    together = threading.Barrier(limit)
    lock = threading.Lock()
    reading = most = reads = 0

    def read_bytes(path: Path) -> bytes:
        nonlocal reading, most, reads
        with lock:
            reading += 1
            reads += 1
            most = max(most, reading)
            early = reads <= 20 * limit
        if early:
            together.wait(PATIENCE)
        with lock:
            reading -= 1
        return path.stem.encode()

    monkeypatch.setattr(Path, "read_bytes", read_bytes)
    args = ("--backend", backend, "--workers", 10, "--limit", limit, "--threads", threads)
    assert main(many, *args) == 0
    assert Result.all(capsys.readouterr().out)[0].readers == most == limit


@each_backend
@each_mixture
def test_threads_and_tasks_count_the_same(
    tree: Path, backend: str, threads: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(tree, "--backend", backend, "--threads", threads) == 0
    out, err = capsys.readouterr()
    Result.all(out)[0].check(backend, TEXTS)
    assert err == ""
    rows = [line.split()[0] for line in out.splitlines() if line.startswith(("task-", "thread-"))]
    tasks = [f"task-{number}" for number in range(1, 9 - threads)]
    assert rows == tasks + [f"thread-{number}" for number in range(9 - threads, 9)]


@each_backend
@each_mixture
def test_no_worker_counts_before_all_have_read(
    many: Path, backend: str, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads: list[Path] = []
    seen: list[int] = []

    class Words:
        def findall(self, text: str) -> list[str]:
            seen.append(len(reads))
            return []

    def read_bytes(path: Path) -> bytes:
        reads.append(path)
        return b""

    monkeypatch.setattr(Path, "read_bytes", read_bytes)
    monkeypatch.setattr(_workers, "_WORD", Words())
    assert main(many, "--backend", backend, "--threads", threads) == 0
    assert seen == [400] * 400


@each_backend
@each_mixture
def test_all_batches_of_all_workers_are_added_up(
    tmp_path: Path,
    rich: dict[str, str],
    backend: str,
    threads: int,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(tmp_path / "rich", "--backend", backend, "--threads", threads) == 0
    (result,) = Result.all(capsys.readouterr().out)
    result.check(backend, rich)
    assert result.loans == 8 * 3 + 1


@each_backend
@each_mixture
def test_three_connections_are_in_use_at_once_and_no_more(
    many: Path,
    backend: str,
    threads: int,
    temporary: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    # Of 12 that store, the first three keep their connections until the other nine wait. If one of
    # those got a connection all the same, that would show in `most`.
    crowded = threading.Event()
    lock = threading.Lock()
    storing = most = stores = 0
    seen: set[sqlite3.Connection] = set()
    genuine = Crew.store

    def store(self: Crew, connection: sqlite3.Connection, batch: Any) -> None:
        nonlocal storing, most, stores
        with lock:
            storing += 1
            stores += 1
            most = max(most, storing)
            seen.add(connection)
            early = stores <= 3
        genuine(self, connection, batch)
        deadline = time.monotonic() + PATIENCE
        while early and not crowded.wait(0.001):
            assert time.monotonic() < deadline
            if storing == 3 and self.pool.get_stats()["requests_waiting"] == 9:
                crowded.set()  # for all three: the first to go on makes the queue shorter
        (folder,) = temporary.iterdir()
        assert (folder / "counts.db").is_file()
        if sys.platform != "win32":
            assert stat.S_IMODE(folder.stat().st_mode) == 0o700  # private
        with lock:
            storing -= 1

    monkeypatch.setattr(Crew, "store", store)
    monkeypatch.setattr(Path, "read_bytes", lambda path: b"spam")
    assert main(many, "--backend", backend, "--workers", 12, "--threads", threads) == 0
    (result,) = Result.all(capsys.readouterr().out)
    assert result.frequent == {"spam": 400}
    assert len(seen) == result.connections == 3
    assert result.in_use == most == 3
    assert result.loans == stores + 1 == 13
    # The nine; the other three did too, if their connections had to be made first.
    assert 9 <= result.queued <= 12


# Failures


@each_backend
@each_mixture
def test_files_that_cannot_be_read_are_counted_and_named(
    many: Path,
    backend: str,
    threads: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def read_bytes(path: Path) -> bytes:
        if path.stem in {"007", "100"}:
            raise PermissionError(13, "Permission denied", str(path))
        return b"\0" if path.stem == "200" else b"spam"

    monkeypatch.setattr(Path, "read_bytes", read_bytes)
    assert main(many, "--backend", backend, "--threads", threads) == 1
    out, err = capsys.readouterr()
    (result,) = Result.all(out)
    assert (result.frequent, result.unread) == ({"spam": 397}, 3)
    assert sorted(err.splitlines()) == [
        f"aiosync: cannot read {str(many / '007.txt')!r}: Permission denied",
        f"aiosync: cannot read {str(many / '100.txt')!r}: Permission denied",
        f"aiosync: cannot read {str(many / '200.txt')!r}: not text",
    ]


@each_backend
@each_mixture
def test_a_full_disk_is_told_in_one_line(
    tmp_path: Path,
    rich: dict[str, str],
    backend: str,
    threads: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    genuine = _database.connect

    def connect(path: Path) -> sqlite3.Connection:
        connection = genuine(path)
        connection.execute("PRAGMA max_page_count = 5").close()
        return connection

    monkeypatch.setattr(_database, "connect", connect)
    assert main(tmp_path / "rich", "--backend", backend, "--threads", threads) == 2
    out, err = capsys.readouterr()
    assert Result.all(out) == []
    assert err == "aiosync: error: cannot store the counts: database or disk is full\n"


@each_backend
@each_mixture
def test_workers_that_wait_for_a_connection_when_the_run_is_over_end(
    many: Path,
    backend: str,
    threads: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    stores: list[None] = []

    def store(self: Crew, *_: object) -> None:
        stores.append(None)
        if len(stores) == 1:
            raise sqlite3.OperationalError("disk I/O error")
        deadline = time.monotonic() + PATIENCE
        while not self.barrier.broken:
            assert time.monotonic() < deadline
            time.sleep(0.001)

    monkeypatch.setattr(Crew, "store", store)
    monkeypatch.setattr(Path, "read_bytes", lambda path: b"spam")
    assert main(many, "--backend", backend, "--threads", threads) == 2
    # Three, and the worker to which the first gave its connection just before the others were told.
    assert len(stores) <= 4
    assert capsys.readouterr().err == ("aiosync: error: cannot store the counts: disk I/O error\n")


@each_backend
@each_mixture
def test_workers_at_the_barrier_end_when_another_cannot_store(
    many: Path,
    backend: str,
    threads: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    genuine = Crew.store

    def store(self: Crew, connection: sqlite3.Connection, batch: Any) -> None:
        if dict(batch).get("last"):
            deadline = time.monotonic() + PATIENCE
            while self.barrier.n_waiting < 7:
                assert time.monotonic() < deadline
                time.sleep(0.001)
            connection.execute("nonsense")
        genuine(self, connection, batch)

    monkeypatch.setattr(Crew, "store", store)
    monkeypatch.setattr(Path, "read_bytes", lambda path: b"last" if path.stem == "007" else b"spam")
    assert main(many, "--backend", backend, "--threads", threads) == 2
    assert capsys.readouterr().err == (
        'aiosync: error: cannot store the counts: near "nonsense": syntax error\n'
    )


@each_backend
def test_a_result_that_cannot_be_read(
    tree: Path, backend: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(_database, "_SUM", "SELECT nonsense")
    assert main(tree, "--backend", backend) == 2
    assert capsys.readouterr().err == (
        "aiosync: error: cannot store the counts: no such column: nonsense\n"
    )


def connect_nowhere(path: Path) -> sqlite3.Connection:
    return sqlite3.connect(path.parent / "nowhere" / "counts.db")


@each_backend
@each_mixture
def test_a_database_that_cannot_be_opened_any_more(
    tree: Path,
    backend: str,
    threads: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    genuine = _database.connect

    def connect(path: Path) -> sqlite3.Connection:
        monkeypatch.setattr(_database, "connect", connect_nowhere)
        return genuine(path)

    monkeypatch.setattr(_database, "connect", connect)
    assert main(tree, "--backend", backend, "--threads", threads) == 2
    *lines, last = capsys.readouterr().err.splitlines()
    reason = "OperationalError('unable to open database file')"
    assert last.startswith("aiosync: error: connections: no connection available ")
    assert last.endswith(reason)
    # The pool logs a warning as well.
    assert f"connections: cannot connect: {reason}" in lines


def test_a_thread_ends_between_two_files_when_the_run_is_over(tree: Path) -> None:
    files = sorted(tree.rglob("*.md"))
    crew = Crew([files], 1, 1, _database.new_pool(tree / "unused"))
    crew.barrier.abort()
    with pytest.raises(BrokenBarrierError):
        crew.work_in_thread(threading.current_thread().name, files)
    assert (crew.crowds, crew.rounds) == ([], 0)
