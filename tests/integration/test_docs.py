"""The documentation: programs print what stands below them, and what is generated is current."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import pytest
from support.markdown import check_program, find_blocks, programs_of

import aiosync
import aiosync.debug
import aiosync.recipes
import aiosync.redis

if TYPE_CHECKING:
    from support.redis_servers import RedisServer

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = {page.name: page.read_text("utf-8") for page in sorted(DOCS.glob("*.md"))}

PACKAGES: tuple[ModuleType, ...] = (
    aiosync,
    aiosync.debug,
    pytest.importorskip("aiosync.opentelemetry", exc_type=ImportError),
    aiosync.recipes,
    aiosync.redis,
)

# The address in the programs, instead of which they get that of a server of the tests.
URL = "redis://localhost"


def programs(*, with_server: bool) -> list[Any]:
    """Return all programs, each with its output, and again for trio if it uses `anyio.run`."""
    params = []
    for name, page in PAGES.items():
        for found in programs_of(find_blocks(page)):
            program, output = found.values
            if (URL in program) is not with_server:
                continue
            backends = ["trio", "asyncio"] if "anyio.run(main" in program else [""]
            params += [
                pytest.param(program, output, backend, id=f"{name}: {found.id} {backend}")
                for backend in backends
            ]
    return params


@pytest.mark.slow
@pytest.mark.parametrize(("program", "output", "backend"), programs(with_server=False))
def test_program_prints_what_stands_below_it(
    program: str, output: str | None, backend: str, tmp_path: Path
) -> None:
    check_program(program, output, tmp_path, backend)


@pytest.mark.slow
@pytest.mark.redis
@pytest.mark.parametrize(("program", "output", "backend"), programs(with_server=True))
def test_program_with_a_server_prints_what_stands_below_it(
    program: str, output: str | None, backend: str, tmp_path: Path, redis_server: RedisServer
) -> None:
    check_program(program.replace(URL, redis_server.url), output, tmp_path, backend)


@pytest.mark.parametrize("name", PAGES)
def test_every_output_belongs_to_a_program(name: str) -> None:
    blocks = find_blocks(PAGES[name])
    assert PAGES[name].count("```") == 2 * len(blocks)
    languages = [block.language for block in blocks if not block.language.startswith("{")]
    assert set(languages) <= {"python", "sh", "text"}
    outputs = [program.values[1] for program in programs_of(blocks)]
    assert languages.count("text") == sum(output is not None for output in outputs)


@pytest.mark.parametrize("name", PAGES)
def test_links_to_files_lead_somewhere(name: str) -> None:
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)", PAGES[name])
    assert [link for link in links if not (DOCS / link).is_file()] == []


@pytest.mark.parametrize(
    ("package", "name"),
    [
        pytest.param(package, name, id=f"{package.__name__}.{name}")
        for package in PACKAGES
        for name in package.__all__
    ],
)
def test_the_reference_has_every_public_name(package: ModuleType, name: str) -> None:
    found = []
    for page in (DOCS / "reference").glob("*.rst"):
        text = page.read_text("utf-8")
        module = re.search(r"^\.\. (?:current|auto)?module:: (\S+)", text, re.MULTILINE)
        if re.search(rf"^\.\. auto\w+:: {name}\b", text, re.MULTILINE):
            found.append(module and module[1])
    assert found == [package.__name__]


def test_tests_that_are_named_exist() -> None:
    named = set(re.findall(r"`(tests/[^`]+)`", "".join(PAGES.values())))
    assert named
    assert [path for path in sorted(named) if not (ROOT / path).exists()] == []


def load_generator() -> Any:
    spec = importlib.util.spec_from_file_location("generate", DOCS / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_what_is_generated_is_current() -> None:
    assert load_generator().outdated() == [], "run python docs/generate.py"
