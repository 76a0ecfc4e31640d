"""Fixtures that every test file may use; above all the matrix of event loops."""

from __future__ import annotations

import asyncio
import gc
import signal
import sys
from importlib.util import find_spec
from typing import Any

import pytest

_BACKENDS: list[Any] = [
    pytest.param(("asyncio", {"use_uvloop": False}), id="asyncio"),
    pytest.param(
        ("asyncio", {"use_uvloop": True}),
        id="uvloop",
        marks=pytest.mark.skipif(find_spec("uvloop") is None, reason="uvloop is not installed"),
    ),
    pytest.param(("trio", {}), id="trio"),
]
if sys.version_info >= (3, 12):

    def _eager_loop() -> asyncio.AbstractEventLoop:
        loop = asyncio.new_event_loop()
        loop.set_task_factory(asyncio.eager_task_factory)
        return loop

    _BACKENDS.append(pytest.param(("asyncio", {"loop_factory": _eager_loop}), id="eager"))


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


def pytest_collection_finish() -> None:
    """Keep the collector away from what stays until the end: modules, and the tests themselves.

    Many tests have it look for garbage, which takes a tenth of the time of all tests otherwise.
    """
    import hypothesis  # noqa: F401  (which looks for references that it would not find then)

    gc.collect()
    gc.freeze()


@pytest.fixture(params=_BACKENDS)
def anyio_backend(request: pytest.FixtureRequest) -> Any:
    """Run a test under every event loop that is supported."""
    return request.param
