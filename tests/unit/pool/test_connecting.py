"""ConnectionPool and a backend that refuses, hangs, dies, and comes back.

Outages take minutes, so nearly everything here runs in virtual time, in which nothing happens but
what was scheduled: where nobody has anything to do the clock jumps to the next timer. So times can
be compared exactly, and a test that waits in vain fails at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import anyio
import pytest
from support.helpers import PATIENCE
from support.pool_stubs import Virtual
from support.virtual_time import run_virtually, spun

from aiosync import ConnectionPool, PoolClosed, PoolEvent, PoolTimeout
from aiosync._pool._maintenance import Maintenance

# In virtual seconds: who waits for so long waits in vain.
FOR_EVER = 1e7

# How much the sum of two times may differ from what it should be.
EXACT = 1e-6


Main = Callable[[], Awaitable[None]]


@pytest.fixture(params=["asyncio", "trio"])
def run(request: pytest.FixtureRequest) -> Iterator[Callable[[Main], None]]:
    """What runs a function in virtual time."""

    def run_limited(main: Main) -> None:
        async def limited() -> None:
            with anyio.fail_after(FOR_EVER):
                await main()
            if request.param == "asyncio":
                assert asyncio.all_tasks() == {asyncio.current_task()}

        run_virtually(request.param, limited)

    spun()
    yield run_limited
    assert not spun(), "some task ran all the time"


@pytest.fixture(autouse=True)
def _no_log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL, "aiosync.pool")


now = anyio.current_time


async def settle() -> None:
    """Let everybody do what can be done at once."""
    await anyio.sleep(EXACT / 10)


class Connection:
    def __init__(self) -> None:
        self.dead = False
        self.closed = 0


class Server:
    """A backend, and what the pool has done to it."""

    def __init__(self, state: str = "up", takes: float = 0.01) -> None:
        # "up", "refuses" or "hangs".
        self.state = state
        # How long a connect takes.
        self.takes = takes
        # When each connect was begun.
        self.attempts: list[float] = []
        self.connecting = 0
        self.peak_connecting = 0
        self.made: list[Connection] = []
        self.peak_open = 0
        self.events: list[PoolEvent] = []

    @property
    def open(self) -> list[Connection]:
        return [connection for connection in self.made if not connection.closed]

    async def connect(self) -> Connection:
        self.attempts.append(now())
        self.connecting += 1
        self.peak_connecting = max(self.peak_connecting, self.connecting)
        try:
            await anyio.sleep(self.takes)
            if self.state == "hangs":
                await anyio.sleep_forever()
            if self.state == "refuses":
                raise ConnectionRefusedError(f"attempt {len(self.attempts)}")
        finally:
            self.connecting -= 1
        connection = Connection()
        self.made.append(connection)
        self.peak_open = max(self.peak_open, len(self.open))
        return connection

    def check(self, connection: Connection) -> None:
        if connection.dead:
            raise ConnectionResetError("it is dead")

    def close(self, connection: Connection) -> None:
        connection.closed += 1

    def dies(self, state: str = "refuses") -> None:
        self.state = state
        for connection in self.made:
            connection.dead = True

    def pool(self, **settings: Any) -> ConnectionPool[Connection]:
        for name in ("connect", "check", "close"):
            settings.setdefault(name, getattr(self, name))
        return ConnectionPool(**settings, on_event=self.events.append)

    def kinds(self) -> list[str]:
        return [event.kind for event in self.events]

    def gaps(self) -> list[float]:
        """Return how long it took from the failure of each attempt to the next one."""
        pairs = zip(self.attempts, self.attempts[1:], strict=False)
        return [later - sooner - self.takes for sooner, later in pairs]


async def borrow_all(pool: ConnectionPool[Connection], server: Server) -> None:
    """Check that no slot and no connection has been lost."""
    found = [await pool.acquire(60) for _ in range(pool.max_size)]
    assert sorted(map(id, found)) == sorted(map(id, server.open))
    assert all(not connection.dead for connection in found)
    for connection in found:
        pool.release(connection)
    assert all(connection.closed <= 1 for connection in server.made)
    assert server.peak_open <= pool.max_size


class TestWhoWaitsWhileConnectingFails:
    def test_runs_out_of_time_and_is_told_why(self, run: Any) -> None:
        async def main() -> None:
            server = Server("refuses")
            async with server.pool() as pool:
                began = now()
                with pytest.raises(PoolTimeout, match=r"connecting fails: .*attempt") as info:
                    await pool.acquire(3)
                assert now() - began == pytest.approx(3, abs=EXACT)
                cause = info.value.__cause__
                assert isinstance(cause, ConnectionRefusedError)
                # The last one; another may be under way.
                failed = info.value.stats["connections_errors"]
                assert str(cause) == f"attempt {failed}"
                assert 2 < failed >= len(server.attempts) - 1
                assert info.value.stats["timeouts"] == 1
                assert info.value.stats["requests_waiting"] == 0

        run(main)

    def test_is_served_in_order_when_it_works_again(self, run: Any) -> None:
        async def main() -> None:
            server = Server("refuses")
            served: list[int] = []

            async def use(number: int) -> None:
                async with pool.connection(FOR_EVER):
                    served.append(number)
                    await anyio.sleep(1)

            async with server.pool(max_size=1) as pool:
                async with anyio.create_task_group() as tasks:
                    for number in range(8):
                        tasks.start_soon(use, number)
                        await settle()
                    await anyio.sleep(100)
                    assert served == []
                    server.state = "up"
                    back = now()
                assert served == list(range(8))
                # At most the longest backoff, one connect, and the work itself.
                assert now() - back <= 10 + 1 + 8 * 1
                await borrow_all(pool, server)

        run(main)

    def test_fails_at_once_if_it_should_fail_fast(self, run: Any) -> None:
        async def main() -> None:
            server = Server("refuses", takes=0.25)
            failed: list[float] = []

            async def fail() -> None:
                with pytest.raises(PoolTimeout) as info:
                    await pool.acquire(60)
                assert isinstance(info.value.__cause__, ConnectionRefusedError)
                failed.append(now() - began)

            began = now()
            async with server.pool(fail_fast=True, max_connecting=1) as pool:
                async with anyio.create_task_group() as tasks:
                    for _ in range(5):
                        tasks.start_soon(fail)
                # Those who waited already, as soon as it is known: after three attempts.
                assert failed == pytest.approx([0.75] * 5, abs=EXACT)
                # Newcomers without any delay, even while the next attempt is under way.
                for _ in range(20):
                    await anyio.sleep(0.1)
                    begins = now()
                    with pytest.raises(PoolTimeout):
                        await pool.acquire(60)
                    assert now() == begins
                server.state = "up"
                await anyio.sleep(11)
                async with pool.connection(0):
                    pass
                await borrow_all(pool, server)

        run(main)

    def test_gets_an_idle_connection_all_the_same(self, run: Any) -> None:
        async def main() -> None:
            server = Server()
            async with server.pool(fail_fast=True, max_size=2) as pool:
                first = await pool.acquire()
                server.state = "refuses"
                with pytest.raises(PoolTimeout):
                    await pool.acquire()
                pool.release(first)
                async with pool.connection() as second:
                    assert second is first
                server.state = "up"
                await anyio.sleep(11)
                await borrow_all(pool, server)

        run(main)

    @pytest.mark.parametrize("fail_fast", [False, True])
    def test_is_told_if_the_pool_is_closed_meanwhile(self, run: Any, fail_fast: bool) -> None:
        async def main() -> None:
            server = Server("hangs")
            outcomes: list[object] = []

            async def use() -> None:
                with pytest.raises(PoolClosed):
                    await pool.acquire()
                outcomes.append(now())

            pool = server.pool(fail_fast=fail_fast)
            await pool.__aenter__()
            async with anyio.create_task_group() as tasks:
                for _ in range(3):
                    tasks.start_soon(use)
                await anyio.sleep(1)
                began = now()
                await pool.__aexit__(None, None, None)
                assert now() == began  # those under way are not waited for
            assert outcomes == [began] * 3
            assert server.connecting == 0

        run(main)

    def test_for_the_pool_to_be_filled_is_told_why_it_is_not(self, run: Any) -> None:
        async def main() -> None:
            server = Server("refuses")
            async with server.pool(min_size=1) as pool:
                began = now()
                with pytest.raises(PoolTimeout) as info:
                    await pool.wait(5)
                assert now() - began == pytest.approx(5, abs=EXACT)
                assert isinstance(info.value.__cause__, ConnectionRefusedError)
                server.state = "up"
                await pool.wait(11)
                assert pool.get_stats()["pool_available"] == 1

        run(main)


class TestAPoolAfterAnOutage:
    @pytest.mark.parametrize("state", ["refuses", "hangs"])
    def test_refills_itself_if_its_idle_connections_had_died(self, run: Any, state: str) -> None:
        async def main() -> None:
            server = Server()
            async with server.pool(min_size=3, max_size=5, connect_timeout=2) as pool:
                await pool.wait()
                server.dies(state)
                await pool.check()
                await anyio.sleep(60)
                stats = pool.get_stats()
                assert stats["pool_available"] == 0
                assert stats["connections_lost"] == stats["closed_check"] == 3
                assert stats["connections_errors"] > 3
                server.state = "up"
                await anyio.sleep(10 + 2 + 1)  # nobody asks for anything
                assert pool.get_stats()["pool_available"] == 3 == len(server.open)
                assert server.kinds().count("outage") == server.kinds().count("recovered") == 1
                await borrow_all(pool, server)

        run(main)

    def test_replaces_those_that_died_while_borrowed(self, run: Any) -> None:
        async def main() -> None:
            server = Server()
            served: list[int] = []

            async def use(number: int) -> None:
                async with pool.connection(FOR_EVER) as connection:
                    assert not connection.dead
                    served.append(number)

            async with server.pool(max_size=2) as pool:
                borrowed = [await pool.acquire(), await pool.acquire()]
                async with anyio.create_task_group() as tasks:
                    for number in range(4):
                        tasks.start_soon(use, number)
                        await settle()
                    server.dies()
                    for connection in borrowed:
                        pool.discard(connection)
                    await anyio.sleep(30)
                    assert served == []
                    # By chance, an attempt may be under way just now.
                    assert pool.get_stats()["pool_size"] == server.connecting
                    assert pool.get_stats()["returns_bad"] == 2
                    server.state = "up"
                assert sorted(served) == [0, 1, 2, 3]
                await borrow_all(pool, server)

        run(main)

    def test_finds_out_that_it_is_over_even_if_nobody_wants_anything(self, run: Any) -> None:
        async def main() -> None:
            server = Server("refuses")
            async with server.pool() as pool:
                with pytest.raises(PoolTimeout):
                    await pool.acquire(1)
                await anyio.sleep(100)
                server.state = "up"
                assert "recovered" not in server.kinds()
                await anyio.sleep(11)
                assert server.kinds()[-2:] == ["recovered", "connected"]
                attempts = len(server.attempts)
                async with pool.connection(0):
                    pass
                await anyio.sleep(100)
                assert len(server.attempts) == attempts  # and that was that

        run(main)

    def test_does_not_come_in_a_herd(self, run: Any) -> None:
        async def main() -> None:
            server = Server("refuses", takes=0.5)
            served: list[int] = []

            async def use(number: int) -> None:
                async with pool.connection(FOR_EVER):
                    served.append(number)
                    await anyio.sleep(0.01)

            async with server.pool(max_size=20, max_connecting=3) as pool:
                async with anyio.create_task_group() as tasks:
                    for number in range(200):
                        tasks.start_soon(use, number)
                    await anyio.sleep(2)
                    assert server.peak_connecting == 3  # before it was known to be down
                    server.peak_connecting = 0
                    await anyio.sleep(100)
                    assert server.peak_connecting == 1  # while it was known to be
                    before = len(server.attempts)
                    server.state = "up"
                assert server.peak_connecting == 3
                # The one that was under way may still have been refused.
                assert len(server.attempts) - before <= 20 + 1
                assert len(served) == 200
                await borrow_all(pool, server)

        run(main)


class TestAttemptsToConnect:
    def test_are_never_more_than_allowed_at_once(self, run: Any) -> None:
        async def main() -> None:
            for allowed in (1, 2, 5):
                server = Server()
                async with server.pool(max_size=10, max_connecting=allowed) as pool:
                    began = now()
                    await borrow_with_tasks(pool, 10)
                    assert server.peak_connecting == allowed
                    assert len(server.attempts) == 10
                    took = server.takes * 10 / allowed
                    assert now() - began == pytest.approx(took + 1, abs=EXACT)
                    await borrow_all(pool, server)

        run(main)

    def test_are_made_ever_more_seldom_and_not_at_the_same_time_as_those_of_others(
        self, run: Any
    ) -> None:
        async def main() -> None:
            patterns = []
            for _ in range(3):
                server = Server("refuses")
                async with server.pool() as pool:
                    with pytest.raises(PoolTimeout):
                        await pool.acquire(300)
                parts = []
                # At first it is tried again at once.
                assert server.gaps()[:2] == pytest.approx([0, 0], abs=EXACT)
                for number, gap in enumerate(server.gaps()[2:]):
                    longest = min(0.1 * 2**number, 10)
                    assert longest / 2 - EXACT <= gap <= longest + EXACT
                    parts.append(gap / longest)
                assert 300 / 10 <= len(parts) <= 300 / 5 + 10
                # By chance: from all over the range.
                assert max(parts) - min(parts) > 0.2
                patterns.append(tuple(parts[:10]))
            assert len(set(patterns)) == 3

        run(main)

    def test_begin_with_short_breaks_again_after_a_success(self, run: Any) -> None:
        async def main() -> None:
            server = Server("refuses")
            async with server.pool(max_size=1) as pool:
                with pytest.raises(PoolTimeout):
                    await pool.acquire(60)
                server.state = "up"
                connection = await pool.acquire(60)
                server.state = "refuses"
                server.attempts.clear()
                pool.discard(connection)
                with pytest.raises(PoolTimeout):
                    await pool.acquire(1)
                assert server.gaps()[:2] == pytest.approx([0, 0], abs=EXACT)
                assert 0.05 - EXACT <= server.gaps()[2] <= 0.1 + EXACT

        run(main)

    def test_are_made_one_at_a_time_during_an_outage_however_many_ask(self, run: Any) -> None:
        async def main() -> None:
            server = Server("refuses", takes=3)
            async with server.pool() as pool:
                await expect(PoolTimeout, pool.acquire(10))
                server.attempts.clear()
                server.peak_connecting = 0
                async with anyio.create_task_group() as tasks:
                    for _ in range(100):
                        tasks.start_soon(expect, PoolTimeout, pool.acquire(1))
                        with pytest.raises(anyio.WouldBlock):
                            pool.acquire_nowait()
                        await anyio.sleep(0.3)
                assert server.peak_connecting == 1
                assert len(server.attempts) <= 31 / 3 + 1

        run(main)

    @pytest.mark.parametrize("number", [1, 4])
    def test_that_fail_together_count_as_one(self, run: Any, number: int) -> None:
        async def main() -> None:
            server = Server("refuses")
            async with server.pool(max_connecting=4) as pool:
                async with anyio.create_task_group() as tasks:
                    for _ in range(number):
                        tasks.start_soon(expect, PoolTimeout, pool.acquire(0.2))
                rounds = [round((at - server.attempts[0]) / server.takes) for at in server.attempts]
                # All, then as many as three, then one.
                begun = [0] * number + [1] * min(number, 3) + [2]
                assert rounds[: len(begun)] == begun
                assert rounds.count(2) == 1
                gap = server.gaps()[len(begun) - 1]
                assert 0.05 - EXACT <= gap <= 0.1 + EXACT

        run(main)

    @pytest.mark.parametrize("limit", ["connect_timeout", "timeout"])
    def test_that_hang_are_given_up(self, run: Any, limit: str) -> None:
        async def main() -> None:
            server = Server("hangs")
            async with server.pool(**{limit: 2}, max_size=1) as pool:
                began = now()
                with pytest.raises(PoolTimeout) as info:
                    await pool.acquire(5)
                assert isinstance(info.value.__cause__, TimeoutError)
                assert not isinstance(info.value.__cause__, PoolTimeout)
                failures = [event for event in server.events if event.kind == "connect_failed"]
                assert len(failures) == 2
                second = server.attempts[1] - began
                assert 2.05 - EXACT <= second <= 2.1 + EXACT
                assert server.peak_connecting == 1
                server.state = "up"
                await borrow_all(pool, server)
                assert server.connecting == 0

        run(main)

    def test_may_take_any_time_without_a_limit(self, run: Any) -> None:
        async def main() -> None:
            server = Server()
            server.takes = 1e6
            forever = {"connect_timeout": float("inf"), "timeout": None}
            async with server.pool(**forever) as pool, pool.connection() as connection:
                assert connection is server.made[0]
            assert len(server.attempts) == 1

        run(main)

    def test_that_hang_in_configure_are_given_up_and_closed(self, run: Any) -> None:
        async def main() -> None:
            server = Server()
            hangs = True

            async def configure(connection: Connection) -> None:
                if hangs:
                    await anyio.sleep_forever()

            async with server.pool(configure=configure, connect_timeout=2, max_size=2) as pool:
                with pytest.raises(PoolTimeout) as info:
                    await pool.acquire(10)
                assert isinstance(info.value.__cause__, TimeoutError)
                assert len(server.made) >= 3
                assert len(server.open) <= 1
                stats = pool.get_stats()
                assert stats["closed_configure"] == len(server.made) - len(server.open)
                assert stats["connections_errors"] == stats["closed_configure"]
                hangs = False
                await borrow_all(pool, server)

        run(main)

    def test_that_take_no_notice_of_their_deadline_are_still_of_use(self, run: Any) -> None:
        async def main() -> None:
            server = Server()

            async def connect() -> Connection:
                with anyio.CancelScope(shield=True):
                    await anyio.sleep(5)
                return await server.connect()

            server.takes = 0
            slow = ConnectionPool(
                stubborn(server, 5), max_size=1, connect_timeout=1, on_event=server.events.append
            )
            async with slow as pool:
                with pytest.raises(PoolTimeout):
                    await pool.acquire(2)
                await anyio.sleep(2)
                assert pool.get_stats()["connecting"] == 1  # it still has the slot
                assert len(server.attempts) == 1
                await anyio.sleep(1 + EXACT)
                assert pool.get_stats()["pool_available"] == 1
                assert server.kinds() == ["connected"]
                async with pool.connection(0) as connection:
                    assert connection is server.made[0]
                await borrow_all(pool, server)

        run(main)

    def test_that_take_no_notice_of_a_closing_are_waited_for_and_closed(self, run: Any) -> None:
        async def main() -> None:
            server = Server()
            pool = ConnectionPool(stubborn(server, 5), close=server.close, min_size=1)
            began = now()
            async with pool:
                await anyio.sleep(1)
            assert now() - began == pytest.approx(5, abs=EXACT)
            assert [connection.closed for connection in server.made] == [1]

        run(main)

    @pytest.mark.parametrize(("of", "fail"), [(3, 1), (12, 4)], ids=["singly", "in a row"])
    def test_that_fail_now_and_then_cost_no_slot(self, run: Any, of: int, fail: int) -> None:
        async def main() -> None:
            server = Server()
            calls: Counter[str] = Counter()

            async def connect() -> Connection:
                calls["connect"] += 1
                if calls["connect"] % of >= of - fail:
                    raise OSError("connect")
                return await server.connect()

            async def configure(connection: Connection) -> None:
                calls["configure"] += 1
                fails = calls["configure"] % 5 == 0
                await anyio.sleep(0.001)
                if fails:
                    raise OSError("configure")

            async with server.pool(connect=connect, configure=configure, max_size=4) as pool:

                async def use() -> None:
                    for _ in range(15):
                        async with pool.connection(FOR_EVER) as connection:
                            await anyio.sleep(0.01)
                            pool.discard(connection)

                async with anyio.create_task_group() as tasks:
                    for _ in range(6):
                        tasks.start_soon(use)
                await settle()
                stats = pool.get_stats()
                assert stats["returns_bad"] == stats["closed_discard"] == 90
                assert stats["connections_errors"] > 20
                assert stats["closed_configure"] > 5
                assert fail == 1 or server.kinds().count("outage") > 1
                connects = Counter(server.kinds())
                assert connects["outage"] - connects["recovered"] in (0, 1)
                await borrow_all(pool, server)

        run(main)


def stubborn(server: Server, seconds: float) -> Callable[[], Awaitable[Connection]]:
    """Return a connect that can't be cancelled."""

    async def connect() -> Connection:
        server.attempts.append(now())
        with anyio.CancelScope(shield=True):
            await anyio.sleep(seconds)
        server.made.append(Connection())
        return server.made[-1]

    return connect


