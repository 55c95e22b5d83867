"""What Hugging Face calls the tensors of a model: a table a family, and the list of tensors that it makes of a model.

A family says once which tensor is called what; the parts of a fused tensor come from its own declaration:

    megads                                   Row                 Hugging Face
    layers.3.attention.qkv.weight [q|k|v, h] -> three names      model.layers.3.self_attn.{q,k,v}_proj.weight
    layers.3.mlp.up.weight [ffn, hidden]     -> is_transposed    transformer.h.3.mlp.c_fc.weight [hidden, ffn]
    layers.3.mlp.experts.down.weight [E, ..] -> a second *       model.layers.3.mlp.experts.{0..E-1}.down_proj.weight

`match` makes of it a list of `Entry`: one Hugging Face tensor and the box of the logical tensor that it is. Writing,
reading back and importing are loops over entries (hf.py). The tables are filled in `model/`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from megads.errors import CheckpointError
from megads.parallel.shard import Box, Shape, ShardSpec, block_box

_SHOWN = 6  # name patterns listed in one message


@dataclass(frozen=True, slots=True)
class Row:
    """What Hugging Face calls one tensor of a family; `*` stands for the layer number in all names.

    A second `*` in a Hugging Face name stands for the number of an expert: the tensor is stacked along its first dim,
    and each of its members stands there alone.

    Args:
        name: logical name.
        parts: Hugging Face names of the fused parts, in order; or one name for the whole tensor.
        is_transposed: whether Hugging Face stores [in, out].
    """

    name: str
    parts: tuple[str, ...]
    is_transposed: bool = False

    @property
    def is_dealt(self) -> bool:
        """Whether each member of a stacked tensor has a name of its own."""
        return self.parts[0].count("*") > 1


@dataclass(frozen=True, slots=True)
class Family:
    """A model family as Hugging Face knows it.

    Attributes:
        model_type: of config.json.
        rows: one for each tensor that a model of the family can have; of several for the same tensor the first is
            written, and that is read whose names are there.
        ignored: patterns of Hugging Face tensors that are constants, not weights.
        prefix: part of the names that older files leave out.
        to_config: the config section `model`, nothing left open -> what config.json says about it.
        from_config: config.json -> the config section `model`, without `family`.
        copies: (pattern of Hugging Face tensors that repeat another one, that one's name).
        fp8: patterns of Hugging Face tensors that may be stored in FP8 with scales of their blocks.
    """

    model_type: str
    rows: tuple[Row, ...]
    ignored: tuple[str, ...]
    prefix: str
    to_config: Callable[[Any], dict[str, Any]]
    from_config: Callable[[Mapping[str, Any]], dict[str, Any]]
    copies: tuple[tuple[str, str], ...] = ()
    fp8: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Entry:
    """One Hugging Face tensor: a box of a logical tensor, transposed or not.

    Attributes:
        foreign: Hugging Face name.
        name: logical name.
        whole: global shape of the logical tensor.
        is_member: whether it is one of the matrices that the logical tensor stacks along its first dim.
    """

    foreign: str
    name: str
    whole: Shape
    box: Box
    is_transposed: bool
    is_member: bool = False

    @property
    def shape(self) -> Shape:
        """Shape of the Hugging Face tensor."""
        shape = self.box.shape[1:] if self.is_member else self.box.shape
        return (*shape[:-2], *shape[:-3:-1]) if self.is_transposed else shape

    def to_foreign(self, values: Tensor) -> Tensor:
        """From the values of the box to the Hugging Face tensor; a view."""
        found = values.squeeze(0) if self.is_member else values
        return found.mT if self.is_transposed else found

    def from_foreign(self, tensor: Tensor) -> Tensor:
        """From the Hugging Face tensor to the values of the box; a view."""
        found = tensor.mT if self.is_transposed else tensor
        return found.unsqueeze(0) if self.is_member else found


def match(
    rows: Sequence[Row], declared: Mapping[str, ShardSpec], *, present: Collection[str] = ()
) -> tuple[Entry, ...]:
    """One entry for each Hugging Face tensor of a model, in order of declaration.

    Args:
        declared: logical name -> declaration, of every stored tensor of the model; tied copies left out.
        present: Hugging Face names that are there, where a tensor has several rows; empty: the first row.

    Raises:
        CheckpointError: a tensor that no row names.
    """
    by_name: dict[str, list[Row]] = {}
    for row in rows:
        by_name.setdefault(row.name, []).append(row)
    unnamed = [name for name in declared if pattern(name) not in by_name]
    if unnamed:
        raise CheckpointError(
            "this model has parameters that the family's Hugging Face names leave out", found=grouped(unnamed)
        )
    entries: list[Entry] = []
    for name, spec in declared.items():
        choices = [_entries(row, name, spec) for row in by_name[pattern(name)]]
        entries += next((found for found in choices if found[0].foreign in present), choices[0])
    return tuple(entries)


def _entries(row: Row, name: str, spec: ShardSpec) -> list[Entry]:
    """The Hugging Face tensors that one tensor is by a row."""
    layer = next((word for word in name.split(".") if word.isdigit()), "")
    boxes = [
        block_box(spec, number) if len(row.parts) > 1 else Box.whole(spec.shape)
        for number in range(len(row.parts))
    ]
    foreign = [part.replace("*", layer, 1) for part in row.parts]
    if not row.is_dealt:
        return [
            Entry(part, name, spec.shape, box, row.is_transposed)
            for part, box in zip(foreign, boxes, strict=True)
        ]
    return [
        Entry(part.replace("*", str(member)), name, spec.shape, _member(box, member), row.is_transposed, True)
        for member in range(spec.shape[0])
        for part, box in zip(foreign, boxes, strict=True)
    ]


def _member(box: Box, number: int) -> Box:
    """The part of a box that is matrix `number` of the stack."""
    return Box((number, *box.start[1:]), (number + 1, *box.stop[1:]))


def grouped(names: Iterable[str]) -> str:
    """Names with layer numbers taken together, for a message: `h.*.ln_1.weight (12), wte.weight`."""
    counts = Counter(map(pattern, names))
    shown = [f"{name} ({count})" if count > 1 else name for name, count in counts.most_common(_SHOWN)]
    return ", ".join(shown) + (f" and {len(counts) - _SHOWN} more" if len(counts) > _SHOWN else "")


def pattern(name: str) -> str:
    """A name with `*` for its numbers."""
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", name)


def require(config: Mapping[str, Any], key: str, *, allowed: tuple[object, ...], default: object) -> None:
    """Refuse a config.json whose `key` asks for something that megads' family does not do.

    Raises:
        CheckpointError: naming the key, its value and those that are allowed.
    """
    found = config.get(key, default)
    if found not in allowed:
        raise CheckpointError(
            f"config.json: {key} is not what this family of megads computes",
            found=found,
            allowed=" or ".join(map(str, allowed)),
        )
