"""The keys of a config as data: name, type, default, legal values in words, documentation.

Read off the section dataclasses, so that error messages (`load.py`) and `explain.py` say the same and
nobody keeps a second list. Reading files lives in `document.py`, checking values in `load.py`.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterator
from dataclasses import MISSING, dataclass, fields, is_dataclass
from itertools import pairwise
from types import NoneType, UnionType
from typing import Annotated, Literal, Union, get_args, get_origin, get_type_hints

from annotated_types import Ge, Gt, Le, Lt
from pydantic.fields import FieldInfo

from megads.config.root import Config

REQUIRED = "required"


@dataclass(frozen=True, slots=True)
class Key:
    """One key of a config file.

    Attributes:
        name: as it is written, with its sections: `batch.global`.
        kind: its type, with constraints.
        default: a value, or `REQUIRED` if the file must say it.
        doc: the text under the field.
    """

    name: str
    kind: object
    default: object
    doc: str

    @property
    def is_section(self) -> bool:
        return is_dataclass(self.kind)

    @property
    def legal(self) -> str:
        return legal_values(self.kind)


def section_keys(section: type, prefix: str = "") -> tuple[Key, ...]:
    """The keys of one section class, in the order of the file; `prefix` is the section's own name."""
    hints = get_type_hints(section, include_extras=True)
    docs = _field_docs(section)
    keys = []
    for entry in fields(section):
        kind = hints[entry.name]
        name = _written_name(entry.name, kind)
        default: object = REQUIRED
        if entry.default is not MISSING:
            default = entry.default
        elif entry.default_factory is not MISSING:
            default = entry.default_factory()
        doc = docs.get(entry.name) or inspect.getdoc(kind) or ""
        keys.append(Key(f"{prefix}.{name}" if prefix else name, kind, default, " ".join(doc.split())))
    return tuple(keys)


def all_keys() -> Iterator[Key]:
    """Every section of a config and every key in it, in the order of the file."""
    for section in section_keys(Config):
        yield section
        if isinstance(section.kind, type):
            yield from section_keys(section.kind, section.name)


def plain_type(kind: object) -> object:
    """The type without its constraints: `int` for a whole number > 0."""
    return get_args(kind)[0] if get_origin(kind) is Annotated else kind


def alternatives(kind: object) -> tuple[object, ...]:
    """The members of a union type without None; any other type alone."""
    if get_origin(plain_type(kind)) in (Union, UnionType):
        return tuple(member for member in get_args(plain_type(kind)) if member is not NoneType)
    return (kind,)


def legal_values(kind: object) -> str:
    """The values a type allows, in words: `a whole number >= 1, or null`."""
    members = [_legal_member(member) for member in alternatives(kind)]
    if get_origin(kind) in (Union, UnionType) and NoneType in get_args(kind):
        members.append("null")
    return ", or ".join(members)


def _legal_member(kind: object) -> str:
    constraints: list[object] = []
    for item in get_args(kind)[1:] if get_origin(kind) is Annotated else ():
        constraints += item.metadata if isinstance(item, FieldInfo) else [item]
    kind = plain_type(kind)
    if get_origin(kind) is Literal:
        return " | ".join(str(value) for value in get_args(kind))
    if get_origin(kind) is tuple:
        items = get_args(kind)
        if items[-1] is Ellipsis:
            return f"a non-empty list of ({legal_values(items[0])})"
        return f"a list of {len(items)}, each {legal_values(items[0])}"
    if get_origin(kind) is dict:
        return "a mapping {key: value, ...}"
    if is_dataclass(kind) and isinstance(kind, type):
        return "{" + ", ".join(key.name for key in section_keys(kind)) + "}"
    if kind is int:
        return " ".join(["a whole number", _bounds(constraints, is_whole=True)]).strip()
    if kind is float:
        return " ".join(["a number", _bounds(constraints, is_whole=False)]).strip()
    return "true | false" if kind is bool else "non-empty text"


def _bounds(constraints: list[object], *, is_whole: bool) -> str:
    words = []
    for item in constraints:
        if isinstance(item, Gt):
            words.append(f">= {int(str(item.gt)) + 1}" if is_whole else f"> {item.gt}")
        elif isinstance(item, Ge):
            words.append(f">= {item.ge}")
        elif isinstance(item, Lt):
            words.append(f"< {item.lt}")
        elif isinstance(item, Le):
            words.append(f"<= {item.le}")
    return " and ".join(words)


def _written_name(name: str, kind: object) -> str:
    """The name in the file: the pydantic alias where a field has one (`global` is a Python keyword)."""
    for item in get_args(kind) if get_origin(kind) is Annotated else ():
        if isinstance(item, FieldInfo) and item.alias:
            return item.alias
    return name


def _field_docs(section: type) -> dict[str, str]:
    """Field name -> the string literal that follows it in the source of `section`."""
    (tree,) = ast.parse(textwrap.dedent(inspect.getsource(section))).body
    body = tree.body if isinstance(tree, ast.ClassDef) else []
    docs = {}
    for field, text in pairwise(body):
        if not (isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)):
            continue
        if isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
            docs[field.target.id] = str(text.value.value)
    return docs