async def expect(error: type[Exception], work: Awaitable[object]) -> None:
    with pytest.raises(error):
        await work


async def borrow_with_tasks(pool: ConnectionPool[Connection], number: int) -> None:
    """Let `number` tasks borrow a connection, and keep it until all have."""
    borrowed = 0

    async def use() -> None:
        nonlocal borrowed
        async with pool.connection():
            borrowed += 1
            if borrowed == number:
                everybody.set()
            await everybody.wait()
            await anyio.sleep(1)

    everybody = anyio.Event()
    async with anyio.create_task_group() as tasks:
        for _ in range(number):
            tasks.start_soon(use)


class TestWhoIsTold:
    def test_events_tell_of_the_outage_once_and_of_its_end_once(self, run: Any) -> None:
        async def main() -> None:
            server = Server("refuses")
            async with server.pool(max_connecting=2, name="a pool") as pool:
                async with anyio.create_task_group() as tasks:
                    for _ in range(3):
                        tasks.start_soon(expect, PoolTimeout, pool.acquire(5))
                server.state = "up"
                async with pool.connection():
                    pass
            kinds = server.kinds()
            failures = kinds[: kinds.index("outage")]
            assert set(failures) == {"connect_failed"}
            assert len(failures) >= 3
            assert kinds[len(failures) + 1] == "connect_failed"
            assert kinds.count("connect_failed") == len(server.attempts) - len(server.made)
            after = kinds[kinds.index("recovered") :]
            assert after[:2] == ["recovered", "connected"]
            assert set(after[2:]) <= {"connected", "closed"}
            assert kinds.count("outage") == kinds.count("recovered") == 1
            for event in server.events:
                assert event.pool == "a pool"
                failed = event.kind in {"connect_failed", "outage"}
                assert isinstance(event.error, ConnectionRefusedError) is failed
                assert (event.info is not None) is (event.kind in {"connected", "closed"})

        run(main)

    def test_an_error_of_the_last_outage_is_not_blamed_for_a_timeout_of_today(
        self, run: Any
    ) -> None:
        async def main() -> None:
            server = Server("refuses")
            async with server.pool(max_size=1) as pool:
                await expect(PoolTimeout, pool.acquire(1))
                server.state = "up"
                async with pool.connection():
                    with pytest.raises(PoolTimeout) as info:
                        await pool.acquire(1)
                assert info.value.__cause__ is None
                assert "connecting fails" not in str(info.value)

        run(main)


