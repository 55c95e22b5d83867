"""Conversations to text by a declared template.

Lives here: the built-in templates, reading one from a YAML or JSON file, and the segments of a conversation. Does
not live here: tokens; special tokens are parsed in the template's own text and never in a message.

A template file (`counts`: do content and suffix of the role count in the loss):

    begin: ""
    between: "\\n"
    end: "\\n"
    roles:
      user:      {prefix: "<|im_start|>user\\n", suffix: "<|im_end|>"}
      assistant: {prefix: "<|im_start|>assistant\\n", suffix: "<|im_end|>", counts: true, aliases: [gpt]}
"""

from __future__ import annotations

import dataclasses
import difflib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from blake3 import blake3

from megads.data.field import RecordError, json_type, keys_of, text_of
from megads.data.record import RecordOptions, Role, Template
from megads.errors import DataError

TEXT_KEYS = ("begin", "between", "end")
ROLE_KEYS = ("prefix", "suffix", "counts", "aliases")


@dataclass(frozen=True, slots=True)
class Segment:
    """A piece of a conversation."""

    text: bytes
    is_counted: bool
    is_template: bool


def _roles(prefix: str, suffix: str) -> tuple[Role, ...]:
    """The three customary roles, their names put for `{}`."""
    return (
        Role("system", prefix.format("system"), suffix, is_counted=False),
        Role("user", prefix.format("user"), suffix, is_counted=False, aliases=("human",)),
        Role("assistant", prefix.format("assistant"), suffix, is_counted=True, aliases=("gpt",)),
    )


BUILT_IN = (
    Template("plain", _roles("", ""), between="\n"),
    Template("chatml", _roles("<|im_start|>{}\n", "<|im_end|>"), between="\n", end="\n"),
    Template(
        "llama3",
        _roles("<|start_header_id|>{}<|end_header_id|>\n\n", "<|eot_id|>"),
        begin="<|begin_of_text|>",
    ),
)


def open_template(name: str) -> Template:
    """The built-in template `name`, or the one in the YAML or JSON file of that name.

    Raises:
        DataError: there is none, or the file is no template.
    """
    template = next((template for template in BUILT_IN if template.name == name), None)
    if template is None:
        template = _read_template(Path(name))
    content = dataclasses.asdict(template) | {"name": "", "fingerprint": ""}
    return dataclasses.replace(
        template, fingerprint=blake3(json.dumps(content, sort_keys=True).encode()).hexdigest()
    )


def conversation(messages: object, options: RecordOptions) -> tuple[Segment, ...]:
    """The segments of a conversation, neighbours of one kind merged: never empty.

    Raises:
        RecordError: `messages` is no list of role and content that the template knows, or nothing in it counts.
    """
    template = options.template
    if template is None:
        raise ValueError("conversation() needs options with a template")
    what = f"the value of {options.messages_key!r}"
    if not isinstance(messages, Sequence) or isinstance(messages, str | bytes):
        raise RecordError(f"{what} is {json_type(messages)}, not an array of messages")
    if not messages:
        raise RecordError(f"{what} holds no messages")
    pieces = [Segment(template.begin.encode("utf-8"), is_counted=False, is_template=True)]
    for number, message in enumerate(messages, 1):
        if number > 1:
            pieces.append(Segment(template.between.encode("utf-8"), is_counted=False, is_template=True))
        pieces.extend(_pieces(f"message {number}", message, options=options, template=template))
    pieces.append(Segment(template.end.encode("utf-8"), is_counted=False, is_template=True))
    if not any(piece.is_counted for piece in pieces):
        raise RecordError(f"no message of a role that counts in the loss ({_counted(template)})")
    return tuple(_merged(pieces))


def _pieces(what: str, message: object, *, options: RecordOptions, template: Template) -> tuple[Segment, ...]:
    if not isinstance(message, Mapping):
        raise RecordError(f"{what} is {json_type(message)}, not an object")
    for key in (options.role_key, options.content_key):
        if key not in message:
            raise RecordError(f"{what} has no key {key!r} ({keys_of(message)})")
    name = message[options.role_key]
    role = next((role for role in template.roles if name in (role.name, *role.aliases)), None)
    if role is None:
        known = ", ".join(role.name for role in template.roles)
        raise RecordError(f"{what}: the template {template.name} has no role {name!r} (roles: {known})")
    content = text_of(message[options.content_key], f"{what}: {options.content_key!r}")
    if not content:
        raise RecordError(f"{what} is empty")
    return (
        Segment(role.prefix.encode("utf-8"), is_counted=False, is_template=True),
        Segment(content, role.is_counted, is_template=False),
        Segment(role.suffix.encode("utf-8"), role.is_counted, is_template=True),
    )


