"""Cancel scopes that are made for the task of a checkout."""

from __future__ import annotations

import asyncio

import anyio
import pytest
from support.helpers import PATIENCE

from aiosync import _scopes

pytestmark = pytest.mark.anyio


class TestScopes:
    @pytest.mark.parametrize("anyio_backend", ["asyncio"])
    async def test_a_scope_of_a_task_is_cancelled_once(self) -> None:
        async def work() -> list[str]:
            seen = []
            with _scopes.shielded_scope() as scope:
                assert not isinstance(scope, anyio.CancelScope)
                scope.cancel()
                scope.cancel()
                try:
                    await asyncio.sleep(PATIENCE)
                except asyncio.CancelledError:
                    seen.append("cancelled")
                    raise
            await asyncio.sleep(0)
            return [*seen, "over"]

        assert await asyncio.create_task(work()) == ["cancelled", "over"]

    @pytest.mark.parametrize("anyio_backend", ["asyncio"])
    async def test_without_the_private_names_of_anyio_a_real_scope_is_used(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(_scopes._modules, "anyio._backends._asyncio", object())
        assert _scopes.innermost_scope() is _scopes._UNKNOWN
        monkeypatch.undo()

        async def work() -> bool:
            with monkeypatch.context() as patch:
                patch.setitem(_scopes._modules, "anyio._backends._asyncio", object())
                return isinstance(_scopes.shielded_scope(), anyio.CancelScope)

        assert await asyncio.create_task(work())
