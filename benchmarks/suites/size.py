"""The package as a whole: the time of its import, and the size of its source.

What must live here: measurements of modules as a whole.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path

from ..model import US, Contender, Effort, LeftOutError, Row

_PROGRAM = """\
{}
import time
begin = time.perf_counter()
{}
print(time.perf_counter() - begin)
"""
# The most that `import aiosync` may add to a program that has imported asyncio and anyio.
_IMPORT_BAR = 0.015


@cache
def _compiled() -> tempfile.TemporaryDirectory[str]:
    """Return a folder for compiled modules: the time to compile is paid once, at installation."""
    return tempfile.TemporaryDirectory(prefix="benchmarks-")


def _import(statement: str, before: str = "") -> float:
    """Seconds to run an import statement in a fresh interpreter, after `before`.

    The first call compiles the modules; the runner throws its result away.
    """
    environment = {**os.environ, "PYTHONPYCACHEPREFIX": _compiled().name}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM.format(before, statement)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise LeftOutError(done.stderr.strip().rpartition("\n")[2])
    return float(done.stdout)


def import_time(module: str) -> float:
    """Seconds to import `module` in a fresh interpreter."""
    return _import(f"import {module}")


def _source(module: str) -> bytes:
    spec = importlib.util.find_spec(module)
    assert spec is not None
    assert spec.submodule_search_locations
    folder = Path(spec.submodule_search_locations[0])
    return b"".join(
        file.read_bytes()
        for file in folder.rglob("*.py")
        if not {"tests", "_tests"} & {*file.relative_to(folder).parts}
    )


def lines(module: str) -> float:
    return _source(module).count(b"\n")


def octets(module: str) -> float:
    return len(_source(module))


def rows(backend: str, effort: Effort) -> Iterator[Row]:
    def row(work: str, measure: Callable[[str], float], *others: str, unit: str) -> Row:
        contenders = [Contender(US, partial(measure, US))]
        for name in others:
            module = name.rpartition(" ")[2]
            contenders.append(Contender(name, partial(measure, module), module))
        return Row("size", "", work, contenders, unit, exact=unit != "s")

    if not backend:
        floors = ("floor: asyncio", "floor: anyio")
        yield row("time of the import", import_time, *floors, "trio", "aiologic", unit="s")
        after = partial(_import, before="import asyncio, anyio")
        for title, statement in (
            ("import after asyncio and anyio", "import aiosync"),
            ("import after these, and the pool", "from aiosync import ConnectionPool"),
        ):
            contenders = [
                Contender(US, partial(after, statement)),
                Contender(f"bar: {_IMPORT_BAR * 1000:g} ms", lambda: _IMPORT_BAR),
            ]
            yield Row("size", "", title, contenders)
        yield row("size of the source", octets, "anyio", "trio", "aiologic", unit="B")
        yield row("lines of the source", lines, "anyio", "trio", "aiologic", unit="lines")
