"""A YAML 1.2 text as plain values with line numbers, and back.

Safe against hostile files: no tags, no aliases, bounded size and depth, duplicate keys are errors. What the
keys mean is not known here; `load.py` does that.
"""

from __future__ import annotations

import datetime
import io
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.events import (
    AliasEvent,
    DocumentStartEvent,
    Event,
    MappingEndEvent,
    MappingStartEvent,
    SequenceEndEvent,
    SequenceStartEvent,
)

from megads.errors import ConfigError

MAX_BYTES = 1 << 20
MAX_DEPTH = 16

KeyPath = tuple[str | int, ...]


@dataclass(frozen=True, slots=True)
class Document:
    """What a YAML text says.

    Attributes:
        tree: dict, list, str, int, float, bool or None, nested.
        lines: key path -> its line in the text, from 1.
        refused: key path -> why its value has no place in a config (its value in `tree` is None).
    """

    tree: object
    lines: Mapping[KeyPath, int]
    refused: Mapping[KeyPath, str]


@dataclass(slots=True)
class _Reader:
    """Turns the loader's values into plain ones, and notes lines and refusals on the way."""

    lines: dict[KeyPath, int] = field(default_factory=dict)
    refused: dict[KeyPath, str] = field(default_factory=dict)

    def plain(self, value: object, path: KeyPath) -> object:
        if isinstance(value, CommentedMap):
            tree = {}
            for key, item in value.items():
                at = (*path, str(key))
                self.lines[at] = value.lc.key(key)[0] + 1
                tree[str(key)] = self.plain(item, at)
            return tree
        if isinstance(value, CommentedSeq):
            for index in range(len(value)):
                self.lines[*path, index] = value.lc.item(index)[0] + 1
            return [self.plain(item, (*path, index)) for index, item in enumerate(value)]
        if value is None or isinstance(value, bool):
            return value
        for kind in (str, int, float):
            if isinstance(value, kind):
                if kind is float and not math.isfinite(float(value)):
                    self.refused[path] = f"{float(value)} is not a finite number"
                    return None
                return kind(value)
        self.refused[path] = _refusal(value)
        return None


def read(path: str | Path) -> Document:
    """Read a YAML file.

    Raises:
        ConfigError: no such file, not a text, too large, not YAML 1.2, or a tag, alias or duplicate key.
    """
    file = Path(path)
    if not file.is_file():
        found = (
            "a directory"
            if file.is_dir()
            else "something that is no file"
            if file.exists()
            else "nothing there"
        )
        raise ConfigError(f"{path}: cannot be read", found=found, allowed="a YAML file")
    try:
        with file.open("rb") as stream:
            data = stream.read(MAX_BYTES + 1)
    except OSError as error:
        raise ConfigError(
            f"{path}: cannot be read", found=error.strerror, allowed="a readable YAML file"
        ) from error
    if len(data) > MAX_BYTES:
        raise ConfigError(f"{path}: too large for a config", allowed=f"at most {MAX_BYTES} bytes")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{path}: not a text", found=f"byte {error.start} is not UTF-8", allowed="YAML"
        ) from error
    return parse(text, str(path))


def parse(text: str, name: str) -> Document:
    """Parse a YAML text; `name` stands before the line number in errors.

    Raises:
        ConfigError: not YAML 1.2, nested too deeply, or a tag, alias or duplicate key.
    """
    try:
        # The event stream is flat: depth, tags and aliases are seen before anything recursive runs.
        depth = 0
        for event in YAML().parse(text):
            depth += isinstance(event, MappingStartEvent | SequenceStartEvent)
            depth -= isinstance(event, MappingEndEvent | SequenceEndEvent)
            _check_event(event, depth, name)
        value = YAML().load(text)
    except MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ConfigError(f"{name}{line}: not valid YAML", found=error.problem or error.context) from error
    except YAMLError as error:
        raise ConfigError(f"{name}: not valid YAML", found=" ".join(str(error).split())) from error
    except (ValueError, RecursionError) as error:  # a number of too many digits, a date that is none
        raise ConfigError(f"{name}: a value cannot be read", found=str(error)) from error
    reader = _Reader()
    return Document(reader.plain(value, ()), reader.lines, reader.refused)


def write(tree: Mapping[str, object]) -> str:
    """The YAML text of plain values, one section a block; `parse` gives the same values back."""
    stream = io.StringIO()
    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]  # the library says None
    yaml.width = 4096
    yaml.allow_unicode = True
    yaml.dump(dict(tree), stream)
    return stream.getvalue()


def _check_event(event: Event, depth: int, name: str) -> None:
    line = event.start_mark.line + 1
    if depth > MAX_DEPTH:
        raise ConfigError(f"{name}:{line}: nested too deeply", allowed=f"at most {MAX_DEPTH} levels")
    if isinstance(event, AliasEvent):
        raise ConfigError(
            f"{name}:{line}: aliases are not supported", found=f"*{event.anchor}", do="write the value out"
        )
    if isinstance(event, DocumentStartEvent):
        if event.version not in (None, (1, 2)) or event.tags:
            raise ConfigError(f"{name}:{line}: YAML directives are not supported", allowed="YAML 1.2")
    elif (tag := getattr(event, "tag", None)) is not None:
        raise ConfigError(
            f"{name}:{line}: tags are not supported",
            found=tag,
            do="remove it",
        )


def _refusal(value: object) -> str:
    if isinstance(value, datetime.date):
        return f"{value} is a date for YAML; put it in quotes if it is meant as text"
    return f"a value of kind {type(value).__name__} is not supported"
