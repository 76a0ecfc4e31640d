"""The README keeps its word: its programs print what stands below them, its commands are in use."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

import aiosync

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")

# A heading, or all between two fences; so a comment in a program is never taken for a heading.
_PIECE = re.compile(
    r"^#+ +(?P<heading>[^\n]+)$|^```(?P<language>\w*)\n(?P<body>.*?)^```$", re.MULTILINE | re.DOTALL
)


class Block(NamedTuple):
    heading: str
    language: str
    body: str
    before: str  # what stands between this block and the heading or block before it


def find_blocks(markdown: str) -> list[Block]:
    blocks = []
    heading = ""
    end = 0
    for piece in _PIECE.finditer(markdown):
        if piece["heading"] is None:
            before = markdown[end : piece.start()]
            blocks.append(Block(heading, piece["language"], piece["body"], before))
        else:
            heading = piece["heading"]
        end = piece.end()
    return blocks


BLOCKS = find_blocks(README)
PROGRAMS = [
    # An output of None: nothing stands right below the program.
    pytest.param(
        block.body,
        below.body if below.language == "text" and not below.before.strip() else None,
        id=block.heading,
    )
    for block, below in zip(BLOCKS, [*BLOCKS[1:], Block("", "", "", "")], strict=True)
    if block.language == "python"
]


def test_find_blocks() -> None:
    markdown = (
        "# One\n\n```python\n# no heading\n```\n\n```text\n1\n```\n\n"
        "## Two\n\nthen\n```sh\nls\n```\n"
    )
    assert find_blocks(markdown) == [
        Block("One", "python", "# no heading\n", "\n\n"),
        Block("One", "text", "1\n", "\n\n"),
        Block("Two", "sh", "ls\n", "\n\nthen\n"),
    ]


def test_every_output_belongs_to_a_program() -> None:
    assert README.count("```") == 2 * len(BLOCKS)
    languages = [block.language for block in BLOCKS]
    assert set(languages) == {"python", "sh", "text"}
    assert languages.count("text") == len(PROGRAMS) > 0


@pytest.mark.slow
@pytest.mark.parametrize(("program", "output"), PROGRAMS)
def test_program_prints_what_stands_below_it(
    program: str, output: str | None, tmp_path: Path
) -> None:
    file = tmp_path / "example.py"
    file.write_text(program, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-W", "error", file],
        cwd=tmp_path,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        encoding="utf-8",
        timeout=30,
        check=False,
    )
    # All in one, so that a failure shows everything there is to see.
    assert (done.stdout, done.stderr, done.returncode) == (output, "", 0)


def test_command_for_the_tests_is_the_one_in_use() -> None:
    script = ROOT / ".ci" / "run"
    if not script.is_file():
        pytest.skip("there is no .ci/run beside this README, so nothing to compare it with")
    commands = {
        line
        for block in BLOCKS
        if block.language == "sh"
        for line in block.body.splitlines()
        if "pytest" in line
    }
    assert len(commands) == 1
    # What is installed differs: the script needs the linters too, or tests the wheel.
    install, _, test = commands.pop().partition(" && ")
    assert install == "python -m pip install -e '.[test]'"
    assert test in map(str.strip, script.read_text(encoding="utf-8").splitlines())


@pytest.mark.parametrize("name", aiosync.__all__)
def test_every_public_name_is_mentioned(name: str) -> None:
    assert re.search(rf"`{name}\b", README)


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "docs/performance.md"])
def test_links_to_files_lead_somewhere(name: str) -> None:
    page = ROOT / name
    links = re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text(encoding="utf-8"))
    assert links
    assert [link for link in links if not (page.parent / link).is_file()] == []


def test_figures_are_those_of_the_performance_page() -> None:
    start = README.index("## How fast")
    summary = README[start : README.index("\n## ", start)]
    figures = re.findall(r"(?<=[|/] )\d+\.\d\d(?= [|/])", summary)
    page = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    printed = re.findall(r"^ +(\d+\.\d\d)x ", page, re.MULTILINE)
    assert figures
    assert set(figures) <= set(printed)
