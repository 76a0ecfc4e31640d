"""The command line of the demo."""

from __future__ import annotations

import argparse
import re

import anyio
import pytest
from support.demo import BACKENDS

from aiosync._demo._errors import DemoError
from aiosync._demo._options import parse, pick_backends, whole_number


def test_defaults() -> None:
    options = parse([])
    assert vars(options) == {
        "path": None,
        "backend": None,
        "workers": 8,
        "threads": 4,
        "limit": 3,
        "trace": None,
        "live": None,
    }


@pytest.mark.parametrize(("workers", "threads"), [(1, 0), (2, 1), (5, 2), (100, 50), (10_000, 50)])
def test_half_of_the_workers_are_threads(workers: int, threads: int) -> None:
    assert parse(["--workers", str(workers)]).threads == threads


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--workers", "0"], r"argument --workers: must be a whole number .+, not '0'"),
        (["--workers", "-3"], r"argument --workers: must be a whole number .+, not '-3'"),
        (["--workers", "two"], r"argument --workers: must be a whole number .+, not 'two'"),
        (["--limit", "0"], r"argument --limit: must be a whole number .+, not '0'"),
        (["--limit", "1.5"], r"argument --limit: must be a whole number .+, not '1.5'"),
        (["--limit", "9" * 30], r"argument --limit: must be a whole number .+, not '9+'"),
        (["--threads", "-1"], r"argument --threads: must be a whole number from 0 .+, not '-1'"),
        (["--threads", "9"], r"of 8 workers 9 can't be threads"),
        (["--limit"], r"argument --limit: expected one argument"),
        (["--backend", "curio"], r"argument --backend: invalid choice: 'curio'.+"),
        (["one", "more\nthan one"], "unrecognized arguments: more\nthan one"),
    ],
)
def test_a_mistake(args: list[str], message: str) -> None:
    with pytest.raises(DemoError) as caught:
        parse(args)
    assert re.fullmatch(message, str(caught.value))


def test_whole_number() -> None:
    assert whole_number("1") == 1
    assert whole_number("10000") == 10_000
    for text in ["0", "-1", "10001", "1e3", "", "one"]:
        with pytest.raises(argparse.ArgumentTypeError, match=re.escape(repr(text))):
            whole_number(text)


def test_pick_backends(monkeypatch: pytest.MonkeyPatch) -> None:
    assert pick_backends(None) == pick_backends("both") == BACKENDS
    assert pick_backends("trio") == ["trio"]
    monkeypatch.setattr(anyio, "get_available_backends", lambda: ("asyncio",))
    assert pick_backends(None) == pick_backends("asyncio") == ["asyncio"]
    for wanted in ["trio", "both"]:
        with pytest.raises(DemoError, match="trio is not installed"):
            pick_backends(wanted)
