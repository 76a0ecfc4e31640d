"""Recordings are right by the Chrome trace event format, and say what happened."""

from __future__ import annotations

import dis
import json
import os
import signal
import subprocess
import sys
import threading
from collections import defaultdict
from contextlib import suppress
from pathlib import Path
from typing import Any

import anyio
import pytest
from anyio import create_task_group
from support.helpers import run_python, until_async

from aiosync import Barrier, BrokenBarrierError, ConnectionPool, Semaphore, as_threading, debug
from aiosync.recipes import sqlite_pool

pytestmark = pytest.mark.anyio

Event = dict[str, Any]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "trace.json"


def check(text: str) -> list[Event]:
    """Return the events of a recording that is right by the format.

    https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU
    """
    events: list[Event] = json.loads(text)
    stacks: dict[tuple[int, int], list[Event]] = defaultdict(list)
    named: set[tuple[int, int]] = set()
    for event in events:
        assert isinstance(event["name"], str)
        assert isinstance(event["pid"], int)
        assert isinstance(event["tid"], int)
        row = event["pid"], event["tid"]
        match event["ph"]:
            case "M":
                assert event["name"] in {"process_name", "thread_name"}
                assert isinstance(event["args"]["name"], str)
                named.add(row)
                continue
            case "B":
                stacks[row].append(event)
            case "E":
                assert event["ts"] >= stacks[row].pop()["ts"], "it ends what has begun"
            case "X":
                assert event["dur"] >= 0
            case "i":
                assert event["s"] in {"g", "p", "t"}
            case other:
                pytest.fail(f"unknown phase {other}")
        assert event["ts"] >= 0
        assert row in named, "a row has a name before it is used"
    assert not any(stacks.values()), "all slices have ended"
    check_nesting(events)
    return events


def check_nesting(events: list[Event]) -> None:
    """Slices of one row do not overlap: each is before, after or inside of another."""
    rows: dict[tuple[int, int], list[tuple[float, float]]] = defaultdict(list)
    began: dict[tuple[int, int], list[float]] = defaultdict(list)
    for event in events:
        key = event["pid"], event["tid"]
        if event["ph"] == "X":
            rows[key].append((event["ts"], -event["dur"]))
        elif event["ph"] == "B":
            began[key].append(event["ts"])
        elif event["ph"] == "E":
            start = began[key].pop()
            rows[key].append((start, start - event["ts"]))
    for row in rows.values():
        open_until: list[float] = []
        for start, negative in sorted(row):
            while open_until and open_until[-1] <= start:
                open_until.pop()
            end = start - negative
            assert not open_until or end <= open_until[-1] + 0.01
            open_until.append(end)


def rows(events: list[Event]) -> dict[str, list[str]]:
    """Return the names of what is in each row, by the name of the row."""
    names = {(e["pid"], e["tid"]): e["args"]["name"] for e in events if e["name"] == "thread_name"}
    found: dict[str, list[str]] = {name: [] for name in names.values()}
    for event in events:
        if event["ph"] in "XBi":
            found[names[event["pid"], event["tid"]]].append(event["name"])
    return found


async def test_waiting_and_holding(path: Path) -> None:
    with debug.record(path):
        semaphore = Semaphore(name="mail")

        async def work() -> None:
            async with semaphore:
                pass

        async with create_task_group() as tasks, semaphore:
            tasks.start_soon(work, name="worker")
            await until_async(lambda: debug.waiters(semaphore))
            await anyio.sleep(0.01)  # uvloop may end it a millisecond early
        thread = threading.Thread(target=as_threading(semaphore).acquire, name="T")
        thread.start()
        await until_async(lambda: not thread.is_alive())
    events = check(path.read_text())
    found = rows(events)
    assert found["task 'worker'"] == ["wait for Semaphore 'mail'", "has Semaphore 'mail'"]
    assert "has Semaphore 'mail'" in found["thread 'T'"]
    # The thread waits too, if the processor has been taken from it.
    waits = [e for e in events if e["name"].startswith("wait") and e["args"]["line"]]
    wait = max(waits, key=lambda e: e["dur"])
    assert wait["args"]["outcome"] == "got"
    assert "test_trace.py:" in wait["args"]["line"]
    assert wait["dur"] >= 1000  # microseconds


