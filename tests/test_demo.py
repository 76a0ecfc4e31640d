"""The demo, ``python -m aiosync``, as its user meets it, and its functions one by one."""

from __future__ import annotations

import argparse
import errno
import io
import logging
import os
import re
import runpy
import signal
import sqlite3
import stat
import subprocess
import sys
import sysconfig
import tempfile
import textwrap
import threading
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio
import pytest

from aiosync import BrokenBarrierError
from aiosync import __main__ as demo

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

pytestmark = pytest.mark.slow

BACKENDS = ["asyncio", "trio"]
PATIENCE = 40  # seconds, for a process that should end at once

each_backend = pytest.mark.parametrize("backend", BACKENDS)
# All workers are tasks, some of them are threads, or all are.
each_mixture = pytest.mark.parametrize("threads", [0, 3, 8])
posix = pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX")

TEXTS = {
    "one.py": "def spam(eggs):\n    return eggs + spam(eggs) * 0xff\n",
    "two.TXT": "spam, spam, eggs and spam! don't 3abc _x _x\n",
    "deep/three.md": "# eggs\nnaïve naïve Größe\n",
    "deep/er/four.rst": "",
    "deep/er/five.toml": "spam = 'eggs'\n[a.b]\nspam2 = 7\n",
}
# What is no text by its suffix is not to be counted.
OTHERS = {"six.bin": "spam " * 50, "deep/seven": "spam " * 50, "deep/.py": "spam " * 50}


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    top = tmp_path / "tree"
    for name, text in (TEXTS | OTHERS).items():
        path = top / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return top


@pytest.fixture
def many(tmp_path: Path) -> Path:
    top = tmp_path / "many"
    top.mkdir()
    for number in range(400):
        (top / f"{number:03}.txt").touch()
    return top


@pytest.fixture(autouse=True)
def no_handler_left() -> Iterator[None]:
    yield
    assert demo._log.handlers == []


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder for temporary files. However a test ends the demo, none may be left in there."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    for name in ["TMPDIR", "TEMP", "TMP"]:  # for other processes
        monkeypatch.setenv(name, str(folder))
    yield folder
    assert list(folder.iterdir()) == []


def expected(texts: dict[str, str]) -> Counter[str]:
    counts: Counter[str] = Counter()
    for text in texts.values():
        # Another way to say it than in the demo: words, but for those that begin with a digit.
        counts.update(word for word in re.findall(r"\w+", text) if not word[0].isdigit())
    return counts


class Table:
    """What the demo has printed of one run."""

    def __init__(self, lines: list[str]) -> None:
        pairs = [line.rsplit(maxsplit=1) for line in lines]
        self.names = {
            label.strip(): int(n.replace(",", "")) for label, n in pairs if label[0] == " "
        }
        self.facts = {label.strip(): value for label, value in pairs if label[0] != " "}

    @staticmethod
    def all(out: str) -> list[Table]:
        tables: list[list[str]] = []
        for line in out.splitlines():
            if line.startswith("backend "):
                tables.append([])
            tables[-1].append(line)
        return [Table(lines) for lines in tables]

    def check(self, backend: str, texts: dict[str, str]) -> None:
        counts = expected(texts)
        assert self.facts["backend"] == backend
        assert self.facts["files"] == str(len(texts))
        assert self.number("words") == sum(counts.values())
        assert self.facts["rounds of the barrier"] == "2"
        assert float(self.facts["seconds"]) >= 0
        assert len(self.names) == min(10, len(counts))
        by_frequency = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
        assert list(self.names.items()) == by_frequency[:10]
        assert 1 <= self.number("peak of connections in use") <= self.number("connections made")
        assert self.number("connections made") <= 3
        assert 1 <= self.number("had to wait") <= self.number("checkouts")

    def number(self, label: str) -> int:
        return int(self.facts[label].replace(",", ""))

    @property
    def peak(self) -> int:
        return self.number("peak of readers")


def python(*args: object, **how: Any) -> subprocess.CompletedProcess[str]:
    how = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "timeout": PATIENCE} | how
    # With buffers, as most users have it: what is left in them at exit has its own ways to fail.
    usual = {"PYTHONIOENCODING": "utf-8", "PYTHONUNBUFFERED": ""}
    how["env"] = os.environ | usual | how.get("env", {})
    command = [sys.executable, *map(str, args)]
    return subprocess.run(command, encoding="utf-8", check=False, **how)


