"""Text in many encodings."""

from __future__ import annotations

import pytest

from aiosync._demo._text import NotTextError, decode

TEXT = "naïve Größe €"


@pytest.mark.parametrize(
    "encoding",
    ["utf-8", "utf-8-sig", "cp1252", "utf-16", "utf-32", "utf-16-le", "utf-16-be", "utf-32-be"],
)
def test_encodings_that_need_no_declaration(encoding: str) -> None:
    mark = "\ufeff" if encoding.endswith("e") else ""
    assert decode((mark + TEXT).encode(encoding)) == TEXT


@pytest.mark.parametrize(
    "head",
    [
        "# -*- coding: iso8859-15 -*-\n",
        "# vim: set fileencoding=iso8859-15 :\n",
        "<?xml version='1.0' encoding='iso8859-15'?>\n",
        '<meta http-equiv="Content-Type" content="text/html; charset=iso8859-15">\n',
    ],
)
def test_a_declared_encoding(head: str) -> None:
    assert decode((head + TEXT).encode("iso8859-15")) == head + TEXT


@pytest.mark.parametrize("name", ["klingon", "hex", "undefined", "ascii", "idna"])
def test_a_declaration_that_is_no_use(name: str) -> None:
    text = f"# coding: {name}\n" + TEXT
    assert decode(text.encode("cp1252")) == text


def test_utf_8_is_tried_before_what_is_declared() -> None:
    text = "# coding: latin-1\n" + TEXT
    assert decode(text.encode()) == text


def test_any_other_bytes_are_latin_1() -> None:
    data = bytes(range(1, 256))
    assert decode(data) == data.decode("latin-1")


def test_a_broken_text_with_a_mark_is_readable_as_far_as_possible() -> None:
    assert decode(b"\xff\xfea\0b\0c") == "ab\ufffd"


@pytest.mark.parametrize("data", [b"\0", b"\x7fELF\0\0", b"text" * 5000 + b"\0"])
def test_a_zero_byte_is_not_text(data: bytes) -> None:
    with pytest.raises(NotTextError, match="not text"):
        decode(data)


def test_nothing_is_text() -> None:
    assert decode(b"") == ""