async def test_permits_that_are_not_released_in_order(path: Path) -> None:
    """Slices are nested, so the inner one is cut in two."""
    with debug.record(path):
        first, second = Semaphore(name="first"), Semaphore(name="second")
        await first.acquire()
        await second.acquire()
        first.release()
        second.release()
    events = [e for e in check(path.read_text()) if e["ph"] in "BE"]
    assert [(e["ph"], e["name"]) for e in events] == [
        ("B", "has Semaphore 'first'"),
        ("B", "has Semaphore 'second'"),
        ("E", ""),
        ("E", ""),
        ("B", "has Semaphore 'second'"),
        ("E", ""),
    ]


async def test_a_permit_that_was_taken_before_the_recording(path: Path) -> None:
    semaphore = Semaphore()
    await semaphore.acquire()
    with debug.record(path):
        semaphore.release()
    check(path.read_text())


async def test_a_wait_that_began_before_the_recording(path: Path) -> None:
    semaphore = Semaphore(0, name="early")
    async with create_task_group() as tasks:
        tasks.start_soon(semaphore.acquire)
        await until_async(lambda: debug.waiters(semaphore))
        with debug.record(path):
            pass
        semaphore.release()
    (wait,) = [e for e in check(path.read_text()) if e["name"] == "wait for Semaphore 'early'"]
    assert wait["ts"] == 0


async def test_rounds(path: Path) -> None:
    with debug.record(path):
        barrier = Barrier(2, name="start")

        async def wait() -> None:
            with suppress(BrokenBarrierError):
                await barrier.wait()

        for breaks in (False, True):
            async with create_task_group() as tasks:
                tasks.start_soon(wait, name=f"party {breaks}")
                await until_async(lambda: debug.waiters(barrier))
                await anyio.sleep(0.001)
                if breaks:
                    barrier.abort()
                else:
                    await barrier.wait()
    found = rows(check(path.read_text()))
    assert found["Barrier 'start'"] == ["round", "broken round: failed"]
    assert found["task 'party False'"] == found["task 'party True'"] == ["at Barrier 'start'"]


async def test_connections(path: Path) -> None:
    async def reset(connection: object) -> None:
        await anyio.sleep(0.001)

    async def check_one(connection: object) -> None:
        await anyio.sleep(0.001)

    with debug.record(path):
        async with ConnectionPool(
            object, name="db", max_size=1, reset=reset, check=check_one, loan_events=True
        ) as pool:
            async with pool.connection():
                pass
            with suppress(ZeroDivisionError):
                async with pool.connection():
                    raise ZeroDivisionError
            async with pool.connection():
                pass
            await pool.check()
    events = check(path.read_text())
    row = rows(events)["connection 1"]
    assert row[0] == "connect"
    assert [name for name in row if name.startswith("used by task '")]
    assert {"reset", "check", "closed"} <= set(row)
    groups = [e["args"]["name"] for e in events if e["name"] == "process_name"]
    assert "connections of db" in groups


async def test_outages(path: Path) -> None:
    works = False

    def connect() -> object:
        if not works:
            raise ConnectionError("no server")
        return object()

    outages: list[str] = []
    with debug.record(path):
        async with ConnectionPool(
            connect, name="db", min_size=1, on_event=lambda event: outages.append(event.kind)
        ):
            await until_async(lambda: "outage" in outages)
            works = True
            await until_async(lambda: "recovered" in outages)
            outages.clear()
    events = check(path.read_text())
    row = rows(events)["all"]
    assert row.count("outage") == 1
    failed = next(event for event in events if event["name"] == "connect_failed")
    assert failed["args"]["reason"] == "ConnectionError('no server')"


async def test_a_real_driver(path: Path, tmp_path: Path) -> None:
    with debug.record(path):
        async with sqlite_pool(tmp_path / "db", name="files") as pool:
            await pool.run(lambda connection: connection.execute("SELECT 1").fetchall())
    assert rows(check(path.read_text()))["connection 1"][0] == "connect"


async def test_what_has_not_ended_ends_with_the_recording(path: Path) -> None:
    async with create_task_group() as tasks:
        recording = debug.record(path)
        semaphore = Semaphore(name="mail")

        async def work() -> None:
            async with semaphore, semaphore:
                pass

        tasks.start_soon(work, name="worker")
        await until_async(lambda: debug.holders(semaphore))
        await until_async(lambda: debug.waiters(semaphore))
        await anyio.sleep(0.001)
        recording.close()
        recording.close()
        semaphore.release()
    found = rows(check(path.read_text()))["task 'worker'"]
    assert found[-2:] == ["has Semaphore 'mail'", "wait for Semaphore 'mail'"]
    assert repr(recording).endswith("closed>")


