"""Subclasses that users write behave under debugging as without it."""

from __future__ import annotations

import abc
from typing import Any, TypeVar

import pytest
from support.debugging import debugging

from aiosync import Barrier, ConnectionPool, Semaphore, as_threading, debug

pytestmark = pytest.mark.anyio
T = TypeVar("T")

__all__ = ["debugging"]


async def acquire_and_release(semaphore: Any) -> None:
    await semaphore.acquire()
    assert len(debug.holders(semaphore)) == 1
    semaphore.release()
    assert debug.holders(semaphore) == []


class TestOverrides:
    async def test_a_result_of_aenter(self) -> None:
        class Mine(Semaphore):
            async def __aenter__(self) -> Any:
                await super().__aenter__()
                return self

        mine = Mine()
        async with mine as result:
            assert result is mine
            assert len(debug.holders(mine)) == 1
        assert debug.holders(mine) == []

    async def test_fewer_arguments(self) -> None:
        class Mine(Semaphore):
            async def acquire(self) -> bool:  # type: ignore[override]
                return await super().acquire()

            def release(self) -> None:  # type: ignore[override]
                super().release()

        await acquire_and_release(Mine())

    async def test_no_result(self) -> None:
        class Mine(Semaphore):
            async def acquire(self) -> None:  # type: ignore[override]
                await super().acquire()

        await acquire_and_release(Mine())

    async def test_more_arguments(self) -> None:
        class Mine(Semaphore):
            async def acquire(self, *, reason: str) -> bool:  # type: ignore[override]
                return bool(reason) and await super().acquire()

        mine = Mine()
        assert await mine.acquire(reason="a test")
        assert len(debug.holders(mine)) == 1

    async def test_an_override_of_acquire_is_called_by_async_with(self) -> None:
        called: list[str] = []

        class Mine(Semaphore):
            async def acquire(self, blocking: bool = True, timeout: float | None = None) -> bool:
                called.append("acquire")
                return await super().acquire(blocking, timeout)

        mine = Mine()
        async with mine:
            assert called == ["acquire"]
            assert len(debug.holders(mine)) == 1

    async def test_an_override_that_calls_another_method(self) -> None:
        class Mine(Semaphore):
            async def acquire(self, blocking: bool = True, timeout: float | None = None) -> bool:
                self.acquire_nowait()
                return True

        await acquire_and_release(Mine())

    async def test_a_barrier(self) -> None:
        class Mine(Barrier):
            async def wait(self) -> int:  # type: ignore[override]
                return 10 + await super().wait()

        async with Mine(1) as index:
            assert index == 10

    async def test_a_pool(self) -> None:
        class Mine(ConnectionPool[T]):
            async def acquire(self, timeout: float | None = None) -> Any:
                return "mine", await super().acquire(timeout)

        async with Mine(object, max_size=1) as pool:
            name, connection = await pool.acquire()
            assert name == "mine"
            assert len(debug.holders(pool)) == 1
            pool.release(connection)


class TestClasses:
    def test_init_subclass(self) -> None:
        class Tagged(Semaphore):
            tags: list[str] = []

            def __init_subclass__(cls, *, tag: str) -> None:
                cls.tags.append(tag)

        class Mine(Tagged, tag="mine"):
            pass

        assert type(Mine()).__name__ == "Mine"
        assert Tagged.tags == ["mine"]

    def test_a_metaclass_that_keeps_a_register(self) -> None:
        names: list[str] = []

        class Register(type):
            def __new__(cls, name: str, bases: Any, namespace: Any) -> Any:
                names.append(name)
                return super().__new__(cls, name, bases, namespace)

        class Mine(Semaphore, metaclass=Register):
            pass

        Mine().acquire_nowait()
        assert names == ["Mine"]

    def test_an_abstract_class(self) -> None:
        class Abstract(Semaphore, abc.ABC):
            @abc.abstractmethod
            def method(self) -> int: ...

        class Mine(Abstract):
            attribute: int
            __slots__ = ("attribute",)

            def method(self) -> int:
                return 1

        mine = Mine()
        mine.attribute = mine.method()
        assert isinstance(mine, Abstract)
        assert isinstance(mine, Mine)
        assert not isinstance(Semaphore(), Abstract)

    def test_attributes_that_cannot_be_set(self) -> None:
        class Mine(Semaphore):
            def __setattr__(self, name: str, value: object) -> None:
                if name in {"_record", "__class__"}:
                    raise AttributeError(name)
                super().__setattr__(name, value)

        Mine().acquire_nowait()

    def test_a_report_while_one_is_made(self) -> None:
        class Mine(Semaphore):
            def __init__(self) -> None:
                super().__init__(2, name="half made")
                self.acquire_nowait()
                assert "half made" in debug.report()
                self.factor = 10

            @property
            def value(self) -> int:
                return super().value * self.factor

        mine = Mine()
        assert mine.value == 10
        assert "Mine 'half made': value=1" in debug.report()

    async def test_an_attribute_that_is_called_like_one_of_a_view(self) -> None:
        class Mine(ConnectionPool[T]):
            def __init__(self, connect: Any) -> None:
                super().__init__(connect, name="mine")
                self._semaphore = Semaphore(name="other")

        pool: Mine[object] = Mine(object)
        async with pool, pool.connection():
            assert len(debug.holders(pool)) == 1
            with as_threading(pool._semaphore):
                assert len(debug.holders(pool)) == 1
                assert debug.holders(pool._semaphore)[0].function == (
                    "test_an_attribute_that_is_called_like_one_of_a_view"
                )
