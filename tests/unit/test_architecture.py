"""The structure of the package, checked against its source: imports and public names."""

from __future__ import annotations

import ast
import inspect
import re
from graphlib import TopologicalSorter
from pathlib import Path
from typing import Any

import pytest

import aiosync
from aiosync import debug

SOURCE = Path(aiosync.__file__).parent
FILES = sorted(SOURCE.rglob("*.py"))

# Each module or package at the top level, with those that it may import from.
MAY_IMPORT: dict[str, set[str]] = {
    "_park": set(),
    "_created": set(),
    "_callers": {"_park"},
    "_errors": {"_park"},
    "_loop_thread": set(),
    "_scopes": {"_park"},
    "_handoff": {"_park"},
    "_semaphore": {"_created", "_errors", "_park", "_handoff"},
    "_barrier": {"_created", "_errors", "_park", "_handoff"},
    "_pool": {"_callers", "_created", "_errors", "_park", "_scopes", "_handoff"},
    "recipes": {"_callers", "_errors", "_pool"},
    "redis": {"_created", "_errors", "_park", "_loop_thread", "_scopes", "_handoff"},
    "_as_threading_pool": {"_errors", "_park", "_loop_thread", "_pool"},
    "_as_threading": {
        "_as_threading_pool",
        "_errors",
        "_park",
        "_semaphore",
        "_barrier",
        "_pool",
    },
    "_helper_threads": {"_park", "_handoff"},
    "_from_threading": {"_created", "_errors", "_park", "_helper_threads"},
    "_observed": {
        "_barrier",
        "_callers",
        "_errors",
        "_from_threading",
        "_park",
        "_pool",
        "_semaphore",
        "redis",
    },
    "debug": {"_callers", "_created", "_errors", "_observed", "_park", "_pool"},
    "opentelemetry": {
        "_barrier",
        "_created",
        "_errors",
        "_observed",
        "_park",
        "_pool",
        "_semaphore",
    },
    "__init__": {
        "debug",
        "_errors",
        "_semaphore",
        "_barrier",
        "_pool",
        "_as_threading",
        "_as_threading_pool",
        "_from_threading",
    },
    "_demo": {"__init__", "_observed", "debug"},
    "__main__": {"_demo"},
}
# Modules that may be longer than `LONGEST`, with the reason.
LONG_MODULES = {"_pool._pool"}  # the public class with its docstrings
LONGEST = 300
# Files of unit tests whose subject is more than one module.
SUBJECTS = {
    "test_architecture.py",
    "test_import.py",
    "debug/test_records.py",
    "demo/test_main.py",
    "pool/test_contexts.py",
}
# Only `_park` may import these.
LOOPS_AND_THREADS = {"asyncio", "trio", "_thread"}


def name_of(file: Path) -> str:
    """Return the name of a module inside of the package, such as ``_pool._entry``."""
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


def parsed(file: Path) -> ast.Module:
    return ast.parse(file.read_text("utf-8"))


def imports(file: Path) -> tuple[set[str], set[str]]:
    """Return which modules `file` imports, anywhere in it: of the package, and other ones."""
    ours: set[str] = set()
    others: set[str] = set()
    for node in ast.walk(parsed(file)):
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
    """Neither at run time nor for type checkers: `imports` finds both."""
    graph = {name_of(file): imports(file)[0] for file in FILES}
    assert graph["_pool._inventory"] >= {"_handoff", "_pool._entry"}
    TopologicalSorter(graph).prepare()


def test_the_modules_of_the_pool_are_listed_in_the_order_in_which_they_import() -> None:
    package = SOURCE / "_pool"
    listed = re.findall(
        r"^(_\w+) ", (ast.get_docstring(parsed(package / "__init__.py")) or ""), re.MULTILINE
    )
    assert sorted(listed) == sorted(file.stem for file in package.glob("_[!_]*.py"))
    for position, name in enumerate(listed):
        found = {module for module in imports(package / f"{name}.py")[0] if "._" in module}
        assert found <= {f"_pool.{above}" for above in listed[:position]}


@pytest.mark.parametrize("file", sorted((SOURCE / "_pool").glob("*.py")), ids=name_of)
def test_a_module_of_the_pool_is_short(file: Path) -> None:
    length = len(file.read_text("utf-8").splitlines())
    assert length <= LONGEST or name_of(file) in LONG_MODULES


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


def declared_options() -> dict[str, str]:
    """Return the annotations of `CommonOptions` and `PoolOptions`, without their checks."""
    options: dict[str, str] = {}
    for node in parsed(SOURCE / "_pool" / "_options.py").body:
        if isinstance(node, ast.ClassDef) and node.name in {"CommonOptions", "PoolOptions"}:
            for field in node.body:
                if isinstance(field, ast.AnnAssign):
                    name = ast.unparse(field.target)
                    assert name not in options, f"{name} is declared twice"
                    assert isinstance(field.annotation, ast.Subscript)
                    assert ast.unparse(field.annotation.value) == "Annotated"
                    assert isinstance(field.annotation.slice, ast.Tuple)
                    options[name] = ast.unparse(field.annotation.slice.elts[0])
    return options


def test_signature_shows_all_options() -> None:
    connect, *parameters = inspect.signature(aiosync.ConnectionPool).parameters.values()
    assert connect.name == "connect"
    assert connect.default is inspect.Parameter.empty
    assert {parameter.kind for parameter in parameters} == {inspect.Parameter.KEYWORD_ONLY}
    # `context` decides on the type of the pool, so it is a parameter of the constructor itself.
    names = [parameter.name for parameter in parameters]
    assert names == ["context", *declared_options()]


def test_an_option_has_the_default_that_signature_shows() -> None:
    pool = aiosync.ConnectionPool(object)
    _, *parameters = inspect.signature(aiosync.ConnectionPool).parameters.values()
    explicit = aiosync.ConnectionPool(
        object, **{parameter.name: parameter.default for parameter in parameters}
    )
    ours, theirs = vars(pool._options), vars(explicit._options)
    assert ours.pop("name") != theirs.pop("name")  # each has a number
    if debug.enabled():
        assert ours.pop("on_event") != theirs.pop("on_event")  # each tells its own record
    assert ours == theirs
    assert ours.keys() >= declared_options().keys() - {"name"}


def test_an_option_is_declared_in_one_place() -> None:
    """No other function of the package has a parameter with a default of that name.

    `timeout` is a parameter of many methods, and `name` of none that makes a pool.
    """
    options = declared_options().keys() - {"timeout", "name"}
    for file in FILES:
        if name_of(file).partition(".")[0] != "_pool":
            continue
        for node in ast.walk(parsed(file)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                arguments = node.args.args[len(node.args.args) - len(node.args.defaults) :]
                arguments += node.args.kwonlyargs
                assert not options & {argument.arg for argument in arguments}


def test_an_option_that_is_unknown_is_refused() -> None:
    options: dict[str, Any] = {"max_sise": 3}
    with pytest.raises(TypeError, match="no option 'max_sise'"):
        aiosync.ConnectionPool(object, **options)


def test_a_file_of_unit_tests_is_named_for_the_module_that_it_tests() -> None:
    """For a module, or for all of a package."""
    here = Path(__file__).parent
    found = {file.relative_to(here).as_posix() for file in here.rglob("test_*.py")}
    modules = {file.relative_to(SOURCE).with_suffix("") for file in FILES}
    names = {
        "/".join(part.strip("_") for part in module.parts if part != "__init__")
        for module in modules
    }
    strangers = {
        file for file in found if file.removesuffix(".py").replace("test_", "") not in names
    }
    assert strangers == SUBJECTS