async def test_no_more_than_max_events(path: Path) -> None:
    with debug.record(path, max_events=20) as recording:
        assert "open" in repr(recording)
        semaphore = Semaphore()
        for _ in range(50):
            async with semaphore:
                pass
        recording.close()
    events = json.loads(path.read_text())
    assert len(events) == 20
    assert events[-1]["name"] == "the recording is full"


async def test_a_batch_is_written_while_it_goes_on(path: Path) -> None:
    with debug.record(path):
        semaphore = Semaphore()
        for _ in range(1000):
            async with semaphore:
                pass
        written = path.read_text()
        assert written.count("has Semaphore") > 500
        # It can be read as it is: the format does not need the end.
        assert len(json.loads(written + "]")) > 500
    check(path.read_text())


async def test_it_is_written_now_and_then(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("aiosync.debug._trace_file._INTERVAL", 0.0)
    with debug.record(path):
        semaphore = Semaphore(name="mail")
        await semaphore.acquire()
        assert "has Semaphore 'mail'" in path.read_text()


async def test_an_event_while_another_is_written(path: Path) -> None:
    """A signal handler may interrupt the writer."""
    with debug.record(path) as recording, recording._lock:
        semaphore = Semaphore()
        for _ in range(1000):
            async with semaphore:
                pass
    assert path.read_text().count("has Semaphore") == 1000


async def test_two_recordings_at_once(tmp_path: Path) -> None:
    with debug.record(tmp_path / "one"), debug.record(tmp_path / "two"):
        async with Semaphore(name="mail"):
            pass
    for name in ("one", "two"):
        assert "has Semaphore 'mail'" in (tmp_path / name).read_text()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no such device")
def test_a_full_disk_does_not_disturb_the_program(caplog: pytest.LogCaptureFixture) -> None:
    recording = debug.record("/dev/full")
    view = as_threading(Semaphore(name="mail"))
    for _ in range(200):
        with view:
            pass
    assert repr(recording) == "<aiosync.debug.Recording '/dev/full' closed>"
    assert "'/dev/full' cannot be written: [Errno 28]" in caplog.text
    recording.close()
    assert caplog.text.count("'/dev/full' cannot be written") == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no such device")
def test_a_full_disk_at_the_end(caplog: pytest.LogCaptureFixture) -> None:
    with debug.record("/dev/full"):
        pass
    assert "'/dev/full' cannot be written: [Errno 28]" in caplog.text


def test_a_disk_that_is_full_when_only_the_last_bracket_is_left(
    path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    recording: Any = debug.record(path)
    append = recording._file._append

    def fail(text: str) -> None:
        if "]" in text:
            raise OSError("no space left")
        append(text)

    monkeypatch.setattr(recording._file, "_append", fail)
    recording.close()
    assert "cannot be written: no space left" in caplog.text
    assert json.loads(path.read_text() + "]")


async def test_an_action_that_waits(path: Path) -> None:
    """The action of a barrier waits, while its party waits for the barrier."""
    semaphore = Semaphore(0, name="mail")
    barrier = Barrier(1, semaphore.acquire, name="noon")
    with debug.record(path):
        async with create_task_group() as tasks:
            tasks.start_soon(barrier.wait, name="worker")
            await until_async(lambda: debug.waiters(semaphore))
            await anyio.sleep(0.001)
            semaphore.release()
    found = rows(check(path.read_text()))["task 'worker'"]
    assert found == ["wait for Semaphore 'mail'", "has Semaphore 'mail'", "at Barrier 'noon'"]


async def test_a_permit_that_is_released_while_its_holder_waits(path: Path) -> None:
    first, second = Semaphore(name="first"), Semaphore(name="second")
    recording = debug.record(path)
    second.acquire_nowait()

    async def work() -> None:
        await first.acquire()
        await second.acquire()
        second.release()

    async with create_task_group() as tasks:
        tasks.start_soon(work, name="worker")
        await until_async(lambda: debug.waiters(second))
        await anyio.sleep(0.001)
        first.release()
        await anyio.sleep(0.001)
        second.release()
    recording.close()
    events = check(path.read_text())
    waits = [e for e in events if e["name"] == "wait for Semaphore 'second'"]
    assert [wait["args"]["outcome"] for wait in waits] == ["goes on", "got"]


async def test_subclasses_of_users(path: Path) -> None:
    class Meeting(Barrier):
        pass

    class Database(ConnectionPool[object]):
        pass

    with debug.record(path):
        await Meeting(1, name="noon").wait()
        async with Database(object, name="db") as pool, pool.connection():
            pass
    found = rows(check(path.read_text()))
    assert found["Meeting 'noon'"] == ["round"]
    assert any(name.startswith("used by ") for name in found["connection 1"])


class Interrupted(BaseException):
    pass


@pytest.mark.skipif(sys.platform == "win32", reason="no such signals")
@pytest.mark.parametrize("ends", [True, False])
def test_a_signal_handler_closes_it_while_it_is_written(
    path: Path, monkeypatch: pytest.MonkeyPatch, ends: bool
) -> None:
    recording: Any = debug.record(path)
    file = recording._file
    append = file._append

    def interrupted(text: str) -> None:
        monkeypatch.setattr(file, "_append", append)
        signal.raise_signal(signal.SIGUSR1)
        append(text)

    def handle(*_: object) -> None:
        recording.close()
        if ends:
            raise Interrupted

    view = as_threading(Semaphore(name="mail"))
    monkeypatch.setattr(file, "_append", interrupted)
    before = signal.signal(signal.SIGUSR1, handle)
    try:
        with suppress(Interrupted):
            for _ in range(200):
                with view:
                    pass
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert "has Semaphore 'mail'" in rows(check(path.read_text()))["thread 'MainThread'"]


@pytest.mark.slow
def test_it_can_be_read_wherever_an_exception_interrupts_it(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("aiosync.debug._trace_file._BATCH", 2)
    view = as_threading(Semaphore(2, name="mail"))

    def interrupt_at(step: int) -> bool:
        """Raise where a signal handler may; return whether the recording has so many steps."""
        left = step
        before_this = ""

        def trace(frame: Any, event: str, _: object) -> Any:
            nonlocal left, before_this
            if not frame.f_code.co_filename.endswith(("_trace.py", "_trace_file.py")):
                return None
            frame.f_trace_opcodes = True
            if event == "opcode":
                left -= before_this in {"RESUME", "CALL", "JUMP_BACKWARD"}
                before_this = dis.opname[frame.f_code.co_code[frame.f_lasti]]
            if not left:
                sys.settrace(None)
                raise Interrupted
            return trace

        with debug.record(path):
            before = sys.gettrace()
            sys.settrace(trace)
            try:
                with view, view, suppress(Interrupted):
                    pass
            except Interrupted:
                pass
            finally:
                sys.settrace(before)
        json.loads(path.read_text())
        return left <= 0

    step = 1
    while interrupt_at(step):
        step += 1
    assert step > 50


def test_threads_go_on_while_it_is_closed(path: Path) -> None:
    view = as_threading(Semaphore(3, name="mail"))
    stop = threading.Event()

    def work() -> None:
        while not stop.is_set():
            with view:
                view.acquire()
            view.release()

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(20):
            recording = debug.record(path)
            closers = [threading.Thread(target=recording.close) for _ in range(2)]
            for closer in closers:
                closer.start()
            for closer in closers:
                closer.join()
            check(path.read_text())
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def test_it_enables_debugging(path: Path) -> None:
    debug.disable()
    with debug.record(path):
        assert debug.enabled()


@pytest.mark.parametrize(("wrong", "error"), [(0, ValueError), ("x", TypeError)])
def test_wrong_arguments(path: Path, wrong: Any, error: type[Exception]) -> None:
    with pytest.raises(error):
        debug.record(path, max_events=wrong)


def test_a_file_that_cannot_be_opened(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="directory"):
        debug.record(tmp_path)


PROGRAM = """if True:
    import sys, anyio
    from aiosync import Semaphore, debug
    debug.record(sys.argv[1])
    semaphore = Semaphore(name="mail")
    async def main():
        async with semaphore:
            print("ready", flush=True)
            await anyio.sleep(20)
    anyio.run(main)
"""


@pytest.mark.slow
def test_a_program_that_is_interrupted(path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=20)
    assert "has Semaphore 'mail'" in [event["name"] for event in check(path.read_text())]


@pytest.mark.slow
def test_a_program_that_ends_without_closing_it(path: Path) -> None:
    done = run_python("-c", PROGRAM.replace("anyio.sleep(20)", "anyio.sleep(0)"), str(path))
    assert done.returncode == 0, done.stderr
    check(path.read_text())


def test_a_pid_is_in_the_name(path: Path) -> None:
    with debug.record(path):
        pass
    assert f"(pid {os.getpid()})" in path.read_text()
