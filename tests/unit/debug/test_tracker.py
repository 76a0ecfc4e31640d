"""The watchdog, the report on a signal, and what a forked process does."""

from __future__ import annotations

import io
import logging
import os
import signal
import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

import anyio
import pytest
from anyio import create_task_group
from support.helpers import run_python, until, until_async

from aiosync import Barrier, BrokenBarrierError, Semaphore, as_threading, debug
from aiosync._observed import record_of

needs_signals = pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="no such signals")


def watchdogs() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "aiosync-watchdog"]


class TestWatchdog:
    @pytest.mark.anyio
    async def test_it_reports_each_case_once(self, caplog: pytest.LogCaptureFixture) -> None:
        semaphore = Semaphore(name="watched")
        async with create_task_group() as tasks:

            async def work() -> None:
                async with semaphore, semaphore:
                    pass

            tasks.start_soon(work, name="first")
            await until_async(lambda: debug.waiters(semaphore))
            debug._tracking.look(3600)
            assert not caplog.records
            for _ in range(2):
                debug._tracking.look(0)
                (logged,) = caplog.records
            assert logged.name == "aiosync.debug"
            assert logged.levelno == logging.WARNING
            message = logged.getMessage()
            first, _, report = message.partition("\n")
            assert first == "task 'first' has been blocked for more than 0 s by Semaphore 'watched'"
            assert report.startswith("aiosync report: ")
            assert "DEADLOCK: task 'first' waits for itself" in message
            for _ in range(2):
                tasks.start_soon(semaphore.acquire)
            await until_async(lambda: len(debug.waiters(semaphore)) == 3)
            debug._tracking.look(0)
            assert len(caplog.records) == 2
            assert ", and 1 more\n" in caplog.records[1].getMessage()
            tasks.cancel_scope.cancel()

    def test_it_runs_in_a_thread(self, caplog: pytest.LogCaptureFixture) -> None:
        """The event loop may be blocked."""
        debug.enable(watchdog=0.01)
        assert len(watchdogs()) == 1
        barrier = Barrier(2, name="watched")
        view = as_threading(barrier)
        thread = threading.Thread(target=view.wait, name="party", daemon=True)
        thread.start()
        until(lambda: caplog.records)
        assert (
            "thread 'party' has been blocked for more than 0.01 s by Barrier 'watched'"
            in caplog.text
        )
        view.wait()
        thread.join(20)
        debug.disable()
        until(lambda: not watchdogs())

    def test_it_goes_on_after_an_error(
        self, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        looks = iter([LookupError, None])
        look = debug._tracking.look

        def fail_once(threshold: float) -> None:
            error = next(looks, None)
            if error is not None:
                raise error
            look(threshold)

        monkeypatch.setattr(debug._tracking, "look", fail_once)
        semaphore = Semaphore(0, name="watched")
        debug.enable(watchdog=0.01)
        thread = threading.Thread(target=as_threading(semaphore).acquire)
        thread.start()
        until(lambda: "blocked for more than" in caplog.text)
        assert "the watchdog has failed" in caplog.text
        semaphore.release()
        thread.join(20)

    def test_a_new_threshold_replaces_the_old_one(self) -> None:
        debug.enable(watchdog=3600)
        debug.enable(watchdog=1800)
        until(lambda: len(watchdogs()) == 1)
        debug.enable(watchdog=None)
        until(lambda: not watchdogs())


@needs_signals
class TestDumpOnSignal:
    @pytest.fixture
    def printed(self) -> Any:
        """A file into which the report is printed on SIGUSR1."""
        file = io.StringIO()
        debug.dump_on(signal.SIGUSR1, file=file)
        yield file
        debug._dumpers.pop(signal.SIGUSR1).stop()

    def test_the_report_and_the_stack(self, printed: io.StringIO) -> None:
        semaphore = Semaphore(name="dumped")
        semaphore.acquire_nowait()
        os.kill(os.getpid(), signal.SIGUSR1)
        until(lambda: "test_the_report_and_the_stack" in printed.getvalue())
        assert "Semaphore 'dumped': value=0" in printed.getvalue()
        assert "most recent call first" in printed.getvalue()

    def test_the_rest_of_a_long_stack(self, printed: io.StringIO) -> None:
        """The report is not printed again."""
        os.write(debug._dumpers[signal.SIGUSR1]._write, b"  the rest\n")
        until(lambda: printed.getvalue())
        assert printed.getvalue() == "  the rest\n"

    def test_more_than_once(self, printed: io.StringIO) -> None:
        for count in (1, 2):
            os.kill(os.getpid(), signal.SIGUSR1)
            until(lambda count=count: printed.getvalue().count("aiosync report") == count)  # type: ignore[misc]

    @pytest.mark.anyio
    async def test_while_the_event_loop_is_blocked(self, printed: io.StringIO) -> None:
        os.kill(os.getpid(), signal.SIGUSR1)
        until(lambda: "aiosync report" in printed.getvalue())  # blocks

    def test_another_file(self, printed: io.StringIO) -> None:
        other = io.StringIO()
        debug.dump_on(signal.SIGUSR1, file=other)
        os.kill(os.getpid(), signal.SIGUSR1)
        until(lambda: "aiosync report" in other.getvalue())
        assert printed.getvalue() == ""

    def test_a_file_that_was_closed(
        self, printed: io.StringIO, caplog: pytest.LogCaptureFixture
    ) -> None:
        printed.close()
        for count in (1, 2):
            os.kill(os.getpid(), signal.SIGUSR1)
            until(lambda count=count: caplog.text.count("cannot be printed") >= count)  # type: ignore[misc]

    def test_more_signals_than_the_pipe_takes(self) -> None:
        """They do not block the main thread."""
        begun, go_on = threading.Event(), threading.Event()

        class Slow(io.StringIO):
            def write(self, text: str) -> int:
                begun.set()
                go_on.wait(20)
                return super().write(text)

        file = Slow()
        debug.dump_on(signal.SIGUSR1, file=file)
        try:
            for _ in range(1000):
                os.kill(os.getpid(), signal.SIGUSR1)
            assert begun.wait(20)
        finally:
            go_on.set()
            debug._dumpers.pop(signal.SIGUSR1).stop()
        assert "aiosync report" in file.getvalue()

    def test_standard_error_is_the_default(self, monkeypatch: pytest.MonkeyPatch) -> None:
        printed = io.StringIO()
        monkeypatch.setattr(sys, "stderr", printed)
        debug.disable()
        try:
            debug.dump_on(signal.SIGUSR1)
            assert debug.enabled()
            os.kill(os.getpid(), signal.SIGUSR1)
            until(lambda: "most recent call first" in printed.getvalue())
            assert "aiosync report" in printed.getvalue()
        finally:
            debug._dumpers.pop(signal.SIGUSR1).stop()

    def test_an_unknown_signal(self) -> None:
        before = os.dup(0)
        os.close(before)
        with pytest.raises(ValueError, match="signal"):
            debug.dump_on(100000)
        after = os.dup(0)
        os.close(after)
        assert after == before, "it left the pipe open"


def test_systems_without_signals(monkeypatch: pytest.MonkeyPatch) -> None:
    import faulthandler

    monkeypatch.delattr(faulthandler, "register", raising=False)
    with pytest.raises(RuntimeError, match="needs signals"):
        debug.dump_on(10)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_forked_process(tmp_path: Path) -> None:
    """It has a watchdog of its own, and leaves signals and recordings to its parent."""
    program = """if True:
        import os, signal, sys, threading, warnings
        from aiosync import Semaphore, debug
        warnings.simplefilter("ignore")
        debug.enable(watchdog=3600)
        debug.dump_on(signal.SIGUSR1)
        recording = debug.record(sys.argv[1])
        semaphore = Semaphore()
        pid = os.fork()
        if not pid:
            semaphore.acquire_nowait()
            assert [t.name for t in threading.enumerate()[1:]] == ["aiosync-watchdog"]
            os.kill(os.getpid(), signal.SIGUSR1)  # ends it: there is no handler
            os._exit(0)
        _, status = os.waitpid(pid, 0)
        assert os.WTERMSIG(status) == signal.SIGUSR1, status
        recording.close()
    """
    done = run_python("-c", program, str(tmp_path / "trace.json"))
    assert done.returncode == 0, done.stderr
    assert "has Semaphore" not in (tmp_path / "trace.json").read_text()


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_fork_while_other_threads_are_busy() -> None:
    """What they waited for, and the locks that they had, do not concern the child."""
    program = """if True:
        import os, signal, threading, time, warnings
        from aiosync import Semaphore, as_threading, debug
        warnings.simplefilter("ignore")
        debug.enable(watchdog=3600)
        semaphore = Semaphore(0)
        threading.Thread(target=as_threading(semaphore).acquire).start()
        while not debug.waiters(semaphore):
            time.sleep(0.001)
        locked, forked = threading.Event(), threading.Event()

        def lock() -> None:
            with debug._tracking._stop._cond:
                locked.set()
                forked.wait()

        threading.Thread(target=lock).start()
        locked.wait()
        pid = os.fork()
        if not pid:
            signal.alarm(20)
            assert not debug.waiters(semaphore)
            debug.enable(watchdog=1800)
            os._exit(0)
        _, status = os.waitpid(pid, 0)
        forked.set()
        semaphore.release()
        assert not status, status
    """
    done = run_python("-c", program)
    assert done.returncode == 0, done.stderr


@needs_signals
def test_what_a_forked_process_does(tmp_path: Path) -> None:
    """The same, seen from inside."""
    recording = debug.record(tmp_path / "trace.json")
    debug.dump_on(signal.SIGUSR1)
    dumper = debug._dumpers[signal.SIGUSR1]
    semaphore = Semaphore(0)
    record = record_of(semaphore)
    assert record is not None
    record.begin(None)
    debug._after_fork()
    assert not debug.waiters(semaphore)
    assert not debug._dumpers
    dumper.stop()
    Semaphore(name="child").acquire_nowait()
    recording.close()
    assert "child" not in (tmp_path / "trace.json").read_text()


@pytest.mark.slow
def test_the_environment_enables_it(monkeypatch: pytest.MonkeyPatch) -> None:
    program = "import aiosync, sys; print('aiosync.debug' in sys.modules, end=' ');"
    program += "from aiosync import debug; print(debug.enabled())"
    for value, expected in {"1": "True True", "0": "False False", "": "False False"}.items():
        monkeypatch.setenv("AIOSYNC_DEBUG", value)
        assert run_python("-c", program).stdout.strip() == expected, value


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="no such signals")
@pytest.mark.skipif(sys.version_info < (3, 14), reason="faulthandler is not safe enough")
def test_a_main_thread_that_is_blocked_in_c(tmp_path: Path) -> None:
    """No handler of `signal.signal` would run until the call returns."""
    program = """if True:
        import os, signal, sqlite3, sys, threading, time
        from aiosync import Semaphore, debug
        debug.dump_on(signal.SIGUSR1, file=open(sys.argv[1], "w"))
        semaphore = Semaphore(name="mail")
        semaphore.acquire_nowait()
        started = threading.Event()
        connection = sqlite3.connect(":memory:")
        connection.create_function("started", 0, lambda: started.set() or 1)
        def disturb():
            started.wait(20)
            os.kill(os.getpid(), signal.SIGUSR1)
            while "most recent call" not in open(sys.argv[1]).read(): time.sleep(0.01)
            connection.interrupt()
        threading.Thread(target=disturb, daemon=True).start()
        try:
            connection.execute(
                "WITH RECURSIVE n(i) AS (SELECT started() UNION ALL SELECT i + 1 FROM n) "
                "SELECT count(*) FROM n"
            ).fetchall()
        except sqlite3.OperationalError as error:
            print(error)
    """
    report = tmp_path / "report"
    done = run_python("-c", program, str(report))
    assert done.stdout.strip() == "interrupted", done.stderr
    assert "Semaphore 'mail': value=0" in report.read_text()


@pytest.mark.anyio
async def test_a_report_while_everything_changes() -> None:
    """Reports from another thread, while tasks acquire and release."""
    stop = threading.Event()
    reports: list[str] = []

    def look() -> None:
        while not stop.is_set():
            reports.append(debug.report())

    looker = threading.Thread(target=look, daemon=True)
    looker.start()
    semaphore, barrier = Semaphore(2, name="busy"), Barrier(2)

    async def work() -> None:
        while len(reports) < 20:
            async with semaphore:
                await anyio.lowlevel.checkpoint()
            with suppress(BrokenBarrierError):
                await barrier.wait()

    with anyio.fail_after(20):
        async with create_task_group() as tasks:
            for _ in range(4):
                tasks.start_soon(work)
            await until_async(lambda: len(reports) >= 20)
            barrier.abort()
            tasks.cancel_scope.cancel()
    stop.set()
    looker.join(20)
    assert not any("DEADLOCK" in report for report in reports)