def aiosync(*args: object, **how: Any) -> subprocess.CompletedProcess[str]:
    return python("-m", "aiosync", *args, **how)


def main(*args: object) -> int:
    return demo.main([str(arg) for arg in args])


# Right results


@each_backend
def test_counts_what_is_there(tree: Path, backend: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(tree, "--backend", backend, "--workers", 3, "--limit", 2) == 0
    (table,) = Table.all(capsys.readouterr().out)
    table.check(backend, TEXTS)
    assert 1 <= table.peak <= 2


def test_both_backends_one_after_the_other(tree: Path) -> None:
    done = aiosync(tree)
    assert done.returncode == 0
    tables = Table.all(done.stdout)
    for backend, table in zip(BACKENDS, tables, strict=True):
        table.check(backend, TEXTS)
        assert 1 <= table.peak <= 3
    assert tables[0].names == tables[1].names
    # Nothing but lines goes into a pipe.
    assert "\r" not in done.stderr
    assert "\x1b" not in done.stderr
    assert done.stderr.count("\n") == 2 * (1 + 8 + 1 + 8 + 1)


@each_backend
def test_one_file_whatever_its_suffix(
    tree: Path, backend: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(tree / "six.bin", "--backend", backend, "--workers", 1, "--limit", 1) == 0
    out, err = capsys.readouterr()
    (table,) = Table.all(out)
    table.check(backend, {"six.bin": OTHERS["six.bin"]})
    # It waits for the connection to be made, and uses it once more for the result.
    assert table.number("connections made") == table.number("had to wait") == 1
    assert table.number("checkouts") == 2
    assert out.splitlines()[-4:] == [
        "connections made                       1",
        "peak of connections in use             1",
        "checkouts                              2",
        "had to wait                            1",
    ]
    assert err.splitlines() == [
        f"{backend}: 1 file for 1 worker",
        "worker-1 loaded 1 file",
        "all 1 worker have loaded: counting",
        "worker-1 counted 50 words",
        "all 1 worker have counted: done",
    ]


@each_backend
def test_more_workers_than_files(
    tree: Path, backend: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(tree, "--backend", backend, "--workers", 20, "--limit", 50) == 0
    out, err = capsys.readouterr()
    Table.all(out)[0].check(backend, TEXTS)
    assert err.count(" loaded 1 file\n") == 5
    assert err.count(" loaded 0 files\n") == 15
    assert "all 20 workers have loaded: counting\n" in err


def test_what_is_no_utf8_does_no_harm(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "latin.txt"
    path.write_bytes(b"spam caf\xe9 spam\xff\xfe eggs\n")
    assert main(path) == 0
    assert Table.all(capsys.readouterr().out)[0].names == {"spam": 2, "caf": 1, "eggs": 1}


@posix
@each_backend
def test_links_and_pipes_do_no_harm(
    tree: Path, backend: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tree / "deep" / "up").symlink_to(tree, target_is_directory=True)
    (tree / "round.py").symlink_to("round.py")
    (tree / "dangling.py").symlink_to("nowhere.py")
    (tree / "folder.py").mkdir()
    os.mkfifo(tree / "pipe.txt")
    (tree / "link.py").symlink_to("one.py")
    assert main(tree, "--backend", backend) == 0
    Table.all(capsys.readouterr().out)[0].check(backend, TEXTS | {"link.py": TEXTS["one.py"]})


def test_the_standard_library_is_what_it_counts_by_itself() -> None:
    files = demo.choose_files(None)
    assert {path.suffix for path in files} == {".py"}
    assert Path(os.__file__).name in {path.name for path in files}
    inside = {part for path in files for part in path.relative_to(stdlib()).parts}
    assert not inside & {"site-packages", "dist-packages"}


def stdlib() -> str:
    return sysconfig.get_path("stdlib")


def test_third_party_packages_are_skipped_in_the_standard_library_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ["a.py", "b.txt", "site-packages/c.py", "d/dist-packages/e.py", "d/f.py"]:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    monkeypatch.setattr(sysconfig, "get_path", {"stdlib": str(tmp_path)}.get)
    assert demo.choose_files(None) == [tmp_path / "a.py", tmp_path / "d" / "f.py"]
    assert len(demo.choose_files(str(tmp_path))) == 5


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

    def read_text(path: Path, **_: object) -> str:
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
        return path.stem

    monkeypatch.setattr(Path, "read_text", read_text)
    args = ("--backend", backend, "--workers", 10, "--limit", limit, "--threads", threads)
    assert main(many, *args) == 0
    assert Table.all(capsys.readouterr().out)[0].peak == most == limit


@each_backend
@each_mixture
def test_threads_and_tasks_count_the_same(
    tree: Path, backend: str, threads: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(tree, "--backend", backend, "--threads", threads) == 0
    out, err = capsys.readouterr()
    Table.all(out)[0].check(backend, TEXTS)
    names = {f"worker-{n}" for n in range(1, 9 - threads)}
    names |= {f"thread-{n}" for n in range(9 - threads, 9)}
    assert set(re.findall(r"^(\S+-\d) loaded", err, re.MULTILINE)) == names
    assert set(re.findall(r"^(\S+-\d) counted", err, re.MULTILINE)) == names


@each_backend
def test_nobody_counts_before_all_have_loaded(
    tree: Path, backend: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(tree, "--backend", backend, "--workers", 4) == 0
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == f"{backend}: 5 files for 4 workers"
    assert sorted(lines[1:5]) == [
        "worker-1 loaded 2 files",
        "worker-2 loaded 1 file",
        "worker-3 loaded 1 file",
        "worker-4 loaded 1 file",
    ]
    assert lines[5] == "all 4 workers have loaded: counting"
    assert {line.split()[1] for line in lines[6:10]} == {"counted"}
    assert lines[10:] == ["all 4 workers have counted: done"]


# The database


@pytest.fixture
def rich(tmp_path: Path) -> dict[str, str]:
    """Texts in `tmp_path / "rich"`, one for each worker, with more names than fit into a batch."""
    names = [f"{letter}{number}" for letter in "abc" for number in range(4000)]
    texts = {f"{n}.txt": " ".join([*names, *names[n:50]]) for n in range(8)}
    (tmp_path / "rich").mkdir()
    for name, text in texts.items():
        (tmp_path / "rich" / name).write_text(text)
    return texts


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
    (table,) = Table.all(capsys.readouterr().out)
    table.check(backend, rich)
    assert table.number("checkouts") == 8 * 3 + 1


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
    # Of 12 that store, the first three keep their connections until the other nine stand in line.
    # If one of those got a connection all the same, that would show in `most`.
    crowded = threading.Event()
    lock = threading.Lock()
    storing = most = stores = 0
    seen: set[sqlite3.Connection] = set()
    genuine = demo.Crew.store

    def store(self: demo.Crew, connection: sqlite3.Connection, batch: Any) -> None:
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
                crowded.set()  # for all three: the first of them to go shortens the line
        (folder,) = temporary.iterdir()
        assert (folder / "counts.db").is_file()
        if sys.platform != "win32":
            assert stat.S_IMODE(folder.stat().st_mode) == 0o700  # nobody else's business
        with lock:
            storing -= 1

    monkeypatch.setattr(demo.Crew, "store", store)
    monkeypatch.setattr(Path, "read_text", lambda path, **_: "spam")
    assert main(many, "--backend", backend, "--workers", 12, "--threads", threads) == 0
    (table,) = Table.all(capsys.readouterr().out)
    assert table.names == {"spam": 400}
    assert len(seen) == table.number("connections made") == 3
    assert table.number("peak of connections in use") == most == 3
    assert table.number("checkouts") == stores + 1 == 13
    # The nine; the other three did too, if their connections had to be made first.
    assert 9 <= table.number("had to wait") <= 12


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
    genuine = demo.connect

    def connect(path: Path) -> sqlite3.Connection:
        connection = genuine(path)
        connection.execute("PRAGMA max_page_count = 5").close()
        return connection

    monkeypatch.setattr(demo, "connect", connect)
    assert main(tmp_path / "rich", "--backend", backend, "--threads", threads) == 2
    out, err = capsys.readouterr()
    assert out == ""
    *lines, last = err.splitlines()
    assert last == "aiosync: error: cannot store the counts: database or disk is full"
    assert len(lines) == 1 + 8 + 1


@each_backend
@each_mixture
def test_who_stands_in_line_for_a_connection_when_the_run_is_over_goes_home(
    many: Path,
    backend: str,
    threads: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    stores: list[None] = []

    def store(self: demo.Crew, *_: object) -> None:
        stores.append(None)
        if len(stores) == 1:
            raise sqlite3.OperationalError("disk I/O error")
        deadline = time.monotonic() + PATIENCE
        while not self.barrier.broken:
            assert time.monotonic() < deadline
            time.sleep(0.001)

    monkeypatch.setattr(demo.Crew, "store", store)
    monkeypatch.setattr(Path, "read_text", lambda path, **_: "spam")
    assert main(many, "--backend", backend, "--threads", threads) == 2
    # Three, and one to whom the first gave its connection just before the others were told.
    assert len(stores) <= 4
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == "aiosync: error: cannot store the counts: disk I/O error"


@each_backend
@each_mixture
def test_who_is_at_the_barrier_goes_home_when_another_cannot_store(
    many: Path,
    backend: str,
    threads: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    announcer = Announcer(" counted ", 7)
    genuine = demo.Crew.store

    def store(self: demo.Crew, connection: sqlite3.Connection, batch: Any) -> None:
        if dict(batch).get("last"):
            assert announcer.heard.wait(PATIENCE)
            connection.execute("nonsense")
        genuine(self, connection, batch)

    monkeypatch.setattr(demo.Crew, "store", store)
    monkeypatch.setattr(
        Path, "read_text", lambda path, **_: "last" if path.stem == "007" else "spam"
    )
    demo._log.addHandler(announcer)
    try:
        assert main(many, "--backend", backend, "--threads", threads) == 2
    finally:
        demo._log.removeHandler(announcer)
    out, err = capsys.readouterr()
    assert out == ""
    *lines, last = err.splitlines()
    assert last == 'aiosync: error: cannot store the counts: near "nonsense": syntax error'
    assert len(lines) == 1 + 8 + 1 + 7


@each_backend
def test_a_result_that_cannot_be_read(
    tree: Path, backend: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo, "_SUM", "SELECT nonsense")
    assert main(tree, "--backend", backend) == 2
    out, err = capsys.readouterr()
    assert out == ""
    last = err.splitlines()[-1]
    assert last == "aiosync: error: cannot store the counts: no such column: nonsense"


def test_a_temporary_folder_that_cannot_be_used(
    tree: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tree / "nowhere"))
    assert main(tree) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert re.fullmatch(r"aiosync: error: cannot store the counts: .+nowhere.+\n", err)


def connect_nowhere(path: Path) -> sqlite3.Connection:
    return sqlite3.connect(path.parent / "nowhere" / "counts.db")


def test_a_database_that_cannot_be_made(
    tree: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo, "connect", connect_nowhere)
    assert main(tree) == 2
    message = "aiosync: error: cannot store the counts: unable to open database file\n"
    assert capsys.readouterr() == ("", message)


@each_backend
@each_mixture
def test_a_database_that_cannot_be_opened_any_more(
    tree: Path,
    backend: str,
    threads: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    genuine = demo.connect

    def connect(path: Path) -> sqlite3.Connection:
        monkeypatch.setattr(demo, "connect", connect_nowhere)
        return genuine(path)

    monkeypatch.setattr(demo, "connect", connect)
    assert main(tree, "--backend", backend, "--threads", threads) == 2
    out, err = capsys.readouterr()
    assert out == ""
    *lines, last = err.splitlines()
    reason = r"OperationalError\('unable to open database file'\)"
    assert re.fullmatch(rf"aiosync: error: pool-\d+ had no connection .+: {reason}", last)
    # The pool has told it too, by the same way as the demo.
    assert any(re.fullmatch(rf"pool-\d+: cannot connect: {reason}", line) for line in lines)


def test_batches() -> None:
    counts = Counter({"c": 1, "a": 2, "b": 3})
    assert list(demo.batches(counts, 2)) == [[("a", 2), ("b", 3)], [("c", 1)]]
    assert list(demo.batches(counts, 3)) == [[("a", 2), ("b", 3), ("c", 1)]]
    assert list(demo.batches(Counter())) == []


# What the user did wrong


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["nowhere"], r"cannot read 'nowhere': .+"),
        ([""], r"cannot read '': .+"),
        (["two\nlines"], r"cannot read 'two\\nlines': .+"),
        (["empty"], r"there are no text files in 'empty'"),
        (["--workers", "0"], r"argument --workers: must be a whole number .+, not '0'"),
        (["--workers", "-3"], r"argument --workers: must be a whole number .+, not '-3'"),
        (["--workers", "two"], r"argument --workers: must be a whole number .+, not 'two'"),
        (["--limit", "0"], r"argument --limit: must be a whole number .+, not '0'"),
        (["--limit", "1.5"], r"argument --limit: must be a whole number .+, not '1.5'"),
        (["--limit", "9" * 30], r"argument --limit: must be a whole number .+, not '9+'"),
        (["--threads", "-1"], r"argument --threads: must be a whole number from 0 .+, not '-1'"),
        (["--threads", "9"], r"of 8 workers 9 can't be threads"),
        (["--limit"], r"argument --limit: expected one argument"),
        (["--backend", "curio"], r"argument --backend: invalid choice: 'curio'.+"),
        (["empty", "more\nthan one"], r"unrecognized arguments: more than one"),
    ],
)
def test_one_line_says_what_is_wrong(
    tmp_path: Path,
    args: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "picture.png").touch()
    monkeypatch.chdir(tmp_path)
    done = aiosync(*args)
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(rf"aiosync: error: {message}\n", done.stderr)
    assert main(*args) == 2
    assert capsys.readouterr() == ("", done.stderr)


@posix
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: path.symlink_to("nowhere"), "cannot read 'odd': No such file or directory"),
        (
            lambda path: path.symlink_to("odd"),
            "cannot read 'odd': Too many levels of symbolic links",
        ),
        (os.mkfifo, "'odd' is neither a file nor a folder"),
    ],
)
def test_neither_file_nor_folder(
    tmp_path: Path,
    make: Callable[[Path], object],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    make(tmp_path / "odd")
    monkeypatch.chdir(tmp_path)
    done = aiosync("odd")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"aiosync: error: {message}\n"
    assert main("odd") == 2
    assert capsys.readouterr() == ("", done.stderr)


def test_a_folder_that_cannot_be_read(
    tree: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # By hand, since root may read everything.
    scandir = os.scandir

    def refuse(path: str) -> Any:
        if os.path.basename(path) == "er":
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    assert main(tree) == 2
    name = repr(str(tree / "deep" / "er"))
    assert capsys.readouterr().err == f"aiosync: error: cannot read {name}: Permission denied\n"


class Announcer(logging.Handler):
    """Sets an event when enough log lines have contained a word."""

    def __init__(self, word: str, times: int) -> None:
        super().__init__()
        self.word, self.times, self.heard = word, times, threading.Event()

    def emit(self, record: logging.LogRecord) -> None:
        self.times -= self.word in record.getMessage()
        if self.times == 0:
            self.heard.set()


@each_backend
@each_mixture
@pytest.mark.parametrize("failures", [1, 2])
def test_a_file_that_cannot_be_read_ends_it_although_the_others_wait(
    many: Path,
    backend: str,
    threads: int,
    failures: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    announcer = Announcer(" loaded ", 8 - failures)
    bad = [f"{number:03}.txt" for number in range(failures)]

    def read_text(path: Path, **_: object) -> str:
        if path.name not in bad:
            return "spam"
        # By now the others have loaded, and are on their way to the barrier.
        assert announcer.heard.wait(PATIENCE)
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(Path, "read_text", read_text)
    demo._log.addHandler(announcer)
    try:
        assert main(many, "--backend", backend, "--threads", threads) == 2
    finally:
        demo._log.removeHandler(announcer)
    out, err = capsys.readouterr()
    assert out == ""
    *lines, last = err.splitlines()
    assert last in [
        f"aiosync: error: cannot read {str(many / name)!r}: Input/output error" for name in bad
    ]
    # The first line of the run, and one of each of the others.
    assert len(lines) == 1 + 8 - failures


@each_backend
def test_a_file_that_has_vanished(tree: Path, backend: str) -> None:
    vanish = """
        import os
        from pathlib import Path
        genuine = Path.read_text
        def read_text(self, **how):
            os.unlink(self)
            return genuine(self, **how)
        Path.read_text = read_text
    """
    done = python("-c", patched(vanish), tree, "--backend", backend, "--limit", 1)
    assert (done.returncode, done.stdout) == (2, "")
    assert "Traceback" not in done.stderr
    first, *_, last = done.stderr.splitlines()
    assert first == f"{backend}: 5 files for 8 workers"
    assert re.fullmatch("aiosync: error: cannot read '.+': No such file or directory", last)


# Without trio

NO_TRIO = """
    import sys
    sys.modules["trio"] = None
"""


def patched(patch: str) -> str:
    """Return a program that changes something and then does what ``python -m aiosync`` does."""
    run = "import runpy; runpy.run_module('aiosync', run_name='__main__', alter_sys=True)"
    return textwrap.dedent(patch) + run


def test_without_trio_asyncio_is_the_default(tree: Path) -> None:
    done = python("-c", patched(NO_TRIO), tree)
    assert done.returncode == 0
    (table,) = Table.all(done.stdout)
    table.check("asyncio", TEXTS)


@pytest.mark.parametrize("wish", ["trio", "both"])
def test_trio_is_asked_for_but_not_installed(tree: Path, wish: str) -> None:
    done = python("-c", patched(NO_TRIO), tree, "--backend", wish)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "aiosync: error: trio is not installed, so the demo cannot run on it\n"


def test_pick_backends(monkeypatch: pytest.MonkeyPatch) -> None:
    assert demo.pick_backends(None) == demo.pick_backends("both") == BACKENDS
    assert demo.pick_backends("trio") == ["trio"]
    monkeypatch.setattr(anyio, "get_available_backends", lambda: ("asyncio",))
    assert demo.pick_backends(None) == demo.pick_backends("asyncio") == ["asyncio"]
    for wish in ["trio", "both"]:
        with pytest.raises(demo.DemoError, match="trio is not installed"):
            demo.pick_backends(wish)


# Ctrl-C

# An uninterrupted run takes the better part of a minute. Where it stands is told by its output.
SLOW = """
    import signal, sqlite3, sys, time
    from functools import partial
    from pathlib import Path
    signal.signal(signal.SIGINT, signal.default_int_handler)
    text = "spam " * 200_000
    def read_text(self, **how):
        {}
    Path.read_text = read_text
    class Connection(sqlite3.Connection):
        def executemany(self, *args):
            sys.stderr.write('storing\\n')
            time.sleep(1)
            return super().executemany(*args)
    sqlite3.connect = partial(sqlite3.connect, factory=Connection)
"""
LOADING = "sys.stderr.write('reading\\n'); time.sleep(0.3); return 'spam'"
WAITING = "time.sleep(0.2 * (int(self.stem) % 2)); return 'spam'"
COUNTING = "return text"
STORING = "return 'spam'"


@posix
@each_backend
@pytest.mark.parametrize(
    ("read", "workers", "sign"),
    [
        pytest.param(LOADING, 8, "reading", id="while-all-load"),
        pytest.param(WAITING, 2, "{}-1 loaded 200 files", id="while-one-waits"),
        pytest.param(COUNTING, 8, "all 8 workers have loaded: counting", id="while-all-count"),
        pytest.param(STORING, 8, "storing", id="while-three-store-and-five-wait-in-line"),
    ],
)
@pytest.mark.parametrize("kind", ["worker", "thread"])
def test_ctrl_c(many: Path, backend: str, read: str, workers: int, sign: str, kind: str) -> None:
    # A connection that is left open would be told by a warning.
    program = [sys.executable, "-W", "always", "-c", patched(SLOW.format(read)), str(many)]
    threads = workers if kind == "thread" else 0
    options = f"--backend {backend} --workers {workers} --threads {threads}"
    command = [*program, *options.split()]
    sign = sign.format(kind)
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, encoding="utf-8") as process:
        try:
            assert process.stdout is not None
            assert process.stderr is not None
            # Line by line: `communicate` would forget what has been read ahead.
            while (line := process.stderr.readline()) != f"{sign}\n":
                assert line, "it has ended before its time"
            process.send_signal(signal.SIGINT)
            rest = process.stderr.readlines()
            assert process.stdout.read() == ""
            assert process.wait(PATIENCE) == 130
        finally:
            process.kill()
    told = re.compile(
        r"(reading|storing)\n|(worker|thread)-\d (loaded|counted) [\d,]+ (files?|words)\n"
    )
    assert [line for line in rest if not told.fullmatch(line)] == ["aiosync: interrupted\n"]


# The progress bar


def as_seen(data: str) -> list[str]:
    """Return the lines that a terminal shows in the end."""
    lines = []
    for written in data.split("\n"):
        cells: list[str] = []
        for part in written.split("\r"):
            cells[: len(part)] = part
        lines.append("".join(cells).rstrip())
    return lines


@posix
@each_backend
def test_the_bar_on_a_terminal(many: Path, backend: str) -> None:
    pty = pytest.importorskip("pty")
    ours, theirs = pty.openpty()
    with open(ours, "rb", buffering=0) as terminal:
        command = [sys.executable, "-m", "aiosync", str(many), "--backend", backend]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=theirs) as process:
            os.close(theirs)
            data = b""
            try:
                while chunk := terminal.read(4096):
                    data += chunk
            except OSError:
                pass  # how Linux tells the end
            assert process.stdout is not None
            assert b"backend" in process.stdout.read()
    assert process.returncode == 0
    shown = data.decode()
    assert "\x1b" not in shown
    bars = re.findall(r"\r\[#*\.*\] +(\d+)/400 files", shown)
    assert {int(done) for done in bars} >= set(range(2, 401))
    # The bar has gone without a trace: the same lines as elsewhere, although in another order.
    plain = aiosync(many, "--backend", backend).stderr
    assert sorted(as_seen(shown)) == sorted(as_seen(plain))


@each_backend
def test_the_bar_may_be_forced_and_forbidden(
    tree: Path, backend: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(tree, "--backend", backend, "--progress") == 0
    forced = capsys.readouterr().err
    assert f"[{'#' * 30}] 5/5 files" in forced
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert main(tree, "--backend", backend, "--no-progress") == 0
    forbidden = capsys.readouterr().err
    assert "\r" not in forbidden
    assert sorted(as_seen(forced)) == sorted(as_seen(forbidden))


def test_the_bar_makes_room_for_the_last_line(
    tree: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(path: Path, **_: object) -> str:
        if path.name == "two.TXT":
            raise OSError(errno.EIO, "Input/output error")
        return ""

    monkeypatch.setattr(Path, "read_text", fail)
    # One worker, so that it has drawn the bar before it fails.
    assert main(tree, "--progress", "--workers", 1, "--backend", "asyncio") == 2
    err = capsys.readouterr().err
    assert "4/5 files" in err
    name = repr(str(tree / "two.TXT"))
    assert as_seen(err) == [
        "asyncio: 5 files for 1 worker",
        f"aiosync: error: cannot read {name}: Input/output error",
        "",
    ]


def test_screen() -> None:
    stream = io.StringIO()
    screen = demo.Screen(stream)
    screen.show("[no terminal]")
    screen.paint("one\n", "")
    screen.has_bar = True
    screen.show("[##..]")
    screen.emit(logging.LogRecord("x", logging.INFO, "x", 1, "tw%s", ("o",), None))
    screen.show("[####]")
    screen.show("")
    wipe = "\r      \r"
    assert stream.getvalue() == f"one\n[##..]{wipe}two\n[##..]{wipe}[####]{wipe}"


@pytest.mark.parametrize(
    ("done", "total", "bar"),
    [
        (0, 3, "[......] 0/3 files"),
        (1, 3, "[##....] 1/3 files"),
        (3, 3, "[######] 3/3 files"),
        (7, 120, "[......]   7/120 files"),
        (119, 120, "[#####.] 119/120 files"),
    ],
)
def test_draw_bar(done: int, total: int, bar: str) -> None:
    assert demo.draw_bar(done, total, 6) == bar


# Where the output goes


@pytest.mark.parametrize("args", [["."], ["--help"]])
def test_nobody_reads_stdout(tree: Path, args: list[str]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = aiosync(*args, cwd=tree, stdout=writer)
    finally:
        os.close(writer)
    assert done.returncode == 141
    assert "Traceback" not in done.stderr
    assert "Error" not in done.stderr
    # Nor has it begun with the second backend.
    assert "trio" not in done.stderr


def test_nobody_reads_stdout_of_main(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        assert main(tree) == 141


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_no_room_for_stdout(tree: Path) -> None:
    with open("/dev/full", "w") as full:
        done = aiosync(tree, stdout=full)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == "aiosync: error: [Errno 28] No space left on device"
    assert "Traceback" not in done.stderr


def test_stdout_that_cannot_say_it(tree: Path) -> None:
    done = aiosync(tree / "deep" / "three.md", env={"PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0
    assert Table.all(done.stdout)[0].names == {"na\\xefve": 2, "eggs": 1, "Gr\\xf6\\xdfe": 1}


def test_write_out(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    stdout = io.TextIOWrapper(raw, encoding="latin-1", newline="\n")
    monkeypatch.setattr(sys, "stdout", stdout)
    demo.write_out("Größe")
    demo.write_out("ö is not \N{SNOWMAN}")
    assert raw.getvalue() == b"Gr\xf6\xdfe\n\\xf6 is not \\u2603\n"


def test_nobody_reads_stderr(tree: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = aiosync(tree, "--progress", stderr=writer)
    finally:
        os.close(writer)
    for backend, table in zip(BACKENDS, Table.all(done.stdout), strict=True):
        table.check(backend, TEXTS)


def test_there_is_no_stderr(
    tree: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stderr", None)
    assert main(tree, "--backend", "asyncio") == 0
    assert main("nowhere") == 2
    assert len(Table.all(capsys.readouterr().out)) == 1


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main("--help")
    assert caught.value.code == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert out.startswith("usage: aiosync ")
    for option in ["FILE_OR_FOLDER", "--backend", "--workers", "--limit", "--progress"]:
        assert option in out


# The rest


def test_run_as_a_module(
    tree: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delitem(sys.modules, "aiosync.__main__")
    monkeypatch.setattr(sys, "argv", ["aiosync", str(tree), "--backend", "asyncio"])
    with pytest.raises(SystemExit) as caught:
        runpy.run_module("aiosync", run_name="__main__")
    assert caught.value.code == 0
    Table.all(capsys.readouterr().out)[0].check("asyncio", TEXTS)


def test_a_bug_is_not_hidden(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def divide(*_: object) -> str:
        return str(1 // 0)

    monkeypatch.setattr(demo, "table", divide)
    with pytest.raises(ZeroDivisionError):
        main(tree)


def group(*exceptions: BaseException) -> BaseExceptionGroup[BaseException]:
    return BaseExceptionGroup("", exceptions)


@pytest.mark.parametrize(
    ("error", "line", "status"),
    [
        (KeyboardInterrupt(), "aiosync: interrupted\n", 130),
        (group(BrokenBarrierError(), group(KeyboardInterrupt())), "aiosync: interrupted\n", 130),
        (BrokenPipeError(), "", 141),
        (OSError("disk\non fire"), "aiosync: error: disk on fire\n", 2),
        (group(BrokenBarrierError(), demo.DemoError("no")), "aiosync: error: no\n", 2),
    ],
)
def test_explain(error: BaseException, line: str, status: int) -> None:
    assert demo.explain(error) == (line, status)


def test_share_out(tmp_path: Path) -> None:
    files = [tmp_path / str(number) for number in range(7)]
    for workers in range(1, 10):
        parts = demo.share_out(files, workers)
        assert len(parts) == workers
        assert sorted(path for part in parts for path in part) == files
        sizes = {len(part) for part in parts}
        assert max(sizes) - min(sizes) <= 1


def test_whole_number() -> None:
    assert demo.whole_number("1") == 1
    assert demo.whole_number("10000") == 10_000
    for text in ["0", "-1", "10001", "1e3", "", "one"]:
        with pytest.raises(argparse.ArgumentTypeError, match=re.escape(repr(text))):
            demo.whole_number(text)


def test_a_thread_goes_home_between_two_files_when_the_run_is_over(
    tree: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = sorted(tree.rglob("*.md"))
    crew = demo.Crew([files], 1, 1, demo.Screen(io.StringIO()), demo.new_pool(tree / "unused"))
    crew.barrier.abort()
    with pytest.raises(BrokenBarrierError):
        crew.work_in_thread("thread-1", files)
    assert (crew.loaded, crew.rounds) == (0, 0)