class TestStatisticsOfWhatWentWrong:
    @pytest.mark.parametrize("how", ["raises", "says no", "hangs"])
    def test_a_connection_that_fails_its_check_is_lost(self, run: Any, how: str) -> None:
        async def main() -> None:
            server = Server()

            async def check(connection: Connection) -> bool | None:
                if not connection.dead:
                    return None
                if how == "hangs":
                    await anyio.sleep_forever()
                if how == "raises":
                    raise ConnectionResetError
                return False

            pool = server.pool(check=check, check_idle=0, check_timeout=2, min_size=2, max_size=2)
            async with pool:
                await pool.wait()
                server.dies("up")
                began = now()
                async with pool.connection() as connection:
                    assert not connection.dead
                assert now() - began <= (2 if how == "hangs" else 0) + 2 * server.takes + EXACT
                await pool.check()
                await anyio.sleep(3)
                stats = pool.get_stats()
                assert stats["connections_lost"] == stats["closed_check"] == 2
                assert stats["returns_bad"] == stats["connections_errors"] == 0
                await borrow_all(pool, server)
                errors = [event.error for event in server.events if event.reason == "check"]
                assert [type(error) for error in errors] == 2 * [
                    {
                        "raises": ConnectionResetError,
                        "says no": ConnectionError,
                        "hangs": TimeoutError,
                    }[how]
                ]

        run(main)

    @pytest.mark.parametrize("how", ["raises", "hangs"])
    def test_a_connection_that_fails_its_reset_is_a_bad_return(self, run: Any, how: str) -> None:
        async def main() -> None:
            server = Server()

            async def reset(connection: Connection) -> None:
                if how == "hangs" and connection.dead:
                    await anyio.sleep_forever()
                if connection.dead:
                    raise ConnectionResetError

            async with server.pool(reset=reset, check_timeout=2, max_size=2) as pool:
                first, second = await pool.acquire(), await pool.acquire()
                first.dead = True
                pool.release(first)
                pool.discard(second)  # is closed without a reset
                async with pool.connection() as third:
                    assert third not in (first, second)
                await anyio.sleep(3)
                stats = pool.get_stats()
                assert stats["returns_bad"] == 2
                assert stats["closed_reset"] == stats["closed_discard"] == 1
                assert stats["connections_lost"] == 0
                await borrow_all(pool, server)

        run(main)

    @pytest.mark.parametrize("how", ["raises", "hangs"])
    def test_a_connection_that_can_not_even_be_closed_costs_no_slot(
        self, run: Any, how: str
    ) -> None:
        async def main() -> None:
            server = Server()

            async def close(connection: Connection) -> None:
                connection.closed += 1
                if how == "hangs":
                    await anyio.sleep_forever()
                raise OSError("not even that")

            async with server.pool(close=close, close_timeout=2, max_size=1) as pool:
                pool.discard(await pool.acquire())
                began = now()
                async with pool.connection():
                    pass
                took = server.takes + (2 if how == "hangs" else 0)
                assert now() - began == pytest.approx(took, abs=EXACT)
                assert server.kinds()[1:3] == ["close_failed", "closed"]
                await borrow_all(pool, server)
            assert [connection.closed for connection in server.made] == [1, 1]

        run(main)


