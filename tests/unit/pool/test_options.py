"""The options of a pool."""

from __future__ import annotations

import copy
import inspect
import math
import pickle
import re
import weakref
from typing import Any

import pytest
from support.pool_stubs import (
    nothing,
)

from aiosync import (
    ConnectionPool,
)

pytestmark = pytest.mark.anyio


def takes_two(a: object, b: object) -> None:
    raise AssertionError


@pytest.mark.parametrize(
    "name", ["close", "check", "configure", "reset", "commit", "is_closed", "is_fatal", "on_event"]
)
def test_a_hook_with_the_wrong_signature_is_refused(name: str) -> None:
    options: dict[str, Any] = {name: takes_two}
    with pytest.raises(TypeError, match=f"{name} must take one argument: missing"):
        ConnectionPool(object, **options)


def test_a_connect_with_the_wrong_signature_is_refused() -> None:
    with pytest.raises(TypeError, match="connect must take no argument: missing"):
        ConnectionPool(takes_two)  # type: ignore[arg-type]


class WithoutSignature:
    """As some functions written in C."""

    __signature__ = "unknown"

    def __call__(self, *_: object) -> object:
        return object()


def test_a_function_that_has_no_signature_is_accepted() -> None:
    with pytest.raises((TypeError, ValueError)):
        inspect.signature(WithoutSignature())
    ConnectionPool(WithoutSignature(), close=WithoutSignature())


TIMES = (
    "timeout", "max_lifetime", "max_idle", "check_idle", "check_timeout", "connect_timeout",
    "close_timeout", "leak_timeout", "keepalive",
)  # fmt: skip


HOOKS = (
    "close", "check", "configure", "reset", "commit", "is_closed", "on_event",
)  # fmt: skip


COUNTS = ("min_size", "max_size", "max_waiting", "max_connecting")


FLAGS = ("lifo", "overlap", "fail_fast", "loan_events", "fast_acquire")


def with_options(**options: Any) -> ConnectionPool[Any]:
    if "check_idle" in options:
        options.setdefault("check", nothing)
    return ConnectionPool(object, **options)


