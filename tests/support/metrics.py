"""A meter provider whose metrics a test can read."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("opentelemetry.sdk.metrics", exc_type=ImportError)

from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader

from aiosync.opentelemetry import uninstrument_all


class Metrics:
    """What was reported to `provider`."""

    def __init__(self) -> None:
        self._reader = InMemoryMetricReader()
        self.provider = MeterProvider([self._reader], shutdown_on_exit=False)

    def metrics(self) -> dict[str, Any]:
        """Collect all metrics, and return them by their names."""
        data = self._reader.get_metrics_data()
        if data is None:
            return {}
        return {
            metric.name: metric
            for resource in data.resource_metrics
            for scope in resource.scope_metrics
            for metric in scope.metrics
        }

    def points(self, name: str) -> list[Any]:
        metric = self.metrics().get(name)
        return [] if metric is None else list(metric.data.data_points)

    def values(self, name: str) -> dict[str, float]:
        """Return the values of a gauge or counter, by the values of their attributes."""
        return {
            ",".join(str(point.attributes[key]) for key in sorted(point.attributes)): point.value
            for point in self.points(name)
        }

    def count(self, name: str) -> int:
        """Return how many values a histogram has."""
        return sum(point.count for point in self.points(name))

    def sum(self, name: str) -> float:
        return float(sum(point.sum for point in self.points(name)))


def some_metrics() -> Iterator[Metrics]:
    """Yield metrics of a provider of their own. A fixture of several files."""
    metrics = Metrics()
    yield metrics
    uninstrument_all(metrics.provider)
    metrics.provider.shutdown()
