"""What ``import aiosync`` imports, and the names that it imports late."""

from __future__ import annotations

import inspect
import os
import pydoc
import subprocess
import sys
from unittest.mock import create_autospec

import pytest

import aiosync

LATE = [
    "Checkout",
    "ConnectionInfo",
    "ConnectionLimit",
    "ConnectionPermit",
    "ConnectionPool",
    "Histogram",
    "PoolEvent",
    "PoolOptions",
    "PoolStatistics",
    "ThreadCheckout",
    "ThreadConnectionPool",
]


def run(program: str, **environment: str) -> str:
    """Run a program in an interpreter that has not imported anything yet."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        env={**os.environ, **environment},
        capture_output=True,
        encoding="utf-8",
        timeout=30,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


@pytest.mark.slow
def test_a_program_without_a_pool_imports_none() -> None:
    assert run(
        "import sys, aiosync, aiosync.redis\n"
        "limit = aiosync.redis.Redis('redis://localhost').semaphore('limit', 3)\n"
        "local = [aiosync.Semaphore(), aiosync.BoundedSemaphore(), aiosync.Barrier(1)]\n"
        "for shared in *local, limit:\n"
        "    print(type(aiosync.as_threading(shared)).__name__)\n"
        "print(dir(aiosync) == sorted({*dir(aiosync), *aiosync.__all__}))\n"
        "print([name for name in sys.modules if name.startswith('aiosync._pool')])\n"
    ).split() == [
        "ThreadSemaphore",
        "ThreadBoundedSemaphore",
        "ThreadBarrier",
        "ThreadDistributedSemaphore",
        "True",
        "[]",
    ]


@pytest.mark.slow
def test_each_late_name_may_be_the_first() -> None:
    shown = run(
        "import sys, aiosync\n"
        f"for name in {LATE}:\n"
        "    for module in list(sys.modules):\n"
        "        if module.partition('.')[0] == 'aiosync':\n"
        "            del sys.modules[module]\n"
        "    import aiosync\n"
        "    assert name not in vars(aiosync)\n"
        "    assert getattr(aiosync, name) is vars(aiosync)[name]\n"
        "    print(getattr(aiosync, name).__module__, getattr(aiosync, name).__name__)\n"
    )
    assert shown.splitlines() == [f"aiosync {name}" for name in LATE]


def test_a_pool_of_a_recipe_shows_the_public_name_and_has_a_view() -> None:
    assert (
        run(
            "from aiosync.recipes import sqlite_pool\n"
            "pool = sqlite_pool('file:a?mode=memory&cache=shared', uri=True)\n"
            "print([cls.__module__ for cls in type(pool).__mro__[:2]])\n"
            "import aiosync\n"
            "assert 'ConnectionPool' not in vars(aiosync)\n"
            "view = aiosync.as_threading(pool)\n"
            "print(type(view).__module__, type(view) is aiosync.ThreadConnectionPool)\n"
        )
        == "['aiosync.recipes', 'aiosync']\naiosync True\n"
    )


def test_what_has_no_view_is_refused_before_and_after_the_pool_is_imported() -> None:
    program = (
        "import aiosync\n"
        "for _ in range(2):\n"
        "    try:\n"
        "        aiosync.as_threading(object())\n"
        "    except TypeError as error:\n"
        "        print(error)\n"
    )
    message = (
        "as_threading() takes an aiosync Semaphore, BoundedSemaphore, Barrier or ConnectionPool, "
        "not object\n"
    )
    assert run(program) == message * 2


@pytest.mark.slow
def test_debugging_can_be_enabled_at_import() -> None:
    program = "import aiosync; print(aiosync.as_threading(aiosync.ConnectionPool(object)).closed)"
    assert run(program, AIOSYNC_DEBUG="1") == "True\n"


def test_a_star_import_has_all_names() -> None:
    names = run("from aiosync import *\nprint(*sorted(vars()))").split()
    assert {name for name in names if not name.startswith("_")} == set(aiosync.__all__)


def test_an_unknown_name_is_an_attribute_error() -> None:
    assert not hasattr(aiosync, "ConectionPool")
    with pytest.raises(AttributeError, match="module 'aiosync' has no attribute 'ConectionPool'"):
        aiosync.ConectionPool  # type: ignore[attr-defined]  # noqa: B018
    with pytest.raises(ImportError, match="cannot import name 'ConectionPool' from 'aiosync'"):
        from aiosync import ConectionPool  # type: ignore[attr-defined]  # noqa: F401


def test_threads_that_use_a_late_name_at_once_get_one_object() -> None:
    program = (
        "import aiosync, threading\n"
        "start, found = threading.Barrier(8), []\n"
        "def use():\n"
        "    start.wait()\n"
        "    found.append(aiosync.ConnectionPool)\n"
        "threads = [threading.Thread(target=use) for _ in range(8)]\n"
        "for thread in threads: thread.start()\n"
        "for thread in threads: thread.join()\n"
        "print(len(found), len(set(found)))\n"
    )
    assert run(program) == "8 1\n"


@pytest.mark.parametrize("name", LATE)
def test_tools_find_a_late_name(name: str) -> None:
    assert name in dict(inspect.getmembers(aiosync))
    assert f"class {name}" in pydoc.plain(pydoc.render_doc(aiosync))
    assert hasattr(create_autospec(aiosync), name)
