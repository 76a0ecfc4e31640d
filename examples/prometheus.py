"""The statistics of pools and semaphores in the text format of Prometheus."""

from itertools import accumulate

from aiosync import Histogram, PoolStatistics, SemaphoreStatistics

CONTENT_TYPE = "text/plain; version=0.0.4"


def pool_metrics(pool: str, statistics: PoolStatistics) -> str:
    """Return the metrics of one pool."""
    label = f'pool="{pool}"'
    gauges = {
        f'connections{{{label},state="idle"}}': statistics.idle,
        f'connections{{{label},state="in_use"}}': statistics.in_use,
        f'connections{{{label},state="connecting"}}': statistics.connecting,
        f"connections_max{{{label}}}": statistics.max_size,
        f"waiting{{{label}}}": statistics.tasks_waiting + statistics.threads_waiting,
        f"loans_total{{{label}}}": statistics.loans,
        f"timeouts_total{{{label}}}": statistics.timeouts,
        f"refusals_total{{{label}}}": statistics.refusals,
        f"connect_errors_total{{{label}}}": statistics.connect_errors,
        f"leaks_total{{{label}}}": statistics.leaks,
    }
    lines = [f"aiosync_pool_{name} {value}" for name, value in gauges.items()]
    lines += histogram_lines("aiosync_pool_wait_seconds", label, statistics.wait_time)
    lines += histogram_lines("aiosync_pool_use_seconds", label, statistics.use_time)
    return "\n".join([*lines, ""])


def semaphore_metrics(semaphore: str, statistics: SemaphoreStatistics) -> str:
    """Return the metrics of one semaphore."""
    waiting = statistics.tasks_waiting + statistics.threads_waiting
    return (
        f'aiosync_semaphore_free{{semaphore="{semaphore}"}} {statistics.value}\n'
        f'aiosync_semaphore_waiting{{semaphore="{semaphore}"}} {waiting}\n'
    )


def histogram_lines(name: str, label: str, histogram: Histogram) -> list[str]:
    """Return the lines of a histogram, whose buckets are cumulative in Prometheus."""
    bounds = [*map(str, histogram.bounds), "+Inf"]
    buckets = zip(bounds, accumulate(histogram.counts), strict=True)
    return [
        *(f'{name}_bucket{{{label},le="{bound}"}} {count}' for bound, count in buckets),
        f"{name}_sum{{{label}}} {histogram.sum}",
        f"{name}_count{{{label}}} {histogram.count}",
    ]