@pytest.mark.slow
@pytest.mark.anyio
async def test_an_outage_in_which_there_is_no_room_for_an_attempt_takes_no_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    server = Server()
    async with server.pool(max_size=2) as pool:
        connection = await pool.acquire()
        server.state = "refuses"
        await expect(PoolTimeout, pool.acquire(0.02))
        with anyio.fail_after(PATIENCE):
            while "outage" not in server.kinds():
                await anyio.sleep(0.001)
        looks = 0
        carry_out = Maintenance._carry_out

        def counted(self: Maintenance[Any]) -> float:
            nonlocal looks
            looks += 1
            return carry_out(self)

        monkeypatch.setattr(Maintenance, "_carry_out", counted)
        await pool.resize(0, 1)
        await anyio.sleep(0.3)
        pool.release(connection)
    assert 0 < looks < 50


@pytest.mark.anyio
async def test_a_connection_made_where_a_lost_one_was_is_a_new_one() -> None:
    class Roomy:
        """Of an uncommon size, so that it is the next one of these that gets its memory."""

        __slots__ = ("__weakref__", *(f"slot{number}" for number in range(40)))

    made: list[int] = []
    rejected: list[Roomy] = []
    lost: list[Roomy] = []

    async def connect() -> Roomy:
        # Nothing but chance decides when Python collects something: for instance, now.
        lost.clear()
        found = Roomy()
        while made and id(found) != made[0] and len(rejected) < 1000:
            rejected.append(found)
            found = Roomy()
        made.append(id(found))
        return found

    events: list[PoolEvent] = []
    async with ConnectionPool(connect, max_size=2, on_event=events.append) as pool:
        lost.append(await pool.acquire())
        async with pool.connection(10):
            assert made[0] == made[1], "the memory was not used again"
            assert "connect_failed" not in [event.kind for event in events]
            async with pool.connection(10):
                pass


