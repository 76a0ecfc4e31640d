"""The plan of the house, checked against the source: who may import whom."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path

import pytest

import aiosync

SOURCE = Path(aiosync.__file__).parent

# Each room with the rooms that it may enter. They only ever stand above it, so there is no cycle.
ROOMS: dict[str, set[str]] = {
    "_park": set(),
    "_errors": {"_park"},
    "_handoff": {"_park"},
    "_semaphore": {"_errors", "_park", "_handoff"},
    "_barrier": {"_errors", "_park", "_handoff"},
    "_pool": {"_errors", "_park", "_handoff"},
    "recipes": {"_pool"},
    "_as_threading": {"_errors", "_park", "_semaphore", "_barrier", "_pool"},
    "_from_threading": {"_errors", "_park", "_handoff"},
    "__init__": {"_errors", "_semaphore", "_barrier", "_pool", "_as_threading", "_from_threading"},
    "__main__": {"__init__"},
}
LOOPS_AND_THREADS = {"asyncio", "trio", "_thread"}


def imports(file: Path) -> tuple[set[str], set[str]]:
    """Return the rooms and the top-level modules from elsewhere that `file` imports, anywhere."""
    rooms: set[str] = set()
    elsewhere: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text("utf-8"))):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                package = ("aiosync", *file.relative_to(SOURCE).parent.parts)
                origin = ".".join(package[: len(package) - node.level + 1])
                names = (
                    [f"{origin}.{node.module}"]
                    if node.module
                    else [f"{origin}.{alias.name}" for alias in node.names]
                )
            else:
                assert node.module is not None
                names = [node.module]
        for name in names:
            top, _, rest = name.partition(".")
            if top == "aiosync":
                rooms.add(rest.partition(".")[0] or "__init__")
            else:
                elsewhere.add(top)
    return rooms, elsewhere


@pytest.mark.parametrize(
    "file", sorted(SOURCE.rglob("*.py")), ids=lambda file: str(file.relative_to(SOURCE))
)
def test_imports_run_one_way_and_one_room_knows_the_event_loops(file: Path) -> None:
    room = file.relative_to(SOURCE).parts[0].removesuffix(".py")
    rooms, elsewhere = imports(file)
    assert rooms - {room} <= ROOMS[room]
    if room != "_park":
        assert not elsewhere & LOOPS_AND_THREADS


def test_the_plan_has_no_cycle() -> None:
    done: set[str] = set()
    while len(done) < len(ROOMS):
        ready = {room for room, enters in ROOMS.items() if enters <= done} - done
        assert ready
        done |= ready


@pytest.mark.parametrize("name", aiosync.__all__)
def test_every_public_name_is_documented(name: str) -> None:
    found = getattr(aiosync, name)
    assert found.__doc__
    for attribute, value in getattr(found, "__dict__", {}).items():
        if not attribute.startswith("_") and (callable(value) or isinstance(value, property)):
            assert value.__doc__, f"{name}.{attribute} has no docstring"


def test_the_options_that_type_checkers_know_are_those_of_the_pool() -> None:
    options: dict[str, str] = {}
    for node in ast.walk(ast.parse((SOURCE / "_pool" / "_settings.py").read_text("utf-8"))):
        if isinstance(node, ast.ClassDef) and node.name in {"CommonOptions", "PoolOptions"}:
            for field in node.body:
                if isinstance(field, ast.AnnAssign):
                    options[ast.unparse(field.target)] = ast.unparse(field.annotation)
    _, _, *parameters = inspect.signature(aiosync.ConnectionPool.__init__).parameters.values()
    assert options == {parameter.name: parameter.annotation for parameter in parameters}
