"""Tensors of other programs' checkpoints, read when they are needed; and which program a directory is from.

A conversion never holds a model: it is a mapping of names to `Values`, each of which reads its tensor (or a box of it)
from mapped files when it is asked. Formats: hf.py, megatron.py, deepspeed_files.py, universal.py, and megads' own.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Literal

import torch
from torch import Tensor

from megads.checkpoint.retention import steps_at
from megads.checkpoint.store import Store
from megads.errors import CheckpointError
from megads.parallel.shard import Box, Shape

Format = Literal["megads", "hf", "megatron", "deepspeed", "universal", "layers"]

PROGRAMS: Mapping[Format, str] = MappingProxyType(
    {
        "megads": "megads",
        "hf": "Hugging Face",
        "megatron": "Megatron-LM",
        "deepspeed": "DeepSpeed",
        "universal": "DeepSpeed's universal format",
        "layers": "Megatron-DeepSpeed",
    }
)

MAX_SMALL_BYTES = 1 << 20
"""Largest tracker file or config that is read as text."""

_MEGATRON_RANK = re.compile(r"mp_rank_\d{2,}(_\d{3})?(_\d{3})?")
_LAYER_FILE = re.compile(r"layer_\d{2,}-model_\d{2,}-model_states\.pt")
_ZERO_FILE = re.compile(r"(bf16_|fp16_)?zero_pp_rank_\d+_mp_rank_\d{2,}_?optim_states\.pt")
_STATES_FILE = re.compile(r"(zero_pp_rank_\d+_)?mp_rank_\d{2,}_model_states\.pt")
_ITERATION = re.compile(r"iter_\d{7,}|release")
_PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,200}")


@dataclass(frozen=True, slots=True)
class Values:
    """A tensor that is not in memory.

    Attributes:
        shape, dtype: what `read` gives for the whole box.
        read: a box of the tensor -> its values; memory: at most twice the tensor.
    """

    shape: Shape
    dtype: torch.dtype
    read: Callable[[Box], Tensor]

    @classmethod
    def of_whole(cls, shape: Shape, dtype: torch.dtype, *, whole: Callable[[], Tensor]) -> Values:
        """A tensor that can only be made as a whole."""
        return cls(shape, dtype, lambda box: whole()[box.slices])

    @property
    def size(self) -> int:
        """Bytes."""
        return Box.whole(self.shape).size * self.dtype.itemsize

    def whole(self) -> Tensor:
        """All of it."""
        return self.read(Box.whole(self.shape))

    def to(self, dtype: torch.dtype) -> Values:
        """The same, rounded to `dtype`."""
        return Values(self.shape, dtype, lambda box: self.read(box).to(dtype))


@dataclass(frozen=True, slots=True)
class Found:
    """A checkpoint of a known format.

    Attributes:
        path: the directory that holds its files: a step, an iteration, a tag.
    """

    format: Format
    path: Path


def detect(path: Path, *, store: Store) -> Found:
    """The format of what is at `path`, and where its files are: `path` itself, or the newest one in it.

    Raises:
        CheckpointError: nothing there, none of the known formats, or one that cannot be read.
    """
    if store.kind(path) != "directory":
        raise CheckpointError(f"{path}: no checkpoint there", found=store.kind(path), allowed="a directory")
    if steps := steps_at(path, store=store):
        return Found("megads", steps[0])
    for directory in (path, *_newest_in(path, store)):
        if kind := _format_of(directory, store):
            return Found(kind, directory)
    names = store.entries(path)
    if {"metadata.json", "common.pt", ".metadata"} & set(names):
        raise CheckpointError(
            f"{path}: Megatron's sharded format, whose index is a pickle of classes",
            found=", ".join(names[:6]),
            allowed="files model_optim_rng.pt: Megatron-LM with --ckpt-format torch",
            do="load it in Megatron-LM and save it with --ckpt-convert-format torch",
        )
    raise CheckpointError(
        f"{path}: not a checkpoint of a format that is known here",
        found=", ".join(names[:8]) or "an empty directory",
        allowed="a run or step of megads; config.json with safetensors files (Hugging Face); iter_XXXXXXX or "
        "mp_rank_XX (Megatron-LM); mp_rank_XX_model_states.pt with optimizer files, zero/ or layer files (DeepSpeed)",
    )


def _format_of(directory: Path, store: Store) -> Format | None:
    """The format of the files that lie in a directory itself."""
    names = store.entries(directory)
    if any(map(_LAYER_FILE.fullmatch, names)):
        return "layers"
    if "zero" in names and any(map(_STATES_FILE.fullmatch, names)):
        return "universal"
    if any(map(_ZERO_FILE.fullmatch, names)) or any(map(_STATES_FILE.fullmatch, names)):
        return "deepspeed"
    if any(map(_MEGATRON_RANK.fullmatch, names)):
        return "megatron"
    if "config.json" in names and any(
        name.endswith((".safetensors", ".safetensors.index.json")) for name in names
    ):
        return "hf"
    return None


def _newest_in(path: Path, store: Store) -> list[Path]:
    """The directories that the tracker files of `path` name, and its only iteration or step if there is no tracker."""
    found = []
    for tracker in ("latest_universal", "latest", "latest_checkpointed_iteration.txt"):
        if store.kind(path / tracker) == "file":
            name = read_small(path / tracker, store=store).strip()
            if tracker.endswith(".txt") and name.isdecimal():
                name = f"iter_{int(name):07d}"
            if not _PLAIN_NAME.fullmatch(name) or store.kind(path / name) != "directory":
                raise CheckpointError(
                    f"{path / tracker}: names no directory beside it",
                    found=repr(name)[:200],
                    allowed="a plain name",
                )
            found.append(path / name)
    if not found:
        inside = [path / name for name in store.entries(path) if _ITERATION.fullmatch(name) or "step" in name]
        found = [directory for directory in inside if store.kind(directory) == "directory"]
        if len(found) > 1:
            raise CheckpointError(
                f"{path}: several checkpoints and no file that names the newest",
                found=", ".join(directory.name for directory in found[:8]),
                allowed="one of them",
                do="give its directory",
            )
    return found


def read_small(path: Path, *, store: Store) -> str:
    """The text of a small file.

    Raises:
        CheckpointError: too large, or no text.
        OSError: it cannot be read.
    """
    data = store.read(path, offset=0, size=MAX_SMALL_BYTES + 1)
    try:
        if len(data) > MAX_SMALL_BYTES:
            raise ValueError(f"more than {MAX_SMALL_BYTES} bytes")
        return data.decode()
    except ValueError as error:
        raise CheckpointError(f"{path}: not a readable text", found=error) from error