# --- What hangs keeps nobody from what does not ---


class Line:
    """A connection that may be dead without a sign of it."""

    dead = False

    def close(self) -> None:
        pass


Run = Callable[[Main], None]


async def use_once(pool: ConnectionPool[Line], how: str) -> None:
    """Borrow a connection and give it back, by a block or by hand."""
    if how == "release":
        pool.release(await pool.acquire())
    else:
        async with pool.connection():
            pass


@pytest.mark.parametrize("how", ["release", "block"])
@pytest.mark.parametrize("others_are_idle", [True, False])
def test_a_reset_that_hangs_keeps_nobody_from_other_connections(
    run: Run, others_are_idle: bool, how: str
) -> None:
    async def main() -> None:
        slow: list[Line] = []

        async def reset(line: Line) -> None:
            if line in slow:
                await anyio.sleep(4)

        pool = ConnectionPool(
            Line,
            min_size=10 if others_are_idle else 0,
            max_size=10,
            reset=reset,
            check=lambda _: True,
            check_idle=0.2,
        )
        async with pool, anyio.create_task_group() as tasks:
            await pool.wait()
            await anyio.sleep(0.3)  # from now on they have to be checked
            line = await pool.acquire()
            pool.release(line)
            await settle()
            slow.append(line)
            tasks.start_soon(use_once, pool, how)
            await settle()
            began = now()
            async with pool.connection(2) as other:
                assert other is not line
                assert now() - began == pytest.approx(0.1, abs=EXACT)
            assert pool.get_stats()["connections_num"] == (10 if others_are_idle else 2)

    run(main)


