"""Config file + overrides -> `Config`, and every mistake at once.

    file --document.read--> tree + line numbers --overrides--> tree --pydantic, strict--> Config
                                                                       or its errors --> one ConfigError

A mistake is said as `file:line: key: what is wrong (allowed: ...)`. Whether correct values fit each other and
the ranks is not asked here: `assemble/rules.py` does that.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, is_dataclass, replace
from pathlib import Path
from typing import Any, get_args, get_origin

from pydantic import TypeAdapter, ValidationError

from megads.config import document
from megads.config.document import KeyPath
from megads.config.keys import REQUIRED, Key, all_keys, alternatives, legal_values, plain_type, section_keys
from megads.config.root import Config
from megads.errors import ConfigError

_UNKNOWN = ("unexpected_keyword_argument", "extra_forbidden")


def load(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a config file and apply `key=value` overrides; values of both are YAML 1.2 and checked alike.

    Raises:
        ConfigError: naming every unknown or missing key and every wrong value of the file and the overrides.
    """
    return _validated(document.read(path), str(path), overrides)


def load_text(text: str, overrides: Sequence[str] = (), *, source: str) -> Config:
    """As `load`, from a text that `source` names in messages (a checkpoint holds its run's config)."""
    return _validated(document.parse(text, source), source, overrides)


def _validated(text: document.Document, source: str, overrides: Sequence[str]) -> Config:
    if not isinstance(text.tree, dict):
        found = "an empty file" if text.tree is None else f"a {type(text.tree).__name__}"
        raise ConfigError(
            f"{source}: not a config", found=found, allowed=", ".join(_names(section_keys(Config)))
        )
    draft = _Draft(source, text)
    for override in overrides:
        draft.override(override)
    return draft.validate()


def dump(config: Config) -> str:
    """The YAML text of a config with every default written out; `load` gives an equal config back."""
    return document.write(tree(config))


def tree(config: Config) -> dict[str, dict[str, Any]]:
    """A config as plain values: section -> key -> value, as they are written in a file."""
    plain: dict[str, dict[str, Any]] = TypeAdapter(Config).dump_python(config, mode="json", by_alias=True)
    return plain


@dataclass(slots=True)
class _Draft:
    """A config that is not checked yet, with what is wrong in it so far."""

    file: str
    text: document.Document
    overrides: dict[KeyPath, str] = field(default_factory=dict)
    mistakes: dict[KeyPath, str] = field(default_factory=dict)

    def override(self, override: str) -> None:
        """Write `key=value` over the tree, or note why not."""
        name, equals, value = override.partition("=")
        path: KeyPath = tuple(name.split("."))
        self.overrides[path] = override
        if not equals:
            self.mistakes[path] = "no value (allowed: key=value)"
            return
        if problem := _refuse_override(path):
            self.mistakes[path] = problem
            return
        try:
            parsed = document.parse(value, "value")
        except ConfigError as error:
            self.mistakes[path] = f"not a YAML value ({' '.join(str(error).split())})"
            return
        self.mistakes.pop(path, None)
        parent: Any = self.text.tree
        for part in path[:-1]:
            if parent.get(part) is None:
                parent[part] = {}
            parent = parent[part]
            if not isinstance(parent, dict):
                return  # the section itself is a mistake, which is told by its own name
        parent[path[-1]] = parsed.tree
        for inner, problem in parsed.refused.items():
            self.mistakes[path + inner] = problem

    def validate(self) -> Config:
        for path, problem in self.text.refused.items():
            if not self._overridden(path):
                self.mistakes.setdefault(path, problem)
        tree: Any = self.text.tree
        for section in section_keys(Config):
            if section.name in tree and tree[section.name] is None:
                tree[section.name] = {}  # a section whose keys are all commented out
        config = None
        try:
            config = TypeAdapter(Config).validate_json(json.dumps(tree), strict=True)
        except ValidationError as error:
            for entry in error.errors(include_url=False):
                self._note(tree, entry["loc"], entry["type"])
        if config is None or self.mistakes:
            raise ConfigError(
                "\n".join(self._lines()), do="`python -m megads explain KEY` says what a key means and allows"
            )
        return config

    def _note(self, tree: object, loc: tuple[str | int, ...], problem: str) -> None:
        spot = _locate(tree, loc)
        if spot.path in self.mistakes:
            return
        if problem in _UNKNOWN:
            self.mistakes[spot.path] = _unknown(spot.path, spot.siblings)
        elif problem == "missing" and spot.siblings:
            self.mistakes[spot.path] = _missing(spot.kind)
        else:
            self.mistakes[spot.path] = f"found {_show(spot.value)} (allowed: {legal_values(spot.kind)})"

    def _overridden(self, path: KeyPath) -> str | None:
        """The override that wrote `path`, or a value around it."""
        return next((text for at, text in self.overrides.items() if path[: len(at)] == at), None)

    def _lines(self) -> Iterator[str]:
        """The mistakes in words: those of the file in its order, then those of the overrides."""
        told = []
        for path, problem in self.mistakes.items():
            parts = [other for other in self.mistakes if other != path and other[: len(path)] == path]
            if problem.startswith("found") and parts:
                continue  # the value as a whole is wrong because of a part of it, which is told
            override, line = self._overridden(path), self._line(path)
            where = f"{self.file}:{line}" if line else self.file
            if override is not None:
                where = f"override {override}"
            told.append((override is not None, line, f"{where}: {_dotted(path)}: {problem}"))
        return (text for _, _, text in sorted(told, key=lambda item: item[:2]))

    def _line(self, path: KeyPath) -> int:
        """The line of a key, or of the nearest one around it that is written; 0 if none is."""
        written = [
            self.text.lines[path[:end]] for end in range(len(path) + 1) if path[:end] in self.text.lines
        ]
        return written[-1] if written else 0


