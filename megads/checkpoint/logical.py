"""A checkpoint as a mapping from names to tensors, read when they are asked for: the face for scripts.

    import megads.checkpoint
    step = megads.checkpoint.open("runs/quickstart")      # a run, its checkpoints, or a step
    step["model/layers.0.attention.qkv.weight"]           # torch.Tensor, the whole logical tensor, checked
    step.read("model/embedding.word.weight", rows=range(0, 100))

torch is imported when the first tensor is read: what only looks at names and shapes does without it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megads.checkpoint.reader import StepReader, open_step
from megads.checkpoint.retention import steps_at
from megads.checkpoint.store import Store
from megads.checkpoint.values import box_bits
from megads.errors import CheckpointError
from megads.parallel.shard import Box, Shape

if TYPE_CHECKING:
    from torch import Tensor


class Checkpoint(Mapping[str, "Tensor"]):
    """One committed step: logical name -> tensor on the CPU, in the dtype that was saved.

    Nothing is kept: each access reads the chunks it needs and checks them against their hashes.
    """

    def __init__(self, reader: StepReader) -> None:
        self._reader = reader

    @property
    def path(self) -> Path:
        """The step's directory."""
        return self._reader.path

    @property
    def step(self) -> int:
        """Optimizer steps done when it was saved."""
        return self._reader.step

    @property
    def objects(self) -> Mapping[str, Any]:
        """The small JSON values that were saved with it, e.g. `config` (YAML text)."""
        return self._reader.objects

    def shape(self, name: str) -> Shape:
        """Global shape of a tensor; reads nothing."""
        return self._reader.manifest.tensors[name].shape

    def dtype(self, name: str) -> str:
        """A tensor's dtype as torch names it, e.g. `bfloat16`; reads nothing."""
        return self._reader.manifest.tensors[name].dtype

    def __getitem__(self, name: str) -> Tensor:
        return self._read(name, Box.whole(self.shape(name)))

    def read(self, name: str, *, rows: range) -> Tensor:
        """Some rows of a tensor; only the chunks that hold them are read.

        Args:
            rows: indices along dim 0, with step 1.

        Raises:
            KeyError: no such tensor.
            IndexError: rows that it does not have.
            DamageError: they are not what was saved.
        """
        shape = self.shape(name)
        if not shape or rows.step != 1 or not 0 <= rows.start <= rows.stop <= shape[0]:
            raise IndexError(f"{name} of shape {shape} has no rows {rows}")
        return self._read(name, Box((rows.start, *(0 for _ in shape[1:])), (rows.stop, *shape[1:])))

    def __iter__(self) -> Iterator[str]:
        return iter(self._reader.manifest.tensors)

    def __len__(self) -> int:
        return len(self._reader.manifest.tensors)

    def __repr__(self) -> str:
        return f"Checkpoint({str(self.path)!r}, step {self.step}, {len(self)} tensors)"

    def _read(self, name: str, box: Box) -> Tensor:
        import torch

        dtype: torch.dtype = getattr(torch, self.dtype(name))
        bits = torch.from_numpy(box_bits(self._reader, name, box=box))
        return bits.view(dtype)


def newest_reader(path: str | Path) -> StepReader:
    """The newest step at `path`, opened.

    Raises:
        CheckpointError: no step there, or its manifest is damaged.
    """
    path = Path(path)
    steps = steps_at(path, store=Store())
    if not steps:
        raise CheckpointError(
            f"{path}: no checkpoint",
            found="no step in it" if path.exists() else "nothing there",
            allowed="the directory of a step, of a run, or of its checkpoints",
        )
    return open_step(steps[0])


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Open the newest step of a run, of its checkpoints, or one step. Reads its manifest and nothing else.

    Raises:
        CheckpointError: no step there, or its manifest is damaged.
    """
    return Checkpoint(newest_reader(path))
