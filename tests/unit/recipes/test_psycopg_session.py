"""What a borrower did to a connection of psycopg, without a server."""

from __future__ import annotations

from typing import Any

import pytest


class Named(str):
    __slots__ = ()


@pytest.fixture
def session() -> Any:
    pytest.importorskip("psycopg", exc_type=ImportError)
    from aiosync.recipes import _psycopg_session

    return _psycopg_session


def test_a_copy_of_adapters_is_alike_until_something_is_registered(session: Any) -> None:
    import psycopg
    from psycopg.adapt import AdaptersMap
    from psycopg.types.string import StrDumper

    ours = AdaptersMap(psycopg.adapters)
    assert session._are_alike(ours, psycopg.adapters)
    ours.register_dumper(Named, StrDumper)
    assert not session._are_alike(ours, psycopg.adapters)


def test_adapters_of_another_version_of_psycopg_are_never_alike(session: Any) -> None:
    assert not session._are_alike(object(), object())
