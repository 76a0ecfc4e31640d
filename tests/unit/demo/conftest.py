"""Files for the demo to count, and what must not be left of a run."""

from __future__ import annotations

import logging
import tempfile
from typing import TYPE_CHECKING

import pytest
from support.demo import OTHERS, TEXTS

from aiosync import debug

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    top = tmp_path / "tree"
    for name, text in (TEXTS | OTHERS).items():
        path = top / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return top


@pytest.fixture
def many(tmp_path: Path) -> Path:
    top = tmp_path / "many"
    top.mkdir()
    for number in range(400):
        (top / f"{number:03}.txt").touch()
    return top


@pytest.fixture
def rich(tmp_path: Path) -> dict[str, str]:
    """Texts in `tmp_path / "rich"`, one for each worker, with more words than fit into a batch."""
    words = [f"{letter}{number}" for letter in "abc" for number in range(4000)]
    texts = {f"{n}.txt": " ".join([*words, *words[n:50]]) for n in range(8)}
    (tmp_path / "rich").mkdir()
    for name, text in texts.items():
        (tmp_path / "rich" / name).write_text(text)
    return texts


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    before = debug.enabled()
    yield
    assert logging.getLogger("aiosync").handlers == []
    assert debug.enabled() == before


@pytest.fixture(autouse=True)
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """A wide terminal without colours, whatever the developer has."""
    for name in ["NO_COLOR", "FORCE_COLOR", "LINES"]:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("COLUMNS", "200")


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder for temporary files. However a test ends the demo, none may be left in there."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    for name in ["TMPDIR", "TEMP", "TMP"]:  # for other processes
        monkeypatch.setenv(name, str(folder))
    yield folder
    assert list(folder.iterdir()) == []
