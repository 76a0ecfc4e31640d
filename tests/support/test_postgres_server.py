"""Where the tests' PostgreSQL server is found."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from support import postgres_server
from support.postgres_server import PostgresServer

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="there is no server on Windows")


@pytest.fixture(autouse=True)
def nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hide the programs of this machine."""
    monkeypatch.setenv("PATH", str(tmp_path / "path"))
    monkeypatch.setattr(postgres_server, "_FOLDERS", ())
    monkeypatch.setattr(postgres_server, "_WHEELS", ("a_wheel_with_postgres",))


def install(folder: Path, *programs: str) -> str:
    """Put programs into a folder; return the path of `postgres` there."""
    folder.mkdir(parents=True)
    for program in programs or ("postgres", "initdb"):
        folder.joinpath(program).touch(0o755)
    return str(folder / "postgres")


def found() -> str | None:
    programs = postgres_server._find_programs()
    return None if programs is None else programs["postgres"]


def test_nowhere() -> None:
    assert found() is None
    reason = PostgresServer.why_not()
    assert reason is not None
    assert "a_wheel_with_postgres" in reason


def test_path_then_own_folders_then_a_wheel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = tmp_path / "site"
    in_wheel = install(site / "a_wheel_with_postgres" / "pginstall" / "bin")
    site.joinpath("a_wheel_with_postgres", "__init__.py").write_text("1 / 0  # never imported")
    monkeypatch.syspath_prepend(site)
    assert found() == in_wheel
    own = install(tmp_path / "own" / "9" / "bin")
    pattern = str((tmp_path / "own").relative_to("/") / "*" / "bin")
    monkeypatch.setattr(postgres_server, "_FOLDERS", (pattern,))
    assert found() == own
    newer = install(tmp_path / "own" / "10" / "bin")
    assert found() == newer
    on_path = install(tmp_path / "path")
    assert found() == on_path


def test_a_folder_without_initdb_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path / "own" / "10" / "bin", "postgres")
    complete = install(tmp_path / "own" / "9" / "bin")
    pattern = str((tmp_path / "own").relative_to("/") / "*" / "bin")
    monkeypatch.setattr(postgres_server, "_FOLDERS", (pattern,))
    assert found() == complete
