"""A fixture that enables debugging. Import it where each test needs it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from aiosync import debug

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(autouse=True)
def debugging() -> Iterator[None]:
    before = debug.enabled()
    debug.enable(watchdog=None)
    yield
    debug.disable()
    if before:
        debug.enable()
