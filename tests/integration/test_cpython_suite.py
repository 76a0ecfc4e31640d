"""CPython's own tests of threading's primitives, run against the views of `as_threading`.

They are those of the running interpreter, loaded when the tests are: `test.lock_tests`. None is
left out.
"""

from __future__ import annotations

import importlib
import threading
import unittest
from typing import Any

import pytest

import aiosync
from aiosync import as_threading

pytestmark = [pytest.mark.slow]
try:
    lock_tests: Any = importlib.import_module("test.lock_tests")
except ImportError:
    lock_tests = None
    pytestmark += [pytest.mark.skip(reason="this interpreter ships without its package `test`")]


def semaphore(value: int = 1) -> Any:
    return as_threading(aiosync.Semaphore(value))


def bounded_semaphore(value: int = 1) -> Any:
    return as_threading(aiosync.BoundedSemaphore(value))


def barrier(parties: int, action: Any = None, timeout: float | None = None) -> Any:
    return as_threading(aiosync.Barrier(parties, action, timeout))


if lock_tests is not None:

    class TestSemaphore(lock_tests.SemaphoreTests):  # type: ignore[misc]
        semtype = staticmethod(semaphore)

    class TestBoundedSemaphore(lock_tests.BoundedSemaphoreTests):  # type: ignore[misc]
        semtype = staticmethod(bounded_semaphore)

    class TestBarrier(lock_tests.BarrierTests):  # type: ignore[misc]
        barriertype = staticmethod(barrier)

    @pytest.mark.parametrize(
        ("ours", "suite"),
        [
            (TestSemaphore, lock_tests.SemaphoreTests),
            (TestBoundedSemaphore, lock_tests.BoundedSemaphoreTests),
            (TestBarrier, lock_tests.BarrierTests),
        ],
    )
    def test_no_test_of_the_suite_is_left_out(ours: type, suite: type) -> None:
        loader = unittest.TestLoader()
        names = loader.getTestCaseNames(suite)
        assert len(names) >= 8
        for name in names:
            assert getattr(ours, name) is getattr(suite, name)


def test_the_error_is_the_one_that_the_suite_expects() -> None:
    assert issubclass(aiosync.BrokenBarrierError, threading.BrokenBarrierError)