class TestArguments:
    @pytest.mark.parametrize("connect", [None, 5, "connect"])
    def test_connect_must_be_callable(self, connect: Any) -> None:
        with pytest.raises(TypeError, match="connect must be callable"):
            ConnectionPool(connect)

    @pytest.mark.parametrize("name", HOOKS)
    def test_a_hook_must_be_callable(self, name: str) -> None:
        with pytest.raises(TypeError, match=f"{name} must be callable or None, not int"):
            with_options(**{name: 5})

    @pytest.mark.parametrize("name", HOOKS)
    def test_a_hook_may_be_none(self, name: str) -> None:
        with_options(**{name: None})

    @pytest.mark.parametrize("name", COUNTS)
    @pytest.mark.parametrize("value", ["1", 1.0])
    def test_a_count_must_be_an_int(self, name: str, value: Any) -> None:
        with pytest.raises(TypeError, match=f"{name} must be an int"):
            with_options(**{name: value})

    @pytest.mark.parametrize("name", sorted({*COUNTS} - {"max_connecting"}))
    def test_most_counts_must_not_be_none(self, name: str) -> None:
        with pytest.raises(TypeError, match=f"{name} must be an int"):
            with_options(**{name: None})

    def test_max_connecting_may_be_none(self) -> None:
        with_options(max_connecting=None)

    @pytest.mark.parametrize(
        ("name", "value"),
        [("min_size", -1), ("max_size", 0), ("max_waiting", -1), ("max_connecting", 0)],
    )
    def test_a_count_must_not_be_too_small(self, name: str, value: int) -> None:
        with pytest.raises(ValueError, match=f"{name} must be {value + 1} or more"):
            with_options(**{name: value})
        with_options(**{name: value + 1})

    def test_min_size_must_not_exceed_max_size(self) -> None:
        with pytest.raises(ValueError, match=r"min_size \(3\) must not exceed max_size \(2\)"):
            with_options(min_size=3, max_size=2)
        with pytest.raises(ValueError, match="must not exceed"):
            with_options(min_size=11)
        with_options(min_size=2, max_size=2)

    @pytest.mark.parametrize("name", TIMES)
    @pytest.mark.parametrize("value", ["1", b"", (), object()])
    def test_a_time_must_be_a_number(self, name: str, value: Any) -> None:
        with pytest.raises(TypeError, match=f"^{name}: "):
            with_options(**{name: value})

    @pytest.mark.parametrize("name", TIMES)
    @pytest.mark.parametrize("value", [-1, -0.001, -math.inf, math.nan])
    def test_a_time_must_not_be_negative_nor_nan(self, name: str, value: float) -> None:
        with pytest.raises(ValueError, match=name):
            with_options(**{name: value})

    @pytest.mark.parametrize("name", TIMES)
    @pytest.mark.parametrize("value", [1, 0.5, math.inf, 10**300, None])
    def test_a_time_may_be_any_positive_number_or_none(self, name: str, value: Any) -> None:
        with_options(**{name: value})

    @pytest.mark.parametrize("option", ["max_lifetime", "max_idle", "leak_timeout", "keepalive"])
    def test_some_times_must_be_more_than_nothing(self, option: str) -> None:
        options: dict[str, Any] = {option: 0}
        with pytest.raises(ValueError, match=f"{option} must be more than 0 seconds"):
            ConnectionPool(object, **options)

    @pytest.mark.parametrize("name", [5, b"pool", object()])
    def test_the_name_must_be_a_string(self, name: Any) -> None:
        with pytest.raises(TypeError, match="name"):
            with_options(name=name)

    def test_an_unknown_argument_is_refused(self) -> None:
        with pytest.raises(TypeError, match="max_sise"):
            with_options(max_sise=3)

    def test_all_but_connect_is_given_by_name(self) -> None:
        with pytest.raises(TypeError, match="positional"):
            ConnectionPool(object, nothing)  # type: ignore[call-overload]

    def test_sizes_by_default_and_as_told(self) -> None:
        pool = with_options()
        assert (pool.min_size, pool.max_size) == (0, 10)
        pool = with_options(min_size=2, max_size=3)
        assert (pool.min_size, pool.max_size) == (2, 3)

    def test_pools_are_numbered_unless_they_have_a_name(self) -> None:
        first, named, second = with_options(), with_options(name="db"), with_options()
        assert named.name == "db"
        numbers = [re.fullmatch(r"pool-(\d+)", pool.name) for pool in (first, second)]
        assert all(numbers)
        a, b = (int(number[1]) for number in numbers if number)
        assert b == a + 1

    def test_a_pool_can_be_referenced_weakly(self) -> None:
        pool = with_options()
        assert weakref.ref(pool)() is pool

    @pytest.mark.parametrize("what", ["pool", "checkout"])
    def test_a_pool_can_neither_be_pickled_nor_copied(self, what: str) -> None:
        pool = with_options()
        it: Any = pool if what == "pool" else pool.connection()
        for attempt in (pickle.dumps, copy.copy, copy.deepcopy):
            with pytest.raises(TypeError, match="cannot pickle or copy"):
                attempt(it)

    def test_an_attribute_that_does_not_exist_can_not_be_set(self) -> None:
        pool: Any = with_options()
        with pytest.raises(AttributeError):
            pool.max_sise = 5
        with pytest.raises(AttributeError):
            pool.max_size = 5

    @pytest.mark.parametrize("min_size", [-1, 3])
    def test_timeouts_of_zero_do_not_hide_a_bad_size(self, min_size: int) -> None:
        with pytest.raises(ValueError, match="min_size"):
            with_options(timeout=0, min_size=min_size, max_size=2)


def test_the_signature_of_the_constructor_is_what_the_tests_know() -> None:
    parameters = set(inspect.signature(ConnectionPool.__init__).parameters)
    known = {*TIMES, *HOOKS, *COUNTS, *FLAGS, "name", "context", "is_fatal", "limit"}
    assert parameters == known | {"self", "connect"}
