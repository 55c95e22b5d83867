"""The values inside one decoded record (a JSON object, a row of Parquet), or in the user's words why they are not
usable.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

NUM_NAMED_KEYS = 8


class RecordError(Exception):
    """Why a record is bad."""


def text_of(value: object, what: str) -> bytes:
    """The UTF-8 of `value`, which errors call `what`.

    Raises:
        RecordError: it is no text, or text that no file can hold.
    """
    if not isinstance(value, str):
        raise RecordError(f"{what} is {json_type(value)}, not text")
    try:
        return value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RecordError(f"{what} holds half of a surrogate pair (character {error.start})") from error


def value_at(value: object, path: Sequence[str]) -> object:
    """What stands at the end of a path of keys.

    Raises:
        RecordError: a key is absent, or something on the way is no object.
    """
    for depth, name in enumerate(path):
        where = f" in {'.'.join(path[:depth])!r}" if depth else ""
        if not isinstance(value, Mapping):
            raise RecordError(f"no key {name!r}{where}, which is {json_type(value)}, not an object")
        if name not in value:
            raise RecordError(f"no key {name!r}{where} ({keys_of(value)})")
        value = value[name]
    return value


def keys_of(value: Mapping[str, object]) -> str:
    """The first keys of an object, for a message."""
    return f"keys: {', '.join(map(repr, list(value)[:NUM_NAMED_KEYS])) or 'none'}"


def json_type(value: object) -> str:
    """The JSON name of a decoded value's type, with its article."""
    for kind, name in (
        (type(None), "null"),
        (bool, "a boolean"),
        (int | float, "a number"),
        (str, "a string"),
        (list, "an array"),
        (Mapping, "an object"),
    ):
        if isinstance(value, kind):
            return name
    return f"a {type(value).__name__}"
