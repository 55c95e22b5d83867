"""Aligned text tables, and the order and grouping of tensor names in them."""

from __future__ import annotations

from collections.abc import Sequence


def table(rows: Sequence[Sequence[str]], *, left: int) -> list[str]:
    """Rows as aligned lines; the first `left` columns to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if index < left else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def natural(name: str) -> list[tuple[bool, int, str]]:
    """Sort key: layers.2 before layers.10."""
    parts = name.replace("/", ".").split(".")
    return [(part.isdecimal(), int(part) if part.isdecimal() else 0, part) for part in parts]


def shape_text(shape: Sequence[int]) -> str:
    """A shape as `4x16`."""
    return "x".join(map(str, shape)) or "scalar"


def module_of(name: str) -> str:
    """The module of a weight, layers taken together: `model/layers.3.mlp.up.weight` -> `layers.*.mlp`."""
    path = name.partition("/")[2].split(".")
    words = ["*" if word.isdecimal() else word for word in path]
    return ".".join(words[: 3 if words[0] == "layers" else 1])
