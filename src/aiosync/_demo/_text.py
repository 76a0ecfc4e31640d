"""Bytes as text."""

from __future__ import annotations

import codecs
import re

# UTF-32 before UTF-16, whose mark is the beginning of the other.
_MARKS = [
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
]
# How Python (PEP 263), XML, HTML and editors declare an encoding.
_DECLARED = re.compile(rb"(?:coding|charset)\s*[=:]\s*[\"']?([-\w.]+)")
# Where a declaration is looked for.
_HEAD = 1024


class NotTextError(ValueError):
    """The bytes are not text."""


def decode(data: bytes) -> str:
    """Return bytes as text: by their byte order mark, as UTF-8, as declared, or as Windows-1252.

    :raises NotTextError: if they contain a zero byte, and no byte order mark
    """
    for mark, encoding in _MARKS:
        if data.startswith(mark):
            return data.decode(encoding, "replace")
    if b"\0" in data:
        raise NotTextError("not text")
    declared = _DECLARED.search(data, 0, _HEAD)
    for encoding in ["utf-8", declared[1].decode("ascii", "replace") if declared else "", "cp1252"]:
        try:
            return data.decode(encoding)
        except (UnicodeError, LookupError):  # LookupError: unknown, or not an encoding of text
            pass
    return data.decode("latin-1")  # which has a character for every byte
