"""Which files to count, and how to read them."""

from __future__ import annotations

import os
import re
import stat
import sysconfig
from pathlib import Path
from typing import TYPE_CHECKING

from ._errors import DemoError
from ._text import decode

if TYPE_CHECKING:
    from collections.abc import Sequence

_TEXT = re.compile(
    r"(?i)\.(adoc|bat|c|cc|cfg|conf|cpp|cs|css|csv|go|h|hpp|html?|ini|java|jsx?|json|kt|lua|md|php"
    r"|pl|ps1|pyi?|pyx|rb?|rs|rst|scala|sh|sql|swift|tex|toml|tsx?|txt|xml|ya?ml)"
)


def why_unreadable(error: Exception, path: str | Path) -> str:
    """Return one line that names a file and says why it can't be read."""
    found = error if isinstance(error, OSError) else OSError()
    name = repr(str(found.filename or path))  # it may contain anything, even a line end
    return f"cannot read {name}: {found.strerror or error}"


def find_files(
    top: str, suffix: re.Pattern[str], skip: frozenset[str]
) -> tuple[list[Path], list[OSError]]:
    """Return the text files in a tree, sorted, and why folders can't be read.

    Links to folders are not followed: no loops.
    """
    files: list[Path] = []
    errors: list[OSError] = []
    for folder, folders, names in os.walk(top, onerror=errors.append):
        folders[:] = [name for name in folders if name not in skip]
        paths = [Path(folder, name) for name in names]
        # No pipes and devices: reading one may take forever.
        files += [path for path in paths if suffix.fullmatch(path.suffix) and path.is_file()]
    return sorted(files), errors


def choose_files(path: str | None) -> tuple[list[Path], list[str]]:
    """Return what to count, and a line for each folder that can't be read.

    :param path: one file, or a folder; None: the standard library
    :raises DemoError: if there is nothing to count
    """
    suffix, skip = _TEXT, frozenset[str]()
    if path is None:
        path, suffix = sysconfig.get_path("stdlib"), re.compile(r"\.py")
        skip = frozenset(["site-packages", "dist-packages"])
    try:
        mode = os.stat(path).st_mode
    except OSError as error:
        raise DemoError(why_unreadable(error, path)) from error
    if stat.S_ISREG(mode):
        return [Path(path)], []
    if not stat.S_ISDIR(mode):
        raise DemoError(f"{path!r} is neither a file nor a folder")
    files, errors = find_files(path, suffix, skip)
    unread = [why_unreadable(error, path) for error in errors]
    if not files:
        raise DemoError(unread[0] if unread else f"there are no text files in {path!r}")
    return files, unread


def share_out(files: Sequence[Path], workers: int) -> list[Sequence[Path]]:
    """Deal the files like cards. With more workers than files, some workers get none."""
    return [files[first::workers] for first in range(workers)]


def read_text(path: Path) -> str:
    """Return the text of a file. It blocks.

    :raises OSError: if it can't be read
    :raises NotTextError: if it is not text
    """
    return decode(path.read_bytes())
