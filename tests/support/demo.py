"""Runs the demo, ``python -m aiosync``, and reads what it prints."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import textwrap
from collections import Counter
from typing import TYPE_CHECKING, Any

import pytest

from aiosync import __main__ as demo

if TYPE_CHECKING:
    from collections.abc import Iterable

BACKENDS = ["asyncio", "trio"]
PATIENCE = 40  # seconds, for a process that should end at once

each_backend = pytest.mark.parametrize("backend", BACKENDS)
# All workers are tasks, some of them are threads, or all are.
each_mixture = pytest.mark.parametrize("threads", [0, 3, 8])
posix = pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX")

TEXTS = {
    "one.py": "def spam(eggs):\n    return eggs + spam(eggs) * 0xff\n",
    "two.TXT": "spam, spam, eggs and spam! don't 3abc _x _x\n",
    "deep/three.md": "# eggs\nnaïve naïve Größe\n",
    "deep/er/four.rst": "",
    "deep/er/five.toml": "spam = 'eggs'\n[a.b]\nspam2 = 7\n",
}
# Not text by their suffix, so they are not counted.
OTHERS = {"six.bin": "spam " * 50, "deep/seven": "spam " * 50, "deep/.py": "spam " * 50}


def expected(texts: Iterable[str]) -> Counter[str]:
    """Return the counts of all words in some texts."""
    counts: Counter[str] = Counter()
    for text in texts:
        # Another way than that of the demo: without the words that begin with a digit.
        counts.update(word for word in re.findall(r"\w+", text) if not word[0].isdigit())
    return counts


class Result:
    """What the demo has printed of one run, if the lines are long enough not to be wrapped."""

    def __init__(self, lines: list[str]) -> None:
        self.backend, _, first = lines[0].partition(":")
        self.lines = lines
        facts = [(line[:15].strip(), line[15:]) for line in lines[1:5]]
        self.facts: dict[str, str] = dict(facts)
        self.words, self.files = numbers(first)[:2]
        frequent = re.findall(r"([^\s,]+) ([\d,]*\d)(?:, |$)", self.facts["most frequent"])
        self.frequent = {word: int(count.replace(",", "")) for word, count in frequent}
        self.limit, self.readers = numbers(self.facts["semaphore"])
        self.rounds, self.workers = numbers(self.facts["barrier"])
        self.connections, self.in_use, self.loans, self.queued = numbers(self.facts["pool"])
        unread = [line for line in lines if line.startswith("not read ")]
        self.unread = numbers(unread[0])[0] if unread else 0

    @staticmethod
    def all(out: str) -> list[Result]:
        blocks = [block.splitlines() for block in out.split("\n\n")]
        return [Result(block) for block in blocks if re.match(r"(asyncio|trio): ", block[0])]

    def check(self, backend: str, texts: dict[str, str]) -> None:
        counts = expected(texts.values())
        assert self.backend == backend
        assert self.files == len(texts)
        assert self.words == sum(counts.values())
        assert self.rounds == 2
        by_frequency = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
        assert list(self.frequent.items()) == by_frequency[:10]
        assert 1 <= self.readers <= self.limit
        assert 1 <= self.in_use <= self.connections <= 3
        assert 1 <= self.queued <= self.loans


def numbers(text: str) -> list[int]:
    return [int(number.replace(",", "")) for number in re.findall(r"\d[\d,]*", text)]


def python(*args: object, **how: Any) -> subprocess.CompletedProcess[str]:
    how = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "timeout": PATIENCE} | how
    # With buffers, as most users have it: what is left in them at exit has its own ways to fail.
    usual = {"PYTHONIOENCODING": "utf-8", "PYTHONUNBUFFERED": "", "COLUMNS": "200"}
    how["env"] = os.environ | usual | how.get("env", {})
    command = [sys.executable, *map(str, args)]
    return subprocess.run(command, encoding="utf-8", check=False, **how)


def aiosync(*args: object, **how: Any) -> subprocess.CompletedProcess[str]:
    return python("-m", "aiosync", *args, **how)


def main(*args: object) -> int:
    return demo.main([str(arg) for arg in args])


def patched(patch: str) -> str:
    """Return a program that changes something and then does what ``python -m aiosync`` does."""
    run = "import runpy; runpy.run_module('aiosync', run_name='__main__', alter_sys=True)"
    return textwrap.dedent(patch) + run
