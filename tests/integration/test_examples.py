"""The programs in examples/, each run as a process under load from another process."""

from __future__ import annotations

import json
import socket
import sqlite3
import sys
import time
from contextlib import closing
from functools import partial
from typing import TYPE_CHECKING, Any
from urllib.error import HTTPError

import pytest
from support.services import EXAMPLES, Load, Service, Upstream

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from support.redis_servers import RedisServer

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(120),
    pytest.mark.skipif(not EXAMPLES.is_dir(), reason="there is no examples/ beside the tests"),
    pytest.mark.skipif(sys.platform == "win32", reason="needs SIGTERM"),
]
for _module in ("httpx", "hypercorn", "starlette", "uvicorn"):
    pytest.importorskip(_module)

LIMIT = 4  # of all examples
REQUESTS = 150
# Seconds. The same in all tests, because they use the same name on one server.
LEASE = "6"


@pytest.fixture
def upstream() -> Iterator[Upstream]:
    with Upstream(together=LIMIT) as upstream:
        yield upstream


def wait_until(condition: Callable[[], object], what: str, seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds} s in vain: {what}"
        time.sleep(0.02)


def is_ready(service: Service) -> bool:
    try:
        return service.get("/readyz") == "ready\n"
    except HTTPError:
        return False


def rows(database: Path, query: str) -> list[tuple[Any, ...]]:
    with closing(sqlite3.connect(database)) as connection:
        return connection.execute(query).fetchall()


def metrics_of(service: Service) -> dict[str, float]:
    lines = service.get("/metrics").splitlines()
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines)}


# --- orders


@pytest.fixture(params=["orders_asyncio.py", "orders_trio.py"])
def orders(request: pytest.FixtureRequest, upstream: Upstream, tmp_path: Path) -> Iterator[Service]:
    settings = {"PRICES": upstream.url, "DATABASE": str(tmp_path / "orders.db")}
    with Service(request.param, tmp_path, **settings) as service:
        wait_until(lambda: is_ready(service), "the warm-up")
        yield service


def check_orders(answers: list[Any], upstream: Upstream, database: Path) -> None:
    """Check that each order was priced and stored once, as its customer was told."""
    assert {status for status, _ in answers} == {201}
    told = sorted((order["number"], order["item"], order["total"]) for _, order in answers)
    assert rows(database, "SELECT number, item, total FROM orders ORDER BY number") == told
    assert all(total == 2 * upstream.price_of(item) for _, item, total in told)
    assert upstream.asked.total() == len(told)


def test_orders_are_taken_under_load(orders: Service, upstream: Upstream, tmp_path: Path) -> None:
    what = "POST /orders?item=item{m}&amount=2"
    with Load(orders, tmp_path, what, requests=REQUESTS) as load:
        report = load.report()
    assert (report["refused"], report["lost"], len(report["answers"])) == (0, [], REQUESTS)
    check_orders(report["answers"], upstream, tmp_path / "orders.db")
    assert upstream.most == LIMIT
    assert json.loads(orders.get("/orders/1"))["number"] == 1
    assert orders.get("/livez") == "alive\n"
    metrics = metrics_of(orders)
    # One for the tables and one for the question above.
    assert metrics['aiosync_pool_loans_total{pool="orders"}'] == REQUESTS + 2
    assert metrics['aiosync_pool_connections{pool="orders",state="in_use"}'] == 0
    assert 1 <= metrics['aiosync_pool_connections{pool="orders",state="idle"}'] <= 3
    assert metrics['aiosync_semaphore_free{semaphore="price service"}'] == LIMIT
    name = "aiosync_pool_wait_seconds"
    waits = [metrics[key] for key in metrics if key.startswith(f"{name}_bucket")]
    assert waits == sorted(waits)
    assert waits[-1] == metrics[f'{name}_count{{pool="orders"}}']
    orders.terminate()
    assert orders.wait() == 0
    assert orders.errors() == ""


def test_a_shutdown_under_load_loses_no_order(
    orders: Service, upstream: Upstream, tmp_path: Path
) -> None:
    what = "POST /orders?item=item{m}&amount=2"
    with Load(orders, tmp_path, what, requests=None) as load:
        load.wait_for_answers()
        orders.terminate()
        report = load.report()
    assert orders.wait() == 0
    assert report["lost"] == []
    check_orders(report["answers"], upstream, tmp_path / "orders.db")
    assert upstream.most == LIMIT
    assert orders.errors() == ""