def _merged(pieces: Iterable[Segment]) -> list[Segment]:
    """Without empty pieces, and neighbouring texts of the template with the same say in the loss made one."""
    merged: list[Segment] = []
    for piece in pieces:
        if not piece.text:
            continue
        last = merged[-1] if merged else None
        if last and last.is_template and piece.is_template and last.is_counted == piece.is_counted:
            merged[-1] = dataclasses.replace(last, text=last.text + piece.text)
        else:
            merged.append(piece)
    return merged


def _counted(template: Template) -> str:
    return ", ".join(role.name for role in template.roles if role.is_counted)


def _read_template(path: Path) -> Template:
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    try:
        content = path.read_text(encoding="utf-8")
        # YAML 1.2 holds JSON; tabs, which JSON allows and YAML does not, are the exception
        given = json.loads(content) if path.suffix == ".json" else YAML(typ="safe", pure=True).load(content)
    except OSError as error:
        raise DataError(
            f"--chat-template {path}: no such template",
            found=error.strerror or error,
            allowed=", ".join(template.name for template in BUILT_IN) + ", or a YAML or JSON file",
        ) from error
    except (YAMLError, ValueError, RecursionError) as error:
        raise DataError(
            f"--chat-template {path}: not readable", found=error, allowed="YAML or JSON in UTF-8"
        ) from error
    table = _table(given, str(path), allowed=(*TEXT_KEYS, "roles"))
    given_roles = table.get("roles")
    if not isinstance(given_roles, Mapping) or not given_roles:
        raise _wrong(
            path, "roles", repr(given_roles), "a role or more, each with prefix, suffix, counts, aliases"
        )
    roles = tuple(_role(path, str(name), value=value) for name, value in given_roles.items())
    names = [name for role in roles for name in (role.name, *role.aliases)]
    double = next((name for name in names if names.count(name) > 1), None)
    if double is not None:
        raise _wrong(path, "roles", f"{double} twice", "each name and alias once")
    if not any(role.is_counted for role in roles):
        raise _wrong(path, "roles", "counts: true in none", "counts: true in the role that is learned")
    begin, between, end = (_text(path, key, table.get(key, "")) for key in TEXT_KEYS)
    return Template(str(path), roles, begin=begin, between=between, end=end)


def _role(path: Path, name: str, *, value: object) -> Role:
    where = f"roles.{name}"
    table = _table(value, f"{path}: {where}", allowed=ROLE_KEYS)
    counts, aliases = table.get("counts", False), table.get("aliases", [])
    if not isinstance(counts, bool):
        raise _wrong(path, f"{where}.counts", repr(counts), "true or false")
    if not isinstance(aliases, list) or not all(isinstance(alias, str) for alias in aliases):
        raise _wrong(path, f"{where}.aliases", repr(aliases), "a list of names")
    prefix, suffix = (_text(path, f"{where}.{key}", table.get(key, "")) for key in ("prefix", "suffix"))
    return Role(name, prefix, suffix, counts, tuple(aliases))


def _table(value: object, where: str, *, allowed: Sequence[str]) -> Mapping[str, object]:
    if not isinstance(value, Mapping):
        raise DataError(
            f"--chat-template {where}: not a table", found=repr(value), allowed=", ".join(allowed)
        )
    for key in value:
        if key not in allowed:
            near = difflib.get_close_matches(str(key), allowed, 1)
            raise DataError(
                f"--chat-template {where}: unknown key {key!r}",
                allowed=", ".join(allowed),
                do=f"perhaps {near[0]!r} is meant" if near else None,
            )
    return value


def _text(path: Path, key: str, value: object) -> str:
    if not isinstance(value, str):
        raise _wrong(path, key, repr(value), "text in quotes")
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise _wrong(path, key, "half of a surrogate pair", "valid Unicode")
    return value


def _wrong(path: Path, key: str, found: object, allowed: str) -> DataError:
    return DataError(f"--chat-template {path}: {key} cannot be used", found=found, allowed=allowed)
