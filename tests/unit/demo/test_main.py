"""The demo, ``python -m aiosync``, as a process: exit status, errors, Ctrl-C and closed pipes."""

from __future__ import annotations

import os
import re
import runpy
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from support.demo import (
    BACKENDS,
    PATIENCE,
    TEXTS,
    Result,
    aiosync,
    each_backend,
    main,
    patched,
    posix,
    python,
)

from aiosync._demo import _run

pytestmark = pytest.mark.slow


# What the user did wrong


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["nowhere"], r"cannot read 'nowhere': .+"),
        ([""], r"cannot read '': .+"),
        (["two\nlines"], r"cannot read 'two\\nlines': .+"),
        (["empty"], r"there are no text files in 'empty'"),
        (["--workers", "0"], r"argument --workers: must be a whole number .+, not '0'"),
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


# Without trio

NO_TRIO = """
    import sys
    sys.modules["trio"] = None
"""


def test_without_trio_asyncio_is_the_default(tree: Path) -> None:
    done = python("-c", patched(NO_TRIO), tree)
    assert done.returncode == 0
    (result,) = Result.all(done.stdout)
    result.check("asyncio", TEXTS)


@pytest.mark.parametrize("wanted", ["trio", "both"])
def test_trio_is_asked_for_but_not_installed(tree: Path, wanted: str) -> None:
    done = python("-c", patched(NO_TRIO), tree, "--backend", wanted)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "aiosync: error: trio is not installed, so the demo cannot run on it\n"


# Ctrl-C

# An uninterrupted run takes the better part of a minute. What it writes tells where it is.
SLOW = """
    import signal, sqlite3, sys, time
    from functools import partial
    from pathlib import Path
    import aiosync._demo._workers as workers
    signal.signal(signal.SIGINT, signal.default_int_handler)
    text = b"spam " * 200_000
    def tell(what):
        sys.stderr.write(what + "\\n")
    def read_bytes(self):
        {}
    Path.read_bytes = read_bytes
    class Words:
        def findall(self, text, genuine=workers._WORD):
            tell("counting")
            return genuine.findall(text)
    workers._WORD = Words()
    class Connection(sqlite3.Connection):
        def executemany(self, *args):
            tell("storing")
            time.sleep(1)
            return super().executemany(*args)
    sqlite3.connect = partial(sqlite3.connect, factory=Connection)
"""
LOADING = "tell('reading'); time.sleep(0.3); return b'spam'"
# The worker with the even files has the last one soon, and then waits for the other.
WAITING = """if int(self.stem) % 2: time.sleep(0.2)
        elif self.stem == '398': tell('waiting')
        return b'spam'"""
COUNTING = "return text"
STORING = "return b'spam'"


@posix
@each_backend
@pytest.mark.parametrize(
    ("read", "workers", "sign"),
    [
        pytest.param(LOADING, 8, "reading", id="while-all-read"),
        pytest.param(WAITING, 2, "waiting", id="while-one-waits"),
        pytest.param(COUNTING, 8, "counting", id="while-all-count"),
        pytest.param(STORING, 8, "storing", id="while-three-store-and-five-wait"),
    ],
)
@pytest.mark.parametrize("kind", ["task", "thread"])
def test_ctrl_c(many: Path, backend: str, read: str, workers: int, sign: str, kind: str) -> None:
    # A connection that is left open would be told by a warning.
    program = [sys.executable, "-W", "always", "-c", patched(SLOW.format(read)), str(many)]
    threads = workers if kind == "thread" else 0
    options = f"--backend {backend} --workers {workers} --threads {threads}"
    command = [*program, *options.split()]
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
            assert Result.all(process.stdout.read()) == []
            assert process.wait(PATIENCE) == 130
        finally:
            process.kill()
    told = {"reading\n", "waiting\n", "counting\n", "storing\n"}
    assert [line for line in rest if line not in told] == ["aiosync: interrupted\n"]


# Where the output goes


@pytest.mark.parametrize("args", [["."], ["--help"]])
def test_nobody_reads_stdout(tree: Path, args: list[str]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = aiosync(*args, cwd=tree, stdout=writer)
    finally:
        os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")


def test_only_the_first_line_is_read(tree: Path) -> None:
    command = [sys.executable, "-m", "aiosync", str(tree)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, encoding="utf-8") as process:
        assert process.stdout is not None
        assert process.stderr is not None
        first = process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 141
    assert first == "aiosync: tasks and threads share a semaphore, a barrier and a pool.\n"


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
    assert done.stderr == "aiosync: error: [Errno 28] No space left on device\n"


def test_stdout_that_cannot_say_it(tree: Path) -> None:
    done = aiosync(tree / "deep" / "three.md", env={"PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0
    assert Result.all(done.stdout)[0].frequent == {"na\\xefve": 2, "eggs": 1, "Gr\\xf6\\xdfe": 1}


@pytest.mark.parametrize("unreadable", [False, True])
def test_nobody_reads_stderr(tree: Path, unreadable: bool) -> None:
    if unreadable:
        (tree / "binary.txt").write_bytes(b"\0")
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = aiosync(tree, stderr=writer)
    finally:
        os.close(writer)
    assert done.returncode == unreadable
    assert [result.backend for result in Result.all(done.stdout)] == BACKENDS


def test_there_is_no_stderr(
    tree: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stderr", None)
    assert main(tree, "--backend", "asyncio") == 0
    assert main("nowhere") == 2
    assert len(Result.all(capsys.readouterr().out)) == 1


def test_there_is_no_stdout(
    tree: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    assert main(tree, "--backend", "asyncio") == 0
    assert capsys.readouterr().err == ""


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main("--help")
    assert caught.value.code == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert out.startswith("usage: aiosync ")
    for option in ["FILE_OR_FOLDER", "--backend", "--workers", "--limit", "--trace", "--live"]:
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
    Result.all(capsys.readouterr().out)[0].check("asyncio", TEXTS)


def test_a_bug_is_not_hidden(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def divide(*_: object) -> str:
        return str(1 // 0)

    monkeypatch.setattr(_run, "summarize", divide)
    with pytest.raises(ZeroDivisionError):
        main(tree)
