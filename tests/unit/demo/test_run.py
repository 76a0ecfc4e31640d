"""One run of the demo: on a terminal, in a pipe, and with a trace."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from typing import TYPE_CHECKING, Any

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
)
from support.terminal import FakeTerminal

from aiosync import debug

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path
    from typing import Self

pytestmark = pytest.mark.slow


# In a pipe


def test_both_backends_one_after_the_other(tree: Path) -> None:
    done = aiosync(tree)
    assert (done.returncode, done.stderr) == (0, "")
    results = Result.all(done.stdout)
    for backend, result in zip(BACKENDS, results, strict=True):
        result.check(backend, TEXTS)
    assert results[0].frequent == results[1].frequent
    # Nothing but lines goes into a pipe.
    assert "\r" not in done.stdout
    assert "\x1b" not in done.stdout


def test_the_lines_of_a_run(tree: Path) -> None:
    variables = {"COLUMNS": "80", "PYTHONIOENCODING": "ascii"}
    done = aiosync(tree / "one.py", "--backend", "trio", env=variables)
    lines = done.stdout.splitlines()
    assert lines[0] == "aiosync: tasks and threads share a semaphore, a barrier and a pool."
    assert lines[4] == ""
    assert lines[5].startswith("trio:          ")
    assert all(len(line) < 80 for line in lines)
    start = next(index for index, line in enumerate(lines) if line.startswith("task-1 "))
    rows = lines[start : start + 8]
    assert [row.split()[0] for row in rows] == [f"task-{n}" for n in range(1, 5)] + [
        f"thread-{n}" for n in range(5, 9)
    ]
    assert all(re.fullmatch(r"[ .r|c#]*", row[10:]) for row in rows)
    assert any("|" in row for row in rows)
    assert lines[-1].startswith(". waiting   r reading")


def test_colours_may_be_forced(tree: Path) -> None:
    done = aiosync(tree, "--backend", "trio", env={"FORCE_COLOR": "1"})
    assert "\x1b[35m" in done.stdout
    screen = FakeTerminal(200, 100)
    screen.feed(done.stdout)  # colours only: everything stays where it was written
    assert screen.is_as_before
    assert screen.frames == 0


def test_redrawing_may_be_forced(tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(tree, "--backend", "trio", "--live") == 0
    screen = FakeTerminal(200, 100)
    screen.feed(capsys.readouterr().out)
    assert screen.frames >= 2
    Result.all("\n".join(screen.text))[0].check("trio", TEXTS)


def test_more_workers_than_lines(tree: Path) -> None:
    done = aiosync(tree, "--backend", "trio", "--workers", 100, env={"LINES": "20"})
    shown = re.findall(r"^(task|thread)-", done.stdout, re.MULTILINE)
    assert (shown.count("task"), shown.count("thread")) == (7, 6)
    assert "          and 87 more\n" in done.stdout


# A trace


@each_backend
def test_a_trace(
    tree: Path, tmp_path: Path, backend: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "trace.json"
    assert main(tree, "--backend", backend, "--trace", path) == 0
    events = json.loads(path.read_text("utf-8"))
    names = {event["args"]["name"] for event in events if event["name"] == "thread_name"}
    assert {f"task 'task-{number}'" for number in range(1, 5)} <= names
    assert {f"thread 'thread-{number}'" for number in range(5, 9)} <= names
    seen = {event["name"] for event in events}
    assert {"has Semaphore 'permits'", "has ConnectionPool 'connections'", "round"} <= seen
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == f"The trace is in {path}: open it in https://ui.perfetto.dev"


def test_a_trace_while_debugging_is_enabled(tree: Path, tmp_path: Path) -> None:
    was_enabled = debug.enabled()
    debug.enable(watchdog=None)
    try:
        assert main(tree, "--backend", "asyncio", "--trace", tmp_path / "trace.json") == 0
        assert debug.enabled()
    finally:
        if not was_enabled:
            debug.disable()


def test_a_trace_that_cannot_be_written(tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(tree / "nowhere" / "trace.json")
    assert main(tree, "--trace", path) == 2
    message = f"aiosync: error: cannot write {path!r}: No such file or directory\n"
    assert capsys.readouterr().err == message


# On a terminal


class Session:
    """The demo on a terminal of its own, and what that shows."""

    def __init__(self, command: list[str], columns: int, lines: int, **variables: str) -> None:
        import fcntl
        import pty
        import struct
        import termios

        self.screen = FakeTerminal(columns, lines)
        self.data = ""
        self.master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))
        left_out = {"COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR"}
        env = {name: value for name, value in os.environ.items() if name not in left_out}
        env |= {"TERM": "xterm", "PYTHONIOENCODING": "utf-8", **variables}
        self.process = subprocess.Popen(command, stdout=slave, stderr=slave, stdin=slave, env=env)
        os.close(slave)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.master)

    def chunks(self) -> Iterator[str]:
        """Feed the screen with what the demo writes, until it ends."""
        rest = b""
        while True:
            try:
                rest += os.read(self.master, 65536)
            except OSError:  # how Linux tells the end
                return
            # Complete lines and frames only.
            *_, last = re.finditer(rb"\n|\x1b\[\?25h|^", rest)
            text, rest = rest[: last.end()].decode(), rest[last.end() :]
            self.data += text
            self.screen.feed(text)
            yield text

    def finish(self) -> int:
        for _ in self.chunks():
            pass
        return self.process.wait(PATIENCE)


def session(*args: object, columns: int = 80, lines: int = 24, **variables: Any) -> Session:
    return Session([sys.executable, "-m", "aiosync", *map(str, args)], columns, lines, **variables)


@posix
@each_backend
@pytest.mark.parametrize("columns", [40, 80, 120])
def test_on_a_terminal(tree: Path, backend: str, columns: int) -> None:
    with session(tree, "--backend", backend, columns=columns, lines=50) as demo:
        assert demo.finish() == 0
        screen = demo.screen
    assert screen.frames >= 2
    assert screen.is_as_before
    # The frames are gone; the timeline is left.
    assert not any(line.startswith("semaphore ") and " in use, " in line for line in screen.text)
    rows = [line for line in screen.text if re.match("(task|thread)-", line)]
    assert len(rows) == 8
    assert all(len(row) < columns for row in rows)
    (axis,) = [line for line in screen.text if line.startswith("          0  ")]
    assert len(axis) == columns - 1
    assert screen.text[-1] == ""
    assert " of 3 in use, " in demo.data
    assert "\x1b[36m" in demo.data


@posix
@pytest.mark.parametrize(
    ("variables", "live"),
    [({"NO_COLOR": "1"}, True), ({"TERM": "dumb"}, False)],
)
def test_a_terminal_without_colours(tree: Path, variables: dict[str, Any], live: bool) -> None:
    with session(tree, "--backend", "trio", **variables) as demo:
        assert demo.finish() == 0
    assert not re.search(r"\x1b\[\d*m", demo.data)
    assert ("\x1b" in demo.data) is live
    assert (demo.screen.frames > 0) is live


# The first file takes long, so there is time for Ctrl-C.
STUCK = """
    import signal, time
    from pathlib import Path
    from typing import Self
    signal.signal(signal.SIGINT, signal.default_int_handler)
    def read_bytes(self):
        time.sleep(0.3)
        return b"spam"
    Path.read_bytes = read_bytes
