"""How a run that failed is reported."""

from __future__ import annotations

import sqlite3

import pytest

from aiosync import BrokenBarrierError
from aiosync._demo._errors import DemoError, explain


def group(*exceptions: BaseException) -> BaseExceptionGroup[BaseException]:
    return BaseExceptionGroup("", exceptions)


@pytest.mark.parametrize(
    ("error", "line", "status"),
    [
        (KeyboardInterrupt(), "aiosync: interrupted\n", 130),
        (group(BrokenBarrierError(), group(KeyboardInterrupt())), "aiosync: interrupted\n", 130),
        (BrokenPipeError(), "", 141),
        (OSError("disk\non fire"), "aiosync: error: disk on fire\n", 2),
        (sqlite3.Error("full"), "aiosync: error: cannot store the counts: full\n", 2),
        (group(BrokenBarrierError(), DemoError("no")), "aiosync: error: no\n", 2),
    ],
)
def test_explain(error: BaseException, line: str, status: int) -> None:
    assert explain(error) == (line, status)


@pytest.mark.parametrize("error", [ZeroDivisionError(), SystemExit(0), group(ValueError())])
def test_what_is_a_bug_or_an_exit_is_raised(error: BaseException) -> None:
    with pytest.raises(type(error)) as caught:
        explain(error)
    assert caught.value is error