@dataclass(frozen=True, slots=True)
class _Spot:
    """Where in a config an error of pydantic is: key, type, value, and the keys that may stand there."""

    path: KeyPath
    kind: object
    value: Any
    siblings: tuple[Key, ...] = ()


def _locate(tree: object, loc: tuple[str | int, ...]) -> _Spot:
    """Follow pydantic's `loc` through the types and the values.

    pydantic tries every member of a union and reports all of them, each under a label of its own. The member
    that the value's own shape asks for is the one the user meant; errors of the others are told of the union
    as a whole.
    """
    spot = _Spot((), Config, tree)
    labels = iter(loc)
    for part in labels:
        members = alternatives(spot.kind)
        if len(members) > 1:
            meant = next((member for member in members if _has_shape(spot.value, member)), None)
            if meant is None or not str(part).startswith(_label(meant)):
                break
            spot = replace(spot, kind=meant)
            part = next(labels, "")
        if part != "":
            spot = _child(spot, part)
    return spot


def _child(spot: _Spot, part: str | int) -> _Spot:
    kind = plain_type(alternatives(spot.kind)[0])
    path = (*spot.path, part)
    if isinstance(part, int):
        in_list = isinstance(spot.value, list) and part < len(spot.value)
        return _Spot(path, get_args(kind)[0], spot.value[part] if in_list else None)
    siblings = section_keys(kind) if isinstance(kind, type) and is_dataclass(kind) else ()
    known = next((key.kind for key in siblings if key.name == part), None)
    return _Spot(path, known, spot.value.get(part) if isinstance(spot.value, dict) else None, siblings)


def _shape(kind: object) -> type:
    """The Python type that JSON gives a value of this kind."""
    kind = plain_type(kind)
    shape = get_origin(kind) or kind
    if is_dataclass(shape):
        return dict
    return list if shape is tuple else shape if isinstance(shape, type) else object


def _has_shape(value: object, kind: object) -> bool:
    return isinstance(value, _shape(kind))


def _label(kind: object) -> str:
    """How pydantic begins the name of a union member."""
    kind = plain_type(kind)
    return str(getattr(get_origin(kind) or kind, "__name__", ""))


def _refuse_override(path: KeyPath) -> str | None:
    """Why an override names no key of a config; None if it names one."""
    sections = section_keys(Config)
    section = next((key for key in sections if key.name == path[0]), None)
    if section is None:
        return _unknown(path[:1], sections, rest=path[1:])
    if len(path) == 1:
        return f"a section (allowed: {path[0]}.KEY=VALUE with KEY of {legal_values(section.kind)})"
    keys = section_keys(section.kind) if isinstance(section.kind, type) else ()
    if path[1] not in _names(keys):
        return _unknown(path, keys)
    if len(path) > 2:
        return f"no such key (allowed: the whole value, {_dotted(path[:2])}=VALUE)"
    return None


def _unknown(path: KeyPath, siblings: Sequence[Key], *, rest: KeyPath = ()) -> str:
    """The words for a key that does not exist: the nearest one, and those that may stand there.

    `rest`: what was written below the key.
    """
    names = [key.name for key in all_keys()]
    leaf = (*path, *rest)[-1]
    close = difflib.get_close_matches(str(path[-1]), _names(siblings), n=1)
    near = [_dotted((*path[:-1], name, *rest)) for name in close]
    near += [name for name in names if name.rpartition(".")[2] == leaf]
    near += difflib.get_close_matches(_dotted((*path, *rest)), names, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    return f"unknown key{hint} (allowed: {', '.join(_names(siblings))})"


def _missing(kind: object) -> str:
    if isinstance(kind, type) and is_dataclass(kind):
        required = [key for key in section_keys(kind) if key.default is REQUIRED]
        return f"missing (it needs {', '.join(_names(required))})"
    return f"missing (allowed: {legal_values(kind)})"


def _names(keys: Sequence[Key]) -> list[str]:
    return [key.name for key in keys]


def _show(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."


def _dotted(path: KeyPath) -> str:
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text