"""


@posix
@each_backend
@pytest.mark.parametrize("threads", [0, 4, 8])
def test_ctrl_c_on_a_terminal(many: Path, backend: str, threads: int) -> None:
    command = [sys.executable, "-c", patched(STUCK), str(many), "--backend", backend]
    with Session([*command, "--threads", str(threads)], 80, 24) as demo:
        told = False
        for _ in demo.chunks():
            if not told and any("reading   " in line for line in demo.screen.text):
                demo.process.send_signal(signal.SIGINT)
                told = True
        assert demo.process.wait(PATIENCE) == 130
        screen = demo.screen
    assert screen.is_as_before
    # The last frame is left, and the message below it.
    assert screen.text[-2:] == ["aiosync: interrupted", ""]
    assert len([line for line in screen.text if re.match("(task|thread)-", line)]) == 8
    assert (
        len([line for line in screen.text if line.startswith("semaphore ") and " in use, " in line])
        == 1
    )
    assert screen.text[-3].split()[0] == ("thread-8" if threads else "task-8")


@posix
def test_an_error_on_a_terminal(tree: Path) -> None:
    broken = """
        import aiosync._demo._database as database
        database._ADD = "nonsense"
    """
    command = [sys.executable, "-c", patched(broken), str(tree), "--backend", "trio"]
    with Session(command, 120, 40) as demo:
        assert demo.finish() == 2
        text = demo.screen.text
    assert text[-2:] == [
        'aiosync: error: cannot store the counts: near "nonsense": syntax error',
        "",
    ]
    assert re.match("thread-8 ", text[-3])
