"""A snapshot is taken while other threads go on."""

from __future__ import annotations

from typing import TYPE_CHECKING
from weakref import WeakSet

from aiosync.debug._situation import members

if TYPE_CHECKING:
    from collections.abc import Iterator


class Member:
    pass


def test_a_set_that_another_thread_changes_meanwhile_is_read_again() -> None:
    member = Member()
    failures = [RuntimeError("Set changed size during iteration")]

    class Changing(WeakSet[Member]):
        """As another thread makes it until Python 3.13."""

        def __iter__(self) -> Iterator[Member]:
            if failures:
                raise failures.pop()
            return super().__iter__()

    assert members(Changing([member])) == [member]
    assert not failures