def test_a_service_without_prices_is_not_ready(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    settings = {"PRICES": f"http://127.0.0.1:{port}", "DATABASE": str(tmp_path / "orders.db")}
    with Service("orders_asyncio.py", tmp_path, **settings) as service:
        assert service.get("/livez") == "alive\n"
        assert not is_ready(service)
        service.terminate()
        assert service.wait() == 0
        assert service.errors() == ""


# --- importer


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_threads_and_tasks_share_limit_and_pool(
    backend: str, upstream: Upstream, tmp_path: Path
) -> None:
    database = tmp_path / "prices.db"
    settings = {"PRICES": upstream.url, "DATABASE": str(database), "BACKEND": backend}
    with (
        Service("importer.py", tmp_path, **settings) as service,
        Load(service, tmp_path, "import item{n}", requests=REQUESTS) as imports,
        Load(service, tmp_path, "verify item{n}", requests=REQUESTS) as checks,
    ):
        imported, checked = imports.report(), checks.report()
        service.terminate()
        assert service.wait() == 0
        assert service.errors() == ""
    prices = {f"item{number}": upstream.price_of(f"item{number}") for number in range(REQUESTS)}
    for report in (imported, checked):
        assert (report["refused"], report["lost"]) == (0, [])
        assert {answer["item"]: answer["price"] for answer in report["answers"]} == prices
    assert dict(rows(database, "SELECT item, price FROM prices")) == prices
    assert upstream.asked == dict.fromkeys(prices, 2)
    assert upstream.most == LIMIT


# --- mail gateway


@pytest.mark.redis
def test_two_processes_keep_one_limit(
    redis_server: RedisServer, upstream: Upstream, tmp_path: Path
) -> None:
    settings = {"PROVIDER": upstream.url, "REDIS_URL": redis_server.url, "LEASE": LEASE}
    what = "POST /mails?to=user{n}"
    with (
        Service("mail_gateway.py", tmp_path, **settings) as one,
        Service("mail_gateway.py", tmp_path, **settings) as two,
    ):
        for service in (one, two):
            wait_until(partial(is_ready, service), "the gateway")
        with (
            Load(one, tmp_path, what, requests=REQUESTS) as first,
            Load(two, tmp_path, what, requests=REQUESTS, first=REQUESTS) as second,
        ):
            reports = [first.report(), second.report()]
        assert metrics_of(one)["mail_deliveries_limit"] == LIMIT
        assert metrics_of(one)["mail_processes"] >= 2
        for service in (one, two):
            service.terminate()
            service.wait()
            assert service.errors() == ""
    for report in reports:
        assert (report["refused"], report["lost"]) == (0, [])
        assert [status for status, _ in report["answers"]] == [202] * REQUESTS
    assert upstream.asked == dict.fromkeys((f"user{n}" for n in range(2 * REQUESTS)), 1)
    assert upstream.most == LIMIT


@pytest.mark.redis
def test_a_gateway_goes_on_when_another_is_killed(
    redis_server: RedisServer, upstream: Upstream, tmp_path: Path
) -> None:
    settings = {"PROVIDER": upstream.url, "REDIS_URL": redis_server.url, "LEASE": LEASE}
    what = "POST /mails?to=user{n}"
    with (
        Service("mail_gateway.py", tmp_path, **settings) as one,
        Service("mail_gateway.py", tmp_path, **settings) as two,
    ):
        wait_until(lambda: is_ready(one), "the gateway")
        wait_until(lambda: is_ready(two), "the other gateway")
        with Load(two, tmp_path, what, requests=None, first=1000) as doomed:
            doomed.wait_for_answers()
            two.kill()
            with Load(one, tmp_path, what, requests=REQUESTS) as load:
                report = load.report()
            doomed.report()
    assert (report["refused"], report["lost"]) == (0, [])
    assert [status for status, _ in report["answers"]] == [202] * REQUESTS
    assert {f"user{n}" for n in range(REQUESTS)} <= upstream.asked.keys()
    assert upstream.most <= LIMIT
