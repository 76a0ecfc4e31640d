"""Fixtures of the tests of the pool."""

from __future__ import annotations

import pytest
from support.pool_stubs import verified_backend

backend = pytest.fixture(verified_backend, name="backend")
