"""Options of records that cannot be meant are refused."""

from __future__ import annotations

from typing import Any

import pytest

from megads.data.chat import open_template
from megads.data.record import RecordOptions
from megads.errors import DataError


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"key": ""}, r"names must be different and not empty\n.*''"),
        ({"columns": ("a", "a")}, r"names must be different and not empty\n.*'a', 'a'"),
        ({"columns": ("a.b", "a")}, r"one column lies inside another\n.*a\.b, a"),
        ({"columns": ("a",), "template": open_template("plain")}, "--columns and a chat template exclude"),
        ({"max_document_bytes": 0}, r"--max-document-bytes: out of range\n.*0\n.*1\.\.1073741824"),
        ({"max_document_bytes": 1 << 31}, "--max-document-bytes: out of range"),
        ({"min_bytes": 5, "max_bytes": 4}, r"no document can pass\n.*5\.\.4"),
        ({"min_bytes": -1}, "no document can pass"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], says: str) -> None:
    with pytest.raises(DataError, match=says):
        RecordOptions(**options)


def test_a_dot_steps_down_and_can_be_escaped() -> None:
    assert RecordOptions(key="meta.text").paths == (("meta", "text"),)
    assert RecordOptions(key="meta\\.text").paths == (("meta.text",),)
    assert RecordOptions(columns=("a", "b.c\\.d")).paths == (("a",), ("b", "c.d"))
    assert RecordOptions(template=open_template("plain"), messages_key="data.turns").paths == (
        ("data", "turns"),
    )
