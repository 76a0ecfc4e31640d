"""The README keeps its word: its programs print what stands below them, its commands are in use."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from support.markdown import Block, check_program, find_blocks, programs_of

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")

BLOCKS = find_blocks(README)
PROGRAMS = programs_of(BLOCKS)


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
    check_program(program, output, tmp_path)


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
    # The script runs two parts of the tests at a time, and combines what they have covered.
    script_text = script.read_text(encoding="utf-8").replace(" --parallel-mode", "")
    for command in test.split(" && "):
        assert command in script_text


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
