"""Debugging is enabled for each test of this folder."""

from __future__ import annotations

from support.debugging import debugging

__all__ = ["debugging"]
