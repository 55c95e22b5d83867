"""`python -m megads explain [KEY]`: what a key of the config means, from the text under its field.

explain                 every section
explain parallel        the keys of one section
explain batch.global    one key: type, default, meaning
"""

from __future__ import annotations

import argparse
import difflib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict

from megads.config.keys import REQUIRED, Key, all_keys, section_keys
from megads.errors import ConfigError


def main(argv: Sequence[str]) -> int:
    """Print the documentation of a key, a section or all sections.

    Raises:
        ConfigError: there is no such key.
    """
    parser = argparse.ArgumentParser(prog="megads explain", description="Say what a key of the config means.")
    parser.add_argument("key", nargs="?", help="a section or a key such as batch.global; none: all sections")
    name = parser.parse_args(argv).key
    print("\n".join(_overview() if name is None else _describe(find(name))))
    return 0


def find(name: str) -> Key:
    """The key or section of that name.

    Raises:
        ConfigError: there is none; says the nearest ones.
    """
    keys = {key.name: key for key in all_keys()}
    if name in keys:
        return keys[name]
    same_leaf = [key for key in keys if key.rpartition(".")[2] == name.rpartition(".")[2]]
    near = same_leaf or difflib.get_close_matches(name, keys, n=3, cutoff=0.5)
    raise ConfigError(
        f"{name}: no such key of the config",
        allowed=", ".join(near) if near else None,
        do="`python -m megads explain` lists the sections, `explain SECTION` their keys",
    )


def _overview() -> Iterator[str]:
    for key in all_keys():
        if key.is_section:
            yield f"{key.name:12} {key.doc}"


def _describe(key: Key) -> Iterator[str]:
    yield f"{key.name}: {key.doc}"
    if isinstance(key.kind, type) and key.is_section:
        for entry in section_keys(key.kind, key.name):
            yield f"\n  {entry.name} = {_default(entry)}    [{entry.legal}]\n      {entry.doc}"
    else:
        yield f"  allowed: {key.legal}"
        yield f"  default: {_default(key)}"


def _default(key: Key) -> str:
    return REQUIRED if key.default == REQUIRED else json.dumps(key.default, default=asdict)