def test_connections_that_all_hang_when_they_are_checked_are_not_waited_for_in_turn(
    run: Run,
) -> None:
    async def check(line: Line) -> None:
        if line.dead:
            await anyio.sleep(FOR_EVER)

    async def main() -> None:
        async with ConnectionPool(Line, max_size=100, check=check) as pool:
            lines = [await pool.acquire() for _ in range(10)]
            for line in lines:
                line.dead = True
                pool.release(line)
            await anyio.sleep(1)
            began = now()
            async with pool.connection() as line:
                assert line not in lines
                assert now() - began == pytest.approx(1)  # 0.1 for each of them

    run(main)


def test_a_connect_that_hangs_since_before_an_outage_keeps_nobody_from_trying(run: Run) -> None:
    attempts: list[float] = []

    async def connect() -> Line:
        attempts.append(now())
        if len(attempts) == 1:
            await anyio.sleep(FOR_EVER)
        if len(attempts) == 2:
            raise ConnectionRefusedError
        return Line()

    async def main() -> None:
        async with ConnectionPool(connect, max_size=10, timeout=4) as pool:

            async def use() -> None:
                async with pool.connection():
                    await anyio.sleep(0.05)

            async with anyio.create_task_group() as tasks:
                for _ in range(8):
                    tasks.start_soon(use)
                    await anyio.sleep(0.2)
            assert attempts[2] - attempts[1] <= 0.1 + EXACT
            assert pool.get_stats()["timeouts"] == 0

    run(main)


