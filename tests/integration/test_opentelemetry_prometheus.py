"""Metrics of a pool on SQLite, as Prometheus gets them over HTTP."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import anyio
import pytest
from support.helpers import InThread, until_async

from aiosync import Barrier, BrokenBarrierError, PoolTimeout, Semaphore, as_threading
from aiosync.recipes import sqlite_pool

pytest.importorskip("opentelemetry.exporter.prometheus", exc_type=ImportError)

from opentelemetry.exporter.prometheus import PrometheusMetricReader
from opentelemetry.sdk.metrics import MeterProvider
from prometheus_client import MetricsHandler

from aiosync.opentelemetry import instrument, instrument_all, uninstrument_all

pytestmark = pytest.mark.anyio

_SAMPLE = re.compile(r"^(?P<name>\w+)\{(?P<labels>.*)\} (?P<value>\S+)$", re.MULTILINE)
_LABEL = re.compile(r'(\w+)="([^"]*)"')


class Scraper:
    """What Prometheus does."""

    def __init__(self, port: int) -> None:
        self._url = f"http://127.0.0.1:{port}/metrics"

    async def scrape(self) -> dict[tuple[str, ...], float]:
        """Return the samples by their names and the values of their labels."""

        def get() -> str:
            with urlopen(self._url, timeout=10) as response:
                text: str = response.read().decode()
            return text

        samples: dict[tuple[str, ...], float] = {}
        for sample in _SAMPLE.finditer(await anyio.to_thread.run_sync(get)):
            labels = dict(_LABEL.findall(sample["labels"]))
            own = [labels[key] for key in sorted(labels) if not key.startswith("otel_scope")]
            samples[sample["name"], *own] = float(sample["value"])
        return samples


@pytest.fixture
def provider() -> Iterator[MeterProvider]:
    provider = MeterProvider([PrometheusMetricReader()], shutdown_on_exit=False)
    yield provider
    uninstrument_all(provider)
    provider.shutdown()


@pytest.fixture
def scraper(provider: MeterProvider) -> Iterator[Scraper]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), MetricsHandler)
    # Polls more often than that of `start_http_server`, so that it ends without a delay.
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield Scraper(server.server_port)
    server.shutdown()
    server.server_close()
    thread.join()


async def test_a_pool(provider: MeterProvider, scraper: Scraper, tmp_path: Path) -> None:
    pool = sqlite_pool(tmp_path / "db", max_size=2, name="orders", timeout=10)
    instrument(pool, provider)
    prefix = "db_client_connection"
    async with pool:
        assert await pool.run(lambda connection: connection.execute("SELECT 1").fetchone()) == (1,)
        async with pool.connection(), pool.connection():
            with pytest.raises(PoolTimeout):
                await pool.acquire(0.01)
            view = as_threading(pool)
            thread = InThread(lambda: view.release(view.acquire()))
            await until_async(lambda: pool.statistics().threads_waiting)
            samples = await scraper.scrape()
            assert samples[f"{prefix}_count", "orders", "used"] == 2
            assert samples[f"{prefix}_count", "orders", "idle"] == 0
            assert samples[f"{prefix}_max", "orders"] == 2
            assert samples[f"{prefix}_idle_max", "orders"] == 2
            assert samples[f"{prefix}_idle_min", "orders"] == 0
            assert samples[f"{prefix}_pending_requests", "orders"] == 1
            assert samples[f"{prefix}_timeouts_total", "orders"] == 1
            assert samples[f"{prefix}_create_time_seconds_count", "orders"] == 2
            assert samples[f"{prefix}_wait_time_seconds_count", "orders"] == 3
        await until_async(thread.done)
        samples = await scraper.scrape()
        assert samples[f"{prefix}_pending_requests", "orders"] == 0
        assert samples[f"{prefix}_wait_time_seconds_count", "orders"] == 4
        assert samples[f"{prefix}_wait_time_seconds_bucket", "orders", "+Inf"] == 4
        assert samples[f"{prefix}_wait_time_seconds_bucket", "orders", "10.0"] == 4
        assert samples[f"{prefix}_use_time_seconds_count", "orders"] == 4
        assert 0.005 < samples[f"{prefix}_use_time_seconds_sum", "orders"] < 10
    samples = await scraper.scrape()
    assert (f"{prefix}_max", "orders") not in samples  # it is closed
    assert samples[f"{prefix}_use_time_seconds_count", "orders"] == 4


async def test_all_while_it_is_scraped(provider: MeterProvider, scraper: Scraper) -> None:
    instrument_all(provider)
    semaphore, barrier = Semaphore(2, name="s"), Barrier(2, name="b")
    stop = threading.Event()

    def use() -> int:
        uses = 0
        while not stop.is_set():
            with as_threading(semaphore):
                uses += 1
        return uses

    async def use_in_task(into: list[Any]) -> None:
        while not stop.is_set():
            async with semaphore:
                into.append(None)

    uses: list[Any] = []
    threads = [InThread(use) for _ in range(2)]
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(use_in_task, uses)
        for _ in range(5):
            samples = await scraper.scrape()
            assert 0 <= samples["aiosync_semaphore_value", "s"] <= 2
        with pytest.raises(BrokenBarrierError):
            await barrier.wait(0)
        stop.set()
    counts = [thread.result() for thread in threads]
    samples = await scraper.scrape()
    assert samples["aiosync_semaphore_wait_time_seconds_count", "s"] == sum(
        [len(uses), *(count for count in counts if isinstance(count, int))]
    )
    assert samples["aiosync_semaphore_value", "s"] == 2
    assert samples["aiosync_semaphore_waiters", "s"] == 0
    assert samples["aiosync_barrier_broken_rounds_total", "b", "timeout"] == 1
    assert samples["aiosync_barrier_broken_rounds_total", "b", "aborted"] == 0
