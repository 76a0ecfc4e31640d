"""The arguments of `sqlite3.connect`, and statements."""

from __future__ import annotations

import re
import sys
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs

if TYPE_CHECKING:
    from collections.abc import Mapping

# Those that the recipe has arguments of its own for.
_OWN = {"database": "database", "timeout": "busy_timeout", "uri": "uri"}


def check_arguments(kwargs: Mapping[str, Any]) -> None:
    """Check that the recipe can be used with more arguments of `sqlite3.connect`.

    :raises TypeError: if not
    """
    for name, own in _OWN.items():
        if name in kwargs:
            raise TypeError(f"{name} can't be in kwargs: use the argument {own} of sqlite_pool")
    if kwargs.get("check_same_thread", False) is not False:
        raise TypeError(
            "check_same_thread can't be true: the connections of a pool are used by many threads"
        )
    if "autocommit" in kwargs and sys.version_info < (3, 12):
        raise TypeError("autocommit is an argument of sqlite3.connect since Python 3.12 only")


def is_private(database: str, uri: bool) -> bool:
    """Return whether each connection would have a database of its own, in memory or temporary."""
    if not uri or not database.startswith("file:"):
        return database in {"", ":memory:"}
    path, _, query = database.removeprefix("file:").partition("?")
    settings = parse_qs(query.partition("#")[0])
    in_memory = path in {"", ":memory:"} or settings.get("mode") == ["memory"]
    return in_memory and settings.get("cache") != ["shared"]


def pragma(name: str, value: str | int) -> str:
    """Return the statement that sets a pragma.

    :raises ValueError: if it has no proper name
    """
    if re.fullmatch(r"(\w+\.)?\w+", name) is None:
        raise ValueError(f"{name!r} is not the name of a pragma")
    literal = "'" + value.replace("'", "''") + "'" if isinstance(value, str) else int(value)
    return f"PRAGMA {name} = {literal}"