def test_a_full_pool_has_no_outage(run: Run) -> None:
    refused = False

    def connect() -> Line:
        if refused:
            raise ConnectionRefusedError
        return Line()

    async def main() -> None:
        nonlocal refused
        pool = ConnectionPool(connect, max_size=2, fail_fast=True)
        async with pool, anyio.create_task_group() as tasks:
            line = await pool.acquire()
            refused = True
            with pytest.raises(PoolTimeout):
                await pool.acquire()
            await pool.resize(0, 1)  # so that nobody can find out when it is over

            async def give_back() -> None:
                await anyio.sleep(1)
                pool.release(line)

            tasks.start_soon(give_back)
            assert await pool.acquire(5) is line
            pool.release(line)

    run(main)


@pytest.mark.parametrize("how", ["release", "block"])
@pytest.mark.parametrize("check_timeout", [None, 60])
def test_a_pool_that_closes_waits_for_a_reset_only_so_long(
    run: Run, check_timeout: float | None, how: str
) -> None:
    async def reset(_: Line) -> None:
        await anyio.sleep(FOR_EVER)

    async def main() -> None:
        pool = ConnectionPool(Line, reset=reset, check_timeout=check_timeout, close_timeout=3)
        async with anyio.create_task_group() as tasks:
            async with pool:
                tasks.start_soon(use_once, pool, how)
                await anyio.sleep(1)
                began = now()
            assert now() - began == pytest.approx(3)
        assert pool.get_stats()["closed_reset"] == 1

    run(main)


def test_a_check_is_no_use_of_a_connection(run: Run) -> None:
    async def main() -> None:
        async with ConnectionPool(Line, max_size=3, max_idle=6, check=lambda _: True) as pool:
            async with pool.connection():
                pass
            for _ in range(8):
                await anyio.sleep(1)
                await pool.check()
            assert pool.get_stats()["closed_idle"] == 1

    run(main)


