"""Whether a Hugging Face directory computes what megads computes: logits of both on the same tokens.

Lives here: megads' own forward, one block in memory at a time, and the verdict. Does not live here: writing either
format (checkpoint/hf.py, checkpoint/save.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megads.checkpoint import hf
from megads.data.sequence import Batch
from megads.errors import CheckpointError
from megads.model.decoder import HeadBlock, make_blocks
from megads.model.spec import DecoderSpec
from megads.parallel.layout import Layout
from megads.parallel.mesh import build_mesh
from megads.parallel.parameter import Piece, Scope, parameter_table, stored_name
from megads.parallel.shard import ShardSpec
from megads.parallel.tally import tallied_in

TOLERANCE = 1e-5
"""Largest difference of two logits, as a share of the largest logit where that is above 1."""
NOT_COMPARED = "transformers is not installed: every bit was read back, but no logits were compared"
MAX_TOKENS = 128  # of one row
SAMPLE = """The harbour was quiet when the 3 boats came in; nobody had slept since Tuesday, and it rained.
def area(width: float, height: float) -> float:
    if width < 0:
        raise ValueError(f"width is {width}")
    return width * height  # 2.5 x 4 = 10
Gr\u00f6\u00dfe, \u4f60\u597d\uff0c\u4e16\u754c! (a, b) = [1, 2]
"""


@dataclass(frozen=True, slots=True)
class Difference:
    """How far values of transformers are from those of megads: both largest absolute values."""

    difference: float
    largest: float

    @classmethod
    def between(cls, ours: Tensor, theirs: Tensor) -> Difference:
        """Of two tensors; infinite if their shapes differ."""
        largest = float(ours.abs().max())
        return cls(
            float((ours - theirs).abs().max()) if ours.shape == theirs.shape else float("inf"), largest
        )

    @property
    def is_rounding(self) -> bool:
        """Whether the difference is rounding; False if it is NaN."""
        return self.difference <= TOLERANCE * max(1.0, self.largest)

    def to_json(self) -> dict[str, float]:
        """As in conversion.json."""
        return {"difference": self.difference, "largest": self.largest}


@dataclass(frozen=True, slots=True)
class Comparison:
    """How far the logits of transformers are from those of megads.

    Attributes:
        logits: of the logits.
        layers: block -> of what it gives to the next one; the last layer's output is seen in the logits alone.
        shape: [batch, seq, vocab] of the logits.
    """

    logits: Difference
    layers: Mapping[str, Difference]
    shape: tuple[int, ...]

    @property
    def difference(self) -> float:
        """Largest absolute difference of two logits."""
        return self.logits.difference

    @property
    def largest(self) -> float:
        """Largest absolute logit of megads."""
        return self.logits.largest

    @property
    def is_equal(self) -> bool:
        """Whether logits differ by rounding alone. Layers are no verdict: what cancels, cancels."""
        return self.logits.is_rounding

    @property
    def first_that_differs(self) -> str:
        """The first block whose output differs by more than rounding."""
        found = next((name for name, layer in self.layers.items() if not layer.is_rounding), None)
        return found or "the last layer or the head"

    def to_json(self) -> dict[str, Any]:
        """As in conversion.json."""
        layers = {name: layer.to_json() for name, layer in self.layers.items()}
        return {"logits": self.logits.to_json(), "layers": layers, "shape": list(self.shape)}

    def __str__(self) -> str:
        rows, seq, vocab = self.shape
        return (
            f"largest difference {self.difference:.2e} of {rows * seq * vocab:,} logits "
            f"(largest {self.largest:.3g}, allowed {TOLERANCE * max(1.0, self.largest):.1e})"
        )


def sample_tokens(ids: Sequence[int], spec: DecoderSpec) -> Tensor:
    """Tokens [2, seq] to compare on: real text, and ids from all over the vocabulary."""
    seq = min(spec.max_positions, MAX_TOKENS)
    text = (list(ids) * -(-seq // len(ids)))[:seq]
    spread = torch.linspace(0, spec.vocab - 1, seq).round().long().tolist()
    return torch.tensor([text, spread])


def declared(spec: DecoderSpec) -> dict[str, ShardSpec]:
    """Logical name -> declaration of every stored parameter, and of state stored with them; without memory for any."""
    mesh = build_mesh(Layout(), 0, device=torch.device("meta"))
    blocks = make_blocks(Scope(mesh, torch.float32, 0), spec, stages={0: range(spec.num_blocks)})[0]
    found = {stored_name(parameter): parameter.spec for parameter in parameter_table([blocks])}
    return found | {_name_of(piece): ShardSpec(piece.shape) for piece in _kept(blocks)}


def _kept(blocks: torch.nn.ModuleList) -> list[Piece]:
    """State of the blocks that is stored as weights are: the biases of routers."""
    pieces = (piece for module in tallied_in([blocks]) for piece in module.kept())
    return [piece for piece in pieces if piece.name.startswith("model/")]


def _name_of(piece: Piece) -> str:
    return piece.name.removeprefix("model/")


@dataclass(frozen=True, slots=True)
class Outputs:
    """What a model computes: hidden states [batch, seq, hidden] after each block but the last two, and logits."""

    states: Mapping[str, Tensor]
    logits: Tensor


@torch.no_grad()
def reference_outputs(
    spec: DecoderSpec, tokens: Tensor, *, read: Callable[[str], Tensor], dtype: torch.dtype
) -> Outputs:
    """What megads' own forward computes, one block in memory at a time.

    Args:
        tokens: [batch, seq] int64.
        read: logical name -> the whole tensor.
        dtype: of the arithmetic.
    """
    mesh = build_mesh(Layout(), 0)
    batch = Batch(
        tokens=tokens,
        labels=tokens,
        mask=torch.zeros_like(tokens, dtype=torch.bool),
        positions=torch.arange(tokens.shape[1]).expand_as(tokens),
        document_ids=None,
        samples=torch.arange(tokens.shape[0]),
        step=1,
    )
    payload: tuple[Tensor, ...] = ()
    states: dict[str, Tensor] = {}
    for number in range(spec.num_blocks):
        blocks = make_blocks(Scope(mesh, dtype, 0), spec, stages={0: range(number, number + 1)})[0].eval()
        for parameter in parameter_table([blocks]):
            parameter.copy_(read(stored_name(parameter)))
        for piece in _kept(blocks):
            piece.tensor.copy_(read(_name_of(piece)))
        block = blocks[0]  # behind the head is multi-token prediction, of which logits know nothing
        if isinstance(block, HeadBlock):
            return Outputs(states, block.logits(payload))
        payload = block(payload, batch).payload
        if number < spec.layers:
            name = f"layers.{number - 1}" if number else "embedding"
            states[name] = payload[0].transpose(0, 1)
    raise AssertionError("the last block of a decoder is its head")


def compare(
    directory: Path,
    spec: DecoderSpec,
    *,
    tokens: Tensor,
    read: Callable[[str], Tensor],
    dtype: torch.dtype,
) -> Comparison:
    """Compare the model in `directory`, run by transformers, with megads' own, layer by layer.

    Args:
        tokens, read, dtype: as in `reference_outputs`.

    Raises:
        CheckpointError: they differ by more than rounding, naming the first layer that does, or transformers cannot
            load the model.
    """
    ours = reference_outputs(spec, tokens, read=read, dtype=dtype)
    depth = 0 if spec.mtp is None else spec.mtp.depth
    ahead = tuple(f"model.layers.{spec.layers + number}." for number in range(depth))
    theirs = hf.transformers_outputs(directory, tokens, dtype=dtype, unread=ahead)
    layers = {
        name: Difference.between(mine, other)
        for (name, mine), other in zip(ours.states.items(), theirs.states, strict=False)
    }
    found = Comparison(Difference.between(ours.logits, theirs.logits), layers, tuple(ours.logits.shape))
    if not found.is_equal:
        raise CheckpointError(
            f"{directory}: transformers computes other logits than megads",
            found=f"{found}; the first that differs: {found.first_that_differs}",
            allowed="rounding",
            do="nothing was written; the family's names or its config.json are wrong for this model",
        )
    return found
