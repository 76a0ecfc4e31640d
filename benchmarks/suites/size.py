"""The package as a whole: the time of its import, and the size of its source.

What must live here: measurements of modules as a whole.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from ..model import US, Contender, Effort, LeftOutError, Row

_PROGRAM = "import time; begin = time.perf_counter(); import {}; print(time.perf_counter() - begin)"


def import_time(module: str) -> float:
    """Seconds to import `module` in a fresh interpreter."""
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM.format(module)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise LeftOutError(done.stderr.strip().rpartition("\n")[2])
    return float(done.stdout)


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
        yield row("size of the source", octets, "anyio", "trio", "aiologic", unit="B")
        yield row("lines of the source", lines, "anyio", "trio", "aiologic", unit="lines")
