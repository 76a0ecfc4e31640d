"""Which files the demo counts."""

from __future__ import annotations

import os
import re
import sysconfig
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from support.demo import TEXTS, Result, each_backend, main, posix

from aiosync._demo import _files
from aiosync._demo._errors import DemoError
from aiosync._demo._files import choose_files, read_text, share_out, why_unreadable

if TYPE_CHECKING:
    from collections.abc import Callable


def test_text_files_in_a_tree(tree: Path) -> None:
    assert choose_files(str(tree)) == (sorted(tree / name for name in TEXTS), [])


@posix
@each_backend
def test_links_and_pipes_do_no_harm(
    tree: Path, backend: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tree / "deep" / "up").symlink_to(tree, target_is_directory=True)
    (tree / "round.py").symlink_to("round.py")
    (tree / "dangling.py").symlink_to("nowhere.py")
    (tree / "folder.py").mkdir()
    os.mkfifo(tree / "pipe.txt")
    (tree / "link.py").symlink_to("one.py")
    assert main(tree, "--backend", backend) == 0
    Result.all(capsys.readouterr().out)[0].check(backend, TEXTS | {"link.py": TEXTS["one.py"]})


def test_the_standard_library_is_the_default() -> None:
    files, unread = choose_files(None)
    assert unread == []
    assert {path.suffix for path in files} == {".py"}
    assert Path(os.__file__).name in {path.name for path in files}
    top = sysconfig.get_path("stdlib")
    inside = {part for path in files for part in path.relative_to(top).parts}
    assert not inside & {"site-packages", "dist-packages"}


def test_third_party_packages_are_skipped_in_the_standard_library_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    top = tmp_path / "top"
    for name in ["a.py", "b.txt", "site-packages/c.py", "d/dist-packages/e.py", "d/f.py"]:
        path = top / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    monkeypatch.setattr(sysconfig, "get_path", {"stdlib": str(top)}.get)
    assert choose_files(None)[0] == [top / "a.py", top / "d" / "f.py"]
    assert len(choose_files(str(top))[0]) == 5


def refuse(monkeypatch: pytest.MonkeyPatch, *refused: Path) -> None:
    """Have some folders that can't be read, also for root."""
    genuine = os.scandir

    def scandir(path: str | int) -> object:
        if path in [str(folder) for folder in refused]:
            raise PermissionError(13, "Permission denied", path)
        return genuine(path)

    monkeypatch.setattr(os, "scandir", scandir)


def test_a_folder_that_cannot_be_read_is_told(
    tree: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    refuse(monkeypatch, tree / "deep")
    files, unread = choose_files(str(tree))
    assert files == [tree / "one.py", tree / "two.TXT"]
    assert unread == [f"cannot read {str(tree / 'deep')!r}: Permission denied"]
    assert main(tree, "--backend", "asyncio") == 1
    out, err = capsys.readouterr()
    assert Result.all(out)[0].files == 2
    assert err == f"aiosync: {unread[0]}\n"


def test_a_tree_that_cannot_be_read(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse(monkeypatch, tree)
    with pytest.raises(DemoError, match=re.escape(f"cannot read {str(tree)!r}: Permission denied")):
        choose_files(str(tree))


@posix
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: path.symlink_to("nowhere"), "cannot read 'odd': No such file or directory"),
        (
            lambda path: path.symlink_to("odd"),
            "cannot read 'odd': Too many levels of symbolic links",
        ),
        (os.mkfifo, "'odd' is neither a file nor a folder"),
        (os.mkdir, "there are no text files in 'odd'"),
    ],
)
def test_nothing_to_count(
    tmp_path: Path,
    make: Callable[[Path], object],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    make(tmp_path / "odd")
    monkeypatch.chdir(tmp_path)
    assert main("odd") == 2
    assert capsys.readouterr() == ("", f"aiosync: error: {message}\n")


def test_read_text(tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes(b"spam caf\xe9\r\neggs")
    assert read_text(tmp_path / "latin.txt") == "spam café\r\neggs"
    with pytest.raises(OSError, match="nowhere"):
        read_text(tmp_path / "nowhere")


@posix
def test_a_folder_in_place_of_a_file_is_told(
    tree: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(_files, "find_files", lambda *_: ([tree / "deep", tree / "two.TXT"], []))
    assert main(tree, "--backend", "trio") == 1
    out, err = capsys.readouterr()
    assert err == f"aiosync: cannot read {str(tree / 'deep')!r}: Is a directory\n"
    assert Result.all(out)[0].unread == 1


def test_why_unreadable() -> None:
    assert why_unreadable(OSError(5, "I/O error", "a\nb"), "c") == r"cannot read 'a\nb': I/O error"
    assert why_unreadable(OSError("odd"), "c") == "cannot read 'c': odd"
    assert why_unreadable(ValueError("no"), "c") == "cannot read 'c': no"


def test_share_out(tmp_path: Path) -> None:
    files = [tmp_path / str(number) for number in range(7)]
    for workers in range(1, 10):
        parts = share_out(files, workers)
        assert len(parts) == workers
        assert sorted(path for part in parts for path in part) == files
        sizes = {len(part) for part in parts}
        assert max(sizes) - min(sizes) <= 1
