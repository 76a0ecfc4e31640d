"""Programs in Markdown, and their outputs."""

from __future__ import annotations

import re
import subprocess
import sys
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest

if TYPE_CHECKING:
    from pathlib import Path

# A heading, or all between two fences; so a comment in a program is never taken for a heading.
_PIECE = re.compile(
    r"^#+ +(?P<heading>[^\n]+)$|^```(?P<language>[^\n]*)\n(?P<body>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)

# Runs a program with another default of `anyio.run`.
_UNDER_TRIO = """
import functools, runpy, sys, anyio
anyio.run = functools.partial(anyio.run, backend="trio")
runpy.run_path(sys.argv[1], run_name="__main__")
"""


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


def programs_of(blocks: list[Block]) -> list[Any]:
    """Return the programs as parameters of a test, each with its output."""
    return [
        # An output of None: nothing stands right below the program.
        pytest.param(
            block.body,
            below.body if below.language == "text" and not below.before.strip() else None,
            id=block.heading,
        )
        for block, below in zip(blocks, [*blocks[1:], Block("", "", "", "")], strict=False)
        if block.language == "python"
    ]


def check_program(program: str, output: str | None, folder: Path, backend: str = "") -> None:
    """Check that a program prints its output, and neither warnings nor errors.

    :param backend: "trio" to run under trio what `anyio.run` would run under asyncio
    """
    file = folder / "example.py"
    file.write_text(program, encoding="utf-8")
    arguments = ["-c", _UNDER_TRIO, str(file)] if backend == "trio" else [str(file)]
    done = subprocess.run(
        [sys.executable, "-W", "error", *arguments],
        cwd=folder,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        encoding="utf-8",
        timeout=50,
        check=False,
    )
    # All in one, so that a failure shows everything there is to see.
    assert (done.stdout, done.stderr, done.returncode) == (output or "", "", 0)
