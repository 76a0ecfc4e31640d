"""The structure of the package, checked against its source: imports and public names."""

from __future__ import annotations

import ast
import inspect
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import aiosync

SOURCE = Path(aiosync.__file__).parent
FILES = sorted(SOURCE.rglob("*.py"))

# Each module or package at the top level, with those that it may import from.
MAY_IMPORT: dict[str, set[str]] = {
    "_park": set(),
    "_errors": {"_park"},
    "_handoff": {"_park"},
    "_semaphore": {"_errors", "_park", "_handoff"},
    "_barrier": {"_errors", "_park", "_handoff"},
    "_pool": {"_errors", "_park", "_handoff"},
    "recipes": {"_pool"},
    "_as_threading": {"_errors", "_park", "_semaphore", "_barrier", "_pool"},
    "_helper_threads": {"_park", "_handoff"},
    "_from_threading": {"_errors", "_park", "_helper_threads"},
    "__init__": {"_errors", "_semaphore", "_barrier", "_pool", "_as_threading", "_from_threading"},
    "__main__": {"__init__"},
}
# Modules that are known to import one another, under TYPE_CHECKING. To be removed when the pool is
# rebuilt.
KNOWN_CIRCLE = {
    "_pool._borrowing",
    "_pool._face",
    "_pool._keeper",
    "_pool._ledger",
    "_pool._settings",
}
# Only `_park` may import these.
LOOPS_AND_THREADS = {"asyncio", "trio", "_thread"}


def name_of(file: Path) -> str:
    """Return the name of a module inside of the package, such as ``_pool._idle``."""
    *package, stem = file.relative_to(SOURCE).with_suffix("").parts
    if stem == "__init__" and package:
        return ".".join(package)
    return ".".join([*package, stem])


MODULES = {name_of(file) for file in FILES}


def module_of(name: str) -> str:
    """Return the module of the package that importing `name` runs, such as ``_errors``."""
    rest = name.partition(".")[2]
    while rest and rest not in MODULES:
        rest = rest.rpartition(".")[0]  # a name inside of a module
    return rest or "__init__"


def imports(file: Path) -> tuple[set[str], set[str]]:
    """Return which modules `file` imports, anywhere in it: of the package, and other ones."""
    ours: set[str] = set()
    others: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text("utf-8"))):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            origin = node.module or ""
            if node.level:
                package = ("aiosync", *file.relative_to(SOURCE).parent.parts)
                parts = package[: len(package) - node.level + 1]
                origin = ".".join([*parts, origin] if origin else parts)
            names = [f"{origin}.{alias.name}" for alias in node.names]
        for name in names:
            top = name.partition(".")[0]
            if top == "aiosync":
                ours.add(module_of(name))
            else:
                others.add(top)
    return ours, others


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_a_module_imports_only_what_the_plan_allows(file: Path) -> None:
    ours, others = imports(file)
    package = name_of(file).partition(".")[0]
    assert {module.partition(".")[0] for module in ours} - {package} <= MAY_IMPORT[package]
    if package != "_park":
        assert not others & LOOPS_AND_THREADS


def test_the_plan_has_no_circle() -> None:
    TopologicalSorter(MAY_IMPORT).prepare()


def test_no_modules_import_one_another() -> None:
    graph = {name_of(file): imports(file)[0] for file in FILES}
    assert graph["_pool._idle"] >= {"_handoff", "_pool._records"}
    for name in KNOWN_CIRCLE:
        graph[name] -= KNOWN_CIRCLE
    TopologicalSorter(graph).prepare()


def test_a_public_name_is_in_alphabetical_order_and_shows_no_private_module() -> None:
    assert sorted(aiosync.__all__) == aiosync.__all__
    assert {getattr(aiosync, name).__module__ for name in aiosync.__all__} == {"aiosync"}


@pytest.mark.parametrize("name", aiosync.__all__)
def test_every_public_name_is_documented(name: str) -> None:
    found = getattr(aiosync, name)
    assert found.__doc__
    if not inspect.isclass(found):
        return
    for attribute in dir(found):
        value = inspect.getattr_static(found, attribute)
        owner = next(base for base in found.__mro__ if attribute in vars(base))
        if (
            owner.__module__.startswith("aiosync")
            and not attribute.startswith("_")
            and (callable(value) or isinstance(value, (property, classmethod, staticmethod)))
        ):
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