class Outcome(BaseException):
    """What test frameworks raise."""


@pytest.mark.parametrize("kind", ["connected", "connect_failed", "outage", "closed"])
def test_an_event_that_is_taken_ill_costs_nobody_a_connection(kind: str) -> None:
    told: list[str] = []

    def on_event(event: PoolEvent) -> None:
        if event.kind == kind and kind not in told:
            told.append(kind)
            raise Outcome

    attempts = 0

    def connect() -> Line:
        nonlocal attempts
        attempts += 1
        if 2 <= attempts <= 4:
            raise ConnectionRefusedError
        return Line()

    async def main() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda *_: None)
        async with ConnectionPool(connect, max_size=1, on_event=on_event, timeout=1000) as pool:
            for _ in range(3):
                began = now()
                pool.discard(await pool.acquire())
                await anyio.sleep(0)
                assert now() - began < 1
        assert told == [kind]

    run_virtually("asyncio", main)


@pytest.mark.parametrize("how", ["release", "block"])
@pytest.mark.parametrize("step", ["check", "reset", "close"])
def test_nor_does_a_plain_hook_that_is_taken_ill(step: str, how: str) -> None:
    calls = 0

    def hook(_: Line) -> None:
        nonlocal calls
        calls += 1
        if calls == 1:
            raise Outcome

    async def main() -> None:
        reported: list[object] = []
        asyncio.get_running_loop().set_exception_handler(
            lambda _, context: reported.append(context.get("exception"))
        )
        options: dict[str, Any] = {step: hook, "check_idle": 0 if step == "check" else None}
        raised = 0
        async with ConnectionPool(Line, max_size=1, timeout=1000, **options) as pool:
            for _ in range(3):
                began = now()
                try:
                    await use_once(pool, how)
                except Outcome:
                    raised += 1
                await settle()
                if step == "close":
                    await pool.drain()
                    await settle()
                assert now() - began < 1
            assert pool.get_stats()["pool_size"] == (0 if step == "close" else 1)
        gc.collect()
        # The task of the block is told, if it is the one that calls the hook.
        told_here = step == "reset" and how == "block"
        assert raised == (1 if told_here else 0)
        assert [type(error) for error in reported] == ([] if told_here else [Outcome])

    run_virtually("asyncio", main)


@pytest.mark.parametrize("kind", ["connect_failed", "outage"])
def test_nor_does_it_let_anybody_wait_in_vain(kind: str) -> None:
    def on_event(event: PoolEvent) -> None:
        if event.kind == kind:
            raise Outcome

    def connect() -> Line:
        raise ConnectionRefusedError

    async def main() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda *_: None)
        pool = ConnectionPool(connect, on_event=on_event, timeout=1000, fail_fast=True)
        async with pool:
            began = now()
            with pytest.raises(PoolTimeout):
                await pool.acquire()
            assert now() - began < 1

    run_virtually("asyncio", main)


def test_nor_does_the_pool_fail_to_close() -> None:
    def on_event(event: PoolEvent) -> None:
        if event.kind == "leaked":
            raise Outcome

    async def main() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda *_: None)
        pool = ConnectionPool(Line, max_size=1, on_event=on_event, timeout=1000)
        with contextlib.suppress(Outcome):
            async with pool:
                await pool.acquire()
                gc.collect()
                await anyio.sleep(1)
        assert pool.get_stats()["closed_collected"] == 1
        assert pool._maintenance.finished

    run_virtually("asyncio", main)


@pytest.mark.anyio
class TestConnecting(Virtual):
    async def test_a_replacement_does_not_wait_for_the_close_of_an_idle_connection(self) -> None:
        async def close(_: object) -> None:
            await anyio.sleep(4)

        pool = ConnectionPool(object, close=close, min_size=1, max_size=1, max_lifetime=100)
        async with pool:
            await pool.wait()
            await anyio.sleep(
                97.6
            )  # its jitter makes it 97.5 at least; the replacement comes before
            assert pool.get_stats()["pool_size"] == 2
            began = anyio.current_time()
            async with pool.connection():
                assert anyio.current_time() == began

    async def test_an_attempt_that_fails_late_is_no_outage_if_another_one_has_connected(
        self,
    ) -> None:
        calls: list[str] = []

        async def connect() -> object:
            calls.append("connect")
            if len(calls) == 1:
                await anyio.sleep(5)
                raise ConnectionError
            await anyio.sleep(4.9)
            return object()

        events: list[str] = []
        pool = ConnectionPool(
            connect, min_size=2, max_size=2, on_event=lambda event: events.append(event.kind)
        )
        async with pool:
            await anyio.sleep(5.1)
            assert events == ["connected", "connect_failed"]
            assert pool.healthy
