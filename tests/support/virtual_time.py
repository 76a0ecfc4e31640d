"""Event loops of either backend whose time is virtual.

It stands still while something runs, and jumps to the next timer when everybody waits.

What must live here: the clocks. What is run under them is the tests' own matter.
"""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Awaitable, Callable
from typing import Any

import anyio
import sniffio
import trio
import trio.abc
import trio.testing


class VirtualTime:
    """What virtual clocks have in common: they notice a task that never lets time pass."""

    patience = 5000
    spun = False
    _steps = 0

    def step(self) -> bool:
        """Take note that something runs. Return True if time had better pass all the same."""
        self._steps += 1
        if self._steps < self.patience:
            return False
        self._steps = 0
        VirtualTime.spun = True
        return True

    def passes(self) -> None:
        self._steps = 0


def spun() -> bool:
    """Tell whether since the last call some task ran all the time, while time stood still."""
    answer, VirtualTime.spun = VirtualTime.spun, False
    return answer


class JumpingSelector(selectors.DefaultSelector):
    """Instead of waiting it lets the clock of its loop jump."""

    def __init__(self) -> None:
        super().__init__()
        self.loop: VirtualLoop
        self.time = VirtualTime()

    def select(self, timeout: float | None = None) -> Any:
        ready = super().select(0)
        if not ready:
            if timeout is None:
                raise RuntimeError("every task waits for ever")
            if timeout > 0:
                self.loop.now += timeout
                self.time.passes()
            elif self.time.step():
                self.loop.now += 1
        return ready


class VirtualLoop(asyncio.SelectorEventLoop):
    """An asyncio loop whose time is virtual. It complains if nothing would ever happen again.

    :param selector: what to do instead of waiting, if that is not to let the clock jump
    """

    now = 1000.0

    def __init__(self, selector: selectors.BaseSelector | None = None) -> None:
        selector = JumpingSelector() if selector is None else selector
        super().__init__(selector)
        if isinstance(selector, JumpingSelector):
            selector.loop = self

    def time(self) -> float:
        return self.now


class _SpinWatch(trio.abc.Instrument):
    def __init__(self, clock: trio.testing.MockClock) -> None:
        self.clock = clock
        self.time = VirtualTime()
        self.now = clock.current_time()

    def before_task_step(self, task: object) -> None:
        now = self.clock.current_time()
        if now != self.now:
            self.now = now
            self.time.passes()
        elif self.time.step():
            self.clock.jump(1)


def virtual(backend_name: str) -> tuple[str, dict[str, Any]]:
    """Return the arguments of `anyio.run` for virtual time; also what `anyio_backend` may be."""
    if backend_name == "trio":
        clock = trio.testing.MockClock(autojump_threshold=0)
        return "trio", {"clock": clock, "instruments": [_SpinWatch(clock)]}
    return "asyncio", {"loop_factory": VirtualLoop}


def run_virtually(backend_name: str, main: Callable[[], Awaitable[Any]]) -> Any:
    """Run a whole event loop, from its beginning to its end."""
    name, options = virtual(backend_name)
    return anyio.run(main, backend=name, backend_options=options)


def skip_time(seconds: float) -> None:
    """Let time pass in which the event loop does nothing, as if a task had blocked it."""
    if sniffio.current_async_library() == "trio":
        clock = trio.lowlevel.current_clock()
        assert isinstance(clock, trio.testing.MockClock)
        clock.jump(seconds)
    else:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualLoop)
        loop.now += seconds
